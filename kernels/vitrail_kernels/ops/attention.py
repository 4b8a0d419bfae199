"""attention: out = softmax2(Q K^T) V per head and sequence, over packed sequences

    softmax2  softmax in base two: head_dim^-0.5 and log2(e) are folded into Q's weights
    FLOPs     4 E sum(T_q T_k) per head (half of that if causal)     bytes  M (3 C + C)
    bound     by the exponential unit at a few hundred tokens, by the tensor cores above

A program takes BLOCK_M queries of a head through the key tiles of their sequence, always first to
last. Full key tiles come first and need no mask, except at a causal diagonal. The remaining keys
use the narrowest tile that holds them (16, 32 or 64), because padded keys cost as much as real
keys: 197 tokens are three full tiles, then 5 keys. The last tile is masked. Its padding is loaded
as 0, because a hidden NaN would spread through 0 * NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail_kernels.configs import KernelConfig, config_key
from vitrail_kernels.cost import Cost, traffic
from vitrail_kernels.device.overlap import wait_for_previous
from vitrail_kernels.launch import (
    FLOATS,
    Call,
    Grid,
    Target,
    check_tensor,
    descriptor,
    fits_descriptor,
    jit,
    tl,
)
from vitrail_kernels.operator import Operator
from vitrail_kernels.ops.attention_config import attention_config, attention_ladder

MAX_HEAD_DIM = 128

_LN2 = math.log(2.0)


def softmax2_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Attention of (B, H, T, E) tensors with a softmax in base two."""
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
        # masked keys must not reach a product: NaN - inf and 0 * NaN are NaN
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
    """Write ``out`` (M, C) from ``qkv`` (M, 3 C): queries, keys and values, each cut into heads.

    Sequence i holds rows ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]`` (B + 1, int32), and no sequence
    is longer than ``max_seqlen``. ``equal_lengths`` says that all have that length; the kernel then
    does not read ``cu_seqlens``. With ``kv_lens`` (B,), queries of sequence i see only its first
    ``kv_lens[i]`` keys. This needs sequences of equal length.
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
        # Padded keys come after every real query, so that the causal mask hides them. They are 0,
        # not rows of another sequence, because a hidden NaN would spread through 0 * NaN.
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
        result = _dense(qkv.index_select(0, index), len(members), heads, False, None)
        out.index_copy_(0, index, result.view(len(index), out.shape[1]))


@jit()
def load_tile(
    desc: tl.tensor,  # a tensor map of boxes (BLOCK, PADDED) over packed, or None
    packed_ptr: tl.tensor,  # (M, STRIDE)
    row: tl.tensor,
    column: tl.tensor,
    rows: tl.tensor,  # the number of rows in the tile, or None for BLOCK
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
) -> tl.tensor:
    """BLOCK rows of COLUMNS columns as (BLOCK, PADDED), 0 outside.

    With a tensor map the padding holds other columns of the same rows instead. They meet 0 in Q, or
    are not stored.
    """
    if desc is not None:
        values = desc.load([row, column])
    else:
        offs_m = tl.arange(0, BLOCK)
        offs_d = tl.arange(0, PADDED)
        corner = packed_ptr + (row.to(tl.int64) * STRIDE + column)
        ptrs = corner + (offs_m[:, None] * STRIDE + offs_d[None, :])
        mask_d = (offs_d < COLUMNS)[None, :]
        if rows is not None:
            values = tl.load(ptrs, mask=(offs_m < rows)[:, None] & mask_d, other=0.0)
        elif COLUMNS < PADDED:
            values = tl.load(ptrs, mask=mask_d, other=0.0)
        else:
            values = tl.load(ptrs)
    return values


@jit()
def _attend(
    acc: tl.tensor,  # (BLOCK_M, PART) fp32, the sum of weighted values so far
    acc_more: tl.tensor,  # (BLOCK_M, MORE) fp32, the columns of that sum from PART on
    peak: tl.tensor,  # (BLOCK_M,) fp32, the largest score so far
    total: tl.tensor,  # (BLOCK_M,) fp32, the sum of weights so far
    q: tl.tensor,  # (BLOCK_M, PART)
    q_more: tl.tensor,  # (BLOCK_M, MORE)
    qkv_ptr: tl.tensor,  # (M, 3 C)
    kv_desc: tl.tensor,  # a tensor map of boxes (BLOCK_N, PART) over qkv, or None
    more_desc: tl.tensor,  # a tensor map of boxes (BLOCK_N, MORE) over qkv, or None
    row: tl.tensor,  # the first row of the tile in qkv
    column: tl.tensor,  # the first column of the head in Q
    keys: tl.tensor,  # the number of keys in the tile, or None for BLOCK_N
    last_key: tl.tensor,  # (BLOCK_M,) the last key of the tile that a query sees, or None for all
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PART: tl.constexpr,
    MORE: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Add a tile of keys and values; returns acc, acc_more, peak, total."""
    COLUMNS: tl.constexpr = HEAD_DIM if MORE == 0 else PART
    REST: tl.constexpr = HEAD_DIM - PART
    STRIDE: tl.constexpr = 3 * WIDTH
    column += WIDTH
    values = column + WIDTH
    k = load_tile(kv_desc, qkv_ptr, row, column, keys, STRIDE, BLOCK_N, COLUMNS, PART)
    if kv_desc is None:  # V is loaded while the scores are computed
        v = load_tile(None, qkv_ptr, row, values, keys, STRIDE, BLOCK_N, COLUMNS, PART)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MORE > 0:
        column_more = column + PART
        k = load_tile(more_desc, qkv_ptr, row, column_more, keys, STRIDE, BLOCK_N, REST, MORE)
        scores = tl.dot(q_more, tl.trans(k), scores, input_precision="ieee")

    # Softmax. Every query sees the first key of its sequence, so that peak is finite from then on
    offs_n = tl.arange(0, BLOCK_N)
    if keys is not None:
        scores = tl.where((offs_n < keys)[None, :], scores, float("-inf"))
    if last_key is not None:
        scores = tl.where(offs_n[None, :] <= last_key[:, None], scores, float("-inf"))
    top = tl.maximum(peak, tl.max(scores, axis=1))
    weights = tl.exp2(scores - top[:, None])
    decay = tl.exp2(peak - top)
    total = tl.fma(total, decay, tl.sum(weights, axis=1))

    if kv_desc is not None:
        v = load_tile(kv_desc, qkv_ptr, row, values, keys, STRIDE, BLOCK_N, COLUMNS, PART)
    weights = weights.to(v.dtype)  # rounded for the product, but not in their sum
    acc = tl.dot(weights, v, acc * decay[:, None], input_precision="ieee")
    if MORE > 0:
        values_more = values + PART
        v = load_tile(more_desc, qkv_ptr, row, values_more, keys, STRIDE, BLOCK_N, REST, MORE)
        acc_more = tl.dot(weights, v, acc_more * decay[:, None], input_precision="ieee")
    return acc, acc_more, top, total


@jit(varying=("max_seqlen",))
def _attention_kernel(
    out_ptr: tl.tensor,  # (M, C)
    qkv_ptr: tl.tensor,  # (M, 3 C)
    q_desc: tl.tensor,  # a tensor map of boxes (BLOCK_M, PART) over qkv, or None
    kv_desc: tl.tensor,  # a tensor map of boxes (BLOCK_N, PART) over qkv, or None
    more_desc: tl.tensor,  # a tensor map of boxes (BLOCK_N, MORE) over qkv, or None
    cu_seqlens_ptr: tl.tensor,  # (B + 1,) int32, or None if all lengths are max_seqlen
    kv_lens_ptr: tl.tensor,  # (B,) int32, or None
    max_seqlen: int,  # in tokens
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

    # The queries of this program. Neighboring programs are tiles of the same head, which share K
    # and V in the L2 cache; then heads of the same sequence, which share its rows. Causal: the tile
    # with the most keys comes first.
    tiles = tl.cdiv(max_seqlen, BLOCK_M)
    pair = tl.program_id(0) // tiles
    tile = tl.program_id(0) - pair * tiles
    if CAUSAL:
        tile = tiles - 1 - tile
    sequence = pair // HEADS
    column = (pair - sequence * HEADS) * HEAD_DIM
    start = sequence * max_seqlen
    length = max_seqlen
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + sequence)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    first_query = tile * BLOCK_M
    if first_query >= length:
        return
    keys = length
    if kv_lens_ptr is not None:
        keys = tl.minimum(tl.load(kv_lens_ptr + sequence), length)

    # Load the queries. A tensor map also loads rows of the next sequence; their results are not
    # stored
    row = start + first_query
    rows = length - first_query
    q = load_tile(q_desc, qkv_ptr, row, column, rows, STRIDE, BLOCK_M, COLUMNS, PART)
    acc = tl.zeros((BLOCK_M, PART), dtype=tl.float32)
    q_more = q
    acc_more = tl.zeros((1,), dtype=tl.float32)
    if MORE > 0:
        column_more = column + PART
        q_more = load_tile(None, qkv_ptr, row, column_more, rows, STRIDE, BLOCK_M, REST, MORE)
        acc_more = tl.zeros((BLOCK_M, MORE), dtype=tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)

    # Full key tiles: first those that every query sees, then those that the diagonal crosses
    offs_m = tl.arange(0, BLOCK_M)
    full_tiles = keys // BLOCK_N
    unmasked = full_tiles
    if CAUSAL:
        unmasked = tl.minimum(full_tiles, first_query // BLOCK_N)
    for j in tl.range(0, unmasked):
        acc, acc_more, peak, total = _attend(
            acc, acc_more, peak, total, q, q_more, qkv_ptr, kv_desc, more_desc,
            start + j * BLOCK_N, column, None, None, WIDTH, HEAD_DIM, PART, MORE, BLOCK_N,
        )  # fmt: skip
    if CAUSAL:
        for j in tl.range(
            unmasked, tl.minimum(full_tiles, (first_query + BLOCK_M) // BLOCK_N), num_stages=1
        ):
            last_key = first_query - j * BLOCK_N + offs_m
            acc, acc_more, peak, total = _attend(
                acc, acc_more, peak, total, q, q_more, qkv_ptr, kv_desc, more_desc,
                start + j * BLOCK_N, column, None, last_key, WIDTH, HEAD_DIM, PART, MORE, BLOCK_N,
            )  # fmt: skip

    # The remaining keys, in the narrowest tile that holds them
    QUARTER: tl.constexpr = BLOCK_N // 4 if BLOCK_N > 32 else 16
    partial = keys - full_tiles * BLOCK_N
    row = start + full_tiles * BLOCK_N
    last_key = None
    if CAUSAL:
        last_key = first_query - full_tiles * BLOCK_N + offs_m
        if first_query + BLOCK_M <= full_tiles * BLOCK_N:
            partial = 0
    if partial > BLOCK_N // 2:
        acc, acc_more, peak, total = _attend(
            acc, acc_more, peak, total, q, q_more, qkv_ptr, None, None,
            row, column, partial, last_key, WIDTH, HEAD_DIM, PART, MORE, BLOCK_N,
        )  # fmt: skip
    elif partial > QUARTER:
        acc, acc_more, peak, total = _attend(
            acc, acc_more, peak, total, q, q_more, qkv_ptr, None, None,
            row, column, partial, last_key, WIDTH, HEAD_DIM, PART, MORE, BLOCK_N // 2,
        )  # fmt: skip
    elif partial > 0:
        acc, acc_more, peak, total = _attend(
            acc, acc_more, peak, total, q, q_more, qkv_ptr, None, None,
            row, column, partial, last_key, WIDTH, HEAD_DIM, PART, MORE, QUARTER,
        )  # fmt: skip

    # Divide and round. If kv_lens hides every key, the result is 0
    total = tl.where(total == 0.0, 1.0, total)
    out = out_ptr + ((start + first_query).to(tl.int64) * WIDTH + column) + offs_m[:, None] * WIDTH
    mask = (offs_m < rows)[:, None]
    offs_d = tl.arange(0, PART)[None, :]
    values = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out + offs_d, values, mask=mask & (offs_d < COLUMNS))
    if MORE > 0:
        offs_d = tl.arange(0, MORE)[None, :]
        values = (acc_more / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out + PART + offs_d, values, mask=mask & (offs_d < REST))


def attention_cost(
    *, out: Tensor, causal: bool, lengths: Sequence[int], **arguments: object
) -> Cost:
    """FLOPs of both products over the visible pairs of query and key in every sequence."""
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    return Cost(4 * out.shape[1] * pairs, traffic(out, *arguments.values()))


# -- the calls -------------------------------------------------------------------------------------


def _column_tiles(head_dim: int) -> tuple[int, int]:
    """The widths of two tiles that hold a head's columns, for example 64 and 16 for 80 columns.

    Each width is a power of two and at least 16; the second may be 0.
    """
    if head_dim > 64:
        return 64, max(16, 1 << (head_dim - 65).bit_length())
    return max(16, 1 << (head_dim - 1).bit_length()), 0


def check_heads(op: str, name: str, packed: Tensor, blocks: int, heads: int) -> int:
    """The head dim of ``packed`` (M, blocks C). Raises ValueError if the kernels do not take it."""
    if packed.dim() != 2 or heads < 1 or packed.shape[1] % (blocks * heads):
        raise ValueError(
            f"{op}: {name}: got shape {tuple(packed.shape)}, wanted (M, {blocks} x {heads} x E)"
        )
    head_dim = packed.shape[1] // (blocks * heads)
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: {name}: got heads of {head_dim} columns, wanted 1 to {MAX_HEAD_DIM}"
        )
    if packed.dtype not in FLOATS:
        raise ValueError(f"{op}: {name}: got {packed.dtype}, wanted one of {FLOATS}")
    check_tensor(f"{op}: {name}", packed, packed, packed.dtype, packed.shape)
    return head_dim


def check_sequences(op: str, cu_seqlens: Tensor, like: Tensor) -> int:
    """The number of sequences. Raises ValueError if the kernels do not take ``cu_seqlens``."""
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
    """The launch that computes `attention_ref`.

    Rows of a sequence past ``max_seqlen`` are not written.

    ``config`` replaces the configuration that the sizes would get. If ``kv_lens`` is 0, a query
    sees no key and gives 0, as in the reference. float32 is for the interpreter: its machine code
    spills. Raises ValueError for a shape, dtype or layout that the kernel does not take, and for
    ``kv_lens`` or ``equal_lengths`` with sequences of several lengths.
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
    part, more = _column_tiles(head_dim)
    sizes = f"{heads}x{head_dim} causal" if causal else f"{heads}x{head_dim}x{max_seqlen} full"
    key = config_key("attention", qkv.dtype, sizes)
    fixed = target, key, heads, head_dim, causal, max_seqlen
    config = config or attention_config(*fixed, tokens)
    if config.block_m % config.block_n:
        raise ValueError(f"attention: got {config}, wanted key tiles that divide the query tiles")
    block_m, block_n = config.block_m, config.block_n
    # a box must start at a multiple of 16 bytes, in every head
    tma = target.tma and fits_descriptor(qkv) and head_dim * qkv.element_size() % 16 == 0
    arguments = {
        "out_ptr": out,
        "qkv_ptr": qkv,
        "q_desc": descriptor(qkv, block_m, part) if tma and part <= head_dim else None,
        "kv_desc": descriptor(qkv, block_n, part) if tma else None,
        "more_desc": descriptor(qkv, block_n, more) if tma and more else None,
        "cu_seqlens_ptr": None if equal_lengths else cu_seqlens,
        "kv_lens_ptr": kv_lens,
        "max_seqlen": max_seqlen,
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
    return [Call(_attention_kernel, grid, arguments, config, key, tokens, ladder)]


ATTENTION = Operator("attention", attention_ref, attention_calls, attention_cost)
