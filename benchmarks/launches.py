"""The distinct launches of a published model's pooled plan, on CPU tensors that hold numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from shapes import TEXT, VISION, captions
from torch import Tensor

from vitrail.plan.plan import Plan
from vitrail.plan.text import text_pooled
from vitrail.plan.vision import vision_pooled
from vitrail.spec import TextSpec, VisionSpec
from vitrail_kernels import OPERATORS
from vitrail_kernels.launch import Call, Target


def _int8(spec: VisionSpec) -> VisionSpec:
    """With every linear in int8 that may be."""
    blocks = replace(spec.blocks, int8=spec.blocks.int8_candidates)
    return replace(spec, blocks=blocks)


MODELS: dict[str, tuple[VisionSpec | TextSpec, int]] = {
    "ViT-B/16": (VISION["B/16"], 224),
    "CLIP L/14": (VISION["L/14"], 224),
    "DINOv2-B/14": (VISION["DINOv2-B@518"], 224),
    "CLIP B/32": (VISION["B/32"], 224),
    "CLIP H/14": (VISION["H/14"], 224),
    "CLIP-B text": (TEXT["CLIP-B text"], 0),
    "ViT-B/16 int8": (_int8(VISION["B/16"]), 224),
    "CLIP L/14 int8": (_int8(VISION["L/14"]), 224),
}
"""Spec, and pixels a side, by name."""


@dataclass
class Repeated:
    """A launch of a plan, as kernel calls on tensors that hold numbers, and how many equal it."""

    label: str
    op: str
    calls: list[Call]
    times: int = 1


def _plan(
    spec: VisionSpec | TextSpec, side: int, images: int, uint8: bool
) -> tuple[Plan, Sequence[int], dict[str, Tensor]]:
    """The pooled plan, tokens of each sequence, and the pixels as a meta tensor."""
    if isinstance(spec, TextSpec):
        return text_pooled(spec), captions(images), {}
    shape = (side, side, spec.channels) if uint8 else (spec.channels, side, side)
    dtype = torch.uint8 if uint8 else torch.float32
    pixels = torch.empty((images, *shape), dtype=dtype, device="meta")
    lengths = [spec.tokens_at((side, side))] * images
    return vision_pooled(spec, uint8=uint8), lengths, {"pixels": pixels}


def _numbers(name: str, like: Tensor, lengths: Sequence[int]) -> Tensor:
    """A tensor like ``like`` for the argument ``name``: counts and indices are right, the rest
    random."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    if name == "cu_seqlens":
        return ends
    if name in ("rows", "residual_rows"):
        return ends[:-1].clone()
    if name == "positions":
        return torch.cat([torch.arange(n) for n in lengths]).to(torch.int32)
    if like.dtype.is_floating_point:
        return torch.randn(like.shape).abs().mul(0.1).to(like.dtype)
    return torch.randint(100, like.shape).to(like.dtype)


def _key(op: str, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> tuple[Any, ...]:
    """Equal for launches that do the same work on other tensors."""
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    shapes = [(arg, t.shape, t.dtype, first[id(t)]) for arg, t in tensors.items()]
    return (op, *shapes, *sorted(scalars.items()))


def launches(
    spec: VisionSpec | TextSpec, side: int, target: Target, images: int, uint8: bool = True
) -> Iterator[Repeated]:
    """The distinct launches of the pooled plan in fp16, in order.

    ``side``: pixels a side, ignored for texts; ``images``: images or texts at once.
    """
    plan, lengths, inputs = _plan(spec, side, images, uint8)
    bound = list(plan.bind(lengths, "float16", inputs))
    times = Counter(_key(launch.op, *arguments) for launch, *arguments in bound)
    for launch, tensors, scalars in bound:
        repeats = times.pop(_key(launch.op, tensors, scalars), 0)
        if not repeats:
            continue
        real: dict[int, Tensor] = {}
        for name, like in tensors.items():
            if id(like) not in real:
                real[id(like)] = _numbers(name, like, lengths)
        arguments = {name: real[id(like)] for name, like in tensors.items()}
        calls = OPERATORS[launch.op].calls(target, **arguments, **scalars)
        yield Repeated(launch.label, launch.op, list(calls), repeats)
