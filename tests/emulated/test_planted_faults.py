"""Synchronization removed from the PTX of real kernels, an instruction at a time: the emulator
names the fault and its line, or a list says why the instruction is not missed.

If a kernel's PTX changes, the indexes in its lists may change too: a failing test shows them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest

from emulated.planted import (
    Planted,
    Replace,
    Subject,
    caught,
    edit,
    names_place,
    sites,
    symptom,
)
from emulated.subjects import attention, linear

pytestmark = pytest.mark.usefixtures("emulated_kernels")

SEEDS = range(8)
"""Round robin with late copies, three schedules of random warps, four in which some run ahead."""

RACE = "(read|write) after (read|write)"


@dataclass(frozen=True)
class Removal:
    """An instruction, and its replacement in a kernel with a fault.

    ``message``: a pattern of the emulator's message. ``strict``: ptxas mends the fault by itself,
    so that the emulator complains only if it is asked to.
    """

    label: str
    pattern: str
    message: str
    replacement: str | Replace = ""
    strict: bool = False

    def planted(self, *indexes: int) -> Planted:
        """Without the instructions of these indexes."""
        change = edit(self.pattern, self.replacement, *indexes)
        return Planted(ptx=change, options={"strict": self.strict})


def times(factor: float) -> Replace:
    """Multiplies the number that the match ends with."""
    return lambda match: f"{match[1]}{int(int(match[2]) * factor)};"


BARRIER = Removal(
    "barrier",
    r"^\tbar\.sync \t0;$",
    f"{RACE}|read of what nobody wrote|no mbarrier is initialized|its initialization by warp",
)
COPY_WAIT = Removal("wait of cp.async", r"(cp\.async\.wait_group \t)\d+;", RACE, r"\g<1>9;")
COPY_COMMIT = Removal("commit of cp.async", r"cp\.async\.commit_group;", RACE)
MBARRIER_WAIT = Removal(
    "mbarrier's wait",
    r"\tmbarrier\.try_wait[^\n]*\n\t@!complete bra\.uni waitLoop;",
    f"{RACE}|mbarrier.inval while a bulk load",
)
PARITY = Removal(
    "parity inverted",
    r"(\tmbarrier\.try_wait\.parity[^\n]*, )(%r\d+);",
    f"{RACE}|mbarrier.inval while a bulk load|deadlock in block",
    r"\t.reg .b32 other; xor.b32 other, \g<2>, 1;\g<1>other;",
)
HALF = Removal(
    "half the bytes expected",
    r"(expect_tx[^\n]*, )(\d+);",
    "a phase ends, too few bytes are expected|deadlock in block",
    times(0.5),
)
TWICE = Removal(
    "twice the bytes expected", r"(expect_tx[^\n]*, )(\d+);", "deadlock in block", times(2)
)
PROXY_FENCE = Removal(
    "fence.proxy.async", r"^\tfence\.proxy\.async[^\n]*$", "without fence.proxy.async"
)
PRODUCT_WAIT = Removal(
    "wait of wgmma",
    r"(wgmma\.wait_group\.sync\.aligned )\d+;",
    f"{RACE}|a register of a wgmma is used that was not waited for",
    r"\g<1>9;",
)
PRODUCT_COMMIT = Removal(
    "commit of wgmma",
    r"^\twgmma\.commit_group\.sync\.aligned;$",
    f"{RACE}|a register of a wgmma is used that was not committed",
)
PRODUCT_FENCE = Removal(
    "fence of wgmma",
    r"^\twgmma\.fence\.sync\.aligned;$",
    "wgmma before any wgmma.fence|a register was written after the latest wgmma.fence",
    strict=True,
)
STORE_WAIT = Removal(
    "wait of bulk stores",
    r"(cp\.async\.bulk\.wait_group\.read \t)\d+;",
    f"{RACE}|a warp ends while a bulk store reads shared memory",
    r"\g<1>9;",
)
STORE_COMMIT = Removal("commit of bulk stores", r"^\tcp\.async\.bulk\.commit_group;$", RACE)

# Why an instruction is not missed.
STAGES = "the copies before and after it go to different stages"
LOOP = "the loop waited for every copy, and the stores that follow go where the queries were"
JOINS = "its copies join the next group, for which the same wait waits"
ISSUES = "stands between two bulk loads, which use no memory that the other does"
INITIAL = "one of several between the initialization of mbarriers and their use"
SAME = "the wait for an mbarrier before it orders as much"
DOUBLE = "another wait stands beside it"
EARLIER = "the loop waited for every product before"
WARPGROUP = "four warps that wait for a product of all four need no barrier"
LAST = "the barriers of the last tile stand between the last wait for an mbarrier and its end"
FENCED = "the fence before the product with K stands behind the same stores"
NO_SUMS = "the products after it read no register"


@dataclass(frozen=True)
class Sweep:
    """A removal at each such instruction of a kernel in turn.

    ``harmless``: by index, why nothing goes wrong.
    ``doubled``: sets of harmless instructions that are not harmless together.
    """

    make: Callable[[int], Subject]
    arch: int
    removal: Removal
    harmless: Mapping[int, str] = field(default_factory=dict)
    doubled: tuple[tuple[int, ...], ...] = ()

    def __str__(self) -> str:
        return f"{self.make.__name__} sm_{self.arch} {self.removal.label}"


SWEEPS = [
    Sweep(linear, 80, BARRIER, {0: STAGES, 1: STAGES}),
    Sweep(attention, 80, BARRIER, {3: LOOP}),
    Sweep(
        linear,
        90,
        BARRIER,
        dict.fromkeys(range(5), INITIAL) | {5: SAME, 7: ISSUES, 12: LAST},
        (tuple(range(5)),),
    ),
    Sweep(
        attention,
        90,
        BARRIER,
        {2: INITIAL, 3: INITIAL, 4: SAME} | dict.fromkeys((5, 6, 7, 11), WARPGROUP),
        ((2, 3),),
    ),
    Sweep(linear, 80, COPY_WAIT),
    Sweep(attention, 80, COPY_WAIT, {1: LOOP}),
    Sweep(linear, 80, COPY_COMMIT, {0: JOINS}),
    Sweep(attention, 80, COPY_COMMIT, {0: JOINS, 2: JOINS}),
    *(Sweep(make, 90, r) for make in (linear, attention) for r in (MBARRIER_WAIT, PARITY)),
    *(Sweep(make, 90, r) for make in (linear, attention) for r in (HALF, TWICE)),
    Sweep(linear, 90, PROXY_FENCE),
    Sweep(attention, 90, PROXY_FENCE, dict.fromkeys((2, 4, 6), FENCED)),
    Sweep(linear, 90, PRODUCT_WAIT, {2: EARLIER}),
    Sweep(attention, 90, PRODUCT_WAIT, {1: DOUBLE, 2: DOUBLE}, ((1, 2),)),
    *(Sweep(make, 90, PRODUCT_COMMIT) for make in (linear, attention)),
    Sweep(linear, 90, PRODUCT_FENCE),
    Sweep(attention, 90, PRODUCT_FENCE, {2: NO_SUMS, 4: NO_SUMS, 6: NO_SUMS}),
    Sweep(linear, 90, STORE_WAIT),
    Sweep(linear, 90, STORE_COMMIT),
]


@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
def test_each_instruction_matters_or_is_known_not_to(sweep: Sweep) -> None:
    subject, removal = sweep.make(sweep.arch), sweep.removal
    count = len(sites(subject.program.module.ptx, removal.pattern))
    harmless = []
    for index in range(count):
        if sentence := caught(subject, removal.planted(index), SEEDS):
            assert names_place(sentence), sentence
            assert re.search(removal.message, sentence), sentence
        else:
            harmless.append(index)
            trap = Planted(ptx=edit(removal.pattern, r"\n\ttrap;\n\g<0>", index))
            assert ": trap [" in caught(subject, trap, [0]), f"{index} is not reached"
    assert harmless == sorted(sweep.harmless)
    assert len(harmless) < count
    for group in sweep.doubled:
        sentence = caught(subject, removal.planted(*group), SEEDS)
        assert re.search(removal.message, sentence), f"{group}: {sentence}"


@pytest.mark.slow
@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
def test_nearly_every_schedule_notices(sweep: Sweep) -> None:
    """One fault shows in 31 of 32 schedules, all others in each: the race check compares what is
    ordered, not what happened."""
    subject, removal = sweep.make(sweep.arch), sweep.removal
    indexes = set(range(len(sites(subject.program.module.ptx, removal.pattern))))
    for index in indexes - set(sweep.harmless):
        shown = sum(bool(symptom(subject, removal.planted(index), seed)) for seed in range(32))
        assert shown >= 31, f"site {index}"
