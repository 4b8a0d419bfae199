"""A stand-in for NVIDIA's libcuda.so.1, for tests of the native runtime without a GPU.

Device memory is host memory, every call is checked, and a launch writes a digest of what it was
given to the start of what its first parameter points to (`launch.hpp` says of what, `control.hpp`
what may be set). With `standin.emulation` launches of kernels whose PTX a test names compute. A
process that opens the library at `build()`'s path, with ctypes or by dlopen in C++, sees one state;
a copy of the file has a state of its own.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

import shared_library
from shared_library import compiler as compiler

FOLDER = Path(__file__).parent
SYMBOLIC = "-Wl,-Bsymbolic"  # its own copies of templates, not those of a program that opens it
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-pthread", SYMBOLIC)
STICKY = (214, 700, 702, 710, 714, 715, 716, 717, 718, 719, 999)
"""Codes after which every later call fails alike, until `Standin.reset`."""


@functools.cache
def build(flags: tuple[str, ...] = ()) -> Path:
    """The library, compiled with ``flags`` added (``("-fsanitize=thread", "-g")``), and kept for
    the next session while its sources stay as they are.

    Raises RuntimeError without a compiler or with what it says.
    """
    header = FOLDER.parent / "emulator/emulator.h"
    return shared_library.build(
        "the driver stand-in", FOLDER, "libcuda.so.1", (*FLAGS, *flags), headers=(header,)
    )


@dataclass(frozen=True, slots=True)
class TensorMap:
    """What cuTensorMapEncodeTiled was given. Dimensions from the innermost; strides in bytes, of
    all dimensions but the innermost; the rest as the numbers of cuda.h."""

    base: int
    type: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    interleave: int
    swizzle: int
    promotion: int
    fill: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a launch: ``offset`` and ``size`` in bytes as the cubin has them, ``raw``
    the bytes that were passed, ``map`` what they are where they are a tensor map."""

    offset: int
    size: int
    raw: bytes
    map: TensorMap | None

    @property
    def value(self) -> int:
        """The bytes as an unsigned number."""
        return int.from_bytes(self.raw, "little")


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: ``grid`` and ``block`` as x, y, z, ``shared`` bytes of dynamic shared memory,
    ``stream`` the handle, ``pdl`` whether it may overlap the launch before it, ``carveout``
    the percent of shared memory that was asked for its kernel (-1: not asked), ``digest`` what it
    wrote (0 where computing is off), ``device`` the ordinal of the device it ran on."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    pdl: bool
    carveout: int
    digest: int
    parameters: tuple[Parameter, ...]
    device: int = 0


@dataclass(frozen=True, slots=True)
class Live:
    """Objects that live: device allocations and the bytes they hold (those freed on a stream too,
    until one is waited for), pinned allocations, modules, streams, events, and retains of the
    primary context."""

    allocations: int
    bytes: int
    pinned: int
    modules: int
    streams: int
    events: int
    retains: int


class _Live(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in Live.__slots__]


class _Parameter(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint32), ("size", ctypes.c_uint32)]


class _Record(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("pdl", ctypes.c_uint32),
        ("carveout", ctypes.c_int32),
        ("device", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("digest", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("parameters", ctypes.POINTER(_Parameter)),
        ("bytes", ctypes.POINTER(ctypes.c_uint8)),
    ]


class _TensorMap(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_uint64),
        ("dims", ctypes.c_uint64 * 5),
        ("strides", ctypes.c_uint64 * 4),
        ("box", ctypes.c_uint32 * 5),
        ("steps", ctypes.c_uint32 * 5),
        ("rank", ctypes.c_uint32),
        ("type", ctypes.c_uint32),
        ("interleave", ctypes.c_uint32),
        ("swizzle", ctypes.c_uint32),
        ("promotion", ctypes.c_uint32),
        ("fill", ctypes.c_uint32),
    ]


_INT, _SIZE = ctypes.c_int, ctypes.c_uint64
_SIGNATURES = {
    "device": ((_INT, _INT, _INT), _INT),
    "add_device": ((_INT, _INT, _INT), _INT),
    "memory": ((_INT, _SIZE), None),
    "peak": ((_INT,), _SIZE),
    "checks": ((_INT,), None),
    "compute": ((_INT,), None),
    "rows_off": ((_INT,), None),
    "record": ((_INT,), None),
    "capturing": ((_INT,), None),
    "undo": ((_INT,), None),
    "register": ((_SIZE, _SIZE, _INT), _INT),
    "unregister": ((_SIZE,), _INT),
    "fail": ((_INT, _SIZE, _INT), None),
    "fail_launch": ((_INT, _SIZE, _INT), None),
    "calls": ((_INT,), _SIZE),
    "launches": ((_INT,), _SIZE),
    "live": ((_INT, ctypes.POINTER(_Live)), None),
    "complaint": ((), ctypes.c_char_p),
    "reset": ((), None),
    "records": ((), _SIZE),
    "record_at": ((_SIZE, ctypes.POINTER(_Record)), _INT),
    "tensor_map": ((ctypes.c_char_p, ctypes.POINTER(_TensorMap)), _INT),
}


def _ordinal(device: int | None) -> int:
    """A device as the library knows it: None is any of them, or all together."""
    return -1 if device is None else device


class Standin:
    """The library at ``path``, and its functions beside the driver's; ``driver`` is the library
    itself, for calls of the driver. What is set is set for the whole process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.driver = ctypes.CDLL(str(path))
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(self.driver, f"standin_{name}")
            function.argtypes, function.restype = arguments, result

    def device(self, major: int = 9, minor: int = 0, multiprocessors: int = 132) -> None:
        """What device 0 is. Raises ValueError while its context is retained."""
        if self.driver.standin_device(major, minor, multiprocessors) != 0:
            raise ValueError("standin: the device is in use, it cannot become another")

    def add_device(self, major: int = 9, minor: int = 0, multiprocessors: int = 132) -> int:
        """The ordinal of a device that is there from now on, too. Streams, events, modules and
        memory are used and given back while the context of their device is current, and by nothing
        else. Raises ValueError if there are 8."""
        ordinal: int = self.driver.standin_add_device(major, minor, multiprocessors)
        if ordinal < 0:
            raise ValueError("standin: there are 8 devices, it has no more")
        return ordinal

    def memory(self, size: int, device: int = 0) -> None:
        """Memory of a device in all, bytes: allocations past it give 2."""
        self.driver.standin_memory(device, size)

    def peak(self, device: int = 0) -> int:
        """The most bytes that a device's allocations held since this was last asked."""
        return int(self.driver.standin_peak(device))

    def checks(self, on: bool) -> None:
        """Checks of handles, contexts, shapes, parameters and addresses; on at the start."""
        self.driver.standin_checks(on)

    def compute(self, on: bool) -> None:
        """Copies and digests; on at the start. Off, with checks off too, the driver does nothing,
        and counts nothing."""
        self.driver.standin_compute(on)

    def rows_off(self, on: bool) -> None:
        """Whether digests leave out tensor maps' outermost dimension; on at the start."""
        self.driver.standin_rows_off(on)

    def undo(self, on: bool) -> None:
        """Whether waiting for a stream takes back what launches on it wrote, and new memory is
        alike in every byte; off at the start."""
        self.driver.standin_undo(on)

    def record(self, on: bool) -> None:
        """Whether launches are kept, for `launched`; off at the start."""
        self.driver.standin_record(on)

    def capturing(self, on: bool) -> None:
        """Whether some thread captures a CUDA graph; off at the start. Functions for modules and
        memory then give 900 to threads that cuThreadExchangeStreamCaptureMode has not relaxed."""
        self.driver.standin_capturing(on)

    def register(self, start: int, size: int, device: int | None = None) -> None:
        """Lets launches use ``size`` bytes of host memory, on every device or on one. Raises
        ValueError for an overlap."""
        if self.driver.standin_register(start, size, _ordinal(device)) != 0:
            raise ValueError(self.complaint())

    def unregister(self, start: int) -> None:
        """Raises ValueError where no registered range begins."""
        if self.driver.standin_unregister(start) != 0:
            raise ValueError(self.complaint())

    def fail(self, n: int, code: int, device: int | None = None) -> None:
        """The ``n``-th call from now returns ``code``; for `STICKY` ones all later calls too. With
        ``device`` calls count while its context is current."""
        self.driver.standin_fail(_ordinal(device), n, code)

    def fail_launch(self, n: int, code: int, device: int | None = None) -> None:
        """`fail`, counting launches alone."""
        self.driver.standin_fail_launch(_ordinal(device), n, code)

    def calls(self, device: int | None = None) -> int:
        """Calls so far, but for those that ask an error's name or set a thread's mode; with
        ``device`` those while its context was current."""
        return int(self.driver.standin_calls(_ordinal(device)))

    def launches(self, device: int | None = None) -> int:
        """Launches so far, failed ones too."""
        return int(self.driver.standin_launches(_ordinal(device)))

    def live(self, device: int | None = None) -> Live:
        """What lives now, on all devices or on one."""
        found = _Live()
        self.driver.standin_live(_ordinal(device), ctypes.byref(found))
        return Live(*(getattr(found, name) for name in Live.__slots__))

    def complaint(self) -> str:
        """The latest complaint; empty without one since `reset`."""
        return str(self.driver.standin_complaint().decode())

    def reset(self) -> None:
        """Forgets faults, records and the complaint; objects, counts and settings stay."""
        self.driver.standin_reset()

    def tensor_map(self, raw: bytes) -> TensorMap | None:
        """What 128 bytes mean, None where no call of cuTensorMapEncodeTiled made them."""
        found = _TensorMap()
        if self.driver.standin_tensor_map(raw, ctypes.byref(found)) != 0:
            return None
        rank = found.rank
        return TensorMap(
            base=found.base,
            type=found.type,
            dims=tuple(found.dims[:rank]),
            strides=tuple(found.strides[: rank - 1]),
            box=tuple(found.box[:rank]),
            element_strides=tuple(found.steps[:rank]),
            interleave=found.interleave,
            swizzle=found.swizzle,
            promotion=found.promotion,
            fill=found.fill,
        )

    def launched(self) -> list[Launch]:
        """What was launched while `record` was on, since the last `reset`. No other thread may
        `reset` meanwhile."""
        found = []
        for index in range(self.driver.standin_records()):
            record = _Record()
            self.driver.standin_record_at(index, ctypes.byref(record))
            parameters = []
            for one in record.parameters[: record.count]:
                raw = bytes(record.bytes[one.offset : one.offset + one.size])
                decoded = self.tensor_map(raw) if one.size == 128 else None
                parameters.append(Parameter(one.offset, one.size, raw, decoded))
            found.append(
                Launch(
                    name=record.name.decode(),
                    grid=tuple(record.grid),
                    block=tuple(record.block),
                    shared=record.shared,
                    stream=record.stream,
                    pdl=bool(record.pdl),
                    carveout=record.carveout,
                    digest=record.digest,
                    parameters=tuple(parameters),
                    device=record.device,
                )
            )
        return found


def open_context(driver: Standin) -> None:
    """Make the device's primary context current on this thread, as a program on a GPU has it."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    for name, *arguments in (
        ("cuInit", 0),
        ("cuDeviceGet", ctypes.byref(device), 0),
        ("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0),
        ("cuCtxPushCurrent_v2", context),
    ):
        code = getattr(driver.driver, name)(*arguments)
        assert code == 0, f"{name}: got {code}, wanted 0"


def synchronize(driver: Standin) -> None:
    """Wait for the default stream, as `torch.cuda.synchronize` does. Raises RuntimeError with the
    driver's code."""
    code = driver.driver.cuStreamSynchronize(ctypes.c_void_p())
    if code:
        raise RuntimeError(f"CUDA error: {code}")


def own(folder: Path, multiprocessors: int = 132) -> Standin:
    """A stand-in with a state of its own, of sm_90, in ``folder``; tensors on the CPU are its
    memory."""
    library = folder / "libcuda.so.1"
    shutil.copy(build(), library)
    found = Standin(library)
    found.device(9, 0, multiprocessors)
    found.register(1 << 32, (1 << 47) - (1 << 32))
    return found
