"""Compares integer sums and codes of the int8 steps of a plan with exact ones.

The runner that serves the model computes the sums, with its own kernels. A few rows are enough: a
kernel that is wrong is wrong in all tiles of a kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vitrail.int8.exact import exact_hidden, exact_rows
from vitrail.int8.figures import Integrity
from vitrail.plan.plan import Step
from vitrail.plan.vision import vision_pooled
from vitrail.runtime.runner import Runner
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.runtime.towers import VisionTower
from vitrail.spec import BlockSpec
from vitrail_kernels.ops.linear_int8 import is_unsigned

CODE_ROWS = 256
"""Rows whose codes are compared: at width 384 about 100,000 codes a step."""
SUM_ROWS = 32
"""Rows whose integer sums are compared."""
INT8_LINEARS = ("linear_int8", "linear_int8_grouped")


class IntegrityCheck:
    """Checks steps after ``runner`` has run them, each label once; ``total`` is the result."""

    def __init__(self, runner: Runner, blocks: BlockSpec) -> None:
        self._runner, self._blocks = runner, blocks
        self._labels: set[str] = set()
        self.total = Integrity(0, 0, 0, 0, 0, 0)

    def check(self, step: Step, arguments: Mapping[str, Tensor], longest: int) -> None:
        """Check a step of `norm_quant` or of an int8 linear. ``arguments``: its tensors, of which
        the outputs are written."""
        if step.label in self._labels:
            return
        self._labels.add(step.label)
        if step.op == "norm_quant":
            self._check_norm(step, arguments)
        elif step.op in INT8_LINEARS:
            self._check_linear(step, arguments, longest)

    def _check_norm(self, step: Step, arguments: Mapping[str, Tensor]) -> None:
        few, smooth = slice(0, CODE_ROWS), arguments["smooth"]
        x = arguments["x"][few].double().cpu()
        codes, _ = exact_rows(x, smooth.double().cpu(), dict(step.scalars)["eps"])
        self._count_codes(arguments["out"][few], codes)
        self._count_scales(smooth)

    def _check_linear(self, step: Step, arguments: Mapping[str, Tensor], longest: int) -> None:
        scalars, few = dict(step.scalars), slice(0, CODE_ROWS)
        if "out_scale" in arguments:
            codes, _ = exact_hidden(
                x=arguments["x"][few].cpu(),
                x_scale=arguments["x_scale"][few].cpu(),
                weight=arguments["weight"].cpu(),
                weight_scale=arguments["weight_scale"].cpu(),
                bias=arguments["bias"].cpu(),
                activation=scalars.get("activation"),
                gated=bool(scalars.get("gated")),
            )
            self._count_codes(arguments["out"][few], codes)
        scales = arguments["weight_scale"]
        if step.label.endswith(".up"):  # rows that pad the hidden layer have scales of zero
            scales = scales[: self._blocks.mlp * (2 if self._blocks.gated else 1)]
        self._count_scales(scales)
        self._check_sums(step, arguments, longest)

    def _check_sums(self, step: Step, arguments: Mapping[str, Tensor], longest: int) -> None:
        """Run the linear with scales of 1 and without bias or activation: it writes its sums."""
        x, weight, device = arguments["x"], arguments["weight"], self._runner.device
        groups = arguments["shift"].shape[0] if "shift" in arguments else 0
        rows = min(len(x), max(SUM_ROWS, groups))
        codes, ones = x[:rows], torch.ones(len(weight), device=device)
        factors, scale = codes.cpu().double(), torch.ones(rows, device=device)
        if groups:  # each row shows the sums of a single group
            scale = torch.eye(groups, device=device).repeat(1, math.ceil(rows / groups))
            scale = scale[:, :rows].contiguous()
            factors += 128 * is_unsigned(self._blocks.activation, self._blocks.gated)
            factors *= scale.t().cpu().repeat_interleave(x.shape[1] // groups, dim=1)
        out = torch.empty(rows, len(weight), dtype=torch.float32, device=device)
        unit = {"out": out, "x": codes, "x_scale": scale, "weight": weight, "weight_scale": ones}
        unit["bias"] = torch.zeros_like(ones)
        if groups:
            unit["shift"] = arguments["shift"]
        scalars = tuple(item for item in step.scalars if item[0] == "group")
        self._runner.run_step(replace(step, scalars=scalars), unit, longest)
        # integers below 2^53, so exact; then rounded to fp32 as the kernel rounds its integers
        exact = (factors @ weight.cpu().double().t()).float()
        wrong = int((out.cpu() != exact).sum())
        total = self.total
        self.total = replace(
            total, sums=total.sums + exact.numel(), wrong_sums=total.wrong_sums + wrong
        )

    def _count_codes(self, codes: Tensor, exact: Tensor) -> None:
        difference = (codes.cpu().int() - exact.int()).abs()
        total = self.total
        self.total = replace(
            total,
            codes=total.codes + codes.numel(),
            differing_codes=total.differing_codes + int((difference > 0).sum()),
            code_difference=max(total.code_difference, int(difference.max())),
        )

    def _count_scales(self, scales: Tensor) -> None:
        bad = int((~(scales > 0) | scales.isinf()).sum())
        self.total = replace(self.total, bad_scales=self.total.bad_scales + bad)


def check_integrity(tower: VisionTower, pixels: Tensor) -> Integrity:
    """The integrity of an int8 tower on a batch of pixels, without the model it was made from."""
    checking = _CheckingRunner(tower)
    VisionTower(tower.spec, tower.head, checking).embeddings(pixels)
    return checking.integrity.total


class _CheckingRunner(TorchRunner):
    """Runs every step with the runner of ``tower``, one by one, and checks those in int8."""

    def __init__(self, tower: VisionTower) -> None:
        runner = tower.runner
        super().__init__(runner.weights, runner.dtype, runner.device)
        self._runner = runner
        self.integrity = IntegrityCheck(runner, tower.spec.blocks)

    def run_step(self, step: Step, arguments: Mapping[str, Tensor], longest: int) -> None:
        self._runner.run_step(step, arguments, longest)
        self.integrity.check(step, arguments, longest)


def int8_steps(tower: VisionTower) -> dict[str, tuple[Step, Step | None]]:
    """The steps of a tower's int8 linears, each with the `norm_quant` that writes its inputs.

    By the common name of their weights, such as "vision.blocks.3.up". A pooled plan computes of the
    last block's "qkv" only "kv".
    """
    steps: dict[str, tuple[Step, Step | None]] = {}
    norms: dict[str, Step] = {}
    for step in vision_pooled(tower.spec, uint8=False).steps:
        buffers = dict(step.buffers)
        if step.op == "norm_quant":
            norms[buffers["out"]] = step
        elif step.op in INT8_LINEARS:
            name = dict(step.weights)["weight"].removesuffix(".codes")
            steps[name] = step, norms.get(buffers["x"])
    return steps
