"""text_embed: out[i] = token[ids[i]] + position[positions[i]]

FLOPs  none counted       bytes  3 M C       bound  by memory
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.cost import Cost, traffic
from vitrail_kernels.device.overlap import wait_for_previous
from vitrail_kernels.device.stats import CHUNK, stats_ref, stats_shape, store_stats
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
from vitrail_kernels.ops.layernorm import FLOATS, config_of


def text_embed_ref(
    out: Tensor,
    ids: Tensor,
    positions: Tensor,
    token: Tensor,
    position: Tensor,
    stats: Tensor | None = None,
) -> None:
    """Write ``out`` (M, C); ``ids``, ``positions`` (M,), ``token`` (V, C), ``position`` (T, C).

    ``stats`` (2 chunks, M) fp32: where the row statistics of ``out`` go.
    """
    place = position.index_select(0, positions)
    word = token.index_select(0, ids)
    if out.dtype == word.dtype == place.dtype:
        torch.add(word, place, out=out)
    else:
        out.copy_(word + place)
    if stats is not None:
        stats_ref(stats, out)


@jit(varying=("tokens", "vocabulary", "places", "stats_stride"))
def _text_embed_kernel(
    out_ptr: tl.tensor,  # (M, WIDTH)
    stats_ptr: tl.tensor,  # (2 chunks, M) fp32 or None
    ids_ptr: tl.tensor,  # (M,) int32
    positions_ptr: tl.tensor,  # (M,) int32
    token_ptr: tl.tensor,  # (vocabulary, WIDTH)
    position_ptr: tl.tensor,  # (places, WIDTH) fp32
    tokens: int,  # M
    vocabulary: int,
    places: int,
    stats_stride: int,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """BLOCK_N columns of BLOCK_M tokens: no value needs another of its row."""
    wait_for_previous(PDL)
    ACROSS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    first = tl.program_id(0) // ACROSS * BLOCK_M
    start = tl.program_id(0) % ACROSS * BLOCK_N
    part = tl.arange(0, BLOCK_M)
    column = start + tl.arange(0, BLOCK_N)
    exists = part < tokens - first
    inside = exists[:, None] & (column < WIDTH)[None, :]
    ids = tl.load(ids_ptr + first + part, mask=exists, other=0)
    at = tl.load(positions_ptr + first + part, mask=exists, other=0)
    known = (ids >= 0) & (ids < vocabulary) & (at >= 0) & (at < places)

    reads = inside & known[:, None]
    words = token_ptr + ids.to(tl.int64) * WIDTH
    word = tl.load(words[:, None] + column[None, :], mask=reads, other=0.0)
    where = position_ptr + at.to(tl.int64) * WIDTH
    y = word.to(tl.float32) + tl.load(where[:, None] + column[None, :], mask=reads, other=0.0)
    y = tl.where(known[:, None], y, float("nan"))  # neither a fault nor a wrong number
    y = y.to(out_ptr.dtype.element_ty)  # the only rounding
    base = out_ptr + first.to(tl.int64) * WIDTH
    tl.store(base + part[:, None] * WIDTH + column[None, :], y, mask=inside)
    if stats_ptr is not None:
        store_stats(
            stats_ptr,
            stats_stride,
            y.to(tl.float32),
            first + part,
            exists,
            start,
            WIDTH,
            BLOCK_M,
            BLOCK_N,
        )


def text_embed_cost(
    out: Tensor,
    ids: Tensor,
    positions: Tensor,
    token: Tensor,
    position: Tensor,
    stats: Tensor | None = None,
    **_: object,
) -> Cost:
    """A row of each table is read and a row written for every token."""
    row = out.shape[1] * (token.element_size() + position.element_size())
    return Cost(0, out.shape[0] * row + traffic(out, ids, positions, stats))


# -- the launcher ----------------------------------------------------------------------------------


def _config(target: Target, dtype: torch.dtype, width: int) -> KernelConfig:
    """Tuning may vary ``block_m`` alone: the statistics' bits follow from the rest."""
    columns = 256 if width > 128 else CHUNK
    heuristic = KernelConfig(
        4096 // columns,
        columns,
        0,
        4,
        1,
        reason="256 columns divide every text width in use; 32 values a thread",
    )
    return config_of("text_embed", target, dtype, str(width), heuristic)


def text_embed_calls(
    target: Target,
    out: Tensor,
    ids: Tensor,
    positions: Tensor,
    token: Tensor,
    position: Tensor,
    stats: Tensor | None = None,
) -> list[Call]:
    """The launch of `text_embed_ref`, with ``position`` in fp32 and the indices in int32.

    Callers check the indices. One outside its table is not read: its token's row comes out as NaN.
    Raises ValueError for a shape, dtype or layout that the kernel does not take.
    """
    if token.dim() != 2 or token.dtype not in FLOATS or token.shape[1] == 0:
        raise ValueError(
            f"text_embed: token: got {token.dtype} {tuple(token.shape)}, wanted (V, C) in {FLOATS}"
        )
    (vocabulary, width), tokens = token.shape, ids.numel()
    places = position.shape[0]
    check_tensor("text_embed: token", token, out, token.dtype, token.shape)
    check_tensor("text_embed: out", out, out, token.dtype, (tokens, width))
    check_tensor("text_embed: ids", ids, out, torch.int32, (tokens,))
    check_tensor("text_embed: positions", positions, out, torch.int32, (tokens,))
    check_tensor("text_embed: position", position, out, torch.float32, (places, width))
    check_tensor("text_embed: stats", stats, out, torch.float32, stats_shape(tokens, width))
    config = _config(target, token.dtype, width)
    arguments = {
        "out_ptr": out,
        "stats_ptr": stats,
        "ids_ptr": ids,
        "positions_ptr": positions,
        "token_ptr": token,
        "position_ptr": position,
        "tokens": tokens,
        "vocabulary": vocabulary,
        "places": places,
        "stats_stride": tokens,
        "WIDTH": width,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PDL": target.pdl,
    }
    grid = Grid(tokens, config.block_m, cdiv(width, config.block_n))
    return [Call(_text_embed_kernel, grid, arguments, config)]


def text_embed(
    out: Tensor,
    ids: Tensor,
    positions: Tensor,
    token: Tensor,
    position: Tensor,
    stats: Tensor | None = None,
) -> None:
    """`text_embed_ref` by the kernel; see `text_embed_calls` for what differs and the errors."""
    launch(text_embed_calls(target_of(out), out, ids, positions, token, position, stats))
