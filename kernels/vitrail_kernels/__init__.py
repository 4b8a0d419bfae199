"""The operators of a vision transformer: for each its reference, its cost and its kernels.

Knows torch and triton only, and imports without triton. A reference writes its outputs in place;
its tensors come first, in the order its kernels take them, and its scalars by keyword.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vitrail_kernels.attention import (
    attention_cost,
    attention_one_cost,
    attention_one_ref,
    attention_ref,
)
from vitrail_kernels.cost import Cost
from vitrail_kernels.layernorm import layernorm_cost, layernorm_ref
from vitrail_kernels.linear import linear_cost, linear_ref
from vitrail_kernels.patch_embed import patch_embed_cost, patch_embed_ref
from vitrail_kernels.pool import class_mean_cost, class_mean_ref, pool_cost, pool_ref
from vitrail_kernels.position import position_cost, position_ref
from vitrail_kernels.text_embed import text_embed_cost, text_embed_ref


class Operator(NamedTuple):
    """One operator: ``reference`` in PyTorch on any device, ``cost`` from shapes."""

    reference: Callable[..., None]
    cost: Callable[..., Cost]


OPERATORS: dict[str, Operator] = {
    "position": Operator(position_ref, position_cost),
    "patch_embed": Operator(patch_embed_ref, patch_embed_cost),
    "text_embed": Operator(text_embed_ref, text_embed_cost),
    "layernorm": Operator(layernorm_ref, layernorm_cost),
    "linear": Operator(linear_ref, linear_cost),
    "attention": Operator(attention_ref, attention_cost),
    "attention_one": Operator(attention_one_ref, attention_one_cost),
    "pool": Operator(pool_ref, pool_cost),
    "class_mean": Operator(class_mean_ref, class_mean_cost),
}

__all__ = ["OPERATORS", "Cost", "Operator"]
