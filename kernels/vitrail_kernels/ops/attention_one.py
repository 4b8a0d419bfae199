"""attention_one: `attention` for a single query per sequence, the pooled token's

FLOPs  4 E sum(T) per head      bytes  M 2 C + 2 B C      bound  by the read of K and V

Every slot of a key tile has its own softmax. The slots are joined at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitrail_kernels.configs import KernelConfig, config_key, tuned
from vitrail_kernels.cost import Cost, traffic
from vitrail_kernels.device.overlap import wait_for_previous
from vitrail_kernels.launch import Call, Grid, Target, check_tensor, jit, tl
from vitrail_kernels.operator import Operator
from vitrail_kernels.ops.attention import (
    check_heads,
    check_sequences,
    load_tile,
    softmax2_attention,
)


def attention_one_ref(
    out: Tensor, q: Tensor, kv: Tensor, cu_seqlens: Tensor, *, heads: int, max_seqlen: int
) -> None:
    """Write ``out`` (B, C) from a query per sequence, ``q`` (B, C), and ``kv`` (M, 2 C).

    Sequence i holds rows ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]`` of ``kv`` (B + 1, int32), and
    no sequence is longer than ``max_seqlen``.
    """
    batch, width = q.shape
    if batch == 0:
        return
    head_dim = width // heads
    query = q.view(batch, 1, heads, head_dim).transpose(1, 2)
    if kv.shape[0] == batch * max_seqlen:
        k, v = kv.view(batch, max_seqlen, 2, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        out.view(batch, 1, heads, head_dim).copy_(softmax2_attention(query, k, v).transpose(1, 2))
        return
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    for length in torch.unique(lengths).tolist():
        members = torch.nonzero(lengths == length).flatten()
        index = starts[members][:, None] + torch.arange(length, device=kv.device)
        packed = kv.index_select(0, index.flatten()).view(len(members), length, 2, heads, head_dim)
        k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        result = softmax2_attention(query.index_select(0, members), k, v)
        out.index_copy_(0, members, result.transpose(1, 2).reshape(len(members), width))


@jit()
def _add_keys(
    acc: tl.tensor,  # (BLOCK_N, PADDED) fp32, each slot's sum of weighted values so far
    peak: tl.tensor,  # (BLOCK_N,) fp32, each slot's largest score so far
    total: tl.tensor,  # (BLOCK_N,) fp32, each slot's sum of weights so far
    q: tl.tensor,  # (PADDED,) fp32
    kv_ptr: tl.tensor,  # (M, 2 C)
    row: tl.tensor,  # the first row of the tile
    column: tl.tensor,  # the first column of the head
    keys: tl.tensor,  # the number of keys in the tile, or None for BLOCK_N
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Add a tile of keys and values, key n to slot n; returns acc, peak, total."""
    STRIDE: tl.constexpr = 2 * WIDTH
    k = load_tile(None, kv_ptr, row, column, keys, STRIDE, BLOCK_N, HEAD_DIM, PADDED)
    v = load_tile(None, kv_ptr, row, column + WIDTH, keys, STRIDE, BLOCK_N, HEAD_DIM, PADDED)
    score = tl.sum(q[None, :] * k.to(tl.float32), axis=1)
    if keys is not None:
        score = tl.where(tl.arange(0, BLOCK_N) < keys, score, float("-inf"))
    top = tl.maximum(peak, score)
    base = tl.where(top == float("-inf"), 0.0, top)  # a slot without a key: -inf - -inf is NaN
    weight = tl.exp2(score - base)
    decay = tl.exp2(peak - base)
    acc = tl.fma(weight[:, None], v.to(tl.float32), acc * decay[:, None])
    return acc, top, tl.fma(total, decay, weight)


@jit()
def _attention_one_kernel(
    out_ptr: tl.tensor,  # (B, C)
    q_ptr: tl.tensor,  # (B, C)
    kv_ptr: tl.tensor,  # (M, 2 C)
    cu_seqlens_ptr: tl.tensor,  # (B + 1,) int32
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_previous(PDL)
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    sequence = tl.program_id(0) // HEADS
    column = (tl.program_id(0) - sequence * HEADS) * HEAD_DIM
    start = tl.load(cu_seqlens_ptr + sequence)
    keys = tl.load(cu_seqlens_ptr + sequence + 1) - start
    offs_d = tl.arange(0, PADDED)
    mask = offs_d < HEAD_DIM
    offset = sequence.to(tl.int64) * WIDTH + column + offs_d
    q = tl.load(q_ptr + offset, mask=mask, other=0.0).to(tl.float32)

    # Keys, full tiles first
    acc = tl.zeros((BLOCK_N, PADDED), dtype=tl.float32)
    peak = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    full_tiles = keys // BLOCK_N
    for j in tl.range(0, full_tiles):
        acc, peak, total = _add_keys(
            acc, peak, total, q, kv_ptr, start + j * BLOCK_N, column, None,
            WIDTH, HEAD_DIM, PADDED, BLOCK_N,
        )  # fmt: skip
    partial = keys - full_tiles * BLOCK_N
    if partial > 0:
        acc, peak, total = _add_keys(
            acc, peak, total, q, kv_ptr, start + full_tiles * BLOCK_N, column, partial,
            WIDTH, HEAD_DIM, PADDED, BLOCK_N,
        )  # fmt: skip

    # Join the slots, then divide and round; a sequence without keys gives 0
    top = tl.max(peak, axis=0)
    decay = tl.exp2(peak - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(total * decay, axis=0)
    # Each of four warps adds its own rows: a lane loads 8 columns, so that a warp has ROWS rows.
    # The sums of the warps meet by a change of layout. A reduction of them would write 8 columns
    # per lane to shared memory, with all lanes in one bank.
    ROWS: tl.constexpr = min(256 // PADDED, BLOCK_N // 4)
    sums = tl.reshape(acc * decay[:, None], (BLOCK_N // (4 * ROWS), 4, ROWS, PADDED))
    sums = tl.permute(tl.sum(tl.sum(sums, axis=0), axis=1), (1, 0))
    even, odd = tl.split(tl.reshape(sums, (PADDED, 2, 2)))
    low, high = tl.split(even + odd)
    out = (low + high) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


def attention_one_cost(*, out: Tensor, lengths: Sequence[int], **arguments: object) -> Cost:
    """FLOPs of a query with every key of its sequence."""
    return Cost(4 * out.shape[1] * sum(lengths), traffic(out, *arguments.values()))


# -- the calls -------------------------------------------------------------------------------------


def attention_one_calls(
    target: Target,
    out: Tensor,
    q: Tensor,
    kv: Tensor,
    cu_seqlens: Tensor,
    *,
    heads: int,
    max_seqlen: int,
) -> list[Call]:
    """The launch of `attention_one_ref`. A sequence without keys gives 0, as in the reference.

    ``max_seqlen`` is not used. Raises ValueError for a shape, dtype or layout that the kernel does
    not take.
    """
    head_dim = check_heads("attention_one", "kv", kv, 2, heads)
    batch = check_sequences("attention_one", cu_seqlens, kv)
    for name, tensor in (("out", out), ("q", q)):
        check_tensor(f"attention_one: {name}", tensor, kv, kv.dtype, (batch, heads * head_dim))
    padded = max(8, 1 << (head_dim - 1).bit_length())
    why = "32 values of K and of V a thread are in flight at once"
    key = config_key("attention_one", kv.dtype, f"{heads}x{head_dim}")
    config = tuned(target.arch).get(key, KernelConfig(0, 4096 // padded, 0, 4, 1, reason=why))
    arguments = {
        "out_ptr": out,
        "q_ptr": q,
        "kv_ptr": kv,
        "cu_seqlens_ptr": cu_seqlens,
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "PADDED": padded,
        "BLOCK_N": config.block_n,
        "PDL": target.pdl,
    }
    return [Call(_attention_one_kernel, Grid(batch, times=heads), arguments, config, key)]


ATTENTION_ONE = Operator(
    "attention_one", attention_one_ref, attention_one_calls, attention_one_cost
)
