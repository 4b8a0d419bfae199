"""Tiny models by the Triton runner, launch by launch from Python, on compiled kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from emulated.tiny import Open, Outputs
from runtime.test_runner import HEADS, TEXT, VISION, images, read, same_bits, see
from vitrail.plan.text import text_pooled
from vitrail.plan.vision import vision_dense, vision_pooled
from vitrail.runtime.runner import Runner
from vitrail.runtime.triton import TritonRunner

CPU = torch.device("cpu")
SCHEDULES = 20
BATCH = 3

pytestmark = pytest.mark.usefixtures("emulated_kernels")


def check(ours: Callable[[], Outputs], executor: Outputs, seed: list[int], schedules: int) -> None:
    """The bits of the C++ executor in every schedule."""
    for seed[0] in range(schedules):
        outputs = ours()
        assert outputs.keys() == executor.keys()
        assert same_bits(outputs, executor), f"seed {seed[0]}"


def runner_of(runner: Runner, dtype: torch.dtype) -> TritonRunner:
    return TritonRunner(runner.weights, dtype, CPU)


COUNTS = [
    pytest.param(1, id="1 seed"),
    pytest.param(SCHEDULES, id="20 seeds", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("schedules", COUNTS)
@pytest.mark.parametrize("family", VISION)
def test_images_have_the_executors_bits(
    tiny: Open, python_seed: list[int], family: str, schedules: int
) -> None:
    model, spec, head = tiny(family), VISION[family], HEADS.get(family)
    runner, pixels = runner_of(model.runner, model.dtype), images(BATCH, spec.image)
    taps = tuple(range(spec.blocks.layers + 1))
    for plan in (
        vision_pooled(spec, uint8=True),
        vision_dense(spec, head, uint8=True, taps=taps),
    ):
        expected = see(model.runner, spec, plan, pixels)
        check(lambda plan=plan: see(runner, spec, plan, pixels), expected, python_seed, schedules)


@pytest.mark.parametrize("schedules", COUNTS)
def test_texts_have_the_executors_bits(tiny: Open, python_seed: list[int], schedules: int) -> None:
    model, plan = tiny("text"), text_pooled(TEXT)
    lengths = (5, 9, TEXT.context, 3)
    texts = [torch.randint(1, TEXT.vocab - 1, (n,)) for n in lengths]
    ends = [n - 1 for n in lengths]
    expected = read(model.runner, plan, texts, ends)
    runner = runner_of(model.runner, model.dtype)
    check(lambda: read(runner, plan, texts, ends), expected, python_seed, schedules)
