"""Transformer blocks and the end of a tower, as both towers' plans use them.

A block is five steps. The last block of a pooled plan is six: it computes keys and values of every
token, and everything else of one token for each sequence.
"""

from collections.abc import Sequence

from vitrail.plan.builder import TOKEN_ROWS, Builder
from vitrail.plan.plan import Buffer
from vitrail.spec import TextSpec, VisionSpec


def add_block(
    build: Builder, layer: int, x: Buffer, out: Buffer, kv_lens: Buffer | None = None
) -> None:
    """Block ``layer``: residual stream ``x`` (M, C) -> ``out`` (M, C), which may be ``x``."""
    name = f"blocks.{layer}"
    qkv = build.per_token(f"{name}.qkv", 3 * build.spec.width)
    attended = build.per_token(f"{name}.attended")
    build.linear(f"{name}.qkv", qkv, x, norm=True)
    build.attention(f"{name}.attention", attended, qkv, kv_lens)
    hidden = build.per_token(f"{name}.hidden", build.spec.mlp)
    _add_mlp(build, name, attended, x, out, hidden)


def _add_mlp(
    build: Builder,
    name: str,
    attended: Buffer,
    x: Buffer,
    out: Buffer,
    hidden: Buffer,
    residual_rows: Buffer | None = None,
) -> None:
    """Output projection and MLP. Each is added to the residual stream."""
    spec = build.spec
    scales = [f"{build.tower}.{name}.scale{n}" if spec.layer_scale else None for n in (1, 2)]
    build.linear(
        f"{name}.out", out, attended, residual=x, residual_rows=residual_rows, scale=scales[0]
    )
    activation, gated = spec.activation, spec.gated
    build.linear(f"{name}.up", hidden, out, norm=True, activation=activation, gated=gated)
    build.linear(f"{name}.down", out, hidden, residual=out, scale=scales[1])


def add_pooled_blocks(build: Builder, x: Buffer) -> Buffer:
    """Every block over the residual stream ``x``. Returns the pooled tokens' stream (B, C)."""
    *full_blocks, layer = range(build.spec.layers)
    for full_block in full_blocks:
        add_block(build, full_block, x, x)
    name = f"blocks.{layer}"
    kv = build.per_token(f"{name}.kv", 2 * build.spec.width)
    q, attended = build.per_sequence(f"{name}.q"), build.per_sequence(f"{name}.attended")
    build.linear(f"{name}.kv", kv, x, norm=True)
    build.linear(f"{name}.q", q, x, rows=TOKEN_ROWS, norm=True)
    build.attention_one(f"{name}.attention", attended, q, kv)
    pooled = build.per_sequence("pooled")
    hidden = build.per_sequence(f"{name}.hidden", build.spec.mlp)
    _add_mlp(build, name, attended, x, pooled, hidden, TOKEN_ROWS)
    return pooled


def add_dense_blocks(
    build: Builder, x: Buffer, taps: Sequence[int] = (), kv_lens: Buffer | None = None
) -> Buffer:
    """Every block over every token. Returns the residual stream after the last block.

    The buffer ``hidden.<i>`` keeps the stream before block i for each i in ``taps``, or the result
    if i is the number of blocks. Nothing is copied: the next block writes to another buffer.
    """
    for layer in range(build.spec.layers):
        out = x
        if layer + 1 in taps:
            out = build.per_token(f"hidden.{layer + 1}")
        elif layer in taps:
            out = build.per_token(f"stream.{layer + 1}")
        add_block(build, layer, x, out, kv_lens)
        x = out
    return x


def add_pool(
    build: Builder, spec: VisionSpec | TextSpec, x: Buffer, rows: Buffer | None = None
) -> list[Buffer]:
    """Embedding (B, D) and status (B,) from ``rows`` of ``x``, or from all its rows."""
    out = build.per_sequence("embedding", spec.embedding, "float32")
    status = Buffer(f"{build.tower}.status", out.rows, None, "int32")
    build.pool(out, status, x, rows, projected=spec.projection is not None)
    return [out, status]
