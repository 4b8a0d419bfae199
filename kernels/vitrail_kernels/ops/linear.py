"""linear: out = residual + scale * act(norm(x)[rows] W^T + b)

norm   LayerNorm without its affine part: gamma and beta are folded into W and b
act    none, GELU (erf), tanh-GELU, QuickGELU, ReLU, SiLU, tanh; gated: act(gate) * up
FLOPs  2 M N K            bytes  M K + N K + M N (+ M N residual), in the compute dtype
bound  by the tensor cores from a few hundred rows on, by the read of W below that

LayerNorm needs no extra pass over x: norm(x) W^T = r (x W^T - m s). r and m come from the row
statistics of x, and s is the row sums of the rounded W. Centering W, which makes s zero, was tried:
the error was 4e-3 instead of 2e-4 if the mean is 20 times the deviation.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.cost import Cost, traffic
from vitrail_kernels.device.activations import ACTIVATIONS, activate_ref_
from vitrail_kernels.device.overlap import wait_for_previous
from vitrail_kernels.device.stagger import take_turns
from vitrail_kernels.device.stats import load_mean_rstd, stats_ref, stats_shape
from vitrail_kernels.device.tile import epilogue, part_of, tile_of
from vitrail_kernels.launch import (
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
from vitrail_kernels.ops.linear_config import (
    LinearForm,
    linear_config,
    linear_key,
    linear_ladder,
    tile_constants,
)


def linear_ref(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    rows: Tensor | None = None,
    residual_rows: Tensor | None = None,
    x_stats: Tensor | None = None,
    row_sums: Tensor | None = None,
    stats: Tensor | None = None,
    *,
    norm_eps: float | None = None,
    activation: str | None = None,
    gated: bool = False,
) -> None:
    """Write ``out`` (M', N), or (M', N / 2) if ``gated``, from ``x`` (M, K) and ``weight`` (N, K).

    If ``gated``, rows of gate and up alternate in ``weight``. ``bias`` and ``scale`` are (N,) fp32.
    ``residual`` (M, N) may be ``out`` itself. ``rows`` (M',) picks rows of ``x``, and
    ``residual_rows`` (M',) picks rows of ``residual``. ``norm_eps`` normalizes each row of ``x``
    first (biased variance, fp32); for that the kernel needs ``x_stats`` (2 chunks, M) and
    ``row_sums`` (N,), both fp32, and the reference needs neither. ``stats`` (2 chunks, M') receives
    the row statistics of ``out``.
    """
    if rows is not None:
        x = x.index_select(0, rows)
    if residual is not None and residual_rows is not None:
        residual = residual.index_select(0, residual_rows)
    if norm_eps is not None:
        x = F.layer_norm(x, (x.shape[1],), eps=norm_eps)
    _product(out, x, weight, bias, scale, residual, activation, gated)
    if stats is not None:
        stats_ref(stats, out)


def _product(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    gated: bool,
) -> None:
    only_adds = scale is None and activation is None and not gated
    if residual is not None and only_adds and out.dtype == x.dtype == torch.float32:
        # This needs no temporary, and adds in the same order whether out is the residual or not.
        # 16-bit sums are computed below, with one rounding less.
        if bias is not None:
            torch.add(residual, bias, out=out)
        elif residual is not out:
            out.copy_(residual)
        torch.addmm(out, x, weight.t(), out=out)
        return
    direct = residual is None and not gated and scale is None and out.dtype == x.dtype
    y = out if direct else torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    if bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias.to(x.dtype), x, weight.t(), out=y)
    if gated:
        gate = activate_ref_(y[:, 0::2].contiguous(), activation or "silu")
        y = gate.mul_(y[:, 1::2])
    elif activation is not None:
        y = activate_ref_(y, activation)
    if scale is not None:
        y = y * scale
    if residual is not None:
        torch.add(residual, y, out=out) if y.dtype == out.dtype else out.copy_(residual + y)
    elif y is not out:
        out.copy_(y)


@jit(varying=("m", "x_stats_stride", "stats_stride"))
def _linear_tma_kernel(
    out_map: tl.tensor,  # (M, N) in tiles of (BLOCK_M, BLOCK_N), half as wide if gated; or None
    out_ptr: tl.tensor,  # (M, N) if out_map is None
    x_map: tl.tensor,  # (M, K) in tiles of (BLOCK_M, BLOCK_K)
    weight_map: tl.tensor,  # (N, K) in tiles of (BLOCK_N, BLOCK_K)
    bias_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    x_stats_ptr: tl.tensor,
    row_sums_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    m: int,
    x_stats_stride: int,
    stats_stride: int,
    eps: float,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    STAGGER: tl.constexpr,  # nanoseconds
    PDL: tl.constexpr,
) -> None:
    """A persistent kernel: each program takes every num_programs-th tile, and loads the next tile
    while it finishes the current tile."""
    wait_for_previous(PDL)
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    take_turns(tiles, STAGGER)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, column = tile_of(tile, m, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            x = x_map.load([row, k])
            weight = weight_map.load([column, k])
            acc = tl.dot(x, weight.T, acc, input_precision="ieee")
        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m < m
        mean = offs_m
        rstd = offs_m
        if NORM:
            mean, rstd = load_mean_rstd(x_stats_ptr, x_stats_stride, offs_m, mask_m, eps, K)
        PART_N: tl.constexpr = BLOCK_N // PARTS
        for number in tl.static_range(PARTS):
            part_column = column + number * PART_N
            y = epilogue(
                part_of(acc, number, PARTS, BLOCK_M, BLOCK_N),
                x_map.dtype if out_map is None else out_map.dtype,
                bias_ptr, scale_ptr, residual_ptr, None, row_sums_ptr, stats_ptr,
                stats_stride, mean, rstd, offs_m, mask_m, part_column,
                N, NORM, ACTIVATION, GATED, BLOCK_M, PART_N,
            )  # fmt: skip
            if out_map is None:
                offs_n = part_column + tl.arange(0, PART_N)
                ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
                tl.store(ptrs, y, mask=mask_m[:, None] & (offs_n < N)[None, :])
            else:
                out_map.store([row, part_column // 2 if GATED else part_column], y)


@jit(varying=("m", "depth", "x_stats_stride", "stats_stride"))
def _linear_pointer_kernel(
    out_ptr: tl.tensor,  # (M', N), or (M', N / 2) if gated
    x_ptr: tl.tensor,  # (M, K)
    weight_ptr: tl.tensor,  # (N, K)
    bias_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    rows_ptr: tl.tensor,  # (M',) int32 or None
    residual_rows_ptr: tl.tensor,  # (M',) int32 or None
    x_stats_ptr: tl.tensor,
    row_sums_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    m: int,
    depth: int,  # K again: if ptxas knew the trip count, it would unroll with 255 registers
    x_stats_stride: int,
    stats_stride: int,
    eps: float,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A program makes a tile with cp.async, if there are no tensor maps, for gathered rows, or for
    strides that tensor maps cannot describe."""
    wait_for_previous(PDL)
    row, column = tile_of(tl.program_id(0), m, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_n = column + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < m
    x_row = offs_m
    if rows_ptr is not None:
        x_row = tl.load(rows_ptr + offs_m, mask=mask_m, other=0)
    # Rows past the end read the last row instead. Their results are not stored, and loads without
    # a mask keep their width.
    safe_m = x_row if rows_ptr is not None else tl.minimum(x_row, m - 1)
    safe_n = tl.minimum(offs_n, N - 1)
    x_ptrs = x_ptr + safe_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    weight_ptrs = weight_ptr + safe_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, depth, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs + k)
            weight = tl.load(weight_ptrs + k)
        else:
            x = tl.load(x_ptrs + k, mask=offs_k[None, :] < K - k, other=0.0)
            weight = tl.load(weight_ptrs + k, mask=offs_k[None, :] < K - k, other=0.0)
        acc = tl.dot(x, weight.T, acc, input_precision="ieee")
    mean = offs_m
    rstd = offs_m
    if NORM:
        mean, rstd = load_mean_rstd(x_stats_ptr, x_stats_stride, x_row, mask_m, eps, K)
    PART_N: tl.constexpr = BLOCK_N // PARTS
    WIDTH: tl.constexpr = N // 2 if GATED else N
    OUT_N: tl.constexpr = PART_N // 2 if GATED else PART_N
    for number in tl.static_range(PARTS):
        part_column = column + number * PART_N
        y = epilogue(
            part_of(acc, number, PARTS, BLOCK_M, BLOCK_N),
            out_ptr.dtype.element_ty,
            bias_ptr, scale_ptr, residual_ptr, residual_rows_ptr, row_sums_ptr, stats_ptr,
            stats_stride, mean, rstd, offs_m, mask_m, part_column,
            N, NORM, ACTIVATION, GATED, BLOCK_M, PART_N,
        )  # fmt: skip
        column_out = (part_column // 2 if GATED else part_column) + tl.arange(0, OUT_N)
        ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * WIDTH + column_out[None, :]
        tl.store(ptrs, y, mask=mask_m[:, None] & (column_out < WIDTH)[None, :])


def linear_cost(
    *, out: Tensor, x: Tensor, weight: Tensor, residual: Tensor | None = None, **arguments: object
) -> Cost:
    """FLOPs of the output rows; of ``x`` and ``residual`` only the rows for them are read."""
    m, (n, k) = out.shape[0], weight.shape
    read = m * k * x.element_size()
    if residual is not None:
        read += m * n * residual.element_size()
    return Cost(2 * m * n * k, read + traffic(out, weight, *arguments.values()))


# -- the calls -------------------------------------------------------------------------------------


def linear_calls(
    target: Target,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    rows: Tensor | None = None,
    residual_rows: Tensor | None = None,
    x_stats: Tensor | None = None,
    row_sums: Tensor | None = None,
    stats: Tensor | None = None,
    *,
    norm_eps: float | None = None,
    activation: str | None = None,
    gated: bool = False,
    config: KernelConfig | None = None,
) -> list[Call]:
    """The launch that computes `linear_ref`. ``norm_eps`` needs ``x_stats`` and ``row_sums``.

    ``config`` replaces the configuration that the size would get. Raises ValueError for a shape,
    dtype or layout that the kernel does not take.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation: got {activation!r}, wanted one of {ACTIVATIONS}")
    n, k = weight.shape
    if gated and (scale is not None or residual is not None or n % 2):
        raise ValueError("linear: gated: wanted pairs of rows, and neither scale nor residual")
    if gated and stats is not None:
        raise ValueError("linear: gated: got stats, wanted none: no residual stream is gated")
    if norm_eps is not None and (x_stats is None or row_sums is None):
        raise ValueError("linear: norm_eps without x_stats and row_sums, wanted both")
    m = x.shape[0] if rows is None else rows.shape[0]
    width = n // 2 if gated else n
    residual_m = m if residual is None or residual_rows is None else residual.shape[0]
    for name, tensor, dtype, shape in (
        ("x", x, x.dtype, (x.shape[0], k)),
        ("weight", weight, x.dtype, (n, k)),
        ("out", out, out.dtype, (m, width)),
        ("bias", bias, torch.float32, (n,)),
        ("scale", scale, torch.float32, (n,)),
        ("residual", residual, out.dtype, (residual_m, width)),
        ("rows", rows, torch.int32, (m,)),
        ("residual_rows", residual_rows, torch.int32, (m,)),
        ("x_stats", x_stats, torch.float32, stats_shape(x.shape[0], k)),
        ("row_sums", row_sums, torch.float32, (n,)),
        ("stats", stats, torch.float32, stats_shape(m, width)),
    ):
        check_tensor(f"linear: {name}", tensor, x, dtype, shape)
    if m == 0 or n == 0:
        return []
    maps = target.tma and rows is None and residual_rows is None and fits_descriptor(out, x, weight)
    form = LinearForm(
        pointers=not maps,
        norm=norm_eps is not None,
        gated=gated,
        activation=activation,
        scale=scale is not None,
        residual=residual is not None,
        stats=stats is not None,
        out_dtype=None if out.dtype == x.dtype else out.dtype,
    )
    config = config or linear_config(target, x.dtype, m, n, k, form)
    key = linear_key(x.dtype, m, n, k, form)
    ladder = functools.partial(linear_ladder, target, x.dtype, n, k, form)
    across = cdiv(n, config.block_n)
    constants = tile_constants(target, config, n, k)
    part_columns = config.block_n // constants["PARTS"]
    shared = constants | {
        "bias_ptr": bias,
        "scale_ptr": scale,
        "residual_ptr": residual,
        "x_stats_ptr": x_stats if norm_eps is not None else None,
        "row_sums_ptr": row_sums if norm_eps is not None else None,
        "stats_ptr": stats,
        "m": m,
        "x_stats_stride": x.shape[0],
        "stats_stride": m,
        "eps": norm_eps or 0.0,
        "NORM": norm_eps is not None,
        "ACTIVATION": activation or ("silu" if gated else None),
        "GATED": gated,
    }
    if maps:
        columns = part_columns // (2 if gated else 1)
        tensor_maps = {
            "out_map": descriptor(out, config.block_m, columns) if residual is None else None,
            "out_ptr": None if residual is None else out,
            "STAGGER": config.stagger if target.pdl else 0,
            "x_map": descriptor(x, config.block_m, config.block_k),
            "weight_map": descriptor(weight, config.block_n, config.block_k),
        }
        grid = Grid(m, config.block_m, across, limit=config.ctas * target.sms)
        return [Call(_linear_tma_kernel, grid, tensor_maps | shared, config, key, m, ladder)]
    pointers = {
        "depth": k,
        "out_ptr": out,
        "x_ptr": x,
        "weight_ptr": weight,
        "rows_ptr": rows,
        "residual_rows_ptr": residual_rows,
    }
    grid = Grid(m, config.block_m, across)
    return [Call(_linear_pointer_kernel, grid, pointers | shared, config, key, m, ladder)]


LINEAR = Operator("linear", linear_ref, linear_calls, linear_cost)
