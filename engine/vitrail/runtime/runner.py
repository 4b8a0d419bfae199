"""What every runner does: buffers in an arena, position tables, a plan's steps in order."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from vitrail.cuda import device_errors
from vitrail.errors import OutOfMemoryError
from vitrail.plan.plan import Plan, Step
from vitrail.plan.vision import vision_table
from vitrail.spec import VisionSpec
from vitrail.torch_modes import plain, refuse_lost_threads
from vitrail.weights.layout import Weights

POSITION_CACHE_BYTES = 64 << 20
IDLE_ARENAS, IDLE_BYTES = 4, 1 << 30


class PositionCache:
    """Position tables by (grid, kind of pixels): the latest, and others within a byte limit.

    A table that a CUDA graph was captured with is never forgotten: the graph knows its address.
    """

    def __init__(self, limit: int = POSITION_CACHE_BYTES) -> None:
        self._limit, self._bytes = limit, 0
        self._tables: OrderedDict[tuple[int, int, str], Tensor] = OrderedDict()
        self._captured: dict[tuple[int, int, str], Tensor] = {}
        self._lock = threading.Lock()

    def get(self, target: tuple[int, int], kind: str, make: Callable[[], Tensor]) -> Tensor:
        """The (T, C) fp32 table for ``target`` patches down and across; kind "float" or "uint8".

        ``make`` computes it the first time. No function is kept: a runner that its own cache holds
        would live on, with its weights, until the garbage collector comes by.
        """
        key = (*target, kind)
        with self._lock:
            table = self._captured.get(key, self._tables.get(key))
            if table is not None:
                if key in self._tables:
                    self._tables.move_to_end(key)
                if table.is_cuda and torch.cuda.is_current_stream_capturing():
                    self._captured[key] = table
                return table
        table = make()
        with self._lock:
            if key not in self._tables:
                self._tables[key] = table
                self._bytes += _bytes(table)
                while self._bytes > self._limit and len(self._tables) > 1:
                    _, dropped = self._tables.popitem(last=False)
                    self._bytes -= _bytes(dropped)
        return table


def _bytes(table: Tensor) -> int:
    return table.numel() * table.element_size()


class ArenaPool:
    """Activation arenas that wait for their next call, so that a warm call allocates nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._idle, self._lock = device, list[Tensor](), threading.Lock()

    def take(self, nbytes: int) -> Tensor:
        with self._lock:
            fits = [arena for arena in self._idle if arena.numel() >= nbytes]
            if fits:
                best = min(fits, key=Tensor.numel)
                self._idle = [arena for arena in self._idle if arena is not best]
                return best
            if self._idle:  # none is large enough: one goes before a larger one is asked for
                self._idle.pop(0)
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def give(self, arena: Tensor) -> None:
        with self._lock:
            kept = sum(idle.numel() for idle in self._idle) + arena.numel()
            if len(self._idle) < IDLE_ARENAS and arena.numel() > 0 and kept <= IDLE_BYTES:
                self._idle.append(arena)


def _moved(weights: Weights, device: torch.device) -> Weights:
    """``weights`` on ``device``. Raises OutOfMemoryError if they do not fit there."""
    try:
        with device_errors():
            return weights.to(device)
    except OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"{device}: got no room for {weights.arena.numel():,} bytes of weights: {error}"
        ) from error


class Runner(ABC):
    """Runs plans of one model on one device, from any number of threads at once.

    ``name`` says which runner it is; ``identity`` all that its bits depend on besides the weights.
    """

    name: str

    def __init__(self, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
        if device.type == "cuda" and device.index is None:
            # by number: another thread's current device may be another
            device = torch.device("cuda", torch.cuda.current_device())
        self.weights, self.dtype, self.device = _moved(weights, device), dtype, device
        self._arenas = ArenaPool(device)
        self._positions = PositionCache()
        self._dtypes = {"compute": dtype, "float32": torch.float32, "int32": torch.int32}
        self._streams: set[int] = set()

    @property
    def identity(self) -> str:
        return self.name

    @property
    @abstractmethod
    def resizer(self) -> str:
        """What does `resize`, in words. Raises InputError where nothing can."""

    @abstractmethod
    def _resize(self, *tensors: Tensor) -> None:
        """The operator `resize`, on the current device."""

    def resize(
        self,
        out: Tensor,
        middle: Tensor,
        pixels: Tensor,
        images: Tensor,
        groups: Tensor,
        taps: Tensor,
    ) -> None:
        """The operator `resize`: write ``out`` (B, h, w, channels) and ``middle`` from ``pixels``.

        All are on the runner's device; shapes, dtypes and tables: `ops.resize`. On a
        GPU the work is left on the current stream. Raises DeviceError where the driver fails.
        """
        refuse_lost_threads()
        with plain(), self._on_device():
            self._resize(out, middle, pixels, images, groups, taps)

    @abstractmethod
    def run_step(self, step: Step, tensors: Mapping[str, Tensor], longest: int) -> None:
        """One step of a plan; ``tensors``: its arguments by name."""

    def table(self, spec: VisionSpec, target: tuple[int, int], kind: str) -> Tensor:
        """What is added to every token at ``target`` patches down and across: (T, C) fp32."""
        refuse_lost_threads()
        with plain(), self._on_device():
            plan = vision_table(spec, target, uint8=kind == "uint8")
            table = self._positions.get(target, kind, lambda: self._make_table(plan))
            if table.is_cuda:  # so that its memory waits for this stream too once it is forgotten
                table.record_stream(torch.cuda.current_stream(table.device))
            return table

    def _make_table(self, plan: Plan) -> Tensor:
        """The output of ``plan``, ready for every stream."""

        def run() -> Tensor:
            (table,) = self.run(plan, {}, batch=1, tokens=1, longest=1).values()
            if table.is_cuda:
                torch.cuda.current_stream(table.device).synchronize()
            return table

        if self.device.type != "cuda":
            return run()
        # on a thread of its own: a caller's may take its memory from the pool of a CUDA graph, as
        # torch.compile's does while it warms up, and the table outlives that
        with ThreadPoolExecutor(1, "vitrail-positions") as pool:
            return pool.submit(run).result()

    def run(
        self, plan: Plan, inputs: Mapping[str, Tensor], *, batch: int, tokens: int, longest: int
    ) -> dict[str, Tensor]:
        """Execute ``plan`` and return its outputs, fresh contiguous tensors on the runner's device.

        ``inputs``: one tensor for each of the plan's inputs. ``batch`` sequences hold ``tokens``
        tokens in all, ``longest`` the longest of them. On a GPU the work is left on the current
        stream, and neither waits for it nor for the host.
        """
        refuse_lost_threads()
        with plain(), self._on_device():
            tensors = dict(inputs)
            sizes = plan.slot_bytes(batch, tokens, self.dtype.itemsize)
            arena = self._take(sum(sizes))
            offsets = [sum(sizes[:slot]) for slot in range(len(sizes))]
            for buffer in plan.buffers:
                if buffer.name in plan.inputs:
                    continue
                dtype, shape = self._dtypes[buffer.dtype], buffer.shape(batch, tokens, longest)
                if buffer.slot is None:
                    tensors[buffer.name] = torch.empty(shape, dtype=dtype, device=self.device)
                else:
                    start = offsets[buffer.slot]
                    raw = arena[start : start + math.prod(shape) * dtype.itemsize]
                    tensors[buffer.name] = raw.view(dtype).view(shape)
            if batch:
                self._stream()  # of which the weights take note
                self.run_steps(plan.steps, tensors, longest)
            self._give(arena)
            return {name: tensors[name] for name in plan.outputs}

    def run_steps(self, steps: Sequence[Step], tensors: Mapping[str, Tensor], longest: int) -> None:
        """Every step in order."""
        for step in steps:
            arguments = {arg: tensors[name] for arg, name in step.buffers}
            arguments |= {arg: self.weights[name] for arg, name in step.weights}
            self.run_step(step, arguments, longest)

    def _on_device(self) -> AbstractContextManager[object]:
        """Kernels launch on the current device, which need not be the tensors'."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _stream(self) -> int:
        """The current stream, as the driver's handle; 0 without a GPU. Weights that are freed wait
        for the work of every stream that this was called on."""
        if self.device.type != "cuda":
            return 0
        stream = torch.cuda.current_stream(self.device)
        handle = int(stream.cuda_stream)
        if handle not in self._streams:
            self.weights.arena.record_stream(stream)
            self._streams.add(handle)
        return handle

    # PyTorch's own allocator of a GPU gives memory back in the order of a stream; an arena that
    # waits here could be taken by another stream while the first still writes to it
    def _take(self, nbytes: int) -> Tensor:
        if self.device.type == "cpu":
            return self._arenas.take(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _give(self, arena: Tensor) -> None:
        if self.device.type == "cpu":
            self._arenas.give(arena)
