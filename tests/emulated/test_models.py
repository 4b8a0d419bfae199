"""Tiny models of every family as compiled kernels, launched by the C++ executor: their outputs, in
many schedules, beside a model written out in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from emulated.device import Device
from emulated.tiny import Open
from runtime.test_runner import (
    HEADS,
    TEXT,
    VISION,
    Tensors,
    check,
    images,
    linear,
    logits_of,
    norm,
    normalized,
    read,
    see,
    text_outputs,
    vision_outputs,
    vision_streams,
)
from vitrail.plan.plan import Plan
from vitrail.plan.text import text_dense, text_pooled
from vitrail.plan.vision import vision_dense, vision_layers, vision_pooled, vision_scores
from vitrail.spec import HeadSpec, VisionSpec

BATCH = 12
"""Enough images that errors in 16 bits mean something."""

FEW = (0, 1, 2)
MANY = tuple(range(20))
SEEDS = [pytest.param(FEW, id="3 seeds"), pytest.param(MANY, id="20 seeds", marks=pytest.mark.slow)]


def formula(
    plan: Plan, name: str, spec: VisionSpec, head: HeadSpec | None, pixels: Tensor
) -> Callable[[Tensors], Tensor]:
    """The output ``name`` of ``plan``, written out in PyTorch, from a model's tensors."""

    def streams(t: Tensors) -> Tensor:
        layer = int(name.rpartition(".")[2])
        return norm(t, "vision.norm", vision_streams(spec, t, pixels)[layer + 1], spec.blocks.eps)

    def embedding(t: Tensors) -> Tensor:
        last = vision_streams(spec, t, pixels)[-1][:, 0]
        last = norm(t, "vision.norm", last, spec.blocks.eps)
        return linear(t, "vision.projection", last) if spec.projection else last

    if name.startswith("vision.layer."):
        return streams
    if plan.name == "vision.pooled":
        return embedding
    if plan.name == "vision.scores":
        return lambda t: logits_of(vision_outputs(spec, head, t, pixels))
    return lambda t: vision_outputs(spec, head, t, pixels)[name]


def plans_of(spec: VisionSpec, head: HeadSpec | None, uint8: bool) -> list[Plan]:
    layers = spec.blocks.layers
    made = [
        vision_pooled(spec, uint8=uint8),
        vision_dense(spec, head, uint8=uint8, taps=tuple(range(layers + 1))),
        vision_layers(spec, (0, layers - 1), True, uint8),
    ]
    return made if head is None else [*made, vision_scores(spec, head, uint8=uint8)]


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize("family", VISION)
def test_image_outputs_are_those_of_a_plain_model(
    tiny: Open, family: str, uint8: bool, seeds: Sequence[int]
) -> None:
    model, spec, head = tiny(family), VISION[family], HEADS.get(family)
    pixels = images(BATCH, spec.image)
    exact = normalized(pixels)
    arguments = pixels if uint8 else exact.float().contiguous()
    for plan in plans_of(spec, head, uint8):
        out = model.outputs(seeds, lambda plan=plan: see(model.runner, spec, plan, arguments))
        for name, ours in out.items():
            if name == "vision.status":
                assert not ours.any()
                continue
            expected = formula(plan, name, spec, head, exact)
            check(f"{plan.name}: {name}", ours, model.tensors, expected, model.dtype)


@pytest.mark.parametrize("seeds", SEEDS)
def test_text_outputs_are_those_of_a_plain_model(tiny: Open, seeds: Sequence[int]) -> None:
    model = tiny("text")
    ids, ends = torch.randint(40, (12, 17)), [16, 3, 0, 9, 1, 12, 16, 5, 2, 7, 11, 14]
    packed = [row[: end + 1] for row, end in zip(ids, ends, strict=True)]
    taps = tuple(range(TEXT.blocks.layers + 1))
    for plan, rows in (
        (text_dense(TEXT, taps=taps), list(ids)),
        (text_pooled(TEXT), packed),
    ):
        out = model.outputs(
            seeds, lambda plan=plan, rows=rows: read(model.runner, plan, rows, ends)
        )
        for name, ours in out.items():
            if name == "text.status":
                assert not ours.any()
                continue
            streams = name.startswith(("text.hidden.", "text.last"))
            result = ours.view(12, 17, -1) if streams else ours

            def wanted(t: Tensors, name: str = name) -> Tensor:
                return text_outputs(TEXT, t, ids, ends)[name]

            check(f"{plan.name}: {name}", result, model.tensors, wanted, model.dtype)


@pytest.mark.parametrize("family", ["clip", "dinov2"])
def test_images_of_another_size_are_those_of_a_plain_model(tiny: Open, family: str) -> None:
    """Positions are interpolated, and pixels are left over at the edges."""
    model, spec = tiny(family), VISION[family]
    larger = (spec.image[0] + 2 * spec.patch[0] + 1, spec.image[1] + spec.patch[1])
    pixels, plan = images(BATCH, larger), vision_pooled(spec, uint8=True)
    out = model.outputs(FEW, lambda: see(model.runner, spec, plan, pixels))["vision.embedding"]
    expected = formula(plan, "vision.embedding", spec, None, normalized(pixels))
    check("embedding", out, model.tensors, expected, model.dtype)


def test_launches_overlap_from_sm_90_on(tiny: Open, device: Device) -> None:
    """So that the schedules above are those of grids that run together."""
    model, spec = tiny("vit"), VISION["vit"]
    plan, pixels = vision_pooled(spec, uint8=True), images(3, spec.image)
    model.runner.position_table(spec, spec.grid, "uint8")
    before = device.emulation.totals()
    model.outputs((1, 2), lambda: see(model.runner, spec, plan, pixels))
    after = device.emulation.totals()
    launches, overlapped = after.launches - before.launches, after.overlapped - before.overlapped
    assert launches == 2 * len(plan.steps)
    assert overlapped >= launches // 2 if device.arch >= 90 else overlapped == 0
