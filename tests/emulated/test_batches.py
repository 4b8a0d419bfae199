"""Batch invariance of compiled kernels: an image or a text has the same bits alone, at any place of
any batch, and in every configuration that a table or its heuristic may choose."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emulated.device import Device, EmulatedRunner, unedited
from emulated.tiny import Open, Outputs, Tiny
from emulator.call import run_call
from gpu.cases import TILES
from runtime.test_runner import (
    HEADS,
    TEXT,
    VISION,
    bits,
    images,
    open_runner,
    read,
    same_bits,
    see,
)
from vitrail.plan.plan import Plan
from vitrail.plan.text import text_pooled
from vitrail.plan.vision import vision_dense, vision_pooled
from vitrail.spec import BlockSpec, VisionSpec
from vitrail.tools.workload import Problem, fill, problems
from vitrail_kernels.candidates import candidates
from vitrail_kernels.compile import SHARED_LIMIT, compile_each, order_of_sums
from vitrail_kernels.configs import KernelConfig, in_force
from vitrail_kernels.device.stats import stats_shape
from vitrail_kernels.launch import Call, Target
from vitrail_kernels.ops.linear import linear_calls

MOST = 40
PARTS = (*((i, i + 1) for i in range(0, 40, 3)), (4, 6), (20, 23), (31, 39), (0, 8))
"""First and last image of batches of 1, 2, 3 and 8 that are compared with the batch of `MOST`."""


def differing(ours: Tensor, theirs: Tensor) -> int:
    """How many numbers differ in a bit."""
    return int((bits(ours) != bits(theirs)).view(*ours.shape, -1).any(-1).sum())


def parts_that_differ(every: Outputs, part: Callable[[int, int], Outputs]) -> dict[str, int]:
    """Outputs of which some number differs in a smaller batch, with how many do."""
    result: dict[str, int] = {}
    for first, last in PARTS:
        for name, ours in part(first, last).items():
            if count := differing(ours, every[name][first:last]):
                result[f"{name} of {first}..{last}"] = count
    return result


def forwards(
    model: Tiny, spec: VisionSpec, plan: Plan
) -> tuple[Outputs, Callable[[int, int], Outputs]]:
    """Outputs of `MOST` images, and what gives those of some of them."""
    pixels = images(MOST, spec.image)

    def run(first: int, last: int) -> Outputs:
        return see(model.runner, spec, plan, pixels[first:last].contiguous())

    return run(0, MOST), run


@pytest.mark.parametrize("family", VISION)
def test_an_image_has_the_same_bits_in_any_batch(tiny: Open, family: str) -> None:
    model, spec, head = tiny(family), VISION[family], HEADS.get(family)
    taps = tuple(range(spec.blocks.layers + 1))
    for plan in (
        vision_pooled(spec, uint8=True),
        vision_dense(spec, head, uint8=True, taps=taps),
    ):
        assert parts_that_differ(*forwards(model, spec, plan)) == {}, plan.name


def test_a_text_has_the_same_bits_in_any_batch(tiny: Open) -> None:
    model, plan = tiny("text"), text_pooled(TEXT)
    lengths = [1 + 7 * i % TEXT.context for i in range(MOST)]
    texts = [torch.randint(1, TEXT.vocab - 1, (n,)) for n in lengths]

    def run(first: int, last: int) -> Outputs:
        ends = [n - 1 for n in lengths[first:last]]
        return read(model.runner, plan, texts[first:last], ends)

    assert parts_that_differ(run(0, MOST), run) == {}


def unfused(call: Call, ptx: str) -> str:
    """A multiply and an add for each fused one, in tiles of 128 columns alone: the code that a
    compiler may make of an epilogue that does not say `tl.fma`."""
    if call.config.block_n < 128:
        return ptx
    return re.sub(
        r"fma\.rn\.f32 \t(%\w+), (%\w+), (%\w+), (%\w+);",
        r"mul.rn.f32 \t\1, \2, \3;\n\tadd.rn.f32 \t\1, \1, \4;",
        ptx,
    )


WIDE = VisionSpec(
    BlockSpec(128, 2, 2, 192, "silu", 1e-6, gated=True, qkv_bias=False, layer_scale=True),
    (28, 28),
    (14, 14),
    registers=4,
    position_antialias=True,
)
"""DINOv2 with so many numbers that a rare rounding shows in every image."""


def test_one_rounding_more_in_the_tiles_of_large_batches_is_noticed(
    device: Device, tmp_path: Path
) -> None:
    """The comparison above, and its control: with such tiles planted it fails."""
    _, reference = open_runner(tmp_path, WIDE, dtype=torch.float16)
    plan = vision_dense(WIDE, uint8=True, taps=(1,))
    try:
        for edit in (device.edit, unfused):
            device.edit = edit
            runner = EmulatedRunner(device, reference.weights, torch.float16)
            model = Tiny({}, runner, device, torch.float16)
            result = parts_that_differ(*forwards(model, WIDE, plan))
            runner.close()
            if edit is unfused:
                assert len(result) >= 3
            else:
                assert result == {}
    finally:
        device.edit = unedited


# -- every configuration of an operator ------------------------------------------------------------


class Sizes:
    """What `problems` looks at of a ModelSpec."""

    image = None

    def __init__(self, family: str) -> None:
        self.vision = VISION.get(family)
        self.text = TEXT if family == "text" else None
        self.head = HEADS.get(family)


def configurations(
    problem: Problem, device: Device, tuning: bool
) -> Iterator[tuple[str, KernelConfig]]:
    """Key and configuration of every entry of a launch's ladder; with ``tuning`` also what a tuned
    table may hold: what `vitrail tune` would try on a GPU."""
    for call in problem.calls(device.target, {}):
        assert call.ladder is not None, f"{problem.op}: no ladder"
        key = call.key
        chosen = {config for _, config in call.ladder()}
        yield from ((key, config) for config in sorted(chosen, key=repr))
        if tuning:
            tried = list(candidates(problem.op, call.config, device.arch))
            calls = [c for t in tried for c in problem.calls(device.target, {key: t})]
            own, *other_codes = compile_each([call, *calls], device.arch)
            assert not isinstance(own, str), own
            for config, code in zip(tried, other_codes, strict=True):
                fits = not isinstance(code, str) and code.shared <= SHARED_LIMIT[device.arch]
                if fits and order_of_sums(code) == order_of_sums(own):
                    yield key, config


def check_configurations(problem: Problem, device: Device, tuning: bool) -> int:
    """Compares the bits of all configurations; returns how many kernels there were."""
    tensors = fill(problem, torch.device("cpu"), 0)
    names = [name for name in ("out", "stats") if name in tensors]
    start = {name: tensors[name].clone() for name in names}
    expected: dict[str, Tensor] = {}
    tried = list(configurations(problem, device, tuning))
    for key, config in tried:
        for name in names:
            tensors[name].copy_(start[name])
        for call in problem.calls(device.target, {key: config}, tensors):
            run_call(call, device.arch)
        for name in names:
            ours = tensors[name].clone()
            count = differing(ours, expected.setdefault(name, ours))
            assert count == 0, f"{key}: {config}: {count} numbers of {name} differ"
    return len(tried)


@pytest.mark.parametrize("family", VISION)
def test_a_tuned_table_changes_no_bit(tiny: Open, device: Device, family: str) -> None:
    """Of every key that a model asks for, the table has the tile of the largest batch."""
    model, spec = tiny(family), VISION[family]
    name = str(model.dtype).removeprefix("torch.")
    pixels, table = images(3, spec.image), dict[str, KernelConfig]()
    for batch in (3, MOST):
        for problem in problems(Sizes(family), [batch], name):  # type: ignore[arg-type]
            for call in problem.calls(device.target, {}):
                table[call.key] = call.ladder()[-1][1] if call.ladder else call.config
    plan, shapes, outputs = vision_pooled(spec, uint8=True), [], []
    for forced in ({}, table):
        model.runner.close()
        model.runner = EmulatedRunner(device, model.runner.weights, model.dtype)
        device.driver.reset()
        device.driver.record(True)
        with in_force(forced):
            outputs.append(see(model.runner, spec, plan, pixels))
        shapes.append([(one.name, one.grid, one.shared) for one in device.driver.launched()])
        device.driver.record(False)
    model.runner.close()
    assert shapes[0] != shapes[1], "the table chose what the heuristic does"
    assert same_bits(*outputs)


@pytest.mark.slow
def test_tiles_that_tuning_may_choose_give_the_same_bits(device: Device) -> None:
    """Every fifth of those that `vitrail tune` would try, for all forms that DINOv2 launches."""
    several = 0
    for problem in problems(Sizes("dinov2"), [6], "float16"):  # type: ignore[arg-type]
        several += check_configurations(problem, device, tuning=True) > 2
    assert several >= 3


@pytest.mark.parametrize("family", [*VISION, "text"])
def test_every_configuration_of_an_operator_gives_the_same_bits(
    device: Device, dtype: torch.dtype, family: str
) -> None:
    name = str(dtype).removeprefix("torch.")
    several = 0
    for problem in problems(Sizes(family), [6], name):  # type: ignore[arg-type]
        several += check_configurations(problem, device, tuning=False) > 1
    assert several >= 4


@pytest.mark.parametrize("scaled", [False, True])
def test_every_tile_beside_a_residual_gives_the_same_bits(scaled: bool) -> None:
    """Only wide models take the widest of them there."""
    rows, n, k, dice = 300, 512, 192, torch.Generator().manual_seed(0)
    x, residual = (torch.randn(rows, w, generator=dice).half() for w in (k, n))
    weight = (torch.randn(n, k, generator=dice) * k**-0.5).half()
    bias, scale = torch.randn(2, n, generator=dice)
    results = []
    for config in TILES:
        out, stats = torch.empty(rows, n).half(), torch.empty(stats_shape(rows, n))
        tensors = {"bias": bias, "scale": scale if scaled else None, "residual": residual}
        target = Target(90, 3)
        (call,) = linear_calls(target, out, x, weight, stats=stats, config=config, **tensors)
        run_call(call, 90, [out, stats])
        results.append((out, stats))
    for config, (out, stats) in zip(TILES, results, strict=True):
        assert differing(out, results[0][0]) == 0, config
        assert differing(stats, results[0][1]) == 0, config
