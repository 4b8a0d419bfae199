"""Masks of loads and stores dropped, each in turn: the emulator names the access past an end, or
the mask masks nothing in this shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from emulated.planted import Planted, Subject, caught, edit, names_place, sites
from emulated.subjects import attention, gathered, linear, linear_int8, norm_quant

pytestmark = pytest.mark.usefixtures("emulated_kernels")

SEEDS = range(3)

MASK = r"@(%p\d+) (?=(ld|st)\.global)"
FIRST_ROW = "rows past the end read the first row, and are not stored"
NEXT_ROW = "columns past the end read the next row, and are not stored"
MASKS: list[tuple[Callable[..., Subject], tuple[int, ...], dict[int, str]]] = [
    (linear, (80,), {}),
    (linear, (90,), {}),
    (
        gathered,
        (80,),
        {i: FIRST_ROW for i in range(9, 32) if i not in (12, 16, 20, 24, 28)} | {44: NEXT_ROW},
    ),
    *((attention, (arch, tokens), {}) for arch in (80, 90) for tokens in (69, 84, 104)),
    *((norm_quant, (arch,), {}) for arch in (80, 90)),
    *((linear_int8, (arch,), {}) for arch in (80, 90)),
]


@pytest.mark.parametrize(
    ("make", "arguments", "harmless"), MASKS, ids=[f"{m.__name__} {a}" for m, a, _ in MASKS]
)
def test_each_mask_matters_or_masks_nothing(
    make: Callable[..., Subject], arguments: tuple[int, ...], harmless: dict[int, str]
) -> None:
    subject = make(*arguments)
    indexes = set(range(len(sites(subject.program.module.ptx, MASK))))
    useless, unseen = set(), set()
    for index in indexes:
        if sentence := caught(subject, Planted(ptx=edit(MASK, "", index)), SEEDS):
            assert names_place(sentence), sentence
        elif caught(subject, Planted(ptx=edit(MASK, r"@!\1 trap; \g<0>", index)), [0]):
            unseen.add(index)
        else:  # no lane is ever masked, or no warp comes by
            useless.add(index)
    assert unseen == set(harmless)
    assert indexes - unseen - useless
