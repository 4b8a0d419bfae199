"""Launches of the driver stand-in that compute: the emulator behind it, from Python."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import emulator
from standin import Standin


@dataclass(frozen=True, slots=True)
class Totals:
    """Work so far: launches that were emulated, those of them that began before the launch before
    was complete (``overlapped``), instructions of warps, and seconds."""

    launches: int
    overlapped: int
    instructions: int
    seconds: float


class _Totals(ctypes.Structure):
    _fields_ = [
        ("launches", ctypes.c_uint64),
        ("overlapped", ctypes.c_uint64),
        ("instructions", ctypes.c_uint64),
        ("seconds", ctypes.c_double),
    ]


_TEXT, _ADDRESS, _SIZE, _INT = ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int
_ARGUMENTS = {
    "emulator": (_TEXT,),
    "ptx": (_TEXT, _TEXT),
    "emulate": (ctypes.c_uint64, _INT, _INT),
    "track": (_INT,),
    "name": (_ADDRESS, _TEXT, _INT),
    "unwritten": (_ADDRESS, _SIZE),
    "finish": (),
    "emulated": (ctypes.POINTER(_Totals),),
}


class Emulation:
    """The emulator behind ``driver``. Modules compute whose cubin `source` knows; others leave
    digests as ever. ``library``: the emulator's, compiled if it is not given."""

    def __init__(self, driver: Standin, library: Path | None = None) -> None:
        self._driver = driver
        for name, arguments in _ARGUMENTS.items():
            getattr(driver.driver, f"standin_{name}").argtypes = arguments
        self._call("emulator", str(library or emulator.build()).encode())
        self.schedule(0)

    def source(self, image: bytes, ptx: str) -> None:
        """``image``, a cubin or a fatbin, was compiled from ``ptx``. Of a fatbin that is the cubin
        for the device as it is now. Raises ValueError if it has none."""
        self._call("ptx", image, ptx.encode())

    def schedule(self, seed: int, *, overlap: bool = False, races: bool = True) -> None:
        """How launches run from now on. ``seed`` chooses the order of warps; 0 takes turns, and
        does asynchronous work as late as is allowed. With ``overlap`` launches wait until something
        needs their result, and those that may begin before the one before has ended run with it."""
        self._driver.driver.standin_emulate(seed, overlap, races)

    def track(self, on: bool) -> None:
        """Whether new device memory counts as unwritten, so that reading it is a fault."""
        self._driver.driver.standin_track(on)

    def name(self, start: int, name: str, *, written: bool = True) -> None:
        """Name the range that begins at ``start`` for faults; without ``written`` its bytes count
        as unwritten. Raises ValueError if no range begins there."""
        self._call("name", start, name.encode(), not written)

    def check_written(self, start: int, size: int) -> None:
        """Raises ValueError, naming the range, if nobody wrote some of these bytes."""
        self._call("unwritten", start, size)

    def finish(self) -> None:
        """Run the launches that wait. Raises ValueError with the sentence of a fault."""
        self._call("finish")

    def totals(self) -> Totals:
        """Work since the driver was opened."""
        totals = _Totals()
        self._driver.driver.standin_emulated(ctypes.byref(totals))
        return Totals(totals.launches, totals.overlapped, totals.instructions, totals.seconds)

    def _call(self, name: str, *arguments: bytes | int) -> None:
        if getattr(self._driver.driver, f"standin_{name}")(*arguments) != 0:
            raise ValueError(self._driver.complaint())
