"""`MemoryBudget`: the most bytes that a model may hold on its device beyond its weights."""

import os
import re
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, TypeVar
from weakref import WeakSet

from vitrail.errors import InputError, OutOfMemoryError
from vitrail.runtime.memory import PositionTables, TableKey

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?)?\s*", re.IGNORECASE)
Result = TypeVar("Result")


def parse_memory_limit(limit: int | str | None) -> int | None:
    """Bytes, from a number of bytes or a string such as "512M" or "1.5GiB"; None: no limit.

    K, M, G and T are powers of 1,024, with or without "B" or "iB". Raises InputError.
    """
    refusal = InputError(
        f"memory_limit: got {limit!r}, wanted bytes over 0, or a string such as '512M' or '2G'"
    )
    if limit is None:
        return None
    if isinstance(limit, str):
        match = _SIZE.fullmatch(limit)
        if match is None:
            raise refusal
        number, unit = match.groups()
        limit = int(float(number) * 1024 ** (" KMGT".index(unit.upper()) if unit else 0))
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise refusal
    return limit


class Call(NamedTuple):
    """What a call needs, to be cut by a `MemoryBudget`.

    ``nbytes``: bytes for a number of items. ``item``: "an image" or "a text", for errors.
    ``table``: the position table that ``nbytes`` counts. ``plan`` and ``shape`` determine
    ``nbytes``.
    """

    nbytes: Callable[[int], int]
    item: str
    plan: object
    shape: Hashable
    table: TableKey | None = None


class MemoryBudget:
    """The limit of a model and the bytes that its calls hold now. Without a limit, nothing is
    counted.

    A call cuts its items by `most` and computes them inside `hold`. Calls of several threads share
    the limit: a call waits until others have given back enough. A thread that already holds bytes
    holds them for its inner calls too, so it never waits for itself.
    """

    nothing = nullcontext()
    """The context of a call without a limit."""

    def __init__(self, tables: PositionTables, limit: int | None = None) -> None:
        self.limit, self._tables = limit, tables
        self._gate, self._given_back = threading.Lock(), threading.Condition()
        self._held, self._thread = 0, threading.local()
        self._most: dict[Hashable, tuple[object, int]] = {}
        _BUDGETS.add(self)

    @property
    def held(self) -> int:
        """Bytes of the calls under way; 0 without a limit."""
        return self._held

    def in_parts(self, count: int, call: Call, compute: Callable[[slice], Result]) -> list[Result]:
        """``compute`` of slices of ``count`` items, as many at a time as the limit allows.

        Raises OutOfMemoryError if not even one item fits.
        """
        if self.limit is None or self._holds:
            return [compute(slice(0, count))]
        step, results = max(1, self.most(count, call)), list[Result]()
        for start in range(0, max(1, count), step):
            part = slice(start, min(count, start + step))
            with self.hold(call.nbytes(part.stop - part.start), call):
                results.append(compute(part))
        return results

    def most(self, count: int, call: Call) -> int:
        """How many of ``count`` items fit. Raises OutOfMemoryError if not even one does."""
        if self.limit is None or count == 0:
            return count
        room = self.limit - self._tables.captured_bytes(call.table)
        key = id(call.plan), call.shape, room
        if key not in self._most:
            if len(self._most) >= 256:
                self._most.clear()
            # holds the plan, so that its id is not another's
            self._most[key] = call.plan, self._search(MAX_BATCH, call, room)
        return min(count, self._most[key][1])

    def _search(self, count: int, call: Call, room: int) -> int:
        if (needed := call.nbytes(1)) > room:
            raise self._too_small(needed, call)
        fits, beyond = 1, count + 1
        while beyond - fits > 1:
            middle = min(2 * fits, (fits + beyond) // 2)
            if call.nbytes(middle) <= room:
                fits = middle
            else:
                beyond = middle
        return fits

    def _too_small(self, needed: int, call: Call) -> OutOfMemoryError:
        captured = self._tables.captured_bytes(call.table)
        graphs = f", of which CUDA graphs hold {captured:,}" if captured else ""
        return OutOfMemoryError(
            f"memory_limit: got {self.limit:,} bytes{graphs}, and {call.item} needs {needed:,} "
            "beyond the weights; load the model with a larger limit"
        )

    @property
    def _holds(self) -> bool:
        return getattr(self._thread, "holds", False)

    def hold(self, nbytes: int, call: Call) -> AbstractContextManager[object]:
        """A context in which ``call`` has ``nbytes`` of the limit.

        Position tables of other sizes are dropped if they leave too little. Raises OutOfMemoryError
        if the limit is smaller.
        """
        return self.nothing if self.limit is None or self._holds else self._hold(nbytes, call)

    @contextmanager
    def _hold(self, nbytes: int, call: Call) -> Iterator[None]:
        assert self.limit is not None, "hold has checked the limit"
        taken = 0
        try:
            with self._gate, self._given_back:  # the gate: small calls do not overtake a large one
                while True:
                    room = self.limit - self._held - nbytes
                    if self._tables.shrink(room, call.table) <= room:
                        break
                    if self._held == 0:
                        raise self._too_small(nbytes, call)
                    self._given_back.wait()
                taken = nbytes
                self._held += nbytes
            self._thread.holds = True
            yield
        finally:  # also where a signal's handler raises on the way
            self._thread.holds = False
            with self._given_back:
                self._held -= taken
                self._given_back.notify_all()

    def forget_threads(self) -> None:
        """After a fork: the threads that held bytes are not in this process."""
        self._gate, self._given_back = threading.Lock(), threading.Condition()
        self._held, self._thread = 0, threading.local()


MAX_BATCH = 4096
"""The most items of a call whose size the caller leaves to Vitrail."""

_BUDGETS: WeakSet[MemoryBudget] = WeakSet()


def _after_fork() -> None:
    for budget in _BUDGETS:
        budget.forget_threads()


os.register_at_fork(after_in_child=_after_fork)
