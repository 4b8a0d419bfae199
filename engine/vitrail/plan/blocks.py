"""Transformer blocks and the end of a tower, as both towers' plans use them.

A block is five steps. The last block of a pooled plan is six: it computes keys and values of every
token, and everything else of one token for each sequence. An int8 linear after a LayerNorm has a
step before it, `norm_quant`, so a block whose linears are int8 is seven steps.
"""

from collections.abc import Sequence

from vitrail.plan.builder import TOKEN_ROWS, Builder, QuantizedRows
from vitrail.plan.plan import Buffer
from vitrail.spec import TextSpec, VisionSpec
from vitrail.weights.layout import hidden_columns


def add_block(
    build: Builder, layer: int, x: Buffer, out: Buffer, kv_lens: Buffer | None = None
) -> None:
    """Block ``layer``: residual stream ``x`` (M, C) -> ``out`` (M, C), which may be ``x``."""
    name = f"blocks.{layer}"
    qkv = build.per_token(f"{name}.qkv", 3 * build.spec.width)
    attended = build.per_token(f"{name}.attended")
    if build.spec.is_int8(layer, "qkv"):
        build.linear_int8(f"{name}.qkv", qkv, build.norm_quant(f"{name}.qkv", x))
    else:
        build.linear(f"{name}.qkv", qkv, x, norm=True)
    build.attention(f"{name}.attention", attended, qkv, kv_lens)
    _add_out(build, name, attended, x, out)
    if build.spec.is_int8(layer, "up"):
        _add_int8_mlp(build, layer, out)
    else:
        _add_mlp(build, name, out, build.per_token(f"{name}.hidden", build.spec.mlp))


def _scale(build: Builder, name: str) -> str | None:
    """The name of a LayerScale; None if the tower has none."""
    return f"{build.tower}.{name}" if build.spec.layer_scale else None


def _add_out(
    build: Builder,
    name: str,
    attended: Buffer,
    x: Buffer,
    out: Buffer,
    residual_rows: Buffer | None = None,
) -> None:
    """The output projection, added to the residual stream ``x``."""
    build.linear(
        f"{name}.out",
        out,
        attended,
        residual=x,
        residual_rows=residual_rows,
        scale=_scale(build, f"{name}.scale1"),
    )


def _add_mlp(build: Builder, name: str, stream: Buffer, hidden: Buffer) -> None:
    """The MLP, added to the residual stream."""
    activation, gated = build.spec.activation, build.spec.gated
    build.linear(f"{name}.up", hidden, stream, norm=True, activation=activation, gated=gated)
    scale = _scale(build, f"{name}.scale2")
    build.linear(f"{name}.down", stream, hidden, residual=stream, scale=scale)


def _add_int8_mlp(build: Builder, layer: int, stream: Buffer) -> None:
    """As `_add_mlp` with an int8 up projection. If the down projection is int8 too, the hidden
    layer is codes."""
    name, spec = f"blocks.{layer}", build.spec
    columns, scale = hidden_columns(spec, layer), _scale(build, f"{name}.scale2")
    rows = build.norm_quant(f"{name}.up", stream)
    activation, gated = spec.activation, spec.gated
    if not spec.is_int8(layer, "down"):
        hidden = build.per_token(f"{name}.hidden", columns)
        build.linear_int8(f"{name}.up", hidden, rows, activation=activation, gated=gated)
        build.linear(f"{name}.down", stream, hidden, residual=stream, scale=scale)
        return
    codes = build.per_token(f"{name}.hidden", columns, "int8")
    scales = build.group_scales(f"{name}.hidden.scales", columns)
    build.linear_int8(
        f"{name}.up", codes, rows, out_scale=scales, activation=activation, gated=gated
    )
    hidden_rows = QuantizedRows(codes, scales)
    build.linear_int8_grouped(f"{name}.down", stream, hidden_rows, residual=stream, scale=scale)


def add_pooled_blocks(build: Builder, x: Buffer) -> Buffer:
    """Every block over the residual stream ``x``. Returns the pooled tokens' stream (B, C)."""
    *full_blocks, layer = range(build.spec.layers)
    for full_block in full_blocks:
        add_block(build, full_block, x, x)
    name = f"blocks.{layer}"
    kv = build.per_token(f"{name}.kv", 2 * build.spec.width)
    q, attended = build.per_sequence(f"{name}.q"), build.per_sequence(f"{name}.attended")
    if build.spec.is_int8(layer, "qkv"):
        rows = build.norm_quant(f"{name}.kv", x, weights=f"{build.tower}.{name}.qkv")
        build.linear_int8(f"{name}.kv", kv, rows)
    else:
        build.linear(f"{name}.kv", kv, x, norm=True)
    build.linear(f"{name}.q", q, x, rows=TOKEN_ROWS, norm=True)
    build.attention_one(f"{name}.attention", attended, q, kv)
    pooled = build.per_sequence("pooled")
    _add_out(build, name, attended, x, pooled, TOKEN_ROWS)
    _add_mlp(build, name, pooled, build.per_sequence(f"{name}.hidden", build.spec.mlp))
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
