"""The operators of a vision transformer: for each its reference, its kernels and its cost.

Knows torch and triton only, and imports without triton. A reference writes its outputs in place;
its tensors come first, in the order its kernels take them, and its scalars by keyword.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from vitrail_kernels.cost import Cost
from vitrail_kernels.launch import Call
from vitrail_kernels.ops import (
    attention,
    attention_one,
    class_mean,
    layernorm,
    linear,
    patch_embed,
    pool,
    position,
    resize,
    text_embed,
)


class Operator(NamedTuple):
    """One operator, four functions of the same arguments.

    ``reference`` in PyTorch on any device; ``launch`` by its Triton kernels; ``calls`` gives, after
    a Target, the kernel launches without launching them; ``cost`` from shapes.
    """

    reference: Callable[..., None]
    launch: Callable[..., None]
    calls: Callable[..., list[Call]]
    cost: Callable[..., Cost]


def _operator(module: ModuleType, name: str) -> Operator:
    """The four functions that every operator's file has."""
    return Operator(*(getattr(module, name + kind) for kind in ("_ref", "", "_calls", "_cost")))


OPERATORS: dict[str, Operator] = {
    "position": _operator(position, "position"),
    "patch_embed": _operator(patch_embed, "patch_embed"),
    "text_embed": _operator(text_embed, "text_embed"),
    "layernorm": _operator(layernorm, "layernorm"),
    "linear": _operator(linear, "linear"),
    "attention": _operator(attention, "attention"),
    "attention_one": _operator(attention_one, "attention_one"),
    "pool": _operator(pool, "pool"),
    "class_mean": _operator(class_mean, "class_mean"),
    "resize": _operator(resize, "resize"),
}

__all__ = ["OPERATORS", "Call", "Cost", "Operator"]
