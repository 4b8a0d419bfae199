"""The int8 operators on a CPU with VNNI, by `vitrail._C`.

Each function takes the arguments of its operator's reference, and calls it if the C++ extension,
the processor or the tensors are not of the form that the kernels take.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from vitrail.runtime.extension import load_extension
from vitrail_kernels.ops.linear_int8 import is_unsigned, linear_int8_ref
from vitrail_kernels.ops.linear_int8_grouped import linear_int8_grouped_ref
from vitrail_kernels.ops.norm_quant import norm_quant_ref

ACTIVATIONS = (None, "gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
"""In the order of `Activation` in csrc/int8_cpu.hpp."""
PANEL = 128
INT8, FP32, INT32 = torch.int8, torch.float32, torch.int32


@cache
def _extension() -> ModuleType | None:
    """`vitrail._C` if it has kernels for this processor."""
    try:
        extension = load_extension()
    except ImportError:
        return None
    return extension if extension.int8_instructions() else None


def instructions() -> str:
    """The name of the processor's instructions in use, such as "AVX512-VNNI"; empty if none are."""
    extension = _extension()
    return "" if extension is None else str(extension.int8_instructions())


def _fit(*tensors: tuple[Tensor | None, torch.dtype, tuple[int, ...]]) -> bool:
    """Whether each tensor is None, or contiguous on a CPU and of its dtype and shape."""
    return all(
        tensor.device.type == "cpu"
        and tensor.dtype == dtype
        and tensor.shape == shape
        and tensor.is_contiguous()
        for tensor, dtype, shape in tensors
        if tensor is not None
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def norm_quant(
    out: Tensor,
    out_scale: Tensor,
    x: Tensor,
    smooth: Tensor,
    rows: Tensor | None = None,
    *,
    eps: float,
) -> None:
    """`norm_quant_ref`."""
    extension = _extension()
    count, width = out.shape
    source = (x.shape[0] if rows is not None else count, width)
    if (
        extension is None
        or width % 16
        or not _fit(
            (out, INT8, (count, width)),
            (out_scale, FP32, (count,)),
            (x, FP32, source),
            (smooth, FP32, (width,)),
            (rows, INT32, (count,)),
        )
    ):
        norm_quant_ref(out, out_scale, x, smooth, rows, eps=eps)
        return
    tensors = (out, out_scale, x, smooth, rows)
    extension.norm_quant(*map(_address, tensors), count, width, eps, torch.get_num_threads())


def linear_int8(
    out: Tensor,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    out_scale: Tensor | None = None,
    *,
    activation: str | None = None,
    gated: bool = False,
) -> None:
    """`linear_int8_ref`."""
    extension, tensors = _extension(), (x, x_scale, weight, weight_scale, bias)
    if gated and activation is None:
        activation = "silu"
    rows, (columns, depth), coded = x.shape[0], weight.shape, out_scale is not None
    if (
        extension is None
        or activation not in ACTIVATIONS
        or depth % 4
        or (coded and columns % PANEL)
        or not _fit(
            (out, INT8 if coded else FP32, (rows, columns // 2 if gated else columns)),
            (x, INT8, (rows, depth)),
            (x_scale, FP32, (rows,)),
            (weight, INT8, (columns, depth)),
            (weight_scale, FP32, (columns,)),
            (bias, FP32, (columns,)),
            (out_scale, FP32, (columns // PANEL, rows)),
        )
    ):
        linear_int8_ref(out, *tensors, out_scale, activation=activation, gated=gated)
        return
    extension.linear_int8(
        0 if coded else out.data_ptr(),
        out.data_ptr() if coded else 0,
        _address(out_scale),
        *map(_address, tensors),
        rows,
        columns,
        depth,
        ACTIVATIONS.index(activation),
        gated,
        is_unsigned(activation, gated),
        torch.get_num_threads(),
    )


def linear_int8_grouped(
    out: Tensor,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    shift: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    residual_rows: Tensor | None = None,
    *,
    group: int = 128,
) -> None:
    """`linear_int8_grouped_ref`, without the statistics."""
    extension, tensors = _extension(), (x, x_scale, weight, weight_scale, shift, bias)
    summands = (scale, residual, residual_rows)
    rows, (columns, depth) = x.shape[0], weight.shape
    groups = depth // group
    added = residual.shape[0] if residual is not None and residual_rows is not None else rows
    if (
        extension is None
        or group % 4
        or depth % group
        or not _fit(
            (out, FP32, (rows, columns)),
            (x, INT8, (rows, depth)),
            (x_scale, FP32, (groups, rows)),
            (weight, INT8, (columns, depth)),
            (weight_scale, FP32, (columns,)),
            (shift, FP32, (groups, columns)),
            (bias, FP32, (columns,)),
            (scale, FP32, (columns,)),
            (residual, FP32, (added, columns)),
            (residual_rows, INT32, (rows,)),
        )
    ):
        linear_int8_grouped_ref(out, *tensors, *summands, group=group)
        return
    extension.linear_int8_grouped(
        *map(_address, (out, *tensors, *summands)),
        rows,
        columns,
        depth,
        group,
        torch.get_num_threads(),
    )


HOST_OPERATORS: dict[str, Callable[..., None]] = {
    "norm_quant": norm_quant,
    "linear_int8": linear_int8,
    "linear_int8_grouped": linear_int8_grouped,
}
"""By the operator's name."""
