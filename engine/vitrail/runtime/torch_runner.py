"""The backend "torch": runs each step by its operator's PyTorch reference, on any device.

On a CPU with VNNI it runs the int8 operators by `vitrail.runtime.host_int8`.
"""

from collections.abc import Mapping

from torch import Tensor

from vitrail.plan.plan import Step
from vitrail.runtime.host_int8 import HOST_OPERATORS
from vitrail.runtime.runner import Runner
from vitrail_kernels import OPERATORS

STATISTICS = {"stats", "x_stats", "row_sums"}
"""Arguments that only kernels need: a reference computes LayerNorm from the row itself."""


class TorchRunner(Runner):
    """Runs plans with PyTorch's own operators."""

    name = "torch"
    identity = "reference"  # part of fingerprints: the former name, so that they stay the same

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
