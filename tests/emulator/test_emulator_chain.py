"""Chains of launches: programmatic dependent launch and its waits."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

import emulator
import shared_library
from emulator import Fault, Launch, Module, Range, Report
from emulator.programs import Program, bytes_of, execute, program_of

pytestmark = [
    pytest.mark.skipif(shared_library.compiler() is None, reason="no C++ compiler here"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled"),
]
SEEDS = range(8)
TRIGGER, DEPENDENCY = "griddepcontrol.launch_dependents;", "griddepcontrol.wait;"
ADD = "ld.global.b32 %r9, [%rd5]; add.s32 %r9, %r9, 1; st.global.b32 [%rd5], %r9;"


def chain(bodies: Sequence[str], seed: int, *, pdl: bool = True, grid: int = 3) -> list[Report]:
    """Launches of ``bodies`` on one output of zeros; checks that each adds 1 if all do."""
    values = np.zeros(grid * 32, np.uint64)
    address = values.ctypes.data.to_bytes(8, "little")
    launches = []
    for index, body in enumerate(bodies):
        text = (
            Program(body, bytes_of(), bytes_of()).text().replace(".entry k(", f".entry k{index}(")
        )
        module = Module(text)
        parameters = module.pack([address, address, bytes(128)])
        launches.append(Launch(module, (grid,), (32,), parameters, pdl=pdl and index > 0))
    reports = emulator.run(
        launches, [Range(values.ctypes.data, values.nbytes, "out")], seed=seed, limit=20_000
    )
    assert (values == sum(ADD in body for body in bodies)).all()
    return reports


def test_launches_in_order() -> None:
    for seed in SEEDS:
        reports = chain([ADD, ADD, ADD], seed, pdl=False)
        assert [report.overlapped for report in reports] == [0, 0, 0]
        assert [report.blocks for report in reports] == [3, 3, 3]


def test_launches_that_overlap_and_wait() -> None:
    bodies = [f"{DEPENDENCY} {TRIGGER} {ADD}"] * 4
    overlapped = [chain(bodies, seed)[2].overlapped for seed in range(20)]
    assert overlapped[0] == 0  # seed 0 runs launches one after the other
    assert sum(overlapped) >= 5


@pytest.mark.parametrize("seed", range(20))
def test_a_missing_wait_is_found_in_every_schedule(seed: int) -> None:
    waits = f"{DEPENDENCY} {TRIGGER} {ADD}"
    with pytest.raises(Fault) as caught:
        chain([waits, f"{TRIGGER} {ADD}"], seed)
    early = r"k1: global memory: read of bytes that k0 \(launch 0\) writes, before k1 \(launch 1\)"
    late = (
        r"k0: global memory: (write|read) of bytes that k1 \(launch 1\) \w+ without waiting for k0"
    )
    assert re.match(f"{early}|{late}", str(caught.value))
    assert caught.value.launch in (0, 1)
    assert caught.value.address != 0


@pytest.mark.parametrize("seed", range(6))
def test_what_comes_before_the_wait_must_not_touch_what_launches_before_write(seed: int) -> None:
    store = "st.global.b32 [%rd5], %r1; "
    with pytest.raises(Fault, match=r"write of bytes that|read of bytes that"):
        chain([f"{TRIGGER} {DEPENDENCY} {ADD}", f"{store}{DEPENDENCY} {ADD}"], seed)
    # A read of what nobody writes may come before.
    quiet = "ld.global.b32 %r9, [%rd5];"
    chain([f"{TRIGGER} {quiet}", f"{quiet} {DEPENDENCY}"], seed)


@pytest.mark.parametrize("seed", range(6))
def test_a_launch_that_lets_others_start_before_it_waits_orders_fewer(seed: int) -> None:
    """The third launch begins once the second has said so. If the second waits first, the first
    is complete by then, and otherwise it may not be."""
    first, third = f"{TRIGGER} {ADD}", "ld.global.b32 %r9, [%rd5];"
    waits_first = f"{DEPENDENCY} {TRIGGER} mov.b32 %r9, 0;"
    chain([first, waits_first, third], seed)
    with pytest.raises(Fault, match=r"k2 \(launch 2\)|k2: "):
        chain([first, f"{TRIGGER} {DEPENDENCY} mov.b32 %r9, 0;", third], seed)


def test_chains_run_without_race_checks_too() -> None:
    program = program_of("cp.async.bulk.commit_group")  # a tensor store
    load = program_of("mbarrier.expect_tx.relaxed.cta.shared::cta.b64")
    assert program is not None
    assert load is not None
    for item in (program, load):
        for seed in SEEDS:
            twice = replace(item, overlaps=True, body=f"{TRIGGER} {DEPENDENCY} {item.body}")
            out, _ = execute(twice, seed=seed, races=0)
            assert np.array_equal(out, item.expected)


def test_a_wait_of_one_warp_reaches_others_by_a_barrier() -> None:
    store = "st.global.b32 [%rd5], %r1; mov.b32 %r12, 0; st.global.b32 [%rd5+4], %r12;"
    body = "setp.lt.u32 %p1, %r1, 32; @!%p1 bra NEXT; " + DEPENDENCY + " NEXT: {} " + store

    def two_warps(between: str, seed: int) -> None:
        values = np.zeros(64, np.uint64)
        address = values.ctypes.data.to_bytes(8, "little")
        module = Module(Program(body.format(between), bytes_of(), bytes_of()).text())
        first = Launch(module, (1,), (64,), module.pack([address, address, bytes(128)]))
        again = Launch(module, (1,), (64,), first.parameters, pdl=True)
        emulator.run([first, again], [Range(values.ctypes.data, 512, "out")], seed=seed)

    for seed in SEEDS:
        two_warps("bar.sync 0;", seed)
        with pytest.raises(Fault, match=r"has waited for it|without waiting for"):
            two_warps("", seed)
