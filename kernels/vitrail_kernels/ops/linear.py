"""linear: out = residual + scale * act(norm(x)[rows] W^T + b)

norm   LayerNorm without affine part, gamma and beta being folded into W and b
act    none, GELU (erf), tanh-GELU, QuickGELU, ReLU, SiLU, tanh; gated: act(gate) * up
FLOPs  2 M N K            bytes  M K + N K + M N (+ M N residual), in the compute dtype
bound  by the tensor cores once M passes a few hundred rows, by the read of W below that

LayerNorm costs the kernel no pass over x: norm(x) W^T = r (x W^T - m s), r and m from the row
statistics of x, s the row sums of the rounded W. Centring W instead of keeping m s was tried: 4e-3
of error where the mean is 20 times the deviation, against 2e-4.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail_kernels.configs import KernelConfig, Ladder, ladder_of, tuned
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
    launch,
    target_of,
    tl,
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
    """Write ``out`` (M', N), in its dtype; ``gated``: (M', N / 2).

    ``x`` (M, K); ``weight`` (N, K), with gate and up rows interleaved pairwise where ``gated``;
    ``bias`` and ``scale`` (N,) fp32; ``residual`` (M, N), may be ``out`` itself; ``rows`` (M',)
    picks rows of ``x``, ``residual_rows`` (M',) of ``residual``. ``norm_eps``: normalise each row
    of ``x`` first (biased variance, fp32); ``x_stats`` (2 chunks, M) and ``row_sums`` (N,), both
    fp32, are what the kernel needs for it, and are not looked at here. ``stats`` (2 chunks, M'):
    where the row statistics of ``out`` go.
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
    plain = scale is None and activation is None and not gated
    if residual is not None and plain and out.dtype == x.dtype == torch.float32:
        # no temporary, and the same order of additions whether out is the residual or not;
        # 16-bit sums take the way below, which rounds once less
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
    out_map: tl.tensor,  # (M, N) in tiles of (BLOCK_M, BLOCK_N), halved across where gated, or None
    out_ptr: tl.tensor,  # (M, N) where out_map is None
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
    """Persistent: each program takes every num_programs-th tile, and the loads of the next tile
    are under way while this one is finished."""
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
        for part in tl.static_range(PARTS):
            across = column + part * PART_N
            y = epilogue(
                part_of(acc, part, PARTS, BLOCK_M, BLOCK_N),
                x_map.dtype if out_map is None else out_map.dtype,
                bias_ptr,
                scale_ptr,
                residual_ptr,
                None,
                row_sums_ptr,
                stats_ptr,
                stats_stride,
                mean,
                rstd,
                offs_m,
                mask_m,
                across,
                N,
                NORM,
                ACTIVATION,
                GATED,
                BLOCK_M,
                PART_N,
            )
            if out_map is None:
                offs_n = across + tl.arange(0, PART_N)
                at = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
                tl.store(at, y, mask=mask_m[:, None] & (offs_n < N)[None, :])
            else:
                out_map.store([row, across // 2 if GATED else across], y)


@jit(varying=("m", "depth", "x_stats_stride", "stats_stride"))
def _linear_pointer_kernel(
    out_ptr: tl.tensor,  # (M', N), or (M', N / 2) where gated
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
    depth: int,  # K again: a trip count that ptxas knows makes it unroll all, with 255 registers
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
    """A tile a program, by cp.async: for GPUs without tensor maps, gathered rows, odd strides."""
    wait_for_previous(PDL)
    row, column = tile_of(tl.program_id(0), m, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_n = column + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < m
    source = offs_m
    if rows_ptr is not None:
        source = tl.load(rows_ptr + offs_m, mask=mask_m, other=0)
    # rows past the end read the last one instead: what they give is not stored, and loads without
    # a mask keep their width
    safe_m = source if rows_ptr is not None else tl.minimum(source, m - 1)
    safe_n = tl.minimum(offs_n, N - 1)
    x_at = x_ptr + safe_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    weight_at = weight_ptr + safe_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, depth, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_at + k)
            weight = tl.load(weight_at + k)
        else:
            x = tl.load(x_at + k, mask=offs_k[None, :] < K - k, other=0.0)
            weight = tl.load(weight_at + k, mask=offs_k[None, :] < K - k, other=0.0)
        acc = tl.dot(x, weight.T, acc, input_precision="ieee")
    mean = offs_m
    rstd = offs_m
    if NORM:
        mean, rstd = load_mean_rstd(x_stats_ptr, x_stats_stride, source, mask_m, eps, K)
    PART_N: tl.constexpr = BLOCK_N // PARTS
    WIDTH: tl.constexpr = N // 2 if GATED else N
    OUT_N: tl.constexpr = PART_N // 2 if GATED else PART_N
    for part in tl.static_range(PARTS):
        first = column + part * PART_N
        y = epilogue(
            part_of(acc, part, PARTS, BLOCK_M, BLOCK_N),
            out_ptr.dtype.element_ty,
            bias_ptr,
            scale_ptr,
            residual_ptr,
            residual_rows_ptr,
            row_sums_ptr,
            stats_ptr,
            stats_stride,
            mean,
            rstd,
            offs_m,
            mask_m,
            first,
            N,
            NORM,
            ACTIVATION,
            GATED,
            BLOCK_M,
            PART_N,
        )
        across = (first // 2 if GATED else first) + tl.arange(0, OUT_N)
        at = out_ptr + offs_m.to(tl.int64)[:, None] * WIDTH + across[None, :]
        tl.store(at, y, mask=mask_m[:, None] & (across < WIDTH)[None, :])


def linear_cost(
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
    **_: object,
) -> Cost:
    """FLOPs of the rows computed; a gathered operand is read at those rows only."""
    m, (n, k) = out.shape[0], weight.shape
    gathered = m * k * x.element_size()
    skipped = 0 if residual is None else m * n * residual.element_size()
    return Cost(
        2 * m * n * k,
        gathered
        + skipped
        + traffic(out, weight, bias, scale, rows, residual_rows, x_stats, row_sums, stats),
    )


# -- the launcher ----------------------------------------------------------------------------------


ROWS = (64, 256, 1024, 4096, 16384, 65536, 1 << 31)
"""A tuned entry holds for calls of up to this many rows, and more than the one before."""


def linear_key(dtype: torch.dtype, m: int, n: int, k: int, form: str) -> str:
    """The key of a tuned configuration. ``form``: all else that makes another kernel of it."""
    rows = next(rows for rows in ROWS if m <= rows)
    return f"linear|{str(dtype).removeprefix('torch.')}|{rows}x{n}x{k} {form}".rstrip()


def linear_config(
    target: Target, dtype: torch.dtype, m: int, n: int, k: int, form: str
) -> KernelConfig:
    """The configuration for (m, k) by (n, k): the tuned one where there is one, else by reasons.

    ``form``: words for what else the kernel does, "residual" among them where there is one. All
    configurations of an architecture and dtype give the same bits: the same MMA family (64 rows or
    more make it HGMMA on sm_90), K in the same order, statistics by the same chunks.
    """
    found = tuned(target.arch).get(linear_key(dtype, m, n, k, form))
    if found is not None:
        return found
    if dtype == torch.float32:
        return KernelConfig(64, 64, 32, 4, 2, reason="fp32: for the interpreter alone")
    if cdiv(m, 128) * cdiv(n, 128) >= target.sms:
        return _large(target, m, n, k, form.split())
    return _small(target, m, n)


def _small(target: Target, m: int, n: int) -> KernelConfig:
    wide = 64 if cdiv(m, 64) * cdiv(n, 128) < target.sms else 128
    reason = "few rows: smaller tiles, so that every SM has one"
    if target.arch == 90:
        stages = 6 if wide == 64 else 4
        reason += "; nothing hides the latency of loads but loads: 96 KiB in flight, two blocks"
        return KernelConfig(64, wide, 64, 4, stages, ctas=2, reason=reason)
    stages = 2 if target.tcgen05 else 3  # there the third made ptxas spill a gated tile
    return KernelConfig(64, wide, 64, 4, stages, reason=reason)


LONG = 2048
"""Steps of K that outweigh a tile's epilogue."""


def _large(target: Target, m: int, n: int, k: int, words: list[str]) -> KernelConfig:
    residual = "residual" in words
    if not target.tma:
        return KernelConfig(
            128, 128, 32, 4, 4, ctas=2, reason="four steps of K in flight, two blocks an SM"
        )
    if target.arch >= 120:
        return KernelConfig(
            128, 64, 64, 4, 2, ctas=2, reason="99 KiB of shared memory; wider, wide rows spill"
        )
    if target.tcgen05 and residual:
        return KernelConfig(128, 128, 64, 8, 3, reason="128 registers spill beside a column scale")
    short = {"pointers", "norm", "stats"}.issuperset(words)
    wide = cdiv(m, 128) * cdiv(n, 256) >= 2 * target.sms and "gated" not in words
    if target.arch == 90 and wide and (k >= LONG or short):
        return KernelConfig(
            128, 256, 64, 8, 4, reason="a quarter less traffic from L2, which bounds 128 x 128, "
            "for an epilogue that nothing hides but the next tile's loads"
        )  # fmt: skip
    stagger = 0
    if target.arch == 90 and not short:  # with a short epilogue these tiles are too few for turns
        # half a tile: 32 KiB a step at 36 bytes a clock, an epilogue of 3,000 clocks, of 1.7 GHz
        stagger = round((cdiv(k, 64) * 910 + 3000) / 2 / 1.7)
    gated = target.tcgen05 and "gated" in words  # which takes 74 registers, but spills at 128
    return KernelConfig(
        128, 128, 64, 8, 3, None if gated else 128, 2, stagger=stagger,
        reason="two blocks an SM overlap epilogues",
    )  # fmt: skip


def linear_ladder(target: Target, dtype: torch.dtype, n: int, k: int, form: str) -> Ladder:
    """`linear_config` for every m."""
    # as many rows as leave a multiprocessor without a tile, or without a second wide one
    few = (block_m * ((target.sms - 1) // cdiv(n, 128)) for block_m in (64, 128))
    heuristic = (*few, 128 * ((2 * target.sms - 1) // cdiv(n, 256)))
    return ladder_of((*ROWS, *heuristic), lambda m: linear_config(target, dtype, m, n, k, form))


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
    """The launch of `linear_ref`'s product; with ``norm_eps``, ``x_stats`` and ``row_sums`` count.

    ``config`` takes the place of the one that the size would get. Raises ValueError for a shape,
    dtype or layout that the kernel does not take.
    """
    n, k = weight.shape
    m = x.shape[0] if rows is None else rows.shape[0]
    width = n // 2 if gated else n
    _check(
        out, x, weight, bias, scale, residual, rows, residual_rows, (m, width), gated, activation
    )
    if gated and stats is not None:
        raise ValueError("linear: gated: got stats, wanted none: no residual stream is gated")
    if norm_eps is not None and (x_stats is None or row_sums is None):
        raise ValueError("linear: norm_eps without x_stats and row_sums, wanted both")
    for name, given, shape in (
        ("x_stats", x_stats, stats_shape(x.shape[0], k)),
        ("row_sums", row_sums, (n,)),
        ("stats", stats, stats_shape(m, width)),
    ):
        check_tensor(f"linear: {name}", given, x, torch.float32, shape)
    if m == 0 or n == 0:
        return []
    maps = target.tma and rows is None and residual_rows is None and fits_descriptor(out, x, weight)
    words = {
        "pointers": not maps,
        "norm": norm_eps is not None,
        "gated": gated,
        activation or "": activation is not None,
        "scale": scale is not None,
        "residual": residual is not None,
        "stats": stats is not None,
        f"to {str(out.dtype).removeprefix('torch.')}": out.dtype != x.dtype,
    }
    form = " ".join(word for word, there in words.items() if there)
    config = config or linear_config(target, x.dtype, m, n, k, form)
    ladder = functools.partial(linear_ladder, target, x.dtype, n, k, form)
    across = cdiv(n, config.block_n)
    parts = 2 if config.block_n >= 128 else 1
    shared = {
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
        "N": n,
        "K": k,
        "NORM": norm_eps is not None,
        "ACTIVATION": activation or ("silu" if gated else None),
        "GATED": gated,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "PARTS": parts,
        "PDL": target.pdl,
    }
    if maps:
        columns = config.block_n // parts // (2 if gated else 1)
        described = {
            "out_map": descriptor(out, config.block_m, columns) if residual is None else None,
            "out_ptr": None if residual is None else out,
            "STAGGER": config.stagger if target.pdl else 0,
            "x_map": descriptor(x, config.block_m, config.block_k),
            "weight_map": descriptor(weight, config.block_n, config.block_k),
        }
        grid = Grid(m, config.block_m, across, limit=config.ctas * target.sms)
        return [Call(_linear_tma_kernel, grid, described | shared, config, m, ladder)]
    pointers = {
        "depth": k,
        "out_ptr": out,
        "x_ptr": x,
        "weight_ptr": weight,
        "rows_ptr": rows,
        "residual_rows_ptr": residual_rows,
    }
    grid = Grid(m, config.block_m, across)
    return [Call(_linear_pointer_kernel, grid, pointers | shared, config, m, ladder)]


def _check(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    rows: Tensor | None,
    residual_rows: Tensor | None,
    shape: tuple[int, int],
    gated: bool,
    activation: str | None,
) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation: got {activation!r}, wanted one of {ACTIVATIONS}")
    if gated and (scale is not None or residual is not None or weight.shape[0] % 2):
        raise ValueError("linear: gated: wanted pairs of rows, and neither scale nor residual")
    n, (m, width) = weight.shape[0], shape
    check_tensor("linear: x", x, x, x.dtype, (x.shape[0], weight.shape[1]))
    check_tensor("linear: weight", weight, x, x.dtype, tuple(weight.shape))
    check_tensor("linear: out", out, x, out.dtype, shape)
    check_tensor("linear: bias", bias, x, torch.float32, (n,))
    check_tensor("linear: scale", scale, x, torch.float32, (n,))
    left = m if residual is None or residual_rows is None else residual.shape[0]
    check_tensor("linear: residual", residual, x, out.dtype, (left, width))
    check_tensor("linear: rows", rows, x, torch.int32, (m,))
    check_tensor("linear: residual_rows", residual_rows, x, torch.int32, (m,))


def linear(
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
    """As `linear_ref`, by the kernel. Raises ValueError as `linear_calls` does."""
    launch(
        linear_calls(
            target_of(out),
            out,
            x,
            weight,
            bias,
            scale,
            residual,
            rows,
            residual_rows,
            x_stats,
            row_sums,
            stats,
            norm_eps=norm_eps,
            activation=activation,
            gated=gated,
        )
    )
