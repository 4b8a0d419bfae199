"""Every operator call of the published models, with random tensors of its shapes and layout."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import checkpoints
from gpu.common import DEVICE, DRY, NAMES, Guarded
from vitrail.plan.plan import Affine, Buffer, Plan, Step
from vitrail.plan.text import text_dense, text_pooled
from vitrail.plan.vision import vision_dense, vision_pooled, vision_scores
from vitrail.runtime.workspace import STATISTICS
from vitrail.spec import BlockSpec, ModelSpec
from vitrail.zoo import read_spec
from vitrail_kernels import OPERATORS
from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.device.stats import stats_ref
from vitrail_kernels.launch import Call, Target
from vitrail_kernels.ops.linear_int8_grouped import FLOAT_OF_INTEGER

LOG2_E = math.log2(math.e)
PER_TOKEN, PER_SEQUENCE = Affine(tokens=1), Affine(sequences=1)
OUTPUTS = ("out", "out_scale", "status", "stats")
INT8_OPS = ("norm_quant", "linear_int8", "linear_int8_grouped")
TILES = (
    KernelConfig(64, 64, 64, 4, 3),
    KernelConfig(64, 64, 64, 4, 6, ctas=2),
    KernelConfig(64, 128, 64, 4, 4, ctas=2),
    KernelConfig(128, 128, 64, 8, 2),
    KernelConfig(128, 128, 64, 8, 3, registers=128, ctas=2, stagger=4000),
    KernelConfig(128, 256, 64, 8, 4),
)
"""Tiles of `linear` on sm_90, for few rows and many, and a few that tables had or may have."""


class Shapes(NamedTuple):
    """A tower of a published checkpoint and how many sequences go through it at once."""

    checkpoint: str
    tower: str
    batch: int


SHAPES = {
    "ViT-B/16": Shapes("vit-base-patch16-224", "vision", 64),
    "ViT-B/16 alone": Shapes("vit-base-patch16-224", "vision", 1),
    "CLIP B/32": Shapes("clip-vit-base-patch32", "vision", 64),
    "CLIP L/14": Shapes("clip-vit-large-patch14", "vision", 16),
    "CLIP H/14": Shapes("clip-vit-h-14-laion2b", "vision", 16),
    "DINOv2-B@518": Shapes("dinov2-with-registers-base", "vision", 6),
    "DINOv2-S head": Shapes("dinov2-small-imagenet1k-1-layer", "vision", 16),
    "DINOv2-g": Shapes("dinov2-giant", "vision", 4),
    "CLIP-B text": Shapes("clip-vit-base-patch32", "text", 64),
}
if DRY:
    SHAPES = {name: SHAPES[name] for name in ("CLIP H/14", "DINOv2-S head", "CLIP-B text")}


@functools.cache
def spec_of(checkpoint: str) -> ModelSpec:
    """Of a published checkpoint; in a dry run with fewer and narrower blocks and small images."""
    spec = read_spec(checkpoints.load(checkpoint))
    if not DRY:
        return spec
    vision, text = spec.vision, spec.text
    if vision is not None:
        side = 2 * vision.patch[0]
        vision = dataclasses.replace(vision, blocks=_narrow(vision.blocks), image=(side, side))
    if text is not None:
        text = dataclasses.replace(text, blocks=_narrow(text.blocks), vocab=100, context=20, eos=99)
    return dataclasses.replace(spec, vision=vision, text=text)


def _narrow(blocks: BlockSpec) -> BlockSpec:
    return dataclasses.replace(blocks, width=2 * blocks.head_dim, heads=2, mlp=72, layers=2)


class Work(NamedTuple):
    """A plan, the lengths of its sequences, and the shape of its pixels, if it takes pixels."""

    plan: Plan
    lengths: tuple[int, ...]
    pixels: tuple[int, ...] | None


def vision_work(
    spec: ModelSpec, plan: Plan, batch: int, size: tuple[int, int], uint8: bool
) -> Work:
    """Images of ``size``."""
    vision = spec.vision
    assert vision is not None, "the checkpoint has an image tower"
    shape = (*size, vision.channels) if uint8 else (vision.channels, *size)
    return Work(plan, (vision.tokens_at(size),) * batch, (batch, *shape))


def works(shapes: Shapes) -> Iterator[Work]:
    """The pooled plan, and the dense plan with all its outputs."""
    spec, batch = spec_of(shapes.checkpoint), shapes.batch
    if DRY:
        batch = min(batch, 3)
    if shapes.tower == "text":
        text = spec.text
        assert text is not None, "the checkpoint has a text tower"
        several = tuple(1 + (29 * i) % text.context for i in range(batch))
        yield Work(text_pooled(text), several, None)
        yield Work(text_dense(text, masked=True), (text.context,) * batch, None)
        return
    vision, head = spec.vision, spec.head
    assert vision is not None, "the checkpoint has an image tower"
    for uint8 in (True, False):
        plan = vision_pooled(vision, uint8=uint8)
        yield vision_work(spec, plan, batch, vision.image, uint8)
        if head is not None:
            plan = vision_scores(vision, head, uint8=uint8)
            yield vision_work(spec, plan, batch, vision.image, uint8)
    plan = vision_dense(vision, head)
    yield vision_work(spec, plan, batch, vision.image, False)


def int8_works(shapes: Shapes) -> Iterator[Work]:
    """The pooled plan of an image tower of which every linear that may be int8 is."""
    spec = spec_of(shapes.checkpoint)
    assert spec.vision is not None, "the checkpoint has an image tower"
    spec = spec.with_int8(spec.vision.blocks.int8_candidates)
    assert spec.vision is not None
    plan = vision_pooled(spec.vision, uint8=True)
    batch = min(shapes.batch, 3) if DRY else shapes.batch
    yield vision_work(spec, plan, batch, spec.vision.image, True)


# -- an operator call ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """``given``: the inputs by argument; ``outputs``: shape and dtype of each output.

    ``alias``: the input that is written over, where the plan does so. ``rows``: of the arguments
    that have some for every token or sequence, which, and along which dimension they run.
    """

    op: str
    given: Mapping[str, Tensor]
    outputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    alias: str | None
    scalars: Mapping[str, Any]
    rows: Mapping[str, tuple[Affine, int]]
    lengths: tuple[int, ...]

    def run(self, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The outputs. Asserts that nothing else was written and only ``alias`` of the inputs."""
        arguments = dict(given or self.given)
        guards = {name: Guarded(*output) for name, output in self.outputs.items()}
        if self.alias is not None:
            guards["out"].out.copy_(arguments[self.alias])
            arguments[self.alias] = guards["out"].out
        written = {name: guard.out for name, guard in guards.items()}
        OPERATORS[self.op].launch(**written, **arguments, **self.scalars)
        return {name: guard.done() for name, guard in guards.items()}

    def reference(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """By the operator's reference, with every float in ``dtype``, or as they are."""
        arguments = {
            name: t.to(dtype) if dtype and t.is_floating_point() else t
            for name, t in self.given.items()
            if name not in STATISTICS
        }
        written = {
            name: torch.empty(
                shape, dtype=dtype if dtype and kind.is_floating_point else kind, device=DEVICE
            )
            for name, (shape, kind) in self.outputs.items()
            if name not in STATISTICS
        }
        OPERATORS[self.op].reference(**written, **arguments, **self.scalars)
        return written


def _shape(work: Work, buffer: Buffer) -> tuple[int, ...]:
    if buffer.name == "pixels":
        assert work.pixels is not None, "the plan takes pixels"
        return work.pixels
    longest = max(work.lengths, default=0)
    return buffer.shape(len(work.lengths), sum(work.lengths), longest)


def _kinds(dtype: torch.dtype) -> dict[str, torch.dtype]:
    named = {name: getattr(torch, name) for name in ("float32", "int32", "uint8", "int8")}
    return {**named, "compute": dtype}


def calls_of(work: Work, dtype: torch.dtype, target: Target) -> Iterator[Call]:
    """Every kernel call of a plan, of meta tensors."""
    kinds = _kinds(dtype)
    inputs = {
        buffer.name: torch.empty(work.pixels, dtype=kinds[buffer.dtype], device="meta")
        for buffer in work.plan.buffers
        if buffer.name == "pixels" and work.pixels is not None
    }
    for launch, tensors, scalars in work.plan.bind(work.lengths, NAMES[dtype], inputs):
        yield from OPERATORS[launch.op].calls(target, **tensors, **scalars)


def different(works: Sequence[Work]) -> Iterator[tuple[str, Work, Step]]:
    """The launches of plans that differ in more than their names, each with a label."""
    seen = set()
    for work in works:
        buffers = {buffer.name: buffer for buffer in work.plan.buffers}
        weights = dict(work.plan.weights)
        for launch in work.plan.steps:
            shapes = [(arg, _shape(work, buffers[name])) for arg, name in launch.buffers]
            shapes += [(arg, weights[name].shape) for arg, name in launch.weights]
            key = launch.op, tuple(shapes), launch.scalars, len(work.lengths)
            if key not in seen:
                seen.add(key)
                yield f"{work.plan.name.split('.')[1]} {launch.label}", work, launch


def case_of(work: Work, launch: Step, dtype: torch.dtype) -> Case:
    """Random tensors for a launch."""
    kinds = _kinds(dtype)
    buffers = {buffer.name: buffer for buffer in work.plan.buffers}
    weights = dict(work.plan.weights)
    named = dict(launch.buffers)
    over = [arg for arg, name in launch.buffers if name == named["out"] and arg != "out"]
    scalars = launch.resolve(max(work.lengths, default=0))
    given: dict[str, Tensor] = {}
    outputs, rows = {}, {}
    for argument, name in launch.buffers:
        buffer = buffers[name]
        shape, kind = _shape(work, buffer), kinds[buffer.dtype]
        per = PER_SEQUENCE if name == "pixels" else buffer.rows
        if per in (PER_SEQUENCE, PER_TOKEN):
            rows[argument] = per, int(buffer.transposed)
        if argument in OUTPUTS:
            outputs[argument] = shape, kind
        elif argument != "x_stats":
            given[argument] = _values(launch.op, argument, shape, kind, dtype, scalars, work)
    for argument, name in launch.weights:
        packed = weights[name]
        kind = kinds[packed.dtype]
        given[argument] = _values(launch.op, argument, packed.shape, kind, dtype, scalars, work)
    alias = over[0] if over else None
    if "shift" in given:
        weight = given["weight"]
        sums = weight.float().view(len(weight), len(given["shift"]), -1).sum(dim=2).t()
        given["shift"] = FLOAT_OF_INTEGER - 128 * sums.contiguous()
    case = Case(launch.op, given, outputs, alias, scalars, rows, work.lengths)
    if "x_stats" in named:
        with_statistics(case, given, _shape(work, buffers[named["x_stats"]]))
    return case


def with_statistics(case: Case, given: dict[str, Tensor], shape: tuple[int, ...]) -> None:
    """Add the arguments for LayerNorm: statistics of the rows of ``x``, sums of the weight's."""
    given["x_stats"] = torch.empty(shape, dtype=torch.float32, device=DEVICE)
    stats_ref(given["x_stats"], given["x"])
    given["row_sums"] = given["weight"].double().sum(dim=1).float()


def _values(
    op: str,
    argument: str,
    shape: tuple[int, ...],
    kind: torch.dtype,
    dtype: torch.dtype,
    scalars: Mapping[str, Any],
    work: Work,
) -> Tensor:
    """Numbers of about the size they have in a model."""
    if kind == torch.uint8:
        return torch.randint(256, shape, device=DEVICE).to(kind)
    if kind == torch.int32:
        return _integers(argument, shape, work).to(DEVICE)
    if kind == torch.int8:
        return torch.randint(-127, 128, shape, dtype=kind, device=DEVICE)
    values = torch.randn(shape, device=DEVICE)
    if argument in ("x_scale", "weight_scale", "smooth"):
        sizes = {"x_scale": 0.01, "weight_scale": 0.001, "smooth": 1.0}
        return (0.5 + torch.rand(shape, device=DEVICE)) * sizes[argument]
    if argument == "pixels":
        return values.to(dtype).float()  # the operator rounds them, and the reference sees those
    if argument == "weight":
        values *= shape[-1] ** -0.5
        if op == "patch_embed":
            values[:, math.prod(scalars["patch"]) * scalars["channels"] :] = 0
    elif argument == "x":
        values += 0.5
        values[:, 5] *= 30  # trained transformers have a few massive channels
    elif argument == "gamma":
        values = 1 + 0.3 * values
    elif argument in ("bias", "beta", "scale"):
        values *= 0.3
    elif argument in ("qkv", "q"):
        width = shape[1] // (3 if argument == "qkv" else 1)
        values[:, :width] *= 2 * (width // scalars["heads"]) ** -0.5 * LOG2_E
    return values.to(kind)


def _integers(argument: str, shape: tuple[int, ...], work: Work) -> Tensor:
    lengths = torch.tensor(work.lengths)
    ends = lengths.cumsum(0)
    if argument == "cu_seqlens":
        values = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    elif argument in ("rows", "residual_rows"):
        values = ends - lengths if work.pixels is not None else ends - 1
    elif argument == "positions":
        values = torch.cat([torch.arange(n) for n in work.lengths])
    elif argument == "kv_lens":
        values = 1 + torch.arange(len(lengths)) * 7 % lengths
    else:
        assert argument == "ids", f"{argument}: no such integers are known"
        vocabulary = dict(work.plan.weights)["text.token"].shape[0]
        values = torch.randint(vocabulary - 1, shape)  # the last is left for a poison
    return values.to(torch.int32)
