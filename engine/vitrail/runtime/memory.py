"""Memory that stays between calls: idle activation arenas and position tables."""

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from vitrail import fork
from vitrail.plan.plan import Plan

POSITION_TABLE_BYTES = 64 << 20
IDLE_ARENAS, IDLE_BYTES = 4, 1 << 30
TableKey = tuple[int, int, str]
"""Patches down and across, and the pixel format: "float" or "uint8"."""


def activations(
    plan: Plan,
    slot_bytes: Sequence[int],
    arena: Tensor,
    batch: int,
    tokens: int,
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, Tensor]:
    """The intermediate buffers of ``plan`` by name, as views of ``arena``: each starts its slot."""
    offsets = [sum(slot_bytes[:slot]) for slot in range(len(slot_bytes))]
    views = {}
    for buffer in plan.buffers:
        if buffer.slot is not None:
            dtype, shape = dtypes[buffer.dtype], buffer.shape(batch, tokens)
            start = offsets[buffer.slot]
            content = arena[start : start + math.prod(shape) * dtype.itemsize]
            views[buffer.name] = content.view(dtype).view(shape)
    return views


class ArenaPool:
    """Idle activation arenas on the CPU, so that a repeated call allocates nothing.

    A process has one (`ARENAS`), which all models without a memory limit share. An arena belongs to
    the model that used it last, and is freed with that model. On a GPU PyTorch's allocator is the
    pool: it reuses memory in the order of a stream.
    """

    def __init__(self) -> None:
        self._idle: list[tuple[Tensor, Hashable]] = []
        self._lock = fork.lock()
        self._ended = deque[Hashable]()

    def take(self, nbytes: int) -> Tensor:
        """The smallest idle arena of at least ``nbytes``, or a fresh one."""
        with self._lock:
            if self._ended:
                self._free_ended()
            sizes = [arena.numel() for arena, _ in self._idle]
            large_enough = [size for size in sizes if size >= nbytes]
            if large_enough:
                return self._idle.pop(sizes.index(min(large_enough)))[0]
            if self._idle:  # all are too small: free an arena before allocating a larger
                self._idle.pop(0)
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def give(self, arena: Tensor, owner: Hashable) -> None:
        """``arena`` is idle from now on; ``owner``: stands for the model that has used it.

        The arenas that have been idle for longest make room for it.
        """
        if not 0 < arena.numel() <= IDLE_BYTES:
            return
        with self._lock:
            if self._ended:
                self._free_ended()
            self._idle.append((arena, owner))
            total = sum([idle.numel() for idle, _ in self._idle])
            while len(self._idle) > IDLE_ARENAS or total > IDLE_BYTES:
                total -= self._idle.pop(0)[0].numel()

    def trim(self) -> int:
        """Free every idle arena; returns their bytes."""
        with self._lock:
            idle, self._idle = self._idle, []
        return sum(arena.numel() for arena, _ in idle)

    def held_bytes(self, owner: Hashable) -> int:
        """Bytes of the idle arenas that ``owner`` used last."""
        with self._lock:
            return sum(arena.numel() for arena, last in self._idle if last == owner)

    def end(self, owner: Hashable) -> None:
        """Free the arenas of a model that is gone.

        The garbage collector may call this at any time, on a thread that has the lock too. The
        arenas are then freed at the next call of any model.
        """
        self._ended.append(owner)
        if self._lock.acquire(blocking=False):
            try:
                self._free_ended()
            finally:
                self._lock.release()

    def _free_ended(self) -> None:
        while self._ended:
            owner = self._ended.popleft()
            self._idle = [(arena, last) for arena, last in self._idle if last != owner]


ARENAS = ArenaPool()
"""The idle arenas of this process."""


class PositionTables:
    """A cache of position tables by patch grid and pixel format ("float" or "uint8").

    Above ``max_bytes`` the least recently used tables are dropped, but the latest always stays. A
    table that a CUDA graph was captured with stays for good: the graph holds its address.
    """

    def __init__(self, max_bytes: int = POSITION_TABLE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._tables: OrderedDict[TableKey, Tensor] = OrderedDict()
        self._captured: dict[TableKey, Tensor] = {}
        self._lock = fork.lock()

    def get(
        self, grid: tuple[int, int], pixel_format: str, compute: Callable[[], Tensor]
    ) -> Tensor:
        """The (T, C) fp32 table for ``grid`` patches down and across; ``compute`` makes a new one.

        The cache keeps no function: a reference from the cache to its runner would keep the runner
        and its weights in memory until the next garbage collection.
        """
        key = (*grid, pixel_format)
        with self._lock:
            table = self._captured.get(key, self._tables.get(key))
            if table is not None:
                if key in self._tables:
                    self._tables.move_to_end(key)
                if table.is_cuda and torch.cuda.is_current_stream_capturing():
                    self._captured[key] = table
                    self._tables.pop(key, None)
                return table
        table = compute()
        with self._lock:
            self._tables.setdefault(key, table)
            self._drop(self._max_bytes, key)
        return table

    def captured_bytes(self, but: TableKey | None = None) -> int:
        """Bytes of the tables that stay for good, less that of ``but``."""
        with self._lock:
            return sum(table.nbytes for key, table in self._captured.items() if key != but)

    def held_bytes(self) -> int:
        """Bytes of all tables."""
        with self._lock:
            return _bytes(self._tables) + _bytes(self._captured)

    def shrink(self, max_bytes: int, but: TableKey | None) -> int:
        """Drop tables until those besides ``but`` have at most ``max_bytes``, as far as possible.

        Returns the bytes that they have then.
        """
        with self._lock:
            captured = sum(table.nbytes for key, table in self._captured.items() if key != but)
            kept = self._tables[but].nbytes if but is not None and but in self._tables else 0
            self._drop(max_bytes - captured + kept, but)
            return captured + _bytes(self._tables) - kept

    def trim(self) -> int:
        """Drop the tables that no CUDA graph was captured with; returns their bytes."""
        with self._lock:
            dropped = _bytes(self._tables)
            self._tables.clear()
            return dropped

    def _drop(self, max_bytes: int, but: TableKey | None) -> None:
        """Drop the least recently used tables until all have ``max_bytes``, but never ``but``."""
        nbytes = _bytes(self._tables)
        for key in [key for key in self._tables if key != but]:
            if nbytes <= max_bytes:
                return
            nbytes -= self._tables.pop(key).nbytes


def _bytes(tables: Mapping[TableKey, Tensor]) -> int:
    return sum(table.nbytes for table in tables.values())
