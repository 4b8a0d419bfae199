"""layernorm: out = (x - mean) / sqrt(var + eps) * gamma + beta, per row, statistics in fp32

    FLOPs  none counted       bytes  2 M C       bound  by memory

Only where a normalised tensor is itself an output or the residual stream; elsewhere LayerNorm is
part of `linear`. A program holds whole rows: they are read once, and the statistics take two passes
over registers. E[x^2] - E[x]^2 would read no less, and is off by 28 % where the mean is 1000 times
the deviation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail_kernels.configs import KernelConfig, tuned
from vitrail_kernels.cost import Cost, traffic
from vitrail_kernels.device.overlap import wait_for_previous
from vitrail_kernels.device.stats import CHUNK, stats_ref, stats_shape, store_stats
from vitrail_kernels.launch import Call, Grid, Target, check_tensor, jit, launch, target_of, tl

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 8192


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
    """Write ``out`` (M', C), may be ``x``; ``gamma`` and ``beta`` (C,) fp32; ``rows`` (M',).

    ``stats`` (2 chunks, M') fp32: where the row statistics of ``out`` go.
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
    first: int,  # the tile's first row
    rows: int,  # M
    x_rows: int,  # X
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Rows ``first`` and on, as fp32 (BLOCK_M, BLOCK_N): 0 outside, NaN for a row x has not."""
    part = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    exists = part < rows - first
    inside = exists[:, None] & (column < WIDTH)[None, :]
    if rows_ptr is None:
        base = x_ptr + tl.cast(first, tl.int64) * WIDTH
        at = base + part[:, None] * WIDTH + column[None, :]
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        row = tl.load(rows_ptr + first + part, mask=exists, other=0)
        known = (row >= 0) & (row < x_rows)
        at = (x_ptr + row.to(tl.int64) * WIDTH)[:, None] + column[None, :]
        x = tl.load(at, mask=inside & known[:, None], other=0.0)
        x = tl.where(known[:, None], x.to(tl.float32), float("nan"))
    return x


@jit()
def normalise(
    x: tl.tensor,  # (BLOCK_M, BLOCK_N) fp32, whole rows, 0 past WIDTH
    gamma_ptr: tl.tensor,  # (WIDTH,) fp32 or None
    beta_ptr: tl.tensor,  # (WIDTH,) fp32 or None
    eps: float,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """LayerNorm of rows, fp32; 0 past WIDTH."""
    column = tl.arange(0, BLOCK_N)
    inside = (column < WIDTH)[None, :]
    mean = tl.sum(x, axis=1) / WIDTH
    centred = tl.where(inside, x - mean[:, None], 0.0)
    # Two passes, corrected (Chan, Golub and LeVeque 1983): what the centred values still sum to is
    # the rounding of the mean, 6e-5 deviations where the mean is 1000 of them, and more than the
    # deviation itself in a row of equal values.
    rest = tl.sum(centred, axis=1) / WIDTH
    squares = tl.sum(centred * centred, axis=1)
    variance = tl.maximum(tl.fma(-rest, rest, squares / WIDTH), 0.0)
    y = (centred - rest[:, None]) * tl.rsqrt(variance + eps)[:, None]
    gamma = 1.0
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + column, mask=column < WIDTH, other=0.0)[None, :]
    if beta_ptr is not None:
        beta = tl.load(beta_ptr + column, mask=column < WIDTH, other=0.0)[None, :]
        y = tl.fma(y, gamma, beta)
    elif gamma_ptr is not None:
        y *= gamma
    return tl.where(inside, y, 0.0)  # known zeros: the compiler sums no statistics of them


@jit(varying=("rows", "x_rows", "stats_stride"))
def _layernorm_kernel(
    out_ptr: tl.tensor,  # (M, WIDTH), may be x where nothing is gathered
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
    first = tl.program_id(0) * BLOCK_M
    part = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    exists = part < rows - first
    x = load_row_tile(x_ptr, rows_ptr, first, rows, x_rows, WIDTH, BLOCK_M, BLOCK_N)
    y = normalise(x, gamma_ptr, beta_ptr, eps, WIDTH, BLOCK_N)
    y = y.to(out_ptr.dtype.element_ty)  # the only rounding
    base = out_ptr + first.to(tl.int64) * WIDTH
    inside = exists[:, None] & (column < WIDTH)[None, :]
    tl.store(base + part[:, None] * WIDTH + column[None, :], y, mask=inside)
    if stats_ptr is not None:
        store_stats(
            stats_ptr,
            stats_stride,
            y.to(tl.float32),
            first + part,
            exists,
            0,
            WIDTH,
            BLOCK_M,
            BLOCK_N,
        )


def layernorm_cost(
    out: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    rows: Tensor | None = None,
    stats: Tensor | None = None,
    **_: object,
) -> Cost:
    """No matrix product; each row is read and written once."""
    read = out.numel() * x.element_size()
    return Cost(0, read + traffic(out, gamma, beta, rows, stats))


# -- the launcher ----------------------------------------------------------------------------------


def config_of(
    op: str, target: Target, dtype: torch.dtype, shape: str, heuristic: KernelConfig
) -> KernelConfig:
    """What the architecture's tuned table says, else ``heuristic``.

    ``shape`` never holds a number of rows or sequences: how a row is summed follows from the tile
    and its warps, and a row's bits may not depend on what else is in the batch.
    """
    return tuned(target.arch).get(f"{op}|{str(dtype).removeprefix('torch.')}|{shape}", heuristic)


def row_config(op: str, target: Target, dtype: torch.dtype, width: int) -> KernelConfig:
    """How many whole rows a program takes; tuning may vary ``block_m`` alone.

    By instructions of sm_90 at width 768 in fp16, of which memory leaves time for about 850 a row:
    528 a row where a warp has two rows, 648 with one row, 896 where four warps share four rows and
    meet in shared memory for every sum. Past 2048 columns one warp's registers are not enough.
    """
    padded = padded_width(width)
    heuristic = KernelConfig(
        max(1, 2048 // padded),
        padded,
        0,
        1 if padded <= 2048 else padded // 1024,
        1,
        reason="2048 values a warp: rows are summed by shuffles, gamma and beta read for several",
    )
    return config_of(op, target, dtype, str(width), heuristic)


def padded_width(width: int) -> int:
    """The power of two that holds a row, and whole chunks of its statistics."""
    return max(CHUNK, 1 << (width - 1).bit_length())


def check_rows(op: str, x: Tensor, rows: Tensor | None) -> int:
    """How many rows come out. Raises ValueError for an ``x`` that whole-row kernels do not take."""
    if x.dim() != 2 or not 1 <= x.shape[1] <= WIDEST:
        raise ValueError(f"{op}: x: got shape {tuple(x.shape)}, wanted (M, 1 to {WIDEST})")
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
    """The launch of `layernorm_ref`. A row that ``x`` does not have comes out as NaN.

    Raises ValueError for a shape, dtype or layout that the kernel does not take, and for an ``out``
    over an ``x`` of which it is not every row.
    """
    count, width = check_rows("layernorm", x, rows), x.shape[1]
    check_tensor("layernorm: out", out, x, x.dtype, (count, width))
    check_tensor("layernorm: gamma", gamma, x, torch.float32, (width,))
    check_tensor("layernorm: beta", beta, x, torch.float32, (width,))
    check_tensor("layernorm: stats", stats, x, torch.float32, stats_shape(count, width))
    same = rows is None and out.data_ptr() == x.data_ptr()
    if not same and _overlap(out, x):
        raise ValueError("layernorm: out: got a tensor over x, wanted x itself or one apart")
    config = row_config("layernorm", target, x.dtype, width)
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
    return [Call(_layernorm_kernel, Grid(count, config.block_m), arguments, config)]


def _overlap(a: Tensor, b: Tensor) -> bool:
    if "meta" in (a.device.type, b.device.type):  # no memory to overlap
        return False
    starts = a.data_ptr(), b.data_ptr()
    return max(starts) < min(
        start + t.numel() * t.element_size() for start, t in zip(starts, (a, b), strict=True)
    )


def layernorm(
    out: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    rows: Tensor | None = None,
    stats: Tensor | None = None,
    *,
    eps: float,
) -> None:
    """`layernorm_ref` by the kernel, for the same tensors; see `layernorm_calls` for the errors."""
    launch(layernorm_calls(target_of(out), out, x, gamma, beta, rows, stats, eps=eps))
