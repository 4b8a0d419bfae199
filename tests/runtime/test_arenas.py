"""Idle activation arenas: which of them a call takes, and how many stay."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.test_runner import TEXT, open_runner, read
from vitrail.plan.text import text_pooled
from vitrail.runtime.memory import ARENAS, IDLE_ARENAS, IDLE_BYTES, ArenaPool

ME = "a model"


def test_an_arena_is_used_again() -> None:
    pool = ArenaPool()
    arena = pool.take(1000)
    second_arena = pool.take(1000)
    assert arena.data_ptr() != second_arena.data_ptr()
    pool.give(arena, ME)
    assert pool.take(900) is arena
    pool.give(second_arena, ME)
    pool.give(arena, ME)
    assert {id(pool.take(1)), id(pool.take(1))} == {id(arena), id(second_arena)}


def test_the_smallest_arena_that_fits_is_taken() -> None:
    pool = ArenaPool()
    arenas = {size: torch.empty(size, dtype=torch.uint8) for size in (5000, 100, 900, 2000)}
    for arena in arenas.values():
        pool.give(arena, ME)
    for nbytes, size in ((850, 900), (100, 100), (101, 2000), (1, 5000)):
        assert pool.take(nbytes) is arenas[size]


def test_only_so_many_arenas_wait() -> None:
    pool = ArenaPool()
    arenas = [pool.take(10) for _ in range(3 * IDLE_ARENAS)]
    for arena in arenas:
        pool.give(arena, ME)
    given_ids = {id(arena) for arena in arenas}
    reused = [id(pool.take(10)) in given_ids for _ in arenas]
    assert sum(reused) == IDLE_ARENAS


def test_a_larger_arena_takes_the_place_of_a_smaller_one() -> None:
    pool = ArenaPool()
    for size in (10, 20, 40, 80, 160, 320, 640):
        pool.give(pool.take(size), ME)
    assert [arena.numel() for arena, _ in pool._idle] == [640]


def test_a_thousand_calls_of_mixed_sizes_do_not_grow_the_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One caller keeps one arena, as large as its largest call; later calls allocate none."""
    spec = dataclasses.replace(TEXT, blocks=dataclasses.replace(TEXT.blocks, layers=1, width=12))
    ARENAS.trim()
    _, runner = open_runner(tmp_path, None, spec)
    plan = text_pooled(spec)
    ids = torch.randint(40, (24,))
    allocated, arenas = torch.empty, []

    def counting(*shape: Any, **options: Any) -> Tensor:
        fresh = allocated(*shape, **options)
        if options.get("dtype") == torch.uint8:
            arenas.append(fresh.numel())
        return fresh

    monkeypatch.setattr(torch, "empty", counting)
    dice = torch.Generator().manual_seed(0)
    for call in range(1000):
        batch, length = torch.randint(1, 9, (2,), generator=dice).tolist()
        batch, length = (8, 8) if call == 100 else (batch, length)
        read(runner, plan, [ids[:length]] * batch, [length - 1] * batch)
        largest = plan.arena_bytes(8, 64)
        if call == 100:
            assert max(arenas) == largest
            before = len(arenas)
    assert len(arenas) == before <= 100
    assert [arena.numel() for arena, _ in ARENAS._idle] == [largest]


def test_idle_arenas_are_bounded_in_bytes_and_never_empty() -> None:
    pool = ArenaPool()
    pool.give(torch.empty(0, dtype=torch.uint8), ME)
    assert pool._idle == []
    for _ in range(IDLE_ARENAS):
        pool.give(torch.empty(IDLE_BYTES // 2, dtype=torch.uint8), ME)
    assert sum(arena.numel() for arena, _ in pool._idle) == IDLE_BYTES
    assert len(pool._idle) == 2
