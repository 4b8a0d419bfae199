"""One file of a checkpoint, read strictly: JSON, and the header of a safetensors file.

The safetensors layout is the one published at https://github.com/huggingface/safetensors (README,
"Format"): eight bytes of little-endian length, a JSON header, the tensors' bytes. What that text
leaves open is closed here: nothing is read that has two meanings. Imports no torch and no
safetensors; every refusal is a one-line CheckpointError.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import stat
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.errors import CheckpointError, refusal, show, show_path

MAX_JSON_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 24
MAX_TENSORS = 20_000
MAX_DIGITS = 40
MAX_RANK = 8
MAX_NAME_BYTES = 512
MAX_DEPTH = 64
MAX_STRUCTURE = 1_000_000

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

# First bytes of what is often found under the name of a safetensors file.
FOREIGN = (
    (re.compile(rb"PK\x03\x04"), "a zip archive (PyTorch's pickled format)"),
    (re.compile(rb"\x80[\x02-\x05]"), "a Python pickle"),
    (re.compile(rb"\x89HDF"), "an HDF5 file"),
    (re.compile(rb"version "), "a git-lfs pointer (the weights were never fetched: git lfs pull)"),
    (re.compile(rb"<(!doctyp|html)", re.IGNORECASE), "a web page"),
)

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NOT_STRUCTURE = bytes(set(range(256)) - set(b",[]{}"))
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_PATH_LIKE = re.compile(r"[/\\~]|[A-Za-z]:[/\\]")

Raw = bytes | bytearray
Stamp = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies. ``dtype`` is the safetensors code ("F32", "BF16", ...).

    ``offset`` is the absolute offset of its first byte in ``file``, ``nbytes`` its length.
    ``stamp`` is what the file was (device, inode, size, mtime in ns) when its header was read;
    None, for entries that came from no file, is not compared.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    stamp: Stamp | None = None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the operating system's errors into CheckpointError with its reason."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(f"{show_path(path)}: cannot be read: {reason}") from error


def check_regular(path: Path, opened: int | None = None) -> None:
    """Raises CheckpointError unless ``path``, or what was ``opened`` there, is a regular file."""
    with reading(path):
        mode = os.stat(path if opened is None else opened).st_mode
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
        kind = next((text for is_kind, text in kinds if is_kind(mode)), "a device")
        raise refusal(show_path(path), kind, "a regular file")


def open_regular(path: Path) -> int:
    """A descriptor of a regular file. Anything else is refused, and a FIFO is never waited for."""
    check_regular(path)
    with reading(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        check_regular(path, descriptor)
    except CheckpointError:
        os.close(descriptor)
        raise
    return descriptor


def file_stamp(descriptor: int) -> Stamp:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_exactly(descriptor: int, offset: int, out: memoryview, path: Path) -> None:
    done = 0
    while done < len(out):
        with reading(path):
            count = os.preadv(descriptor, [out[done:]], offset + done)
        if count == 0:
            raise CheckpointError(
                f"{show_path(path)}: was truncated while loading, at byte {offset + done}"
            )
        done += count


def _read(descriptor: int, offset: int, count: int, path: Path) -> bytearray:
    data = bytearray(count)
    read_exactly(descriptor, offset, memoryview(data), path)
    return data


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most ``limit`` bytes, as strict as ``parse_json``."""
    descriptor = open_regular(path)
    try:
        with reading(path):
            size = os.fstat(descriptor).st_size
        if size > limit:
            raise refusal(show_path(path), f"{size:,} bytes", f"at most {limit:,} bytes of JSON")
        raw = _read(descriptor, 0, size, path)
    finally:
        os.close(descriptor)
    return parse_json(raw, show_path(path))


def parse_json(raw: Raw, where: str) -> dict[str, Any]:
    """A JSON object with one meaning, or CheckpointError.

    UTF-8 without byte order mark; no duplicate keys at any depth; no NaN, infinity or number that
    becomes one; integers of at most ``MAX_DIGITS`` digits; no lone surrogates; at most
    ``MAX_DEPTH`` levels and ``MAX_STRUCTURE`` commas, brackets or quotes. "-0" is the float, as in
    JSON it is negative.
    """
    if raw.startswith(b"\xef\xbb\xbf"):
        raise refusal(where, "a byte order mark", "JSON in UTF-8 without one")
    _check_structure(raw, where)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            [(key, count)] = Counter(key for key, _ in pairs).most_common(1)
            raise refusal(where, f"the key {show(key)} {count} times", "each key once")
        return fields

    def integer(text: str) -> int | float:
        # 31 digits: the "no limit" that transformers writes into tokenizer_config.json
        if len(text) > MAX_DIGITS:
            raise refusal(where, f"an integer of {len(text)} characters", f"at most {MAX_DIGITS}")
        return -0.0 if text == "-0" else int(text)

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise refusal(where, f"the number {show(text)}", "finite numbers")
        return number

    try:
        text = raw.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_int=integer,
            parse_float=finite,
            parse_constant=finite,
        )
        if _ESCAPED_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{where}: not valid JSON: {error.msg}, at character {error.pos}"
        ) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise refusal(where, "half of a surrogate pair", "whole characters") from error
    if not isinstance(value, dict):
        raise refusal(where, f"a JSON {type(value).__name__}", "a JSON object")
    return value


def _check_structure(raw: Raw, where: str) -> None:
    """Bounds depth and size before the parser, whose stack and memory they would cost."""
    quotes = raw.count(b'"')
    structure = (
        _STRING.sub(b"", raw).translate(None, _NOT_STRUCTURE) if quotes <= MAX_STRUCTURE else b""
    )
    if max(quotes, len(structure)) > MAX_STRUCTURE:
        raise refusal(
            where, "JSON of too many values", f"at most {MAX_STRUCTURE:,} commas or quotes"
        )
    brackets = structure.translate(_STEPS, b",")
    steps = memoryview(brackets).cast("b")
    if brackets.count(b"\x01") > MAX_DEPTH and max(itertools.accumulate(steps)) > MAX_DEPTH:
        raise refusal(where, f"JSON nested deeper than {MAX_DEPTH} levels", f"at most {MAX_DEPTH}")


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of a safetensors file by name, in the order of the header.

    Raises CheckpointError, naming file, tensor and field, unless the file is a regular file whose
    header and size agree to the byte. No more than the header is read.
    """
    descriptor = open_regular(path)
    try:
        with reading(path):
            stamp = file_stamp(descriptor)
        size = stamp[2]
        head = _read(descriptor, 0, min(size, 9), path)
        raw = _read(descriptor, 8, header_length(head, size, show_path(path)), path)
    finally:
        os.close(descriptor)
    return parse_header(raw, size, path, stamp)


def header_length(head: Raw, size: int, where: str) -> int:
    """Length in bytes of the JSON header, from the first nine bytes of a file of ``size`` bytes."""
    if size < 10:
        raise refusal(where, f"a file of {size} bytes", "safetensors, which has at least 10")
    opens = head[8:9] == b"{"
    foreign = next((kind for magic, kind in FOREIGN if magic.match(head)), None)
    if foreign and not opens:
        raise refusal(where, foreign, "a safetensors file; nothing is ever unpickled")
    length: int = struct.unpack("<Q", head[:8])[0]
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise refusal(where, f"a header length of {length:,}", f"2 to {MAX_HEADER_BYTES:,} bytes")
    if length > size - 8:
        raise refusal(
            where, f"a header length of {length:,}", f"at most the {size - 8:,} bytes that follow"
        )
    if not opens:
        raise refusal(where, f"{show(bytes(head[8:9]))} at byte 8", "the '{' that opens a header")
    return length


def parse_header(
    raw: Raw, size: int, path: Path, stamp: Stamp | None = None
) -> dict[str, TensorEntry]:
    """The tensors that header bytes ``raw`` describe in a file of ``size`` bytes in all."""
    where = show_path(path)
    if not raw.rstrip(b" ").endswith(b"}"):
        raise refusal(
            where, f"{show(bytes(raw[-1:]))} at the end of the header", "'}', then spaces only"
        )
    claimed = raw.count(b'"data_offsets"')
    if claimed > MAX_TENSORS:
        raise refusal(where, f"{claimed:,} tensors", f"at most {MAX_TENSORS:,}")
    fields = parse_json(raw, where)
    _check_metadata(fields.pop("__metadata__", {}), where)
    if not 1 <= len(fields) <= MAX_TENSORS:
        raise refusal(where, f"{len(fields):,} tensors", f"1 to {MAX_TENSORS:,}")
    data = 8 + len(raw)
    tensors = {name: _entry(name, value, path, data, stamp) for name, value in fields.items()}
    _check_layout(tensors.values(), data, size, where)
    return tensors


def _check_metadata(metadata: object, where: str) -> None:
    flat = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not flat:
        raise refusal(f"{where}: __metadata__", show(metadata), "an object of strings")


def _entry(name: str, value: object, path: Path, data: int, stamp: Stamp | None) -> TensorEntry:
    _check_name(name, show_path(path))
    where = f"{show_path(path)}: tensor {show(name)}"
    if not isinstance(value, dict) or value.keys() != FIELDS:
        got = sorted(value) if isinstance(value, dict) else value
        raise refusal(where, show(got), "exactly the fields data_offsets, dtype, shape")
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refusal(f"{where}: dtype", show(dtype), f"one of {', '.join(DTYPE_BITS)}")
    shape = _counts(f"{where}: shape", value["shape"])
    if len(shape) > MAX_RANK:
        raise refusal(f"{where}: shape", f"{len(shape):,} dimensions", f"at most {MAX_RANK}")
    if 0 in shape:
        raise refusal(f"{where}: shape", show(shape), "no dimension of 0")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits >= 1 << 66:
        raise refusal(f"{where}: shape", show(shape), "fewer than 2^63 bytes")
    offsets = _counts(f"{where}: data_offsets", value["data_offsets"])
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refusal(f"{where}: data_offsets", show(offsets), "[begin, end] in this order")
    begin, end = offsets
    if bits % 8:
        raise refusal(f"{where}: shape", f"{show(shape)} of {dtype}", "a whole number of bytes")
    if bits != 8 * (end - begin):
        wanted = f"{bits // 8:,} for {dtype} {show(shape)}"
        raise refusal(f"{where}: data_offsets", f"{end - begin:,} bytes", wanted)
    return TensorEntry(name, path, dtype, tuple(shape), data + begin, end - begin, stamp)


def _check_name(name: str, where: str) -> None:
    length = len(name.encode("utf-8"))
    if not 1 <= length <= MAX_NAME_BYTES:
        raise refusal(where, f"a tensor name of {length:,} bytes", f"1 to {MAX_NAME_BYTES}")
    if not name.isprintable():
        raise refusal(where, f"the tensor name {show(name)}", "printable characters")
    if _PATH_LIKE.match(name) or ".." in re.split(r"[/\\]", name):
        raise refusal(where, f"the tensor name {show(name)}", "a name that is not a path")


def _counts(where: str, value: object) -> list[int]:
    # bool is an int to isinstance, and `true` is not a count.
    if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
        raise refusal(where, show(value), "a list of integers from 0 up")
    return value


def _check_layout(tensors: Iterable[TensorEntry], data: int, size: int, where: str) -> None:
    """The tensors fill the file from the header to its end: no hole, no overlap, nothing after."""
    end = data
    for entry in sorted(tensors, key=lambda entry: entry.offset):
        if entry.offset != end:
            fault = "an overlap" if entry.offset < end else "a hole"
            raise refusal(
                f"{where}: tensor {show(entry.name)}: data_offsets",
                f"{fault}: a tensor from {entry.offset - data:,}",
                f"from {end - data:,}, where the one before it ends",
            )
        end += entry.nbytes
    if end > size:
        raise refusal(where, f"{size:,} bytes (truncated)", f"{end:,}, as the header says")
    if end < size:
        raise refusal(where, f"{size - end:,} bytes after the last tensor", "none")
