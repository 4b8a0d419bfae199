"""Batch invariance of compiled int8 kernels: the rows of an item have the same bits alone, at any
place of any batch, and in every configuration that the ladder or a tuned table may choose."""

from __future__ import annotations

import dataclasses
import re

import pytest

from emulated.int8_cases import FORMS, LAST, Case, Tensors, forms
from kernels.test_operators import same_bits
from vitrail_kernels.candidates import candidates
from vitrail_kernels.compile import SHARED_LIMIT, KernelCode, compile_each, order_of_sums
from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.launch import Target, cdiv

pytestmark = pytest.mark.usefixtures("emulated_kernels")

ARCHES = (80, 90)
TOKENS = 5
MOST = 33
"""Tokens of an item, and items of the largest batch."""
PARTS = (*((i, i + 1) for i in (0, 1, 7, 12, 13, 25, 32)), (0, 2), (31, 33), (12, 14))
PARTS += ((0, 3), (11, 14), (30, 33), (0, 16), (9, 25), (17, 33))
"""First and last item of batches of 1, 2, 3 and 16."""

QUICK = ("norm_quant", "up", "down")
NAMES = forms(QUICK, without="norm_quant of some rows")


def case_of(name: str) -> Case:
    return FORMS[name](TOKENS * MOST)


def sms(case: Case) -> int:
    """So many multiprocessors that only the largest batch takes the tiles of large batches."""
    columns = case.inputs["weight"].shape[0] if "weight" in case.inputs else 1
    return cdiv(TOKENS * MOST, 128) * cdiv(columns, 128)


def rows_of(out: Tensors, first: int, last: int) -> Tensors:
    """The rows of items ``first`` to ``last``."""
    rows = slice(first * TOKENS, last * TOKENS)
    return {n: tensor[..., rows] if n in LAST else tensor[rows] for n, tensor in out.items()}


def differing(ours: Tensors, theirs: Tensors) -> list[str]:
    """Outputs of which a bit differs."""
    return [name for name in ours if not same_bits(ours[name], theirs[name])]


def parts_that_differ(case: Case, arch: int, **options: object) -> dict[str, list[str]]:
    """Smaller batches, and what differs in them from the largest batch."""
    every = case.run(arch, sms=sms(case), **options)
    result = {}
    for first, last in PARTS:
        part = case.part(first * TOKENS, last * TOKENS).run(arch, sms=sms(case), **options)
        if names := differing(part, rows_of(every, first, last)):
            result[f"{first}..{last}"] = names
    return result


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", NAMES)
def test_an_item_has_the_same_bits_in_any_batch(name: str, arch: int) -> None:
    case = case_of(name)
    assert parts_that_differ(case, arch) == {}


def ladder(case: Case, arch: int) -> set[KernelConfig]:
    """Every configuration that some number of rows takes."""
    (call,) = case.calls(Target(arch, sms(case)))[1]
    return {call.config} if call.ladder is None else {config for _, config in call.ladder()}


TILES = {
    (80, 90): (
        KernelConfig(64, 128, 64, 4, 2),
        KernelConfig(64, 128, 32, 4, 4),
        KernelConfig(128, 128, 32, 8, 3),
        KernelConfig(128, 128, 64, 8, 2),
        KernelConfig(64, 128, 64, 8, 3, ctas=2),
        KernelConfig(32, 128, 128, 4, 2),
        KernelConfig(16, 128, 64, 4, 3),
    ),
    (90,): (
        KernelConfig(64, 128, 128, 4, 5, ctas=2),
        KernelConfig(128, 128, 64, 4, 4),
        KernelConfig(128, 128, 128, 8, 2, stagger=2000),
    ),
}
"""Tiles by architectures. Small ones make the product of sm_90 `mma` in place of `wgmma`."""


def reductions(code: KernelCode) -> frozenset[tuple[str, ...]]:
    """How the code adds rows up; its products are integers, which any order adds exactly."""
    return frozenset(fact for fact in order_of_sums(code) if fact[0] == "reduction")


def tuned(case: Case, arch: int) -> list[KernelConfig]:
    """Those of `TILES`, and of what `vitrail tune` would try, that run. Where there are statistics,
    those that add them in the order of the ladder, as tuning requires."""
    target, table = Target(arch, sms(case)), ladder(case, arch)
    tried = {config for arches, tiles in TILES.items() if arch in arches for config in tiles}
    for base in table:
        tried |= set(candidates(case.op, base, arch))
    ordered = [*table, *sorted(tried - table, key=repr)]
    codes = compile_each([case.calls(target, config)[1][0] for config in ordered], arch)
    assert not any(isinstance(code, str) for code in codes[: len(table)])
    orders = {reductions(code) for code in codes[: len(table)] if not isinstance(code, str)}
    return [
        config
        for config, code in zip(ordered, codes, strict=True)
        if not isinstance(code, str)
        and code.shared <= SHARED_LIMIT[arch]
        and ("stats" not in case.outputs or reductions(code) in orders)
    ]


def check_configurations(case: Case, arch: int, configs: set[KernelConfig]) -> None:
    """All of them give the same bits."""
    results = [
        (config, case.run(arch, config, sms=sms(case))) for config in sorted(configs, key=repr)
    ]
    for config, out in results:
        assert differing(out, results[0][1]) == [], f"{config} beside {results[0][0]}"


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_gives_the_same_bits(name: str, arch: int) -> None:
    case = case_of(name)
    configs = ladder(case, arch)
    assert len(configs) > 1 or case.op == "norm_quant"
    check_configurations(case, arch, configs)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", ["qkv", "up", "gated up", "down", "gated down"])
def test_tiles_that_tuning_may_choose_give_the_same_bits(name: str, arch: int) -> None:
    case = case_of(name)
    configs = set(tuned(case, arch))
    assert len(configs - ladder(case, arch)) >= 3
    check_configurations(case, arch, configs)


# -- the control -----------------------------------------------------------------------------------


def unfused(ptx: str) -> str:
    """A multiply and an add for each fused one."""
    return re.sub(
        r"fma\.rn\.f32 \t(%\w+), (%\w+), (%\w+), (%\w+);",
        r"mul.rn.f32 \t\1, \2, \3;\n\tadd.rn.f32 \t\1, \1, \4;",
        ptx,
    )


def items_that_differ(every: Tensors, case: Case) -> int:
    """How many items alone have other bits than in the largest batch, of every second."""
    parts = [(i, case.part(i * TOKENS, (i + 1) * TOKENS)) for i in range(0, MOST, 2)]
    return sum(
        bool(differing(p.run(90, sms=sms(case)), rows_of(every, i, i + 1))) for i, p in parts
    )


@pytest.mark.parametrize("name", ["qkv", "down"])
def test_a_rounding_that_depends_on_the_batch_is_noticed(name: str) -> None:
    """The comparison above fails if only the largest batch rounds once more."""
    case = case_of(name)
    assert items_that_differ(case.run(90, sms=sms(case), edit=unfused), case) >= 3


def test_a_sum_whose_order_depends_on_the_batch_is_noticed() -> None:
    """Four warps for a row instead of a warp for several."""
    case = case_of("norm_quant 1024")
    (call,) = case.calls(Target(90, sms(case)))[1]
    other_order = dataclasses.replace(call.config, block_m=1, warps=4)
    assert items_that_differ(case.run(90, other_order, sms=sms(case)), case) >= 3
