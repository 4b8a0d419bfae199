"""Walks a plan with each operator's PyTorch reference: the CPU backend, and fp32 anywhere."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vitrail.plan.plan import Step
from vitrail.runtime.runner import Runner
from vitrail_kernels import OPERATORS

STATISTICS = {"stats", "x_stats", "row_sums"}
"""Arguments that only kernels need: a reference works LayerNorm out from the row itself."""


class ReferenceRunner(Runner):
    """Runs plans with PyTorch."""

    name = "reference"

    @property
    def resizer(self) -> str:
        return "PyTorch"

    def _resize(self, *tensors: Tensor) -> None:
        OPERATORS["resize"].reference(*tensors)

    def run_step(self, step: Step, tensors: Mapping[str, Tensor], longest: int) -> None:
        wanted = {name: tensor for name, tensor in tensors.items() if name not in STATISTICS}
        OPERATORS[step.op].reference(**wanted, **step.resolve(longest))
