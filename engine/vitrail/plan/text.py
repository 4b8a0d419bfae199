"""`TextSpec` -> the plans of a text tower. Plans are cached by their arguments."""

import functools

from vitrail.plan.blocks import add_dense_blocks, add_pool, add_pooled_blocks
from vitrail.plan.builder import CU_SEQLENS, KV_LENS, TOKEN_ROWS, Builder
from vitrail.plan.plan import PER_TOKEN, Buffer, Plan
from vitrail.spec import TextSpec
from vitrail.weights.layout import text_layout

IDS = Buffer("ids", PER_TOKEN, None, "int32")
POSITIONS = Buffer("positions", PER_TOKEN, None, "int32")
INPUTS = (IDS, POSITIONS, CU_SEQLENS, TOKEN_ROWS)


@functools.lru_cache(maxsize=256)
def text_pooled(spec: TextSpec) -> Plan:
    """Packed ids, cut at the pooled token -> ``text.embedding`` (B, D), ``text.status`` (B,)."""
    build = Builder("text", spec.blocks, INPUTS)
    x = build.per_token("stream")
    build.text_embed(x, IDS, POSITIONS)
    outputs = add_pool(build, spec, add_pooled_blocks(build, x))
    return build.finish("pooled", text_layout(spec), outputs)


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
    build = Builder("text", spec.blocks, (*INPUTS, KV_LENS) if masked else INPUTS)
    x = build.per_token("hidden.0" if 0 in taps else "stream.0")
    build.text_embed(x, IDS, POSITIONS)
    x = add_dense_blocks(build, x, taps, KV_LENS if masked else None)
    normalized, pooler = build.per_token("last"), build.per_sequence("pooler")
    build.layernorm("norm", normalized, x)
    build.layernorm("pooler", pooler, x, TOKEN_ROWS, weights="text.norm")
    outputs = [*(build.per_token(f"hidden.{tap}") for tap in taps), normalized, pooler]
    if spec.projection is not None:
        outputs += add_pool(build, spec, x, TOKEN_ROWS)
    return build.finish("dense", text_layout(spec), outputs)
