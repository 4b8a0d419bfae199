"""The operator calls of a checkpoint's plans, equal ones once, and random values for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vitrail.plan import blocks as plans
from vitrail.plan.plan import Plan
from vitrail.spec import ModelSpec
from vitrail_kernels import OPERATORS
from vitrail_kernels.configs import KernelConfig, in_force
from vitrail_kernels.device.stats import stats_ref
from vitrail_kernels.launch import Call, Target

TUNED = ("linear", "attention", "patch_embed")
"""Operators whose configurations vary; the others have one for all sizes."""


@dataclass(frozen=True)
class Problem:
    """One operator call of a checkpoint's plans, as meta tensors; a forward makes it ``times``."""

    op: str
    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Any]
    lengths: tuple[int, ...]
    times: int = 1

    def calls(
        self,
        target: Target,
        table: Mapping[str, KernelConfig],
        tensors: Mapping[str, Tensor] | None = None,
    ) -> list[Call]:
        """Its launches with ``table`` in force, over ``tensors`` in place of the meta tensors."""
        with in_force(table):
            return OPERATORS[self.op].calls(target, **(tensors or self.tensors), **self.scalars)


def problems(
    spec: ModelSpec, batches: Sequence[int], dtype: str, size: tuple[int, int] | None = None
) -> list[Problem]:
    """What encoding ``batches`` images and texts launches, equal calls once."""
    found: dict[Any, Problem] = {}
    for batch in batches:
        for plan, lengths, inputs in _plans(spec, batch, size):
            for made, tensors, scalars in plan.bind(lengths, dtype, inputs):
                if made.op not in TUNED:
                    continue
                shapes = tuple((name, t.shape, t.dtype) for name, t in tensors.items())
                key = (made.op, shapes, repr(scalars), lengths)
                old = found.get(key)
                one = Problem(made.op, tensors, scalars, lengths)
                found[key] = one if old is None else replace(old, times=old.times + 1)
    return list(found.values())


def _plans(
    spec: ModelSpec, batch: int, size: tuple[int, int] | None
) -> Iterator[tuple[Plan, tuple[int, ...], dict[str, Tensor]]]:
    if (vision := spec.vision) is not None:
        height, width = size or served(spec) or vision.image
        lengths = (vision.tokens_at((height, width)),) * batch
        for uint8 in (True, False):
            shape = (height, width, vision.channels) if uint8 else (vision.channels, height, width)
            kind = torch.uint8 if uint8 else torch.float32
            pixels = torch.empty((batch, *shape), dtype=kind, device="meta")
            yield plans.vision_pooled(vision, uint8=uint8), lengths, {"pixels": pixels}
            if spec.head is not None:
                scores = plans.vision_scores(vision, spec.head, uint8=uint8)
                yield scores, lengths, {"pixels": pixels}
    if (text := spec.text) is not None:  # of all lengths evenly; one alone is the longest
        lengths = tuple(max(1, text.context * (i + 1) // batch) for i in range(batch))
        yield plans.text_pooled(text), lengths, {}


def served(spec: ModelSpec) -> tuple[int, int] | None:
    """What the preprocessor makes of every image, if it makes one size."""
    image = spec.image
    if image is not None and image.crop is None and image.resize and image.resize[0] == "exact":
        return image.resize[1:]
    return None if image is None else image.crop


def fill(problem: Problem, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Random values for ``problem``; arguments that share a buffer share a tensor."""
    dice = torch.Generator(device).manual_seed(seed)
    made: dict[int, Tensor] = {}
    offsets = torch.tensor([0, *problem.lengths]).cumsum(0).to(torch.int32).to(device)
    for name, meta in problem.tensors.items():
        if id(meta) in made:
            continue
        made[id(meta)] = one = torch.empty(meta.shape, dtype=meta.dtype, device=device)
        if meta.dtype == torch.int32:  # cu_seqlens, or one row of each sequence
            one.copy_(offsets[: one.numel()])
        elif meta.dtype == torch.uint8:
            one.random_(0, 256, generator=dice)
        else:  # scores of attention near 1, so that many keys count
            scale = {"weight": meta.shape[-1] ** -0.5, "qkv": 0.4}.get(name, 1.0)
            one.normal_(0, scale, generator=dice)
    tensors = {name: made[id(meta)] for name, meta in problem.tensors.items()}
    if "x_stats" in tensors:
        stats_ref(tensors["x_stats"], tensors["x"])
    if "row_sums" in tensors:
        tensors["row_sums"].copy_(tensors["weight"].float().sum(dim=1))
    return tensors
