"""What the int8 kernels compile to on six architectures, and their arithmetic in every tile."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from main_loops import ASYNC_COPY, TMA_LOAD, TMA_STORE, read_sass
from roofline import CARDS, SHAPES, Step, steps, table

from kernels.test_compile import STACK, check_contraction, check_overlap
from kernels.test_contraction import fused
from vitrail_kernels import OPERATORS
from vitrail_kernels.candidates import INT8
from vitrail_kernels.compile import SHARED_LIMIT, KernelCode, compile_all, compile_call
from vitrail_kernels.launch import Call, Target
from vitrail_kernels.ops.linear_int8_config import linear_int8_config

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted: nothing is compiled"
)

MMA = {80: "IMMA", 86: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "IMMA", 120: "IMMA"}
IMAGES = tuple(name for name, shape in SHAPES.items() if not shape.causal)
QUICK = (("ViT-B/16", 90),)
"""The models and architectures that `make test` compiles; the others are slow."""


def target(arch: int, maps: bool = True) -> Target:
    return Target(arch, CARDS[arch].sms, maps)


def int8_steps(name: str, batch: int | None = None) -> Iterator[Step]:
    """The steps of a model that quantize or multiply in int8."""
    for step in steps(SHAPES[name], torch.int8, batch):
        if step.op in (*INT8, "norm_quant"):
            yield step


@functools.cache
def compiled(
    name: str, arch: int, batch: int | None = None, maps: bool = True
) -> list[tuple[Step, Call, KernelCode]]:
    every = [
        (step, call) for step in int8_steps(name, batch) for call in step.calls(target(arch, maps))
    ]
    codes = compile_all([call for _, call in every], arch)
    return [(*pair, code) for pair, code in zip(every, codes, strict=True)]


def check_waits(code: KernelCode) -> None:
    """ptxas ends and awaits groups of products as it was told, and none within a group."""
    ended = len(re.findall(r"IGMMA.*gsb0", code.sass))
    assert ended == code.ptx.count("wgmma.commit_group"), f"{code.name}: {ended} groups"
    awaited = len(re.findall(r"WARPGROUP\.DEPBAR", code.sass))
    assert awaited == code.ptx.count("wgmma.wait_group"), f"{code.name}: {awaited} waits"


def check(step: Step, call: Call, code: KernelCode, maps: bool) -> None:
    location = f"sm_{code.arch} {step.label} {code.name} {call.config}"
    check_overlap(code)
    check_contraction(code)
    assert code.stack <= STACK, f"{location}: {code.stack} bytes of stack"
    assert code.spills == 0 or 0 < code.stack <= STACK, f"{location}: {code.spills} spills"
    assert code.shared <= SHARED_LIMIT[code.arch], f"{location}: {code.shared} bytes shared"
    assert code.blocks >= call.config.ctas, f"{location}: {code.blocks} blocks fit"
    if step.op == "norm_quant":
        assert code.tensor_core == {}
        return
    assert set(code.tensor_core) == {MMA[code.arch]}, f"{location}: {code.tensor_core}"
    check_waits(code)
    if maps and code.arch >= 90:
        assert code.instructions[TMA_LOAD] > 0, f"{location}: no tensor maps"
        stores = "residual" not in step.tensors
        assert (code.instructions[TMA_STORE] > 0) == stores, f"{location}: tensor map out"
    else:
        assert code.instructions[ASYNC_COPY] > 0, f"{location}: no cp.async"
        assert code.instructions[TMA_LOAD] == 0, f"{location}: tensor maps"


MODELS = [
    pytest.param(name, arch, marks=[] if (name, arch) in QUICK else pytest.mark.slow)
    for name in ("ViT-B/16", "CLIP L/14", "DINOv2-B@518", "DINOv2-g")
    for arch in CARDS
]


@pytest.mark.parametrize(("name", "arch"), MODELS)
def test_every_int8_kernel_of_a_model(name: str, arch: int) -> None:
    kernels = compiled(name, arch)
    assert {step.op for step, _, _ in kernels} == {*INT8, "norm_quant"}
    for step, call, code in kernels:
        check(step, call, code, maps=True)


EMBEDDINGS = [
    pytest.param(name, arch, marks=[] if (name, arch) in QUICK else pytest.mark.slow)
    for name in IMAGES
    for arch in CARDS
]


@pytest.mark.parametrize(("name", "arch"), EMBEDDINGS)
def test_pixels_without_statistics(name: str, arch: int) -> None:
    """No kernel of an int8 plan reads the statistics of the embedded patches."""
    embed = next(iter(steps(SHAPES[name], torch.int8)))
    assert "stats" not in embed.tensors
    (call,) = embed.calls(target(arch))
    code = compile_call(call, arch)
    assert code.stack <= STACK, f"sm_{arch} {name} {call.config}: {code.stack} bytes of stack"


@pytest.mark.slow
@pytest.mark.parametrize("arch", CARDS)
@pytest.mark.parametrize("name", ["ViT-B/16", "DINOv2-g"])
def test_batches_of_one_and_eight(name: str, arch: int) -> None:
    for batch in (1, 8):
        for step, call, code in compiled(name, arch, batch):
            check(step, call, code, maps=True)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100, 120])
def test_without_tensor_maps(arch: int) -> None:
    for step, call, code in compiled("ViT-B/16", arch, maps=False):
        check(step, call, code, maps=False)


# -- sm_90: where two blocks fit, what a step and a value cost ------------------------------------


@dataclasses.dataclass(frozen=True)
class Facts:
    """``registers``, ``step`` (instructions of a warp for an iteration) and ``epilogue``
    (instructions for each value) are at most, ``blocks`` of an SM at least. ``ahead``: iterations
    between a load and its use."""

    registers: int
    blocks: int
    ahead: int
    step: int
    epilogue: float


FACTS = {
    "qkv": Facts(128, 2, 2, 110, 11),
    "up": Facts(128, 2, 2, 110, 33),
    "down": Facts(206, 1, 3, 350, 14),
    "down, stats": Facts(206, 1, 3, 350, 17),
}
"""ViT-B/16's products at batch 256, by launch."""


@pytest.fixture(scope="module")
def base() -> dict[str, tuple[Call, KernelCode]]:
    return {step.label: (call, code) for step, call, code in compiled("ViT-B/16", 90)}


@pytest.mark.parametrize("label", FACTS)
def test_the_machine_code_of_a_product(
    label: str, base: dict[str, tuple[Call, KernelCode]]
) -> None:
    call, code = base[label]
    facts, sass = FACTS[label], read_sass(code.sass)
    (loop,) = sass.loops
    location = f"{label}, {call.config}"
    assert code.registers <= facts.registers, f"{location}: {code.registers} registers"
    assert code.blocks >= facts.blocks, f"{location}: {code.blocks} blocks"
    assert loop.products == {"IGMMA.64x128x32": 4}, location
    assert loop.loads_ahead == facts.ahead == call.config.stages - 1, f"{location}: {loop}"
    assert loop.instructions <= facts.step, f"{location}: {loop.instructions} an iteration"
    assert sass.per_value <= facts.epilogue, f"{location}: {sass.per_value:.1f} a value"


def test_gelu_and_codes_are_few_instructions_a_value(
    base: dict[str, tuple[Call, KernelCode]],
) -> None:
    """GELU is one exponential and eight fused steps; one is the scale's. A conversion from int32
    for each value is all that leaves the fast units besides."""
    _, code = base["up"]
    values = 128 * 128 // 256
    counts = code.instructions
    assert counts["FFMA"] == values * 10
    assert values <= counts["MUFU"] <= values + 16
    assert values <= counts["I2F"] + counts["I2FP"] <= values + 16
    assert counts["F2I"] < values, "codes are rounded by an add"


def test_a_group_costs_a_subtraction_and_a_fused_step_a_value(
    base: dict[str, tuple[Call, KernelCode]],
) -> None:
    """Its integers are floats already: no conversion."""
    (loop,) = read_sass(base["down"][1].sass).loops
    values = 128 * 128 // 256
    assert (loop.opcodes["FADD"], loop.opcodes["FFMA"]) == (values, values)
    assert loop.opcodes["I2F"] + loop.opcodes["I2FP"] == 0


# -- one arithmetic in every tile ------------------------------------------------------------------


def in_every_tile(name: str, label: str, arch: int) -> list[Call]:
    """The call of a model's launch in every configuration of its ladders."""
    (step,) = (one for one in int8_steps(name) if one.label == label)
    calls = {}
    for maps in (True, False):
        (call,) = step.calls(target(arch, maps))
        assert call.ladder is not None
        for _, config in call.ladder():
            (variant,) = OPERATORS[step.op].calls(
                target(arch, maps), **step.tensors, **step.scalars, config=config
            )
            calls[call.kernel.__name__, config] = variant
    assert len(calls) >= 2, f"{label}: only {list(calls)} were compared"
    return list(calls.values())


@pytest.mark.parametrize(
    ("name", "label", "arch"),
    [
        ("ViT-B/16", "up", 90),
        ("DINOv2-B@518", "down, stats", 80),
        *(
            pytest.param(name, label, arch, marks=pytest.mark.slow)
            for name, label, arch in (
                ("ViT-B/16", "up", 80),
                ("ViT-B/16", "qkv", 80),
                ("ViT-B/16", "qkv", 90),
                ("DINOv2-B@518", "down, stats", 90),
                ("DINOv2-g", "up", 90),
                ("DINOv2-g", "down", 90),
            )
        ),
    ],
)
def test_every_tile_has_one_arithmetic(name: str, label: str, arch: int) -> None:
    """No compiler joins a product and a sum: the machine code fuses what the kernel says, and as
    much a value in every tile."""
    counts = {}
    for call in in_every_tile(name, label, arch):
        code = compile_call(call, arch)
        machine, ptx = fused(code)
        assert machine == ptx > 0, f"sm_{arch} {label} {call.config}: FFMA"
        values = call.config.block_m * call.config.block_n / (32 * call.config.warps)
        counts[call.kernel.__name__, call.config] = machine / values
    assert len(set(counts.values())) == 1, counts


def test_the_ladders_are_those_of_every_number_of_rows() -> None:
    """Bits do not depend on the tile, but the native plan takes its tiles from the ladders."""
    for arch in CARDS:
        for step in int8_steps("ViT-B/16", 1):
            (call,) = step.calls(target(arch))
            if call.ladder is None:
                continue
            (n, k), form = step.tensors["weight"].shape, _form_of(step)
            dtype = step.tensors["out"].dtype
            ladder = call.ladder()
            for m in (1, 64, 65, 197, 1000, 1576, 4096, 12608, 50432, 200_000):
                expected = next(config for rows, config in ladder if m <= rows)
                chosen = linear_int8_config(target(arch), dtype, m, n, k, form)
                assert expected == chosen, f"sm_{arch} {step.label}, {m} rows"


def _form_of(step: Step) -> Any:
    (call,) = step.calls(target(90))
    assert call.ladder is not None
    return call.ladder.args[-1]  # type: ignore[attr-defined]


# -- the tools -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_report_serves_int8() -> None:
    """At batch 1, which compiles fast; a forward launches seven kernels a block."""
    labels = [step.label for step in steps(SHAPES["ViT-B/16"], torch.int8, 1)]
    lines = list(table("ViT-B/16", 90, torch.int8, 1))
    assert all(any(line.startswith(label) for line in lines) for label in labels)
    assert "IGMMA" in "".join(lines)
    assert "TFLOP/s of 1978; not a measurement" in lines[-1]


def test_the_report_counts_what_an_int8_plan_counts() -> None:
    from vitrail.plan.vision import vision_pooled
    from vitrail.spec import BlockSpec, VisionSpec

    blocks = BlockSpec(768, 12, 12, 3072, "gelu", 1e-12)
    blocks = dataclasses.replace(blocks, int8=blocks.int8_candidates)
    plan = vision_pooled(VisionSpec(blocks, (224, 224), (16, 16)), uint8=True)
    every = list(steps(SHAPES["ViT-B/16"], torch.int8, 2))
    counted = sum(one.times * one.cost().flops for one in every if one.op != "pool")
    assert counted == plan.flops([197, 197])
    assert sum(step.times for step in every) == len(plan.steps)
