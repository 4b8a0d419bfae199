"""Opening checkpoints: what is read, what is refused in which words, and what is left alone."""

from __future__ import annotations

import dataclasses
import errno
import json
import mmap
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file
from transformers import ViTConfig, ViTModel

from gauge import fastest, within
from vitrail.checkpoint.files import open_checkpoint
from vitrail.checkpoint.header import DTYPE_BITS, MAX_HEADER_BYTES, MAX_TENSORS, read_header
from vitrail.checkpoint.strict_json import MAX_DEPTH, MAX_JSON_BYTES, read_json
from vitrail.checkpoint.tensors import TensorEntry, TensorReader
from vitrail.errors import CheckpointError, InputError

CONFIG = {"model_type": "vit", "hidden_size": 8}


def tensor(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def packed(header: object, data: bytes = bytes(4), length: int | None = None) -> bytes:
    """A file in the layout of safetensors; ``header`` is JSON, as text, as bytes or as values."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def checkpoint_folder(path: Path, weights: str = "model.safetensors") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", CONFIG)
    write(path / weights, packed({"w": tensor()}, b"\1\2\3\4"))
    return path


def refused(call: Callable[[], object], *fragments: str) -> str:
    """The message of the CheckpointError ``call`` raises: one short line with the fragments."""
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    for fragment in fragments:
        assert fragment in message
    return message


def contents(tensors: dict[str, TensorEntry]) -> dict[str, bytes]:
    """Every tensor's bytes, through a TensorReader."""
    with TensorReader() as reader:
        out = {name: bytearray(entry.nbytes) for name, entry in tensors.items()}
        for name, entry in tensors.items():
            reader.read_into(entry, 0, memoryview(out[name]))
    return {name: bytes(data) for name, data in out.items()}


# -- headers that are read -------------------------------------------------------------------------


def test_a_file_written_out_in_hex_gives_the_names_shapes_offsets_and_bytes(tmp_path: Path) -> None:
    header = (
        b'{"__metadata__":{"format":"pt"},'
        b'"b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]},'
        b'"a.weight":{"shape":[2,1],"data_offsets":[0,8],"dtype":"F32"}}  '
    )
    assert len(header) == 0x97
    raw = bytes.fromhex("9700000000000000") + header
    raw += bytes.fromhex("0000803f000000c0803f 0040 4040")
    path = write(tmp_path / "x.safetensors", raw)
    tensors = read_header(path)
    assert [dataclasses.astuple(entry)[:6] for entry in tensors.values()] == [
        ("b", path, "BF16", (3,), 167, 6),
        ("a.weight", path, "F32", (2, 1), 159, 8),
    ]
    read = contents(tensors)
    assert struct.unpack("<2f", read["a.weight"]) == (1.0, -2.0)
    assert read["b"] == bytes.fromhex("803f00404040")


def test_files_of_the_safetensors_library_are_read_as_it_reads_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, 7, generator=generator)
    dtypes = [
        *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    ]
    saved = {f"t.{dtype}": values.abs().to(dtype) for dtype in dtypes}
    saved |= {"scalar": torch.tensor(2.5), "one": torch.ones(1, 1, 1), "名": torch.arange(3)}
    path = tmp_path / "x.safetensors"
    save_file(saved, path, metadata={"format": "pt", "note": 'a "quoted" {note}'})
    ours = read_header(path)
    read = contents(ours)
    theirs = dict(safetensors.deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
    assert ours.keys() == theirs.keys() == saved.keys()
    for name, entry in ours.items():
        assert entry.dtype == theirs[name]["dtype"]
        assert list(entry.shape) == theirs[name]["shape"] == list(saved[name].shape)
        assert read[name] == bytes(theirs[name]["data"])
        flat = saved[name].reshape(-1).view(torch.uint8)
        assert read[name] == flat.numpy().tobytes()


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_of_the_library_has_its_size(dtype: str, tmp_path: Path) -> None:
    size = DTYPE_BITS[dtype]  # bytes of eight elements
    raw = packed({"w": tensor(dtype, [8], [0, size])}, os.urandom(size))
    entry = read_header(write(tmp_path / "x.safetensors", raw))["w"]
    [(name, theirs)] = safetensors.deserialize(raw)  # type: ignore[no-untyped-call]
    assert (name, theirs["dtype"], theirs["shape"]) == ("w", entry.dtype, list(entry.shape))
    assert contents({"w": entry})["w"] == bytes(theirs["data"]) == raw[-size:]


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"w": tensor(shape=[2, 1, 1, 1, 1, 1, 1, 2])}, 4),
        ({"w": tensor("F32", [], [0, 4])}, 4),
        ({"n" * 512: tensor()}, 4),
        ({"vision model/a..b": tensor()}, 4),
        ({"__metadata__": {}, "w": tensor()}, 4),
        ({"b": tensor(shape=[1], offsets=[4, 5]), "a": tensor()}, 5),
        (json.dumps({"w": tensor()}) + " " * 5000, 4),
        ('{"\\u0077":{"dtype":"U8",\n"shape":[ 4 ],\t"data_offsets":[0,4]}}', 4),
    ],
    ids=["rank 8", "scalar", "long name", "odd name", "no metadata", "order", "padding", "escapes"],
)
def test_what_the_format_allows_is_read(header: object, size: int, tmp_path: Path) -> None:
    raw = packed(header, os.urandom(size))
    tensors = read_header(write(tmp_path / "x.safetensors", raw))
    theirs = dict(safetensors.deserialize(raw))  # type: ignore[no-untyped-call]
    assert contents(tensors) == {name: bytes(found["data"]) for name, found in theirs.items()}


def test_a_header_length_that_looks_like_the_start_of_a_pickle_is_a_length(tmp_path: Path) -> None:
    text = json.dumps({"w": tensor()})
    raw = packed(text + " " * (0x280 - len(text)))
    assert raw.startswith(b"\x80\x02")
    assert read_header(write(tmp_path / "x.safetensors", raw)).keys() == {"w"}


def test_as_many_tensors_as_are_allowed_cost_no_more_each_than_a_tenth_of_them(
    tmp_path: Path,
) -> None:
    paths = []
    for count in (MAX_TENSORS // 10, MAX_TENSORS):
        header = {f"layer.{i}.w": tensor(shape=[1], offsets=[i, i + 1]) for i in range(count)}
        paths.append(write(tmp_path / f"{count}.safetensors", packed(header, bytes(count))))
    few, many = paths
    tensors = read_header(many)
    assert len(tensors) == MAX_TENSORS
    assert tensors["layer.19999.w"].offset == many.stat().st_size - 1
    tenth, whole = fastest(lambda: read_header(few), lambda: read_header(many))
    assert whole < 20 * tenth


# -- headers that are refused ----------------------------------------------------------------------

GOOD = json.dumps({"w": tensor()})
MEGABYTE_NAME = "n" * 1_000_000
DEEP = '{"w":' + "[" * 100_000 + "]" * 100_000 + "}"


def two(first: Sequence[int], second: Sequence[int], sizes: Sequence[int] = (4, 4)) -> object:
    return {
        "first": tensor(shape=[sizes[0]], offsets=first),
        "second": tensor(shape=[sizes[1]], offsets=second),
    }


def zip_bytes() -> bytes:
    with tempfile.TemporaryFile() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", b"x" * 100)
        file.seek(0)
        return file.read()


def utf16(text: str, codec: str = "utf-16") -> bytes:
    return packed(text.encode(codec))


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "got a file of 0 bytes"),
    "seven bytes": (bytes(7), "got a file of 7 bytes"),
    "header length 0": (packed("", bytes(20)), "got a header length of 0"),
    "header length 2^64-1": (
        packed(GOOD, length=2**64 - 1),
        "got a header length of 18,446,744,073,709,551,615, wanted 2 to 16,777,216 bytes",
    ),
    "header length over 100 MB": (packed(GOOD, length=100_000_001), "header length of 100,000,001"),
    "header over the file's end": (packed(GOOD, length=70), "wanted at most the 64 bytes that"),
    "header cut in mid-JSON": (
        packed(GOOD[:30], bytes(50)),
        "at the end of the header, wanted '}'",
    ),
    "header cut after a brace": (packed('{"a":{}', bytes(50)), "not valid JSON: Expecting ','"),
    "not UTF-8": (packed(b'{"\xff":1}'), "not UTF-8 at byte 2"),
    "surrogates in UTF-8": (packed(b'{"\xed\xa0\x80":1}'), "not UTF-8 at byte 2"),
    "lone surrogate": (packed('{"\\ud800":1}'), "got half of a surrogate pair"),
    "byte order mark": (
        packed(b"\xef\xbb\xbf" + GOOD.encode()),
        "got b'\\xef' at byte 8",
    ),
    "UTF-16": (utf16(GOOD), "at byte 8, wanted the '{'"),
    "UTF-16 without a mark": (utf16(GOOD, "utf-16-le"), "at the end of the header"),
    "JSON array": (packed("[1, 2, 3]"), "got b'[' at byte 8, wanted the '{'"),
    "leading space": (packed(" " + GOOD), "at byte 8, wanted the '{'"),
    "leading newline": (packed("\n" + GOOD), "at byte 8, wanted the '{'"),
    "trailing newline": (packed(GOOD + "\n"), "at the end of the header, wanted '}', then spaces"),
    "trailing NUL": (packed(GOOD + "\0"), "at the end of the header, wanted '}', then spaces"),
    "two documents": (packed(GOOD + GOOD), "not valid JSON: Extra data"),
    "duplicate tensor name": (
        packed('{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},' + GOOD[1:]),
        "got the key 'w' 2 times, wanted each key once",
    ),
    "duplicate tensor name, escaped": (
        packed('{"\\u0077":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},' + GOOD[1:]),
        "got the key 'w' 2 times",
    ),
    "duplicate field": (
        packed('{"w":{"dtype":"F32","dtype":"U8","shape":[4],"data_offsets":[0,4]}}'),
        "got the key 'dtype' 2 times",
    ),
    "duplicate metadata key": (
        packed('{"__metadata__":{"a":"1","a":"2"},' + GOOD[1:]),
        "got the key 'a' 2 times",
    ),
    "duplicate metadata": (
        packed('{"__metadata__":{},"__metadata__":{},' + GOOD[1:]),
        "got the key '__metadata__' 2 times",
    ),
    "metadata null": (
        packed({"__metadata__": None, "w": tensor()}),
        "__metadata__: got None, wanted an object of strings",
    ),
    "metadata nested": (
        packed({"__metadata__": {"a": {"b": "c"}}, "w": tensor()}),
        "__metadata__: got {'a': {'b': 'c'}}, wanted an object of strings",
    ),
    "metadata number": (
        packed({"__metadata__": {"a": 1}, "w": tensor()}),
        "__metadata__: got {'a'",
    ),
    "no tensors": (packed("{}"), "got 0 tensors, wanted 1 to 20,000"),
    "unknown dtype": (
        packed({"w": tensor("F31")}),
        "tensor 'w': dtype: got 'F31', wanted one of F64",
    ),
    "lower-case dtype": (packed({"w": tensor("u8")}), "tensor 'w': dtype: got 'u8'"),
    "dtype list": (packed({"w": tensor(["U8"])}), "tensor 'w': dtype: got ['U8']"),
    "tensor not an object": (packed({"w": [4]}), "tensor 'w': got [4], wanted exactly the fields"),
    "missing field": (
        packed({"w": {"dtype": "U8", "shape": [4]}}),
        "tensor 'w': got ['dtype', 'shape'], wanted exactly the fields data_offsets, dtype, shape",
    ),
    "unknown field": (
        packed({"w": tensor() | {"strides": [1]}}),
        "tensor 'w': got ['data_offsets', 'dtype', 'shape', 'strides'], wanted exactly",
    ),
    "negative shape": (packed({"w": tensor(shape=[-4])}), "tensor 'w': shape: got [-4], wanted a"),
    "float shape": (packed({"w": tensor(shape=[4.0])}), "tensor 'w': shape: got [4.0]"),
    "string shape": (packed({"w": tensor(shape=["4"])}), "tensor 'w': shape: got ['4']"),
    "bool shape": (packed({"w": tensor(shape=[4, True])}), "tensor 'w': shape: got [4, True]"),
    "shape number": (packed({"w": tensor(shape=4)}), "tensor 'w': shape: got 4"),
    "minus zero": (
        packed('{"w":{"dtype":"U8","shape":[4],"data_offsets":[-0,4]}}'),
        "tensor 'w': data_offsets: got [-0.0, 4]",
    ),
    "shape product over 2^64": (
        packed({"w": tensor(shape=[2**32, 2**33])}),
        "tensor 'w': shape: got [4294967296, 8589934592], wanted fewer than 2^63 bytes",
    ),
    "shape product that wraps to 4": (
        packed({"w": tensor(shape=[4194305, 4194305, 211106198978564])}),
        "tensor 'w': shape: got [4194305, 4194305, 211106198978564], wanted fewer than 2^63 bytes",
    ),
    "zero times 2^63": (
        packed({"w": tensor(shape=[0, 2**63], offsets=[0, 0])}, b""),
        "tensor 'w': shape: got [0, 9223372036854775808], wanted no dimension of 0",
    ),
    "long integer": (packed({"w": tensor(shape=[10**40])}), "got an integer of 41 characters"),
    "rank 10,000": (
        packed({"w": tensor(shape=[1] * 10_000)}),
        "tensor 'w': shape: got 10,000 dimensions, wanted at most 8",
    ),
    "rank 9": (packed({"w": tensor(shape=[1] * 8 + [4])}), "tensor 'w': shape: got 9 dimensions"),
    "reversed offsets": (
        packed({"w": tensor(offsets=[4, 0])}),
        "tensor 'w': data_offsets: got [4, 0], wanted [begin, end] in this order",
    ),
    "three offsets": (packed({"w": tensor(offsets=[0, 4, 4])}), "data_offsets: got [0, 4, 4]"),
    "negative offset": (packed({"w": tensor(offsets=[-4, 0])}), "data_offsets: got [-4, 0]"),
    "float offset": (packed({"w": tensor(offsets=[0, 4.0])}), "data_offsets: got [0, 4.0]"),
    "hole at the start": (
        packed({"w": tensor(offsets=[4, 8])}, bytes(8)),
        "tensor 'w': data_offsets: got a hole: a tensor from 4, wanted from 0",
    ),
    "hole between": (
        packed(two([0, 4], [5, 9]), bytes(9)),
        "tensor 'second': data_offsets: got a hole: a tensor from 5, wanted from 4",
    ),
    "overlap": (
        packed(two([0, 4], [3, 7]), bytes(7)),
        "tensor 'second': data_offsets: got an overlap: a tensor from 3, wanted from 4",
    ),
    "same bytes twice": (packed(two([0, 4], [0, 4])), "data_offsets: got an overlap"),
    "zero-size tensor at a shared offset": (
        packed(two([0, 4], [4, 4], (4, 0))),
        "tensor 'second': shape: got [0], wanted no dimension of 0",
    ),
    "trailing zip": (
        packed(GOOD, bytes(4) + zip_bytes()),
        " bytes after the last tensor, wanted none",
    ),
    "trailing byte": (packed(GOOD, bytes(5)), "got 1 bytes after the last tensor, wanted none"),
    "truncated data": (packed(GOOD, bytes(3)), "got 71 bytes (truncated), wanted 72"),
    "no data": (packed(GOOD, b""), "got 68 bytes (truncated), wanted 72"),
    "size against shape and dtype": (
        packed({"w": tensor("F32", [2], [0, 4])}),
        "tensor 'w': data_offsets: got 4 bytes, wanted 8 for F32 [2]",
    ),
    "part of a byte": (
        packed({"w": tensor("F4", [3], [0, 1])}, b"\0"),
        "tensor 'w': shape: got [3] of F4, wanted a whole number of bytes",
    ),
    "name with ..": (
        packed({"../../etc/passwd": tensor()}),
        "got the tensor name '../../etc/passwd', wanted a name that is not a path",
    ),
    "name with .. within": (packed({"a/../b": tensor()}), "got the tensor name 'a/../b'"),
    "absolute name": (packed({"/etc/passwd": tensor()}), "wanted a name that is not a path"),
    "drive letter": (packed({"C:\\w": tensor()}), "wanted a name that is not a path"),
    "name with NUL": (
        packed({"a\0b": tensor()}),
        "got the tensor name 'a\\x00b', wanted printable characters",
    ),
    "name with a newline": (packed({"a\nb": tensor()}), "got the tensor name 'a\\nb', wanted"),
    "name turning right to left": (packed({"a\u202eb": tensor()}), "wanted printable characters"),
    "empty name": (packed({"": tensor()}), "got a tensor name of 0 bytes, wanted 1 to 512"),
    "name of 1 MB": (packed({MEGABYTE_NAME: tensor()}), "got a tensor name of 1,000,000 bytes"),
    "NaN": (packed('{"w":NaN}'), "got the number 'NaN', wanted finite numbers"),
    "infinity": (packed('{"w":-Infinity}'), "got the number '-Infinity', wanted finite"),
    "1e999": (packed('{"w":1e999}'), "got the number '1e999', wanted finite"),
    "depth 100,000": (packed(DEEP), "got JSON nested deeper than 64 levels, wanted at most 64"),
    "pickle": (
        pickle.dumps({"w": [1.0] * 100}),
        "got a Python pickle, wanted a safetensors file; nothing is ever unpickled",
    ),
    "old PyTorch file": (
        pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + bytes(100),
        "got a Python pickle",
    ),
    "zip": (zip_bytes(), "got a zip archive (PyTorch's pickled format), wanted a safetensors file"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "got an HDF5 file, wanted a safetensors file"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "got a git-lfs pointer (the weights were never fetched: git lfs pull)",
    ),
    "web page": (b"<!doctype html><html>" + bytes(40), "got a web page, wanted a safetensors file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_weight_file_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    content, fragment = BAD_FILES[name]
    path = write(tmp_path / "model.safetensors", content)
    with within(1.0):
        message = refused(lambda: read_header(path), fragment)
    assert message.startswith(str(path))
    write_json(tmp_path / "config.json", CONFIG)
    assert refused(lambda: open_checkpoint(tmp_path)) == message


def test_a_pickle_under_the_name_of_safetensors_runs_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    path = write(tmp_path / "model.safetensors", pickle.dumps(Trap()))
    refused(lambda: read_header(path), "got a Python pickle")
    assert not (tmp_path / "sprung").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "sprung").exists()


MEASURE = """
import sys, time
from pathlib import Path
from gauge import peak_kib
from vitrail.errors import CheckpointError
from vitrail.checkpoint.header import read_header
from vitrail.checkpoint.strict_json import read_json
read = read_json if sys.argv[1].endswith("json") else read_header
before, start, outcome = peak_kib(), time.thread_time(), "read"
try:
    read(Path(sys.argv[1]))
except CheckpointError as error:
    outcome = str(error)
print(time.thread_time() - start, (peak_kib() - before) / 1024, outcome)
"""


def measure(path: Path) -> tuple[float, float, str]:
    """Seconds, MiB of peak memory and outcome of reading ``path`` in a fresh process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEASURE, str(path)]
    output = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    seconds, mib, outcome = output.split(" ", 2)
    return float(seconds), float(mib), outcome.strip()


def tensors_text(count: int, field: str = "data_offsets") -> str:
    form = '"%d":{"dtype":"U8","shape":[0],"' + field + '":[0,0]}'
    return "{" + ",".join(form % i for i in range(count)) + "}"


COSTLY: dict[str, tuple[Callable[[], bytes], str, float]] = {
    "a million tensors": (
        lambda: packed(tensors_text(1_000_000)),
        "wanted 2 to 16,777,216 bytes",
        5,
    ),
    "tensors for 16 MiB": (
        lambda: packed(tensors_text(290_000)),
        "got 290,000 tensors, wanted at most 20,000",
        40,
    ),
    "escaped tensors for 16 MiB": (
        lambda: packed(tensors_text(230_000, "data_offset\\u0073")),
        "got JSON of too many values",
        40,
    ),
    "90 MB of metadata": (
        lambda: packed('{"__metadata__":{"a":"' + "x" * 90_000_000 + '"}}'),
        "wanted 2 to 16,777,216 bytes",
        5,
    ),
    "16 MiB of numbers": (
        lambda: packed('{"w":[' + "1," * 8_000_000 + "1]}"),
        "got JSON of too many values",
        50,
    ),
    "16 MiB of brackets": (lambda: packed('{"w":' + "[" * 16_000_000 + "}"), "too many", 50),
    "a number of 16 MB": (lambda: packed('{"w":' + "7" * 16_000_000 + "}"), "an integer of", 70),
    "escapes without end": (lambda: packed('{"w":"' + '\\"' * 490_000 + "}"), "not valid", 20),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_file_made_to_cost_time_or_memory_costs_little(name: str, tmp_path: Path) -> None:
    make, fragment, mib = COSTLY[name]
    took, grown, outcome = measure(write(tmp_path / "model.safetensors", make()))
    assert fragment in outcome
    assert took < 2
    assert grown < mib


@contextmanager
def special_file(kind: str, folder: Path) -> Iterator[Path]:
    path = folder / "model.safetensors"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a device":
        path = Path("/dev/zero")
    if kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            before = os.getcwd()
            os.chdir(folder)  # a socket's path is limited to 107 bytes
            server.bind(path.name)
            os.chdir(before)
            yield path
    else:
        yield path


@pytest.mark.parametrize("kind", ["a folder", "a FIFO", "a device", "a socket"])
@pytest.mark.parametrize("read", [read_header, read_json], ids=["header", "json"])
def test_what_is_not_a_regular_file_is_refused_at_once(
    kind: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    with special_file(kind, tmp_path) as path, within(1.0):
        refused(lambda: read(path), str(path), f"got {kind}, wanted a regular file")


def test_a_fifo_swapped_in_after_the_first_look_does_not_hang(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write(tmp_path / "model.safetensors", packed(GOOD))
    real = os.open

    def swap(name: Any, flags: int) -> int:
        path.unlink()
        os.mkfifo(path)
        return real(name, flags)

    monkeypatch.setattr(os, "open", swap)
    before = len(os.listdir("/proc/self/fd"))
    with within(1.0):
        refused(lambda: read_header(path), "got a FIFO, wanted a regular file")
    assert len(os.listdir("/proc/self/fd")) == before


@contextmanager
def without_rights(path: Path) -> Iterator[None]:
    """Nothing may read ``path``; the superuser, for whom that means little, becomes nobody."""
    mode = path.stat().st_mode
    path.chmod(0)
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)
        path.chmod(mode)


@pytest.mark.parametrize("denied", ["config.json", "model.safetensors", "."])
def test_permission_denied_is_the_reason_given(denied: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = checkpoint_folder(Path(name))
        folder.chmod(0o755)
        with without_rights(folder / denied):
            where = str(folder / denied)
            refused(lambda: open_checkpoint(folder), where, "cannot be read: Permission denied")
        assert open_checkpoint(folder).config == CONFIG


@pytest.mark.parametrize("fault", [errno.EIO, errno.ESTALE])
def test_a_disk_error_is_the_reason_given(
    fault: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = checkpoint_folder(tmp_path)

    def fail(*_: object) -> int:
        raise OSError(fault, os.strerror(fault))

    entry = read_header(folder / "model.safetensors")["w"]
    monkeypatch.setattr(os, "preadv", fail)
    reason = f"cannot be read: {os.strerror(fault)}"
    refused(lambda: read_header(folder / "model.safetensors"), "model.safetensors: ", reason)
    refused(lambda: read_json(folder / "config.json"), "config.json: ", reason)
    refused(lambda: contents({"w": entry}), "model.safetensors: ", reason)


# -- JSON ------------------------------------------------------------------------------------------

BAD_JSON: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON: Expecting value, at character 0"),
    "array": (b"[1]", "got a JSON list, wanted a JSON object"),
    "string": (b'"a"', "got a JSON str, wanted a JSON object"),
    "null": (b"null", "got a JSON NoneType, wanted a JSON object"),
    "byte order mark": (
        b"\xef\xbb\xbf{}",
        "got a byte order mark, wanted JSON in UTF-8 without one",
    ),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8 at byte 0"),
    "Latin-1": ('{"a": "é"}'.encode("latin-1"), "not UTF-8 at byte 7"),
    "duplicate key": (b'{"a": 1, "a": 1}', "got the key 'a' 2 times, wanted each key once"),
    "duplicate key within": (b'{"a": [{"b": 1, "c": 2, "b": 3}]}', "got the key 'b' 2 times"),
    "NaN": (b'{"a": NaN}', "got the number 'NaN', wanted finite numbers"),
    "Infinity": (b'{"a": [Infinity]}', "got the number 'Infinity'"),
    "-Infinity": (b'{"a": -Infinity}', "got the number '-Infinity'"),
    "1e999": (b'{"a": 1e999}', "got the number '1e999'"),
    "integer of 5,000 digits": (
        b'{"a": ' + b"9" * 5000 + b"}",
        "got an integer of 5000 characters",
    ),
    "lone surrogate": (
        b'{"a": "\\udc00"}',
        "got half of a surrogate pair, wanted whole characters",
    ),
    "comment": (b'{"a": 1} // one', "not valid JSON: Extra data, at character 9"),
    "trailing comma": (b'{"a": 1,}', "not valid JSON: "),
    "65 levels": (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "nested deeper than 64 levels"),
    "100,000 levels": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deeper than 64 levels"),
    "100,000 objects deep": (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "deeper than 64 levels"),
    "10 MB": (b'{"a": "' + b"x" * 10_000_000 + b'"}', "10,000,009 bytes, wanted at most 1,048,576"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    content, fragment = BAD_JSON[name]
    checkpoint_folder(tmp_path)
    for file in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        kept = (tmp_path / file).read_bytes() if (tmp_path / file).exists() else b"{}"
        path = write(tmp_path / file, content)
        with within(1.0):
            refused(lambda: open_checkpoint(tmp_path), f"{path}: ", fragment)
        path.write_bytes(kept)
    assert open_checkpoint(tmp_path).config == CONFIG


def test_good_json_is_read_to_the_letter(tmp_path: Path) -> None:
    text = '{"ü": ["\\ud83d\\ude00", "\\\\ud800", 1e-12, 1.5, -7, true, -0, 18446744073709551615]}'
    assert read_json(write(tmp_path / "a.json", text.encode())) == json.loads(text)
    text = '{"model_max_length": 1000000000000000019884624838656}'  # transformers: no limit
    assert read_json(write(tmp_path / "a.json", text.encode())) == json.loads(text)
    deep = '{"a": ' + "[" * (MAX_DEPTH - 1) + '"]]"' + "]" * (MAX_DEPTH - 1) + "}"
    assert read_json(write(tmp_path / "a.json", deep.encode())) == json.loads(deep)
    brackets = json.dumps({"a": "[" * 1000 + '"{' * 1000})
    assert read_json(write(tmp_path / "a.json", brackets.encode())) == json.loads(brackets)
    full = b'{"a": "' + b"x" * (MAX_JSON_BYTES - 9) + b'"}'
    assert len(read_json(write(tmp_path / "a.json", full))["a"]) == MAX_JSON_BYTES - 9


def test_depth_is_refused_whatever_the_recursion_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", b'{"a": ' + b"[" * 400_000 + b"]" * 400_000 + b"}")
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000_000)
    try:
        refused(lambda: read_json(path), "nested deeper than 64 levels")
    finally:
        sys.setrecursionlimit(before)


def test_json_of_many_values_costs_little(tmp_path: Path) -> None:
    text = b'{"a": [' + b"[]," * 349_000 + b"[]]}"
    took, grown, outcome = measure(write(tmp_path / "a.json", text))
    assert "got JSON of too many values" in outcome
    assert took < 0.2
    assert grown < 20


# -- choosing the weights --------------------------------------------------------------------------

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        ([SINGLE], SINGLE),
        ([SINGLE, "model.fp16.safetensors", "pytorch_model.bin", "tf_model.h5"], SINGLE),
        ([SINGLE, INDEX, "model-00001-of-00001.safetensors"], SINGLE),
        ([INDEX, "model-00001-of-00001.safetensors", "model.fp16.safetensors"], "model-00001-of-0"),
        (["open_clip_model.safetensors", "open_clip_pytorch_model.bin"], "open_clip_model"),
    ],
    ids=["single", "among variants", "single and shards", "shards and variant", "one other"],
)
def test_the_weights_are_chosen_by_name(present: list[str], chosen: str, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", CONFIG)
    for name in present:
        write(tmp_path / name, packed({"w": tensor()}))
    if INDEX in present:
        weight_map = {"w": "model-00001-of-00001.safetensors"}
        write_json(tmp_path / INDEX, {"metadata": {"total_size": -1}, "weight_map": weight_map})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors["w"].file.name.startswith(chosen)
    assert (checkpoint.folder, checkpoint.revision) == (tmp_path, None)


@pytest.mark.parametrize(
    ("present", "fragments"),
    [
        ([], ["got no weights, wanted model.safetensors, model.safetensors.index.json or one"]),
        (
            ["model.fp16.safetensors", "model.bf16.safetensors"],
            ["got model.bf16.safetensors, model.fp16.safetensors and no model.safetensors"],
        ),
        (
            ["pytorch_model.bin", "training_args.bin"],
            [
                "got pytorch_model.bin, training_args.bin only",
                "safe_serialization=True",
                "never read",
            ],
        ),
        (["model.pt"], ["got model.pt only", "never read"]),
        (["model.pth", "README.md"], ["got model.pth only", "never read"]),
        (["flax_model.msgpack"], ["got flax_model.msgpack only", "never read"]),
        (["tf_model.h5"], ["got tf_model.h5 only", "never read"]),
    ],
    ids=["none", "two variants", "bin", "pt", "pth", "msgpack", "h5"],
)
def test_weights_that_cannot_be_chosen_are_named(
    present: list[str], fragments: list[str], tmp_path: Path
) -> None:
    write_json(tmp_path / "config.json", CONFIG)
    for name in present:
        write(tmp_path / name, pickle.dumps("never read"))
    refused(lambda: open_checkpoint(tmp_path), f"{tmp_path}: ", *fragments)


def test_one_file_can_be_opened_by_its_path(tmp_path: Path) -> None:
    checkpoint_folder(tmp_path)
    path = write(tmp_path / "model.fp16.safetensors", packed({"half": tensor("F16", [2])}))
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.tensors.keys() == {"half"}
    assert (checkpoint.folder, checkpoint.source) == (tmp_path, str(path))
    assert checkpoint.config == CONFIG


@pytest.mark.parametrize(
    ("typed", "fragments"),
    [
        (
            "missing",
            ["'missing': got no such folder or file, wanted an existing checkpoint folder"],
        ),
        ("./a/b", ["'./a/b': got no such folder or file", '"org/name"']),
        ("a/b/c", ["'a/b/c': got no such folder or file"]),
        ("/no/such/folder", ["'/no/such/folder': got no such folder or file"]),
        ("google/..", ["'google/..': got no such folder or file"]),
        ("a--b/c", ["'a--b/c': got no such folder or file"]),
        ("nul\0/b", ["'nul\\x00/b': got no such folder or file"]),
        ("new\nline/b", ["'new\\nline/b': got no such folder or file"]),
        ("n" * 5000, ["cannot be read: File name too long"]),
        ("plain.txt", ["plain.txt: got a file, wanted a checkpoint folder or a .safetensors file"]),
        ("weights.bin", ["weights.bin: got a file", "pickles and the like are never read"]),
        ("plain.txt/a/b", ["'plain.txt/a/b': got no such folder or file"]),
        ("empty", ["empty: got no config.json, wanted a checkpoint folder"]),
        ("loose.safetensors", ["got no config.json"]),
    ],
)
def test_a_wrong_path_is_called_that_and_the_network_is_left_alone(
    typed: str, fragments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # an import of it fails
    for name in ("plain.txt", "weights.bin"):
        write(tmp_path / name, b"text")
    write(tmp_path / "loose.safetensors", packed(GOOD))
    (tmp_path / "empty").mkdir()
    refused(lambda: open_checkpoint(typed), *fragments)


def test_a_path_object_is_never_taken_for_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(lambda: open_checkpoint(Path("org/name")), "'org/name': got no such folder or file")
    refused(lambda: open_checkpoint("org/name"), "org/name: a hub id needs huggingface_hub: pip")


@pytest.mark.parametrize("value", [7, None, b"folder", "", ["a"]])
def test_an_argument_of_another_kind_is_an_input_error(value: Any) -> None:
    with pytest.raises(InputError, match=r"path_or_id: got .+, wanted a path or a hub id"):
        open_checkpoint(value)


def test_a_revision_means_nothing_to_a_local_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="revision: got 'main' for the local"):
        open_checkpoint(checkpoint_folder(tmp_path), revision="main")


NO_NETWORK = """
import os, socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("a local folder asked for the network")
socket.socket = socket.create_connection = socket.getaddrinfo = refuse
from vitrail.checkpoint.files import open_checkpoint
from vitrail.checkpoint.tensors import TensorReader
checkpoint = open_checkpoint(sys.argv[1])
with TensorReader() as reader:
    for entry in checkpoint.tensors.values():
        reader.read_into(entry, 0, memoryview(bytearray(entry.nbytes)))
heavy = {"huggingface_hub", "torch", "numpy", "safetensors", "pickle"} & set(sys.modules)
assert not heavy, heavy
print(len(checkpoint.tensors))
"""


@pytest.mark.parametrize("name", ["folder", "org/name"])
def test_a_local_folder_touches_no_network_and_imports_nothing_heavy(
    name: str, tmp_path: Path
) -> None:
    checkpoint_folder(tmp_path / name)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("HF_HUB_OFFLINE", None)
    for typed in (name, f"./{name}/model.safetensors", str(tmp_path / name)):
        done = subprocess.run(
            [sys.executable, "-c", NO_NETWORK, typed],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


# -- the other files of a folder -------------------------------------------------------------------


def test_configurations_that_are_absent_are_none(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_folder(tmp_path))
    assert checkpoint.preprocessor is None
    assert checkpoint.tokenizer_config is None
    assert checkpoint.file("tokenizer.json") is None


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ({"size": 1}, None, {"size": 1}),
        (None, {"image_processor": {"size": 2}}, {"size": 2}),
        ({"size": 1}, {"image_processor": {"size": 2}}, {"size": 2}),
        ({"size": 1}, {"processor_class": "CLIPProcessor"}, {"size": 1}),
        (None, {"processor_class": "CLIPProcessor"}, None),
        ({"size": 1}, {"image_processor": None}, {"size": 1}),
    ],
    ids=["old", "nested", "nested wins", "not nested", "neither", "null"],
)
def test_the_image_processor_is_found_where_transformers_finds_it(
    old: object, new: object, wanted: object, tmp_path: Path
) -> None:
    folder = checkpoint_folder(tmp_path)
    if old is not None:
        write_json(folder / "preprocessor_config.json", old)
    if new is not None:
        write_json(folder / "processor_config.json", new)
    assert open_checkpoint(folder).preprocessor == wanted


def test_an_image_processor_that_is_no_object_is_refused(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path)
    write_json(folder / "processor_config.json", {"image_processor": [1, 2]})
    refused(
        lambda: open_checkpoint(folder),
        "processor_config.json: image_processor: got [1, 2], wanted an object",
    )


def test_extra_files_are_found_inside_the_folder_only(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path / "folder")
    write(folder / "vocab.json", b"{}")
    write_json(folder / "tokenizer_config.json", {"model_max_length": 77})
    write(tmp_path / "secret", b"x")
    os.symlink(tmp_path / "secret", folder / "merges.txt")
    os.mkfifo(folder / "tokenizer.json")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tokenizer_config == {"model_max_length": 77}
    assert checkpoint.file("vocab.json") == folder / "vocab.json"
    refused(lambda: checkpoint.file("merges.txt"), "merges.txt: got a symlink to ", "secret")
    refused(lambda: checkpoint.file("tokenizer.json"), "got a FIFO, wanted a regular file")


# -- shards ----------------------------------------------------------------------------------------


def sharded(folder: Path, shards: dict[str, dict[str, int]], index: object = None) -> Path:
    """Shards of U8 tensors, {shard: {tensor: bytes}}, and their index or another."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", CONFIG)
    for shard, sizes in shards.items():
        header, end = {}, 0
        for name, size in sizes.items():
            header[name] = tensor(shape=[size], offsets=[end, end + size])
            end += size
        write(folder / shard, packed(header, os.urandom(end)))
    whole = {name: shard for shard, sizes in shards.items() for name in sizes}
    write_json(folder / INDEX, {"weight_map": whole} if index is None else index)
    return folder


A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {A: {"a": 3, "b": 5}, B: {"c": 2}}


def test_shards_saved_by_transformers_hold_what_its_single_file_holds(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
    )
    model = ViTModel(config).bfloat16()
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    model.save_pretrained(tmp_path / "single")
    shards, single = open_checkpoint(tmp_path / "shards"), open_checkpoint(tmp_path / "single")
    assert len({entry.file for entry in shards.tensors.values()}) > 2
    assert len(single.tensors) == len(model.state_dict())
    assert contents(shards.tensors) == contents(single.tensors)
    facts = {name: (entry.dtype, entry.shape) for name, entry in single.tensors.items()}
    assert facts == {n: (entry.dtype, entry.shape) for n, entry in shards.tensors.items()}
    saved = set(contents(single.tensors).values())
    state = model.state_dict().values()
    assert saved == {value.reshape(-1).view(torch.uint8).numpy().tobytes() for value in state}
    assert {entry.dtype for entry in shards.tensors.values()} == {"BF16"}


def test_the_total_size_an_index_claims_is_not_believed(tmp_path: Path) -> None:
    weight_map = {"a": A, "b": A, "c": B}
    index = {"metadata": {"total_size": 10**18, "x": None}, "weight_map": weight_map}
    checkpoint = open_checkpoint(sharded(tmp_path, SHARDS, index))
    assert {name: entry.nbytes for name, entry in checkpoint.tensors.items()} == {
        "a": 3,
        "b": 5,
        "c": 2,
    }


@pytest.mark.parametrize(
    "name",
    [
        *("../outside.safetensors", "/etc/outside.safetensors", "sub/x.safetensors"),
        *("a\\x.safetensors", "..", ".hidden.safetensors", "pytorch_model.bin", ""),
        *("a\0.safetensors", 7, None, ["a"]),
    ],
)
def test_an_index_names_plain_files_of_the_folder_only(name: object, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "folder", SHARDS, {"weight_map": {"a": name, "b": A, "c": B}})
    write(tmp_path / "outside.safetensors", packed({"a": tensor()}))
    refused(
        lambda: open_checkpoint(folder),
        f"{INDEX}: weight_map: 'a': got {name!r}, wanted the plain name of a .safetensors file",
    )


@pytest.mark.parametrize(
    ("index", "fragment"),
    [
        (
            {"weight_map": {"a": A, "b": A, "c": B, "d": "model-3.safetensors"}},
            f"{INDEX}: got the shard 'model-3.safetensors', which is not there, wanted every shard",
        ),
        (
            {"weight_map": {"a": A, "c": B}},
            f"{A}: got the tensor 'b', which the index lists nowhere, wanted each tensor in the",
        ),
        (
            {"weight_map": {"a": A, "b": B, "c": B}},
            f"{A}: got the tensor 'b', which the index lists in '{B}', wanted each tensor",
        ),
        (
            {"weight_map": {"a": A, "b": A, "c": B, "d": B}},
            f"{INDEX}: got 1 listed tensors in no shard, first 'd' ('{B}')",
        ),
        ({"weight_map": {}}, "weight_map: got {}, wanted an object of 1 to 20,000 shard names"),
        ({"weight_map": [A, B]}, "weight_map: got ['model-00001"),
        ({"metadata": {}}, "weight_map: got None, wanted an object"),
        (
            {"weight_map": {str(i): f"{i}.safetensors" for i in range(257)}},
            "weight_map: got 257 shards, wanted at most 256",
        ),
        (
            {"weight_map": dict.fromkeys(map(str, range(20_001)), A)},
            "wanted an object of 1 to 20,000 shard names",
        ),
    ],
    ids=[
        *("missing shard", "not listed", "listed elsewhere", "in no shard", "empty", "list"),
        *("absent", "257 shards", "20,001 tensors"),
    ],
)
def test_index_and_shards_that_disagree_are_refused(
    index: object, fragment: str, tmp_path: Path
) -> None:
    refused(lambda: open_checkpoint(sharded(tmp_path, SHARDS, index)), fragment)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {A: {"a": 3, "b": 5}, B: {"c": 2, "a": 3}})
    refused(
        lambda: open_checkpoint(folder),
        f"{A}: got the tensor 'a', which the index lists in '{B}', wanted each tensor in the shard",
    )


def test_an_index_may_be_larger_than_a_configuration_but_not_endless(tmp_path: Path) -> None:
    names = {f"{i:05d}." + "n" * 100: 1 for i in range(10_000)}
    folder = sharded(tmp_path, {A: names})
    assert (folder / INDEX).stat().st_size > MAX_JSON_BYTES
    assert len(open_checkpoint(folder).tensors) == 10_000
    with (folder / INDEX).open("ab") as file:
        file.truncate(MAX_HEADER_BYTES + 1)
    refused(lambda: open_checkpoint(folder), f"{INDEX}: got 16,777,217 bytes, wanted at most")


# -- symlinks --------------------------------------------------------------------------------------

BLOB = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS_BLOB = "0123456789abcdef" * 4
COMMIT = "c" * 40


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("link", ["../outside", "absolute"])
def test_a_symlink_out_of_the_folder_is_refused(file: str, link: str, tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path / "folder")
    outside = tmp_path / "outside"
    (folder / file).rename(outside)
    os.symlink(outside if link == "absolute" else link, folder / file)
    refused(
        lambda: open_checkpoint(folder),
        f"{folder / file}: got a symlink to ",
        "outside', wanted a file inside the checkpoint folder",
    )


def test_a_symlink_out_of_the_folder_is_refused_for_shards_and_single_paths(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "folder", SHARDS)
    (folder / B).rename(tmp_path / B)
    os.symlink(tmp_path / B, folder / B)
    for path in (folder, folder / B):
        refused(lambda: open_checkpoint(path), f"{folder / B}: got a symlink to ")  # noqa: B023


def test_symlinks_that_stay_within_and_a_linked_folder_are_followed(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path / "real")
    (folder / "sub").mkdir()
    (folder / "model.safetensors").rename(folder / "sub" / "w")
    os.symlink("sub/w", folder / "model.safetensors")
    os.symlink(folder, tmp_path / "linked")
    checkpoint = open_checkpoint(tmp_path / "linked")
    assert contents(checkpoint.tensors) == {"w": b"\1\2\3\4"}


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_dangling_and_circular_symlinks_say_so(file: str, tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path)
    (folder / file).unlink()
    os.symlink("nowhere", folder / file)
    refused(lambda: open_checkpoint(folder), f"{file}: cannot be read: No such file or directory")
    (folder / file).unlink()
    os.symlink(file, folder / file)
    refused(lambda: open_checkpoint(folder), f"{file}: cannot be read: Too many levels of symbolic")


def hub_cache(
    cache: Path, files: dict[str, bytes], repo: str = "org/name", commit: str = COMMIT
) -> Path:
    """A repository in the hub's cache: refs, blobs, a snapshot of relative symlinks."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for folder in ("refs", "blobs"):
        (root / folder).mkdir()
    (root / "refs" / "main").write_text(commit)
    for number, (name, content) in enumerate(files.items()):
        blob = (
            f"{number:02d}{BLOB[2:]}"
            if name.endswith(".json")
            else f"{number:02d}{WEIGHTS_BLOB[2:]}"
        )
        write(root / "blobs" / blob, content)
        os.symlink(f"../../blobs/{blob}", snapshot / name)
    return snapshot


HUB_FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": packed({"w": tensor()}, b"\1\2\3\4"),
    "preprocessor_config.json": b'{"size": 224}',
}


def test_a_snapshot_of_the_hub_cache_can_be_opened_as_a_folder(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(hub_cache(tmp_path, HUB_FILES))
    assert contents(checkpoint.tensors) == {"w": b"\1\2\3\4"}
    assert checkpoint.preprocessor == {"size": 224}
    assert checkpoint.revision is None


def test_blobs_that_repositories_share_are_followed(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, HUB_FILES)
    blob = Path(os.path.realpath(snapshot / "model.safetensors"))
    shared = tmp_path / "blobs" / WEIGHTS_BLOB[:2] / WEIGHTS_BLOB
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    os.symlink(os.path.relpath(shared, blob.parent), blob)
    assert contents(open_checkpoint(snapshot).tensors) == {"w": b"\1\2\3\4"}


@pytest.mark.parametrize(
    "target", ["../../blobs/passwd", "../../refs/main", "../../../other/blobs/x"]
)
def test_a_snapshot_may_link_to_blobs_and_nothing_else(target: str, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, HUB_FILES)
    aim = snapshot / target
    Path(os.path.normpath(aim)).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(snapshot / "model.safetensors", os.path.normpath(aim))
    (snapshot / "model.safetensors").unlink()
    os.symlink(target, snapshot / "model.safetensors")
    refused(lambda: open_checkpoint(snapshot), "model.safetensors: got a symlink to ")


def test_snapshots_and_blobs_outside_a_hub_cache_mean_nothing(tmp_path: Path) -> None:
    repository = hub_cache(tmp_path, HUB_FILES).parents[1].rename(tmp_path / "download")
    snapshot = repository / "snapshots" / COMMIT
    refused(lambda: open_checkpoint(snapshot), "config.json: got a symlink to ")


def test_blobs_that_are_themselves_a_link_out_of_the_cache_are_refused(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path / "cache", HUB_FILES)
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", blobs)
    refused(lambda: open_checkpoint(snapshot), "config.json: got a symlink to ")


# -- reading tensors -------------------------------------------------------------------------------


def one_tensor(folder: Path, size: int = 1000) -> tuple[TensorEntry, bytes]:
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tobytes()
    header = {"first": tensor(shape=[7], offsets=[0, 7]), "w": tensor("U8", [size], [7, 7 + size])}
    path = write(folder / "model.safetensors", packed(header, bytes(7) + data))
    return read_header(path)["w"], data


@pytest.mark.parametrize("most", [1, 3, 999])
def test_short_reads_are_continued(
    most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entry, data = one_tensor(tmp_path)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:most]], at))
    assert contents({"w": entry}) == {"w": data}
    assert read_header(entry.file)["w"] == entry


def test_a_range_lands_where_it_is_wanted_and_nowhere_else(tmp_path: Path) -> None:
    entry, data = one_tensor(tmp_path)
    out = bytearray(b"\xaa" * 100)
    with TensorReader() as reader:
        reader.read_into(entry, 990, memoryview(out)[40:50])
        assert out == b"\xaa" * 40 + data[990:] + b"\xaa" * 50
        values = np.zeros((5, 10), dtype=np.float32)
        reader.read_into(entry, 4, values.data)
        assert values.tobytes() == data[4:204]
        reader.read_into(entry, 1000, memoryview(bytearray()))


@pytest.mark.parametrize(
    ("start", "out", "message"),
    [
        (-1, bytearray(1), "got bytes -1 to 0, wanted a range within its 1000"),
        (991, bytearray(10), "got bytes 991 to 1001, wanted a range within its 1000"),
        (1001, bytearray(), "got bytes 1001 to 1001, wanted a range within"),
        (0, bytes(10), "read-only or strided"),
        (0, memoryview(bytearray(10))[::2], "read-only or strided"),
    ],
    ids=["before", "past", "past by nothing", "read-only", "strided"],
)
def test_a_wrong_range_or_buffer_is_an_input_error(
    start: int, out: bytes | bytearray | memoryview, message: str, tmp_path: Path
) -> None:
    entry, _ = one_tensor(tmp_path)
    with TensorReader() as reader, pytest.raises(InputError, match=message):
        reader.read_into(entry, start, memoryview(out))


def descriptors() -> set[str]:
    return {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}


def test_a_file_is_opened_once_and_closed_with_the_reader(tmp_path: Path) -> None:
    entry, _ = one_tensor(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    with TensorReader() as reader:
        assert str(entry.file) not in descriptors()
        for start in range(50):
            reader.read_into(entry, start, memoryview(bytearray(10)))
        assert str(entry.file) in descriptors()
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before
    reader.close()
    with pytest.raises(InputError, match="got a read after close"):
        reader.read_into(entry, 0, memoryview(bytearray(1)))


def test_nothing_is_mapped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry, data = one_tensor(tmp_path, 1 << 20)
    monkeypatch.setattr(mmap, "mmap", None)
    with TensorReader() as reader:
        out = bytearray(entry.nbytes)
        reader.read_into(entry, 0, memoryview(out))
        assert str(entry.file) not in Path("/proc/self/maps").read_text()
    assert out == data


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 500)


def replace(path: Path) -> None:
    copy = path.with_suffix(".new")
    shutil.copy2(path, copy)
    os.replace(copy, path)


def overwrite(path: Path) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


CHANGES: dict[Callable[[Path], None], str] = {
    truncate: "was truncated while loading",
    replace: "was changed or replaced while loading",
    overwrite: "was changed or replaced while loading",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_file_that_changed_since_its_header_was_read_is_refused(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    entry, _ = one_tensor(tmp_path)
    change(entry.file)
    refused(lambda: contents({"w": entry}), f"{entry.file}: {CHANGES[change]}; load it again")


@pytest.mark.parametrize("change", [truncate, overwrite], ids=lambda change: change.__name__)
def test_a_file_that_changes_between_two_reads_or_during_one_is_refused(
    change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entry, data = one_tensor(tmp_path)
    with TensorReader() as reader:
        out = bytearray(100)
        reader.read_into(entry, 0, memoryview(out))
        assert out == data[:100]
        change(entry.file)
        refused(lambda: reader.read_into(entry, 0, memoryview(out)), CHANGES[change])

    entry, data = one_tensor(tmp_path)
    real = os.preadv

    def read_then_change(fd: int, views: list[memoryview], at: int) -> int:
        count = real(fd, [views[0][:50]], at)
        monkeypatch.setattr(os, "preadv", real)
        change(entry.file)
        return count

    with TensorReader() as reader:
        monkeypatch.setattr(os, "preadv", read_then_change)
        refused(lambda: reader.read_into(entry, 0, memoryview(out)), CHANGES[change])


def test_a_file_that_ends_early_is_an_error_and_not_a_signal(tmp_path: Path) -> None:
    entry, _ = one_tensor(tmp_path)
    unstamped = dataclasses.replace(entry, stamp=None)
    truncate(entry.file)
    message = refused(lambda: contents({"w": unstamped}), "was truncated while loading, at byte ")
    assert message.endswith(str(entry.file.stat().st_size))


def test_a_file_that_vanished_is_an_error(tmp_path: Path) -> None:
    entry, _ = one_tensor(tmp_path)
    entry.file.unlink()
    refused(lambda: contents({"w": entry}), "cannot be read: No such file or directory")


def test_threads_share_a_reader_and_get_the_bytes_they_asked_for(tmp_path: Path) -> None:
    entry, data = one_tensor(tmp_path, 100_000)
    wrong: list[int] = []
    start = threading.Barrier(32)

    def read(reader: TensorReader, number: int) -> None:
        starts = np.random.default_rng(number).integers(0, 99_000, 100).tolist()
        start.wait()
        for at in starts:
            out = bytearray(1000)
            reader.read_into(entry, at, memoryview(out))
            if out != data[at : at + 1000]:
                wrong.append(at)

    before = len(os.listdir("/proc/self/fd"))
    with TensorReader() as reader:
        threads = [threading.Thread(target=read, args=(reader, number)) for number in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert wrong == []
