"""Hands whole plans to C++: one call a forward, with the kernels and the bits of the Triton runner.

A plan becomes a `Program` for the GPU, and with a size of images one program serves any batch. C++
packs and launches it (csrc/executor.hpp); memory is PyTorch's, in the order of the current stream.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.cuda import NEW_PROCESS
from vitrail.errors import (
    CheckpointError,
    DeviceError,
    InputError,
    OutOfMemoryError,
    VitrailError,
)
from vitrail.exported.folder import Exported
from vitrail.plan.lowering import Program, lower
from vitrail.plan.plan import Buffer, Plan
from vitrail.runtime.cuda_resize import CudaResize, open_resize
from vitrail.runtime.extension import load_extension
from vitrail.runtime.kernel_cache import kernel_record
from vitrail.runtime.triton import TritonRunner
from vitrail.runtime.triton_resize import TritonResize
from vitrail.spec import VisionSpec
from vitrail.torch_modes import default_modes, refuse_lost_threads
from vitrail.weights.layout import Weights
from vitrail_kernels.compile import WITHOUT_TMA
from vitrail_kernels.launch import MISSING as NO_TRITON
from vitrail_kernels.launch import TMA, Call, Target

try:
    load_extension()
except ImportError as error:
    MISSING: ImportError | None = error
    """Why there is no extension, in words."""
else:
    from vitrail import _C

    MISSING = None

DRIVER = "libcuda.so.1"
OVERLAP = "VITRAIL_OVERLAP"
"""Set to 1: each kernel is launched before the one before it has ended (sm_90 and later)."""

PROGRAMS, SIZES = 64, 256
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
STICKY = {214, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719}
"""CUresults after which a context gives nothing but errors: faults of a kernel or of the memory."""


Size = tuple[int, int, int]
"""Sequences, tokens in all, tokens of the longest."""


class _Sized(NamedTuple):
    """What calls of one size share, besides the kernels that are loaded for it."""

    capacity: Size
    arena: tuple[int]
    shapes: tuple[tuple[int, ...], ...]


class _Ready(NamedTuple):
    """A program whose executable C++ holds. ``plan`` is kept so that its id stays its own."""

    plan: Plan
    program: Program
    executable: _C.Executable
    external: tuple[Buffer, ...]
    sizes: dict[Size, _Sized]


def _check_without_tma(exported: Exported, arch: int) -> None:
    if WITHOUT_TMA not in exported.builds[arch]:
        raise InputError(
            f"{TMA}=0: got {exported.folder}, whose kernels for sm_{arch} use TMA; export it again "
            f"with {TMA}=0, load the checkpoint itself, or unset {TMA}"
        )


class NativeRunner(TritonRunner):
    """Runs plans in fp16 or bf16 by `vitrail._C`.

    ``driver``: the NVIDIA driver's library. ``exported``: a folder whose programs, kernels and
    position tables are taken where it has them; without triton it takes no others. Raises
    RuntimeError where the extension is missing, DeviceError where the driver refuses.
    """

    name = "native"

    def __init__(
        self,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        driver: str = DRIVER,
        exported: Exported | None = None,
    ) -> None:
        if MISSING is not None:
            raise RuntimeError(f"native backend: {MISSING}") from MISSING
        super().__init__(weights, dtype, device)
        try:
            self._gpu = _C.Gpu(driver, self.device.index or 0)
        except RuntimeError as error:
            raise DeviceError(f"native backend on {self.device}: {error}") from error
        major, minor = self._gpu.capability
        self.target = Target(10 * major + minor, self._gpu.multiprocessors)
        self._kernels = _C.Kernels(self._gpu)
        if exported is not None and self.target.arch not in exported.builds:
            exported = None
        if exported is not None and self.target.without_tma:
            _check_without_tma(exported, self.target.arch)
        self._exported = exported
        tables = {} if exported is None else exported.tables
        self._tables = {kind: table.to(self.device) for kind, table in tables.items()}
        self._overlap = os.environ.get(OVERLAP) == "1"
        self._programs: OrderedDict[tuple[Any, ...], _Ready] = OrderedDict()
        self._lock = threading.Lock()
        self._compiling = threading.Lock()
        self._cuda_resize: CudaResize | str | None = None
        self._triton_resize = TritonResize(self._gpu, self.target)

    @property
    def resizer(self) -> str:
        kernels = self._resize_by()
        if isinstance(kernels, CudaResize):
            return str(kernels.image)
        if NO_TRITON is not None:
            raise InputError(f"resize: got 'device', but {kernels}, and {NO_TRITON}")
        return f"Triton kernels, since {kernels}"

    def _resize_by(self) -> CudaResize | str:
        """The CUDA kernels, looked for once, or why Triton's serve."""
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

    @property
    def identity(self) -> str:
        if self._exported is None:
            return super().identity
        stored = self._exported.builds[self.target.arch]
        own = stored if NO_TRITON is not None else super().identity
        return own if own == stored else f"{stored}; plans that are not exported: {own}"

    def position_table(self, spec: VisionSpec, grid: tuple[int, int], pixel_format: str) -> Tensor:
        """As `Runner.position_table`; an export's own table for its size."""
        if self._exported is not None:
            size = self._exported.size
            if size is not None and grid == spec.grid_at(size) and pixel_format in self._tables:
                return self._tables[pixel_format]
            self._need_triton(self._exported, f"{grid[0]}x{grid[1]} patches")
        return super().position_table(spec, grid, pixel_format)

    def _compute_table(self, plan: Plan) -> Tensor:
        try:
            return super()._compute_table(plan)
        finally:  # the table is kept: its program must not push out those of other image sizes
            with self._lock:
                self._programs.pop((id(plan), None), None)

    def run(
        self, plan: Plan, inputs: Mapping[str, Tensor], *, batch: int, tokens: int, longest: int
    ) -> dict[str, Tensor]:
        """As `Runner.run`. Raises DeviceError where the driver fails, naming the launch."""
        refuse_lost_threads()
        with default_modes(), self._on_device():
            ready, size = self._ready(plan, inputs), (batch, tokens, longest)
            try:
                return self._outputs(ready, inputs, size)
            except OutOfMemoryError:
                # the driver lacks what PyTorch may hold in its cache, and does not ask for
                if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
                    raise
                torch.cuda.empty_cache()
            return self._outputs(ready, inputs, size)

    def _outputs(
        self, ready: _Ready, inputs: Mapping[str, Tensor], size: Size
    ) -> dict[str, Tensor]:
        sized = ready.sizes.get(size) or self._sized(ready, size)
        held: dict[str, Tensor] = {}
        for buffer, shape in zip(ready.external, sized.shapes, strict=True):
            if buffer.name in ready.plan.inputs:
                held[buffer.name] = self._input(buffer, inputs[buffer.name], shape)
            else:
                held[buffer.name] = self._empty(shape, self._dtypes[buffer.dtype])
        if size[1]:
            self._execute(ready, held.values(), size, sized)
        return {name: held[name] for name in ready.plan.outputs}

    def _execute(
        self, ready: _Ready, external: Iterable[Tensor], size: Size, sized: _Sized
    ) -> None:
        arena = self._empty(sized.arena, torch.uint8)  # held until all is launched
        addresses = [tensor.data_ptr() for tensor in external]
        try:
            ready.executable.run(
                size, sized.capacity, arena.data_ptr(), addresses, self._stream(), self._overlap
            )
        except _C.DriverError as error:
            raise self._failed(ready.plan.name, error) from error

    def _sized(self, ready: _Ready, size: Size) -> _Sized:
        """For the first call of a size, for which its kernels are loaded."""
        executable, (_, tokens, _) = ready.executable, size
        try:
            for key in executable.missing(size) if tokens else ():
                self._load(key, ready.program)
            executable.missing(size)  # looks at how what was loaded takes its parameters
        except _C.DriverError as error:
            raise self._failed(ready.plan.name, error) from error
        except ValueError as error:
            raise DeviceError(f"{ready.plan.name} on {self.device}: {error}") from error
        capacity = executable.capacity(size)
        shapes = tuple(buffer.shape(*size) for buffer in ready.external)
        if len(ready.sizes) >= SIZES:  # texts come in more sizes than are worth keeping
            ready.sizes.clear()
        sized = _Sized(capacity, (executable.arena_bytes(capacity),), shapes)
        return ready.sizes.setdefault(size, sized)

    def _failed(self, what: str, error: _C.DriverError) -> DeviceError:
        kind = OutOfMemoryError if error.code == OUT_OF_MEMORY else DeviceError
        advice = f"; {NEW_PROCESS}" if error.code in STICKY else ""
        return kind(f"{what} on {self.device}: {error}{advice}")

    def _load(self, key: str, program: Program) -> None:
        with self._compiling:
            arch = self.target.arch
            record = None if self._exported is None else self._exported.image(arch, key)
            if record is None and key not in program.calls:
                where = self._exported.folder if self._exported is not None else "program"
                raise CheckpointError(f"{where}: got no kernel {key} for sm_{arch}, wanted it")
            if record is None:
                record = self._record(key, program.calls[key])
            self._kernels.load(record)

    def _record(self, key: str, call: Call) -> bytes:
        try:
            return kernel_record(key, call, self.target.arch)
        except VitrailError as error:
            raise DeviceError(
                f"native backend on {self.device}: {error}; backend='torch' compiles nothing"
            ) from error

    def _ready(self, plan: Plan, inputs: Mapping[str, Tensor]) -> _Ready:
        """The program of ``plan`` for images of this size, made at the first call."""
        pixels = inputs.get("pixels")
        key = (id(plan), None if pixels is None else (pixels.shape[1:], pixels.dtype))
        with self._lock:
            found = self._programs.get(key)
            if found is not None:
                self._programs.move_to_end(key)
                return found
        program = self._program(plan, pixels)
        executable = _C.Executable(self._kernels, program.record, self.weights.arena.data_ptr())
        buffers = {buffer.name: buffer for buffer in plan.buffers}
        external = tuple(buffers[name] for name in program.externals)
        made = _Ready(plan, program, executable, external, {})
        with self._lock:
            self._programs[key] = made
            while len(self._programs) > PROGRAMS:
                self._programs.popitem(last=False)
        return made

    def _program(self, plan: Plan, pixels: Tensor | None) -> Program:
        if self._exported is not None:
            stored = self._exported.program(self.target.arch, plan, pixels)
            if stored is not None:
                return stored
            self._need_triton(self._exported, plan.name)
        return lower(plan, self.target, self.dtype, self.weights, pixels)

    def _need_triton(self, exported: Exported, what: str) -> None:
        if NO_TRITON is not None:
            raise InputError(
                f"{exported.folder}: got a call of {what}, which needs triton, and {NO_TRITON}; "
                f"wanted what was exported: {exported.extent}"
            )

    def _input(self, buffer: Buffer, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """``tensor`` as C++ takes it: contiguous, at a multiple of 16 bytes."""
        if buffer.name != "pixels":  # whose size is the program's own
            wanted = shape, self._dtypes[buffer.dtype]
            got = tuple(tensor.shape), tensor.dtype
            assert got == wanted, f"{buffer.name}: got {got}, wanted {wanted}"
        assert tensor.device == self.device, f"{buffer.name}: got a tensor on {tensor.device}"
        tensor = tensor.contiguous()
        return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        try:
            return torch.empty(shape, dtype=dtype, device=self.device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"{self.device}: {error}") from error
