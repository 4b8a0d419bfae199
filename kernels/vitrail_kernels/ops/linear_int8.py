"""linear_int8: out = act(x_scale weight_scale (x W^T) + b), x and W in int8, one scale a row each

act    none, GELU (erf), tanh-GELU, QuickGELU, ReLU, SiLU; gated: act(gate) * up
out    the compute dtype, or int8 codes with a scale for each row and 128 columns (64 if gated)
FLOPs  2 M N K            bytes  M K + N K + M N times the size of an output
bound  by the tensor cores from a few hundred rows on, by the read of W below that

The sums of products are int32, so they are exact, in any order: |sum| <= 128 * 127 K < 2^31.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.cost import Cost, traffic
from vitrail_kernels.device.activations import ACTIVATIONS, activate_ref_
from vitrail_kernels.device.int8 import codes_of, finish, finish_halves, scale_of_halves
from vitrail_kernels.device.overlap import wait_for_previous
from vitrail_kernels.device.stagger import take_turns
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
from vitrail_kernels.ops.linear_int8_config import (
    Int8Form,
    linear_int8_config,
    linear_int8_key,
    linear_int8_ladder,
)
from vitrail_kernels.ops.norm_quant import TINY

MAX_K = 131_071
"""The most columns of int8 whose sums of products fit int32."""
OFFSET = 0.17
"""Added to the outputs of an activation that is never below -0.17, so that codes need no sign."""
UNSIGNED = ("gelu", "gelu_tanh", "quick_gelu", "relu")
"""The activations with that lower bound (tanh-GELU misses it by 4e-5)."""

ROWS_IN_CACHE = 64
"""So many rows the reference finishes at once on a CPU, so that every pass finds them in a core's
cache: 2.2 times as fast as whole passes over (1576, 3072)."""


def is_unsigned(activation: str | None, gated: bool) -> bool:
    """Whether the int8 output of `linear_int8` has codes q with value = (q + 128) scale - OFFSET;
    otherwise value = q scale."""
    return activation in UNSIGNED and not gated


def group_columns(gated: bool) -> int:
    """How many columns of an int8 output share a scale."""
    return 64 if gated else 128


def linear_int8_ref(
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
    """Write ``out`` (M, N), or (M, N / 2) if ``gated``, from ``x`` (M, K) and ``weight`` (N, K).

    ``x`` and ``weight`` are int8. ``x_scale`` (M,), ``weight_scale`` (N,) and ``bias`` (N,) are
    fp32. If ``gated``, rows of gate and up alternate in ``weight``. If ``out`` is int8, values are
    first rounded to fp16, and ``out_scale`` (groups, M) fp32 receives a scale for each row and
    `group_columns`; `is_unsigned` says how codes stand for values. A row whose values are not
    finite has scales that are NaN.
    """
    sums = int8_product(x, weight)
    count = ROWS_IN_CACHE if sums.device.type == "cpu" else max(1, len(sums))
    for start in range(0, len(sums), count):
        rows = slice(start, start + count)
        y = sums[rows].float().mul_(x_scale[rows, None]).mul_(weight_scale).add_(bias)
        scales = None if out_scale is None else out_scale[:, rows]
        _finish(out[rows], scales, y, activation, gated)


def _finish(
    out: Tensor, out_scale: Tensor | None, y: Tensor, activation: str | None, gated: bool
) -> None:
    """Write the activation of ``y``, or its codes and scales."""
    if gated:
        y = _activate(y[:, 0::2], activation or "silu").mul_(y[:, 1::2])
    elif activation is not None:
        y = _activate(y, activation)
    if out_scale is None:
        out.copy_(y)
        return
    columns = group_columns(gated)
    y = y.half().float().reshape(y.shape[0], -1, columns)
    if is_unsigned(activation, gated):
        top = y.amax(dim=2).add_(OFFSET).clamp_(min=TINY)
        codes = (y + OFFSET).mul_((255 / top)[..., None]).sub_(128)
        scale = top / 255
    else:
        top = torch.maximum(y.amax(dim=2), -y.amin(dim=2)).clamp_(min=TINY)
        codes = y * (127 / top)[..., None]
        scale = top / 127
    out_scale.copy_(scale.add_(y.sum(dim=2).mul_(0)).t())
    out.copy_(codes.clamp_(-128, 127).round_().nan_to_num_(0).view(out.shape))


def _activate(y: Tensor, activation: str) -> Tensor:
    """The activation of ``y``, such that a row's bits do not depend on the number of rows.

    On a CPU, PyTorch computes the last elements of a loop by another exp or erf than the vectors
    before them. A loop here is one row: rows are not adjacent in memory, and from 32,768 elements
    on threads would share them.
    """
    if y.device.type != "cpu":
        return activate_ref_(y.contiguous(), activation)
    rows, columns = y.shape
    apart = torch.empty(rows, columns + 1, dtype=y.dtype)[:, :columns].copy_(y)
    for few in torch.split(apart, max(1, 32767 // columns)):
        activate_ref_(few, activation)
    return apart


@jit(varying=("m", "scale_stride"))
def _linear_int8_tma_kernel(
    out_map: tl.tensor,  # (M, N) in halves of tiles, half as wide if gated
    out_scale_ptr: tl.tensor,  # (groups, M) fp32, or None if the output is not int8
    x_map: tl.tensor,  # (M, K) int8 in tiles of (BLOCK_M, BLOCK_K)
    x_scale_ptr: tl.tensor,  # (M,) fp32
    weight_map: tl.tensor,  # (N, K) int8 in tiles of (BLOCK_N, BLOCK_K)
    weight_scale_ptr: tl.tensor,  # (N,) fp32
    bias_ptr: tl.tensor,  # (N,) fp32
    m: int,
    scale_stride: int,  # from one group of out_scale to the next
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    OFFSET: tl.constexpr,  # None: codes have a sign
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    STAGGER: tl.constexpr,  # nanoseconds
    PDL: tl.constexpr,
) -> None:
    """A persistent kernel, as `_linear_tma_kernel`."""
    wait_for_previous(PDL)
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    take_turns(tiles, STAGGER)
    PART_N: tl.constexpr = BLOCK_N // PARTS
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, column = tile_of(tile, m, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for k in tl.range(0, K, BLOCK_K):
            x = x_map.load([row, k])
            weight = weight_map.load([column, k])
            acc = tl.dot(x, weight.T, acc, out_dtype=tl.int32)
        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m < m
        x_scale = tl.load(x_scale_ptr + offs_m, mask=mask_m, other=0.0)
        column_out = column // 2 if GATED else column
        OUT_N: tl.constexpr = PART_N // 2 if GATED else PART_N
        if out_scale_ptr is None:
            for number in tl.static_range(PARTS):
                y = finish(
                    part_of(acc, number, PARTS, BLOCK_M, BLOCK_N),
                    x_scale, weight_scale_ptr, bias_ptr, column + number * PART_N,
                    N, ACTIVATION, GATED, BLOCK_M, PART_N,
                )  # fmt: skip
                out_map.store([row, column_out + number * OUT_N], y.to(out_map.dtype))
        else:
            left, right = finish_halves(
                acc, x_scale, weight_scale_ptr, bias_ptr, column,
                N, ACTIVATION, GATED, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            scale, inverse = scale_of_halves(left, right, OFFSET)
            group = (column // BLOCK_N).to(tl.int64)
            tl.store(out_scale_ptr + group * scale_stride + offs_m, scale, mask=mask_m)
            out_map.store([row, column_out], codes_of(left, inverse, OFFSET))
            out_map.store([row, column_out + OUT_N], codes_of(right, inverse, OFFSET))


@jit(varying=("m", "depth", "scale_stride"))
def _linear_int8_pointer_kernel(
    out_ptr: tl.tensor,  # (M, N), or (M, N / 2) if gated
    out_scale_ptr: tl.tensor,  # (groups, M) fp32, or None if the output is not int8
    x_ptr: tl.tensor,  # (M, K) int8
    x_scale_ptr: tl.tensor,  # (M,) fp32
    weight_ptr: tl.tensor,  # (N, K) int8
    weight_scale_ptr: tl.tensor,  # (N,) fp32
    bias_ptr: tl.tensor,  # (N,) fp32
    m: int,
    depth: int,  # K again, as in `_linear_pointer_kernel`
    scale_stride: int,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    OFFSET: tl.constexpr,
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
    offs_n = column + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < m
    # rows past the end read the last row instead, as in `_linear_pointer_kernel`
    safe_m = tl.minimum(offs_m, m - 1)
    safe_n = tl.minimum(offs_n, N - 1)
    x_ptrs = x_ptr + safe_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    weight_ptrs = weight_ptr + safe_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in tl.range(0, depth, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs + k)
            weight = tl.load(weight_ptrs + k)
        else:
            x = tl.load(x_ptrs + k, mask=offs_k[None, :] < K - k, other=0)
            weight = tl.load(weight_ptrs + k, mask=offs_k[None, :] < K - k, other=0)
        acc = tl.dot(x, weight.T, acc, out_dtype=tl.int32)
    x_scale = tl.load(x_scale_ptr + offs_m, mask=mask_m, other=0.0)
    PART_N: tl.constexpr = BLOCK_N // PARTS
    WIDTH: tl.constexpr = N // 2 if GATED else N
    OUT_N: tl.constexpr = PART_N // 2 if GATED else PART_N
    column_out = (column // 2 if GATED else column) + tl.arange(0, OUT_N)
    ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * WIDTH + column_out[None, :]
    if out_scale_ptr is None:
        for number in tl.static_range(PARTS):
            y = finish(
                part_of(acc, number, PARTS, BLOCK_M, BLOCK_N),
                x_scale, weight_scale_ptr, bias_ptr, column + number * PART_N,
                N, ACTIVATION, GATED, BLOCK_M, PART_N,
            )  # fmt: skip
            inside = mask_m[:, None] & (column_out + number * OUT_N < WIDTH)[None, :]
            tl.store(ptrs + number * OUT_N, y.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        left, right = finish_halves(
            acc, x_scale, weight_scale_ptr, bias_ptr, column,
            N, ACTIVATION, GATED, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        scale, inverse = scale_of_halves(left, right, OFFSET)
        group = (column // BLOCK_N).to(tl.int64)
        tl.store(out_scale_ptr + group * scale_stride + offs_m, scale, mask=mask_m)
        tl.store(ptrs, codes_of(left, inverse, OFFSET), mask=mask_m[:, None])
        tl.store(ptrs + OUT_N, codes_of(right, inverse, OFFSET), mask=mask_m[:, None])


def linear_int8_cost(*, out: Tensor, weight: Tensor, **arguments: object) -> Cost:
    """FLOPs of the output rows; every tensor is read or written once."""
    return Cost(2 * out.shape[0] * weight.numel(), traffic(out, weight, *arguments.values()))


# -- the calls -------------------------------------------------------------------------------------


def linear_int8_calls(
    target: Target,
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
    config: KernelConfig | None = None,
) -> list[Call]:
    """The launch of `linear_int8_ref`.

    ``config`` replaces the configuration that the size would get. Raises ValueError for a shape,
    dtype or layout that the kernel does not take; an int8 ``out`` must have whole groups.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"linear_int8: activation: got {activation!r}, wanted one of {ACTIVATIONS}"
        )
    check_product("linear_int8", x, weight)
    (m, k), n = x.shape, weight.shape[0]
    if gated and n % 2:
        raise ValueError(f"linear_int8: gated: got {n} rows of weight, wanted pairs")
    width, columns, codes = n // 2 if gated else n, group_columns(gated), out_scale is not None
    if codes and width % columns:
        raise ValueError(f"linear_int8: out_scale: got {width} columns, wanted groups of {columns}")
    if not codes and out.dtype not in FLOATS:
        raise ValueError(f"linear_int8: out: got {out.dtype} without out_scale, wanted {FLOATS}")
    for name, tensor, dtype, shape in (
        ("x", x, torch.int8, (m, k)),
        ("x_scale", x_scale, torch.float32, (m,)),
        ("weight", weight, torch.int8, (n, k)),
        ("weight_scale", weight_scale, torch.float32, (n,)),
        ("bias", bias, torch.float32, (n,)),
        ("out", out, torch.int8 if codes else out.dtype, (m, width)),
        ("out_scale", out_scale, torch.float32, (width // columns, m)),
    ):
        check_tensor(f"linear_int8: {name}", tensor, x, dtype, shape)
    if m == 0 or n == 0:
        return []
    maps = target.tma and fits_descriptor(out, x, weight)
    form = Int8Form(pointers=not maps, gated=gated, activation=activation, codes=codes)
    config = config or linear_int8_config(target, out.dtype, m, n, k, form)
    if codes:  # a tile makes the whole groups of its rows, and no other group
        config = replace(config, block_n=128)
    key = linear_int8_key(out.dtype, m, n, k, form)
    ladder = functools.partial(linear_int8_ladder, target, out.dtype, n, k, form)
    across = cdiv(n, config.block_n)
    constants = tile_constants(target, config, n, k)
    part_columns = config.block_n // constants["PARTS"]
    shared = constants | {
        "out_scale_ptr": out_scale,
        "x_scale_ptr": x_scale,
        "weight_scale_ptr": weight_scale,
        "bias_ptr": bias,
        "m": m,
        "scale_stride": m,
        "ACTIVATION": activation or ("silu" if gated else None),
        "GATED": gated,
        "OFFSET": OFFSET if is_unsigned(activation, gated) else None,
    }
    if maps:
        tensor_maps = {
            "out_map": descriptor(out, config.block_m, part_columns // (1 + gated)),
            "x_map": descriptor(x, config.block_m, config.block_k),
            "weight_map": descriptor(weight, config.block_n, config.block_k),
            "STAGGER": config.stagger if target.pdl else 0,
        }
        grid = Grid(m, config.block_m, across, limit=config.ctas * target.sms)
        return [Call(_linear_int8_tma_kernel, grid, tensor_maps | shared, config, key, m, ladder)]
    pointers = {"depth": k, "out_ptr": out, "x_ptr": x, "weight_ptr": weight}
    grid = Grid(m, config.block_m, across)
    return [Call(_linear_int8_pointer_kernel, grid, pointers | shared, config, key, m, ladder)]


def check_product(op: str, x: Tensor, weight: Tensor) -> None:
    """Raises ValueError unless ``x`` (M, K) and ``weight`` (N, K) are matrices whose sums of
    products fit int32."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        shapes = tuple(x.shape), tuple(weight.shape)
        raise ValueError(f"{op}: x, weight: got shapes {shapes}, wanted (M, K) and (N, K)")
    if not 1 <= x.shape[1] <= MAX_K:
        raise ValueError(f"{op}: x: got {x.shape[1]} columns, wanted 1 to {MAX_K}")


LINEAR_INT8 = Operator("linear_int8", linear_int8_ref, linear_int8_calls, linear_int8_cost)
