"""A tile of a matrix product: its place in the output, and the epilogue after the product."""

from __future__ import annotations

from vitrail_kernels.device.activations import activate
from vitrail_kernels.device.stats import store_stats
from vitrail_kernels.launch import jit, tl


@jit()
def tile_of(
    tile: int,
    m: int,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> tl.tensor:
    """The first row and column of a tile.

    Tiles are ordered GROUP_M down for each one across. So tiles that run at the same time share
    their operands in the L2 cache.
    """
    ACROSS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    down = tl.cdiv(m, BLOCK_M)
    group = tile // (GROUP_M * ACROSS)
    height = tl.minimum(down - group * GROUP_M, GROUP_M)
    inside = tile % (GROUP_M * ACROSS)
    return (group * GROUP_M + inside % height) * BLOCK_M, inside // height * BLOCK_N


@jit()
def part_of(
    acc: tl.tensor, number: int, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
) -> tl.tensor:
    """The left or right half of a tile, or all of it if PARTS is 1.

    Finishing one half after the other takes fewer registers and half the shared memory. This makes
    room for a second block on the multiprocessor.
    """
    if PARTS == 1:
        return acc
    else:
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        if number == 0:
            return left
        else:
            return right


@jit()
def epilogue(
    acc: tl.tensor,  # (BLOCK_M, BLOCK_N) fp32
    out_dtype: tl.constexpr,
    bias_ptr: tl.tensor,  # (N,) fp32 or None
    scale_ptr: tl.tensor,  # (N,) fp32 or None
    residual_ptr: tl.tensor,  # (M, N) or None
    residual_rows_ptr: tl.tensor,  # (M',) int32 or None
    row_sums_ptr: tl.tensor,  # (N,) fp32, if NORM
    stats_ptr: tl.tensor,  # (2 chunks, M') fp32 or None
    stats_stride: int,
    mean: tl.tensor,  # (BLOCK_M,), if NORM
    rstd: tl.tensor,  # (BLOCK_M,)
    offs_m: tl.tensor,  # (BLOCK_M,)
    mask_m: tl.tensor,  # (BLOCK_M,)
    column: int,
    N: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAIRED: tl.constexpr = False,  # see `store_stats`; always without a residual
) -> tl.tensor:
    """The work after the product, in fp32 with a single rounding; also writes the statistics.

    A product plus a sum is a `tl.fma`, which is one instruction and has the same bits in every
    tile. A sum alone is a `tl.fma` with 1.0: for a plain sum Triton would start the product from
    the sum's other operand, in some tiles only, and round in another order. It is still one add.
    """
    offs_n = column + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if NORM:
        sums = tl.load(row_sums_ptr + offs_n, mask=mask_n, other=0.0)
        acc = tl.fma(-mean[:, None], sums[None, :], acc)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)
            acc = tl.fma(acc, rstd[:, None], bias[None, :])
        else:
            acc *= rstd[:, None]
    elif bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)
        acc = tl.fma(acc, 1.0, bias[None, :])
    if GATED:
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
        acc = activate(gate, ACTIVATION) * up
    else:
        acc = activate(acc, ACTIVATION)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
        if residual_ptr is None:
            acc *= scale
    if residual_ptr is not None:
        row = offs_m
        if residual_rows_ptr is not None:
            row = tl.load(residual_rows_ptr + offs_m, mask=mask_m, other=0)
        ptrs = residual_ptr + row.to(tl.int64)[:, None] * N + offs_n[None, :]
        residual = tl.load(ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
        if scale_ptr is not None:
            acc = tl.fma(acc, scale, residual)
        else:
            acc = tl.fma(acc, 1.0, residual)
    y = acc.to(out_dtype)  # the only rounding
    if stats_ptr is not None:
        rounded = y.to(tl.float32)
        if N % BLOCK_N != 0:
            rounded = tl.where(mask_n[None, :], rounded, 0.0)
        # the layout of a residual is the same in every tile, the layout of a product is not
        store_stats(
            stats_ptr, stats_stride, rounded, offs_m, mask_m, column, N, BLOCK_M, BLOCK_N,
            PAIRED or residual_ptr is None,
        )  # fmt: skip
    return y
