"""The backend "torch": runs each step by its operator's PyTorch reference, on any device.

On a CPU with VNNI it runs the int8 operators by `vitrail.runtime.host_int8`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vitrail.plan.plan import Plan, Step
from vitrail.runtime.host_int8 import HOST_OPERATORS
from vitrail.runtime.runner import Runner
from vitrail.runtime.workspace import STATISTICS, workspace_bytes
from vitrail_kernels import OPERATORS


class TorchRunner(Runner):
    """Runs plans with PyTorch's own operators."""

    name = "torch"
    identity = "reference"  # part of fingerprints: the former name, so that they stay the same

    @classmethod
    def workspace_bytes(cls, plan: Plan, batch: int, longest: int, dtype: torch.dtype) -> int:
        return workspace_bytes(plan, batch, longest, dtype)

    @classmethod
    def resize_workspace_bytes(cls, numbers: int) -> int:
        return 16 * numbers  # sums, and the products of a tap, as int32

    @property
    def resizer(self) -> str:
        return "PyTorch"

    def _resize(self, *tensors: Tensor) -> None:
        OPERATORS["resize"].reference(*tensors)

    def run_step(self, step: Step, arguments: Mapping[str, Tensor], longest: int) -> None:
        needed = {name: tensor for name, tensor in arguments.items() if name not in STATISTICS}
        function = OPERATORS[step.op].reference
        if self.device.type == "cpu":
            function = HOST_OPERATORS.get(step.op, function)
        function(**needed, **step.resolve(longest))
