"""Memory that a runner keeps between calls: activation arenas and position tables."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vitrail import fork
from vitrail.plan.plan import Plan

POSITION_TABLE_BYTES = 64 << 20
IDLE_ARENAS, IDLE_BYTES = 4, 1 << 30


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
    """Idle activation arenas, so that a repeated call on the CPU allocates nothing.

    On a GPU the pool stays empty. PyTorch's allocator reuses memory in the order of a stream; the
    pool would give an arena to another stream while the first still writes to it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._idle, self._lock = device, list[Tensor](), fork.lock()

    def take(self, nbytes: int) -> Tensor:
        """The smallest idle arena of at least ``nbytes``, or a fresh one."""
        with self._lock:
            large_enough = [arena for arena in self._idle if arena.numel() >= nbytes]
            if large_enough:
                smallest = min(large_enough, key=Tensor.numel)
                self._idle = [arena for arena in self._idle if arena is not smallest]
                return smallest
            if self._idle:  # all are too small: free an arena before allocating a larger
                self._idle.pop(0)
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def give(self, arena: Tensor) -> None:
        with self._lock:
            total = sum(idle.numel() for idle in self._idle) + arena.numel()
            fits = len(self._idle) < IDLE_ARENAS and total <= IDLE_BYTES
            if fits and arena.numel() > 0 and self._device.type == "cpu":
                self._idle.append(arena)


class PositionTables:
    """A cache of position tables by patch grid and pixel format ("float" or "uint8").

    Above ``max_bytes`` the least recently used tables are dropped, but the latest always stays. A
    table that a CUDA graph was captured with stays for good: the graph holds its address.
    """

    def __init__(self, max_bytes: int = POSITION_TABLE_BYTES) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._tables: OrderedDict[tuple[int, int, str], Tensor] = OrderedDict()
        self._captured: dict[tuple[int, int, str], Tensor] = {}
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
                return table
        table = compute()
        with self._lock:
            if key not in self._tables:
                self._tables[key] = table
                self._bytes += _bytes(table)
                while self._bytes > self._max_bytes and len(self._tables) > 1:
                    _, dropped = self._tables.popitem(last=False)
                    self._bytes -= _bytes(dropped)
        return table


def _bytes(table: Tensor) -> int:
    return table.numel() * table.element_size()
