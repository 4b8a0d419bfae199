"""The header of a safetensors file, read strictly.

The layout is the published format (https://github.com/huggingface/safetensors, README, "Format"):
a little-endian uint64 length, a JSON header, the bytes of the tensors. If that text leaves
something open, this reader is strict: it accepts nothing that has two meanings. Imports no torch
and no safetensors. Every refusal is a CheckpointError of a single line.
"""

import math
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path

from vitrail.checkpoint.regular import Stamp, file_stamp, open_regular, read_range, reading
from vitrail.checkpoint.strict_json import Raw, parse_json
from vitrail.checkpoint.tensors import TensorEntry
from vitrail.errors import refusal, show, show_path

MAX_HEADER_BYTES = 1 << 24
MAX_TENSORS = 20_000
MAX_RANK = 8
MAX_NAME_BYTES = 512

# The dtypes of safetensors 0.8 and their bits per element.
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
FIELDS = frozenset(("dtype", "shape", "data_offsets"))

# The first bytes of other files that are often named *.safetensors.
FOREIGN = (
    (re.compile(rb"PK\x03\x04"), "a zip archive (PyTorch's pickled format)"),
    (re.compile(rb"\x80[\x02-\x05]"), "a Python pickle"),
    (re.compile(rb"\x89HDF"), "an HDF5 file"),
    (re.compile(rb"version "), "a git-lfs pointer (the weights were never fetched: git lfs pull)"),
    (re.compile(rb"<(!doctyp|html)", re.IGNORECASE), "a web page"),
)
_PATH_LIKE = re.compile(r"[/\\~]|[A-Za-z]:[/\\]")


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of a safetensors file by name, in the order of the header.

    Reads only the header. Raises CheckpointError, which names file, tensor and field, unless
    ``path`` is a regular file whose header and size agree to the byte.
    """
    descriptor = open_regular(path)
    try:
        with reading(path):
            stamp = file_stamp(descriptor)
        size = stamp[2]
        start = read_range(descriptor, 0, min(size, 9), path)
        raw = read_range(descriptor, 8, header_length(start, size, show_path(path)), path)
    finally:
        os.close(descriptor)
    return parse_header(raw, size, path, stamp)


def header_length(start: Raw, size: int, location: str) -> int:
    """Length in bytes of the JSON header, from the first nine bytes of a file of ``size`` bytes."""
    if size < 10:
        raise refusal(location, f"a file of {size} bytes", "safetensors, which has at least 10")
    has_brace = start[8:9] == b"{"
    foreign = next((name for magic, name in FOREIGN if magic.match(start)), None)
    if foreign and not has_brace:
        raise refusal(location, foreign, "a safetensors file; nothing is ever unpickled")
    length: int = struct.unpack("<Q", start[:8])[0]
    actual = f"a header length of {length:,}"
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise refusal(location, actual, f"2 to {MAX_HEADER_BYTES:,} bytes")
    if length > size - 8:
        raise refusal(location, actual, f"at most the {size - 8:,} bytes that follow")
    if not has_brace:
        actual = f"{show(bytes(start[8:9]))} at byte 8"
        raise refusal(location, actual, "the '{' that opens a header")
    return length


def parse_header(
    raw: Raw, size: int, path: Path, stamp: Stamp | None = None
) -> dict[str, TensorEntry]:
    """The tensors that the header bytes ``raw`` describe in a file of ``size`` bytes in all."""
    location = show_path(path)
    if not raw.rstrip(b" ").endswith(b"}"):
        actual = f"{show(bytes(raw[-1:]))} at the end of the header"
        raise refusal(location, actual, "'}', then spaces only")
    claimed = raw.count(b'"data_offsets"')
    if claimed > MAX_TENSORS:
        raise refusal(location, f"{claimed:,} tensors", f"at most {MAX_TENSORS:,}")
    fields = parse_json(raw, location)
    _check_metadata(fields.pop("__metadata__", {}), location)
    if not 1 <= len(fields) <= MAX_TENSORS:
        raise refusal(location, f"{len(fields):,} tensors", f"1 to {MAX_TENSORS:,}")
    data = 8 + len(raw)
    tensors = {name: _entry(name, value, path, data, stamp) for name, value in fields.items()}
    _check_layout(tensors.values(), data, size, location)
    return tensors


def _check_metadata(metadata: object, location: str) -> None:
    flat = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not flat:
        raise refusal(f"{location}: __metadata__", show(metadata), "an object of strings")


def _entry(name: str, value: object, path: Path, data: int, stamp: Stamp | None) -> TensorEntry:
    """The entry of a tensor; ``data`` is the absolute offset of the first tensor byte."""
    _check_name(name, show_path(path))
    location = f"{show_path(path)}: tensor {show(name)}"
    if not isinstance(value, dict) or value.keys() != FIELDS:
        actual = sorted(value) if isinstance(value, dict) else value
        raise refusal(location, show(actual), "exactly the fields data_offsets, dtype, shape")
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refusal(f"{location}: dtype", show(dtype), f"one of {', '.join(DTYPE_BITS)}")
    at_shape, at_offsets = f"{location}: shape", f"{location}: data_offsets"
    shape = _counts(at_shape, value["shape"])
    if len(shape) > MAX_RANK:
        raise refusal(at_shape, f"{len(shape):,} dimensions", f"at most {MAX_RANK}")
    if 0 in shape:
        raise refusal(at_shape, show(shape), "no dimension of 0")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits >= 1 << 66:
        raise refusal(at_shape, show(shape), "fewer than 2^63 bytes")
    offsets = _counts(at_offsets, value["data_offsets"])
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refusal(at_offsets, show(offsets), "[begin, end] in this order")
    begin, end = offsets
    if bits % 8:
        raise refusal(at_shape, f"{show(shape)} of {dtype}", "a whole number of bytes")
    if bits != 8 * (end - begin):
        expected = f"{bits // 8:,} for {dtype} {show(shape)}"
        raise refusal(at_offsets, f"{end - begin:,} bytes", expected)
    return TensorEntry(name, path, dtype, tuple(shape), data + begin, end - begin, stamp)


def _check_name(name: str, location: str) -> None:
    length = len(name.encode("utf-8"))
    if not 1 <= length <= MAX_NAME_BYTES:
        raise refusal(location, f"a tensor name of {length:,} bytes", f"1 to {MAX_NAME_BYTES}")
    if not name.isprintable():
        raise refusal(location, f"the tensor name {show(name)}", "printable characters")
    if _PATH_LIKE.match(name) or ".." in re.split(r"[/\\]", name):
        raise refusal(location, f"the tensor name {show(name)}", "a name that is not a path")


def _counts(location: str, value: object) -> list[int]:
    # isinstance takes a bool for an int, and `true` is not a count
    if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
        raise refusal(location, show(value), "a list of integers from 0 up")
    return value


def _check_layout(tensors: Iterable[TensorEntry], data: int, size: int, location: str) -> None:
    """Refuses holes and overlaps: the tensors fill the file from ``data`` to its end."""
    end = data
    for entry in sorted(tensors, key=lambda entry: entry.offset):
        if entry.offset != end:
            fault = "an overlap" if entry.offset < end else "a hole"
            raise refusal(
                f"{location}: tensor {show(entry.name)}: data_offsets",
                f"{fault}: a tensor from {entry.offset - data:,}",
                f"from {end - data:,}, where the one before it ends",
            )
        end += entry.nbytes
    if end > size:
        raise refusal(location, f"{size:,} bytes (truncated)", f"{end:,}, as the header says")
    if end < size:
        raise refusal(location, f"{size - end:,} bytes after the last tensor", "none")
