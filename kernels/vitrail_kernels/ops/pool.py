"""pool: one token a sequence -> LayerNorm -> projection -> fp32 embedding, and is it finite

    out = norm(x)[rows] W^T + b, status = 0 where every value is finite, else 1
    FLOPs  2 B D C      bytes  B C + D C + B D      bound  by the read of W

The kernel normalises the rows itself, in fp32, and hands the tensor cores each value as the sum of
two in the compute dtype, so that the embedding has the error of fp32 whatever the rows' mean: it is
what users hold. That doubles arithmetic that is not the bound. The form of `linear`, which
subtracts mean times row sum from the product, loses digits where the mean is large.
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
from vitrail_kernels.ops.layernorm import (
    check_rows,
    config_of,
    load_row_tile,
    normalise,
    row_config,
)


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
    """Write ``out`` (B, D) fp32, ``status`` (B,) int32 from ``rows`` (B,) of ``x`` (M, C).

    With ``weight`` (D, C) and ``bias`` (D,): the LayerNorm's affine part is folded into them.
    Without: ``gamma`` and ``beta`` (C,) fp32 are the LayerNorm's own, and D = C.
    """
    if rows is not None:
        x = x.index_select(0, rows)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.layer_norm(x.to(wide), (x.shape[1],), _as(wide, gamma), _as(wide, beta), eps)
    out.copy_(y if weight is None else F.linear(y, weight.to(wide), _as(wide, bias)))
    status.copy_(torch.isfinite(out).all(dim=1).logical_not_())


@jit()
def _not_finite(y: tl.tensor) -> tl.tensor:
    """1 for each row of (BLOCK_M, BLOCK_N) fp32 that holds NaN or an infinity, else 0."""
    bad = tl.where(tl.abs(y) < float("inf"), 0, 1)  # no comparison with NaN holds
    return tl.max(bad, axis=1)


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
    first = tl.program_id(0) * BLOCK_M
    part = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    exists = part < rows - first
    x = load_row_tile(x_ptr, rows_ptr, first, rows, x_rows, WIDTH, BLOCK_M, BLOCK_N)
    y = normalise(x, gamma_ptr, beta_ptr, eps, WIDTH, BLOCK_N)
    base = out_ptr + first.to(tl.int64) * WIDTH
    inside = exists[:, None] & (column < WIDTH)[None, :]
    tl.store(base + part[:, None] * WIDTH + column[None, :], y, mask=inside)
    tl.store(status_ptr + first + part, _not_finite(y), mask=exists)


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
    known = mask_m
    if rows_ptr is not None:
        row = tl.load(rows_ptr + offs_m, mask=mask_m, other=0)
        known = mask_m & (row >= 0) & (row < x_rows)
    source = x_ptr + row.to(tl.int64) * K

    # Statistics in one pass, about a pivot: the mean of the first columns is within
    # sqrt(K / BLOCK_K) deviations of the row's, so that nothing worth keeping cancels, and the
    # row's mean is the pivot plus a remainder that needs no rounding to the pivot's scale.
    inside = (offs_k < K)[None, :]
    x = tl.load(source[:, None] + offs_k[None, :], mask=known[:, None] & inside, other=0.0)
    pivot = tl.sum(x.to(tl.float32), axis=1) / min(K, BLOCK_K)
    pivot = tl.where(known, pivot, float("nan"))
    sums = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = (k + offs_k < K)[None, :]
        at = source[:, None] + (k + offs_k)[None, :]
        x = tl.load(at, mask=known[:, None] & inside, other=0.0)
        apart = tl.where(inside, x.to(tl.float32) - pivot[:, None], 0.0)
        sums += apart
        squares = tl.fma(apart, apart, squares)
    rest = tl.sum(sums, axis=1) / K
    variance = tl.maximum(tl.fma(-rest, rest, tl.sum(squares, axis=1) / K), 0.0)
    rstd = tl.rsqrt(variance + eps)

    # The product
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    weights = weight_ptr + offs_n[:, None] * K + offs_k[None, :]
    for k in tl.range(0, K, BLOCK_K):
        inside = (k + offs_k < K)[None, :]
        at = source[:, None] + (k + offs_k)[None, :]
        x = tl.load(at, mask=known[:, None] & inside, other=0.0)
        weight = tl.load(weights + k, mask=mask_n[:, None] & inside, other=0.0)
        y = ((x.to(tl.float32) - pivot[:, None]) - rest[:, None]) * rstd[:, None]
        y = tl.where(inside, y, 0.0)
        high = y.to(weight.dtype)
        acc = tl.dot(high, tl.trans(weight), acc, input_precision="ieee")
        if weight.dtype != tl.float32:
            low = (y - high.to(tl.float32)).to(weight.dtype)  # what the rounding left of y
            acc = tl.dot(low, tl.trans(weight), acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    at = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(at, acc, mask=mask_m[:, None] & mask_n[None, :])


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
    first = tl.program_id(0) * BLOCK_M
    part = tl.arange(0, BLOCK_M)
    exists = part < rows - first
    base = out_ptr + first.to(tl.int64) * N + part[:, None] * N
    bad = tl.zeros((BLOCK_M,), tl.int32)
    for start in tl.static_range(0, N, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        mask = exists[:, None] & (column < N)[None, :]
        bad = tl.maximum(bad, _not_finite(tl.load(base + column[None, :], mask=mask, other=0.0)))
    tl.store(status_ptr + first + part, bad, mask=exists)


def pool_cost(
    out: Tensor,
    status: Tensor,
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    **_: object,
) -> Cost:
    """FLOPs of the projection, where there is one."""
    batch, width = out.shape[0], x.shape[1]
    flops = 0 if weight is None else 2 * batch * weight.numel()
    read = batch * width * x.element_size()
    return Cost(flops, read + traffic(out, status, gamma, beta, weight, bias, rows))


def pool_config(target: Target, dtype: torch.dtype, n: int, k: int) -> KernelConfig:
    """The projection's tiles; tuning may vary ``block_n`` and ``stages``, no more."""
    if dtype == torch.float32:
        heuristic = KernelConfig(64, 64, 32, 4, 2, reason="fp32, for the interpreter")
    else:
        heuristic = KernelConfig(
            64, 32, 64, 4, 4, reason="64 rows make it HGMMA; narrow, so that many programs read W"
        )
    return config_of("pool", target, dtype, f"{n}x{k}", heuristic)


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
    """The launches of `pool_ref`: one, or with a ``weight`` two. A row that ``x`` does not have
    comes out as NaN, with status 1.

    Raises ValueError for a shape, dtype or layout that the kernels do not take, for ``gamma`` or
    ``beta`` beside ``weight``, and for a ``bias`` without it.
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
        config = row_config("pool", target, x.dtype, width)
        norm = {"status_ptr": status, "gamma_ptr": gamma, "beta_ptr": beta, "WIDTH": width}
        tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        grid = Grid(batch, config.block_m)
        return [Call(_pool_norm_kernel, grid, {**common, **norm, **tile}, config)]
    if weight is None or gamma is not None or beta is not None:
        given = {"gamma": gamma, "beta": beta, "weight": weight, "bias": bias}
        names = [name for name, tensor in given.items() if tensor is not None]
        raise ValueError(f"pool: got {names}, wanted gamma and beta, or weight and bias")
    config = pool_config(target, x.dtype, columns, width)
    linear = {"weight_ptr": weight, "bias_ptr": bias, "N": columns, "K": width}
    tile = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.stages,
    }
    grid = Grid(batch, config.block_m, cdiv(columns, config.block_n))
    return [
        Call(_pool_linear_kernel, grid, {**common, **linear, **tile}, config),
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


def pool(
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
    """`pool_ref` by the kernels, for the same tensors; see `pool_calls` for the errors."""
    calls = pool_calls(target_of(out), out, status, x, gamma, beta, weight, bias, rows, eps=eps)
    launch(calls)
