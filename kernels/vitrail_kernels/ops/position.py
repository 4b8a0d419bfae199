"""position: the position table at another grid, with all that is added to a token beside its pixels

    out[:prefix] = prefix          out[prefix:] = resize(table[1:]) + projection bias
    FLOPs  none counted      bytes  2 T C      bound  by memory, and cached: once for each image
    size

The resize is bicubic with align_corners=False in fp32, antialiased where the family says so: what
transformers' `interpolate_pos_encoding` does. Row i of h from g rows is centred at (i + 1/2) g / h,
and its taps are those within two rows of it, weighted by Keys' cubic kernel: with a = -3/4 and the
border repeated, or antialiased with a = -1/2, stretched by g / h where the grid shrinks, taps
outside left out and the rest normalised. All of it are fractions over 2 h or 2 g, so the kernel
finds taps and distances in integers, and only the weights are rounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.cost import Cost, traffic
from vitrail_kernels.device.overlap import wait_for_previous
from vitrail_kernels.launch import (
    Call,
    Grid,
    Target,
    cdiv,
    check_tensor,
    jit,
    launch,
    target_of,
    tl,
)

COPY, PLAIN, ANTIALIAS = 0, 1, 2
BLOCK_M, BLOCK_N = 32, 128


def position_ref(
    out: Tensor,
    table: Tensor,
    prefix: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    target: tuple[int, int],
    antialias: bool,
) -> None:
    """Write ``out`` (P + h w, C) fp32 for the ``target`` grid (h, w).

    ``table`` (1 + grid_h grid_w, C) fp32 is the checkpoint's, its first row the class token's (part
    of ``prefix``); ``prefix`` (P, C) fp32 holds the class token with its position, then the
    registers; ``bias`` (C,) fp32 is the patch projection's.
    """
    patches = table[1:]
    if target != grid:
        width = table.shape[1]
        square = patches.view(1, *grid, width).permute(0, 3, 1, 2)
        resized = F.interpolate(
            square, size=target, mode="bicubic", align_corners=False, antialias=antialias
        )
        patches = resized.permute(0, 2, 3, 1).reshape(-1, width)
    out[: prefix.shape[0]] = prefix
    out[prefix.shape[0] :] = patches if bias is None else patches + bias


@jit()
def _cubic(x: tl.tensor, A: tl.constexpr) -> tl.tensor:
    """Keys' cubic convolution kernel at a distance."""
    x = tl.abs(x)
    near = tl.fma(tl.fma(x, A + 2.0, -(A + 3.0)) * x, x, 1.0)
    far = tl.fma(tl.fma(tl.fma(x, A, -5.0 * A), x, 8.0 * A), x, -4.0 * A)
    return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))


@jit()
def _first_tap(i: tl.tensor, old: int, new: int, ANTIALIAS: tl.constexpr) -> tl.tensor:
    """The first of the rows of ``old`` that row ``i`` of ``new`` may be made of; may be below 0."""
    if ANTIALIAS:
        # floor(centre - reach + 1/2), reach = 2 max(old / new, 1), at least 0
        return tl.maximum((2 * i + 1) * old - 4 * tl.maximum(old, new) + new, 0) // (2 * new)
    # floor(centre - 1/2) - 1; 2 new is added and taken away so that the division floors
    return ((2 * i + 1) * old + new) // (2 * new) - 2


@jit()
def _weight(i: tl.tensor, tap: tl.tensor, old: int, new: int, ANTIALIAS: tl.constexpr) -> tl.tensor:
    """What ``tap`` weighs in row ``i``, before normalisation."""
    apart = (2 * tap + 1) * new - (2 * i + 1) * old  # from centre to centre, times 2 new
    if ANTIALIAS:
        stretched = apart.to(tl.float32) / (2.0 * tl.maximum(old, new))
        return tl.where((tap >= 0) & (tap < old), _cubic(stretched, -0.5), 0.0)
    return _cubic(apart.to(tl.float32) / (2.0 * new), -0.75)


@jit(varying=("rows", "prefix_rows", "high", "wide", "taps_high", "taps_wide"))
def _position_kernel(
    out_ptr: tl.tensor,  # (P + h w, WIDTH) fp32
    table_ptr: tl.tensor,  # (1 + GRID_H GRID_W, WIDTH) fp32
    prefix_ptr: tl.tensor,  # (P, WIDTH) fp32
    bias_ptr: tl.tensor,  # (WIDTH,) fp32 or None
    rows: int,  # P + h w
    prefix_rows: int,  # P
    high: int,  # h
    wide: int,  # w
    taps_high: int,  # how many rows of the old grid a new row is made of, at most
    taps_wide: int,
    GRID_H: tl.constexpr,
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
    first = table_ptr + WIDTH + offs_n[None, :]  # the row after the class token's

    if MODE == 0:
        acc = tl.load(first + cell[:, None] * WIDTH, mask=mask, other=0.0)
    else:
        y = cell // wide
        x = cell - y * wide
        first_y = _first_tap(y, GRID_H, high, AA)
        first_x = _first_tap(x, GRID_W, wide, AA)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total_y = tl.zeros((BLOCK_M,), tl.float32)
        total_x = tl.zeros((BLOCK_M,), tl.float32)
        for i in range(taps_high):
            tap_y = first_y + i
            weight_y = _weight(y, tap_y, GRID_H, high, AA)
            total_y += weight_y
            row = tl.minimum(tl.maximum(tap_y, 0), GRID_H - 1) * GRID_W
            line = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            total_x = tl.zeros((BLOCK_M,), tl.float32)
            for j in range(taps_wide):
                tap_x = first_x + j
                weight_x = _weight(x, tap_x, GRID_W, wide, AA)
                total_x += weight_x
                at = row + tl.minimum(tl.maximum(tap_x, 0), GRID_W - 1)
                # a weight of 0 must not meet a value that is not this cell's
                used = mask & ((weight_x != 0.0) & (weight_y != 0.0))[:, None]
                value = tl.load(first + at[:, None] * WIDTH, mask=used, other=0.0)
                line = tl.fma(weight_x[:, None], value, line)
            acc = tl.fma(weight_y[:, None], line, acc)
        if AA:
            acc = acc / (total_y * total_x)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < WIDTH, other=0.0)[None, :]
    at = offs_m[:, None] * WIDTH + offs_n[None, :]
    mask_prefix = is_prefix[:, None] & mask_n
    kept = tl.load(prefix_ptr + at, mask=mask_prefix, other=0.0)
    tl.store(out_ptr + at, tl.where(is_prefix[:, None], kept, acc), mask=mask | mask_prefix)


def position_cost(
    out: Tensor, table: Tensor, prefix: Tensor, bias: Tensor | None = None, **_: object
) -> Cost:
    """Both tables once."""
    return Cost(0, traffic(out, table, prefix, bias))


# -- the launcher ----------------------------------------------------------------------------------


def _taps(old: int, new: int, antialias: bool) -> int:
    """How many rows of ``old`` one row of ``new`` is made of, at most."""
    return min(old, cdiv(4 * max(old, new), new)) if antialias else 4


def position_calls(
    gpu: Target,
    out: Tensor,
    table: Tensor,
    prefix: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    target: tuple[int, int],
    antialias: bool,
) -> list[Call]:
    """The launch of `position_ref`; the same tiles for every ``gpu``.

    Raises ValueError for a shape, dtype or layout that the kernel does not take, a grid without
    rows, and tables of 2^31 numbers.
    """
    cells, width, rows = grid[0] * grid[1], table.shape[1], prefix.shape[0] + target[0] * target[1]
    if min(*grid, *target) < 1:
        raise ValueError(f"position: got grid {grid} and target {target}, wanted a row at least")
    check_tensor("position: table", table, out, torch.float32, (1 + cells, width))
    check_tensor("position: prefix", prefix, out, torch.float32, (prefix.shape[0], width))
    check_tensor("position: bias", bias, out, torch.float32, (width,))
    check_tensor("position: out", out, out, torch.float32, (rows, width))
    largest = max(
        table.numel(), out.numel(), *(4 * g * t for g, t in zip(grid, target, strict=True))
    )
    if largest >= 1 << 31:
        raise ValueError(f"position: got {grid} to {target} of {width}, wanted offsets of 32 bits")
    mode = ANTIALIAS if antialias else PLAIN
    config = KernelConfig(
        BLOCK_M, BLOCK_N, 0, 8, 1, reason="once for each image size: nothing to tune"
    )
    arguments = {
        "out_ptr": out,
        "table_ptr": table,
        "prefix_ptr": prefix,
        "bias_ptr": bias,
        "rows": rows,
        "prefix_rows": prefix.shape[0],
        "high": target[0],
        "wide": target[1],
        "taps_high": _taps(grid[0], target[0], antialias),
        "taps_wide": _taps(grid[1], target[1], antialias),
        "GRID_H": grid[0],
        "GRID_W": grid[1],
        "WIDTH": width,
        "MODE": COPY if target == grid else mode,
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "PDL": gpu.pdl,
    }
    return [Call(_position_kernel, Grid(rows, BLOCK_M, cdiv(width, BLOCK_N)), arguments, config)]


def position(
    out: Tensor,
    table: Tensor,
    prefix: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    target: tuple[int, int],
    antialias: bool,
) -> None:
    """`position_ref` by the kernel, for the same tensors; see `position_calls` for the errors."""
    gpu = target_of(out)
    launch(
        position_calls(gpu, out, table, prefix, bias, grid=grid, target=target, antialias=antialias)
    )
