"""The header of a safetensors file is read to the byte, or refused with its reason."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from checkpoint.samples import (
    CONFIG,
    DEEP,
    GOOD,
    contents,
    measure,
    packed,
    refused,
    tensor,
    two,
    write,
    write_json,
)
from gauge import fastest, within
from vitrail.checkpoint.files import open_checkpoint
from vitrail.checkpoint.header import DTYPE_BITS, MAX_TENSORS, read_header


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


@pytest.mark.machine
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


MEGABYTE_NAME = "n" * 1_000_000


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


@pytest.mark.machine
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


@pytest.mark.machine
@pytest.mark.parametrize("name", COSTLY)
def test_a_file_made_to_cost_time_or_memory_costs_little(name: str, tmp_path: Path) -> None:
    make, fragment, mib = COSTLY[name]
    took, grown, outcome = measure(write(tmp_path / "model.safetensors", make()))
    assert fragment in outcome
    assert took < 2
    assert grown < mib
