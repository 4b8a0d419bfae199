"""The int8 operators as far as PyTorch computes them: their kernels are not written yet."""

from typing import Any

from torch import Tensor

from vitrail_kernels.cost import Cost, memory_cost, traffic
from vitrail_kernels.launch import Call
from vitrail_kernels.operator import Operator
from vitrail_kernels.ops.linear_int8 import linear_int8_ref
from vitrail_kernels.ops.linear_int8_grouped import linear_int8_grouped_ref
from vitrail_kernels.ops.norm_quant import norm_quant_ref


def _no_calls(*tensors: Any, **arguments: Any) -> list[Call]:
    raise ValueError("int8: got a GPU, wanted backend='torch': int8 has no kernels yet")


def _product_cost(*, out: Tensor, x: Tensor, weight: Tensor, **arguments: object) -> Cost:
    flops = 2 * x.shape[0] * weight.shape[0] * weight.shape[1]
    return Cost(flops, traffic(out, x, weight, *arguments.values()))


INT8_OPERATORS = (
    Operator("norm_quant", norm_quant_ref, _no_calls, memory_cost),
    Operator("linear_int8", linear_int8_ref, _no_calls, _product_cost),
    Operator("linear_int8_grouped", linear_int8_grouped_ref, _no_calls, _product_cost),
)
