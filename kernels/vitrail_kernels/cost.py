"""The cost of an operator call, counted from shapes alone: arithmetic and memory traffic."""

from typing import NamedTuple

import torch


class Cost(NamedTuple):
    """``flops`` of the matrix products, two per multiply-add, and ``bytes`` read and written."""

    flops: int
    bytes: int


def traffic(*arguments: object) -> int:
    """The bytes of the tensors among ``arguments``, each counted once."""
    return sum(a.numel() * a.element_size() for a in arguments if isinstance(a, torch.Tensor))


def memory_cost(**arguments: object) -> Cost:
    """The cost of an operator without matrix products that touches every tensor once."""
    return Cost(0, traffic(*arguments.values()))
