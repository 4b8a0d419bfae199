"""Walks a plan with each operator's PyTorch reference: the CPU backend, and fp32 anywhere."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from vitrail.plain import plain, refuse_lost_threads
from vitrail.plan import Plan
from vitrail.spec import VisionSpec
from vitrail.weights import Weights
from vitrail_kernels import OPERATORS

POSITION_CACHE_BYTES = 64 << 20
IDLE_ARENAS, IDLE_BYTES = 4, 1 << 30


class PositionCache:
    """Position tables by (grid, kind of pixels), the oldest forgotten past a byte limit."""

    def __init__(self, limit: int = POSITION_CACHE_BYTES) -> None:
        self._limit, self._bytes = limit, 0
        self._tables: OrderedDict[tuple[int, int, str], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, weights: Weights, spec: VisionSpec, target: tuple[int, int], kind: str) -> Tensor:
        """The (T, C) fp32 table for ``target`` patches down and across; kind "float" or "uint8"."""
        key = (*target, kind)
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        prefix = weights["vision.prefix"]
        rows = prefix.shape[0] + target[0] * target[1]
        table = torch.empty(rows, prefix.shape[1], dtype=torch.float32, device=prefix.device)
        OPERATORS["position"].reference(
            table,
            weights["vision.position"],
            prefix,
            weights[f"vision.patch.{kind}.bias"],
            grid=spec.grid,
            target=target,
            antialias=spec.position_antialias,
        )
        size = table.numel() * table.element_size()
        with self._lock:
            if key not in self._tables and size <= self._limit:
                self._tables[key] = table
                self._bytes += size
                while self._bytes > self._limit:
                    _, dropped = self._tables.popitem(last=False)
                    self._bytes -= dropped.numel() * dropped.element_size()
        return table


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


class ReferenceRunner:
    """Runs plans of one model on one device, from any number of threads at once."""

    name = "reference"

    def __init__(self, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
        self.weights, self.dtype, self.device = weights.to(device), dtype, device
        self._arenas = ArenaPool(device)
        self._positions = PositionCache()
        self._dtypes = {"compute": dtype, "float32": torch.float32, "int32": torch.int32}

    def table(self, spec: VisionSpec, target: tuple[int, int], kind: str) -> Tensor:
        """What is added to every token at ``target`` patches down and across: (T, C) fp32."""
        refuse_lost_threads()
        with plain():
            return self._positions.get(self.weights, spec, target, kind)

    def run(
        self, plan: Plan, inputs: Mapping[str, Tensor], *, batch: int, tokens: int, longest: int
    ) -> dict[str, Tensor]:
        """Execute ``plan`` and return its outputs, fresh contiguous tensors on the runner's device.

        ``inputs``: one tensor for each of the plan's inputs. ``batch`` sequences hold ``tokens``
        tokens in all, ``longest`` the longest of them.
        """
        refuse_lost_threads()
        with plain():
            tensors = dict(inputs)
            sizes = plan.slot_bytes(batch, tokens, self.dtype.itemsize)
            arena = self._arenas.take(sum(sizes))
            offsets = [sum(sizes[:slot]) for slot in range(len(sizes))]
            for buffer in plan.buffers:
                if buffer.name in plan.inputs:
                    continue
                dtype, shape = self._dtypes[buffer.dtype], buffer.shape(batch, tokens, longest)
                if buffer.slot is None:
                    tensors[buffer.name] = torch.empty(shape, dtype=dtype, device=self.device)
                else:
                    rows, columns = shape[0], shape[1] if len(shape) > 1 else 1
                    start = offsets[buffer.slot]
                    raw = arena[start : start + rows * columns * dtype.itemsize]
                    tensors[buffer.name] = raw.view(dtype).view(shape)
            if batch:
                self._walk(plan, tensors, longest)
            self._arenas.give(arena)
            return {name: tensors[name] for name in plan.outputs}

    def _walk(self, plan: Plan, tensors: Mapping[str, Tensor], longest: int) -> None:
        for launch in plan.launches:
            arguments = {arg: tensors[name] for arg, name in launch.buffers}
            arguments |= {arg: self.weights[name] for arg, name in launch.weights}
            OPERATORS[launch.op].reference(**arguments, **launch.resolve(longest))
