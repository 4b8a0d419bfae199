"""`VisionSpec` -> the plans of an image tower. Plans are cached by their arguments."""

from __future__ import annotations

import functools

from vitrail.plan.blocks import (
    add_block,
    add_dense_blocks,
    add_pool,
    add_pooled_blocks,
    first_stream,
    hidden_streams,
)
from vitrail.plan.builder import CU_SEQLENS, DISTILLATION_ROWS, TOKEN_ROWS, Builder
from vitrail.plan.plan import PER_SEQUENCE, PER_TOKEN, Affine, Buffer, Plan
from vitrail.spec import HeadSpec, VisionSpec
from vitrail.weights.layout import vision_layout


@functools.lru_cache(maxsize=256)
def vision_table(spec: VisionSpec, grid: tuple[int, int], *, uint8: bool) -> Plan:
    """-> ``vision.table`` (T, C) fp32: the summand of every token that does not depend on its
    pixels, for ``grid`` patches down and across. Its size is the same for every call."""
    build, width = Builder(), spec.blocks.width
    rows = Affine(constant=spec.prefix + grid[0] * grid[1])
    table = Buffer("vision.table", rows, width, "float32")
    build.position("vision.position", table, spec, grid=grid, bias=f"{_patch_weight(uint8)}.bias")
    return build.finish("vision.table", vision_layout(spec), [table])


@functools.lru_cache(maxsize=256)
def vision_pooled(spec: VisionSpec, *, uint8: bool) -> Plan:
    """Pixels -> ``vision.embedding`` (B, D) and ``vision.status`` (B,), and nothing else."""
    x = Buffer("vision.stream", PER_TOKEN, spec.blocks.width)
    build = _embedded(spec, uint8, x)
    pooled = add_pooled_blocks(build, spec.blocks, "vision", x)
    outputs = add_pool(build, spec, "vision", pooled)
    return build.finish("vision.pooled", vision_layout(spec), outputs)


@functools.lru_cache(maxsize=256)
def vision_scores(spec: VisionSpec, head: HeadSpec, *, uint8: bool) -> Plan:
    """Pixels -> ``vision.logits`` (B, labels) fp32, and nothing else."""
    x = Buffer("vision.stream", PER_TOKEN, spec.blocks.width)
    build = _embedded(spec, uint8, x, head)
    if head.features == "class":
        pooled = add_pooled_blocks(build, spec.blocks, "vision", x)
        logits = _add_token_head(build, head, spec, pooled)
        return build.finish("vision.scores", vision_layout(spec, head), [logits])
    x = add_dense_blocks(build, spec.blocks, "vision", x, taps=())
    if head.features == "class_mean":
        logits = _add_class_mean_head(build, head, spec, _add_norm(build, spec, x))
    else:
        (logits,) = _add_distilled_heads(build, head, spec, x, total=True)
    return build.finish("vision.scores", vision_layout(spec, head), [logits])


@functools.lru_cache(maxsize=256)
def vision_dense(
    spec: VisionSpec,
    head: HeadSpec | None = None,
    *,
    uint8: bool = False,
    taps: tuple[int, ...] = (),
) -> Plan:
    """Pixels -> everything that ``forward`` returns for an image tower.

    * ``vision.hidden.<i>`` (M, C) for i in ``taps``: the residual stream before block i, or after
      the last block.
    * ``vision.last`` (M, C): the final LayerNorm of every token, if the spec has norm "tokens".
    * ``vision.pooler`` (B, C) or (B, P).
    * ``vision.embedding`` (B, D) and ``vision.status`` (B,), if the spec has a projection.
    * ``vision.logits`` (B, labels) fp32, if there is a ``head``. If it has two classifiers,
      ``vision.class_logits`` and ``vision.distillation_logits``, half the scores of each.
    """
    blocks = spec.blocks
    if spec.norm == "pooled":
        taps = tuple(sorted({*taps, blocks.layers}))
    x = first_stream(blocks, "vision", taps)
    build = _embedded(spec, uint8, x, head)
    x = add_dense_blocks(build, blocks, "vision", x, taps)
    outputs = hidden_streams(blocks, "vision", taps)
    if spec.norm == "pooled":
        pooler = Buffer("vision.pooler", PER_SEQUENCE, blocks.width)
        build.layernorm("vision.norm", pooler, x, rows=TOKEN_ROWS, eps=blocks.eps)
        outputs.append(pooler)
        if spec.projection is not None:
            outputs += add_pool(build, spec, "vision", x, TOKEN_ROWS)
        return build.finish("vision.dense", vision_layout(spec, head), outputs)
    normalized = _add_norm(build, spec, x)
    outputs.append(normalized)
    if head is not None and head.features == "class":
        outputs.append(_add_token_head(build, head, spec, x, TOKEN_ROWS))
    elif head is not None and head.features == "class_mean":
        outputs.append(_add_class_mean_head(build, head, spec, normalized))
    elif head is not None:
        outputs += _add_distilled_heads(build, head, spec, x, total=False)
    if spec.pooler is not None:
        pooler = Buffer("vision.pooler", PER_SEQUENCE, spec.pooler.width)
        activation = spec.pooler.activation
        build.linear("vision.pooler", pooler, normalized, rows=TOKEN_ROWS, activation=activation)
        outputs.append(pooler)
    return build.finish("vision.dense", vision_layout(spec, head), outputs)


@functools.lru_cache(maxsize=256)
def vision_layers(spec: VisionSpec, taps: tuple[int, ...], norm: bool, uint8: bool = False) -> Plan:
    """Pixels -> ``vision.layer.<i>`` (M, C) for i in ``taps``: the stream after block i.

    With ``norm`` the final LayerNorm is applied to each. Nothing after the last tap is computed.
    """
    blocks = spec.blocks
    x = first_stream(blocks, "vision", ())
    build = _embedded(spec, uint8, x)
    outputs = []
    for layer in range(max(taps) + 1):
        tapped = Buffer(f"vision.layer.{layer}", PER_TOKEN, blocks.width)
        out = x
        if layer in taps and not norm:
            out = tapped
        elif layer - 1 in taps and not norm:
            out = Buffer(f"vision.stream.{layer + 1}", PER_TOKEN, blocks.width)
        add_block(build, blocks, "vision", layer, x, out)
        x = out
        if layer in taps:
            outputs.append(tapped)
            if norm:
                build.layernorm(tapped.name, tapped, x, eps=blocks.eps, weights="vision.norm")
    return build.finish("vision.layers", vision_layout(spec), outputs)


def _patch_weight(uint8: bool) -> str:
    """uint8 pixels are normalized by the weights, so each dtype of pixels has its own."""
    return f"vision.patch.{'uint8' if uint8 else 'float'}"


def _embedded(spec: VisionSpec, uint8: bool, out: Buffer, head: HeadSpec | None = None) -> Builder:
    """A builder whose first steps embed the pixels in ``out``."""
    patches = Affine(sequences=-spec.prefix, tokens=1)
    pixels = Buffer("pixels", patches, spec.patch_values, "uint8" if uint8 else "float32")
    table = Buffer("table", Affine(longest=1), spec.blocks.width, "float32")
    inputs = [pixels, table, CU_SEQLENS, TOKEN_ROWS]
    if head is not None and head.features == "class_distillation":
        inputs.append(DISTILLATION_ROWS)
    build = Builder(inputs)
    build.patch_embed(
        "vision.patch_embed", out, spec, pixels=pixels, table=table, weight=_patch_weight(uint8)
    )
    if spec.pre_norm:
        build.layernorm("vision.pre_norm", out, out, eps=spec.blocks.eps)
    return build


def _add_norm(build: Builder, spec: VisionSpec, x: Buffer) -> Buffer:
    """The final LayerNorm of every token."""
    normalized = Buffer("vision.last", PER_TOKEN, spec.blocks.width)
    build.layernorm("vision.norm", normalized, x, eps=spec.blocks.eps)
    return normalized


def _add_token_head(
    build: Builder,
    head: HeadSpec,
    spec: VisionSpec,
    x: Buffer,
    rows: Buffer | None = None,
    *,
    weights: str = "head",
    out: str = "vision.logits",
    residual: Buffer | None = None,
) -> Buffer:
    """Class scores from a token of the residual stream, the final LayerNorm folded in."""
    logits = Buffer(out, PER_SEQUENCE, len(head.labels), "float32")
    build.linear(
        f"vision.{weights}",
        logits,
        x,
        rows=rows,
        norm_eps=spec.blocks.eps,
        residual=residual,
        weights=weights,
    )
    return logits


def _add_distilled_heads(
    build: Builder, head: HeadSpec, spec: VisionSpec, x: Buffer, total: bool
) -> list[Buffer]:
    """Half the class scores from the class token and half those from the distillation token, or
    with ``total`` their sum alone. The weights are halves, so the sum is the mean of both."""
    first = _add_token_head(
        build, head, spec, x, TOKEN_ROWS, weights="head.class", out="vision.class_logits"
    )
    second = _add_token_head(
        build,
        head,
        spec,
        x,
        DISTILLATION_ROWS,
        weights="head.distillation",
        out="vision.logits" if total else "vision.distillation_logits",
        residual=first if total else None,
    )
    return [second] if total else [first, second]


def _add_class_mean_head(
    build: Builder, head: HeadSpec, spec: VisionSpec, normalized: Buffer
) -> Buffer:
    """Class scores from the normalized class token and the mean of the patch tokens."""
    logits = Buffer("vision.logits", PER_SEQUENCE, len(head.labels), "float32")
    features = Buffer("vision.features", PER_SEQUENCE, 2 * spec.blocks.width)
    build.class_mean("vision.features", features, normalized, prefix=spec.prefix)
    build.linear("vision.head", logits, features, weights="head")
    return logits
