"""Transformer blocks and the end of a tower, as both towers' plans use them.

A block is five steps. The last block of a pooled plan is six: it computes keys and values of every
token, and everything else of one token for each sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

from vitrail.plan.builder import TOKEN_ROWS, Builder
from vitrail.plan.plan import PER_SEQUENCE, PER_TOKEN, Buffer
from vitrail.spec import BlockSpec, TextSpec, VisionSpec


def add_block(
    build: Builder,
    spec: BlockSpec,
    tower: str,
    layer: int,
    x: Buffer,
    out: Buffer,
    kv_lens: Buffer | None = None,
) -> None:
    """Block ``layer``: residual stream ``x`` (M, C) -> ``out`` (M, C), which may be ``x``."""
    name, width = f"{tower}.blocks.{layer}", spec.width
    qkv = Buffer(f"{name}.qkv", PER_TOKEN, 3 * width)
    attended = Buffer(f"{name}.attended", PER_TOKEN, width)
    build.linear(f"{name}.qkv", qkv, x, norm_eps=spec.eps)
    equal_lengths = tower == "vision"
    build.attention(
        f"{name}.attention", attended, qkv, spec, equal_lengths=equal_lengths, kv_lens=kv_lens
    )
    _add_mlp(build, spec, name, attended, x, out)


def _add_mlp(
    build: Builder,
    spec: BlockSpec,
    name: str,
    attended: Buffer,
    x: Buffer,
    out: Buffer,
    residual_rows: Buffer | None = None,
) -> None:
    """Output projection and MLP. Each is added to the residual stream."""
    hidden = Buffer(f"{name}.hidden", out.rows, spec.mlp)
    scale1, scale2 = (f"{name}.scale{n}" if spec.layer_scale else None for n in (1, 2))
    build.linear(
        f"{name}.out", out, attended, residual=x, residual_rows=residual_rows, scale=scale1
    )
    activation, gated = spec.activation, spec.gated
    build.linear(f"{name}.up", hidden, out, norm_eps=spec.eps, activation=activation, gated=gated)
    build.linear(f"{name}.down", out, hidden, residual=out, scale=scale2)


def add_pooled_blocks(build: Builder, spec: BlockSpec, tower: str, x: Buffer) -> Buffer:
    """Every block over the residual stream ``x``. Returns the pooled tokens' stream (B, C)."""
    layer, width = spec.layers - 1, spec.width
    for earlier in range(layer):
        add_block(build, spec, tower, earlier, x, x)
    name = f"{tower}.blocks.{layer}"
    kv = Buffer(f"{name}.kv", PER_TOKEN, 2 * width)
    q = Buffer(f"{name}.q", PER_SEQUENCE, width)
    attended = Buffer(f"{name}.attended", PER_SEQUENCE, width)
    pooled = Buffer(f"{tower}.pooled", PER_SEQUENCE, width)
    build.linear(f"{name}.kv", kv, x, norm_eps=spec.eps)
    build.linear(f"{name}.q", q, x, rows=TOKEN_ROWS, norm_eps=spec.eps)
    build.attention_one(f"{name}.attention", attended, spec, q=q, kv=kv)
    _add_mlp(build, spec, name, attended, x, pooled, residual_rows=TOKEN_ROWS)
    return pooled


def add_dense_blocks(
    build: Builder,
    spec: BlockSpec,
    tower: str,
    x: Buffer,
    taps: Sequence[int],
    kv_lens: Buffer | None = None,
) -> Buffer:
    """Every block over every token. Returns the residual stream after the last block.

    The input of block i stays in a buffer of its own for each i in ``taps``, and so does the result
    of the last block if ``taps`` has the number of blocks. Nothing is copied: the next block writes
    to another buffer.
    """
    for layer in range(spec.layers):
        out = x
        if layer + 1 in taps:
            out = Buffer(f"{tower}.hidden.{layer + 1}", PER_TOKEN, spec.width)
        elif layer in taps:
            out = Buffer(f"{tower}.stream.{layer + 1}", PER_TOKEN, spec.width)
        add_block(build, spec, tower, layer, x, out, kv_lens)
        x = out
    return x


def first_stream(spec: BlockSpec, tower: str, taps: Sequence[int]) -> Buffer:
    """The residual stream (M, C) before block 0, which is an output if 0 is in ``taps``."""
    name = f"{tower}.hidden.0" if 0 in taps else f"{tower}.stream.0"
    return Buffer(name, PER_TOKEN, spec.width)


def hidden_streams(spec: BlockSpec, tower: str, taps: Sequence[int]) -> list[Buffer]:
    """The buffers that `add_dense_blocks` keeps for ``taps``."""
    return [Buffer(f"{tower}.hidden.{tap}", PER_TOKEN, spec.width) for tap in taps]


def add_pool(
    build: Builder, spec: VisionSpec | TextSpec, tower: str, x: Buffer, rows: Buffer | None = None
) -> list[Buffer]:
    """Embedding (B, D) and status (B,) from ``rows`` of ``x``, or from all its rows."""
    out = Buffer(f"{tower}.embedding", PER_SEQUENCE, spec.embedding, "float32")
    status = Buffer(f"{tower}.status", PER_SEQUENCE, None, "int32")
    build.pool(
        f"{tower}.pool",
        out,
        status,
        x,
        rows=rows,
        eps=spec.blocks.eps,
        norm=f"{tower}.norm" if spec.projection is None else None,
        projection=None if spec.projection is None else f"{tower}.projection",
    )
    return [out, status]
