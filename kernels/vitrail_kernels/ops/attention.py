"""attention: out = softmax2(Q K^T) V per head and sequence, over packed sequences

    softmax2  base two: the scale head_dim^-0.5 and log2(e) are folded into Q's weights
    FLOPs     4 E sum(T_q T_k) per head (half of that where causal)     bytes  M (3 C + C)
    bound     by the exponential unit at a few hundred tokens, by the tensor cores above

A program takes BLOCK_M queries of one head past the key tiles of their sequence, first to last,
whatever BLOCK_M. Tiles of which every query sees every key come first, unmasked. What is left of
the sequence is a tile as narrow as will do, 16, 32 or 64 keys: 197 tokens are 3 x 64 + 5, and
exponentials of padding cost as much as others. There scores are masked and K and V are loaded as 0,
because a hidden NaN would spread through 0 * NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail_kernels.configs import KernelConfig, Ladder, ladder_of, tuned
from vitrail_kernels.cost import Cost, traffic
from vitrail_kernels.device.overlap import wait_for_previous
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

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 128
"""Columns of a head."""

_LN2 = math.log(2.0)


def softmax2_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Base-two softmax attention of (B, H, T, E) tensors."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=_LN2)


def _dense(qkv: Tensor, batch: int, heads: int, causal: bool, kv_lens: Tensor | None) -> Tensor:
    """Attention of equally long sequences: ``qkv`` (B T, 3 C) -> (B, T, C)."""
    tokens, head_dim = qkv.shape[0] // batch, qkv.shape[1] // (3 * heads)
    q, k, v = qkv.view(batch, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    mask = None
    if kv_lens is not None:
        position = torch.arange(tokens, device=qkv.device)
        mask = (position < kv_lens[:, None])[:, None, None, :]
        if causal:
            mask = mask & (position[:, None] >= position)
        # what is masked must not reach a product: NaN - inf and 0 * NaN are NaN
        hidden = (position >= kv_lens[:, None])[:, None, :, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    out = softmax2_attention(q, k, v, mask, causal and mask is None)
    return out.transpose(1, 2).reshape(batch, tokens, heads * head_dim)


def attention_ref(
    out: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor | None = None,
    *,
    heads: int,
    causal: bool,
    max_seqlen: int,
    equal_lengths: bool = False,
) -> None:
    """Write ``out`` (M, C) from ``qkv`` (M, 3 C): query, key and value, heads inside each.

    Sequence i holds rows ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]`` (B + 1, int32), none longer
    than ``max_seqlen``; with ``equal_lengths`` each is that long, and the kernel does not read
    ``cu_seqlens``. ``kv_lens`` (B,): only the first that many keys of each sequence are seen
    (needs equally long sequences).
    """
    batch = cu_seqlens.shape[0] - 1
    if qkv.shape[0] == 0:
        return
    if qkv.shape[0] == batch * max_seqlen:
        out.view(batch, max_seqlen, -1).copy_(_dense(qkv, batch, heads, causal, kv_lens))
        return
    if kv_lens is not None:
        raise ValueError("kv_lens: wanted sequences of one length, got a packed batch of several")
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    if causal:
        # padded keys come after every real query, so the causal mask hides them; they are zero, not
        # a neighbour's rows, because a hidden NaN would still spread through 0 * NaN
        row = torch.arange(qkv.shape[0], device=qkv.device)
        sequence = torch.repeat_interleave(torch.arange(batch, device=qkv.device), lengths)
        slot = sequence * max_seqlen + (row - starts[sequence])
        padded = qkv.new_zeros(batch * max_seqlen, qkv.shape[1])
        padded.index_copy_(0, slot, qkv)
        result = _dense(padded, batch, heads, True, None).view(batch * max_seqlen, -1)
        torch.index_select(result, 0, slot, out=out)
        return
    for length in torch.unique(lengths).tolist():
        members = starts[lengths == length]
        index = (members[:, None] + torch.arange(length, device=qkv.device)).flatten()
        part = _dense(qkv.index_select(0, index), len(members), heads, False, None)
        out.index_copy_(0, index, part.view(len(index), out.shape[1]))


@jit()
def load_tile(
    desc: tl.tensor,  # of boxes (BLOCK, PADDED) over packed, or None
    packed_ptr: tl.tensor,  # (M, STRIDE)
    row: tl.tensor,
    column: tl.tensor,
    rows: tl.tensor,  # how many of the tile's rows there are, or None for all
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
) -> tl.tensor:
    """BLOCK rows of COLUMNS columns as (BLOCK, PADDED), 0 outside. A descriptor's padding holds
    other columns of the same rows instead, which meet 0 in Q, or are not stored."""
    if desc is not None:
        values = desc.load([row, column])
    else:
        offs_m = tl.arange(0, BLOCK)
        offs_d = tl.arange(0, PADDED)
        first = packed_ptr + (row.to(tl.int64) * STRIDE + column)
        tile = first + (offs_m[:, None] * STRIDE + offs_d[None, :])
        mask_d = (offs_d < COLUMNS)[None, :]
        if rows is not None:
            values = tl.load(tile, mask=(offs_m < rows)[:, None] & mask_d, other=0.0)
        elif COLUMNS < PADDED:
            values = tl.load(tile, mask=mask_d, other=0.0)
        else:
            values = tl.load(tile)
    return values


@jit()
def _attend(
    acc: tl.tensor,  # (BLOCK_M, PART) fp32, the sum of weighted values so far
    acc_more: tl.tensor,  # (BLOCK_M, MORE) fp32, its other columns
    peak: tl.tensor,  # (BLOCK_M,) fp32, the largest score so far
    total: tl.tensor,  # (BLOCK_M,) fp32, the sum of weights so far
    q: tl.tensor,  # (BLOCK_M, PART)
    q_more: tl.tensor,  # (BLOCK_M, MORE)
    qkv_ptr: tl.tensor,  # (M, 3 C)
    kv_desc: tl.tensor,  # of boxes (BLOCK_N, PART) over qkv, or None
    more_desc: tl.tensor,  # of boxes (BLOCK_N, MORE) over qkv, or None
    row: tl.tensor,  # the tile's first, in qkv
    column: tl.tensor,  # the head's first, in Q
    keys: tl.tensor,  # how many keys the tile has, or None for BLOCK_N
    last: tl.tensor,  # (BLOCK_M,) the last key of the tile that a query sees, or None for all
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PART: tl.constexpr,
    MORE: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Add one tile of keys and values; returns acc, acc_more, peak, total."""
    COLUMNS: tl.constexpr = HEAD_DIM if MORE == 0 else PART
    REST: tl.constexpr = HEAD_DIM - PART
    STRIDE: tl.constexpr = 3 * WIDTH
    column += WIDTH
    values = column + WIDTH
    k = load_tile(kv_desc, qkv_ptr, row, column, keys, STRIDE, BLOCK_N, COLUMNS, PART)
    if kv_desc is None:  # the loads of V are under way while scores are made
        v = load_tile(None, qkv_ptr, row, values, keys, STRIDE, BLOCK_N, COLUMNS, PART)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MORE > 0:
        other = column + PART
        k = load_tile(more_desc, qkv_ptr, row, other, keys, STRIDE, BLOCK_N, REST, MORE)
        scores = tl.dot(q_more, tl.trans(k), scores, input_precision="ieee")

    # Softmax. Every query sees its sequence's first key, so that peak is finite from there on
    offs_n = tl.arange(0, BLOCK_N)
    if keys is not None:
        scores = tl.where((offs_n < keys)[None, :], scores, float("-inf"))
    if last is not None:
        scores = tl.where(offs_n[None, :] <= last[:, None], scores, float("-inf"))
    top = tl.maximum(peak, tl.max(scores, axis=1))
    weights = tl.exp2(scores - top[:, None])
    decay = tl.exp2(peak - top)
    total = tl.fma(total, decay, tl.sum(weights, axis=1))

    if kv_desc is not None:
        v = load_tile(kv_desc, qkv_ptr, row, values, keys, STRIDE, BLOCK_N, COLUMNS, PART)
    weights = weights.to(v.dtype)  # rounded here, but not in their sum
    acc = tl.dot(weights, v, acc * decay[:, None], input_precision="ieee")
    if MORE > 0:
        other = values + PART
        v = load_tile(more_desc, qkv_ptr, row, other, keys, STRIDE, BLOCK_N, REST, MORE)
        acc_more = tl.dot(weights, v, acc_more * decay[:, None], input_precision="ieee")
    return acc, acc_more, top, total


@jit(varying=("longest",))
def _attention_kernel(
    out_ptr: tl.tensor,  # (M, C)
    qkv_ptr: tl.tensor,  # (M, 3 C)
    q_desc: tl.tensor,  # of boxes (BLOCK_M, PART) over qkv, or None
    kv_desc: tl.tensor,  # of boxes (BLOCK_N, PART) over qkv, or None
    more_desc: tl.tensor,  # of boxes (BLOCK_N, MORE) over qkv, or None
    cu_seqlens_ptr: tl.tensor,  # (B + 1,) int32, or None if all sequences are the longest
    kv_lens_ptr: tl.tensor,  # (B,) int32, or None
    longest: int,  # of the sequences, in tokens
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PART: tl.constexpr,
    MORE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_previous(PDL)
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    COLUMNS: tl.constexpr = HEAD_DIM if MORE == 0 else PART
    REST: tl.constexpr = HEAD_DIM - PART
    STRIDE: tl.constexpr = 3 * WIDTH

    # Which queries: a head's tiles side by side share K and V in the L2 cache, a sequence's heads
    # its rows. Causal: the tiles with most keys first.
    tiles = tl.cdiv(longest, BLOCK_M)
    pair = tl.program_id(0) // tiles
    tile = tl.program_id(0) - pair * tiles
    if CAUSAL:
        tile = tiles - 1 - tile
    sequence = pair // HEADS
    column = (pair - sequence * HEADS) * HEAD_DIM
    start = sequence * longest
    length = longest
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + sequence)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    first = tile * BLOCK_M
    if first >= length:
        return
    keys = length
    if kv_lens_ptr is not None:
        keys = tl.minimum(tl.load(kv_lens_ptr + sequence), length)

    # Queries. By descriptor, rows past the sequence are others'; they reach no row that is stored
    row = start + first
    rows = length - first
    q = load_tile(q_desc, qkv_ptr, row, column, rows, STRIDE, BLOCK_M, COLUMNS, PART)
    acc = tl.zeros((BLOCK_M, PART), dtype=tl.float32)
    q_more = q
    acc_more = tl.zeros((1,), dtype=tl.float32)
    if MORE > 0:
        other = column + PART
        q_more = load_tile(None, qkv_ptr, row, other, rows, STRIDE, BLOCK_M, REST, MORE)
        acc_more = tl.zeros((BLOCK_M, MORE), dtype=tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)

    # Whole tiles of keys: seen by all, then those that the diagonal crosses
    offs_m = tl.arange(0, BLOCK_M)
    whole = keys // BLOCK_N
    seen = whole
    if CAUSAL:
        seen = tl.minimum(whole, first // BLOCK_N)
    for j in tl.range(0, seen):
        acc, acc_more, peak, total = _attend(
            acc, acc_more, peak, total, q, q_more, qkv_ptr, kv_desc, more_desc,
            start + j * BLOCK_N, column, None, None, WIDTH, HEAD_DIM, PART, MORE, BLOCK_N,
        )  # fmt: skip
    if CAUSAL:
        for j in tl.range(seen, tl.minimum(whole, (first + BLOCK_M) // BLOCK_N), num_stages=1):
            last = first - j * BLOCK_N + offs_m
            acc, acc_more, peak, total = _attend(
                acc, acc_more, peak, total, q, q_more, qkv_ptr, kv_desc, more_desc,
                start + j * BLOCK_N, column, None, last, WIDTH, HEAD_DIM, PART, MORE, BLOCK_N,
            )  # fmt: skip

    # The last keys, in a tile as narrow as will do
    QUARTER: tl.constexpr = BLOCK_N // 4 if BLOCK_N > 32 else 16
    partial = keys - whole * BLOCK_N
    row = start + whole * BLOCK_N
    last = None
    if CAUSAL:
        last = first - whole * BLOCK_N + offs_m
        if first + BLOCK_M <= whole * BLOCK_N:
            partial = 0
    if partial > BLOCK_N // 2:
        acc, acc_more, peak, total = _attend(
            acc, acc_more, peak, total, q, q_more, qkv_ptr, None, None,
            row, column, partial, last, WIDTH, HEAD_DIM, PART, MORE, BLOCK_N,
        )  # fmt: skip
    elif partial > QUARTER:
        acc, acc_more, peak, total = _attend(
            acc, acc_more, peak, total, q, q_more, qkv_ptr, None, None,
            row, column, partial, last, WIDTH, HEAD_DIM, PART, MORE, BLOCK_N // 2,
        )  # fmt: skip
    elif partial > 0:
        acc, acc_more, peak, total = _attend(
            acc, acc_more, peak, total, q, q_more, qkv_ptr, None, None,
            row, column, partial, last, WIDTH, HEAD_DIM, PART, MORE, QUARTER,
        )  # fmt: skip

    # Divide and round. Where kv_lens hides every key, the sum of nothing is 0
    total = tl.where(total == 0.0, 1.0, total)
    out = out_ptr + ((start + first).to(tl.int64) * WIDTH + column) + offs_m[:, None] * WIDTH
    mask = (offs_m < rows)[:, None]
    offs_d = tl.arange(0, PART)[None, :]
    part = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out + offs_d, part, mask=mask & (offs_d < COLUMNS))
    if MORE > 0:
        offs_d = tl.arange(0, MORE)[None, :]
        part = (acc_more / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out + PART + offs_d, part, mask=mask & (offs_d < REST))


def attention_cost(
    out: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor | None = None,
    *,
    causal: bool,
    lengths: Sequence[int],
    **_: object,
) -> Cost:
    """FLOPs of both products over the visible (query, key) pairs of ``lengths`` tokens each."""
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    return Cost(4 * out.shape[1] * pairs, traffic(out, qkv, cu_seqlens, kv_lens))


def _parts(head_dim: int) -> tuple[int, int]:
    """The powers of two, 16 or more, that hold a head's columns: 80 is 64 + 16."""
    if head_dim > 64:
        return 64, max(16, 1 << (head_dim - 65).bit_length())
    return max(16, 1 << (head_dim - 1).bit_length()), 0


def _attention_config(
    target: Target,
    dtype: torch.dtype,
    heads: int,
    head_dim: int,
    causal: bool,
    longest: int,
    tokens: int,
) -> KernelConfig:
    """For sequences of up to ``longest`` in ``tokens`` rows. Sizes decide BLOCK_M and stages, from
    which no bit follows: a warp holds 16 rows of the same instructions, over the same key tiles in
    order.

    Causal sequences are captions, few of which pass 64 tokens: one tile serves any length.
    """
    sizes = f"{heads}x{head_dim} causal" if causal else f"{heads}x{head_dim}x{longest} full"
    key = f"attention|{str(dtype).removeprefix('torch.')}|{sizes}"
    if key in tuned(target.arch):
        return tuned(target.arch)[key]
    if target.arch == 90:
        large = cdiv(tokens, 128) * heads >= 2 * target.sms and not causal
        registers = 128 if head_dim <= 80 else None
        if registers and large and 128 * cdiv(longest, 128) == 64 * cdiv(longest, 64):
            reason = "64 rows read K and V from L2 too often for more than 350 TFLOP/s, and pad no"
            reason += " less here; 2 blocks of 2 warpgroups overlap softmax with products, and the"
            reason += " third stage is what loads a tile ahead of the one in use"
            return KernelConfig(128, 64, 0, 8, 3, registers, reason=reason)
        reason = "128 rows pad more, or leave multiprocessors idle, or take over 128 registers;"
        if longest < 192 or causal:
            reason += " 2 to 4 blocks of a warpgroup overlap softmax with products; a third stage"
            reason += " would cost one of them, and has few tiles to load ahead"
            return KernelConfig(64, 64, 0, 4, 2, registers, reason=reason)
        reason += " 3 blocks that load a tile ahead, against 4 that wait for every tile"
        return KernelConfig(64, 64, 0, 4, 3, registers, reason=reason)
    if target.tcgen05:
        reason = "2 to 4 blocks a multiprocessor; 128 rows spill past 96 columns"
        return KernelConfig(64, 64, 0, 4, 2, reason=reason)
    registers = 168 if head_dim <= 64 and not causal else None
    reason = "16 rows a warp, 2 or 3 blocks a multiprocessor; more keys or fewer registers spill"
    return KernelConfig(64, 64 if head_dim <= 80 else 32, 0, 4, 2, registers, reason=reason)


def attention_ladder(
    target: Target, dtype: torch.dtype, heads: int, head_dim: int, causal: bool, longest: int
) -> Ladder:
    """The configurations for sequences of up to ``longest`` by how many tokens there are."""
    # as many as leave less than two blocks of 128 queries for every multiprocessor
    few = 128 * ((2 * target.sms - 1) // heads)
    choose = functools.partial(_attention_config, target, dtype, heads, head_dim, causal, longest)
    return ladder_of([few], choose)


def check_heads(op: str, name: str, packed: Tensor, blocks: int, heads: int) -> int:
    """The head dim of ``packed`` (M, blocks C), or ValueError for what the kernels do not take."""
    if packed.dim() != 2 or heads < 1 or packed.shape[1] % (blocks * heads):
        raise ValueError(
            f"{op}: {name}: got shape {tuple(packed.shape)}, wanted (M, {blocks} x {heads} x E)"
        )
    head_dim = packed.shape[1] // (blocks * heads)
    if not 1 <= head_dim <= WIDEST:
        raise ValueError(f"{op}: {name}: got heads of {head_dim} columns, wanted 1 to {WIDEST}")
    if packed.dtype not in FLOATS:
        raise ValueError(f"{op}: {name}: got {packed.dtype}, wanted one of {FLOATS}")
    check_tensor(f"{op}: {name}", packed, packed, packed.dtype, packed.shape)
    return head_dim


def check_sequences(op: str, cu_seqlens: Tensor, like: Tensor) -> int:
    """How many sequences there are."""
    if cu_seqlens.dim() != 1 or not cu_seqlens.numel():
        raise ValueError(f"{op}: cu_seqlens: got {tuple(cu_seqlens.shape)}, wanted (B + 1,)")
    check_tensor(f"{op}: cu_seqlens", cu_seqlens, like, torch.int32, cu_seqlens.shape)
    return cu_seqlens.numel() - 1


def attention_calls(
    target: Target,
    out: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor | None = None,
    *,
    heads: int,
    causal: bool,
    max_seqlen: int,
    equal_lengths: bool = False,
    config: KernelConfig | None = None,
) -> list[Call]:
    """The launch of `attention_ref`. A sequence longer than ``max_seqlen`` is not finished.

    ``config`` takes the place of the one that the sizes would get. A query that sees no key, where
    ``kv_lens`` is 0, gives 0, as the reference does. float32 is for the interpreter: machine code
    of it spills. Raises ValueError for a shape, dtype or layout that the kernel does not take, and
    for ``kv_lens`` or ``equal_lengths`` over sequences of several lengths.
    """
    head_dim = check_heads("attention", "qkv", qkv, 3, heads)
    batch, tokens = check_sequences("attention", cu_seqlens, qkv), qkv.shape[0]
    check_tensor("attention: out", out, qkv, qkv.dtype, (tokens, heads * head_dim))
    check_tensor("attention: kv_lens", kv_lens, qkv, torch.int32, (batch,))
    if tokens == 0:
        return []
    if (equal_lengths or kv_lens is not None) and tokens != batch * max_seqlen:
        name = "equal_lengths" if equal_lengths else "kv_lens"
        raise ValueError(f"{name}: wanted sequences of one length, got a packed batch of several")
    part, more = _parts(head_dim)
    fixed = target, qkv.dtype, heads, head_dim, causal, max_seqlen
    config = config or _attention_config(*fixed, tokens)
    if config.block_m % config.block_n:
        raise ValueError(f"attention: got {config}, wanted key tiles that divide the query tiles")
    block_m, block_n = config.block_m, config.block_n
    # a box starts at whole 16 bytes, in every head
    tma = target.tma and fits_descriptor(qkv) and head_dim * qkv.element_size() % 16 == 0
    arguments = {
        "out_ptr": out,
        "qkv_ptr": qkv,
        "q_desc": descriptor(qkv, block_m, part) if tma and part <= head_dim else None,
        "kv_desc": descriptor(qkv, block_n, part) if tma else None,
        "more_desc": descriptor(qkv, block_n, more) if tma and more else None,
        "cu_seqlens_ptr": None if equal_lengths else cu_seqlens,
        "kv_lens_ptr": kv_lens,
        "longest": max_seqlen,
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "PART": part,
        "MORE": more,
        "CAUSAL": causal,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "PDL": target.pdl,
    }
    grid = Grid(max_seqlen, block_m, batch * heads)
    ladder = functools.partial(attention_ladder, *fixed)
    return [Call(_attention_kernel, grid, arguments, config, tokens, ladder)]


def attention(
    out: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor | None = None,
    *,
    heads: int,
    causal: bool,
    max_seqlen: int,
    equal_lengths: bool = False,
) -> None:
    """`attention_ref` by the kernel, for the same tensors; see `attention_calls` for the errors."""
    launch(
        attention_calls(
            target_of(out),
            out,
            qkv,
            cu_seqlens,
            kv_lens,
            heads=heads,
            causal=causal,
            max_seqlen=max_seqlen,
            equal_lengths=equal_lengths,
        )
    )
