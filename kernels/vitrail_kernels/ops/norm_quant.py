"""norm_quant: out = int8 codes of norm(x)[rows] * smooth, with a scale for each row

norm    LayerNorm without its affine part: gamma and beta are folded into the linear that follows
scale   the largest magnitude of the row / 127; codes are rounded to nearest even
FLOPs   no matrix product       bytes  M K (x) + M K (codes), read and written once
bound   by memory
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail_kernels.configs import config_key
from vitrail_kernels.cost import Cost, traffic
from vitrail_kernels.device.int8 import scale_of, to_int8
from vitrail_kernels.device.overlap import wait_for_previous
from vitrail_kernels.launch import Call, Grid, Target, check_tensor, jit, tl
from vitrail_kernels.operator import Operator
from vitrail_kernels.ops.layernorm import (
    check_rows,
    load_row_tile,
    normalize,
    padded_width,
    row_config,
)

TINY = 1e-30
"""The smallest magnitude that a scale is computed from, so that a row of zeros has a scale."""


def norm_quant_ref(
    out: Tensor,
    out_scale: Tensor,
    x: Tensor,
    smooth: Tensor,
    rows: Tensor | None = None,
    *,
    eps: float,
) -> None:
    """Write ``out`` (M', K) int8 and ``out_scale`` (M',) fp32 from ``x`` (M, K).

    ``smooth`` (K,) fp32 multiplies each column of the normalized rows (biased variance, fp32).
    ``rows`` (M',) int32 picks rows of ``x``. Code times scale is the value. A row that is not
    finite has the scale NaN.
    """
    if rows is not None:
        x = x.index_select(0, rows)
    y = F.layer_norm(x.float(), (x.shape[1],), smooth, eps=eps)
    top = torch.maximum(y.amax(dim=1), -y.amin(dim=1))
    torch.div(top.clamp(min=TINY), 127, out=out_scale)
    y.mul_((127 / top.clamp(min=TINY))[:, None])
    out.copy_(y.clamp_(-127, 127).round_().nan_to_num_(0))


@jit(varying=("rows", "x_rows"))
def _norm_quant_kernel(
    out_ptr: tl.tensor,  # (M, WIDTH) int8
    out_scale_ptr: tl.tensor,  # (M,) fp32
    x_ptr: tl.tensor,  # (X, WIDTH)
    smooth_ptr: tl.tensor,  # (WIDTH,) fp32
    rows_ptr: tl.tensor,  # (M,) int32 or None
    rows: int,  # M
    x_rows: int,  # X
    eps: float,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_previous(PDL)
    first_row = tl.program_id(0) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    exists = offs_m < rows - first_row
    x = load_row_tile(x_ptr, rows_ptr, first_row, rows, x_rows, WIDTH, BLOCK_M, BLOCK_N)
    y = normalize(x, smooth_ptr, None, eps, WIDTH, BLOCK_N)
    scale, inverse = scale_of(tl.max(tl.abs(y), axis=1), tl.sum(y, axis=1), 127.0)
    codes = to_int8(y * inverse[:, None], -127)
    base = out_ptr + first_row.to(tl.int64) * WIDTH
    inside = exists[:, None] & (column < WIDTH)[None, :]
    # 8 codes a thread, as the loads of x want it: 16 would make each load take two halves of lines
    eight = tl.max_contiguous(column, 8)
    tl.store(base + offs_m[:, None] * WIDTH + eight[None, :], codes, mask=inside)
    tl.store(out_scale_ptr + first_row + offs_m, scale, mask=exists)


def norm_quant_cost(*, out: Tensor, x: Tensor, **arguments: object) -> Cost:
    """No matrix product; each row is read and written once."""
    return Cost(0, out.numel() * x.element_size() + traffic(out, *arguments.values()))


# -- the calls -------------------------------------------------------------------------------------


def norm_quant_calls(
    target: Target,
    out: Tensor,
    out_scale: Tensor,
    x: Tensor,
    smooth: Tensor,
    rows: Tensor | None = None,
    *,
    eps: float,
) -> list[Call]:
    """The launch of `norm_quant_ref`. A row that ``x`` does not have gets the scale NaN.

    Raises ValueError for a shape, dtype or layout that the kernel does not take.
    """
    count, width = check_rows("norm_quant", x, rows), x.shape[1]
    check_tensor("norm_quant: out", out, x, torch.int8, (count, width))
    check_tensor("norm_quant: out_scale", out_scale, x, torch.float32, (count,))
    check_tensor("norm_quant: smooth", smooth, x, torch.float32, (width,))
    key = config_key("norm_quant", x.dtype, str(width))
    config = row_config(target, key, width)
    arguments = {
        "out_ptr": out,
        "out_scale_ptr": out_scale,
        "x_ptr": x,
        "smooth_ptr": smooth,
        "rows_ptr": rows,
        "rows": count,
        "x_rows": x.shape[0],
        "eps": eps,
        "WIDTH": width,
        "BLOCK_M": config.block_m,
        "BLOCK_N": padded_width(width),
        "PDL": target.pdl,
    }
    return [Call(_norm_quant_kernel, Grid(count, config.block_m), arguments, config, key)]


NORM_QUANT = Operator("norm_quant", norm_quant_ref, norm_quant_calls, norm_quant_cost)
