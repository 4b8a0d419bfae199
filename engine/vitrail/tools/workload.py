"""The operator calls of a checkpoint's plans, equal calls once, and random inputs for them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vitrail.plan.plan import Plan
from vitrail.plan.text import text_pooled
from vitrail.plan.vision import vision_pooled, vision_scores
from vitrail.spec import ModelSpec
from vitrail_kernels import OPERATORS
from vitrail_kernels.configs import KernelConfig, in_force
from vitrail_kernels.device.stats import stats_ref
from vitrail_kernels.launch import Call, Target
from vitrail_kernels.ops.linear_int8_grouped import FLOAT_OF_INTEGER

TUNED = ("linear", "linear_int8", "linear_int8_grouped", "attention", "patch_embed")
"""Operators whose configurations vary; each other operator has one for all sizes."""


@dataclass(frozen=True)
class Problem:
    """An operator call of a plan, on meta tensors; the checkpoint's plans make it ``times`` times.

    ``lengths`` are the tokens of each sequence of the batch.
    """

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
        """Its kernel calls with the configurations of ``table``, on meta tensors or ``tensors``."""
        with in_force(table):
            return OPERATORS[self.op].calls(target, **(tensors or self.tensors), **self.scalars)


def problems(
    spec: ModelSpec, batches: Sequence[int], dtype: str, size: tuple[int, int] | None = None
) -> list[Problem]:
    """The tunable calls of encoding ``batches`` images and texts (a list of batch sizes)."""
    by_shape: dict[Any, Problem] = {}
    for batch in batches:
        for plan, lengths, inputs in _plans(spec, batch, size):
            for step, tensors, scalars in plan.bind(lengths, dtype, inputs):
                if step.op not in TUNED:
                    continue
                shapes = tuple((name, t.shape, t.dtype) for name, t in tensors.items())
                key = (step.op, shapes, repr(scalars), lengths)
                problem = by_shape.get(key)
                if problem is None:
                    by_shape[key] = Problem(step.op, tensors, scalars, lengths)
                else:
                    by_shape[key] = replace(problem, times=problem.times + 1)
    return list(by_shape.values())


def _plans(
    spec: ModelSpec, batch: int, size: tuple[int, int] | None
) -> Iterator[tuple[Plan, tuple[int, ...], dict[str, Tensor]]]:
    if (vision := spec.vision) is not None:
        height, width = size or preprocessed_size(spec) or vision.image
        lengths = (vision.tokens_at((height, width)),) * batch
        for uint8 in (True, False):
            shape = (height, width, vision.channels) if uint8 else (vision.channels, height, width)
            dtype = torch.uint8 if uint8 else torch.float32
            pixels = torch.empty((batch, *shape), dtype=dtype, device="meta")
            yield vision_pooled(vision, uint8=uint8), lengths, {"pixels": pixels}
            if spec.head is not None:
                scores = vision_scores(vision, spec.head, uint8=uint8)
                yield scores, lengths, {"pixels": pixels}
    if (text := spec.text) is not None:  # lengths spread evenly; a single text is the longest
        lengths = tuple(max(1, text.context * (i + 1) // batch) for i in range(batch))
        yield text_pooled(text), lengths, {}


def preprocessed_size(spec: ModelSpec) -> tuple[int, int] | None:
    """The (height, width) that the preprocessor gives every image; None if sizes vary."""
    image = spec.image
    if image is not None and image.crop is None and image.resize and image.resize[0] == "exact":
        return image.resize[1:]
    return None if image is None else image.crop


def fill(problem: Problem, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Random values for ``problem``; arguments that share a buffer share a tensor."""
    generator = torch.Generator(device).manual_seed(seed)
    by_buffer: dict[int, Tensor] = {}
    offsets = torch.tensor([0, *problem.lengths]).cumsum(0).to(torch.int32).to(device)
    for name, meta in problem.tensors.items():
        if id(meta) in by_buffer:
            continue
        tensor = torch.empty(meta.shape, dtype=meta.dtype, device=device)
        by_buffer[id(meta)] = tensor
        if meta.dtype == torch.int32:  # cu_seqlens, or a row of each sequence
            tensor.copy_(offsets[: tensor.numel()])
        elif meta.dtype == torch.uint8:
            tensor.random_(0, 256, generator=generator)
        elif meta.dtype == torch.int8:
            tensor.random_(-127, 128, generator=generator)
        elif name in ("x_scale", "weight_scale"):  # outputs near 1
            size = 0.01 if name == "x_scale" else 0.02 * problem.tensors["x"].shape[1] ** -0.5
            tensor.uniform_(0.5 * size, 1.5 * size, generator=generator)
        else:  # attention scores near 1, so that many keys count
            scale = {"weight": meta.shape[-1] ** -0.5, "qkv": 0.4}.get(name, 1.0)
            tensor.normal_(0, scale, generator=generator)
    tensors = {name: by_buffer[id(meta)] for name, meta in problem.tensors.items()}
    if "x_stats" in tensors:
        stats_ref(tensors["x_stats"], tensors["x"])
    if "row_sums" in tensors:
        tensors["row_sums"].copy_(tensors["weight"].float().sum(dim=1))
    if "shift" in tensors:
        groups = tensors["weight"].float().view(len(tensors["weight"]), len(tensors["shift"]), -1)
        tensors["shift"].copy_(FLOAT_OF_INTEGER - 128 * groups.sum(dim=2).t())
    return tensors
