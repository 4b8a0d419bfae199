"""The arena: every packed tensor of a model, its shape, its dtype and its bytes.

A name is canonical (`spec.py`), or belongs to a tensor that `folding` computes from canonical ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vitrail.dtypes import named_dtype
from vitrail.spec import BlockSpec, HeadSpec, ModelSpec, Shape, TextSpec, VisionSpec
from vitrail_kernels.ops.linear_int8 import group_columns

ALIGNMENT = 256
PATCH_MULTIPLE = 64
"""The columns of a patch weight are padded to a multiple of this. Rows of 588 numbers, for example,
would not be aligned to 16 bytes."""


INT8_MULTIPLE = 128
"""The hidden layer of an MLP in int8 is padded to a multiple of this, with weights of zero."""


class PackedTensor(NamedTuple):
    """``dtype``: "compute" has the dtype of the model, "float32" and "int8" never change.

    ``rows_of``: the tensor of which this tensor is a view, from ``first_row``; None if this tensor
    has bytes of its own.
    """

    shape: Shape
    dtype: Literal["compute", "float32", "int8"]
    rows_of: str | None = None
    first_row: int = 0

    def torch_dtype(self, compute: torch.dtype) -> torch.dtype:
        """The dtype in a model that computes in ``compute``."""
        return compute if self.dtype == "compute" else named_dtype(self.dtype)


def _vectors(size: int, *names: str) -> dict[str, PackedTensor]:
    return {name: PackedTensor((size,), "float32") for name in names}


def _linear(name: str, n: int, k: int, *, folded: bool = False) -> dict[str, PackedTensor]:
    """Weight and bias; if a LayerNorm is ``folded`` into them, also the weight's row sums."""
    names = (f"{name}.bias", f"{name}.sums") if folded else (f"{name}.bias",)
    return {f"{name}.weight": PackedTensor((n, k), "compute"), **_vectors(n, *names)}


def _int8_linear(name: str, n: int, k: int) -> dict[str, PackedTensor]:
    """Codes, scales and bias of an int8 linear after a LayerNorm; ``smooth`` scales its inputs."""
    return {
        f"{name}.codes": PackedTensor((n, k), "int8"),
        **_vectors(n, f"{name}.weight_scale", f"{name}.bias"),
        **_vectors(k, f"{name}.smooth"),
    }


def _int8_down(name: str, n: int, k: int, gated: bool) -> dict[str, PackedTensor]:
    """As `_int8_linear`, for inputs in groups of columns that are scaled apart."""
    return {
        f"{name}.codes": PackedTensor((n, k), "int8"),
        **_vectors(n, f"{name}.weight_scale", f"{name}.bias"),
        f"{name}.shift": PackedTensor((k // group_columns(gated), n), "float32"),
    }


def hidden_columns(spec: BlockSpec, layer: int) -> int:
    """The columns of the hidden layer of block ``layer``'s MLP; int8 codes fill whole groups."""
    if not spec.is_int8(layer, "down"):
        return spec.mlp
    return -(-spec.mlp // INT8_MULTIPLE) * INT8_MULTIPLE


def _rows_of(
    layout: Mapping[str, PackedTensor], linear: str, tensors: Sequence[str], name: str, rows: slice
) -> dict[str, PackedTensor]:
    """Views of some rows of a linear's ``tensors``, as the linear ``name``."""
    views = {}
    for tensor in tensors:
        packed = layout[f"{linear}.{tensor}"]
        shape = (rows.stop - rows.start, *packed.shape[1:])
        view = PackedTensor(shape, packed.dtype, f"{linear}.{tensor}", rows.start)
        views[f"{name}.{tensor}"] = view
    return views


def _tower_layout(tower: str, spec: BlockSpec, projection: int | None) -> dict[str, PackedTensor]:
    """The blocks, the final LayerNorm and the projection."""
    c = spec.width
    layout: dict[str, PackedTensor] = {}
    for layer in range(spec.layers):
        block, f = f"{tower}.blocks.{layer}", hidden_columns(spec, layer)
        for name, n in (("qkv", 3 * c), ("up", 2 * f if spec.gated else f)):
            int8, linear = spec.is_int8(layer, name), f"{block}.{name}"
            layout |= _int8_linear(linear, n, c) if int8 else _linear(linear, n, c, folded=True)
        layout |= _linear(f"{block}.out", c, c)
        int8, linear = spec.is_int8(layer, "down"), f"{block}.down"
        layout |= _int8_down(linear, c, f, spec.gated) if int8 else _linear(linear, c, f)
        if spec.layer_scale:
            layout |= _vectors(c, f"{block}.scale1", f"{block}.scale2")
    # the last block of a pooled plan computes queries apart from keys and values
    tensors = ("weight", "bias", "sums")
    if spec.is_int8(layer, "qkv"):  # queries stay in the compute dtype, with weights of their own
        tensors = ("codes", "weight_scale", "bias")
        layout |= _linear(f"{block}.q", c, c, folded=True)
    else:
        layout |= _rows_of(layout, f"{block}.qkv", tensors, f"{block}.q", slice(0, c))
    layout |= _rows_of(layout, f"{block}.qkv", tensors, f"{block}.kv", slice(c, 3 * c))
    layout |= _vectors(c, f"{tower}.norm.weight", f"{tower}.norm.bias")
    if projection is not None:
        layout[f"{tower}.projection.folded"] = PackedTensor((projection, c), "compute")
        layout |= _vectors(projection, f"{tower}.projection.bias")
    return layout


def vision_layout(spec: VisionSpec, head: HeadSpec | None = None) -> dict[str, PackedTensor]:
    """The packed tensors of an image tower and its head, by name."""
    c = spec.blocks.width
    k = -(-spec.patch_values // PATCH_MULTIPLE) * PATCH_MULTIPLE
    layout = {
        "vision.position": PackedTensor((1 + spec.grid[0] * spec.grid[1], c), "float32"),
        "vision.prefix": PackedTensor((spec.prefix, c), "float32"),
    }
    for weight in ("vision.patch.float", "vision.patch.uint8"):
        layout[weight] = PackedTensor((c, k), "compute")
        layout |= _vectors(c, f"{weight}.bias")
    if spec.pre_norm:
        layout |= _vectors(c, "vision.pre_norm.weight", "vision.pre_norm.bias")
    layout |= _tower_layout("vision", spec.blocks, spec.projection)
    if spec.pooler is not None:
        layout |= _linear("vision.pooler", spec.pooler.width, c)
    if head is not None:
        labels, inputs = head.tensor_shapes(c)[f"{head.linears[0]}.weight"]
        for name in head.linears:
            layout |= _linear(name, labels, inputs, folded=head.folded)
    return layout


def text_layout(spec: TextSpec) -> dict[str, PackedTensor]:
    """The packed tensors of a text tower, by name."""
    c = spec.blocks.width
    return {
        "text.token": PackedTensor((spec.vocab, c), "compute"),
        "text.position": PackedTensor((spec.context, c), "float32"),
        **_tower_layout("text", spec.blocks, spec.projection),
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
    """Packed tensors by name, as views of ``arena`` (uint8).

    ``logit_scale`` is the factor of the cosines, not its logarithm; None for a single tower.
    """

    tensors: Mapping[str, Tensor]
    arena: Tensor
    logit_scale: float | None

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def to(self, device: torch.device) -> Weights:
        """The same weights on another device, copied as a single block."""
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
    """The span (start, stop) in the arena of every tensor with bytes of its own, and the arena's
    number of bytes."""
    spans: dict[str, tuple[int, int]] = {}
    total = 0
    for name, packed in packed_layout(spec).items():
        if packed.rows_of is None:
            nbytes = math.prod(packed.shape) * packed.torch_dtype(dtype).itemsize
            spans[name] = (total, total + nbytes)
            total += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return spans, total


def arena_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of the packed weights of a model, a multiple of `ALIGNMENT`."""
    return arena_spans(spec, dtype)[1]


def arena_views(spec: ModelSpec, dtype: torch.dtype, arena: Tensor) -> dict[str, Tensor]:
    """Every packed tensor as a view of ``arena``, a uint8 tensor of `arena_bytes` bytes."""
    spans, _ = arena_spans(spec, dtype)
    tensors: dict[str, Tensor] = {}
    for name, packed in packed_layout(spec).items():
        if packed.rows_of is None:
            tensor = arena[slice(*spans[name])].view(packed.torch_dtype(dtype))
            tensors[name] = tensor.view(packed.shape)
        else:
            stop = packed.first_row + packed.shape[0]
            tensors[name] = tensors[packed.rows_of][packed.first_row : stop]
    return tensors
