"""Measures an int8 candidate against the 16-bit or 32-bit model it was made from.

The reference runs its plan with PyTorch. At each linear that is int8 in the candidate, the
candidate's runner computes its steps on the reference's input, so that a figure is that of a single
linear: errors of the blocks before it do not reach it. On a few rows of the first batch, integer
sums and codes are compared with exact ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vitrail.int8.exact import exact_groups, exact_hidden, exact_rows, value_of_codes
from vitrail.int8.figures import Integrity, LinearFigures
from vitrail.int8.guard import Measurement
from vitrail.int8.similarity import ChannelSums, accuracy
from vitrail.plan.plan import Step
from vitrail.plan.vision import vision_pooled
from vitrail.runtime.runner import Runner
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.runtime.towers import VisionTower
from vitrail.spec import BlockSpec
from vitrail_kernels.ops.linear_int8 import group_columns, is_unsigned

CODE_ROWS = 256
"""Rows whose codes are compared with exact ones: at width 384, about 100,000 codes a linear."""
SUM_ROWS = 32
"""Rows whose integer sums are compared with exact ones."""


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
        self._integrity = comparing.integrity


def _embed(tower: VisionTower, pixels: Tensor) -> Tensor:
    return tower.embeddings(pixels)["vision.embedding"].float().cpu()


class _Int8Steps(NamedTuple):
    """The candidate's steps of an int8 linear; ``norm`` writes the codes that ``linear`` reads."""

    name: str
    linear: Step
    norm: Step | None


def _int8_steps(tower: VisionTower) -> dict[str, _Int8Steps]:
    """By the common name of the weights, such as "vision.blocks.3.up"; "kv" is what a pooled plan
    computes of the last block's "qkv"."""
    steps: dict[str, _Int8Steps] = {}
    norms: dict[str, Step] = {}
    for step in vision_pooled(tower.spec, uint8=False).steps:
        buffers, weights = dict(step.buffers), dict(step.weights)
        if step.op == "norm_quant":
            norms[buffers["out"]] = step
        elif step.op in ("linear_int8", "linear_int8_grouped"):
            linear = weights["weight"].removesuffix(".codes")
            name = linear.removeprefix("vision.blocks.").replace(".kv", ".qkv")
            norm = norms[buffers["x"]] if step.op == "linear_int8" else None
            steps[linear] = _Int8Steps(name, step, norm)
    return steps


class _ComparingRunner(TorchRunner):
    """Runs the reference, and at each linear that is int8 in the candidate the candidate's too."""

    def __init__(self, reference: Runner, candidate: VisionTower) -> None:
        super().__init__(reference.weights, reference.dtype, reference.device)
        self._candidate, self._blocks = candidate.runner, candidate.spec.blocks
        self._steps = _int8_steps(candidate)
        self._checked: set[str] = set()
        self.sums: dict[str, ChannelSums] = {}
        self.integrity = Integrity(0, 0, 0, 0, 0, 0)

    def run_step(self, step: Step, arguments: Mapping[str, Tensor], longest: int) -> None:
        linear = dict(step.weights).get("weight", "").removesuffix(".weight")
        if step.op != "linear" or linear not in self._steps:
            super().run_step(step, arguments, longest)
            return
        steps = self._steps[linear]
        # without LayerScale, which would leave a few channels to decide the gain of a layer
        left = ("residual", "scale")
        alone = {arg: tensor for arg, tensor in arguments.items() if arg not in left}
        alone["out"] = torch.empty_like(arguments["out"])
        super().run_step(step, alone, longest)
        reference = alone["out"]
        output = self._run_candidate(steps, arguments["x"], longest)
        sums = self.sums.setdefault(steps.name, ChannelSums(reference.shape[1]))
        sums.add(output[:, : reference.shape[1]], reference)
        if len(alone) < len(arguments):
            super().run_step(step, arguments, longest)
        else:
            arguments["out"].copy_(reference)

    def _run_candidate(self, steps: _Int8Steps, x: Tensor, longest: int) -> Tensor:
        """The int8 linear of ``x`` (M, K), in the reference's stream: (M, N)."""
        weights = {arg: self._candidate.weights[name] for arg, name in steps.linear.weights}
        weights.pop("scale", None)
        inputs = self._quantize_input(steps, x, longest)
        rows, outputs = len(x), weights["weight"].shape[0]
        scalars = dict(steps.linear.scalars)
        activation, gated = scalars.get("activation"), bool(scalars.get("gated"))
        arguments = {**inputs, **weights}
        is_codes = "out_scale" in dict(steps.linear.buffers)
        columns = outputs // 2 if gated else outputs
        dtype = torch.int8 if is_codes else self.dtype
        arguments["out"] = torch.empty(rows, columns, dtype=dtype, device=self.device)
        if is_codes:
            groups = columns // group_columns(gated)
            arguments["out_scale"] = torch.empty(groups, rows, device=self.device)
        self._candidate.run_step(steps.linear, arguments, longest)
        if steps.name not in self._checked:
            self._checked.add(steps.name)
            self._check(steps, x, arguments, longest)
        out: Tensor = arguments["out"]
        if not is_codes:
            return out
        return value_of_codes(out, arguments["out_scale"], is_unsigned(activation, gated))

    def _quantize_input(self, steps: _Int8Steps, x: Tensor, longest: int) -> dict[str, Tensor]:
        """Codes and scales of ``x``, as the candidate's linear takes them."""
        if steps.norm is None:
            unsigned, group = _hidden_codes(self._blocks)
            columns = self._candidate.weights[dict(steps.linear.weights)["weight"]].shape[1]
            hidden = pad(x.double().cpu(), (0, columns - x.shape[1]))
            codes, scale = exact_groups(hidden, unsigned, group)
            return {"x": codes.to(self.device), "x_scale": scale.float().to(self.device)}
        codes = torch.empty(x.shape, dtype=torch.int8, device=self.device)
        scale = torch.empty(len(x), device=self.device)
        weights = {arg: self._candidate.weights[name] for arg, name in steps.norm.weights}
        arguments = {"out": codes, "out_scale": scale, "x": x, **weights}
        self._candidate.run_step(steps.norm, arguments, longest)
        return {"x": codes, "x_scale": scale}

    def _check(
        self, steps: _Int8Steps, x: Tensor, arguments: Mapping[str, Tensor], longest: int
    ) -> None:
        """Compare the sums of a linear, and the codes that it reads and writes, with exact ones."""
        few = slice(0, CODE_ROWS)
        scalars = dict(steps.linear.scalars)
        if steps.norm is not None:
            smooth = self._candidate.weights[dict(steps.norm.weights)["smooth"]]
            eps = dict(steps.norm.scalars)["eps"]
            exact, _ = exact_rows(x[few].double().cpu(), smooth.double().cpu(), eps)
            self._count_codes(arguments["x"][few], exact)
        if "out_scale" in arguments:
            exact, _ = exact_hidden(
                **{arg: arguments[arg][few].cpu() for arg in ("x", "x_scale")},
                **{arg: arguments[arg].cpu() for arg in ("weight", "weight_scale", "bias")},
                activation=scalars.get("activation"),
                gated=bool(scalars.get("gated")),
            )
            self._count_codes(arguments["out"][few], exact)
        self._count_sums(steps, arguments, longest)
        rows = len(arguments["weight_scale"])
        if steps.name.endswith("up"):  # rows that pad the hidden layer have scales of zero
            rows = self._blocks.mlp * (2 if self._blocks.gated else 1)
        scales = [arguments["weight_scale"][:rows]]
        if steps.norm is not None:
            scales.append(self._candidate.weights[dict(steps.norm.weights)["smooth"]])
        bad = sum(int((~(scale > 0) | scale.isinf()).sum()) for scale in scales)
        self.integrity = replace(self.integrity, bad_scales=self.integrity.bad_scales + bad)

    def _count_codes(self, codes: Tensor, exact: Tensor) -> None:
        difference = (codes.cpu().int() - exact.int()).abs()
        total = self.integrity
        self.integrity = replace(
            total,
            codes=total.codes + codes.numel(),
            differing_codes=total.differing_codes + int((difference > 0).sum()),
            code_difference=max(total.code_difference, int(difference.max())),
        )

    def _count_sums(self, steps: _Int8Steps, arguments: Mapping[str, Tensor], longest: int) -> None:
        """Run the linear with scales of 1 and without bias or activation: it writes its sums."""
        x, weight = arguments["x"], arguments["weight"]
        grouped = steps.norm is None
        groups = arguments["shift"].shape[0] if grouped else 1
        count = min(len(x), max(SUM_ROWS, groups))
        codes, columns = x[:count], x.shape[1] // groups
        scale, exact_codes = torch.ones(count, device=self.device), codes.cpu().double()
        if grouped:  # a row shows the sums of a single group
            scale = torch.eye(groups, device=self.device).repeat(1, math.ceil(count / groups))
            scale = scale[:, :count].contiguous()
            exact_codes += 128 * _hidden_codes(self._blocks)[0]
            exact_codes *= scale.t().cpu().repeat_interleave(columns, dim=1)
        ones = torch.ones(len(weight), device=self.device)
        out = torch.empty(count, len(weight), dtype=torch.float32, device=self.device)
        unit = {"out": out, "x": codes, "x_scale": scale, "weight": weight, "weight_scale": ones}
        unit |= {"bias": torch.zeros_like(ones)} | _only(arguments, "shift")
        kept = tuple(item for item in steps.linear.scalars if item[0] == "group")
        self._candidate.run_step(replace(steps.linear, scalars=kept), unit, longest)
        # exact: integers below 2^53, and rounded to fp32 as the kernel rounds them
        exact = (exact_codes @ weight.cpu().double().t()).float()
        wrong = int((out.cpu() != exact).sum())
        total = self.integrity
        self.integrity = replace(
            total, sums=total.sums + exact.numel(), wrong_sums=total.wrong_sums + wrong
        )


def _hidden_codes(blocks: BlockSpec) -> tuple[bool, int]:
    """Whether the codes of the MLP's hidden layer are unsigned, and the columns of a group."""
    return is_unsigned(blocks.activation, blocks.gated), group_columns(blocks.gated)


def _only(arguments: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: arguments[name] for name in names if name in arguments}
