"""Faults planted in int8 kernels: synchronization removed, numbers of epilogues changed, launches
that do not fit. The emulator or the bits say so, or a reason is given."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import torch

from emulated import int8_cases
from emulated.planted import (
    Edit,
    Planted,
    Subject,
    add,
    caught,
    check_fault,
    edit,
    exchange,
    guarded,
    names_place,
    of_map,
    put,
    sites,
)
from emulated.subjects import linear_int8, linear_int8_grouped, norm_quant
from emulated.test_planted_faults import (
    BARRIER,
    COPY_COMMIT,
    COPY_WAIT,
    HALF,
    JOINS,
    MBARRIER_WAIT,
    PARITY,
    PRODUCT_COMMIT,
    PRODUCT_FENCE,
    PRODUCT_WAIT,
    PROXY_FENCE,
    STAGES,
    STORE_COMMIT,
    STORE_WAIT,
    TWICE,
    Removal,
)
from emulated.test_planted_faults import SEEDS as ORDERS
from emulated.test_planted_overlap_faults import UNFINISHED, WAIT, Chain
from emulator.call import compiled
from vitrail_kernels import OPERATORS
from vitrail_kernels.launch import Target

pytestmark = pytest.mark.usefixtures("emulated_kernels")

SEEDS = range(3)
"""A number or a launch is wrong in any schedule: each seed notices each of these faults."""

# -- synchronization -------------------------------------------------------------------------------

MBARRIERS = (MBARRIER_WAIT, PARITY, HALF, TWICE)
WGMMA = (PRODUCT_WAIT, PRODUCT_COMMIT, PRODUCT_FENCE)
REMOVALS: dict[tuple[Callable[[int], Subject], int], tuple[Removal, ...]] = {
    (linear_int8, 80): (BARRIER, COPY_WAIT, COPY_COMMIT),
    (linear_int8, 90): (BARRIER, *MBARRIERS, PROXY_FENCE, *WGMMA, STORE_WAIT, STORE_COMMIT),
    (linear_int8_grouped, 80): (BARRIER, COPY_WAIT, COPY_COMMIT),
    (linear_int8_grouped, 90): (BARRIER, *MBARRIERS, *WGMMA),
}
HARMLESS = {
    (linear_int8, 80, BARRIER): STAGES,
    (linear_int8, 80, COPY_COMMIT): JOINS,
    (linear_int8_grouped, 80, BARRIER): STAGES,
    (linear_int8_grouped, 80, COPY_COMMIT): JOINS,
}
"""Why instructions of a kernel may be removed, even together."""
CASES = [
    pytest.param(
        make,
        arch,
        removal,
        id=f"{make.__name__} sm_{arch} {removal.label}",
        marks=() if make is linear_int8 else pytest.mark.slow,
    )
    for (make, arch), removals in REMOVALS.items()
    for removal in removals
]


@pytest.mark.parametrize(("make", "arch", "removal"), CASES)
def test_synchronization_is_needed(
    make: Callable[[int], Subject], arch: int, removal: Removal
) -> None:
    """Each instruction alone, or together with those that order the same; or a reason is given."""
    subject = make(arch)
    count = len(sites(subject.program.module.ptx, removal.pattern))
    harmless = []
    for index in range(count):
        if sentence := caught(subject, removal.planted(index), ORDERS):
            assert names_place(sentence), sentence
            assert re.search(removal.message, sentence), sentence
        else:
            harmless.append(index)
            trap = Planted(ptx=edit(removal.pattern, r"\n\ttrap;\n\g<0>", index))
            assert ": trap [" in caught(subject, trap, [0]), f"{index} is not reached"
    assert count > 0
    together = caught(subject, removal.planted(*harmless), ORDERS) if harmless else "none"
    if (make, arch, removal) in HARMLESS:
        assert harmless
        assert not together
    else:
        assert together, harmless
    assert len(harmless) < count


# -- numbers ---------------------------------------------------------------------------------------

OTHER = r"other bits: .* of out\b"
NUMBERS = "wrong: .* largest error"
READ, UNWRITTEN = "read out of bounds, .* of {} ", r"bytes of {} .* stay unwritten"
DEADLOCK = "deadlock in block 0: warp 0 at mbarrier"


def text(pattern: str, replacement: str, *indexes: int) -> Planted:
    return Planted(ptx=edit(pattern, replacement, *indexes))


UNSIGNED = text(r"\.s32\.s8\.s8", ".s32.s8.u8")
SHUFFLE = r"shfl\.sync\.bfly\.b32 \t(%r\d+), (%r\d+), [12], 31, -1;"
UP = {
    "codes of the weight without their signs": (UNSIGNED, OTHER),
    "codes rounded one higher": (text("0f4B400000", "0f4B400001"), OTHER),
    "a row's maximum of half its lanes": (text(SHUFFLE, r"mov.b32 \t\1, \2;"), OTHER),
    "an offset of 0.2": (text("0f3E2E147B", "0f3E4CCCCD"), OTHER),
    "codes without an offset of 128": (text("0fC3000000", "0f00000000"), OTHER),
    "scales exchanged": (
        Planted(values=exchange("x_scale_ptr", "weight_scale_ptr")),
        READ.format("x_scale_ptr"),
    ),
    "weight_scale and bias exchanged": (
        Planted(values=exchange("weight_scale_ptr", "bias_ptr")),
        OTHER,
    ),
    "scale_stride one short": (
        Planted(values=add("scale_stride", -1)),
        UNWRITTEN.format("out_scale_ptr") + "|in the same launch, in no order",
    ),
    "x_scale a row late": (Planted(values=add("x_scale_ptr", 4)), READ.format("x_scale_ptr")),
    "m a row short": (Planted(values=add("m", -1)), UNWRITTEN.format("out_scale_ptr")),
}
UP_90 = {
    "half a box": (Planted(maps=of_map("x_map", box=lambda b: [b[0], b[1] // 2])), DEADLOCK),
    "no swizzle of weight": (Planted(maps=of_map("weight_map", swizzle=0)), OTHER),
    "no swizzle of out": (Planted(maps=of_map("out_map", swizzle=0)), OTHER),
    "a row of x short": (
        Planted(maps=of_map("x_map", dims=lambda d: [d[0], d[1] - 1])),
        OTHER,
    ),
    "a row of out short": (
        Planted(maps=of_map("out_map", dims=lambda d: [d[0], d[1] - 1])),
        UNWRITTEN.format("out_map"),
    ),
    "fp16 for int8": (
        Planted(maps=of_map("x_map", element_type=6)),
        "write after write at byte .* of shared memory, by a bulk load",
    ),
}


def shift_by(amount: float) -> Planted:
    return Planted(data={"shift_ptr": lambda t: t[1, 5].add_(amount)})


DOWN = {
    "codes of the weight without their signs": (UNSIGNED, NUMBERS),
    "sums begin at 0": (text("1262485504", "0"), "wrong: .* not finite"),
    "the shift of one group": (shift_by(128 * 1000), NUMBERS),
    "the shift of one group a little off": (shift_by(128), "(wrong|other bits): .* of out"),
    "codes as if they had signs": (
        Planted(data={"shift_ptr": lambda t: t.fill_(12582912.0)}),
        NUMBERS,
    ),
    "groups from the end": (Planted(data={"x_scale_ptr": lambda t: t.copy_(t.flip(0))}), NUMBERS),
    "the next group's shift": (
        Planted(values=add("shift_ptr", 4 * 192)),
        READ.format("shift_ptr"),
    ),
    "x_scale_stride one long": (
        Planted(values=add("x_scale_stride", 1)),
        READ.format("x_scale_ptr"),
    ),
    "x_scale_stride one short": (Planted(values=add("x_scale_stride", -1)), NUMBERS),
    "bias and weight_scale exchanged": (
        Planted(values=exchange("bias_ptr", "weight_scale_ptr")),
        NUMBERS,
    ),
    "residual a row late": (Planted(values=add("residual_ptr", 384)), READ.format("residual_ptr")),
    "m a row short": (Planted(values=add("m", -1)), UNWRITTEN.format("out_ptr")),
}
QUANTIZED = {
    "rows one long": (Planted(values=add("rows", 1)), READ.format("x_ptr")),
    "rows one short": (Planted(values=add("rows", -1)), UNWRITTEN.format("out_ptr")),
    "eps 1": (Planted(values=put("eps", 1.0)), OTHER + "|of out_scale"),
    "a column of smooth twice as large": (
        Planted(data={"smooth_ptr": lambda t: t[7].mul_(2)}),
        OTHER,
    ),
    "codes rounded one higher": (text("0f4B400000", "0f4B400001"), OTHER),
    "a row's maximum of half its lanes": (
        text(r"max\.f32 \t(%r\d+), (%r\d+), (%r\d+);", r"mov.b32 \t\1, \2;", -1),
        OTHER,
    ),
}
QUICK = ("linear_int8 sm_90", "linear_int8_grouped sm_90", "norm_quant sm_90")
FAULTS = [
    pytest.param(
        make,
        arch,
        planted,
        message,
        id=f"{make.__name__} sm_{arch} {label}",
        marks=() if f"{make.__name__} sm_{arch}" in QUICK else pytest.mark.slow,
    )
    for make, arch, faults in (
        (linear_int8, 80, UP),
        (linear_int8, 90, UP | UP_90),
        (linear_int8_grouped, 80, DOWN),
        (linear_int8_grouped, 90, DOWN),
        (norm_quant, 80, QUANTIZED),
        (norm_quant, 90, QUANTIZED),
    )
    for label, (planted, message) in faults.items()
]


@pytest.mark.parametrize(("make", "arch", "planted", "message"), FAULTS)
def test_a_wrong_number_or_launch_is_noticed(
    make: Callable[[int], Subject], arch: int, planted: Planted, message: str
) -> None:
    check_fault(make, arch, planted, message, SEEDS)


# -- launches that overlap -------------------------------------------------------------------------


@functools.cache
def mlp() -> Chain:
    """norm_quant, linear_int8 and linear_int8_grouped on sm_90. Each reads codes and scales of the
    launch before, and the last adds the stream that the first read."""
    torch.manual_seed(0)
    target, programs, written = Target(90, 1), [], []
    first = int8_cases.norm_quant(100, 192)
    up = int8_cases.linear_int8(100, 256, 192, activation="gelu", quantizes=True)
    down = int8_cases.grouped(100, 192, 256, in_place=False)
    cases = (first, up, down)
    outputs = [{n: guarded(t) for n, t in case.outputs.items()} for case in cases]
    inputs = [{n: guarded(t) for n, t in case.inputs.items()} for case in cases]
    for before, after in ((0, 1), (1, 2)):
        inputs[after] |= {"x": outputs[before]["out"], "x_scale": outputs[before]["out_scale"]}
    inputs[2]["residual"] = inputs[0]["x"]
    for case, out, given in zip(cases, outputs, inputs, strict=True):
        (call,) = OPERATORS[case.op].calls(target, **out, **given, **case.scalars)
        programs.append(compiled(call, 90))
        written += out.values()
    return Chain(tuple(programs), tuple(written), outputs[2]["out"])


KERNELS = ("_norm_quant_kernel", "_linear_int8_tma_kernel", "_linear_int8_grouped_tma_kernel")
AFTER_FIRST_LOAD = edit(
    r"\tgriddepcontrol\.wait;((?s:.)*?cp\.async\.bulk[^;]*;)", r"\1 griddepcontrol.wait;"
)


def test_int8_launches_that_overlap_give_the_same_bits() -> None:
    assert mlp().run({}, 0)[0] == ""
    expected, overlaps = mlp().last.clone(), 0
    for seed in ORDERS:
        sentence, overlapped = mlp().run({}, seed)
        assert sentence == ""
        assert torch.equal(mlp().last, expected)
        overlaps += sum(map(bool, overlapped))
    assert overlaps > len(ORDERS)


@pytest.mark.parametrize("change", [edit(WAIT), AFTER_FIRST_LOAD], ids=["no wait", "late"])
@pytest.mark.parametrize("launch", [1, 2])
def test_an_int8_launch_that_does_not_wait_is_noticed(launch: int, change: Edit) -> None:
    before, ours = KERNELS[launch - 1], KERNELS[launch]
    message = UNFINISHED.format(before, launch - 1, ours, launch)
    for seed in ORDERS:
        sentence, _ = mlp().run({launch: change}, seed)
        assert names_place(sentence), sentence
        assert re.search(message, sentence), sentence
