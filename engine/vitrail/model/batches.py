"""Batches of a call: halves when memory runs out, results a batch behind, rows by position."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from vitrail.errors import OutOfMemoryError, VitrailError

ACTIVATION_BYTES = 256 << 20
"""Bytes of activations in a batch, unless the caller names a batch size."""


Result = TypeVar("Result")


def in_windows(positions: Sequence[int], step: int) -> Iterator[Sequence[int]]:
    """Yield ``positions`` in runs of ``step``, in order; the last run may be shorter."""
    for start in range(0, len(positions), step):
        yield positions[start : start + step]


def in_halves(compute: Callable[[Any], Result], items: Any) -> Iterator[tuple[Any, Result]]:
    """Yield ``items`` and ``compute(items)``; when memory runs out, the same for each half.

    ``items`` has a length and slices. Halves are halved again, down to single items.
    """
    try:
        result = compute(items)
    except (OutOfMemoryError, torch.OutOfMemoryError):
        half = len(items) // 2
        if half == 0:
            raise
    else:
        yield items, result
        return
    yield from in_halves(compute, items[:half])
    yield from in_halves(compute, items[half:])


def one_behind(results: Iterable[Result]) -> Iterator[Result]:
    """Yield each result after the next one has been started.

    A GPU then computes a batch while the host prepares the next one.
    """
    previous: list[Result] = []
    for result in results:
        yield from previous
        previous = [result]
    yield from previous


def l2_normalize(x: Tensor) -> Tensor:
    """Rows of ``x`` (N, D) divided by their length; a row of zeros stays zero."""
    return torch.nn.functional.normalize(x, dim=1)


@dataclass(slots=True)
class ResultRows:
    """Rows, on the CPU, and errors by position in the call.

    With ``strict``, `check` raises the first error.
    """

    strict: bool
    by_position: dict[int, Tensor] = field(default_factory=dict)
    errors: dict[int, VitrailError] = field(default_factory=dict)

    def add(self, position: int, result: Tensor | VitrailError) -> None:
        if isinstance(result, VitrailError):
            self.errors[position] = type(result)(f"image {position}: {result}")
        else:
            self.by_position[position] = result

    def check(self) -> None:
        """Raise the error of the lowest position if the call is strict."""
        if self.strict and self.errors:
            raise self.errors[min(self.errors)]

    @property
    def index(self) -> tuple[int, ...]:
        """The positions that have a row, ascending."""
        return tuple(sorted(self.by_position))

    @property
    def reasons(self) -> dict[int, str]:
        """The message of each error by position, ascending."""
        return {position: str(self.errors[position]) for position in sorted(self.errors)}

    def stacked(self, *shape: int, normalize: bool = False) -> Tensor:
        """The rows as a tensor (N, *``shape``) on the CPU, ascending by position.

        ``normalize`` divides each row (D,) by its length.
        """
        if not self.by_position:
            return torch.empty(0, *shape, dtype=torch.float32, device="cpu")
        stacked = torch.stack([self.by_position[position] for position in self.index])
        return l2_normalize(stacked) if normalize else stacked
