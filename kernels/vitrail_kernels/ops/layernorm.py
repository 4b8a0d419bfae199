"""layernorm: out = (x - mean) / sqrt(var + eps) * gamma + beta, per row, statistics in fp32

    FLOPs  none counted       bytes  2 M C       bound  by memory

This operator is used only if the normalized tensor is an output or the residual stream. Otherwise
LayerNorm is part of `linear`. A program holds whole rows: they are read once, and the statistics
take two passes over registers. E[x^2] - E[x]^2 would read as much, and is off by 28 % if the mean
is 1000 times the deviation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail_kernels.configs import KernelConfig, config_key, tuned
from vitrail_kernels.cost import Cost, traffic
from vitrail_kernels.device.overlap import wait_for_previous
from vitrail_kernels.device.stats import CHUNK, stats_ref, stats_shape, store_stats
from vitrail_kernels.launch import FLOATS, Call, Grid, Target, check_tensor, jit, tl
from vitrail_kernels.operator import Operator

MAX_WIDTH = 8192


def layernorm_ref(
    out: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    rows: Tensor | None = None,
    stats: Tensor | None = None,
    *,
    eps: float,
) -> None:
    """Write ``out`` (M', C), the LayerNorm of ``x`` (M, C), or of its rows ``rows`` (M',) int32.

    ``out`` may be ``x`` itself. ``gamma`` and ``beta`` are (C,) fp32. ``stats`` (2 chunks, M')
    fp32 receives the row statistics of ``out``.
    """
    if rows is not None:
        x = x.index_select(0, rows)
    wide = torch.promote_types(x.dtype, torch.float32)
    out.copy_(F.layer_norm(x.to(wide), (x.shape[1],), gamma.to(wide), beta.to(wide), eps))
    if stats is not None:
        stats_ref(stats, out)


@jit()
def load_row_tile(
    x_ptr: tl.tensor,  # (X, WIDTH)
    rows_ptr: tl.tensor,  # (M,) int32 or None
    first_row: int,  # of the tile
    rows: int,  # M
    x_rows: int,  # X
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """The tile's rows as fp32 (BLOCK_M, BLOCK_N): 0 outside, NaN if x does not have the row."""
    offs_m = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    exists = offs_m < rows - first_row
    inside = exists[:, None] & (column < WIDTH)[None, :]
    if rows_ptr is None:
        base = x_ptr + tl.cast(first_row, tl.int64) * WIDTH
        ptrs = base + offs_m[:, None] * WIDTH + column[None, :]
        x = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    else:
        row = tl.load(rows_ptr + first_row + offs_m, mask=exists, other=0)
        valid = (row >= 0) & (row < x_rows)
        ptrs = (x_ptr + row.to(tl.int64) * WIDTH)[:, None] + column[None, :]
        x = tl.load(ptrs, mask=inside & valid[:, None], other=0.0)
        x = tl.where(valid[:, None], x.to(tl.float32), float("nan"))
    return x


@jit()
def normalize(
    x: tl.tensor,  # (BLOCK_M, BLOCK_N) fp32, whole rows, 0 past WIDTH
    gamma_ptr: tl.tensor,  # (WIDTH,) fp32 or None
    beta_ptr: tl.tensor,  # (WIDTH,) fp32 or None
    eps: float,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """The LayerNorm of rows in fp32; 0 past WIDTH."""
    column = tl.arange(0, BLOCK_N)
    inside = (column < WIDTH)[None, :]
    mean = tl.sum(x, axis=1) / WIDTH
    centered = tl.where(inside, x - mean[:, None], 0.0)
    # The corrected two-pass algorithm (Chan, Golub and LeVeque 1983): the mean of the centered
    # values is the rounding error of the mean. It is 6e-5 deviations if the mean is 1000
    # deviations, and in a row of equal values it is larger than the deviation.
    error = tl.sum(centered, axis=1) / WIDTH
    squares = tl.sum(centered * centered, axis=1)
    variance = tl.maximum(tl.fma(-error, error, squares / WIDTH), 0.0)
    y = (centered - error[:, None]) * tl.rsqrt(variance + eps)[:, None]
    gamma = 1.0
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + column, mask=column < WIDTH, other=0.0)[None, :]
    if beta_ptr is not None:
        beta = tl.load(beta_ptr + column, mask=column < WIDTH, other=0.0)[None, :]
        y = tl.fma(y, gamma, beta)
    elif gamma_ptr is not None:
        y *= gamma
    return tl.where(inside, y, 0.0)  # the compiler drops these zeros from the statistics' sums


@jit(varying=("rows", "x_rows", "stats_stride"))
def _layernorm_kernel(
    out_ptr: tl.tensor,  # (M, WIDTH); may be x if rows_ptr is None
    stats_ptr: tl.tensor,  # (2 chunks, M) fp32 or None
    x_ptr: tl.tensor,  # (X, WIDTH)
    gamma_ptr: tl.tensor,  # (WIDTH,) fp32
    beta_ptr: tl.tensor,  # (WIDTH,) fp32
    rows_ptr: tl.tensor,  # (M,) int32 or None
    rows: int,  # M
    x_rows: int,  # X
    stats_stride: int,
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
    y = normalize(x, gamma_ptr, beta_ptr, eps, WIDTH, BLOCK_N)
    y = y.to(out_ptr.dtype.element_ty)  # the only rounding
    base = out_ptr + first_row.to(tl.int64) * WIDTH
    inside = exists[:, None] & (column < WIDTH)[None, :]
    tl.store(base + offs_m[:, None] * WIDTH + column[None, :], y, mask=inside)
    if stats_ptr is not None:
        wide, row = y.to(tl.float32), first_row + offs_m
        store_stats(stats_ptr, stats_stride, wide, row, exists, 0, WIDTH, BLOCK_M, BLOCK_N)


def layernorm_cost(*, out: Tensor, x: Tensor, **arguments: object) -> Cost:
    """No matrix product; each row is read and written once."""
    return Cost(0, out.numel() * x.element_size() + traffic(out, *arguments.values()))


# -- the calls -------------------------------------------------------------------------------------


def row_config(target: Target, key: str, width: int) -> KernelConfig:
    """The configuration of a program over whole rows; tuning may vary only ``block_m``.

    Neither ``key`` nor the heuristic depends on the number of rows: the tile and its warps decide
    how a row is summed, and the bits of a row must not depend on the rest of the batch.

    Instructions per row on sm_90 at width 768 in fp16, where memory leaves time for about 850: 528
    if a warp has two rows, 648 if a warp has one row, 896 if four warps share four rows and meet in
    shared memory for every sum. Above 2048 columns the registers of one warp are not enough.
    """
    padded = padded_width(width)
    why = "2048 values a warp: rows are summed by shuffles, gamma and beta read for several"
    warps = 1 if padded <= 2048 else padded // 1024
    heuristic = KernelConfig(max(1, 2048 // padded), padded, 0, warps, 1, reason=why)
    return tuned(target.arch).get(key, heuristic)


def padded_width(width: int) -> int:
    """The power of two that holds a row and whole chunks of its statistics."""
    return max(CHUNK, 1 << (width - 1).bit_length())


def check_rows(op: str, x: Tensor, rows: Tensor | None) -> int:
    """The number of output rows. Raises ValueError for an ``x`` that row kernels do not take."""
    if x.dim() != 2 or not 1 <= x.shape[1] <= MAX_WIDTH:
        raise ValueError(f"{op}: x: got shape {tuple(x.shape)}, wanted (M, 1 to {MAX_WIDTH})")
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: x: got {x.dtype}, wanted one of {FLOATS}")
    check_tensor(f"{op}: x", x, x, x.dtype, x.shape)
    if rows is None:
        return x.shape[0]
    check_tensor(f"{op}: rows", rows, x, torch.int32, (rows.numel(),))
    return rows.numel()


def layernorm_calls(
    target: Target,
    out: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    rows: Tensor | None = None,
    stats: Tensor | None = None,
    *,
    eps: float,
) -> list[Call]:
    """The launch of `layernorm_ref`. A row that ``x`` does not have becomes NaN.

    Raises ValueError for a shape, dtype or layout that the kernel does not take, and for an ``out``
    that overlaps ``x`` without being ``x``.
    """
    count, width = check_rows("layernorm", x, rows), x.shape[1]
    check_tensor("layernorm: out", out, x, x.dtype, (count, width))
    check_tensor("layernorm: gamma", gamma, x, torch.float32, (width,))
    check_tensor("layernorm: beta", beta, x, torch.float32, (width,))
    check_tensor("layernorm: stats", stats, x, torch.float32, stats_shape(count, width))
    in_place = rows is None and out.data_ptr() == x.data_ptr()
    if not in_place and _overlap(out, x):
        raise ValueError("layernorm: out: got a tensor over x, wanted x itself or one apart")
    key = config_key("layernorm", x.dtype, str(width))
    config = row_config(target, key, width)
    arguments = {
        "out_ptr": out,
        "stats_ptr": stats,
        "x_ptr": x,
        "gamma_ptr": gamma,
        "beta_ptr": beta,
        "rows_ptr": rows,
        "rows": count,
        "x_rows": x.shape[0],
        "stats_stride": count,
        "eps": eps,
        "WIDTH": width,
        "BLOCK_M": config.block_m,
        "BLOCK_N": padded_width(width),
        "PDL": target.pdl,
    }
    return [Call(_layernorm_kernel, Grid(count, config.block_m), arguments, config, key)]


def _overlap(a: Tensor, b: Tensor) -> bool:
    if "meta" in (a.device.type, b.device.type):  # no memory to overlap
        return False
    starts = a.data_ptr(), b.data_ptr()
    return max(starts) < min(
        start + t.numel() * t.element_size() for start, t in zip(starts, (a, b), strict=True)
    )


LAYERNORM = Operator("layernorm", layernorm_ref, layernorm_calls, layernorm_cost)
