"""The operators' common form: a reference, kernel calls and a cost."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitrail_kernels.cost import Cost
from vitrail_kernels.launch import Call, launch, target_of


@dataclass(frozen=True, slots=True)
class Operator:
    """Three functions of the same arguments: tensors in the kernels' order, scalars by keyword.

    ``reference`` writes the outputs in place with PyTorch, on any device. ``calls`` takes a
    `Target` first and returns the kernel launches without launching them. ``cost`` counts FLOPs and
    bytes from shapes; it takes all arguments by keyword, and the sequences' ``lengths``.
    """

    name: str
    reference: Callable[..., None]
    calls: Callable[..., list[Call]]
    cost: Callable[..., Cost]

    def launch(self, out: Tensor, *tensors: Tensor | None, **arguments: Any) -> None:
        """Compute ``reference`` with the kernels. Raises ValueError as ``calls`` does, and
        RuntimeError as `target_of` does."""
        launch(self.calls(target_of(out), out, *tensors, **arguments))
