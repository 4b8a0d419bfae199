"""linear_int8_grouped: out = residual + scale * (weight_scale sum_g x_scale_g (x_g W_g^T) + b)

x      int8 codes in groups of columns, with a scale for each row and group
W      int8, one scale a row
FLOPs  2 M N K            bytes  M K + N K + M N (+ M N residual)
bound  by the tensor cores from a few hundred rows on, by the read of W below that

An accumulator that begins at the bits of 1.5 * 2^23 is the float 1.5 * 2^23 + sum, since |sum| is
below 2^22 for up to 256 columns. Subtracting ``shift`` is then exact: it removes 1.5 * 2^23 and, if
codes are unsigned less 128, adds 128 times the sum of the weight's codes.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.cost import Cost, traffic
from vitrail_kernels.device.int8 import add_group, finish_sums, load_group
from vitrail_kernels.device.overlap import wait_for_previous
from vitrail_kernels.device.stats import stats_ref, stats_shape
from vitrail_kernels.device.tile import part_of, tile_of
from vitrail_kernels.int8_product import int8_product
from vitrail_kernels.launch import (
    FLOATS,
    Call,
    Grid,
    Target,
    cdiv,
    check_tensor,
    descriptor,
    fits_descriptor,
    jit,
    tl,
)
from vitrail_kernels.operator import Operator
from vitrail_kernels.ops.linear_config import tile_constants
from vitrail_kernels.ops.linear_int8 import check_product
from vitrail_kernels.ops.linear_int8_config import (
    Int8Form,
    linear_int8_config,
    linear_int8_key,
    linear_int8_ladder,
)

GROUPS = (64, 128, 256)
"""How many columns may share a scale; with more, a group's sums might not fit 22 bits."""
FLOAT_OF_INTEGER = 12582912.0
"""1.5 * 2^23: the float whose bits plus an integer n, |n| < 2^22, are those of 1.5 * 2^23 + n."""


def linear_int8_grouped_ref(
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
    stats: Tensor | None = None,
    *,
    group: int = 128,
) -> None:
    """Write ``out`` (M, N) from int8 ``x`` (M, K) and ``weight`` (N, K), with K a multiple of
    ``group``.

    fp32: ``x_scale`` (K / group, M), ``weight_scale`` (N,), ``shift`` (K / group, N), ``bias``
    (N,), ``scale`` (N,). ``shift`` is `FLOAT_OF_INTEGER` less 128 times the group's sum of codes of
    the weight's row if the codes of ``x`` are unsigned less 128, else `FLOAT_OF_INTEGER`.
    ``residual`` may be ``out`` itself; ``residual_rows`` (M,) picks its rows. ``stats``
    (2 chunks, M) receives the row statistics of ``out``.
    """
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
    for number, start in enumerate(range(0, x.shape[1], group)):
        columns = slice(start, start + group)
        sums = int8_product(x[:, columns].contiguous(), weight[:, columns].contiguous()).float()
        sums += FLOAT_OF_INTEGER - shift[number]
        total.addcmul_(sums, x_scale[number][:, None])
    y = total.mul_(weight_scale).add_(bias)
    if scale is not None:
        y.mul_(scale)
    if residual is not None:
        y += residual if residual_rows is None else residual.index_select(0, residual_rows)
    out.copy_(y)
    if stats is not None:
        stats_ref(stats, out)


@jit(varying=("m", "x_scale_stride", "stats_stride"))
def _linear_int8_grouped_tma_kernel(
    out_map: tl.tensor,  # (M, N) in halves of tiles; or None
    out_ptr: tl.tensor,  # (M, N) if out_map is None
    x_map: tl.tensor,  # (M, K) int8 in tiles of (BLOCK_M, BLOCK_K)
    x_scale_ptr: tl.tensor,  # (K / GROUP, M) fp32
    weight_map: tl.tensor,  # (N, K) int8 in tiles of (BLOCK_N, BLOCK_K)
    weight_scale_ptr: tl.tensor,  # (N,) fp32
    shift_ptr: tl.tensor,  # (K / GROUP, N) fp32
    bias_ptr: tl.tensor,  # (N,) fp32
    scale_ptr: tl.tensor,  # (N,) fp32 or None
    residual_ptr: tl.tensor,  # (M', N) or None
    residual_rows_ptr: tl.tensor,  # (M,) int32 or None
    stats_ptr: tl.tensor,  # (2 chunks, M) fp32 or None
    m: int,
    x_scale_stride: int,
    stats_stride: int,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A persistent kernel, as `_linear_tma_kernel`."""
    wait_for_previous(PDL)
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, column = tile_of(tile, m, N, BLOCK_M, BLOCK_N, GROUP_M)
        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m < m
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for g in tl.range(0, K // GROUP):
            x_scale, shift = load_group(
                x_scale_ptr, shift_ptr, g, row, column, m, x_scale_stride, N, BLOCK_M, BLOCK_N
            )
            acc = tl.full((BLOCK_M, BLOCK_N), 0x4B400000, tl.int32)
            for k in tl.static_range(0, GROUP, BLOCK_K):
                x = x_map.load([row, g * GROUP + k])
                weight = weight_map.load([column, g * GROUP + k])
                acc = tl.dot(x, weight.T, acc, out_dtype=tl.int32)
            total = add_group(total, acc, shift, x_scale)
        PART_N: tl.constexpr = BLOCK_N // PARTS
        for number in tl.static_range(PARTS):
            part_column = column + number * PART_N
            y = finish_sums(
                part_of(total, number, PARTS, BLOCK_M, BLOCK_N),
                out_ptr.dtype.element_ty if out_map is None else out_map.dtype,
                weight_scale_ptr, bias_ptr, scale_ptr, residual_ptr, residual_rows_ptr, stats_ptr,
                stats_stride, offs_m, mask_m, part_column, N, BLOCK_M, PART_N,
            )  # fmt: skip
            if out_map is None:
                offs_n = part_column + tl.arange(0, PART_N)
                ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
                tl.store(ptrs, y, mask=mask_m[:, None] & (offs_n < N)[None, :])
            else:
                out_map.store([row, part_column], y)


@jit(varying=("m", "groups", "x_scale_stride", "stats_stride"))
def _linear_int8_grouped_pointer_kernel(
    out_ptr: tl.tensor,  # (M, N)
    x_ptr: tl.tensor,  # (M, K) int8
    x_scale_ptr: tl.tensor,  # (K / GROUP, M) fp32
    weight_ptr: tl.tensor,  # (N, K) int8
    weight_scale_ptr: tl.tensor,
    shift_ptr: tl.tensor,  # (K / GROUP, N) fp32
    bias_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    residual_rows_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    m: int,
    groups: int,  # K / GROUP, as a variable for the reason in `_linear_pointer_kernel`
    x_scale_stride: int,
    stats_stride: int,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A program makes a tile with cp.async, if there are no tensor maps or for strides that tensor
    maps cannot describe."""
    wait_for_previous(PDL)
    row, column = tile_of(tl.program_id(0), m, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < m
    # rows past the end read the last row instead, as in `_linear_pointer_kernel`
    safe_m = tl.minimum(offs_m, m - 1)
    safe_n = tl.minimum(columns, N - 1)
    x_ptrs = x_ptr + safe_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    weight_ptrs = weight_ptr + safe_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for g in tl.range(0, groups):
        x_scale, shift = load_group(
            x_scale_ptr, shift_ptr, g, row, column, m, x_scale_stride, N, BLOCK_M, BLOCK_N
        )
        acc = tl.full((BLOCK_M, BLOCK_N), 0x4B400000, tl.int32)
        for k in tl.static_range(0, GROUP, BLOCK_K):
            x = tl.load(x_ptrs + g * GROUP + k)
            weight = tl.load(weight_ptrs + g * GROUP + k)
            acc = tl.dot(x, weight.T, acc, out_dtype=tl.int32)
        total = add_group(total, acc, shift, x_scale)
    PART_N: tl.constexpr = BLOCK_N // PARTS
    for number in tl.static_range(PARTS):
        part_column = column + number * PART_N
        y = finish_sums(
            part_of(total, number, PARTS, BLOCK_M, BLOCK_N), out_ptr.dtype.element_ty,
            weight_scale_ptr, bias_ptr, scale_ptr, residual_ptr, residual_rows_ptr, stats_ptr,
            stats_stride, offs_m, mask_m, part_column, N, BLOCK_M, PART_N,
        )  # fmt: skip
        offs_n = part_column + tl.arange(0, PART_N)
        ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        tl.store(ptrs, y, mask=mask_m[:, None] & (offs_n < N)[None, :])


def linear_int8_grouped_cost(
    *, out: Tensor, weight: Tensor, residual: Tensor | None = None, **arguments: object
) -> Cost:
    """FLOPs of the output rows; of ``residual`` only the rows for them are read."""
    moved = traffic(out, weight, *arguments.values())
    if residual is not None:
        moved += out.numel() * residual.element_size()
    return Cost(2 * out.shape[0] * weight.numel(), moved)


# -- the calls -------------------------------------------------------------------------------------


def linear_int8_grouped_calls(
    target: Target,
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
    stats: Tensor | None = None,
    *,
    group: int = 128,
    config: KernelConfig | None = None,
) -> list[Call]:
    """The launch of `linear_int8_grouped_ref`.

    ``config`` replaces the configuration that the size would get. Raises ValueError for a shape,
    dtype or layout that the kernel does not take.
    """
    op = "linear_int8_grouped"
    check_product(op, x, weight)
    (m, k), n = x.shape, weight.shape[0]
    if group not in GROUPS or k % group:
        raise ValueError(
            f"{op}: group: got {group} for {k} columns, wanted a divisor among {GROUPS}"
        )
    if out.dtype not in FLOATS:
        raise ValueError(f"{op}: out: got {out.dtype}, wanted one of {FLOATS}")
    residual_m = m if residual is None or residual_rows is None else residual.shape[0]
    for name, tensor, dtype, shape in (
        ("x", x, torch.int8, (m, k)),
        ("x_scale", x_scale, torch.float32, (k // group, m)),
        ("weight", weight, torch.int8, (n, k)),
        ("weight_scale", weight_scale, torch.float32, (n,)),
        ("shift", shift, torch.float32, (k // group, n)),
        ("bias", bias, torch.float32, (n,)),
        ("out", out, out.dtype, (m, n)),
        ("scale", scale, torch.float32, (n,)),
        ("residual", residual, out.dtype, (residual_m, n)),
        ("residual_rows", residual_rows, torch.int32, (m,)),
        ("stats", stats, torch.float32, stats_shape(m, n)),
    ):
        check_tensor(f"{op}: {name}", tensor, x, dtype, shape)
    if m == 0 or n == 0:
        return []
    maps = target.tma and fits_descriptor(out, x, weight)
    form = Int8Form(
        pointers=not maps,
        group=group,
        scale=scale is not None,
        residual=residual is not None,
        stats=stats is not None,
    )
    config = config or linear_int8_config(target, out.dtype, m, n, k, form)
    config = replace(config, block_k=min(config.block_k, group))
    key = linear_int8_key(out.dtype, m, n, k, form)
    ladder = functools.partial(linear_int8_ladder, target, out.dtype, n, k, form)
    across = cdiv(n, config.block_n)
    constants = tile_constants(target, config, n, k)
    part_columns = config.block_n // constants["PARTS"]
    shared = constants | {
        "x_scale_ptr": x_scale,
        "weight_scale_ptr": weight_scale,
        "shift_ptr": shift,
        "bias_ptr": bias,
        "scale_ptr": scale,
        "residual_ptr": residual,
        "residual_rows_ptr": residual_rows if residual is not None else None,
        "stats_ptr": stats,
        "m": m,
        "x_scale_stride": m,
        "stats_stride": m,
        "GROUP": group,
    }
    if maps:
        tensor_maps = {
            "out_map": None,
            "out_ptr": out,
            "x_map": descriptor(x, config.block_m, config.block_k),
            "weight_map": descriptor(weight, config.block_n, config.block_k),
        }
        if residual is None:
            out_map = descriptor(out, config.block_m, part_columns)
            tensor_maps |= {"out_map": out_map, "out_ptr": None}
        grid = Grid(m, config.block_m, across, limit=config.ctas * target.sms)
        arguments = tensor_maps | shared
        return [Call(_linear_int8_grouped_tma_kernel, grid, arguments, config, key, m, ladder)]
    pointers = {"groups": k // group, "out_ptr": out, "x_ptr": x, "weight_ptr": weight}
    grid, arguments = Grid(m, config.block_m, across), pointers | shared
    return [Call(_linear_int8_grouped_pointer_kernel, grid, arguments, config, key, m, ladder)]


LINEAR_INT8_GROUPED = Operator(
    "linear_int8_grouped",
    linear_int8_grouped_ref,
    linear_int8_grouped_calls,
    linear_int8_grouped_cost,
)
