"""`Runner`: runs the steps of a plan in order. A subclass runs a single step."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from vitrail._version import __version__
from vitrail.cuda import device_errors
from vitrail.dtypes import named_dtype
from vitrail.errors import OutOfMemoryError
from vitrail.plan.plan import ITEM_BYTES, Plan, Step
from vitrail.plan.vision import vision_table
from vitrail.runtime.budget import MemoryBudget
from vitrail.runtime.memory import ARENAS, PositionTables, activations
from vitrail.spec import VisionSpec
from vitrail.torch_modes import default_modes
from vitrail.weights.layout import Weights


class Runner(ABC):
    """Runs plans of a model on a device, from any number of threads at once.

    ``name``: the backend. ``identity``: everything besides the weights that the bits of a result
    depend on. ``version``: of the Vitrail whose plans and kernels compute. Raises OutOfMemoryError
    if the device has no room for the weights.
    """

    name: str
    version = __version__

    def __init__(self, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
        if device.type == "cuda" and device.index is None:
            # name the device by number: threads may have different current devices
            device = torch.device("cuda", torch.cuda.current_device())
        self.dtype, self.device = dtype, device
        try:
            with device_errors():
                self.weights = weights.to(device)
        except OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"{device}: got no room for {weights.arena.numel():,} bytes of weights: {error}"
            ) from error
        self._position_tables = PositionTables()
        self.budget = MemoryBudget(self._position_tables)
        self._owner = object()  # of idle arenas
        weakref.finalize(self, ARENAS.end, self._owner).atexit = False
        self._dtypes = {"compute": dtype} | {name: named_dtype(name) for name in ITEM_BYTES}
        self._streams: set[int] = set()

    @property
    def identity(self) -> str:
        return self.name

    @classmethod
    def arena_bytes(cls, plan: Plan, batch: int, tokens: int, longest: int, itemsize: int) -> int:
        """Bytes of the arena of a call, as this backend allocates it."""
        return plan.arena_bytes(batch, tokens, itemsize)

    @classmethod
    def workspace_bytes(cls, plan: Plan, batch: int, longest: int, dtype: torch.dtype) -> int:
        """The most that a step allocates besides, for ``batch`` sequences of ``longest`` tokens.

        Vitrail's own kernels allocate nothing.
        """
        return 0

    @classmethod
    def resize_workspace_bytes(cls, numbers: int) -> int:
        """The most that `resize` allocates besides; ``numbers``: pixel values of an image between
        or after the passes."""
        return 0

    @property
    def held_bytes(self) -> int:
        """Bytes on the device beyond the weights: position tables, idle arenas, calls under way
        (these are counted if there is a limit)."""
        tables, idle = self._position_tables.held_bytes(), ARENAS.held_bytes(self._owner)
        return tables + idle + self.budget.held

    def trim(self) -> int:
        """Give back the memory that `held_bytes` counts, but for calls under way and the tables of
        CUDA graphs; returns the bytes.

        Idle arenas of all models of the process are freed; on a GPU, PyTorch's unused memory.
        """
        if self.device.type == "cpu":
            return self._position_tables.trim() + ARENAS.trim()
        before = torch.cuda.memory_reserved(self.device)
        self._position_tables.trim()
        with self._on_device():
            torch.cuda.empty_cache()
        return max(0, before - torch.cuda.memory_reserved(self.device))

    @property
    @abstractmethod
    def resizer(self) -> str:
        """The implementation of `resize`, in words. Raises InputError if there is none."""

    @abstractmethod
    def _resize(self, *tensors: Tensor) -> None:
        """The operator `resize`, on the current device."""

    def resize(self, *tensors: Tensor) -> None:
        """The operator `resize`, with the arguments of `vitrail_kernels.ops.resize.resize_ref`.

        All are on the runner's device. On a GPU the work is queued on the current stream. Raises
        DeviceError if the driver fails.
        """
        with default_modes(), self._on_device():
            self._resize(*tensors)

    @abstractmethod
    def run_step(self, step: Step, arguments: Mapping[str, Tensor], longest: int) -> None:
        """Run a step of a plan. ``arguments``: its buffers and weights by argument."""

    def position_table(self, spec: VisionSpec, grid: tuple[int, int], pixel_format: str) -> Tensor:
        """(T, C) fp32: the summand of every token besides its pixels, for ``grid`` patches down and
        across. ``pixel_format``: "float" or "uint8"."""
        with default_modes(), self._on_device():
            plan = vision_table(spec, grid, uint8=pixel_format == "uint8")
            table = self._position_tables.get(grid, pixel_format, lambda: self._compute_table(plan))
            if table.is_cuda:  # a dropped table's memory is not reused before this stream is done
                table.record_stream(torch.cuda.current_stream(table.device))
            return table

    def _compute_table(self, plan: Plan) -> Tensor:
        """The output of ``plan``. From here on any stream may read it."""

        def run() -> Tensor:
            (table,) = self.run(plan, {}, batch=1, tokens=1, longest=1).values()
            if table.is_cuda:
                torch.cuda.current_stream(table.device).synchronize()
            return table

        if self.device.type != "cuda":
            return run()
        # The caller's thread may allocate from the pool of a CUDA graph, for example while
        # torch.compile warms up. The table outlives that pool, so another thread allocates it.
        with ThreadPoolExecutor(1, "vitrail-positions") as pool:
            return pool.submit(run).result()

    def run(
        self, plan: Plan, inputs: Mapping[str, Tensor], *, batch: int, tokens: int, longest: int
    ) -> dict[str, Tensor]:
        """Run ``plan`` and return its outputs, fresh contiguous tensors on the runner's device.

        ``inputs``: a tensor for each of the plan's inputs. ``batch`` sequences have ``tokens``
        tokens in all, and the longest has ``longest``. On a GPU the work is queued on the current
        stream; the call never synchronizes with the GPU.
        """
        with default_modes(), self._on_device():
            sizes = plan.slot_bytes(batch, tokens, self.dtype.itemsize)
            # with a memory limit, arenas that wait for the next call would count
            pools = self.device.type == "cpu" and self.budget.limit is None
            arena = ARENAS.take(sum(sizes)) if pools else self._empty_arena(sum(sizes))
            tensors = {**inputs, **activations(plan, sizes, arena, batch, tokens, self._dtypes)}
            for buffer in plan.buffers:
                if buffer.name in plan.outputs:
                    shape = buffer.shape(batch, tokens, longest)
                    dtype = self._dtypes[buffer.dtype]
                    tensors[buffer.name] = torch.empty(shape, dtype=dtype, device=self.device)
            if batch:
                self._stream()
                self.run_steps(plan.steps, tensors, longest)
            if pools:
                ARENAS.give(arena, self._owner)
            return {name: tensors[name] for name in plan.outputs}

    def _empty_arena(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def run_steps(self, steps: Sequence[Step], tensors: Mapping[str, Tensor], longest: int) -> None:
        """Run every step in order. ``tensors``: the buffers by name."""
        for step in steps:
            arguments = {arg: tensors[name] for arg, name in step.buffers}
            arguments |= {arg: self.weights[name] for arg, name in step.weights}
            self.run_step(step, arguments, longest)

    def _on_device(self) -> AbstractContextManager[object]:
        """Makes the runner's device the current one: Triton launches kernels there."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _stream(self) -> int:
        """The driver's handle of the current stream, which from now on uses the weights; 0 without
        a GPU. Their memory is not reused before the work of all such streams is done."""
        if self.device.type != "cuda":
            return 0
        stream = torch.cuda.current_stream(self.device)
        handle = int(stream.cuda_stream)
        if handle not in self._streams:
            self.weights.arena.record_stream(stream)
            self._streams.add(handle)
        return handle
