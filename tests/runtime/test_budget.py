"""The memory budget of a model: sizes in words, what fits, threads that share it, forks."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs.processes import run_at_once
from vitrail.errors import InputError, OutOfMemoryError
from vitrail.runtime.budget import Call, MemoryBudget, parse_memory_limit
from vitrail.runtime.memory import PositionTables


def linear(constant: int, each: int, name: str = "a") -> Call:
    return Call(lambda items: constant + each * items, "an image", object(), name)


@pytest.mark.parametrize(
    ("limit", "nbytes"),
    [
        (None, None),
        (1000, 1000),
        ("1000", 1000),
        ("512M", 512 << 20),
        ("512 MiB", 512 << 20),
        ("1.5g", 3 << 29),
        ("2GB", 2 << 30),
        ("1k", 1024),
        ("1T", 1 << 40),
    ],
)
def test_sizes_in_words(limit: int | str | None, nbytes: int | None) -> None:
    assert parse_memory_limit(limit) == nbytes


@pytest.mark.parametrize("limit", [0, -1, "0", "", "M", "1X", "-1M", "1e9", 1.5, True, "1 0M"])
def test_other_sizes_are_refused(limit: object) -> None:
    with pytest.raises(InputError, match=r"memory_limit: got .*512M"):
        parse_memory_limit(limit)  # type: ignore[arg-type]


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 3000), st.integers(1, 5000))
def test_as_many_items_as_fit(constant: int, each: int, limit: int, count: int) -> None:
    budget, call = MemoryBudget(PositionTables(), limit), linear(constant, each)
    if constant + each > limit:
        with pytest.raises(OutOfMemoryError, match=f"an image needs {constant + each:,} beyond"):
            budget.most(count, call)
        return
    most = (limit - constant) // each
    assert budget.most(count, call) == min(count, most)
    parts = budget.in_parts(count, call, lambda part: (part.start, part.stop))
    assert [start for start, _ in parts] == list(range(0, count, most))
    assert [stop for _, stop in parts[:-1]] == [start for start, _ in parts[1:]]
    assert parts[-1][1] == count


def test_without_a_limit_a_call_is_whole_and_nothing_is_counted() -> None:
    budget = MemoryBudget(PositionTables())

    def refuse(items: int) -> int:
        raise AssertionError("asked for bytes")

    call = Call(refuse, "an image", object(), None)
    assert budget.in_parts(9999, call, lambda part: part) == [slice(0, 9999)]
    assert budget.most(9999, call) == 9999
    assert budget.held == 0


def test_an_inner_call_is_part_of_the_outer_one() -> None:
    budget, call = MemoryBudget(PositionTables(), 100), linear(0, 10)

    def inner(part: slice) -> int:
        assert budget.held == 100
        assert budget.in_parts(50, call, lambda part: part) == [slice(0, 50)]
        return budget.held

    assert budget.in_parts(30, call, inner) == [100, 100, 100]
    assert budget.held == 0


def test_a_call_that_fails_gives_its_bytes_back() -> None:
    budget, call = MemoryBudget(PositionTables(), 100), linear(0, 10)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), budget.hold(90, call):
            raise ZeroDivisionError
    assert budget.held == 0
    with budget.hold(100, call):
        assert budget.held == 100


def test_threads_never_hold_more_than_the_limit() -> None:
    budget, call, seen = MemoryBudget(PositionTables(), 100), linear(0, 1), list[int]()

    def work(seed: int) -> None:
        for step in range(100):
            with budget.hold(1 + (seed * 37 + step * 11) % 100, call):
                seen.append(budget.held)
                time.sleep(0)

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work, seed) for seed in range(8)]:
            done.result(timeout=60)
    assert max(seen) <= 100
    assert len(seen) == 800
    assert budget.held == 0


def test_a_large_call_is_not_overtaken_for_ever() -> None:
    budget, call, stop = MemoryBudget(PositionTables(), 10), linear(0, 1), threading.Event()

    def small() -> None:
        while not stop.is_set():
            with budget.hold(4, call):
                time.sleep(0.001)

    with ThreadPoolExecutor(5) as threads:
        running = [threads.submit(small) for _ in range(4)]

        def large() -> None:
            for _ in range(20):
                with budget.hold(10, call):
                    assert budget.held == 10

        try:
            threads.submit(large).result(timeout=60)
        finally:
            stop.set()
        for thread in running:
            thread.result(timeout=60)


def test_tables_of_other_sizes_make_room() -> None:
    tables = PositionTables()
    for side in (1, 2, 3):
        tables.get((side, side), "uint8", lambda: torch.empty(10, dtype=torch.uint8))
    budget, call = MemoryBudget(tables, 100), linear(0, 1)
    call = call._replace(table=(1, 1, "uint8"))
    with budget.hold(80, call):  # the call counts its own table
        assert tables.held_bytes() == 30
    with budget.hold(85, call):
        assert list(tables._tables) == [(1, 1, "uint8"), (3, 3, "uint8")]
    with budget.hold(100, call):
        assert list(tables._tables) == [(1, 1, "uint8")]
    with budget.hold(100, call._replace(table=None)):
        assert tables.held_bytes() == 0


class Captured:
    """A table that a graph was captured with."""

    is_cuda, nbytes = True, 40


def test_tables_of_graphs_stay_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    tables, capturing = PositionTables(), [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    tables.get((1, 1), "uint8", Captured)  # type: ignore[arg-type]
    capturing[0] = True
    tables.get((1, 1), "uint8", Captured)  # type: ignore[arg-type]
    capturing[0] = False
    assert tables.trim() == 0
    assert tables.held_bytes() == tables.captured_bytes() == 40
    budget, call = MemoryBudget(tables, 100), linear(0, 10)
    assert budget.most(50, call) == 6
    assert budget.most(50, call._replace(table=(1, 1, "uint8"))) == 10
    with pytest.raises(OutOfMemoryError, match=r"got 100 bytes, of which CUDA graphs hold 40"):
        budget.most(1, linear(61, 0, "b"))
    with pytest.raises(OutOfMemoryError, match="an image needs 61"), budget.hold(61, call):
        pass


def test_a_forked_child_has_the_whole_limit() -> None:
    """While other threads hold it, and wait for it."""
    budget, call, done = MemoryBudget(PositionTables(), 10), linear(0, 1), threading.Event()
    holds = threading.Event()

    def hold() -> None:
        with budget.hold(10, call):
            holds.set()
            done.wait(60)

    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert holds.wait(60)
    time.sleep(0.05)  # until the other waits

    def hold_all() -> None:
        with budget.hold(10, call):
            assert budget.held == 10

    try:
        run_at_once(hold_all)
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
