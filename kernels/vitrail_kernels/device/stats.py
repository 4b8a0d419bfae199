"""Row statistics for LayerNorm, kept beside the residual stream

    stats[c]           sum of chunk c, which is 64 columns of the row
    stats[chunks + c]  sum of squares of that chunk about its own mean

The statistics are fp32 (2 chunks, M) and describe the rounded values. The kernel that writes the
stream writes them too. The last chunk may be shorter. Chunks are combined as Chan, Golub and
LeVeque (1979) do, so that the error of the variance does not grow with the mean, as it does for
E[x^2] - E[x]^2. Every kernel adds the chunks in order, so that the bits of a row do not depend on
the tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrail_kernels.launch import jit, tl

CHUNK = 64


def stats_shape(rows: int, width: int) -> tuple[int, int]:
    """The shape of the statistics of (rows, width) values."""
    return 2 * -(-width // CHUNK), rows


def stats_ref(stats: Tensor, x: Tensor) -> None:
    """Write ``stats`` (2 chunks, M) of ``x`` (M, C)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    chunks = torch.split(x.to(wide), CHUNK, dim=1)
    for number, chunk in enumerate(chunks):
        total = chunk.sum(dim=1)
        stats[number] = total
        centered = chunk - (total / chunk.shape[1])[:, None]
        stats[len(chunks) + number] = centered.square().sum(dim=1)


def mean_rstd_ref(stats: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor]:
    """The mean and 1 / sqrt(variance + eps) of every row, each (M,)."""
    chunks = stats.shape[0] // 2
    counts = torch.full((chunks, 1), float(CHUNK), dtype=stats.dtype, device=stats.device)
    counts[-1] = width - CHUNK * (chunks - 1)
    mean = stats[:chunks].sum(dim=0) / width
    between = counts * (stats[:chunks] / counts - mean).square()
    return mean, torch.rsqrt((stats[chunks:] + between).sum(dim=0) / width + eps)


@jit()
def _sum64(v: tl.tensor, ROWS: tl.constexpr, PARTS: tl.constexpr) -> tl.tensor:
    """The sums (ROWS, PARTS) of every 64 columns, always adding pairs of neighbors."""
    v = tl.sum(tl.reshape(v, (ROWS, 32 * PARTS, 2)), axis=2)
    v = tl.sum(tl.reshape(v, (ROWS, 16 * PARTS, 2)), axis=2)
    v = tl.sum(tl.reshape(v, (ROWS, 8 * PARTS, 2)), axis=2)
    v = tl.sum(tl.reshape(v, (ROWS, 4 * PARTS, 2)), axis=2)
    v = tl.sum(tl.reshape(v, (ROWS, 2 * PARTS, 2)), axis=2)
    return tl.sum(tl.reshape(v, (ROWS, PARTS, 2)), axis=2)


@jit()
def store_stats(
    stats_ptr: tl.tensor,  # (2 chunks, M) fp32
    stride: int,  # from one row of stats to the next: at least M
    y: tl.tensor,  # (BLOCK_M, BLOCK_N) fp32, the rounded values, 0 past WIDTH
    offs_m: tl.tensor,  # (BLOCK_M,) the numbers of the rows
    mask_m: tl.tensor,  # (BLOCK_M,) whether the row exists
    column: int,  # the first column, a multiple of 64
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAIRED: tl.constexpr = False,
) -> None:
    """Write the statistics of a tile that holds whole chunks.

    A reduction adds in an order that depends on the layout. All tiles of a kernel usually have the
    same layout. If they do not, because loads are as wide as the caller's memory allows, PAIRED
    fixes the order. Together with a residual PAIRED would cost spills.
    """
    CHUNKS: tl.constexpr = (WIDTH + 63) // 64
    PARTS: tl.constexpr = BLOCK_N // 64
    values = tl.reshape(y, (BLOCK_M, PARTS, 64))
    total = _sum64(y, BLOCK_M, PARTS) if PAIRED else tl.sum(values, axis=2)
    chunk = column // 64 + tl.arange(0, PARTS)
    count = tl.minimum(WIDTH - 64 * chunk, 64)
    mean = total / tl.maximum(count, 1).to(tl.float32)[None, :]
    centered = values - mean[:, :, None]
    if WIDTH % 64 != 0:
        inside = tl.arange(0, 64)[None, None, :] < count[None, :, None]
        centered = tl.where(inside, centered, 0.0)
    squares = centered * centered
    squares = _sum64(squares, BLOCK_M, PARTS) if PAIRED else tl.sum(squares, axis=2)
    offset = chunk[None, :].to(tl.int64) * stride + offs_m[:, None]
    mask = mask_m[:, None] & (chunk < CHUNKS)[None, :]
    tl.store(stats_ptr + offset, total, mask=mask)
    tl.store(stats_ptr + offset + CHUNKS * stride, squares, mask=mask)


@jit()
def load_mean_rstd(
    stats_ptr: tl.tensor,  # (2 chunks, M) fp32
    stride: int,
    offs_m: tl.tensor,  # (BLOCK_M,)
    mask_m: tl.tensor,  # (BLOCK_M,)
    eps: float,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """The mean and 1 / sqrt(variance + eps) of rows, each (BLOCK_M,)."""
    CHUNKS: tl.constexpr = (WIDTH + 63) // 64
    LAST_COUNT: tl.constexpr = WIDTH - 64 * (CHUNKS - 1)
    wide = tl.cast(stride, tl.int64)
    sums = stats_ptr + offs_m
    mean = tl.load(sums, mask=mask_m, other=0.0)
    for c in tl.static_range(1, CHUNKS):
        mean += tl.load(sums + c * wide, mask=mask_m, other=0.0)
    mean = mean / WIDTH
    squares = tl.zeros_like(mean)
    for c in tl.static_range(CHUNKS):
        count = 64.0 if c < CHUNKS - 1 else LAST_COUNT * 1.0
        chunk = tl.load(sums + c * wide, mask=mask_m, other=0.0)
        apart = tl.fma(chunk, 1.0 / count, -mean)
        inside = tl.load(sums + (CHUNKS + c) * wide, mask=mask_m, other=0.0)
        squares += tl.fma(count * apart, apart, inside)
    return mean, tl.rsqrt(squares / WIDTH + eps)
