"""The cache of position tables: computed once, bounded in bytes, kept for CUDA graphs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import assert_close
from runtime.test_runner import POSITION, VISION, open_runner
from vitrail.plan.vision import vision_table
from vitrail.runtime.memory import PositionTables
from vitrail.runtime.torch_runner import TorchRunner


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> TorchRunner:
    """A runner whose tables are 48 wide."""
    return open_runner(tmp_path_factory.mktemp("tables"), VISION["clip"])[1]


def ask(
    cache: PositionTables, runner: TorchRunner, grid: tuple[int, int], pixel_format: str = "float"
) -> Tensor:
    """A table from ``cache``, which ``runner`` computes if it is not there."""
    plan = vision_table(VISION["clip"], grid, uint8=pixel_format == "uint8")
    return cache.get(grid, pixel_format, lambda: runner._compute_table(plan))


def table_bytes(grid: tuple[int, int]) -> int:
    return 4 * 48 * (1 + grid[0] * grid[1])


def test_a_table_is_made_once_for_each_grid_and_kind(tables: TorchRunner) -> None:
    weights, spec = tables.weights, VISION["clip"]
    by_key = {
        (grid, pixel_format): tables.position_table(spec, grid, pixel_format)
        for grid in ((4, 4), (2, 8), (8, 2))
        for pixel_format in ("float", "uint8")
    }
    for (grid, pixel_format), table in by_key.items():
        assert tables.position_table(spec, grid, pixel_format) is table
        other_format = by_key[grid, "uint8" if pixel_format == "float" else "float"]
        assert not torch.equal(table[1:], other_format[1:])
        assert torch.equal(table[:1], other_format[:1])
        assert table.shape == (17, 48)
        expected = torch.empty(17, 48)
        POSITION(
            expected,
            weights["vision.position"],
            weights["vision.prefix"],
            weights[f"vision.patch.{pixel_format}.bias"],
            table_grid=spec.grid,
            grid=grid,
            antialias=spec.position_antialias,
        )
        assert torch.equal(table, expected)
    bias = weights["vision.patch.uint8.bias"] - weights["vision.patch.float.bias"]
    assert_close(
        by_key[(4, 4), "uint8"][1:],
        (by_key[(4, 4), "float"][1:] + bias).double(),
        name="uint8 table",
    )


def test_the_table_used_longest_ago_goes_first(tables: TorchRunner) -> None:
    grids = [(1, 1), (1, 2), (2, 1)]
    cache = PositionTables(sum(map(table_bytes, grids)))
    earliest = {grid: ask(cache, tables, grid) for grid in grids}
    assert ask(cache, tables, (1, 1)) is earliest[1, 1]  # now the newest
    ask(cache, tables, (1, 1), "uint8")  # two rows: three of (1, 2) make room
    assert ask(cache, tables, (2, 1)) is earliest[2, 1]
    assert ask(cache, tables, (1, 1)) is earliest[1, 1]
    assert ask(cache, tables, (1, 2)) is not earliest[1, 2]


def test_a_table_over_the_limit_is_kept_alone(tables: TorchRunner) -> None:
    cache = PositionTables(table_bytes((2, 2)))
    small = ask(cache, tables, (2, 2))
    large = ask(cache, tables, (2, 3))
    assert ask(cache, tables, (2, 3)) is large
    assert cache.held_bytes() == table_bytes((2, 3))
    assert ask(cache, tables, (2, 2)) is not small
    assert cache.held_bytes() == table_bytes((2, 2))


class OnCuda:
    """A table that says it is on a GPU."""

    is_cuda = True

    nbytes = 400


def test_a_table_that_a_graph_was_captured_with_is_never_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, capturing = PositionTables(400), [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])

    def get(grid: tuple[int, int]) -> object:
        return cache.get(grid, "float", OnCuda)  # type: ignore[arg-type]

    captured = get((1, 1))
    not_captured = get((1, 2))
    assert get((1, 1)) is not captured  # it was forgotten
    captured = get((1, 1))
    capturing[0] = True
    assert get((1, 1)) is captured
    capturing[0] = False
    for grid in ((1, 3), (1, 4), (1, 2)):
        get(grid)
    assert get((1, 1)) is captured
    assert get((1, 2)) is not not_captured


@settings(max_examples=60)
@given(
    limit=st.integers(0, 12_000),
    asked=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 4), st.sampled_from(["float", "uint8"])),
        max_size=40,
    ),
)
def test_the_cache_is_a_least_recently_used_one_under_its_limit(
    tables: TorchRunner, limit: int, asked: list[tuple[int, int, str]]
) -> None:
    cache = PositionTables(limit)
    model: OrderedDict[tuple[int, int, str], Tensor] = OrderedDict()
    for down, across, pixel_format in asked:
        key = (down, across, pixel_format)
        table = ask(cache, tables, (down, across), pixel_format)
        assert (model.get(key) is table) == (key in model)
        model[key] = table
        model.move_to_end(key)
        while sum(t.numel() * 4 for t in model.values()) > limit and len(model) > 1:
            model.popitem(last=False)
        cached = cache._tables
        assert list(cached) == list(model)
        assert cache.held_bytes() == sum(t.numel() * 4 for t in cached.values())
        assert cache.held_bytes() <= limit or len(cached) == 1


def test_threads_that_ask_for_one_table_count_its_bytes_once(tables: TorchRunner) -> None:
    for _ in range(20):
        cache, barrier = PositionTables(), threading.Barrier(8)

        def get(
            _: int, cache: PositionTables = cache, barrier: threading.Barrier = barrier
        ) -> Tensor:
            barrier.wait(timeout=60)
            return ask(cache, tables, (6, 6))

        with ThreadPoolExecutor(8) as pool:
            by_thread = list(pool.map(get, range(8)))
        assert cache.held_bytes() == table_bytes((6, 6))
        assert all(torch.equal(table, by_thread[0]) for table in by_thread)
