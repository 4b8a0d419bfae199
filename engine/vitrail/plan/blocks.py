"""spec -> Plan: pooled, dense and layer plans of the image and the text tower, position tables.

A full transformer block is five steps; the pooled plans' last block is six, for one token a
sequence. Plans are cached by spec.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from vitrail.plan.plan import MAX_SEQLEN, Affine, Builder, Plan
from vitrail.spec import BlockSpec, HeadSpec, TextSpec, VisionSpec
from vitrail.weights.layout import text_layout, vision_layout

PER_SEQUENCE = Affine(sequences=1)
PER_TOKEN = Affine(tokens=1)


def _folded(name: str) -> dict[str, str | None]:
    """The weights of a linear with LayerNorm folded in."""
    return {"weight": f"{name}.weight", "bias": f"{name}.bias", "row_sums": f"{name}.sums"}


def _block(
    build: Builder, spec: BlockSpec, tower: str, layer: int, x: str, out: str, masked: bool
) -> None:
    """Five steps: residual stream ``x`` -> ``out`` (M, C), which may be one buffer."""
    name, c = f"{tower}.blocks.{layer}", spec.width
    qkv = build.buffer(f"{name}.qkv", PER_TOKEN, 3 * c)
    attended = build.buffer(f"{name}.attended", PER_TOKEN, c)
    hidden = build.buffer(f"{name}.hidden", PER_TOKEN, spec.mlp)
    build.launch(
        "linear",
        f"{name}.qkv",
        {"out": qkv, "x": x, "x_stats": build.stats(x)},
        _folded(f"{name}.qkv"),
        norm_eps=spec.eps,
    )
    build.launch(
        "attention",
        f"{name}.attention",
        {
            "out": attended,
            "qkv": qkv,
            "cu_seqlens": "cu_seqlens",
            "kv_lens": "kv_lens" if masked else None,
        },
        heads=spec.heads,
        causal=spec.causal,
        max_seqlen=MAX_SEQLEN,
        equal_lengths=tower == "vision",
    )
    _tail(build, spec, name, attended, x, out, hidden)


def _tail(
    build: Builder,
    spec: BlockSpec,
    name: str,
    attended: str,
    x: str,
    out: str,
    hidden: str,
    rows: str | None = None,
) -> None:
    """Three steps: output projection and MLP, each added to the residual stream."""
    build.launch(
        "linear",
        f"{name}.out",
        {
            "out": out,
            "x": attended,
            "residual": x,
            "residual_rows": rows,
            "stats": build.stats(out),
        },
        {
            "weight": f"{name}.out.weight",
            "bias": f"{name}.out.bias",
            "scale": f"{name}.scale1" if spec.layer_scale else None,
        },
    )
    build.launch(
        "linear",
        f"{name}.up",
        {"out": hidden, "x": out, "x_stats": build.stats(out)},
        _folded(f"{name}.up"),
        norm_eps=spec.eps,
        activation=spec.activation,
        gated=spec.gated,
    )
    build.launch(
        "linear",
        f"{name}.down",
        {"out": out, "x": hidden, "residual": out, "stats": build.stats(out)},
        {
            "weight": f"{name}.down.weight",
            "bias": f"{name}.down.bias",
            "scale": f"{name}.scale2" if spec.layer_scale else None,
        },
    )


def _pooled_blocks(build: Builder, spec: BlockSpec, tower: str, x: str) -> str:
    """Every block; the last, in six steps, for one token a sequence, whose stream (B, C) it
    returns."""
    layer, c = spec.layers - 1, spec.width
    for before in range(layer):
        _block(build, spec, tower, before, x, x, masked=False)
    name = f"{tower}.blocks.{layer}"
    kv = build.buffer(f"{name}.kv", PER_TOKEN, 2 * c)
    q = build.buffer(f"{name}.q", PER_SEQUENCE, c)
    attended = build.buffer(f"{name}.attended", PER_SEQUENCE, c)
    pooled = build.buffer(f"{tower}.pooled", PER_SEQUENCE, c)
    hidden = build.buffer(f"{name}.hidden", PER_SEQUENCE, spec.mlp)
    for part, out, rows in (("kv", kv, None), ("q", q, "token_rows")):
        build.launch(
            "linear",
            f"{name}.{part}",
            {"out": out, "x": x, "rows": rows, "x_stats": build.stats(x)},
            _folded(f"{name}.{part}"),
            norm_eps=spec.eps,
        )
    build.launch(
        "attention_one",
        f"{name}.attention",
        {"out": attended, "q": q, "kv": kv, "cu_seqlens": "cu_seqlens"},
        heads=spec.heads,
        max_seqlen=MAX_SEQLEN,
    )
    _tail(build, spec, name, attended, x, pooled, hidden, rows="token_rows")
    return pooled


def _layernorm(
    build: Builder,
    label: str,
    norm: str,
    out: str,
    x: str,
    eps: float,
    rows: str | None = None,
    stats: str | None = None,
) -> None:
    """``norm`` is the canonical name of the LayerNorm, without ``.weight``."""
    build.launch(
        "layernorm",
        label,
        {"out": out, "x": x, "rows": rows, "stats": stats},
        {"gamma": f"{norm}.weight", "beta": f"{norm}.bias"},
        eps=eps,
    )


def _pool(
    build: Builder,
    spec: VisionSpec | TextSpec,
    tower: str,
    x: str,
    rows: str | None,
) -> list[str]:
    """Embedding (B, D) and status from ``rows`` of ``x``, None where they are already picked."""
    out = build.buffer(f"{tower}.embedding", PER_SEQUENCE, spec.embedding, "float32")
    status = build.buffer(f"{tower}.status", PER_SEQUENCE, None, "int32")
    if spec.projection is None:
        weights = {"gamma": f"{tower}.norm.weight", "beta": f"{tower}.norm.bias"}
    else:
        weights = {"weight": f"{tower}.projection.folded", "bias": f"{tower}.projection.bias"}
    build.launch(
        "pool",
        f"{tower}.pool",
        {"out": out, "status": status, "x": x, "rows": rows},
        {**weights},
        eps=spec.blocks.eps,
    )
    return [out, status]


def _embed_pixels(build: Builder, spec: VisionSpec, uint8: bool, x: str) -> None:
    kind = "uint8" if uint8 else "float"
    pixels = Affine(sequences=-spec.prefix, tokens=1)
    build.buffer("pixels", pixels, spec.patch_values, "uint8" if uint8 else "float32")
    build.buffer("table", Affine(longest=1), spec.blocks.width, "float32")
    build.launch(
        "patch_embed",
        "vision.patch_embed",
        {
            "out": x,
            "pixels": "pixels",
            "table": "table",
            "stats": None if spec.pre_norm else build.stats(x),
        },
        {"weight": f"vision.patch.{kind}"},
        patch=spec.patch,
        channels=spec.channels,
        prefix=spec.prefix,
    )
    if spec.pre_norm:
        _layernorm(
            build, "vision.pre_norm", "vision.pre_norm", x, x, spec.blocks.eps, None, build.stats(x)
        )


def _embed_ids(build: Builder, x: str) -> None:
    build.buffer("ids", PER_TOKEN, None, "int32")
    build.buffer("positions", PER_TOKEN, None, "int32")
    build.launch(
        "text_embed",
        "text.embed",
        {"out": x, "ids": "ids", "positions": "positions", "stats": build.stats(x)},
        {"token": "text.token", "position": "text.position"},
    )


@functools.lru_cache(maxsize=256)
def vision_table(spec: VisionSpec, target: tuple[int, int], *, uint8: bool) -> Plan:
    """-> ``vision.table`` (T, C) fp32, of ``target`` patches down and across: what is added to
    every token beside its pixels. Its size does not depend on the sizes of the call."""
    build, kind = Builder(), "uint8" if uint8 else "float"
    rows = Affine(constant=spec.prefix + target[0] * target[1])
    table = build.buffer("vision.table", rows, spec.blocks.width, "float32")
    build.launch(
        "position",
        "vision.position",
        {"out": table},
        {
            "table": "vision.position",
            "prefix": "vision.prefix",
            "bias": f"vision.patch.{kind}.bias",
        },
        table_grid=spec.grid,
        grid=target,
        antialias=spec.position_antialias,
    )
    return build.finish("vision.table", vision_layout(spec), (), [table])


_VISION_INPUTS = ("pixels", "table", "cu_seqlens", "token_rows")
_TEXT_INPUTS = ("ids", "positions", "cu_seqlens", "token_rows")


@functools.lru_cache(maxsize=256)
def vision_pooled(spec: VisionSpec, *, uint8: bool) -> Plan:
    """Pixels -> ``vision.embedding`` (B, D) and ``vision.status`` (B,), and nothing else."""
    build = Builder()
    x = build.buffer("vision.stream", PER_TOKEN, spec.blocks.width)
    _embed_pixels(build, spec, uint8, x)
    x = _pooled_blocks(build, spec.blocks, "vision", x)
    outputs = _pool(build, spec, "vision", x, rows=None)
    return build.finish("vision.pooled", vision_layout(spec), _VISION_INPUTS, outputs)


@functools.lru_cache(maxsize=256)
def vision_scores(spec: VisionSpec, head: HeadSpec, *, uint8: bool) -> Plan:
    """Pixels -> ``vision.logits`` (B, labels) fp32, and nothing else."""
    build, blocks = Builder(), spec.blocks
    x = build.buffer("vision.stream", PER_TOKEN, blocks.width)
    _embed_pixels(build, spec, uint8, x)
    if head.features == "class":
        x = _pooled_blocks(build, blocks, "vision", x)
        logits = _class_head(build, head, spec, x, rows=None)
    else:
        x = _dense_blocks(build, blocks, "vision", x, (), blocks.layers, masked=False)
        last = build.buffer("vision.last", PER_TOKEN, blocks.width)
        _layernorm(build, "vision.norm", "vision.norm", last, x, blocks.eps)
        logits = _class_mean_head(build, head, spec, last)
    return build.finish("vision.scores", vision_layout(spec, head), _VISION_INPUTS, [logits])


@functools.lru_cache(maxsize=256)
def text_pooled(spec: TextSpec) -> Plan:
    """Packed ids, cut at the pooled token -> ``text.embedding`` (B, D), ``text.status`` (B,)."""
    build = Builder()
    x = build.buffer("text.stream", PER_TOKEN, spec.blocks.width)
    _embed_ids(build, x)
    x = _pooled_blocks(build, spec.blocks, "text", x)
    outputs = _pool(build, spec, "text", x, rows=None)
    return build.finish("text.pooled", text_layout(spec), _TEXT_INPUTS, outputs)


def _dense_blocks(
    build: Builder,
    spec: BlockSpec,
    tower: str,
    x: str,
    taps: Sequence[int],
    stop: int,
    masked: bool,
) -> str:
    """Blocks 0 to ``stop`` - 1 over every token; returns the residual stream after them.

    Where block i's input (or, for i = ``stop``, the result) is a tap it stays in its own buffer, so
    nothing is copied: the next block writes elsewhere.
    """
    for layer in range(stop):
        if layer + 1 in taps:
            out = build.buffer(f"{tower}.hidden.{layer + 1}", PER_TOKEN, spec.width)
        elif layer in taps:
            out = build.buffer(f"{tower}.stream.{layer + 1}", PER_TOKEN, spec.width)
        else:
            out = x
        _block(build, spec, tower, layer, x, out, masked)
        x = out
    return x


def _first_stream(build: Builder, spec: BlockSpec, tower: str, taps: Sequence[int]) -> str:
    name = f"{tower}.hidden.0" if 0 in taps else f"{tower}.stream.0"
    return build.buffer(name, PER_TOKEN, spec.width)


def _class_head(build: Builder, head: HeadSpec, spec: VisionSpec, x: str, rows: str | None) -> str:
    """Class scores from the class token of the residual stream, the final LayerNorm folded in."""
    logits = build.buffer("vision.logits", PER_SEQUENCE, len(head.labels), "float32")
    build.launch(
        "linear",
        "vision.head",
        {"out": logits, "x": x, "rows": rows, "x_stats": build.stats(x)},
        _folded("head"),
        norm_eps=spec.blocks.eps,
    )
    return logits


def _class_mean_head(build: Builder, head: HeadSpec, spec: VisionSpec, last: str) -> str:
    """Class scores from the normalised class token and the mean of the patch tokens."""
    logits = build.buffer("vision.logits", PER_SEQUENCE, len(head.labels), "float32")
    features = build.buffer("vision.features", PER_SEQUENCE, 2 * spec.blocks.width)
    build.launch(
        "class_mean",
        "vision.features",
        {"out": features, "x": last},
        tokens=MAX_SEQLEN,
        prefix=spec.prefix,
    )
    build.launch(
        "linear",
        "vision.head",
        {"out": logits, "x": features},
        {"weight": "head.weight", "bias": "head.bias"},
    )
    return logits


@functools.lru_cache(maxsize=256)
def vision_dense(
    spec: VisionSpec,
    head: HeadSpec | None = None,
    *,
    uint8: bool = False,
    taps: tuple[int, ...] = (),
) -> Plan:
    """Pixels -> everything ``forward`` returns of an image tower.

    ``vision.hidden.<i>`` (M, C) for i in ``taps``: the residual stream before block i, or after the
    last one. ``vision.last`` (M, C): normalised where the family does so. ``vision.pooler`` (B, C)
    or (B, P), ``vision.embedding`` (B, D) with ``vision.status`` where there is a projection,
    ``vision.logits`` (B, labels) fp32 where there is a head.
    """
    build, blocks = Builder(), spec.blocks
    if spec.norm == "pooled":
        taps = tuple(sorted({*taps, blocks.layers}))
    x = _first_stream(build, blocks, "vision", taps)
    _embed_pixels(build, spec, uint8, x)
    x = _dense_blocks(build, blocks, "vision", x, taps, blocks.layers, masked=False)
    outputs = [f"vision.hidden.{tap}" for tap in taps]
    if spec.norm == "tokens":
        last = build.buffer("vision.last", PER_TOKEN, blocks.width)
        _layernorm(build, "vision.norm", "vision.norm", last, x, blocks.eps)
        outputs.append(last)
        if head is not None and head.features == "class":
            outputs.append(_class_head(build, head, spec, x, rows="token_rows"))
        elif head is not None:
            outputs.append(_class_mean_head(build, head, spec, last))
        if spec.pooler is not None:
            pooler = build.buffer("vision.pooler", PER_SEQUENCE, spec.pooler.width)
            build.launch(
                "linear",
                "vision.pooler",
                {"out": pooler, "x": last, "rows": "token_rows"},
                {"weight": "vision.pooler.weight", "bias": "vision.pooler.bias"},
                activation=spec.pooler.activation,
            )
            outputs.append(pooler)
    else:
        pooler = build.buffer("vision.pooler", PER_SEQUENCE, blocks.width)
        _layernorm(build, "vision.norm", "vision.norm", pooler, x, blocks.eps, rows="token_rows")
        outputs.append(pooler)
        if spec.projection is not None:
            outputs += _pool(build, spec, "vision", x, rows="token_rows")
    return build.finish("vision.dense", vision_layout(spec, head), _VISION_INPUTS, outputs)


@functools.lru_cache(maxsize=256)
def vision_layers(spec: VisionSpec, taps: tuple[int, ...], norm: bool, uint8: bool = False) -> Plan:
    """Pixels -> ``vision.layer.<i>`` (M, C) for i in ``taps``: the stream after block i.

    With ``norm`` the final LayerNorm is applied to each. Nothing after the last tap is computed.
    """
    build, blocks = Builder(), spec.blocks
    x = _first_stream(build, blocks, "vision", ())
    _embed_pixels(build, spec, uint8, x)
    outputs = []
    for layer in range(max(taps) + 1):
        out = x
        if layer in taps and not norm:
            out = build.buffer(f"vision.layer.{layer}", PER_TOKEN, blocks.width)
        elif layer - 1 in taps and not norm:
            out = build.buffer(f"vision.stream.{layer + 1}", PER_TOKEN, blocks.width)
        _block(build, blocks, "vision", layer, x, out, masked=False)
        x = out
        if layer in taps:
            name = f"vision.layer.{layer}"
            outputs.append(name)
            if norm:
                build.buffer(name, PER_TOKEN, blocks.width)
                _layernorm(build, name, "vision.norm", name, x, blocks.eps)
    return build.finish("vision.layers", vision_layout(spec), _VISION_INPUTS, outputs)


@functools.lru_cache(maxsize=256)
def text_dense(spec: TextSpec, *, taps: tuple[int, ...] = (), masked: bool = False) -> Plan:
    """Token ids of equally long rows -> everything ``forward`` returns of a text tower.

    ``text.hidden.<i>`` for i in ``taps``, ``text.last`` (M, C) normalised, ``text.pooler`` (B, C),
    ``text.embedding`` and ``text.status`` where there is a projection. ``masked``: the plan also
    takes ``kv_lens`` (B,), the number of tokens of each row that the attention mask lets through.
    """
    build, blocks = Builder(), spec.blocks
    if masked:
        build.buffer("kv_lens", PER_SEQUENCE, None, "int32")
    x = _first_stream(build, blocks, "text", taps)
    _embed_ids(build, x)
    x = _dense_blocks(build, blocks, "text", x, taps, blocks.layers, masked)
    last = build.buffer("text.last", PER_TOKEN, blocks.width)
    pooler = build.buffer("text.pooler", PER_SEQUENCE, blocks.width)
    _layernorm(build, "text.norm", "text.norm", last, x, blocks.eps)
    _layernorm(build, "text.pooler", "text.norm", pooler, x, blocks.eps, rows="token_rows")
    outputs = [*(f"text.hidden.{tap}" for tap in taps), last, pooler]
    if spec.projection is not None:
        outputs += _pool(build, spec, "text", x, rows="token_rows")
    inputs = (*_TEXT_INPUTS, "kv_lens") if masked else _TEXT_INPUTS
    return build.finish("text.dense", text_layout(spec), inputs, outputs)
