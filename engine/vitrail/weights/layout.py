"""The arena: every packed tensor of a model, its shape, its dtype and its bytes.

Names are canonical (`spec.py`), or those of tensors that `folding` makes of canonical tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vitrail.spec import BlockSpec, HeadSpec, ModelSpec, Shape, TextSpec, VisionSpec

ALIGNMENT = 256
PATCH_MULTIPLE = 64  # columns of a patch weight: rows of 588 numbers would not be 16-byte aligned


class PackedTensor(NamedTuple):
    """``dtype``: "compute" is the dtype of the model, "float32" always fp32.

    ``rows_of``: it has no bytes of its own, but is rows of that tensor from ``first_row``.
    """

    shape: Shape
    dtype: Literal["compute", "float32"]
    rows_of: str | None = None
    first_row: int = 0


def _vector(size: int) -> PackedTensor:
    return PackedTensor((size,), "float32")


def _matrix(rows: int, columns: int) -> PackedTensor:
    return PackedTensor((rows, columns), "compute")


def _affine(norm: str, width: int) -> dict[str, PackedTensor]:
    return {f"{norm}.weight": _vector(width), f"{norm}.bias": _vector(width)}


def _block_layout(spec: BlockSpec, tower: str) -> dict[str, PackedTensor]:
    c, f = spec.width, spec.mlp
    up = 2 * f if spec.gated else f
    shapes = {"qkv": (3 * c, c), "out": (c, c), "up": (up, c), "down": (c, f)}
    layout: dict[str, PackedTensor] = {}
    for layer in range(spec.layers):
        block = f"{tower}.blocks.{layer}"
        for linear, (n, k) in shapes.items():
            layout[f"{block}.{linear}.weight"] = _matrix(n, k)
            layout[f"{block}.{linear}.bias"] = _vector(n)
            if linear in ("qkv", "up"):
                layout[f"{block}.{linear}.sums"] = _vector(n)
        if spec.layer_scale:
            layout[f"{block}.scale1"] = _vector(c)
            layout[f"{block}.scale2"] = _vector(c)
    # the last block of a pooled plan takes the query rows and the key and value rows apart
    for rows, first_row, n in (("q", 0, c), ("kv", c, 2 * c)):
        for tensor in ("weight", "bias", "sums"):
            qkv = f"{block}.qkv.{tensor}"
            whole = layout[qkv]
            shape = (n, *whole.shape[1:])
            layout[f"{block}.{rows}.{tensor}"] = PackedTensor(shape, whole.dtype, qkv, first_row)
    return layout


def _tower_end(tower: str, width: int, projection: int | None) -> dict[str, PackedTensor]:
    layout = _affine(f"{tower}.norm", width)
    if projection is not None:
        layout[f"{tower}.projection.folded"] = _matrix(projection, width)
        layout[f"{tower}.projection.bias"] = _vector(projection)
    return layout


def vision_layout(spec: VisionSpec, head: HeadSpec | None = None) -> dict[str, PackedTensor]:
    """The packed tensors of an image tower and its head, by name."""
    c = spec.blocks.width
    k = -(-spec.patch_values // PATCH_MULTIPLE) * PATCH_MULTIPLE
    layout = {
        "vision.position": PackedTensor((1 + spec.grid[0] * spec.grid[1], c), "float32"),
        "vision.prefix": PackedTensor((spec.prefix, c), "float32"),
    }
    for pixels in ("float", "uint8"):
        layout[f"vision.patch.{pixels}"] = _matrix(c, k)
        layout[f"vision.patch.{pixels}.bias"] = _vector(c)
    if spec.pre_norm:
        layout |= _affine("vision.pre_norm", c)
    layout |= _block_layout(spec.blocks, "vision")
    layout |= _tower_end("vision", c, spec.projection)
    if spec.pooler is not None:
        layout["vision.pooler.weight"] = _matrix(spec.pooler.width, c)
        layout["vision.pooler.bias"] = _vector(spec.pooler.width)
    if head is not None:
        for name, shape in head.tensor_shapes(c).items():
            layout[name] = _matrix(*shape) if len(shape) == 2 else _vector(*shape)
        for linear in folded_heads(head):
            layout[f"{linear}.sums"] = _vector(len(head.labels))
    return layout


def folded_heads(head: HeadSpec) -> tuple[str, ...]:
    """The classifiers that read a token of the residual stream, with LayerNorm folded in."""
    return {
        "class": ("head",),
        "class_mean": (),
        "class_distillation": ("head.class", "head.distillation"),
    }[head.features]


def text_layout(spec: TextSpec) -> dict[str, PackedTensor]:
    """The packed tensors of a text tower, by name."""
    c = spec.blocks.width
    return {
        "text.token": _matrix(spec.vocab, c),
        "text.position": PackedTensor((spec.context, c), "float32"),
        **_block_layout(spec.blocks, "text"),
        **_tower_end("text", c, spec.projection),
    }


def packed_layout(spec: ModelSpec) -> dict[str, PackedTensor]:
    """The packed tensors of a whole model by name, in the order of the arena."""
    layout: dict[str, PackedTensor] = {}
    if spec.vision is not None:
        layout |= vision_layout(spec.vision, spec.head)
    if spec.text is not None:
        layout |= text_layout(spec.text)
    return layout


@dataclass(frozen=True, slots=True)
class Weights:
    """Packed tensors by name, views of ``arena`` (bytes); ``logit_scale`` is the factor itself."""

    tensors: Mapping[str, Tensor]
    arena: Tensor
    logit_scale: float | None

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def to(self, device: torch.device) -> Weights:
        """The same weights on another device, copied as one block."""
        arena = self.arena.to(device)
        if arena is self.arena:
            return self
        views = {}
        for name, t in self.tensors.items():
            start = t.data_ptr() - self.arena.data_ptr()
            raw = arena[start : start + t.numel() * t.element_size()]
            views[name] = raw.view(t.dtype).view(t.shape)
        return Weights(views, arena, self.logit_scale)


def arena_spans(spec: ModelSpec, dtype: torch.dtype) -> tuple[dict[str, tuple[int, int]], int]:
    """First and last byte in the arena of every tensor with bytes of its own, and the arena's
    bytes."""
    spans: dict[str, tuple[int, int]] = {}
    total = 0
    for name, packed in packed_layout(spec).items():
        if packed.rows_of is None:
            itemsize = dtype.itemsize if packed.dtype == "compute" else 4
            nbytes = math.prod(packed.shape) * itemsize
            spans[name] = (total, total + nbytes)
            total += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return spans, total


def arena_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of the packed weights of a model, a multiple of `ALIGNMENT`."""
    return arena_spans(spec, dtype)[1]


def arena_views(spec: ModelSpec, dtype: torch.dtype, arena: Tensor) -> dict[str, Tensor]:
    """Every packed tensor as a view of ``arena``, `arena_bytes` of uint8."""
    spans, _ = arena_spans(spec, dtype)
    tensors: dict[str, Tensor] = {}
    for name, packed in packed_layout(spec).items():
        if packed.rows_of is None:
            raw = arena[slice(*spans[name])]
            tensor = raw.view(dtype if packed.dtype == "compute" else torch.float32)
            tensors[name] = tensor.view(packed.shape)
        else:
            stop = packed.first_row + packed.shape[0]
            tensors[name] = tensors[packed.rows_of][packed.first_row : stop]
    return tensors
