"""Calls of the stand-in from Python, and small cubins to call."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from standin import FOLDER, Standin

SWIZZLE_128, FLOAT16 = 3, 6


class _Value(ctypes.Union):
    _fields_ = [("bytes", ctypes.c_char * 64), ("pdl", ctypes.c_int)]


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint32), ("pad", ctypes.c_uint32), ("value", _Value)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint32),
    ]


def _ctype(name: str) -> Any:
    if "*" in name:
        return ctypes.c_void_p
    wide = {"size_t": ctypes.c_size_t, "uint64_t": ctypes.c_uint64, "uint32_t": ctypes.c_uint32}
    return wide.get(name, ctypes.c_int)


FUNCTIONS = {
    name: [_ctype(one.strip()) for one in rest.replace("\\\n", "").split(",")]
    for name, rest in re.findall(r"X\((cu\w+), ([^)]*)\)", (FOLDER / "abi.hpp").read_text())
}


class Cuda:
    """A stand-in of its own, started, with a context; calls of the driver by name."""

    def __init__(self, path: Path) -> None:
        self.standin = Standin(path)
        for name, arguments in FUNCTIONS.items():
            getattr(self.standin.driver, name).argtypes = arguments
        self.context = ctypes.c_void_p()
        self.places: dict[int, list[tuple[int, int]]] = {}
        self.ok("cuInit", 0)
        self.ok("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), 0)
        self.ok("cuCtxSetCurrent", self.context)

    def __call__(self, name: str, *arguments: Any) -> int:
        return int(getattr(self.standin.driver, name)(*arguments))

    def ok(self, name: str, *arguments: Any) -> None:
        code = self(name, *arguments)
        assert code == 0, f"{name}: {code}: {self.standin.complaint()}"

    def refused(self, code: int, words: str, name: str, *arguments: Any) -> None:
        self.standin.reset()
        assert self(name, *arguments) == code, self.standin.complaint()
        assert words in self.standin.complaint()

    def made(self, name: str, *arguments: Any) -> int:
        """The handle that ``name`` gives by its first argument."""
        handle = ctypes.c_uint64()
        self.ok(name, ctypes.byref(handle), *arguments)
        return handle.value

    def allocate(self, data: bytes) -> int:
        address = self.made("cuMemAlloc_v2", len(data))
        self.ok("cuMemcpyHtoDAsync_v2", address, data, len(data), None)
        return address

    def read(self, address: int, size: int = 8) -> bytes:
        data = ctypes.create_string_buffer(size)
        self.ok("cuMemcpyDtoHAsync_v2", data, address, size, None)
        return data.raw

    def function(self, image: bytes, name: str) -> int:
        module = self.made("cuModuleLoadData", image)
        function = self.made("cuModuleGetFunction", module, name.encode())
        self.places[function] = self.parameters(function)
        return function

    def parameters(self, function: int) -> list[tuple[int, int]]:
        """Offsets and sizes, by cuFuncGetParamInfo."""
        found: list[tuple[int, int]] = []
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        pointers = ctypes.byref(offset), ctypes.byref(size)
        while self("cuFuncGetParamInfo", function, len(found), *pointers) == 0:
            found.append((offset.value, size.value))
        return found

    def attribute(self, function: int, number: int) -> int:
        value = ctypes.c_int()
        self.ok("cuFuncGetAttribute", ctypes.byref(value), number, function)
        return value.value

    def encode(self, **changed: Any) -> tuple[int, Any]:
        """The code, and 128 bytes: of a half-precision matrix of 64 columns but for ``changed``."""
        given: dict[str, Any] = {
            "type": FLOAT16,
            "base": 0,
            "dims": (64, 100),
            "strides": (128,),
            "box": (64, 64),
            "steps": (1, 1),
            "interleave": 0,
            "swizzle": SWIZZLE_128,
            "aside": 0,
        }
        given |= changed
        space = ctypes.create_string_buffer(256)
        start = -ctypes.addressof(space) % 64 + given["aside"]
        raw = (ctypes.c_char * 128).from_buffer(space, start)
        code = self(
            "cuTensorMapEncodeTiled",
            raw,
            given["type"],
            given.get("rank", len(given["dims"])),
            given["base"],
            (ctypes.c_uint64 * 5)(*given["dims"]),
            (ctypes.c_uint64 * 4)(*given["strides"]),
            (ctypes.c_uint32 * 5)(*given["box"]),
            (ctypes.c_uint32 * 5)(*given["steps"]),
            given["interleave"],
            given["swizzle"],
            2,
            0,
        )
        return code, raw

    def map(self, base: int, **changed: Any) -> bytes:
        code, raw = self.encode(base=base, **changed)
        assert code == 0, self.standin.complaint()
        return bytes(raw)

    def launch(
        self,
        function: int,
        values: Sequence[int | bytes | None],
        *,
        grid: tuple[int, int, int] = (7, 1, 1),
        block: tuple[int, int, int] = (128, 1, 1),
        shared: int = 0,
        stream: int | None = None,
        attributes: Sequence[tuple[int, int]] = (),
        packed: bool = False,
    ) -> int:
        """A launch of what `function` gave; ``values`` are numbers, or bytes as they are."""
        config = _Config(grid, block, shared, stream)
        config.attributes = (_Attribute * len(attributes))(
            *(_Attribute(id, 0, _Value(pdl=value)) for id, value in attributes)
        )
        config.count = len(attributes)
        places = self.places[function]
        raws = [
            value.to_bytes(size, "little") if isinstance(value, int) else value
            for value, (_, size) in zip(values, places, strict=packed is False)
        ]
        if not packed:
            pointers = (ctypes.c_char_p * max(len(raws), 1))(*raws)
            return self("cuLaunchKernelEx", ctypes.byref(config), function, pointers, None)
        buffer = b""
        for raw, (offset, _) in zip(raws, places, strict=False):
            buffer = buffer.ljust(offset, b"\0") + (raw or b"")
        size = ctypes.c_size_t(len(buffer))
        extra = (ctypes.c_void_p * 5)(1, ctypes.cast(ctypes.c_char_p(buffer), ctypes.c_void_p), 2)
        extra[3] = ctypes.addressof(size)
        return self("cuLaunchKernelEx", ctypes.byref(config), function, None, extra)


def cubin(
    kernels: Mapping[str, Sequence[int]],
    arch: int = 90,
    *,
    abi: int = 7,
    exact: bool = False,
    block: int = 0,
    static: int = 0,
    attribute: int = 0x17,
) -> bytes:
    """An ELF file with what the driver reads of kernels, given as their parameters' sizes."""
    sections: list[tuple[str, int, bytes, int]] = [("", 0, b"", 0)]
    for name, sizes in kernels.items():
        info, offset = b"", 0
        for ordinal, size in enumerate(sizes):
            offset += -offset % min(size, 64)
            value = struct.pack("<IHHI", 0, ordinal, offset, size << 18 | 0x1F000)
            info = struct.pack("<BBH", 4, attribute, 12) + value + info
            offset += size
        if block:
            info += struct.pack("<BBHIII", 4, 0x10, 12, block, 1, 1)
        info += struct.pack("<BBH", 3, 0x1B, 0xFF)
        sections += [(f".text.{name}", 1, bytes(128), 128), (f".nv.info.{name}", 1, info, 0)]
        sections.append((f".nv.shared.{name}", 8, b"", static + 1024 * (arch >= 90)))
    names = b"".join(name.encode() + b"\0" for name, *_ in sections) + b".shstrtab\0"
    sections.append((".shstrtab", 3, names, 0))
    body, headers = b"", b""
    for name, kind, data, size in sections:
        place = names.index(name.encode() + b"\0") if name else 0
        at = 64 + len(body)
        headers += struct.pack("<IIQQQQIIQQ", place, kind, 0, 0, at, size or len(data), 0, 0, 1, 0)
        body += data
    flags = arch << 8 | 4 | exact << 3 if abi >= 8 else arch << 16 | arch | exact << 11
    start = b"\x7fELF" + bytes((2, 1, 1, 0x33, abi)) + bytes(7)
    count = len(sections)
    start += struct.pack("<HHIQQQI", 2, 190, 1, 0, 0, 64 + len(body), flags)
    start += struct.pack("<HHHHHH", 64, 0, 0, 64, count, count - 1)
    return start + body + headers
