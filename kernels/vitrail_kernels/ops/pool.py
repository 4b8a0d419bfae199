"""pool: a token of each sequence -> LayerNorm -> projection -> fp32 embedding and its status

    out = norm(x)[rows] W^T + b, status = 0 if every value is finite, else 1
    FLOPs  2 B D C      bytes  B C + D C + B D      bound  by the read of W

Users get this embedding, so its error is that of fp32, whatever the mean of a row. The kernel
normalizes the rows in fp32 and gives the tensor cores each value as the sum of two values in the
compute dtype. The arithmetic doubles, but it is not the bound. `linear` subtracts mean times row
sum from the product instead, which loses digits if the mean is large.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail_kernels.configs import KernelConfig, config_key, tuned
from vitrail_kernels.cost import Cost, traffic
from vitrail_kernels.device.overlap import wait_for_previous
from vitrail_kernels.launch import Call, Grid, Target, cdiv, check_tensor, jit, tl
from vitrail_kernels.operator import Operator
from vitrail_kernels.ops.layernorm import check_rows, load_row_tile, normalize, row_config


def _as(dtype: torch.dtype, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def pool_ref(
    out: Tensor,
    status: Tensor,
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    *,
    eps: float,
) -> None:
    """Write ``out`` (B, D) fp32 and ``status`` (B,) int32 from the ``rows`` (B,) of ``x`` (M, C).

    The LayerNorm's affine part is folded into ``weight`` (D, C) and ``bias`` (D,). Without a
    projection ``gamma`` and ``beta`` (C,) fp32 are the affine part, and D = C.
    """
    if rows is not None:
        x = x.index_select(0, rows)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.layer_norm(x.to(wide), (x.shape[1],), _as(wide, gamma), _as(wide, beta), eps)
    out.copy_(y if weight is None else F.linear(y, weight.to(wide), _as(wide, bias)))
    status.copy_(torch.isfinite(out).all(dim=1).logical_not_())


@jit()
def _not_finite(y: tl.tensor) -> tl.tensor:
    """For each row of (BLOCK_M, BLOCK_N) fp32: 1 if it holds NaN or an infinity, else 0."""
    not_finite = tl.where(tl.abs(y) < float("inf"), 0, 1)  # a comparison with NaN is false
    return tl.max(not_finite, axis=1)


@jit(varying=("rows", "x_rows"))
def _pool_norm_kernel(
    out_ptr: tl.tensor,  # (B, WIDTH) fp32
    status_ptr: tl.tensor,  # (B,) int32
    x_ptr: tl.tensor,  # (M, WIDTH)
    gamma_ptr: tl.tensor,  # (WIDTH,) fp32 or None
    beta_ptr: tl.tensor,  # (WIDTH,) fp32 or None
    rows_ptr: tl.tensor,  # (B,) int32 or None
    rows: int,  # B
    x_rows: int,  # M
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
    base = out_ptr + first_row.to(tl.int64) * WIDTH
    inside = exists[:, None] & (column < WIDTH)[None, :]
    tl.store(base + offs_m[:, None] * WIDTH + column[None, :], y, mask=inside)
    tl.store(status_ptr + first_row + offs_m, _not_finite(y), mask=exists)


@jit(varying=("rows", "x_rows"))
def _pool_linear_kernel(
    out_ptr: tl.tensor,  # (B, N) fp32
    x_ptr: tl.tensor,  # (M, K)
    weight_ptr: tl.tensor,  # (N, K)
    bias_ptr: tl.tensor,  # (N,) fp32 or None
    rows_ptr: tl.tensor,  # (B,) int32 or None
    rows: int,  # B
    x_rows: int,  # M
    eps: float,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_previous(PDL)
    ACROSS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    offs_m = tl.program_id(0) // ACROSS * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % ACROSS * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < rows
    mask_n = offs_n < N
    row = offs_m
    valid = mask_m
    if rows_ptr is not None:
        row = tl.load(rows_ptr + offs_m, mask=mask_m, other=0)
        valid = mask_m & (row >= 0) & (row < x_rows)
    row_ptrs = x_ptr + row.to(tl.int64) * K

    # Statistics in one pass, about a pivot: the mean of the first columns. It is within
    # sqrt(K / BLOCK_K) deviations of the row's mean, so that little cancels. The row's mean is the
    # pivot plus a remainder that is not rounded to the pivot's scale.
    inside = (offs_k < K)[None, :]
    x = tl.load(row_ptrs[:, None] + offs_k[None, :], mask=valid[:, None] & inside, other=0.0)
    pivot = tl.sum(x.to(tl.float32), axis=1) / min(K, BLOCK_K)
    pivot = tl.where(valid, pivot, float("nan"))
    sums = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = (k + offs_k < K)[None, :]
        ptrs = row_ptrs[:, None] + (k + offs_k)[None, :]
        x = tl.load(ptrs, mask=valid[:, None] & inside, other=0.0)
        distance = tl.where(inside, x.to(tl.float32) - pivot[:, None], 0.0)
        sums += distance
        squares = tl.fma(distance, distance, squares)
    remainder = tl.sum(sums, axis=1) / K
    variance = tl.maximum(tl.fma(-remainder, remainder, tl.sum(squares, axis=1) / K), 0.0)
    rstd = tl.rsqrt(variance + eps)

    # The product
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    weights = weight_ptr + offs_n[:, None] * K + offs_k[None, :]
    for k in tl.range(0, K, BLOCK_K):
        inside = (k + offs_k < K)[None, :]
        ptrs = row_ptrs[:, None] + (k + offs_k)[None, :]
        x = tl.load(ptrs, mask=valid[:, None] & inside, other=0.0)
        weight = tl.load(weights + k, mask=mask_n[:, None] & inside, other=0.0)
        y = ((x.to(tl.float32) - pivot[:, None]) - remainder[:, None]) * rstd[:, None]
        y = tl.where(inside, y, 0.0)
        high = y.to(weight.dtype)
        acc = tl.dot(high, tl.trans(weight), acc, input_precision="ieee")
        if weight.dtype != tl.float32:
            low = (y - high.to(tl.float32)).to(weight.dtype)  # the rounding error of high
            acc = tl.dot(low, tl.trans(weight), acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(ptrs, acc, mask=mask_m[:, None] & mask_n[None, :])


@jit(varying=("rows",))
def _pool_status_kernel(
    status_ptr: tl.tensor,  # (B,) int32
    out_ptr: tl.tensor,  # (B, N) fp32
    rows: int,  # B
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_previous(PDL)
    first_row = tl.program_id(0) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    exists = offs_m < rows - first_row
    base = out_ptr + first_row.to(tl.int64) * N + offs_m[:, None] * N
    status = tl.zeros((BLOCK_M,), tl.int32)
    for start in tl.static_range(0, N, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        mask = exists[:, None] & (column < N)[None, :]
        values = tl.load(base + column[None, :], mask=mask, other=0.0)
        status = tl.maximum(status, _not_finite(values))
    tl.store(status_ptr + first_row + offs_m, status, mask=exists)


def pool_cost(*, out: Tensor, x: Tensor, weight: Tensor | None = None, **arguments: object) -> Cost:
    """FLOPs of the projection, if there is any; only the pooled rows of ``x`` are read."""
    flops = 0 if weight is None else 2 * out.shape[0] * weight.numel()
    read = out.shape[0] * x.shape[1] * x.element_size()
    return Cost(flops, read + traffic(out, weight, *arguments.values()))


# -- the calls -------------------------------------------------------------------------------------


def pool_config(target: Target, key: str, dtype: torch.dtype) -> KernelConfig:
    """The configuration of the projection; tuning may vary only ``block_n`` and ``stages``."""
    why = "64 rows make it HGMMA; narrow, so that many programs read W"
    heuristic = KernelConfig(64, 32, 64, 4, 4, reason=why)
    if dtype == torch.float32:
        heuristic = KernelConfig(64, 64, 32, 4, 2, reason="fp32, for the interpreter")
    return tuned(target.arch).get(key, heuristic)


STATUS_CONFIG = KernelConfig(4, 1024, 0, 4, 1, reason="a few KiB to read: a matter of latency")


def pool_calls(
    target: Target,
    out: Tensor,
    status: Tensor,
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    *,
    eps: float,
) -> list[Call]:
    """The launches that compute `pool_ref`: two with a ``weight``, else one.

    If ``rows`` names a row that ``x`` does not have, its embedding is NaN and its status 1.

    Raises ValueError for a shape, dtype or layout that the kernels do not take, for ``gamma`` or
    ``beta`` together with ``weight``, and for a ``bias`` without ``weight``.
    """
    batch, width = check_rows("pool", x, rows), x.shape[1]
    columns = width if weight is None else weight.shape[0]
    check_tensor("pool: out", out, x, torch.float32, (batch, columns))
    check_tensor("pool: status", status, x, torch.int32, (batch,))
    check_tensor("pool: gamma", gamma, x, torch.float32, (width,))
    check_tensor("pool: beta", beta, x, torch.float32, (width,))
    check_tensor("pool: weight", weight, x, x.dtype, (columns, width))
    check_tensor("pool: bias", bias, x, torch.float32, (columns,))
    common = {
        "out_ptr": out,
        "x_ptr": x,
        "rows_ptr": rows,
        "rows": batch,
        "x_rows": x.shape[0],
        "eps": eps,
        "PDL": target.pdl,
    }
    if weight is None and bias is None:
        key = config_key("pool", x.dtype, str(width))
        config = row_config(target, key, width)
        norm = {"status_ptr": status, "gamma_ptr": gamma, "beta_ptr": beta, "WIDTH": width}
        tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        grid = Grid(batch, config.block_m)
        return [Call(_pool_norm_kernel, grid, {**common, **norm, **tile}, config, key)]
    if weight is None or gamma is not None or beta is not None:
        optional = {"gamma": gamma, "beta": beta, "weight": weight, "bias": bias}
        names = [name for name, tensor in optional.items() if tensor is not None]
        raise ValueError(f"pool: got {names}, wanted gamma and beta, or weight and bias")
    key = config_key("pool", x.dtype, f"{columns}x{width}")
    config = pool_config(target, key, x.dtype)
    linear = {"weight_ptr": weight, "bias_ptr": bias, "N": columns, "K": width}
    tile = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.stages,
    }
    grid = Grid(batch, config.block_m, cdiv(columns, config.block_n))
    return [
        Call(_pool_linear_kernel, grid, {**common, **linear, **tile}, config, key),
        _status_call(target, status, out),
    ]


def _status_call(target: Target, status: Tensor, out: Tensor) -> Call:
    config, (batch, columns) = STATUS_CONFIG, out.shape
    arguments = {
        "status_ptr": status,
        "out_ptr": out,
        "rows": batch,
        "N": columns,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PDL": target.pdl,
    }
    return Call(_pool_status_kernel, Grid(batch, config.block_m), arguments, config)


POOL = Operator("pool", pool_ref, pool_calls, pool_cost)
