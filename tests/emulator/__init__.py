"""An emulator of PTX: runs compiled kernels on the CPU and finds errors that GPUs do not report.

`Module` parses PTX. `run` executes launches in host memory and raises `Fault` for accesses out of
bounds, reads of unwritten memory, races, missing waits and deadlocks. `emulator.h` describes the C
interface, which the driver stand-in uses too; `call.py` runs a `vitrail_kernels` Call on CPU
tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from emulator.binding import (
    CLASSES,
    COUNTERS,
    LaunchRecord,
    OptionsRecord,
    RangeRecord,
    ReportRecord,
    SiteRecord,
    build,
    error,
    library,
)

__all__ = [
    "CLASSES",
    "Fault",
    "Launch",
    "Module",
    "Range",
    "Report",
    "Site",
    "broken",
    "build",
    "library",
    "opcodes",
    "run",
    "tensor_map",
]


class Fault(RuntimeError):
    """What a kernel did wrong: kernel, PTX line and source line are in the message.

    ``launch`` is the index of the launch in its chain, ``address`` that of global memory if the
    fault is about one, else 0.
    """

    def __init__(self, message: str, launch: int = 0, address: int = 0) -> None:
        super().__init__(message)
        self.launch = launch
        self.address = address


@dataclass(frozen=True, slots=True)
class Range:
    """Global memory that kernels may use: ``size`` bytes from address ``start``.

    ``written``: uint8 of ``size``, 1 for bytes that hold a value. Reads of others are faults, and
    writes make them 1. Without it every byte counts as written.
    """

    start: int
    size: int
    name: str
    written: np.ndarray[Any, np.dtype[np.uint8]] | None = None

    def unwritten(self) -> int:
        """How many bytes hold no value."""
        return 0 if self.written is None else int((self.written == 0).sum())


@dataclass(frozen=True, slots=True)
class Site:
    """One instruction that ran: ``line`` of the PTX, ``source`` of Python or CUDA ("" if the PTX
    names none), ``runs`` by warps.

    For memory, ``actual`` and ``ideal`` count wavefronts of shared memory or sectors of 32 bytes of
    global memory; ``bytes``: the bytes that lanes asked for. ``waits``: how often a warp waited.
    """

    opcode: str
    source: str
    line: int
    instruction_class: str
    runs: int
    ideal: int
    actual: int
    bytes: int
    waits: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a launch did; `emulator.h` describes the counters. ``by_class`` and ``sites`` are empty
    without counters."""

    seconds: float
    warp_instructions: int
    thread_instructions: int
    blocks: int
    mma: int
    wgmma: int
    wgmma_macs: int
    tensor_loads: int
    tensor_load_bytes: int
    tensor_stores: int
    tensor_store_bytes: int
    barrier_waits: int
    mbarrier_waits: int
    in_flight_moves: int
    same_writes: int
    injected_fences: int
    overlapped: int
    by_class: dict[str, int] = field(default_factory=dict)
    sites: tuple[Site, ...] = ()


class Module:
    """The kernels of a PTX text. Raises `Fault` if it does not parse."""

    def __init__(self, ptx: str) -> None:
        self.ptx = ptx
        self.handle = library().emulator_load(ptx.encode())
        if not self.handle:
            raise Fault(error())

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            library().emulator_unload(self.handle)

    def unknown(self) -> list[str]:
        """Opcodes that the emulator does not know, which are faults if they are executed."""
        count = library().emulator_unknown(self.handle)
        return error().split() if count else []

    def parameters(self, kernel: str | None = None) -> list[tuple[int, int]]:
        """Offset and size in bytes of each parameter; of the first kernel by default.

        Raises ValueError without such a kernel.
        """
        return self._parameters(kernel)[1]

    def pack(self, values: Sequence[bytes], kernel: str | None = None) -> bytes:
        """The parameters' buffer, ``values`` at their offsets.

        Raises ValueError for another number of values, or a value of another size.
        """
        size, parameters = self._parameters(kernel)
        if len(values) != len(parameters):
            raise ValueError(f"got {len(values)} values, wanted {len(parameters)} parameters")
        buffer = bytearray(size)
        for index, (value, (offset, expected)) in enumerate(zip(values, parameters, strict=True)):
            if len(value) != expected:
                raise ValueError(f"parameter {index}: got {len(value)} bytes, wanted {expected}")
            buffer[offset : offset + expected] = value
        return bytes(buffer)

    def _parameters(self, kernel: str | None) -> tuple[int, list[tuple[int, int]]]:
        name = None if kernel is None else kernel.encode()
        size = ctypes.c_uint32()
        capacity = 512
        offsets, sizes = (ctypes.c_uint32 * capacity)(), (ctypes.c_uint32 * capacity)()
        count = library().emulator_parameters(
            self.handle, name, ctypes.byref(size), offsets, sizes, capacity
        )
        if count < 0:
            raise ValueError(f"no kernel {kernel} in the module")
        return size.value, list(zip(offsets[:count], sizes[:count], strict=True))


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch. ``grid`` and ``block`` as x, y, z, shorter ones filled with 1; ``parameters`` as
    `Module.pack` makes them; ``pdl``: it may overlap the launch before (see `emulator.h`)."""

    module: Module
    grid: Sequence[int]
    block: Sequence[int]
    parameters: bytes
    shared: int = 0
    kernel: str | None = None
    pdl: bool = False

    def _fill(self, record: LaunchRecord) -> None:
        record.module = self.module.handle
        record.kernel = None if self.kernel is None else self.kernel.encode()
        record.grid[:] = (*self.grid, 1, 1)[:3]
        record.block[:] = (*self.block, 1, 1)[:3]
        record.shared_bytes = self.shared
        record.parameters = self.parameters
        record.pdl = self.pdl


def run(
    launches: Launch | Sequence[Launch],
    ranges: Sequence[Range],
    *,
    seed: int = 1,
    races: bool = True,
    counters: bool = False,
    strict: bool = False,
    limit: int = 0,
    resident: int = 0,
    multiprocessors: int = 0,
) -> list[Report]:
    """Runs launches of one stream, and reports each; the options are those of `emulator.h`.

    Raises `Fault`.
    """
    chain = [launches] if isinstance(launches, Launch) else list(launches)
    records, reports = (LaunchRecord * len(chain))(), (ReportRecord * len(chain))()
    for record, launch in zip(records, chain, strict=True):
        launch._fill(record)
    memory = (RangeRecord * len(ranges))(
        *(
            RangeRecord(
                item.start,
                item.size,
                None if item.written is None else item.written.ctypes.data,
                item.name.encode(),
            )
            for item in ranges
        )
    )
    options = OptionsRecord(seed, limit, races, counters, strict, resident, multiprocessors)
    code = library().emulator_run_chain(
        records, len(chain), memory, len(ranges), ctypes.byref(options), reports
    )
    if code != 0:
        fault = library().emulator_last_fault()
        raise Fault(error(), fault.launch, fault.address)
    return [_report(index, record, counters) for index, record in enumerate(reports)]


def _report(index: int, record: ReportRecord, counters: bool) -> Report:
    values = {name: getattr(record, name) for name in ("seconds", *COUNTERS)}
    if not counters:
        return Report(**values)
    first = ctypes.POINTER(SiteRecord)()
    count = library().emulator_sites(index, ctypes.byref(first))
    sites = tuple(
        Site(
            site.opcode.decode(),
            site.source.decode(),
            site.line,
            CLASSES[site.instruction_class],
            site.runs,
            site.ideal,
            site.actual,
            site.bytes,
            site.waits,
        )
        for site in (first[i] for i in range(count))
    )
    by_class = dict(zip(CLASSES, record.by_class, strict=True))
    return Report(**values, by_class=by_class, sites=sites)


def tensor_map(
    base: int,
    element_type: int,
    dims: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle: int,
) -> bytes:
    """The 128 bytes of a tensor map. Dimensions from the innermost; ``strides`` in bytes, of all
    dimensions but the innermost; ``element_type`` and ``swizzle`` as cuda.h numbers them."""
    out = ctypes.create_string_buffer(128)
    library().emulator_tensor_map(
        out,
        base,
        element_type,
        len(dims),
        (ctypes.c_uint64 * 5)(*dims),
        (ctypes.c_uint64 * 4)(*strides),
        (ctypes.c_uint32 * 5)(*box),
        swizzle,
    )
    return out.raw


def opcodes() -> list[str]:
    """Every opcode that the emulator knows; "name#n" for the form of n operands."""
    names = []
    while (name := library().emulator_opcode(len(names))) is not None:
        names.append(name.decode())
    return names


@contextlib.contextmanager
def broken(opcode: str, mode: int) -> Iterator[bool]:
    """Modules that are loaded meanwhile have a wrong handler for ``opcode``; gives whether there is
    such a mutation. ``mode`` 1: it does nothing; 2: a bit of its result is wrong."""
    try:
        yield library().emulator_break(opcode.encode(), mode) == 0
    finally:
        library().emulator_break(opcode.encode(), 0)
