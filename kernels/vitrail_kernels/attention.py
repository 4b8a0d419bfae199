"""attention: out = softmax2(Q K^T) V per head and sequence, over packed sequences

    softmax2  base two: the scale head_dim^-0.5 and log2(e) are folded into Q's weights
    FLOPs     4 E sum(T_q T_k) per head (half of that where causal)     bytes  M (3 C + C)
    bound     by the exponential unit at a few hundred tokens, by the tensor cores above

attention_one: the same for one query a sequence (the pooled token), bound by the read of K and V.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail_kernels.cost import Cost, traffic

_LN2 = math.log(2.0)


def _sdpa(
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
    out = _sdpa(q, k, v, mask, causal and mask is None)
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
) -> None:
    """Write ``out`` (M, C) from ``qkv`` (M, 3 C): query, key and value, heads inside each.

    Sequence i holds rows ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]`` (B + 1, int32), none longer
    than ``max_seqlen``. ``kv_lens`` (B,): only the first that many keys of each sequence are seen
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
        out.index_copy_(0, index, part.view(len(index), -1))


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


def attention_one_ref(
    out: Tensor, q: Tensor, kv: Tensor, cu_seqlens: Tensor, *, heads: int, max_seqlen: int
) -> None:
    """Write ``out`` (B, C): one query a sequence, ``q`` (B, C), over keys of ``kv`` (M, 2 C)."""
    batch, width = q.shape
    if batch == 0:
        return
    head_dim = width // heads
    query = q.view(batch, 1, heads, head_dim).transpose(1, 2)
    if kv.shape[0] == batch * max_seqlen:
        k, v = kv.view(batch, max_seqlen, 2, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        out.view(batch, 1, heads, head_dim).copy_(_sdpa(query, k, v).transpose(1, 2))
        return
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    for length in torch.unique(lengths).tolist():
        members = torch.nonzero(lengths == length).flatten()
        index = starts[members][:, None] + torch.arange(length, device=kv.device)
        part = kv.index_select(0, index.flatten()).view(len(members), length, 2, heads, head_dim)
        k, v = part.permute(2, 0, 3, 1, 4).unbind(0)
        result = _sdpa(query.index_select(0, members), k, v)
        out.index_copy_(0, members, result.transpose(1, 2).reshape(len(members), width))


def attention_one_cost(
    out: Tensor, q: Tensor, kv: Tensor, cu_seqlens: Tensor, *, lengths: Sequence[int], **_: object
) -> Cost:
    """FLOPs of one query against every key of its sequence."""
    return Cost(4 * out.shape[1] * sum(lengths), traffic(out, q, kv, cu_seqlens))
