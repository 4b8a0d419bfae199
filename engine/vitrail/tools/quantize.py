"""`vitrail quantize`: a checkpoint -> a folder whose image tower has int8 weights.

The blocks are quantized one after the other (`vitrail.int8`), and finished blocks are kept beside
the output until it is written. The guard then compares the model with the one it was made from, on
pictures that did not calibrate, and decides which linears stay in int8.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vitrail._version import __version__
from vitrail.checkpoint.contents import INT8
from vitrail.checkpoint.tensors import Source
from vitrail.durable import check_replaceable
from vitrail.errors import InputError, refusal
from vitrail.int8.blocks import quantize_block
from vitrail.int8.calibration import Calibration, batched
from vitrail.int8.estimate import describe
from vitrail.int8.folder import write_folder
from vitrail.int8.guard import GOOD, GuardReport, Measurement, find_safe
from vitrail.int8.measure import Comparison
from vitrail.int8.partial import PartialFolder
from vitrail.int8.recipe import Recipe, Rounding, float_linears, int8_linears
from vitrail.int8.record import CalibrationRecord, Int8Record, Quantized
from vitrail.jobs.listing import Source as Picture
from vitrail.model.arguments import check_device, check_dtype
from vitrail.model.loading import LoadedCheckpoint, pixel_scale, read_model
from vitrail.runtime import RUNNERS, choose
from vitrail.runtime.towers import VisionTower
from vitrail.spec import ImageSpec, ModelSpec, VisionSpec
from vitrail.tools.pictures import (
    CALIBRATED,
    CHECKED,
    CROPS,
    Pictures,
    own_pictures,
    sample_pictures,
)
from vitrail.tools.workload import preprocessed_size
from vitrail.weights.folding import load_weights
from vitrail.weights.layout import Weights
from vitrail.zoo import map_tensors
from vitrail_kernels.ops.linear_int8 import group_columns

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Called with the number of blocks. Its context manager gives a function, which is called with the
number of blocks finished so far."""

CPU = (
    "with VNNI instructions, int8 was 2.8 to 3.9 times as fast as float32 on the models measured "
    "(docs/performance.md)"
)


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of a quantization of the checkpoint ``source``, as the user wrote it.

    ``spec``: of the model with the int8 linears that the guard left. ``float_linears``: the linears
    among qkv, up and down that are not int8, each with the reason. ``source_bytes``: of the tensors
    of the checkpoint. ``bytes``: of the written folder, or 0 if the guard refused.
    """

    source: str
    folder: Path
    spec: ModelSpec
    guard: GuardReport
    float_linears: Mapping[str, str]
    pictures: Pictures
    source_bytes: int
    bytes: int

    def lines(self) -> Iterator[tuple[str, str]]:
        """The report in words: (topic, text) pairs."""
        vision = self.spec.vision
        assert vision is not None, "a model without an image tower is not quantized"
        count, total = len(self.guard.int8), 3 * vision.blocks.layers
        yield "int8", f"{count} of {total} qkv, up and down projections"
        calibration = self.pictures.calibration
        origin = {"bundled": "crops of the sample photos", "own": "of your own pictures"}
        yield "calibration", f"{len(calibration)} {origin[self.pictures.origin]}"
        yield from self.guard.lines()
        for line in self.speed():
            yield "speed", line
        yield "on a CPU", CPU
        if not self.bytes:
            yield "written", "nothing: serve this checkpoint in 16 bits"
            return
        before, after = self.source_bytes / 1e6, self.bytes / 1e6
        yield "written", f"{self.folder}: {after:,.1f} MB, from {before:,.1f} MB"
        if self.guard.own:
            yield "next", f"vitrail embed PICTURES --model {self.folder}"
        else:
            options = f"--model {self.folder} --against {self.source}"
            yield "next", f"check it on your own pictures: vitrail verify PICTURES {options}"

    def speed(self) -> list[str]:
        """The estimate of `describe` for images of the size that the processor makes."""
        vision = self.spec.vision
        assert vision is not None, "a model without an image tower is not quantized"
        return describe(vision, preprocessed_size(self.spec), vision.blocks.int8)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return {
            "source": self.source,
            "folder": str(self.folder),
            "bytes": self.bytes,
            "source_bytes": self.source_bytes,
            "int8": list(self.guard.int8),
            "float_linears": dict(self.float_linears),
            "calibration": {
                "pictures": len(self.pictures.calibration),
                "origin": self.pictures.origin,
            },
            "guard": self.guard.to_dict(),
            "speed": self.speed(),
            "unread": self.pictures.unread,
        }


def quantize_model(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    images: Sequence[Picture] = (),
    *,
    calibration: int | None = None,
    check: int = CHECKED,
    alpha: float = 0.7,
    rounding: Rounding = "gptq",
    keep_fp16: Sequence[str] = (),
    min_centered: float = GOOD,
    overwrite: bool = False,
    device: str | int | torch.device = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    progress: Progress = lambda _: nullcontext(lambda _: None),
    say: Callable[[str], None] = lambda _: None,
) -> Summary:
    """Quantize the image tower of the checkpoint ``model``, and write the result to ``folder``.

    ``images``: the user's; none means crops of the sample photos, which verify nothing.
    ``calibration``: pictures to calibrate with; None means 64 of the images, or 36 crops; with 0,
    crops calibrate and all images check. ``check``: other pictures, for the guard. ``keep_fp16``:
    patterns of linears that stay in 16 bits (see `float_linears`). ``alpha``, ``rounding``: see
    `Recipe`. ``min_centered``: the mean
    centered cosine from which the guard says "good". ``device``: the guard runs the model there;
    the weights are always computed on the CPU. ``overwrite``: replace an earlier result. ``say`` is
    called with what goes on after the last block.

    The same inputs give the same bytes on one machine. After an interruption the same call goes on
    from FOLDER.partial.

    Raises InputError if an argument is wrong, there are too few images, or the folder cannot be
    written; CheckpointError as `vitrail.load`, and for a folder that is exported or int8 already.
    """
    out = Path(folder).absolute()
    checked_device = check_device(device)
    check_replaceable(out, INT8, overwrite)
    loaded = _read(model, revision, local_files_only)
    spec = loaded.spec
    vision, image = _image_tower(loaded)
    recipe = Recipe(alpha, rounding, group=group_columns(vision.blocks.gated))
    stay = float_linears(vision.blocks, keep_fp16)
    linears = int8_linears(vision.blocks, stay)
    if not linears:
        raise InputError(f"keep-fp16: got {list(keep_fp16)}, wanted linears left for int8")
    pictures = _pictures(images, image, vision, calibration, check)
    partial = PartialFolder(out, _key(loaded, recipe, linears, pictures))
    _quantize_blocks(loaded, linears, pictures, recipe, partial, progress)
    sources = map_tensors(loaded.checkpoint, spec) | partial.sources()
    report = _judge(loaded, linears, sources, pictures, checked_device, min_centered, say)
    stay |= {name: f"guard: {reason}" for name, reason in report.fallbacks.items()}
    final = spec.with_int8(report.int8)
    written = 0
    if report.verdict != "refused":

        def make_record(weights: str) -> Int8Record:
            digest, origin = pictures.digest, pictures.origin
            calibrated = CalibrationRecord(len(pictures.calibration), digest, origin)
            source = _quantized(loaded)
            return Int8Record(final, weights, source, recipe, stay, calibrated, report)

        written = write_folder(out, loaded.checkpoint, final, sources, make_record)
    partial.remove()
    source_bytes = sum(entry.nbytes for entry in loaded.checkpoint.tensors.values())
    source = loaded.checkpoint.source
    return Summary(source, out, final, report, stay, pictures, source_bytes, written)


# -- the checkpoint and the pictures ---------------------------------------------------------------


def _read(
    model: str | os.PathLike[str], revision: str | None, local_files_only: bool
) -> LoadedCheckpoint:
    """The checkpoint in fp32, refused before its weights are read if it cannot be quantized."""

    def check(spec: ModelSpec, source: str) -> None:
        if spec.int8:
            raise refusal(source, "int8 weights", "the checkpoint that they were quantized from")
        if spec.vision is None:
            expected = "a model with an image tower: text towers stay in 16 bits"
            raise refusal(source, spec.architecture, expected)
        if spec.image is None:
            raise refusal(
                source,
                "no preprocessor_config.json (or processor_config.json)",
                "it, because pictures calibrate",
            )

    return read_model(
        model, torch.float32, revision=revision, local_files_only=local_files_only, check=check
    )


def _image_tower(loaded: LoadedCheckpoint) -> tuple[VisionSpec, ImageSpec]:
    vision, image = loaded.spec.vision, loaded.spec.image
    assert vision is not None, "_read refuses other checkpoints"
    assert image is not None, "_read refuses other checkpoints"
    return vision, image


def _pictures(
    images: Sequence[Picture],
    image: ImageSpec,
    vision: VisionSpec,
    calibration: int | None,
    check: int,
) -> Pictures:
    smallest = 0 if images else 1
    if calibration is not None and calibration < smallest:
        raise InputError(f"calibration: got {calibration}, wanted at least {smallest} pictures")
    if check < 2:
        raise InputError(f"check: got {check}, wanted at least 2 pictures")
    if images:
        count = CALIBRATED if calibration is None else calibration
        return own_pictures(images, image, vision, count, check)
    return sample_pictures(image, vision, calibration or CROPS, check)


def _quantized(loaded: LoadedCheckpoint) -> Quantized:
    checkpoint = loaded.checkpoint
    return Quantized(checkpoint.name, checkpoint.revision, loaded.hash_weights())


# -- the weights -----------------------------------------------------------------------------------


def _key(
    loaded: LoadedCheckpoint, recipe: Recipe, linears: Sequence[str], pictures: Pictures
) -> dict[str, object]:
    """Everything that the tensors of a block depend on."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "weights": loaded.hash_weights(),
        "spec": loaded.spec.to_dict(),
        "recipe": asdict(recipe),
        "linears": list(linears),
        "pixels": pictures.digest,
    }


def _quantize_blocks(
    loaded: LoadedCheckpoint,
    linears: Sequence[str],
    pictures: Pictures,
    recipe: Recipe,
    partial: PartialFolder,
    progress: Progress,
) -> None:
    """Put the tensors of every block with one of ``linears`` into ``partial``."""
    vision, _ = _image_tower(loaded)
    layers = vision.blocks.layers
    todo = {int(name.partition(".")[0]) for name in linears}
    todo = {layer for layer in todo if not partial.has(layer)}
    calibration = None
    with progress(layers) as tell:
        for layer in range(max(todo, default=-1) + 1):
            if calibration is None:
                calibration = Calibration(vision, loaded.weights, pictures.calibration)
            measured = [
                linear
                for linear in ("qkv", "up", "down")
                if layer in todo and f"{layer}.{linear}" in linears
            ]
            moments = calibration.advance(measured, hessian=recipe.rounding == "gptq")
            if measured:
                partial.put(layer, quantize_block(loaded.weights, layer, moments, recipe))
            del moments  # those of the next block take their memory
            tell(layer + 1)


def _judge(
    loaded: LoadedCheckpoint,
    linears: tuple[str, ...],
    sources: Mapping[str, Source],
    pictures: Pictures,
    device: torch.device,
    min_centered: float,
    say: Callable[[str], None],
) -> GuardReport:
    """The guard's report on candidates whose int8 linears are ``linears`` or some of them."""
    vision, _ = _image_tower(loaded)
    spec, dtype = loaded.spec, check_dtype("auto", device)
    runner = RUNNERS[choose("auto", dtype, device)]

    def tower(spec: ModelSpec, weights: Weights | None = None) -> VisionTower:
        if weights is None:
            weights = load_weights(spec, sources, dtype, pixel_scale(spec))
        assert spec.vision is not None, "_read refuses other checkpoints"
        return VisionTower(spec.vision, spec.head, runner(weights, dtype, device))

    reference = tower(spec, loaded.weights if dtype == torch.float32 else None)
    comparison = Comparison(reference, list(batched(vision, pictures.checked)))

    def measure(names: tuple[str, ...]) -> Measurement:
        say(f"checking {len(names)} int8 linears on {len(pictures.checked)} pictures")
        return comparison.measure(tower(spec.with_int8(names)))

    return find_safe(vision.blocks, linears, measure, own=pictures.own, good=min_centered)
