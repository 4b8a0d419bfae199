"""Canonical tensors -> exact rewrites -> one packed arena in the compute dtype.

Each rewrite is exact in real numbers, and its result is rounded once. The gamma and beta of a
LayerNorm go into the linear that follows; the softmax scale and log2(e) into the query rows; the
pixel normalization into a second patch projection for uint8 pixels; the class token and its
position become a single row. LayerScale stays a column scale, because folding its values of about
1e-4 would make fp16 weights subnormal.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vitrail.checkpoint.tensors import Source, TensorReader
from vitrail.errors import CheckpointError
from vitrail.spec import BlockSpec, HeadSpec, ModelSpec, TextSpec, VisionSpec
from vitrail.torch_modes import default_modes
from vitrail.weights.int8 import pack_int8, pack_int8_down
from vitrail.weights.layout import Weights
from vitrail.weights.loader import WeightLoader
from vitrail_kernels.ops.patch_embed import UINT8_UNIT

_FOLDED = ("weight", "bias", "sums")


def _fold_norm(
    load: WeightLoader, norm: str, linear: str, packed: Iterable[Tensor], factor: float = 1.0
) -> None:
    """Fold gamma and beta of LN into LN(x) W^T + b: W' = W gamma f, b' = (b + W beta) f.

    f is ``factor``. ``packed``: the destinations of W' and b', and of the row sums of the rounded
    W' if a kernel subtracts the mean by them.
    """
    weight, bias, *sums = packed
    gamma, beta = (load.read(f"{norm}.{name}").double() for name in ("weight", "bias"))
    total = load.write_linear(weight, f"{linear}.weight", (gamma * factor).float(), beta, *sums)
    assert total is not None, "a beta was given"
    if f"{linear}.bias" in load.shapes:
        total += load.read(f"{linear}.bias").double()
    bias.copy_(total * factor)


def _pack_block(load: WeightLoader, spec: BlockSpec, tower: str, layer: int) -> None:
    block, packed = f"{tower}.blocks.{layer}", load.packed
    if spec.is_int8(layer, "qkv"):
        pack_int8(load, f"{block}.qkv")
        if layer == spec.layers - 1:  # a pooled plan computes its queries from these weights
            q = [packed[f"{block}.q.{name}"] for name in _FOLDED]
            _fold_norm(load, f"{block}.norm1", f"{block}.q", q, _query_factor(spec))
    else:
        _pack_qkv(load, spec, block)
    if spec.is_int8(layer, "up"):
        pack_int8(load, f"{block}.up")
    else:
        _pack_up(load, spec, block)
    load.copy(f"{block}.out.weight", f"{block}.out.bias")
    if spec.is_int8(layer, "down"):
        pack_int8_down(load, spec, f"{block}.down")
    else:
        load.copy(f"{block}.down.weight", f"{block}.down.bias")
    if spec.layer_scale:
        load.copy(f"{block}.scale1", f"{block}.scale2")


def _query_factor(spec: BlockSpec) -> float:
    """The factor of the query rows: the softmax scale, and log2(e) for exponentials of base 2."""
    factor: float = spec.head_dim**-0.5 * math.log2(math.e)
    return factor


def _pack_qkv(load: WeightLoader, spec: BlockSpec, block: str) -> None:
    c = spec.width
    for index, (linear, factor) in enumerate((("q", _query_factor(spec)), ("k", 1.0), ("v", 1.0))):
        rows = slice(index * c, (index + 1) * c)
        slices = [load.packed[f"{block}.qkv.{name}"][rows] for name in _FOLDED]
        _fold_norm(load, f"{block}.norm1", f"{block}.{linear}", slices, factor)


def _pack_up(load: WeightLoader, spec: BlockSpec, block: str) -> None:
    up = [load.packed[f"{block}.up.{name}"] for name in _FOLDED]
    if spec.gated:
        _fold_norm(load, f"{block}.norm2", f"{block}.gate", [tensor[0::2] for tensor in up])
        up = [tensor[1::2] for tensor in up]
    _fold_norm(load, f"{block}.norm2", f"{block}.up", up)


def _pack_patch(
    load: WeightLoader, spec: VisionSpec, pixel_scale: tuple[Tensor, Tensor] | None
) -> None:
    """Pack the projection for float pixels, and that for uint8 pixels with x = a u + b folded in.

    u is the uint8 value; ``pixel_scale`` is (a, b).
    """
    c, k, packed = spec.blocks.width, spec.patch_values, load.packed
    weight = load.read("vision.patch.weight").double()
    bias = torch.zeros(c, dtype=torch.float64, device="cpu")
    if spec.patch_bias:
        bias = load.read("vision.patch.bias").double()
    plain_weight = packed["vision.patch.float"].zero_()
    plain_weight[:, :k] = weight.reshape(c, k)
    packed["vision.patch.float.bias"].copy_(bias)
    folded = packed["vision.patch.uint8"].zero_()
    unit = torch.ones(spec.channels, dtype=torch.float64, device="cpu")
    a, b = pixel_scale or (unit, torch.zeros_like(unit))
    folded[:, :k] = (weight * (UINT8_UNIT * a[:, None, None])).permute(0, 2, 3, 1).reshape(c, k)
    # without a scale the model takes no uint8 pixels, so the weights for them are not checked
    for projection in (plain_weight,) if pixel_scale is None else (plain_weight, folded):
        load.check_rounded("vision.patch.weight", projection)
    # the bias comes from the rounded weights, so that the rounding error of a weight is multiplied
    # by a u + b, not by a u: sum W (a u + b) = sum W' (u + b / a) / unit
    rounded = folded[:, :k].double().view(c, *spec.patch, spec.channels)
    shift = (rounded * (b / a / UINT8_UNIT)).sum(dim=(1, 2, 3))
    packed["vision.patch.uint8.bias"].copy_(bias + shift)


def _pack_vision(
    load: WeightLoader, spec: VisionSpec, pixel_scale: tuple[Tensor, Tensor] | None
) -> None:
    prefix, positions = load.packed["vision.prefix"], load.read("vision.position")
    load.packed["vision.position"].copy_(positions[spec.positioned - 1 :])
    prefix[0] = load.read("vision.class") + positions[0]
    if spec.distillation:
        prefix[1] = load.read("vision.distillation") + positions[1]
    if spec.registers:
        prefix[spec.positioned :] = load.read("vision.registers")
    _pack_patch(load, spec, pixel_scale)
    if spec.pre_norm:
        load.copy("vision.pre_norm.weight", "vision.pre_norm.bias")
    _pack_tower(load, spec, "vision")
    if spec.pooler is not None:
        load.copy("vision.pooler.weight", "vision.pooler.bias")


def _pack_tower(load: WeightLoader, spec: VisionSpec | TextSpec, tower: str) -> None:
    """The blocks, the final LayerNorm and the projection."""
    for layer in range(spec.blocks.layers):
        _pack_block(load, spec.blocks, tower, layer)
    load.copy(f"{tower}.norm.weight", f"{tower}.norm.bias")
    if spec.projection is not None:
        packed = [load.packed[f"{tower}.projection.{name}"] for name in ("folded", "bias")]
        _fold_norm(load, f"{tower}.norm", f"{tower}.projection", packed)


def _pack_head(load: WeightLoader, head: HeadSpec) -> None:
    if not head.folded:
        load.copy("head.weight", "head.bias")
        return
    for linear in head.linears:  # the halves of two classifiers add up to their mean
        packed = [load.packed[f"{linear}.{name}"] for name in _FOLDED]
        _fold_norm(load, "vision.norm", linear, packed, 1 / len(head.linears))


def _logit_scale(load: WeightLoader) -> float | None:
    """The temperature of a CLIP checkpoint, which stores its logarithm; None without a value."""
    if "logit_scale" not in load.shapes:
        return None
    stored = load.read("logit_scale")
    logit_scale = stored.exp().item()
    if not math.isfinite(logit_scale):
        entry = load.sources["logit_scale"].entry
        raise CheckpointError(
            f"{entry.file.name}: tensor {entry.name!r}: got {stored.item():.4g}, whose "
            "exponential is not finite in float32, wanted less than 88"
        )
    return logit_scale


def load_weights(
    spec: ModelSpec,
    sources: Mapping[str, Source],
    dtype: torch.dtype,
    pixel_scale: tuple[Tensor, Tensor] | None = None,
) -> Weights:
    """Read every canonical tensor once and pack it on the CPU.

    ``sources``: the stored tensor of every canonical name (see `vitrail.zoo.map_tensors`).
    ``pixel_scale``: (a, b), each (channels,), with normalized pixel = a * uint8 + b. Resident
    memory grows by the arena and one chunk. Raises CheckpointError if a file changed, ends early or
    holds a weight that is not finite.
    """
    with default_modes(), TensorReader() as reader:
        load = WeightLoader(spec, sources, reader, dtype)
        if spec.vision is not None:
            _pack_vision(load, spec.vision, pixel_scale)
        if spec.text is not None:
            load.copy("text.token", "text.position")
            _pack_tower(load, spec.text, "text")
        if spec.head is not None:
            _pack_head(load, spec.head)
        return Weights(load.packed, load.arena, _logit_scale(load))
