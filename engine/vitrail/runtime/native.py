"""Runs plans in C++ with one call per forward pass. Kernels and bits are the Triton runner's.

A plan is lowered to a `NativePlan` once for each image size; the batch size may vary. C++ packs the
kernels' parameters and launches them (csrc/executor.hpp). PyTorch allocates the memory, in order of
the current stream.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail import fork
from vitrail._version import __version__
from vitrail.cuda import NEW_PROCESS
from vitrail.errors import (
    CheckpointError,
    DeviceError,
    InputError,
    OutOfMemoryError,
    VitrailError,
)
from vitrail.exported.folder import ExportFolder
from vitrail.plan.lowering import NativePlan, lower
from vitrail.plan.plan import Buffer, Plan
from vitrail.runtime.cuda_resize import CudaResize, open_resize
from vitrail.runtime.extension import load_extension
from vitrail.runtime.kernel_cache import kernel_record
from vitrail.runtime.triton import TritonRunner
from vitrail.runtime.triton_resize import TritonResize
from vitrail.spec import VisionSpec
from vitrail.torch_modes import default_modes
from vitrail.weights.layout import Weights
from vitrail_kernels.compile import WITHOUT_TMA
from vitrail_kernels.launch import MISSING as NO_TRITON
from vitrail_kernels.launch import TMA, Call, Target

try:
    load_extension()
except ImportError as error:
    MISSING: ImportError | None = error
    """The reason why the extension cannot be used."""
else:
    from vitrail import _C

    MISSING = None

DRIVER = "libcuda.so.1"
OVERLAP = "VITRAIL_OVERLAP"
"""If set to 1, a kernel may start before the previous one has ended (sm_90 and later)."""

MAX_PLANS, MAX_SIZES = 64, 256
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
STICKY = {214, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719}
"""The CUresults after which every later call of the context fails: faults of kernels or memory."""

Size = tuple[int, int, int]
"""Number of sequences, tokens of all sequences, tokens of the longest sequence."""


class _SizeEntry(NamedTuple):
    """Facts that all calls of one size share. The kernels of these calls are loaded."""

    capacity: Size
    arena_shape: tuple[int]
    shapes: tuple[tuple[int, ...], ...]


class _CachedPlan(NamedTuple):
    """A native plan and its C++ executable. ``plan`` is held so that its id is not reused."""

    plan: Plan
    native: NativePlan
    executable: _C.Executable
    externals: tuple[Buffer, ...]
    sizes: dict[Size, _SizeEntry]


class NativeRunner(TritonRunner):
    """Runs plans in fp16 or bf16 by `vitrail._C`.

    ``driver``: the NVIDIA driver's library. ``ordinal``: its number of the GPU; None: that of
    ``device``. ``exported``: a folder whose plans, kernels and position tables are used. Anything
    else is compiled, which needs triton, and the version of Vitrail that exported the folder:
    another version refuses it. Raises RuntimeError if the extension is missing, DeviceError if the
    driver refuses the GPU.
    """

    name = "native"

    def __init__(
        self,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        driver: str = DRIVER,
        exported: ExportFolder | None = None,
        ordinal: int | None = None,
    ) -> None:
        if MISSING is not None:
            raise RuntimeError(f"native backend: {MISSING}") from MISSING
        super().__init__(weights, dtype, device)
        try:
            self._gpu = _C.Gpu(driver, self.device.index or 0 if ordinal is None else ordinal)
        except RuntimeError as error:
            raise DeviceError(f"native backend on {self.device}: {error}") from error
        major, minor = self._gpu.capability
        self.target = Target(arch := 10 * major + minor, self._gpu.multiprocessors)
        self._kernels = _C.Kernels(self._gpu)
        self._exported = exported if exported is not None and arch in exported.builds else None
        self._tables: dict[str, Tensor] = {}
        if self._exported is not None:
            self.version = self._exported.record.version
            if self.target.without_tma and WITHOUT_TMA not in self._exported.builds[arch]:
                raise InputError(
                    f"{TMA}=0: got {self._exported.folder}, whose kernels for sm_{arch} use TMA; "
                    f"export it again with {TMA}=0, load the checkpoint itself, or unset {TMA}"
                )
            tables = self._exported.tables
            self._tables = {name: table.to(self.device) for name, table in tables.items()}
        self._overlap = os.environ.get(OVERLAP) == "1"
        self._plans: OrderedDict[tuple[Any, ...], _CachedPlan] = OrderedDict()
        self._lock = fork.lock()
        self._compiling = fork.lock(brief=False)
        self._cuda_resize: CudaResize | str | None = None
        self._triton_resize = TritonResize(self._gpu, self.target)

    @property
    def resizer(self) -> str:
        kernels = self._resize_by()
        if isinstance(kernels, CudaResize):
            return str(kernels.binary)
        if NO_TRITON is not None:
            raise InputError(f"resize: got 'device', but {kernels}, and {NO_TRITON}")
        return f"Triton kernels, since {kernels}"

    def _resize_by(self) -> CudaResize | str:
        """The CUDA kernels, or the reason why Triton's kernels are used. The choice is kept."""
        with self._compiling:
            if self._cuda_resize is None:
                try:
                    self._cuda_resize = open_resize(self._gpu, self._overlap)
                except _C.DriverError as error:
                    raise self._failed("resize", error) from error
            return self._cuda_resize

    def _resize(self, *tensors: Tensor) -> None:
        kernels = self._resize_by()
        try:
            if isinstance(kernels, str):
                self._triton_resize(self._stream(), self._record, *tensors)
            else:
                kernels(self._stream(), *tensors)
        except _C.DriverError as error:
            raise self._failed("resize", error) from error

    @classmethod
    def arena_bytes(cls, plan: Plan, batch: int, tokens: int, longest: int, itemsize: int) -> int:
        """As `Runner.arena_bytes`: sizes are rounded up."""
        sequences, tokens, _ = _C.Executable.capacity((batch, tokens, longest))
        return plan.arena_bytes(sequences, tokens, itemsize)

    @property
    def identity(self) -> str:
        if self._exported is None:
            return super().identity
        exported = self._exported.builds[self.target.arch]
        if self._why_not_compiled(self._exported) is not None:
            return exported
        compiled = super().identity
        if compiled == exported:
            return exported
        return f"{exported}; plans that are not exported: {compiled}"

    def position_table(self, spec: VisionSpec, grid: tuple[int, int], pixel_format: str) -> Tensor:
        """As `Runner.position_table`; for the image size of an export, the exported table."""
        if self._exported is not None:
            size = self._exported.size
            if size is not None and grid == spec.grid_at(size) and pixel_format in self._tables:
                return self._tables[pixel_format]
            self._want_compiler(self._exported, f"{grid[0]}x{grid[1]} patches")
        return super().position_table(spec, grid, pixel_format)

    def _compute_table(self, plan: Plan) -> Tensor:
        try:
            return super()._compute_table(plan)
        finally:  # only the table is needed again; the plan must not displace other cached plans
            with self._lock:
                self._plans.pop((id(plan), None), None)

    def run(
        self, plan: Plan, inputs: Mapping[str, Tensor], *, batch: int, tokens: int, longest: int
    ) -> dict[str, Tensor]:
        """As `Runner.run`. If the driver fails, raises DeviceError with the name of the launch."""
        with default_modes(), self._on_device():
            cached, size = self._cached_plan(plan, inputs), (batch, tokens, longest)
            try:
                return self._outputs(cached, inputs, size)
            except OutOfMemoryError:
                # PyTorch's cache may hold the memory; the driver cannot ask PyTorch to free it
                if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
                    raise
                torch.cuda.empty_cache()
            return self._outputs(cached, inputs, size)

    def _outputs(
        self, cached: _CachedPlan, inputs: Mapping[str, Tensor], size: Size
    ) -> dict[str, Tensor]:
        entry = cached.sizes.get(size) or self._size_entry(cached, size)
        tensors: dict[str, Tensor] = {}
        for buffer, shape in zip(cached.externals, entry.shapes, strict=True):
            if buffer.name in cached.plan.inputs:
                tensors[buffer.name] = self._input(buffer, inputs[buffer.name], shape)
            else:
                tensors[buffer.name] = self._empty(shape, self._dtypes[buffer.dtype])
        if size[1]:
            self._execute(cached, tensors.values(), size, entry)
        return {name: tensors[name] for name in cached.plan.outputs}

    def _execute(
        self, cached: _CachedPlan, externals: Iterable[Tensor], size: Size, entry: _SizeEntry
    ) -> None:
        arena = self._empty(entry.arena_shape, torch.uint8)  # must live until the last launch
        addresses = [tensor.data_ptr() for tensor in externals]
        try:
            cached.executable.run(
                size, entry.capacity, arena.data_ptr(), addresses, self._stream(), self._overlap
            )
        except _C.DriverError as error:
            raise self._failed(cached.plan.name, error) from error

    def _size_entry(self, cached: _CachedPlan, size: Size) -> _SizeEntry:
        """Load the kernels for a new size, and cache the facts of the size."""
        executable, (_, tokens, _) = cached.executable, size
        try:
            for key in executable.missing(size) if tokens else ():
                self._load(key, cached.native)
            executable.missing(size)  # checks the parameters of the kernels just loaded
        except _C.DriverError as error:
            raise self._failed(cached.plan.name, error) from error
        except ValueError as error:
            raise DeviceError(f"{cached.plan.name} on {self.device}: {error}") from error
        capacity = executable.capacity(size)
        shapes = tuple(buffer.shape(*size) for buffer in cached.externals)
        if len(cached.sizes) >= MAX_SIZES:  # texts have more sizes than are worth keeping
            cached.sizes.clear()
        entry = _SizeEntry(capacity, (executable.arena_bytes(capacity),), shapes)
        return cached.sizes.setdefault(size, entry)

    def _failed(self, name: str, error: _C.DriverError) -> DeviceError:
        error_class = OutOfMemoryError if error.code == OUT_OF_MEMORY else DeviceError
        advice = f"; {NEW_PROCESS}" if error.code in STICKY else ""
        return error_class(f"{name} on {self.device}: {error}{advice}")

    def _load(self, key: str, plan: NativePlan) -> None:
        with self._compiling:
            arch = self.target.arch
            record = None if self._exported is None else self._exported.kernel(arch, key)
            if record is None and key not in plan.calls:
                location = self._exported.folder if self._exported is not None else "plan"
                raise CheckpointError(f"{location}: got no kernel {key} for sm_{arch}, wanted it")
            if record is None:
                record = self._record(key, plan.calls[key])
            self._kernels.load(record)

    def _record(self, key: str, call: Call) -> bytes:
        try:
            return kernel_record(key, call, self.target.arch)
        except VitrailError as error:
            raise DeviceError(
                f"native backend on {self.device}: {error}; backend='torch' compiles nothing"
            ) from error

    def _cached_plan(self, plan: Plan, inputs: Mapping[str, Tensor]) -> _CachedPlan:
        """The native form of ``plan`` for images of this size, made at the first call."""
        pixels = inputs.get("pixels")
        key = (id(plan), None if pixels is None else (pixels.shape[1:], pixels.dtype))
        with self._lock:
            cached = self._plans.get(key)
            if cached is not None:
                self._plans.move_to_end(key)
                return cached
        native = self._native_plan(plan, pixels)
        executable = _C.Executable(self._kernels, native.record, self.weights.arena.data_ptr())
        buffers = {buffer.name: buffer for buffer in plan.buffers}
        externals = tuple(buffers[name] for name in native.externals)
        cached = _CachedPlan(plan, native, executable, externals, {})
        with self._lock:
            self._plans[key] = cached
            while len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)
        return cached

    def _native_plan(self, plan: Plan, pixels: Tensor | None) -> NativePlan:
        if self._exported is not None:
            exported = self._exported.native_plan(self.target.arch, plan, pixels)
            if exported is not None:
                return exported
            self._want_compiler(self._exported, plan.name)
        return lower(plan, self.target, self.dtype, self.weights, pixels)

    def _want_compiler(self, exported: ExportFolder, subject: str) -> None:
        """Raises InputError if ``subject``, which was not exported, cannot be compiled."""
        if (reason := self._why_not_compiled(exported)) is not None:
            raise InputError(
                f"{exported.folder}: got a call of {subject}, {reason}; wanted what was exported: "
                f"{exported.extent}"
            )

    def _why_not_compiled(self, exported: ExportFolder) -> str | None:
        """Why no plan is compiled besides those of ``exported``; None if any plan is.

        Kernels of another version would give other bits under the folder's fingerprint.
        """
        if NO_TRITON is not None:
            return f"which needs triton, and {NO_TRITON}"
        version = exported.record.version
        if version == __version__:
            return None
        return (
            f"which is not among the plans that Vitrail {version} exported, and this Vitrail "
            f"{__version__} adds none to them: export the checkpoint again, or load it instead"
        )

    def _input(self, buffer: Buffer, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """``tensor`` as C++ takes it: contiguous, at an address that is a multiple of 16."""
        if buffer.name != "pixels":  # the image size is part of the cached plan's key
            expected = shape, self._dtypes[buffer.dtype]
            actual = tuple(tensor.shape), tensor.dtype
            assert actual == expected, f"{buffer.name}: got {actual}, wanted {expected}"
        assert tensor.device == self.device, f"{buffer.name}: got a tensor on {tensor.device}"
        tensor = tensor.contiguous()
        return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        try:
            return torch.empty(shape, dtype=dtype, device=self.device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"{self.device}: {error}") from error
