"""Batches that memory has no room for, and results by position."""

from __future__ import annotations

import pytest
import torch

from vitrail.errors import ImageError, OutOfMemoryError
from vitrail.model.batches import ResultRows, in_halves


@pytest.mark.parametrize("error", [OutOfMemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize("room", [1, 2, 3, 8])
def test_a_batch_too_large_is_halved_until_it_fits(room: int, error: type[Exception]) -> None:
    calls: list[int] = []

    def compute(items: range) -> list[int]:
        calls.append(len(items))
        if len(items) > room:
            raise error("no room")
        return [10 * item for item in items]

    results = list(in_halves(compute, range(7)))
    assert [item for items, _ in results for item in items] == list(range(7))
    assert all(values == [10 * item for item in items] for items, values in results)
    assert all(len(items) <= room for items, _ in results)
    assert calls == {1: [7, 3, 1, 2, 1, 1, 4, 2, 1, 1, 2, 1, 1], 8: [7]}.get(room, calls)


def test_an_item_too_large_alone_is_an_error_and_so_is_any_other_failure() -> None:
    def full(items: list[int]) -> None:
        raise OutOfMemoryError("no room")

    def broken(items: list[int]) -> None:
        raise RuntimeError("broken")

    with pytest.raises(OutOfMemoryError, match="no room"):
        list(in_halves(full, [1, 2, 3]))
    with pytest.raises(RuntimeError, match="broken"):
        list(in_halves(broken, [1, 2, 3]))


def test_rows_come_in_the_order_of_positions_and_errors_name_theirs() -> None:
    rows = ResultRows(strict=False)
    for position in (5, 0, 3):
        rows.add(position, torch.full((2,), float(position)))
    rows.add(4, ImageError("b.png: no image"))
    rows.add(1, ImageError("a.png: no image"))
    rows.check()
    assert rows.index == (0, 3, 5)
    assert rows.stacked(2).tolist() == [[0, 0], [3, 3], [5, 5]]
    assert rows.stacked(2, normalize=True)[1].norm().item() == pytest.approx(1)
    assert rows.reasons == {1: "image 1: a.png: no image", 4: "image 4: b.png: no image"}
    assert list(rows.reasons) == [1, 4]
    assert ResultRows(strict=True).stacked(3, 4, 5).shape == (0, 3, 4, 5)
    rows.strict = True
    with pytest.raises(ImageError, match=r"^image 1: a\.png"):
        rows.check()
