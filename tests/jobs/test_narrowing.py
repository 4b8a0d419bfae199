"""What becomes of a chunk that kills worker processes, without processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from vitrail.jobs.narrowing import FINAL_TRIES, TRIES, ChunkWork, Piece
from vitrail.jobs.rows import EmbeddingRows
from vitrail.jobs.worker import Computed

WIDTH = 3
UNREADABLE = 4


def computed(piece: Piece) -> Computed:
    """Image n has the embedding (n, images in the call that are readable, 1)."""
    positions = range(piece.start, piece.stop)
    errors = [
        "withheld" if p in piece.withheld else "not a JPEG" if p == UNREADABLE else None
        for p in positions
    ]
    good = [p for p, error in zip(positions, errors, strict=True) if error is None]
    rows = np.array([[p, len(good), 1] for p in good], np.float32).reshape(-1, WIDTH)
    return Computed(errors, rows)


def run(
    images: int, is_deadly: Callable[[Sequence[int], int], bool]
) -> tuple[EmbeddingRows, list[list[int]]]:
    """The rows, and the positions of each call; ``is_deadly`` is asked with those and its number.

    The last waiting piece is taken first every second time: workers may be in any order.
    """
    work = ChunkWork([f"{n}.jpg" for n in range(images)], WIDTH)
    calls: list[list[int]] = []
    while work.rows is None:
        piece = work.waiting.pop() if len(calls) % 2 else work.waiting.popleft()
        calls.append([p for p in range(piece.start, piece.stop) if p not in piece.withheld])
        if is_deadly(calls[-1], len(calls)):
            work.lose(piece, "SIGSEGV" if len(calls) % 2 else "SIGKILL")
        else:
            work.finish(piece, computed(piece))
        assert len(calls) < 1000, "ends"
    assert not work.waiting
    assert list(work.rows.sources) == list(work.chunk)
    return work.rows, calls


def expected(images: int, killers: set[int]) -> list[list[int]]:
    good = [n for n in range(images) if n not in killers and n != UNREADABLE]
    return [[n, len(good), 1] for n in good]


def test_a_chunk_that_kills_no_more_after_two_tries_is_computed_whole() -> None:
    rows, calls = run(16, lambda call, number: number <= 2)
    assert calls == [list(range(16))] * 3
    assert rows.embeddings.tolist() == expected(16, set())
    assert [n for n, error in enumerate(rows.errors) if error] == [UNREADABLE]


@pytest.mark.parametrize("images", [1, 2, 3, 7, 16, 256])
@pytest.mark.parametrize("place", ["first", "last", "several"])
def test_the_images_that_kill_become_failures_and_the_others_have_their_bits(
    images: int, place: str
) -> None:
    killers = {"first": {0}, "last": {images - 1}, "several": {0, images // 2, images - 1}}[place]
    rows, calls = run(images, lambda call, number: not killers.isdisjoint(call))
    assert rows.embeddings.tolist() == expected(images, killers)
    for killer in killers:
        assert calls.count([killer]) == TRIES
        assert rows.errors[killer] is not None
        assert rows.errors[killer].startswith(f"killed the process that read it {TRIES} times (SIG")
    others = [error for n, error in enumerate(rows.errors) if n not in killers | {UNREADABLE}]
    assert others == [None] * len(others)
    assert calls[:3] == [list(range(images))] * 3
    assert calls[-1] == [n for n in range(images) if n not in killers]
    if place == "first" and images == 256:  # 3 as a whole, 7 halves, 3 alone, and what is sound
        assert sum(not killers.isdisjoint(call) for call in calls) == 13


def test_kills_from_outside_change_no_bit() -> None:
    for seed in range(300):
        dice = np.random.default_rng(seed)
        later = dice.choice(np.arange(4, 40), 12, replace=False).tolist()
        kills = {1, 2, 3, *(n for n in later if n % FINAL_TRIES)}  # so narrowed, in any case
        rows, calls = run(8, lambda call, number, kills=kills: number in kills and len(call) > 1)
        assert rows.embeddings.tolist() == expected(8, set()), calls
        assert [n for n, error in enumerate(rows.errors) if error] == [UNREADABLE]


def test_a_chunk_that_only_kills_as_a_whole_has_the_rows_of_its_halves() -> None:
    rows, calls = run(16, lambda call, number: len(call) > 5)
    assert [row[0] for row in rows.embeddings.tolist()] == [n for n in range(16) if n != UNREADABLE]
    assert [n for n, error in enumerate(rows.errors) if error] == [UNREADABLE]
    assert max(row[1] for row in rows.embeddings.tolist()) == 4
    assert calls[-FINAL_TRIES:] == [list(range(16))] * FINAL_TRIES
