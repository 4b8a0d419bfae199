"""Measures an int8 candidate against the 16-bit or 32-bit model it was made from.

The reference runs its plan with PyTorch. At each linear that is int8 in the candidate, the
candidate's runner computes its steps on the reference's input, so that a figure is that of a single
linear: errors of the blocks before it do not reach it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from vitrail.int8.exact import exact_groups, value_of_codes
from vitrail.int8.figures import Integrity, LinearFigures
from vitrail.int8.guard import Measurement
from vitrail.int8.integrity import IntegrityCheck, int8_steps
from vitrail.int8.similarity import ChannelSums, accuracy
from vitrail.plan.plan import Step
from vitrail.runtime.runner import Runner
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.runtime.towers import VisionTower
from vitrail_kernels.ops.linear_int8 import group_columns, is_unsigned


class Comparison:
    """Measures candidates against ``reference`` on batches of pixels, as `VisionTower` takes them.

    The pictures must not have been used for calibration. Candidates differ in the choice of their
    int8 linears alone: the figures of a linear are measured with the first candidate that has it.
    """

    def __init__(self, reference: VisionTower, batches: Sequence[Tensor]) -> None:
        self._reference, self._batches = reference, batches
        self._linears: dict[str, LinearFigures] = {}
        self._integrity = Integrity(0, 0, 0, 0, 0, 0)
        self._embeddings: Tensor | None = None

    def measure(self, candidate: VisionTower) -> Measurement:
        """The figures of ``candidate``, whose runner may have any backend.

        Raises ValueError without int8 linears, or for fewer than two pictures.
        """
        names = candidate.spec.blocks.int8
        if not names:
            raise ValueError("the candidate has no int8 linear")
        if self._embeddings is None or not self._linears.keys() >= set(names):
            self._run_reference(candidate)
        assert self._embeddings is not None, "the reference has just run"
        embeddings = torch.cat([_embed(candidate, pixels) for pixels in self._batches])
        linears = {name: self._linears[name] for name in names}
        return Measurement(accuracy(embeddings, self._embeddings), self._integrity, linears)

    def _run_reference(self, candidate: VisionTower) -> None:
        comparing = _ComparingRunner(self._reference.runner, candidate)
        tower = VisionTower(self._reference.spec, self._reference.head, comparing)
        self._embeddings = torch.cat([_embed(tower, pixels) for pixels in self._batches])
        self._linears = {name: sums.figures for name, sums in comparing.sums.items()}
        self._integrity = comparing.integrity.total


def _embed(tower: VisionTower, pixels: Tensor) -> Tensor:
    return tower.embeddings(pixels)["vision.embedding"].float().cpu()


class _ComparingRunner(TorchRunner):
    """Runs the reference, and at each linear that is int8 in the candidate the candidate's too."""

    def __init__(self, reference: Runner, candidate: VisionTower) -> None:
        super().__init__(reference.weights, reference.dtype, reference.device)
        self._candidate, self._blocks = candidate.runner, candidate.spec.blocks
        self._steps = int8_steps(candidate)
        self.sums: dict[str, ChannelSums] = {}
        self.integrity = IntegrityCheck(candidate.runner, candidate.spec.blocks)

    def run_step(self, step: Step, arguments: Mapping[str, Tensor], longest: int) -> None:
        linear = dict(step.weights).get("weight", "").removesuffix(".weight")
        if step.op != "linear" or linear not in self._steps:
            super().run_step(step, arguments, longest)
            return
        # without LayerScale, which would leave a few channels to decide the gain of a layer
        left_out = ("residual", "scale")
        alone = {arg: tensor for arg, tensor in arguments.items() if arg not in left_out}
        alone["out"] = torch.empty_like(arguments["out"])
        super().run_step(step, alone, longest)
        reference = alone["out"]
        output = self._run_candidate(*self._steps[linear], arguments["x"], longest)
        name = linear.removeprefix("vision.blocks.").replace(".kv", ".qkv")
        channels, width = reference.shape[1], self._blocks.width
        layers = channels // width if name.endswith("qkv") else 1
        sums = self.sums.setdefault(name, ChannelSums(channels, layers))
        sums.add(output[:, :channels], reference)
        if len(alone) < len(arguments):
            super().run_step(step, arguments, longest)
        else:
            arguments["out"].copy_(reference)

    def _run_candidate(self, step: Step, norm: Step | None, x: Tensor, longest: int) -> Tensor:
        """The int8 linear of ``x`` (M, K), from the reference's stream: (M, N)."""
        arguments = {arg: self._candidate.weights[name] for arg, name in step.weights}
        arguments.pop("scale", None)
        if norm is None:
            arguments |= self._hidden_codes(x, arguments["weight"].shape[1])
        else:
            arguments |= self._normalized_codes(norm, x, longest)
        scalars = dict(step.scalars)
        gated = bool(scalars.get("gated"))
        columns = len(arguments["weight"]) // (2 if gated else 1)
        writes_codes = "out_scale" in dict(step.buffers)
        out = self._empty(len(x), columns, dtype=torch.int8 if writes_codes else self.dtype)
        arguments["out"] = out
        if writes_codes:
            arguments["out_scale"] = self._empty(columns // group_columns(gated), len(x))
        self._candidate.run_step(step, arguments, longest)
        self.integrity.check(step, arguments, longest)
        if not writes_codes:
            return out
        unsigned = is_unsigned(scalars.get("activation"), gated)
        return value_of_codes(out, arguments["out_scale"], unsigned)

    def _normalized_codes(self, norm: Step, x: Tensor, longest: int) -> dict[str, Tensor]:
        """Codes and scales of the residual stream ``x``, by the candidate's `norm_quant`."""
        out, out_scale = self._empty(*x.shape, dtype=torch.int8), self._empty(len(x))
        arguments = {arg: self._candidate.weights[name] for arg, name in norm.weights}
        arguments |= {"out": out, "out_scale": out_scale, "x": x}
        self._candidate.run_step(norm, arguments, longest)
        self.integrity.check(norm, arguments, longest)
        return {"x": out, "x_scale": out_scale}

    def _hidden_codes(self, x: Tensor, columns: int) -> dict[str, Tensor]:
        """Codes and scales of the MLP's hidden layer ``x``, padded to ``columns``."""
        blocks = self._blocks
        unsigned, group = is_unsigned(blocks.activation, blocks.gated), group_columns(blocks.gated)
        hidden = pad(x.double().cpu(), (0, columns - x.shape[1]))
        codes, scale = exact_groups(hidden, unsigned, group)
        return {"x": codes.to(self.device), "x_scale": scale.float().to(self.device)}

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)
