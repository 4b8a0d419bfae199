"""The emulator's library by ctypes: compiled, loaded, its structures and functions as `emulator.h`
declares them."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import shared_library

FOLDER = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fvisibility=default",
    "-fwrapv",  # integers wrap, as PTX's do
    "-ffp-contract=off",  # PTX says which multiply-adds are fused
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
def build(*, native: bool = True) -> Path:
    """The emulator's library, compiled and kept while its sources stay as they are.

    ``native``: for this machine alone. Raises RuntimeError without a compiler, or with the
    compiler's errors.
    """
    tensor_map = FOLDER.parent / "standin/tensor_map.hpp"
    headers = (tensor_map, tensor_map.with_name("abi.hpp"))
    return shared_library.build(
        "the emulator", FOLDER, "libemulator.so", FLAGS, headers=headers, native=native
    )


class RangeRecord(ctypes.Structure):
    _fields_ = [
        ("start", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("written", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
    ]


class OptionsRecord(ctypes.Structure):
    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("limit", ctypes.c_uint64),
        ("races", ctypes.c_int32),
        ("counters", ctypes.c_int32),
        ("strict", ctypes.c_int32),
        ("resident", ctypes.c_uint32),
        ("multiprocessors", ctypes.c_uint32),
    ]


COUNTERS = (
    "warp_instructions",
    "thread_instructions",
    "blocks",
    "mma",
    "wgmma",
    "wgmma_macs",
    "tensor_loads",
    "tensor_load_bytes",
    "tensor_stores",
    "tensor_store_bytes",
    "barrier_waits",
    "mbarrier_waits",
    "in_flight_moves",
    "same_writes",
    "injected_fences",
    "overlapped",
)
"""Counters of emulator_report; ``by_class`` stands after the third."""


class ReportRecord(ctypes.Structure):
    _fields_ = [
        ("seconds", ctypes.c_double),
        *((name, ctypes.c_uint64) for name in COUNTERS[:3]),
        ("by_class", ctypes.c_uint64 * len(CLASSES)),
        *((name, ctypes.c_uint64) for name in COUNTERS[3:]),
    ]


class FaultRecord(ctypes.Structure):
    _fields_ = [("launch", ctypes.c_int32), ("address", ctypes.c_uint64)]


class LaunchRecord(ctypes.Structure):
    _fields_ = [
        ("module", ctypes.c_void_p),
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("parameters", ctypes.c_char_p),
        ("pdl", ctypes.c_int32),
    ]


class SiteRecord(ctypes.Structure):
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


SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "load": ([ctypes.c_char_p], ctypes.c_void_p),
    "unload": ([ctypes.c_void_p], None),
    "error": ([], ctypes.c_char_p),
    "last_fault": ([], FaultRecord),
    "parameters": (
        [ctypes.c_void_p, ctypes.c_char_p, *[ctypes.c_void_p] * 3, ctypes.c_int],
        ctypes.c_int,
    ),
    "unknown": ([ctypes.c_void_p], ctypes.c_int),
    "tensor_map": (
        [
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.c_int,
            ctypes.c_int,
            *[ctypes.c_void_p] * 3,
            ctypes.c_int,
        ],
        None,
    ),
    "run_chain": (
        [ctypes.c_void_p, ctypes.c_int] * 2 + [ctypes.c_void_p] * 2,
        ctypes.c_int,
    ),
    "sites": ([ctypes.c_int, ctypes.POINTER(ctypes.POINTER(SiteRecord))], ctypes.c_int),
    "opcode": ([ctypes.c_int], ctypes.c_char_p),
    "break": ([ctypes.c_char_p, ctypes.c_int], ctypes.c_int),
}


def declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """The library, its functions with their types."""
    for name, (arguments, result) in SIGNATURES.items():
        function = getattr(loaded, f"emulator_{name}")
        function.argtypes, function.restype = arguments, result
    return loaded


@functools.cache
def library() -> ctypes.CDLL:
    """The library, compiled for this machine and loaded."""
    return declared(ctypes.CDLL(str(build())))


def error() -> str:
    """The calling thread's latest error."""
    return str(library().emulator_error().decode())
