"""spec -> Plan: a flat tuple of launches over named buffers.

A plan is a value. It holds no graph, no tensor and no size: buffers are affine in the number of
sequences B and tokens M, so one plan serves every batch and every length. Buffers that live at the
same time get different slots of one arena.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from vitrail.spec import BlockSpec, HeadSpec, TextSpec, VisionSpec
from vitrail.weights import Packed, text_layout, vision_layout
from vitrail_kernels import OPERATORS

MAX_SEQLEN = "max_seqlen"
"""A scalar with this value stands for the longest sequence of the call."""


class Rows(NamedTuple):
    """Rows of a buffer: ``sequences * B + tokens * M + longest * T + constant``, T the longest."""

    sequences: int = 0
    tokens: int = 0
    longest: int = 0
    constant: int = 0

    def at(self, batch: int, tokens: int, longest: int) -> int:
        return (
            self.sequences * batch + self.tokens * tokens + self.longest * longest + self.constant
        )


PER_SEQUENCE = Rows(sequences=1)
PER_TOKEN = Rows(tokens=1)


@dataclass(frozen=True, slots=True)
class Buffer:
    """(rows, columns) numbers, or (rows,) where ``columns`` is None.

    ``dtype``: "compute" (the model's), "float32", "int32" or "uint8". ``slot``: the slot of the
    activation arena it lives in; None for what the caller brings or takes away.
    """

    name: str
    rows: Rows
    columns: int | None
    dtype: str = "compute"
    slot: int | None = None

    def shape(self, batch: int, tokens: int, longest: int = 0) -> tuple[int, ...]:
        rows = self.rows.at(batch, tokens, longest)
        return (rows,) if self.columns is None else (rows, self.columns)


@dataclass(frozen=True, slots=True)
class Launch:
    """One operator call: its arguments by name, as buffers, as packed weights, as scalars."""

    op: str
    label: str
    buffers: tuple[tuple[str, str], ...]
    weights: tuple[tuple[str, str], ...]
    scalars: tuple[tuple[str, Any], ...]

    def resolve(self, longest: int) -> dict[str, Any]:
        """The scalars for a call whose longest sequence has ``longest`` tokens."""
        return {name: longest if value == MAX_SEQLEN else value for name, value in self.scalars}


class Counted(NamedTuple):
    """What one launch costs: FLOPs of its matrix products, bytes read and written once."""

    label: str
    op: str
    shapes: str
    flops: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Launches in order, the buffers they use, and which of these the caller brings and takes."""

    name: str
    launches: tuple[Launch, ...]
    buffers: tuple[Buffer, ...]
    weights: tuple[tuple[str, Packed], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def slot_bytes(self, batch: int, tokens: int, compute_bytes: int) -> list[int]:
        """Bytes of every slot of the arena, each rounded up to 256."""
        sizes: dict[int, int] = {}
        for buffer in self.buffers:
            if buffer.slot is not None:
                item = compute_bytes if buffer.dtype == "compute" else 4
                nbytes = math.prod(buffer.shape(batch, tokens)) * item
                size = -(-nbytes // 256) * 256
                sizes[buffer.slot] = max(sizes.get(buffer.slot, 0), size)
        return [sizes[slot] for slot in sorted(sizes)]

    def arena_bytes(self, batch: int, tokens: int, compute_bytes: int = 4) -> int:
        """Bytes of activations one call needs, inputs and outputs left out."""
        return sum(self.slot_bytes(batch, tokens, compute_bytes))

    def dump(self, lengths: Sequence[int], compute: str = "float32") -> str:
        """For sequences of ``lengths`` tokens a line per launch: cost and shapes; then totals."""
        rows = self.count(lengths, compute)
        flops, traffic = sum(row.flops for row in rows), sum(row.bytes for row in rows)
        lines = [f"{self.name}: {len(lengths)} sequences, {sum(lengths)} tokens, {compute}"]
        lines += [
            f"{number:4d} {row.flops / 1e6:12.3f} MFLOP {row.bytes / 1e6:10.3f} MB  "
            f"{row.op:13s} {row.label:24s} {row.shapes}"
            for number, row in enumerate(rows)
        ]
        lines.append(
            f"total {flops / 1e6:11.3f} MFLOP {traffic / 1e6:10.3f} MB  {len(rows)} launches"
        )
        return "\n".join(lines)

    def flops(self, lengths: Sequence[int]) -> int:
        """FLOPs of all matrix products for sequences of ``lengths`` tokens."""
        return sum(row.flops for row in self.count(lengths))

    def count(self, lengths: Sequence[int], compute: str = "float32") -> list[Counted]:
        """The cost of every launch, from shapes alone: no kernel runs, no memory is taken."""
        kinds = {name: getattr(torch, name) for name in ("float32", "int32", "uint8")}
        kinds["compute"] = getattr(torch, compute)
        batch, tokens, longest = len(lengths), sum(lengths), max(lengths, default=0)
        tensors = {
            b.name: torch.empty(
                b.shape(batch, tokens, longest), dtype=kinds[b.dtype], device="meta"
            )
            for b in self.buffers
        }
        packed = {
            name: torch.empty(weight.shape, dtype=kinds[weight.kind], device="meta")
            for name, weight in self.weights
        }
        rows = []
        for launch in self.launches:
            arguments = {arg: tensors[name] for arg, name in launch.buffers}
            arguments |= {arg: packed[name] for arg, name in launch.weights}
            scalars = launch.resolve(longest)
            cost = OPERATORS[launch.op].cost(**arguments, **scalars, lengths=lengths)
            shapes = " ".join(
                f"{arg}{tuple(t.shape)}".replace(" ", "") for arg, t in arguments.items()
            )
            rows.append(Counted(launch.label, launch.op, shapes, cost.flops, cost.bytes))
        return rows


class _Builder:
    """Collects launches; `finish` gives every intermediate buffer a slot by its lifetime."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.buffers: dict[str, Buffer] = {}
        self.buffer("cu_seqlens", Rows(sequences=1, constant=1), None, "int32")
        self.buffer("rows", PER_SEQUENCE, None, "int32")

    def buffer(self, name: str, rows: Rows, columns: int | None, dtype: str = "compute") -> str:
        self.buffers[name] = Buffer(name, rows, columns, dtype)
        return name

    def launch(
        self,
        op: str,
        label: str,
        buffers: dict[str, str | None],
        weights: dict[str, str | None] | None = None,
        **scalars: Any,
    ) -> None:
        used = tuple((arg, name) for arg, name in buffers.items() if name is not None)
        packed = tuple((arg, name) for arg, name in (weights or {}).items() if name is not None)
        self.launches.append(Launch(op, label, used, packed, tuple(scalars.items())))

    def finish(
        self,
        name: str,
        layout: Mapping[str, Packed],
        inputs: Sequence[str],
        outputs: Sequence[str],
    ) -> Plan:
        last_use = {
            buffer: number
            for number, launch in enumerate(self.launches)
            for _, buffer in launch.buffers
        }
        slots: dict[str, int] = {}
        busy: dict[int, str] = {}
        for number, launch in enumerate(self.launches):
            for _, buffer in launch.buffers:
                if buffer in inputs or buffer in outputs or buffer in slots:
                    continue
                slot = next(i for i in range(len(busy) + 1) if i not in busy)
                slots[buffer], busy[slot] = slot, buffer
            busy = {slot: buffer for slot, buffer in busy.items() if last_use[buffer] > number}
        placed = [replace(b, slot=slots.get(b.name)) for b in self.buffers.values()]
        names = dict.fromkeys(name for launch in self.launches for _, name in launch.weights)
        weights = tuple((name, layout[name]) for name in names)
        return Plan(
            name, tuple(self.launches), tuple(placed), weights, tuple(inputs), tuple(outputs)
        )


def _block(
    build: _Builder, spec: BlockSpec, tower: str, layer: int, x: str, out: str, masked: bool
) -> None:
    """Five launches: residual stream ``x`` -> ``out`` (M, C), which may be one buffer."""
    name, c = f"{tower}.blocks.{layer}", spec.width
    qkv = build.buffer(f"{name}.qkv", PER_TOKEN, 3 * c)
    attended = build.buffer(f"{name}.attended", PER_TOKEN, c)
    hidden = build.buffer(f"{name}.hidden", PER_TOKEN, spec.mlp)
    build.launch(
        "linear",
        f"{name}.qkv",
        {"out": qkv, "x": x},
        {"weight": f"{name}.qkv.weight", "bias": f"{name}.qkv.bias"},
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
    )
    _tail(build, spec, name, attended, x, out, hidden)


def _tail(
    build: _Builder,
    spec: BlockSpec,
    name: str,
    attended: str,
    x: str,
    out: str,
    hidden: str,
    rows: str | None = None,
) -> None:
    """Three launches: output projection and MLP, each added to the residual stream."""
    build.launch(
        "linear",
        f"{name}.out",
        {"out": out, "x": attended, "residual": x, "residual_rows": rows},
        {
            "weight": f"{name}.out.weight",
            "bias": f"{name}.out.bias",
            "scale": f"{name}.scale1" if spec.layer_scale else None,
        },
    )
    build.launch(
        "linear",
        f"{name}.up",
        {"out": hidden, "x": out},
        {"weight": f"{name}.up.weight", "bias": f"{name}.up.bias"},
        norm_eps=spec.eps,
        activation=spec.activation,
        gated=spec.gated,
    )
    build.launch(
        "linear",
        f"{name}.down",
        {"out": out, "x": hidden, "residual": out},
        {
            "weight": f"{name}.down.weight",
            "bias": f"{name}.down.bias",
            "scale": f"{name}.scale2" if spec.layer_scale else None,
        },
    )


def _pooled_block(build: _Builder, spec: BlockSpec, tower: str, x: str) -> str:
    """Six launches: the last block for one token a sequence; returns that token's stream (B, C)."""
    layer, c = spec.layers - 1, spec.width
    name = f"{tower}.blocks.{layer}"
    kv = build.buffer(f"{name}.kv", PER_TOKEN, 2 * c)
    q = build.buffer(f"{name}.q", PER_SEQUENCE, c)
    attended = build.buffer(f"{name}.attended", PER_SEQUENCE, c)
    pooled = build.buffer(f"{tower}.pooled", PER_SEQUENCE, c)
    hidden = build.buffer(f"{name}.hidden", PER_SEQUENCE, spec.mlp)
    for part, out, rows in (("kv", kv, None), ("q", q, "rows")):
        build.launch(
            "linear",
            f"{name}.{part}",
            {"out": out, "x": x, "rows": rows},
            {"weight": f"{name}.{part}.weight", "bias": f"{name}.{part}.bias"},
            norm_eps=spec.eps,
        )
    build.launch(
        "attention_one",
        f"{name}.attention",
        {"out": attended, "q": q, "kv": kv, "cu_seqlens": "cu_seqlens"},
        heads=spec.heads,
        max_seqlen=MAX_SEQLEN,
    )
    _tail(build, spec, name, attended, x, pooled, hidden, rows="rows")
    return pooled


def _layernorm(
    build: _Builder, label: str, norm: str, out: str, x: str, eps: float, rows: str | None = None
) -> None:
    """``norm`` is the canonical name of the LayerNorm, without ``.weight``."""
    build.launch(
        "layernorm",
        label,
        {"out": out, "x": x, "rows": rows},
        {"gamma": f"{norm}.weight", "beta": f"{norm}.bias"},
        eps=eps,
    )


def _pool(
    build: _Builder,
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


def _embed_pixels(build: _Builder, spec: VisionSpec, uint8: bool, x: str) -> None:
    kind = "uint8" if uint8 else "float"
    pixels = Rows(sequences=-spec.prefix, tokens=1)
    build.buffer("pixels", pixels, spec.patch_values, "uint8" if uint8 else "float32")
    build.buffer("table", Rows(longest=1), spec.blocks.width, "float32")
    build.launch(
        "patch_embed",
        "vision.patch_embed",
        {"out": x, "pixels": "pixels", "table": "table"},
        {"weight": f"vision.patch.{kind}"},
        patch=spec.patch,
        channels=spec.channels,
        prefix=spec.prefix,
    )
    if spec.pre_norm:
        _layernorm(build, "vision.pre_norm", "vision.pre_norm", x, x, spec.blocks.eps)


def _embed_ids(build: _Builder, x: str) -> None:
    build.buffer("ids", PER_TOKEN, None, "int32")
    build.buffer("positions", PER_TOKEN, None, "int32")
    build.launch(
        "text_embed",
        "text.embed",
        {"out": x, "ids": "ids", "positions": "positions"},
        {"token": "text.token", "position": "text.position"},
    )


_VISION_INPUTS = ("pixels", "table", "cu_seqlens", "rows")
_TEXT_INPUTS = ("ids", "positions", "cu_seqlens", "rows")


@functools.lru_cache(maxsize=256)
def vision_pooled(spec: VisionSpec, head: HeadSpec | None = None, *, uint8: bool) -> Plan:
    """Pixels -> ``vision.embedding`` (B, D) and ``vision.status`` (B,), and nothing else.

    With a ``head`` over the class token also ``vision.logits`` (B, labels) fp32.
    """
    build = _Builder()
    x = build.buffer("vision.stream", PER_TOKEN, spec.blocks.width)
    _embed_pixels(build, spec, uint8, x)
    for layer in range(spec.blocks.layers - 1):
        _block(build, spec.blocks, "vision", layer, x, x, masked=False)
    pooled = _pooled_block(build, spec.blocks, "vision", x)
    outputs = _pool(build, spec, "vision", pooled, rows=None)
    if head is not None:
        outputs.append(_class_head(build, head, spec, pooled, rows=None))
    return build.finish("vision.pooled", vision_layout(spec, head), _VISION_INPUTS, outputs)


@functools.lru_cache(maxsize=256)
def text_pooled(spec: TextSpec) -> Plan:
    """Packed ids, cut at the pooled token -> ``text.embedding`` (B, D), ``text.status`` (B,)."""
    build = _Builder()
    x = build.buffer("text.stream", PER_TOKEN, spec.blocks.width)
    _embed_ids(build, x)
    for layer in range(spec.blocks.layers - 1):
        _block(build, spec.blocks, "text", layer, x, x, masked=False)
    pooled = _pooled_block(build, spec.blocks, "text", x)
    outputs = _pool(build, spec, "text", pooled, rows=None)
    return build.finish("text.pooled", text_layout(spec), _TEXT_INPUTS, outputs)


def _dense_blocks(
    build: _Builder,
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


def _first_stream(build: _Builder, spec: BlockSpec, tower: str, taps: Sequence[int]) -> str:
    name = f"{tower}.hidden.0" if 0 in taps else f"{tower}.stream.0"
    return build.buffer(name, PER_TOKEN, spec.width)


def _class_head(build: _Builder, head: HeadSpec, spec: VisionSpec, x: str, rows: str | None) -> str:
    """Class scores from the class token of the residual stream, the final LayerNorm folded in."""
    logits = build.buffer("vision.logits", PER_SEQUENCE, len(head.labels), "float32")
    build.launch(
        "linear",
        "vision.head",
        {"out": logits, "x": x, "rows": rows},
        {"weight": "head.weight", "bias": "head.bias"},
        norm_eps=spec.blocks.eps,
    )
    return logits


def _class_mean_head(build: _Builder, head: HeadSpec, spec: VisionSpec, last: str) -> str:
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
    build, blocks = _Builder(), spec.blocks
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
            outputs.append(_class_head(build, head, spec, x, rows="rows"))
        elif head is not None:
            outputs.append(_class_mean_head(build, head, spec, last))
        if spec.pooler is not None:
            pooler = build.buffer("vision.pooler", PER_SEQUENCE, spec.pooler.width)
            build.launch(
                "linear",
                "vision.pooler",
                {"out": pooler, "x": last, "rows": "rows"},
                {"weight": "vision.pooler.weight", "bias": "vision.pooler.bias"},
                activation=spec.pooler.activation,
            )
            outputs.append(pooler)
    else:
        pooler = build.buffer("vision.pooler", PER_SEQUENCE, blocks.width)
        _layernorm(build, "vision.norm", "vision.norm", pooler, x, blocks.eps, rows="rows")
        outputs.append(pooler)
        if spec.projection is not None:
            outputs += _pool(build, spec, "vision", x, rows="rows")
    return build.finish("vision.dense", vision_layout(spec, head), _VISION_INPUTS, outputs)


@functools.lru_cache(maxsize=256)
def vision_layers(spec: VisionSpec, taps: tuple[int, ...], norm: bool, uint8: bool = False) -> Plan:
    """Pixels -> ``vision.layer.<i>`` (M, C) for i in ``taps``: the stream after block i.

    With ``norm`` the final LayerNorm is applied to each. Nothing after the last tap is computed.
    """
    build, blocks = _Builder(), spec.blocks
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
    build, blocks = _Builder(), spec.blocks
    if masked:
        build.buffer("kv_lens", PER_SEQUENCE, None, "int32")
    x = _first_stream(build, blocks, "text", taps)
    _embed_ids(build, x)
    x = _dense_blocks(build, blocks, "text", x, taps, blocks.layers, masked)
    last = build.buffer("text.last", PER_TOKEN, blocks.width)
    pooler = build.buffer("text.pooler", PER_SEQUENCE, blocks.width)
    _layernorm(build, "text.norm", "text.norm", last, x, blocks.eps)
    _layernorm(build, "text.pooler", "text.norm", pooler, x, blocks.eps, rows="rows")
    outputs = [*(f"text.hidden.{tap}" for tap in taps), last, pooler]
    if spec.projection is not None:
        outputs += _pool(build, spec, "text", x, rows="rows")
    inputs = (*_TEXT_INPUTS, "kv_lens") if masked else _TEXT_INPUTS
    return build.finish("text.dense", text_layout(spec), inputs, outputs)
