"""An emulator of PTX: runs compiled kernels on the CPU, and checks what a GPU would not say.

`Module` parses PTX, `run` executes launches in host memory and raises `Fault` for what is wrong:
accesses out of bounds, reads of what nobody wrote, races, missing waits, deadlocks. `emulator.h`
describes the C interface, which the driver stand-in uses too; `call.py` runs a `vitrail_kernels`
Call on CPU tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import shared_library

FOLDER = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fvisibility=default",
    "-fwrapv",  # integers wrap, as PTX's do
    "-ffp-contract=off",  # a fused multiply-add is one where PTX says so
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-unknown-pragmas",
)
CLASSES = (
    "integer",
    "float",
    "convert",
    "move",
    "parameter",
    "global",
    "shared",
    "local",
    "atomic",
    "async copy",
    "matrix move",
    "mma",
    "wgmma",
    "barrier",
    "branch",
    "exchange",
    "other",
)
"""Classes of instructions, in the C interface's order."""


@functools.cache
def build() -> Path:
    """The emulator's library, compiled and kept while its sources stay as they are.

    Raises RuntimeError without a compiler or with what it says.
    """
    tensor_map = FOLDER.parent / "standin/tensor_map.hpp"
    headers = (tensor_map, tensor_map.with_name("abi.hpp"))
    return shared_library.build(
        "the emulator", FOLDER, "libemulator.so", FLAGS, headers=headers, native=True
    )


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
    global memory; ``bytes`` is what was asked for. ``waits``: how often a warp had to wait.
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


class _Range(ctypes.Structure):
    _fields_ = [
        ("start", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("written", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
    ]


class _Options(ctypes.Structure):
    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("limit", ctypes.c_uint64),
        ("races", ctypes.c_int32),
        ("counters", ctypes.c_int32),
        ("strict", ctypes.c_int32),
        ("resident", ctypes.c_uint32),
        ("multiprocessors", ctypes.c_uint32),
    ]


_COUNTERS = tuple(Report.__slots__)[1:-2]


class _Report(ctypes.Structure):
    _fields_ = [
        ("seconds", ctypes.c_double),
        *((name, ctypes.c_uint64) for name in _COUNTERS[:3]),
        ("by_class", ctypes.c_uint64 * len(CLASSES)),
        *((name, ctypes.c_uint64) for name in _COUNTERS[3:]),
    ]


class _Fault(ctypes.Structure):
    _fields_ = [("launch", ctypes.c_int32), ("address", ctypes.c_uint64)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("module", ctypes.c_void_p),
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("parameters", ctypes.c_char_p),
        ("pdl", ctypes.c_int32),
    ]


class _Site(ctypes.Structure):
    _fields_ = [
        ("opcode", ctypes.c_char_p),
        ("source", ctypes.c_char_p),
        ("line", ctypes.c_uint32),
        ("instruction_class", ctypes.c_uint32),
        ("runs", ctypes.c_uint64),
        ("ideal", ctypes.c_uint64),
        ("actual", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("waits", ctypes.c_uint64),
    ]


_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "load": ([ctypes.c_char_p], ctypes.c_void_p),
    "unload": ([ctypes.c_void_p], None),
    "error": ([], ctypes.c_char_p),
    "last_fault": ([], _Fault),
    "parameters": (
        [ctypes.c_void_p, ctypes.c_char_p, *[ctypes.c_void_p] * 3, ctypes.c_int],
        ctypes.c_int,
    ),
    "unknown": ([ctypes.c_void_p], ctypes.c_int),
    "tensor_map": (
        [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
        + [ctypes.c_void_p] * 3
        + [ctypes.c_int],
        None,
    ),
    "run_chain": (
        [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
        + [ctypes.c_void_p, ctypes.c_void_p],
        ctypes.c_int,
    ),
    "sites": ([ctypes.c_int, ctypes.POINTER(ctypes.POINTER(_Site))], ctypes.c_int),
    "opcode": ([ctypes.c_int], ctypes.c_char_p),
    "break": ([ctypes.c_char_p, ctypes.c_int], ctypes.c_int),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The library, loaded, its functions with their types."""
    loaded = ctypes.CDLL(str(build()))
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(loaded, f"emulator_{name}")
        function.argtypes, function.restype = arguments, result
    return loaded


def _error() -> str:
    return str(library().emulator_error().decode())


class Module:
    """Kernels of one text of PTX. Raises `Fault` if it does not parse."""

    def __init__(self, ptx: str) -> None:
        self.ptx = ptx
        self.handle = library().emulator_load(ptx.encode())
        if not self.handle:
            raise Fault(_error())

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            library().emulator_unload(self.handle)

    def unknown(self) -> list[str]:
        """Opcodes that the emulator does not know, which are faults if they are executed."""
        count = library().emulator_unknown(self.handle)
        return _error().split() if count else []

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
        for index, (value, (offset, wanted)) in enumerate(zip(values, parameters, strict=True)):
            if len(value) != wanted:
                raise ValueError(f"parameter {index}: got {len(value)} bytes, wanted {wanted}")
            buffer[offset : offset + wanted] = value
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

    def _fill(self, record: _Launch) -> None:
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
    records, reports = (_Launch * len(chain))(), (_Report * len(chain))()
    for record, launch in zip(records, chain, strict=True):
        launch._fill(record)
    memory = (_Range * len(ranges))(
        *(
            _Range(
                item.start,
                item.size,
                None if item.written is None else item.written.ctypes.data,
                item.name.encode(),
            )
            for item in ranges
        )
    )
    options = _Options(seed, limit, races, counters, strict, resident, multiprocessors)
    code = library().emulator_run_chain(
        records, len(chain), memory, len(ranges), ctypes.byref(options), reports
    )
    if code != 0:
        fault = library().emulator_last_fault()
        raise Fault(_error(), fault.launch, fault.address)
    return [_report(index, record, counters) for index, record in enumerate(reports)]


def _report(index: int, record: _Report, counters: bool) -> Report:
    values = {name: getattr(record, name) for name in ("seconds", *_COUNTERS)}
    if not counters:
        return Report(**values)
    first = ctypes.POINTER(_Site)()
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
