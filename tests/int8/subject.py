"""A checkpoint, its int8 candidates, and the guard's verdict on them: pieces of the driver of
`vitrail quantize`, between which tests plant faults."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from vitrail.checkpoint.header import read_header
from vitrail.checkpoint.tensors import Source, TensorReader
from vitrail.image.preprocess import preprocess_uint8
from vitrail.int8.blocks import quantize_block
from vitrail.int8.calibration import Calibration, batched
from vitrail.int8.figures import Accuracy, LinearFigures
from vitrail.int8.guard import GOOD, GuardReport, Measurement, find_safe, integrity_faults
from vitrail.int8.measure import Comparison
from vitrail.int8.recipe import Recipe
from vitrail.int8.similarity import accuracy
from vitrail.model.loading import pixel_scale, read_model
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.runtime.towers import VisionTower
from vitrail.weights.folding import load_weights
from vitrail.weights.layout import Weights
from vitrail.weights.loader import WeightLoader
from vitrail.zoo import map_tensors

Tensors = dict[str, Tensor]
CPU = torch.device("cpu")
FEW = 8
"""Pictures that integrity is judged on: it holds on any."""


class Subject:
    """``checked``: the user's pictures that the guard judges on, at least 64."""

    def __init__(self, folder: Path, checked: Sequence[Image.Image]) -> None:
        self.loaded = read_model(folder, torch.float32, local_files_only=True)
        self.spec = self.loaded.spec
        assert self.spec.vision is not None, "a model with images"
        self.vision, self.blocks = self.spec.vision, self.spec.vision.blocks
        self.sources = map_tensors(self.loaded.checkpoint, self.spec)
        self.checked = self.pixels(checked)
        runner = TorchRunner(self.loaded.weights, torch.float32, CPU)
        self.reference = VisionTower(self.vision, self.spec.head, runner)

    def pixels(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """uint8 (H, W, channels) of each picture."""
        assert self.spec.image is not None, "a model with a processor"
        results = preprocess_uint8(list(pictures), self.spec.image, self.vision.channels)
        return [torch.from_numpy(pixels) for pixels in results]

    def read(self, name: str) -> Tensor:
        """A canonical tensor of the checkpoint, in fp32."""
        with TensorReader() as reader:
            return WeightLoader(self.spec, self.sources, reader, torch.float32).read(name)

    def quantize(self, pixels: Sequence[Tensor], *, gptq: bool = True) -> Tensors:
        """The canonical tensors of every int8 linear, calibrated on ``pixels``."""
        recipe = Recipe(rounding="gptq" if gptq else "nearest")
        calibration = Calibration(self.vision, self.loaded.weights, pixels)
        tensors: Tensors = {}
        for layer in range(self.blocks.layers):
            linears = [name.split(".") for name in self.blocks.int8_candidates]
            measured = [linear for block, linear in linears if int(block) == layer]
            moments = calibration.advance(measured, hessian=gptq)
            tensors |= quantize_block(self.loaded.weights, layer, moments, recipe)
        return tensors

    def tower(
        self,
        tensors: Tensors,
        names: tuple[str, ...],
        packed: Callable[[Weights], object] = lambda weights: None,
        runner: type[TorchRunner] = TorchRunner,
    ) -> VisionTower:
        """The candidate whose int8 linears are ``names``. ``packed`` may change its weights."""
        spec = self.spec.with_int8(names)
        assert spec.vision is not None, "a model with images"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "int8.safetensors")
            save_file(tensors, path)
            stored = {name: Source(entry) for name, entry in read_header(path).items()}
            sources = self.sources | stored
            weights = load_weights(spec, sources, torch.float32, pixel_scale(spec))
        packed(weights)
        return VisionTower(spec.vision, spec.head, runner(weights, torch.float32, CPU))

    @cached_property
    def embeddings(self) -> Tensor:
        """The reference's, of the checked pictures."""
        return self._embed(self.reference)

    def _embed(self, tower: VisionTower) -> Tensor:
        batches = batched(self.vision, self.checked)
        return torch.cat([tower.embeddings(pixels)["vision.embedding"] for pixels in batches])

    def accuracy(self, tower: VisionTower) -> Accuracy:
        """The accuracy of a candidate on the checked pictures."""
        return accuracy(self._embed(tower), self.embeddings)

    def report(
        self, build: Callable[[tuple[str, ...]], VisionTower], good: float = GOOD
    ) -> GuardReport:
        """The guard's report on the candidates that ``build`` makes.

        Integrity is measured on a few pictures, and accuracy on all of them unless integrity is
        broken.
        """
        few = Comparison(self.reference, list(batched(self.vision, self.checked[:FEW])))
        linears: Mapping[str, LinearFigures] = {}

        def measure(names: tuple[str, ...]) -> Measurement:
            nonlocal linears
            tower = build(names)
            measurement = few.measure(tower)
            linears = linears or measurement.linears
            if any(integrity_faults(measurement.integrity, linears)):
                return measurement
            return measurement._replace(accuracy=self.accuracy(tower))

        return find_safe(self.blocks, self.blocks.int8_candidates, measure, own=True, good=good)
