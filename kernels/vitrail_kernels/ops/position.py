"""position: the position table for another patch grid, plus everything that no pixel changes

    out[:prefix] = prefix          out[prefix:] = resize(table[1:]) + projection bias
    FLOPs  none counted      bytes  2 T C      bound  by memory; cached, once for each image size

The resize is bicubic with align_corners=False in fp32, and antialiased for some families, as in
transformers' `interpolate_pos_encoding`. The center of row i of h from g rows is (i + 1/2) g / h.
Its taps are the rows within two rows of the center, weighted by Keys' cubic kernel with a = -3/4,
and the border row repeats. Antialiasing takes a = -1/2, stretches the kernel by g / h if the grid
shrinks, drops taps outside the grid and normalizes the weights. All distances are fractions over
2 h or 2 g, so that the kernel finds taps and distances in integers and rounds only the weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.cost import memory_cost
from vitrail_kernels.device.overlap import wait_for_previous
from vitrail_kernels.launch import Call, Grid, Target, cdiv, check_tensor, jit, tl
from vitrail_kernels.operator import Operator

COPY, PLAIN, ANTIALIAS = 0, 1, 2
BLOCK_M, BLOCK_N = 32, 128


def position_ref(
    out: Tensor,
    table: Tensor,
    prefix: Tensor,
    bias: Tensor | None = None,
    *,
    table_grid: tuple[int, int],
    grid: tuple[int, int],
    antialias: bool,
) -> None:
    """Write ``out`` (P + h w, C) fp32 for the patch grid ``grid`` = (h, w).

    ``table`` (1 + H W, C) fp32 is the checkpoint's table, with ``table_grid`` = (H, W). Its first
    row is the class token's and not used here. ``prefix`` (P, C) fp32 holds the class token with
    its position, then the registers. ``bias`` (C,) fp32 is the patch projection's bias.
    """
    patches = table[1:]
    if grid != table_grid:
        width = table.shape[1]
        square = patches.view(1, *table_grid, width).permute(0, 3, 1, 2)
        resized = F.interpolate(
            square, size=grid, mode="bicubic", align_corners=False, antialias=antialias
        )
        patches = resized.permute(0, 2, 3, 1).reshape(-1, width)
    out[: prefix.shape[0]] = prefix
    out[prefix.shape[0] :] = patches if bias is None else patches + bias


@jit()
def _cubic(x: tl.tensor, A: tl.constexpr) -> tl.tensor:
    """Keys' cubic convolution kernel at a distance ``x`` in taps."""
    x = tl.abs(x)
    near = tl.fma(tl.fma(x, A + 2.0, -(A + 3.0)) * x, x, 1.0)
    far = tl.fma(tl.fma(tl.fma(x, A, -5.0 * A), x, 8.0 * A), x, -4.0 * A)
    return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))


@jit()
def _first_tap(i: tl.tensor, source: int, size: int, ANTIALIAS: tl.constexpr) -> tl.tensor:
    """The first of the ``source`` rows that row ``i`` of ``size`` is made of; may be below 0."""
    if ANTIALIAS:
        # floor(center - reach + 1/2), reach = 2 max(source / size, 1), at least 0
        return tl.maximum((2 * i + 1) * source - 4 * tl.maximum(source, size) + size, 0) // (
            2 * size
        )
    # floor(center - 1/2) - 1; 2 size is added and subtracted again so that the division floors
    return ((2 * i + 1) * source + size) // (2 * size) - 2


@jit()
def _weight(
    i: tl.tensor, tap: tl.tensor, source: int, size: int, ANTIALIAS: tl.constexpr
) -> tl.tensor:
    """The weight of ``tap`` in row ``i``, before normalization."""
    distance = (2 * tap + 1) * size - (2 * i + 1) * source  # between centers, times 2 size
    if ANTIALIAS:
        stretched = distance.to(tl.float32) / (2.0 * tl.maximum(source, size))
        return tl.where((tap >= 0) & (tap < source), _cubic(stretched, -0.5), 0.0)
    return _cubic(distance.to(tl.float32) / (2.0 * size), -0.75)


@jit(varying=("rows", "prefix_rows", "height", "width", "taps_y", "taps_x"))
def _position_kernel(
    out_ptr: tl.tensor,  # (P + h w, WIDTH) fp32
    table_ptr: tl.tensor,  # (1 + GRID_H GRID_W, WIDTH) fp32
    prefix_ptr: tl.tensor,  # (P, WIDTH) fp32
    bias_ptr: tl.tensor,  # (WIDTH,) fp32 or None
    rows: int,  # P + h w
    prefix_rows: int,  # P
    height: int,  # h
    width: int,  # w
    taps_y: int,  # the largest number of source rows for a row
    taps_x: int,
    GRID_H: tl.constexpr,  # of the table
    GRID_W: tl.constexpr,
    WIDTH: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_previous(PDL)
    ACROSS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    AA: tl.constexpr = MODE == 2
    offs_m = tl.program_id(0) // ACROSS * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % ACROSS * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (offs_n < WIDTH)[None, :]
    is_prefix = offs_m < prefix_rows
    is_patch = (offs_m >= prefix_rows) & (offs_m < rows)
    mask = is_patch[:, None] & mask_n
    cell = tl.where(is_patch, offs_m - prefix_rows, 0)
    patch_ptr = table_ptr + WIDTH + offs_n[None, :]  # row 0 of the table is the class token's

    if MODE == 0:
        acc = tl.load(patch_ptr + cell[:, None] * WIDTH, mask=mask, other=0.0)
    else:
        y = cell // width
        x = cell - y * width
        first_y = _first_tap(y, GRID_H, height, AA)
        first_x = _first_tap(x, GRID_W, width, AA)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total_y = tl.zeros((BLOCK_M,), tl.float32)
        total_x = tl.zeros((BLOCK_M,), tl.float32)
        for i in range(taps_y):
            tap_y = first_y + i
            weight_y = _weight(y, tap_y, GRID_H, height, AA)
            total_y += weight_y
            row = tl.minimum(tl.maximum(tap_y, 0), GRID_H - 1) * GRID_W
            line = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            total_x = tl.zeros((BLOCK_M,), tl.float32)
            for j in range(taps_x):
                tap_x = first_x + j
                weight_x = _weight(x, tap_x, GRID_W, width, AA)
                total_x += weight_x
                source = row + tl.minimum(tl.maximum(tap_x, 0), GRID_W - 1)
                # a tap of weight 0 is not read: its value may be NaN
                used = mask & ((weight_x != 0.0) & (weight_y != 0.0))[:, None]
                value = tl.load(patch_ptr + source[:, None] * WIDTH, mask=used, other=0.0)
                line = tl.fma(weight_x[:, None], value, line)
            acc = tl.fma(weight_y[:, None], line, acc)
        if AA:
            acc = acc / (total_y * total_x)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < WIDTH, other=0.0)[None, :]
    offset = offs_m[:, None] * WIDTH + offs_n[None, :]
    mask_prefix = is_prefix[:, None] & mask_n
    prefix = tl.load(prefix_ptr + offset, mask=mask_prefix, other=0.0)
    tl.store(out_ptr + offset, tl.where(is_prefix[:, None], prefix, acc), mask=mask | mask_prefix)


# -- the calls -------------------------------------------------------------------------------------


def _taps(source: int, size: int, antialias: bool) -> int:
    """The largest number of the ``source`` rows that one of ``size`` rows is made of."""
    return min(source, cdiv(4 * max(source, size), size)) if antialias else 4


def position_calls(
    target: Target,
    out: Tensor,
    table: Tensor,
    prefix: Tensor,
    bias: Tensor | None = None,
    *,
    table_grid: tuple[int, int],
    grid: tuple[int, int],
    antialias: bool,
) -> list[Call]:
    """The launch of `position_ref`, with the same tiles for every GPU.

    Raises ValueError for a shape, dtype or layout that the kernel does not take, a grid without
    rows, and tables of 2^31 values or more.
    """
    cells, width = table_grid[0] * table_grid[1], table.shape[1]
    rows = prefix.shape[0] + grid[0] * grid[1]
    if min(*table_grid, *grid) < 1:
        raise ValueError(f"position: got grids {table_grid} and {grid}, wanted a row at least")
    check_tensor("position: table", table, out, torch.float32, (1 + cells, width))
    check_tensor("position: prefix", prefix, out, torch.float32, (prefix.shape[0], width))
    check_tensor("position: bias", bias, out, torch.float32, (width,))
    check_tensor("position: out", out, out, torch.float32, (rows, width))
    products = (4 * source * size for source, size in zip(table_grid, grid, strict=True))
    if max(table.numel(), out.numel(), *products) >= 1 << 31:
        raise ValueError(
            f"position: got {table_grid} to {grid} of {width}, wanted offsets of 32 bits"
        )
    mode = ANTIALIAS if antialias else PLAIN
    why = "once for each image size: nothing to tune"
    config = KernelConfig(BLOCK_M, BLOCK_N, 0, 8, 1, reason=why)
    arguments = {
        "out_ptr": out,
        "table_ptr": table,
        "prefix_ptr": prefix,
        "bias_ptr": bias,
        "rows": rows,
        "prefix_rows": prefix.shape[0],
        "height": grid[0],
        "width": grid[1],
        "taps_y": _taps(table_grid[0], grid[0], antialias),
        "taps_x": _taps(table_grid[1], grid[1], antialias),
        "GRID_H": table_grid[0],
        "GRID_W": table_grid[1],
        "WIDTH": width,
        "MODE": COPY if grid == table_grid else mode,
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "PDL": target.pdl,
    }
    blocks = Grid(rows, BLOCK_M, cdiv(width, BLOCK_N))
    return [Call(_position_kernel, blocks, arguments, config)]


POSITION = Operator("position", position_ref, position_calls, memory_cost)
