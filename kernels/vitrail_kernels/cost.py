"""What a launch costs: arithmetic and traffic, counted from shapes alone."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Cost(NamedTuple):
    """``flops`` of the matrix products, two a multiply-add; ``bytes`` read and written once."""

    flops: int
    bytes: int


def traffic(*tensors: torch.Tensor | None) -> int:
    """Bytes of the tensors, each counted once; None counts nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
