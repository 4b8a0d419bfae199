"""`VisionSpec` -> the plans of an image tower. Plans are cached by their arguments."""

import functools

from vitrail.plan.blocks import add_block, add_dense_blocks, add_pool, add_pooled_blocks
from vitrail.plan.builder import CU_SEQLENS, DISTILLATION_ROWS, TOKEN_ROWS, Builder
from vitrail.plan.plan import Affine, Buffer, Plan
from vitrail.spec import HeadSpec, VisionSpec
from vitrail.weights.layout import vision_layout


@functools.lru_cache(maxsize=256)
def vision_table(spec: VisionSpec, grid: tuple[int, int], *, uint8: bool) -> Plan:
    """-> ``vision.table`` (T, C) fp32: the part of every token that does not depend on pixels, for
    ``grid`` patches down and across. The table has the same size in every call."""
    build = Builder("vision", spec.blocks)
    rows = Affine(constant=spec.prefix + grid[0] * grid[1])
    table = Buffer("vision.table", rows, spec.blocks.width, "float32")
    build.position(table, spec, grid, f"{_patch_weight(uint8)}.bias")
    return build.finish("table", vision_layout(spec), [table])


@functools.lru_cache(maxsize=256)
def vision_pooled(spec: VisionSpec, *, uint8: bool) -> Plan:
    """Pixels -> ``vision.embedding`` (B, D) and ``vision.status`` (B,), and nothing else."""
    build, x = _embed(spec, uint8, "stream")
    outputs = add_pool(build, spec, add_pooled_blocks(build, x))
    return build.finish("pooled", vision_layout(spec), outputs)


@functools.lru_cache(maxsize=256)
def vision_scores(spec: VisionSpec, head: HeadSpec, *, uint8: bool) -> Plan:
    """Pixels -> ``vision.logits`` (B, labels) fp32, and nothing else."""
    build, x = _embed(spec, uint8, "stream", head)
    if head.features == "class":
        logits = _add_token_head(build, head, add_pooled_blocks(build, x))
    elif head.features == "class_mean":
        normalized = build.per_token("last")
        build.layernorm("norm", normalized, add_dense_blocks(build, x))
        logits = _add_class_mean_head(build, head, spec, normalized)
    else:
        *_, logits = _add_distilled_heads(build, head, add_dense_blocks(build, x), total=True)
    return build.finish("scores", vision_layout(spec, head), [logits])


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
    * ``vision.logits`` (B, labels) fp32, if there is a ``head``. A head with two classifiers gives
      ``vision.class_logits`` and ``vision.distillation_logits`` instead: half of each one's scores.
    """
    if spec.norm == "pooled":
        taps = tuple(sorted({*taps, spec.blocks.layers}))
    build, x = _embed(spec, uint8, "hidden.0" if 0 in taps else "stream.0", head)
    x = add_dense_blocks(build, x, taps)
    outputs = [build.per_token(f"hidden.{tap}") for tap in taps]
    if spec.norm == "pooled":
        outputs.append(build.per_sequence("pooler"))
        build.layernorm("norm", outputs[-1], x, TOKEN_ROWS)
        if spec.projection is not None:
            outputs += add_pool(build, spec, x, TOKEN_ROWS)
        return build.finish("dense", vision_layout(spec, head), outputs)
    normalized = build.per_token("last")
    build.layernorm("norm", normalized, x)
    outputs.append(normalized)
    if head is not None and head.features == "class":
        outputs.append(_add_token_head(build, head, x, TOKEN_ROWS))
    elif head is not None and head.features == "class_mean":
        outputs.append(_add_class_mean_head(build, head, spec, normalized))
    elif head is not None:
        outputs += _add_distilled_heads(build, head, x, total=False)
    if spec.pooler is not None:
        outputs.append(build.per_sequence("pooler", spec.pooler.width))
        activation = spec.pooler.activation
        build.linear("pooler", outputs[-1], normalized, rows=TOKEN_ROWS, activation=activation)
    return build.finish("dense", vision_layout(spec, head), outputs)


@functools.lru_cache(maxsize=256)
def vision_layers(spec: VisionSpec, taps: tuple[int, ...], norm: bool, uint8: bool = False) -> Plan:
    """Pixels -> ``vision.layer.<i>`` (M, C) for i in ``taps``: the stream after block i.

    With ``norm`` the final LayerNorm is applied to each. Nothing after the last tap is computed.
    """
    build, x = _embed(spec, uint8, "stream.0")
    for layer in range(max(taps) + 1):
        tapped, out = build.per_token(f"layer.{layer}"), x
        if layer in taps and not norm:
            out = tapped
        elif layer - 1 in taps and not norm:
            out = build.per_token(f"stream.{layer + 1}")
        add_block(build, layer, x, out)
        x = out
        if layer in taps and norm:
            build.layernorm(f"layer.{layer}", tapped, x, weights="vision.norm")
    outputs = [build.per_token(f"layer.{tap}") for tap in taps]
    return build.finish("layers", vision_layout(spec), outputs)


def _patch_weight(uint8: bool) -> str:
    """The name of the patch projection. That for uint8 pixels contains their normalization."""
    return f"vision.patch.{'uint8' if uint8 else 'float'}"


def _embed(
    spec: VisionSpec, uint8: bool, stream: str, head: HeadSpec | None = None
) -> tuple[Builder, Buffer]:
    """A builder whose first steps embed the pixels, and the residual stream that they write."""
    patches = Affine(sequences=-spec.prefix, tokens=1)
    pixels = Buffer("pixels", patches, spec.patch_values, "uint8" if uint8 else "float32")
    table = Buffer("table", Affine(longest=1), spec.blocks.width, "float32")
    inputs = [pixels, table, CU_SEQLENS, TOKEN_ROWS]
    if head is not None and head.features == "class_distillation":
        inputs.append(DISTILLATION_ROWS)
    build = Builder("vision", spec.blocks, inputs)
    x = build.per_token(stream)
    build.patch_embed(x, spec, pixels, table, _patch_weight(uint8))
    if spec.pre_norm:
        build.layernorm("pre_norm", x, x)
    return build, x


def _add_token_head(
    build: Builder,
    head: HeadSpec,
    x: Buffer,
    rows: Buffer | None = None,
    name: str = "head",
    out: str = "logits",
    residual: Buffer | None = None,
) -> Buffer:
    """Class scores from one token of each sequence; the final LayerNorm is folded in."""
    logits = build.per_sequence(out, len(head.labels), "float32")
    build.linear(name, logits, x, rows=rows, norm=True, residual=residual, weights=name)
    return logits


def _add_distilled_heads(build: Builder, head: HeadSpec, x: Buffer, total: bool) -> list[Buffer]:
    """The scores of the class token's classifier, then of the distillation token's. The packed
    weights halve both. With ``total`` the second output is their sum, the mean of the classifiers.
    """
    by_class = _add_token_head(build, head, x, TOKEN_ROWS, "head.class", "class_logits")
    out, residual = ("logits", by_class) if total else ("distillation_logits", None)
    by_distillation = _add_token_head(
        build, head, x, DISTILLATION_ROWS, "head.distillation", out, residual
    )
    return [by_class, by_distillation]


def _add_class_mean_head(
    build: Builder, head: HeadSpec, spec: VisionSpec, normalized: Buffer
) -> Buffer:
    """Class scores from the normalized class token and the mean of the patch tokens."""
    logits = build.per_sequence("logits", len(head.labels), "float32")
    features = build.per_sequence("features", 2 * spec.blocks.width)
    build.class_mean("features", features, normalized, spec.prefix)
    build.linear("head", logits, features, weights="head")
    return logits
