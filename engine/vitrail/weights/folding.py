"""Canonical tensors -> exact rewrites -> one packed arena in the compute dtype.

Rewrites, each exact in real numbers and rounded once: LayerNorm's gamma and beta go into the linear
that follows; softmax scale and log2(e) into the query rows; the pixel normalisation into a second
patch projection for uint8 pixels; class token and its position become one row. LayerScale stays a
column scale: folded, values of 1e-4 would make fp16 weights subnormal.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitrail.checkpoint.tensors import Source, TensorReader
from vitrail.dtypes import dtype_name, named_dtype
from vitrail.errors import CheckpointError
from vitrail.spec import BlockSpec, HeadSpec, ModelSpec, Shape, TextSpec, VisionSpec
from vitrail.torch_modes import plain, refuse_lost_threads
from vitrail_kernels.ops.patch_embed import UINT8_UNIT

CHUNK_BYTES = 4 << 20  # small enough that a chunk is still in cache when it is rewritten
ALIGNMENT = 256
PATCH_MULTIPLE = 64  # columns of a patch weight: rows of 588 numbers would not be 16-byte aligned


class Packed(NamedTuple):
    """A packed tensor: ``kind`` "compute" is the model's dtype, "float32" always fp32.

    ``rows_of``: it has no bytes of its own, but is rows of that tensor from ``first_row``.
    """

    shape: Shape
    kind: Literal["compute", "float32"]
    rows_of: str | None = None
    first_row: int = 0


def _block_layout(spec: BlockSpec, tower: str) -> dict[str, Packed]:
    c, f = spec.width, spec.mlp
    up = 2 * f if spec.gated else f
    layout: dict[str, Packed] = {}
    for layer in range(spec.layers):
        name = f"{tower}.blocks.{layer}"
        for part, (n, k) in {
            "qkv": (3 * c, c),
            "out": (c, c),
            "up": (up, c),
            "down": (c, f),
        }.items():
            layout[f"{name}.{part}.weight"] = Packed((n, k), "compute")
            layout[f"{name}.{part}.bias"] = Packed((n,), "float32")
            if part in ("qkv", "up"):
                layout[f"{name}.{part}.sums"] = Packed((n,), "float32")
        if spec.layer_scale:
            layout[f"{name}.scale1"] = Packed((c,), "float32")
            layout[f"{name}.scale2"] = Packed((c,), "float32")
    # the pooled plan's last block takes the query rows and the key and value rows apart
    for part, first, n in (("q", 0, c), ("kv", c, 2 * c)):
        layout[f"{name}.{part}.weight"] = Packed((n, c), "compute", f"{name}.qkv.weight", first)
        for vector in ("bias", "sums"):
            layout[f"{name}.{part}.{vector}"] = Packed(
                (n,), "float32", f"{name}.qkv.{vector}", first
            )
    return layout


def _tower_end(tower: str, width: int, projection: int | None) -> dict[str, Packed]:
    layout = {
        f"{tower}.norm.weight": Packed((width,), "float32"),
        f"{tower}.norm.bias": Packed((width,), "float32"),
    }
    if projection is not None:
        layout[f"{tower}.projection.folded"] = Packed((projection, width), "compute")
        layout[f"{tower}.projection.bias"] = Packed((projection,), "float32")
    return layout


def vision_layout(spec: VisionSpec, head: HeadSpec | None = None) -> dict[str, Packed]:
    """Packed name -> shape and kind of everything an image tower's plans use."""
    c = spec.blocks.width
    k = -(-spec.patch_values // PATCH_MULTIPLE) * PATCH_MULTIPLE
    layout = {
        "vision.position": Packed((spec.positions, c), "float32"),
        "vision.prefix": Packed((spec.prefix, c), "float32"),
    }
    for kind in ("float", "uint8"):
        layout[f"vision.patch.{kind}"] = Packed((c, k), "compute")
        layout[f"vision.patch.{kind}.bias"] = Packed((c,), "float32")
    if spec.pre_norm:
        layout["vision.pre_norm.weight"] = Packed((c,), "float32")
        layout["vision.pre_norm.bias"] = Packed((c,), "float32")
    layout |= _block_layout(spec.blocks, "vision")
    layout |= _tower_end("vision", c, spec.projection)
    if spec.pooler is not None:
        layout["vision.pooler.weight"] = Packed((spec.pooler.width, c), "compute")
        layout["vision.pooler.bias"] = Packed((spec.pooler.width,), "float32")
    if head is not None:
        for name, shape in head.tensor_shapes(c).items():
            layout[name] = Packed(shape, "compute" if len(shape) > 1 else "float32")
        if head.features == "class":
            layout["head.sums"] = Packed((len(head.labels),), "float32")
    return layout


def text_layout(spec: TextSpec) -> dict[str, Packed]:
    """Packed name -> shape and kind of everything a text tower's plans use."""
    c = spec.blocks.width
    return {
        "text.token": Packed((spec.vocab, c), "compute"),
        "text.position": Packed((spec.context, c), "float32"),
        **_block_layout(spec.blocks, "text"),
        **_tower_end("text", c, spec.projection),
    }


def packed_layout(spec: ModelSpec) -> dict[str, Packed]:
    """Packed name -> shape and kind of a whole model, in arena order."""
    layout: dict[str, Packed] = {}
    if spec.vision is not None:
        layout |= vision_layout(spec.vision, spec.head)
    if spec.text is not None:
        layout |= text_layout(spec.text)
    return layout


@dataclass(frozen=True, slots=True)
class Weights:
    """Packed tensors by name, views of ``arena`` (bytes); ``logit_scale`` is past its exp."""

    tensors: Mapping[str, Tensor]
    arena: Tensor
    logit_scale: float | None

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def to(self, device: torch.device) -> Weights:
        """The same weights on another device, moved as one block."""
        arena = self.arena.to(device)
        if arena is self.arena:
            return self
        moved = {}
        for name, t in self.tensors.items():
            start = t.data_ptr() - self.arena.data_ptr()
            raw = arena[start : start + t.numel() * t.element_size()]
            moved[name] = raw.view(t.dtype).view(t.shape)
        return Weights(moved, arena, self.logit_scale)


def _places(spec: ModelSpec, dtype: torch.dtype) -> tuple[dict[str, tuple[int, int]], int]:
    """First and last byte in the arena of every tensor that has its own, and the arena's bytes."""
    places: dict[str, tuple[int, int]] = {}
    total = 0
    kinds = {"compute": dtype, "float32": torch.float32}
    for name, packed in packed_layout(spec).items():
        if packed.rows_of is None:
            nbytes = math.prod(packed.shape) * kinds[packed.kind].itemsize
            places[name] = (total, total + nbytes)
            total += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return places, total


def arena_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of a model's packed weights, a multiple of `ALIGNMENT`."""
    return _places(spec, dtype)[1]


def arena_views(spec: ModelSpec, dtype: torch.dtype, arena: Tensor) -> dict[str, Tensor]:
    """Every packed tensor as a view of ``arena``, `arena_bytes` of uint8."""
    places, _ = _places(spec, dtype)
    kinds = {"compute": dtype, "float32": torch.float32}
    tensors: dict[str, Tensor] = {}
    for name, packed in packed_layout(spec).items():
        if packed.rows_of is None:
            start, stop = places[name]
            tensors[name] = arena[start:stop].view(kinds[packed.kind]).view(packed.shape)
        else:
            last = packed.first_row + packed.shape[0]
            tensors[name] = tensors[packed.rows_of][packed.first_row : last]
    return tensors


def _allocate(spec: ModelSpec, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """One arena, not yet written, and a view of it for every packed tensor."""
    places, total = _places(spec, dtype)
    try:
        arena = torch.empty(total, dtype=torch.uint8, device="cpu")
    except RuntimeError as error:
        raise CheckpointError(f"weights: got no memory, wanted {total} bytes of it") from error
    for _, stop in places.values():
        arena[stop : -(-stop // ALIGNMENT) * ALIGNMENT] = 0  # the arena's bytes are repeatable
    return arena, arena_views(spec, dtype, arena)


def _memory(raw: Tensor) -> memoryview:
    """The bytes of a uint8 tensor, to read into."""
    array: np.ndarray[Any, np.dtype[np.uint8]] = raw.numpy()
    return array.data


def _not_finite(values: Tensor) -> bool:
    total = values.sum(dtype=torch.float32).item()
    return not math.isfinite(total) and not bool(torch.isfinite(values).all())


class _Loader:
    """Reads canonical tensors in chunks, refuses what is not finite, writes packed ones."""

    def __init__(
        self,
        spec: ModelSpec,
        sources: Mapping[str, Source],
        reader: TensorReader,
        dtype: torch.dtype,
    ) -> None:
        self.shapes, self.sources, self.reader = spec.tensor_shapes(), sources, reader
        self.arena, self.out = _allocate(spec, dtype)
        self.staging = torch.empty(CHUNK_BYTES, dtype=torch.uint8, device="cpu")

    def _check_finite(self, name: str, values: Tensor) -> None:
        # one cheap sum tells; only a suspicious one is looked at value by value, since a finite
        # tensor's sum may overflow
        if _not_finite(values):
            entry = self.sources[name].entry
            raise CheckpointError(
                f"{entry.file.name}: tensor {entry.name!r} holds NaN or infinity, "
                "wanted finite weights"
            )

    def check_rounded(self, name: str, packed: Tensor) -> None:
        """Refuse weights that are finite as stored and infinite in the compute dtype."""
        if packed.dtype != torch.float32 and _not_finite(packed):
            entry, kind = self.sources[name].entry, dtype_name(packed.dtype)
            raise CheckpointError(
                f"{entry.file.name}: tensor {entry.name!r} as Vitrail uses it overflows {kind}, "
                "wanted finite weights; load with dtype='float32', or 'bfloat16' for float16"
            )

    def chunks(self, name: str, out: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, fp32 rows) of a canonical tensor seen as (rows, columns).

        Where ``out`` is a contiguous fp32 tensor of that shape and the file holds fp32, the bytes
        are read straight into it; else chunks are fp32 temporaries of ``CHUNK_BYTES`` on the file's
        side.
        """
        source, shape = self.sources[name], self.shapes[name]
        dtype = named_dtype(source.entry.dtype)
        rows, columns = (
            (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
        )
        row_bytes = columns * dtype.itemsize
        if source.transpose:
            yield 0, self._transposed(name, rows, columns, dtype)
            return
        first = 0
        if source.rows is not None:
            first = source.rows[0] * (source.entry.nbytes // source.entry.shape[0])
        direct = out is not None and dtype == torch.float32 == out.dtype and out.is_contiguous()
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            nbytes = (stop - start) * row_bytes
            if direct and out is not None:
                chunk = out.view(rows, columns)[start:stop]
                raw = chunk.view(-1).view(torch.uint8)
            else:
                if nbytes > self.staging.numel():
                    self.staging = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
                raw = self.staging[:nbytes]
                chunk = raw.view(dtype).view(stop - start, columns)
            self.reader.read_into(source.entry, first + start * row_bytes, _memory(raw))
            chunk = chunk.float()
            self._check_finite(name, chunk)
            yield start, chunk

    def _transposed(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        entry = self.sources[name].entry
        raw = torch.empty(entry.nbytes, dtype=torch.uint8, device="cpu")
        self.reader.read_into(entry, 0, _memory(raw))
        values = raw.view(dtype).view(columns, rows).float()
        self._check_finite(name, values)
        return values.t()

    def read(self, name: str) -> Tensor:
        """A whole canonical tensor as fp32, in its canonical shape."""
        shape = self.shapes[name]
        values = torch.empty(shape, dtype=torch.float32, device="cpu")
        flat = values.view(shape[0], -1) if len(shape) > 1 else values.view(1, -1)
        for start, chunk in self.chunks(name, values):
            part = flat[start : start + chunk.shape[0]]
            if part.data_ptr() != chunk.data_ptr():
                part.copy_(chunk)
        return values

    def copy(self, name: str, packed: str | None = None) -> None:
        self.linear(self.out[packed or name], name)

    def linear(
        self,
        out: Tensor,
        name: str,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> Tensor | None:
        """Write the rows of ``name`` times ``gamma`` to ``out``; returns ``W beta`` (N,) fp64.

        ``sums`` (N,), with ``beta``: the sums of the rows as they were rounded to 16 bits.
        """
        shift = None
        if beta is not None:
            shift = torch.empty(out.shape[0], dtype=torch.float64, device="cpu")
        flat = out if out.dim() == 2 else out.view(1, -1)
        for start, chunk in self.chunks(name, out):
            part = flat[start : start + chunk.shape[0]]
            some = slice(start, start + len(part))
            # in double, so that what is rounded does not depend on how rows were chunked
            exact = chunk.double() if beta is not None else None
            if shift is not None and exact is not None and beta is not None:
                torch.mv(exact, beta, out=shift[some])
            if part.data_ptr() == chunk.data_ptr():
                if gamma is not None:
                    chunk.mul_(gamma)
            else:
                part.copy_(chunk if gamma is None else chunk * gamma)
                self.check_rounded(name, part)
            if sums is not None and exact is not None and gamma is not None:
                if part.dtype == torch.float32:  # its rounding is below what a sum shows
                    sums[some] = exact.mv(gamma.double())
                else:  # as a product: ten times faster than a sum in double
                    sums[some] = part.double().mv(exact.new_ones(exact.shape[1]))
        return shift


def _fold_norm(
    load: _Loader,
    norm: str,
    linear: str,
    packed: Iterable[Tensor],
    factor: float = 1.0,
) -> None:
    """LN(x) W^T + b with LN's gamma and beta folded: W' = W gamma f, b' = (b + W beta) f.

    ``packed``: where W' and b' go, and maybe the sums of the rows of W' as rounded, by which a
    kernel takes the mean out.
    """
    weight, bias, *sums = packed
    gamma, beta = (load.read(f"{norm}.{part}").double() for part in ("weight", "bias"))
    total = load.linear(weight, f"{linear}.weight", (gamma * factor).float(), beta, *sums)
    assert total is not None, "a beta was given"
    if f"{linear}.bias" in load.shapes:
        total += load.read(f"{linear}.bias").double()
    bias.copy_(total * factor)


def _pack_block(load: _Loader, spec: BlockSpec, tower: str, layer: int) -> None:
    name, c, out = f"{tower}.blocks.{layer}", spec.width, load.out
    scale = spec.head_dim**-0.5 * math.log2(math.e)
    for number, part in enumerate("qkv"):
        rows = slice(number * c, (number + 1) * c)
        packed = [out[f"{name}.qkv.{kind}"][rows] for kind in ("weight", "bias", "sums")]
        factor = scale if number == 0 else 1.0
        _fold_norm(load, f"{name}.norm1", f"{name}.{part}", packed, factor)
    packed = [out[f"{name}.up.{kind}"] for kind in ("weight", "bias", "sums")]
    if spec.gated:
        _fold_norm(load, f"{name}.norm2", f"{name}.gate", [tensor[0::2] for tensor in packed])
        _fold_norm(load, f"{name}.norm2", f"{name}.up", [tensor[1::2] for tensor in packed])
    else:
        _fold_norm(load, f"{name}.norm2", f"{name}.up", packed)
    plain = ["out.weight", "out.bias", "down.weight", "down.bias"]
    for part in plain + (["scale1", "scale2"] if spec.layer_scale else []):
        load.copy(f"{name}.{part}")


def _pack_patch(load: _Loader, spec: VisionSpec, pixel_scale: tuple[Tensor, Tensor] | None) -> None:
    """The projection for floats, and the one for uint8 with x = a * uint8 + b folded in."""
    c, k, out = spec.blocks.width, spec.patch_values, load.out
    weight = load.read("vision.patch.weight").double()
    bias = torch.zeros(c, dtype=torch.float64, device="cpu")
    if spec.patch_bias:
        bias = load.read("vision.patch.bias").double()
    plain_weight = out["vision.patch.float"].zero_()
    plain_weight[:, :k] = weight.reshape(c, k)
    out["vision.patch.float.bias"].copy_(bias)
    folded = out["vision.patch.uint8"].zero_()
    one = torch.ones(spec.channels, dtype=torch.float64, device="cpu")
    a, b = pixel_scale or (one, one - one)
    folded[:, :k] = (weight * (UINT8_UNIT * a[:, None, None])).permute(0, 2, 3, 1).reshape(c, k)
    # without a scale no uint8 pixels are taken, so their weights may be anything
    for packed in (plain_weight,) if pixel_scale is None else (plain_weight, folded):
        load.check_rounded("vision.patch.weight", packed)
    # the bias comes from the rounded weights, so that what rounding took is not added again:
    # sum W (a u + b) = sum W' (u + b / a) / unit
    rounded = folded[:, :k].double().view(c, *spec.patch, spec.channels)
    out["vision.patch.uint8.bias"].copy_(bias + (rounded * (b / a / UINT8_UNIT)).sum(dim=(1, 2, 3)))


def _pack_vision(
    load: _Loader, spec: VisionSpec, pixel_scale: tuple[Tensor, Tensor] | None
) -> None:
    out = load.out
    load.copy("vision.position")
    out["vision.prefix"][0] = load.read("vision.class") + out["vision.position"][0]
    if spec.registers:
        out["vision.prefix"][1:] = load.read("vision.registers")
    _pack_patch(load, spec, pixel_scale)
    if spec.pre_norm:
        load.copy("vision.pre_norm.weight")
        load.copy("vision.pre_norm.bias")
    for layer in range(spec.blocks.layers):
        _pack_block(load, spec.blocks, "vision", layer)
    _pack_tower_end(load, "vision", spec.projection)
    if spec.pooler is not None:
        load.copy("vision.pooler.weight")
        load.copy("vision.pooler.bias")


def _pack_tower_end(load: _Loader, tower: str, projection: int | None) -> None:
    load.copy(f"{tower}.norm.weight")
    load.copy(f"{tower}.norm.bias")
    if projection is not None:
        packed = [load.out[f"{tower}.projection.{kind}"] for kind in ("folded", "bias")]
        _fold_norm(load, f"{tower}.norm", f"{tower}.projection", packed)


def load_weights(
    spec: ModelSpec,
    sources: Mapping[str, Source],
    dtype: torch.dtype,
    pixel_scale: tuple[Tensor, Tensor] | None = None,
) -> Weights:
    """Read every canonical tensor once and pack it on the CPU.

    ``sources``: canonical name -> where it is stored, complete (see `vitrail.zoo.map_tensors`).
    ``pixel_scale``: (a, b), each (channels,), with normalised pixel = a * uint8 + b. Resident
    memory grows by the arena and one chunk. Raises CheckpointError where a file changed, ends early
    or holds a weight that is not finite.
    """
    refuse_lost_threads()
    with plain(), TensorReader() as reader:
        load = _Loader(spec, sources, reader, dtype)
        if spec.vision is not None:
            _pack_vision(load, spec.vision, pixel_scale)
        if spec.text is not None:
            load.copy("text.token")
            load.copy("text.position")
            for layer in range(spec.text.blocks.layers):
                _pack_block(load, spec.text.blocks, "text", layer)
            _pack_tower_end(load, "text", spec.text.projection)
        if spec.head is not None and spec.head.features == "class":
            packed = [load.out[f"head.{kind}"] for kind in ("weight", "bias", "sums")]
            _fold_norm(load, "vision.norm", "head", packed)
        elif spec.head is not None:
            load.copy("head.weight")
            load.copy("head.bias")
        logit_scale = None
        if "logit_scale" in load.shapes:
            stored = load.read("logit_scale")
            logit_scale = stored.exp().item()
            if not math.isfinite(logit_scale):
                entry = sources["logit_scale"].entry
                raise CheckpointError(
                    f"{entry.file.name}: tensor {entry.name!r}: got {stored.item():.4g}, whose "
                    "exponential is not finite in float32, wanted less than 88"
                )
    return Weights(load.out, load.arena, logit_scale)


def hash_weights(spec: ModelSpec, sources: Mapping[str, Source]) -> str:
    """SHA-256 over (canonical name, dtype, shape, bytes) of every tensor, in order of name.

    The same for any order of tensors in a file, any sharding and either name dialect.
    """
    total = hashlib.sha256()
    shapes = spec.tensor_shapes()
    buffer = bytearray(CHUNK_BYTES)
    with TensorReader() as reader:
        for name in sorted(shapes):
            source, entry = sources[name], sources[name].entry
            start, stop = 0, entry.nbytes
            if source.rows is not None:
                row = entry.nbytes // entry.shape[0]
                start, stop = source.rows[0] * row, source.rows[1] * row
            digest = hashlib.sha256(
                f"{name} {entry.dtype} {shapes[name]} {source.transpose}".encode()
            )
            for at in range(start, stop, CHUNK_BYTES):
                part = memoryview(buffer)[: min(CHUNK_BYTES, stop - at)]
                reader.read_into(entry, at, part)
                digest.update(part)
            total.update(digest.digest())
    return total.hexdigest()
