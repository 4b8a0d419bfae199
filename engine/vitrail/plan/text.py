"""`TextSpec` -> the plans of a text tower. Plans are cached by their arguments."""

from __future__ import annotations

import functools

from vitrail.plan.blocks import (
    add_dense_blocks,
    add_pool,
    add_pooled_blocks,
    first_stream,
    hidden_streams,
)
from vitrail.plan.builder import CU_SEQLENS, KV_LENS, TOKEN_ROWS, Builder
from vitrail.plan.plan import PER_SEQUENCE, PER_TOKEN, Buffer, Plan
from vitrail.spec import TextSpec
from vitrail.weights.layout import text_layout


@functools.lru_cache(maxsize=256)
def text_pooled(spec: TextSpec) -> Plan:
    """Packed ids, cut at the pooled token -> ``text.embedding`` (B, D), ``text.status`` (B,)."""
    x = Buffer("text.stream", PER_TOKEN, spec.blocks.width)
    build = _embedded(x)
    pooled = add_pooled_blocks(build, spec.blocks, "text", x)
    outputs = add_pool(build, spec, "text", pooled)
    return build.finish("text.pooled", text_layout(spec), outputs)


@functools.lru_cache(maxsize=256)
def text_dense(spec: TextSpec, *, taps: tuple[int, ...] = (), masked: bool = False) -> Plan:
    """Token ids of equally long rows -> everything that ``forward`` returns for a text tower.

    * ``text.hidden.<i>`` (M, C) for i in ``taps``: the residual stream before block i, or after
      the last block.
    * ``text.last`` (M, C): the final LayerNorm of every token; ``text.pooler`` (B, C) its pooled
      rows.
    * ``text.embedding`` (B, D) and ``text.status`` (B,), if the spec has a projection.

    ``masked``: the plan has another input, ``kv_lens`` (B,), the number of tokens in each row that
    the attention mask lets through.
    """
    blocks = spec.blocks
    kv_lens = KV_LENS if masked else None
    x = first_stream(blocks, "text", taps)
    build = _embedded(x, kv_lens)
    x = add_dense_blocks(build, blocks, "text", x, taps, kv_lens)
    normalized = Buffer("text.last", PER_TOKEN, blocks.width)
    pooler = Buffer("text.pooler", PER_SEQUENCE, blocks.width)
    build.layernorm("text.norm", normalized, x, eps=blocks.eps)
    build.layernorm("text.pooler", pooler, x, rows=TOKEN_ROWS, eps=blocks.eps, weights="text.norm")
    outputs = [*hidden_streams(blocks, "text", taps), normalized, pooler]
    if spec.projection is not None:
        outputs += add_pool(build, spec, "text", x, TOKEN_ROWS)
    return build.finish("text.dense", text_layout(spec), outputs)


def _embedded(out: Buffer, kv_lens: Buffer | None = None) -> Builder:
    """A builder whose first step embeds token ids in ``out``."""
    ids = Buffer("ids", PER_TOKEN, None, "int32")
    positions = Buffer("positions", PER_TOKEN, None, "int32")
    inputs = [ids, positions, CU_SEQLENS, TOKEN_ROWS]
    build = Builder(inputs if kv_lens is None else [*inputs, kv_lens])
    build.text_embed("text.embed", out, ids=ids, positions=positions)
    return build
