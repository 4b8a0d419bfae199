"""The operators of a vision transformer: each with its reference, its kernels and its cost.

The package needs torch and numpy. It imports without triton.
"""

from vitrail_kernels.cost import Cost
from vitrail_kernels.launch import Call
from vitrail_kernels.operator import Operator
from vitrail_kernels.ops.attention import ATTENTION
from vitrail_kernels.ops.attention_one import ATTENTION_ONE
from vitrail_kernels.ops.class_mean import CLASS_MEAN
from vitrail_kernels.ops.layernorm import LAYERNORM
from vitrail_kernels.ops.linear import LINEAR
from vitrail_kernels.ops.linear_int8 import LINEAR_INT8
from vitrail_kernels.ops.linear_int8_grouped import LINEAR_INT8_GROUPED
from vitrail_kernels.ops.norm_quant import NORM_QUANT
from vitrail_kernels.ops.patch_embed import PATCH_EMBED
from vitrail_kernels.ops.pool import POOL
from vitrail_kernels.ops.position import POSITION
from vitrail_kernels.ops.resize import RESIZE
from vitrail_kernels.ops.text_embed import TEXT_EMBED

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        POSITION,
        PATCH_EMBED,
        TEXT_EMBED,
        LAYERNORM,
        LINEAR,
        NORM_QUANT,
        LINEAR_INT8,
        LINEAR_INT8_GROUPED,
        ATTENTION,
        ATTENTION_ONE,
        POOL,
        CLASS_MEAN,
        RESIZE,
    )
}
"""Every operator by its name."""

__all__ = ["OPERATORS", "Call", "Cost", "Operator"]
