"""text_embed: out[i] = token[ids[i]] + position[positions[i]]

FLOPs  none counted       bytes  3 M C       bound  by memory
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrail_kernels.configs import KernelConfig, config_key, tuned
from vitrail_kernels.cost import Cost, traffic
from vitrail_kernels.device.overlap import wait_for_previous
from vitrail_kernels.device.stats import CHUNK, stats_ref, stats_shape, store_stats
from vitrail_kernels.launch import FLOATS, Call, Grid, Target, cdiv, check_tensor, jit, tl
from vitrail_kernels.operator import Operator


def text_embed_ref(
    out: Tensor,
    ids: Tensor,
    positions: Tensor,
    token: Tensor,
    position: Tensor,
    stats: Tensor | None = None,
) -> None:
    """Write ``out`` (M, C) from the tables ``token`` (V, C) and ``position`` (T, C).

    ``ids`` and ``positions`` (M,) are row numbers in the tables. ``stats`` (2 chunks, M) fp32
    receives the row statistics of ``out``.
    """
    token_rows, position_rows = token.index_select(0, ids), position.index_select(0, positions)
    if out.dtype == token.dtype == position.dtype:
        torch.add(token_rows, position_rows, out=out)
    else:
        out.copy_(token_rows + position_rows)
    if stats is not None:
        stats_ref(stats, out)


@jit(varying=("tokens", "vocabulary", "position_rows", "stats_stride"))
def _text_embed_kernel(
    out_ptr: tl.tensor,  # (M, WIDTH)
    stats_ptr: tl.tensor,  # (2 chunks, M) fp32 or None
    ids_ptr: tl.tensor,  # (M,) int32
    positions_ptr: tl.tensor,  # (M,) int32
    token_ptr: tl.tensor,  # (vocabulary, WIDTH)
    position_ptr: tl.tensor,  # (position_rows, WIDTH) fp32
    tokens: int,  # M
    vocabulary: int,
    position_rows: int,
    stats_stride: int,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A program makes BLOCK_N columns of BLOCK_M tokens."""
    wait_for_previous(PDL)
    ACROSS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    first_row = tl.program_id(0) // ACROSS * BLOCK_M
    first_column = tl.program_id(0) % ACROSS * BLOCK_N
    offs_m = tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    exists = offs_m < tokens - first_row
    inside = exists[:, None] & (column < WIDTH)[None, :]
    ids = tl.load(ids_ptr + first_row + offs_m, mask=exists, other=0)
    index = tl.load(positions_ptr + first_row + offs_m, mask=exists, other=0)
    valid = (ids >= 0) & (ids < vocabulary) & (index >= 0) & (index < position_rows)

    reads = inside & valid[:, None]
    token_ptrs = token_ptr + ids.to(tl.int64) * WIDTH
    token = tl.load(token_ptrs[:, None] + column[None, :], mask=reads, other=0.0)
    ptrs = position_ptr + index.to(tl.int64) * WIDTH
    y = token.to(tl.float32) + tl.load(ptrs[:, None] + column[None, :], mask=reads, other=0.0)
    y = tl.where(valid[:, None], y, float("nan"))  # neither a fault nor a wrong number
    y = y.to(out_ptr.dtype.element_ty)  # the only rounding
    base = out_ptr + first_row.to(tl.int64) * WIDTH
    tl.store(base + offs_m[:, None] * WIDTH + column[None, :], y, mask=inside)
    if stats_ptr is not None:
        wide, row = y.to(tl.float32), first_row + offs_m
        store_stats(
            stats_ptr, stats_stride, wide, row, exists, first_column, WIDTH, BLOCK_M, BLOCK_N
        )


def text_embed_cost(*, out: Tensor, token: Tensor, position: Tensor, **arguments: object) -> Cost:
    """For every token a row of each table is read and a row is written."""
    row = out.shape[1] * (token.element_size() + position.element_size())
    return Cost(0, out.shape[0] * row + traffic(out, *arguments.values()))


# -- the calls -------------------------------------------------------------------------------------


def _config(target: Target, key: str, width: int) -> KernelConfig:
    """Tuning may vary only ``block_m``: the other fields fix the bits of the statistics."""
    columns = 256 if width > 128 else CHUNK
    why = "256 columns divide every text width in use; 32 values a thread"
    heuristic = KernelConfig(4096 // columns, columns, 0, 4, 1, reason=why)
    return tuned(target.arch).get(key, heuristic)


def text_embed_calls(
    target: Target,
    out: Tensor,
    ids: Tensor,
    positions: Tensor,
    token: Tensor,
    position: Tensor,
    stats: Tensor | None = None,
) -> list[Call]:
    """The launch of `text_embed_ref`, with ``position`` in fp32 and the row numbers in int32.

    Callers check the row numbers. A number outside its table is not read, and the token's row
    becomes NaN. Raises ValueError for a shape, dtype or layout that the kernel does not take.
    """
    if token.dim() != 2 or token.dtype not in FLOATS or token.shape[1] == 0:
        raise ValueError(
            f"text_embed: token: got {token.dtype} {tuple(token.shape)}, wanted (V, C) in {FLOATS}"
        )
    (vocabulary, width), tokens = token.shape, ids.numel()
    position_rows = position.shape[0]
    check_tensor("text_embed: token", token, out, token.dtype, token.shape)
    check_tensor("text_embed: out", out, out, token.dtype, (tokens, width))
    check_tensor("text_embed: ids", ids, out, torch.int32, (tokens,))
    check_tensor("text_embed: positions", positions, out, torch.int32, (tokens,))
    check_tensor("text_embed: position", position, out, torch.float32, (position_rows, width))
    check_tensor("text_embed: stats", stats, out, torch.float32, stats_shape(tokens, width))
    key = config_key("text_embed", token.dtype, str(width))
    config = _config(target, key, width)
    arguments = {
        "out_ptr": out,
        "stats_ptr": stats,
        "ids_ptr": ids,
        "positions_ptr": positions,
        "token_ptr": token,
        "position_ptr": position,
        "tokens": tokens,
        "vocabulary": vocabulary,
        "position_rows": position_rows,
        "stats_stride": tokens,
        "WIDTH": width,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PDL": target.pdl,
    }
    grid = Grid(tokens, config.block_m, cdiv(width, config.block_n))
    return [Call(_text_embed_kernel, grid, arguments, config, key)]


TEXT_EMBED = Operator("text_embed", text_embed_ref, text_embed_calls, text_embed_cost)
