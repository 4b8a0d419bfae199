"""Structure-aware fuzzing of the safetensors header reader.

A case starts as a valid small file, kept as a tree, and one to three mutations are applied to its
JSON, its length field, its padding or its data. Each case must be read or refused with a
CheckpointError of a known kind within a second; what is read must be what the safetensors library
reads. The cases run in a worker process, which the alarm signal kills where it hangs.

    python tests/fuzz_headers.py --cases 150000 --seed 0
    python tests/fuzz_headers.py --seed 0 --only 4711      # writes one case's bytes to stdout
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import safetensors

from gauge import peak_kib
from vitrail.checkpoint.header import DTYPE_BITS, MAX_HEADER_BYTES, MAX_TENSORS, read_header
from vitrail.checkpoint.strict_json import MAX_DEPTH, MAX_STRUCTURE
from vitrail.checkpoint.tensors import TensorEntry
from vitrail.errors import CheckpointError

CASE_SECONDS, HANG_SECONDS = 1.0, 30.0
PROGRESS = "progress"
FULL_RUN, FULL_HITS = 150_000, 100
MAX_MESSAGE = 400

# Every refusal that a regular file can meet in read_header; a message that fits none is a failure.
BRANCHES = {
    "too short": r"got a file of \d bytes",
    "foreign format": r"got (a|an) (zip|Python|HDF5|git-lfs|web) .+; nothing is ever unpickled",
    "length out of bounds": r"got a header length of [\d,]+, wanted 2 to 16,777,216 bytes",
    "length past the end": r"got a header length of [\d,]+, wanted at most the [\d,]+ bytes",
    "no opening brace": r"got .+ at byte 8, wanted the '\{'",
    "bad padding": r"got .+ at the end of the header",
    "tensors claimed": r"got [\d,]+ tensors, wanted at most 20,000",
    "tensors counted": r"got [\d,]+ tensors, wanted 1 to 20,000",
    "too many values": r"got JSON of too many values",
    "too deep": r"got JSON nested deeper than 64 levels",
    "duplicate key": r"got the key .+ \d+ times",
    "long integer": r"got an integer of \d+ characters",
    "not finite": r"got the number .+, wanted finite",
    "not JSON": r"not valid JSON: .+, at character \d+",
    "not UTF-8": r"not UTF-8 at byte \d+",
    "surrogate": r"got half of a surrogate pair",
    "metadata": r"__metadata__: got .+, wanted an object of strings",
    "name length": r"got a tensor name of [\d,]+ bytes",
    "name characters": r"got the tensor name .+, wanted printable",
    "name as a path": r"got the tensor name .+, wanted a name that is not a path",
    "fields": r"tensor .+: got .+, wanted exactly the fields",
    "dtype": r"tensor .+: dtype: got .+, wanted one of",
    "shape not counts": r"tensor .+: shape: got .+, wanted a list of integers",
    "rank": r"tensor .+: shape: got [\d,]+ dimensions",
    "zero-size": r"tensor .+: shape: got .+, wanted no dimension of 0",
    "overflow": r"tensor .+: shape: got .+, wanted fewer than 2\^63 bytes",
    "part of a byte": r"tensor .+: shape: got .+, wanted a whole number of bytes",
    "offsets not counts": r"tensor .+: data_offsets: got .+, wanted a list of integers",
    "offsets not a range": r"tensor .+: data_offsets: got .+, wanted \[begin, end\]",
    "size": r"tensor .+: data_offsets: got [\d,]+ bytes, wanted [\d,]+ for",
    "hole": r"tensor .+: data_offsets: got a hole",
    "overlap": r"tensor .+: data_offsets: got an overlap",
    "truncated": r"got [\d,]+ bytes \(truncated\)",
    "trailing bytes": r"got [\d,]+ bytes after the last tensor",
}
_BRANCHES = {name: re.compile(pattern) for name, pattern in BRANCHES.items()}


class Raw(str):
    """JSON text to be written as it stands."""


class Pairs(list[Any]):
    """A JSON object as [key, value] lists, so that keys can repeat and order is kept."""

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return next(value for name, value in self if name == key)
        return super().__getitem__(key)

    def put(self, key: str, value: Any) -> None:
        for pair in self:
            if pair[0] == key:
                pair[1] = value
                return
        self.append([key, value])


@dataclass
class Case:
    """A safetensors file before it is bytes."""

    tensors: Pairs
    data: bytes
    padding: bytes = b""
    lead: bytes = b""
    blank: str = ""
    length: int | None = None
    edits: list[Callable[[bytes], bytes]] = field(default_factory=list)
    file_edits: list[Callable[[bytes], bytes]] = field(default_factory=list)

    def render(self) -> bytes:
        header = self.lead + dump(self.tensors, self.blank).encode("utf-8", "surrogatepass")
        header += self.padding
        for edit in self.edits:
            header = edit(header)
        length = len(header) if self.length is None else self.length
        whole = struct.pack("<Q", length % (1 << 64)) + header + self.data
        for edit in self.file_edits:
            whole = edit(whole)
        return whole


def dump(node: Any, blank: str) -> str:
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, Pairs):
        items = [f"{dump(key, '')}{blank}:{blank}{dump(value, blank)}" for key, value in node]
        return f"{{{blank}{(',' + blank).join(items)}{blank}}}"
    if isinstance(node, list):
        return f"[{(',' + blank).join([dump(item, blank) for item in node])}]"
    return json.dumps(node, ensure_ascii=False)


NAMES = (
    "embed.weight",
    "blocks.0.qkv.bias",
    "norm",
    "p",
    "vision model/proj",
    "größe",
    "层.0",
    "a..b",
)


def valid_case(rng: random.Random) -> Case:
    """One to six tensors of any dtype, in any order, with or without metadata and padding."""
    tensors, position = Pairs(), 0
    for name in rng.sample(NAMES, rng.randint(1, 6)):
        dtype = rng.choice(tuple(DTYPE_BITS))
        shape = [rng.randint(1, 5) for _ in range(rng.randint(0, 3))]
        if DTYPE_BITS[dtype] < 8:
            shape.append(8)
        size = DTYPE_BITS[dtype] // 8
        bits = DTYPE_BITS[dtype]
        for side in shape:
            bits *= side
        size = bits // 8
        offsets = [position, position + size]
        tensors.append(
            [name, Pairs([["dtype", dtype], ["shape", shape], ["data_offsets", offsets]])]
        )
        position += size
    if rng.random() < 0.3:
        rng.shuffle(tensors)
    if rng.random() < 0.3:
        tensors.insert(0, ["__metadata__", Pairs([["format", "pt"]])])
    padding = b" " * rng.choice((0, 0, 1, 7))
    return Case(tensors, rng.randbytes(position), padding)


def entries(case: Case) -> list[Any]:
    return [
        pair for pair in case.tensors if pair[0] != "__metadata__" and isinstance(pair[1], Pairs)
    ]


def one(rng: random.Random, case: Case) -> Pairs:
    """The fields of one tensor, all three of them present; a fresh tensor if none is left so."""
    whole = [v for _, v in entries(case) if {"dtype", "shape", "data_offsets"} <= {k for k, _ in v}]
    whole = [v for v in whole if isinstance(v["shape"], list) and is_range(v["data_offsets"])]
    if whole:
        chosen: Pairs = rng.choice(whole)
        return chosen
    fresh = Pairs([["dtype", "U8"], ["shape", [4]], ["data_offsets", [0, 4]]])
    case.tensors.append([f"fresh.{rng.random()}", fresh])
    return fresh


def odd(rng: random.Random) -> Raw:
    return Raw(rng.choice(ODD_LITERALS.split()))


def is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(item) is int for item in value)


# JSON and near-JSON without blanks, to be split at them.
ODD_LITERALS = (
    """null true false "" "0" "F32" "U8" 'a' [] [0] [[0]] [null] {} {"dtype":"U8"}"""
    " 0 1 -1 0.0 1.0 1.5 1e2 -0 1E400 NaN 007"
)
METADATA_LITERALS = (
    r"""{"format":"pt"} {"a":"1","b":"\n"} {"":"x"} {"a":1} {"a":null} {"a":{}} {"a":["b"]} """
    r"""{"a":"1","a":"1"} {"a":"1","\u0061":"1"}"""
)
NUMBERS = (
    "NaN Infinity -Infinity 1e999 -1e999 1E+400 1e-999 0.1 -0 -0.0 1e5 +1 01 0x10 1_000 .5 "
    f"{'1' * 20} {'1' * 21} {'9' * 100} {'1' * 5000} -{'1' * 20} -{'9' * 19} 0.{'3' * 30}"
)
BIG = (2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**19)
Mutation = Callable[[random.Random, Case], None]
MUTATIONS: list[tuple[Mutation, float]] = []


def mutation(weight: float = 1.0) -> Callable[[Mutation], Mutation]:
    def register(function: Mutation) -> Mutation:
        MUTATIONS.append((function, weight))
        return function

    return register


@mutation(2)
def nothing(rng: random.Random, case: Case) -> None:
    """The valid file itself."""


@mutation(2)
def same_meaning(rng: random.Random, case: Case) -> None:
    """Other bytes, same tensors: blanks, order, escapes, padding."""
    case.blank = rng.choice(("", " ", "\n", "\t", "\r\n ", " " * 50))
    case.padding += b" " * rng.randint(0, 9)
    for _, fields in entries(case):
        rng.shuffle(fields)
        if rng.random() < 0.3:
            key = rng.choice(("dtype", "shape", "data_offsets"))
            for pair in fields:
                if pair[0] == key:
                    pair[0] = Raw(f'"\\u{ord(key[0]):04x}{key[1:]}"')
    rng.shuffle(case.tensors)


@mutation(2)
def same_size(rng: random.Random, case: Case) -> None:
    """Another shape or dtype of as many bytes."""
    fields = one(rng, case)
    shape = fields["shape"]
    if rng.random() < 0.5:
        rng.shuffle(shape)
        shape.insert(rng.randint(0, len(shape)), 1)
    elif fields["dtype"] in DTYPE_BITS:
        bits = DTYPE_BITS[fields["dtype"]]
        fields.put("dtype", rng.choice([code for code, size in DTYPE_BITS.items() if size == bits]))


@mutation()
def dtype_unknown(rng: random.Random, case: Case) -> None:
    codes = ("f32", "F31", "BF32", "F8", "", "F32 ", "float32", "U128", "\u0000", "F" * 500)
    one(rng, case).put("dtype", rng.choice(codes))


@mutation()
def dtype_other(rng: random.Random, case: Case) -> None:
    one(rng, case).put("dtype", rng.choice(tuple(DTYPE_BITS)))


@mutation()
def dtype_part_of_a_byte(rng: random.Random, case: Case) -> None:
    fields = one(rng, case)
    fields.put("dtype", rng.choice(("F4", "F6_E2M3", "F6_E3M2")))
    fields.put("shape", [rng.choice((1, 3, 5, 7, 2, 4, 8))])


@mutation(2)
def field_odd(rng: random.Random, case: Case) -> None:
    one(rng, case).put(rng.choice(("dtype", "shape", "data_offsets")), odd(rng))


@mutation()
def shape_item_odd(rng: random.Random, case: Case) -> None:
    one(rng, case)["shape"].insert(0, odd(rng))


@mutation()
def shape_item(rng: random.Random, case: Case) -> None:
    shape = one(rng, case)["shape"]
    if not shape or rng.random() < 0.3:
        shape.append(rng.choice((0, 1, 2, 3)))
    else:
        at = rng.randrange(len(shape))
        shape[at] = rng.choice((0, 1, -1, -2, 7, 100, 65536, Raw(f"{shape[at]}.0"), f"{shape[at]}"))


@mutation()
def shape_zero(rng: random.Random, case: Case) -> None:
    one(rng, case).put("shape", rng.choice(([0], [0, 3], [3, 0], [0, 2**63], [0, 0, 0])))


@mutation()
def shape_big(rng: random.Random, case: Case) -> None:
    wraps = [4194305, 4194305, 211106198978564]  # times 1 byte, 4 in 64 bits
    shapes = (wraps, [2**32, 2**32], [2**63], [2**64 - 1], [2**62, 4], [2**31, 2**31, 2])
    one(rng, case).put("shape", list(rng.choice(shapes)))


@mutation()
def shape_rank(rng: random.Random, case: Case) -> None:
    fields = one(rng, case)
    fields["shape"].extend([1] * rng.choice((5, 6, 7, 8, 9, 20, 500)))


@mutation()
def offset_step(rng: random.Random, case: Case) -> None:
    offsets = one(rng, case)["data_offsets"]
    offsets[rng.randrange(2)] += rng.choice((-4, -1, 1, 2, 4, 8))


@mutation()
def offset_big(rng: random.Random, case: Case) -> None:
    one(rng, case)["data_offsets"][rng.randrange(2)] = rng.choice(BIG)


@mutation()
def offset_odd(rng: random.Random, case: Case) -> None:
    one(rng, case)["data_offsets"][rng.randrange(2)] = odd(rng)


@mutation()
def offsets_count(rng: random.Random, case: Case) -> None:
    fields = one(rng, case)
    begin, end = fields["data_offsets"]
    lists: tuple[list[int], ...] = (
        [end, begin],
        [end, end],
        [begin],
        [],
        [begin, end, end],
        [0, begin, end],
        [begin, begin],
    )
    fields.put("data_offsets", list(rng.choice(lists)))


@mutation()
def offsets_shift(rng: random.Random, case: Case) -> None:
    """One tensor, or all from one on, moved: a hole or an overlap."""
    step = rng.choice((-8, -4, -1, 1, 4, 8))
    pivot = one(rng, case)["data_offsets"][0]
    alone = rng.random() < 0.5
    for _, fields in entries(case):
        for key, value in fields:
            moved = is_range(value) and (value[0] == pivot if alone else value[0] >= pivot)
            if key == "data_offsets" and moved:
                value[0] += step
                value[1] += step


@mutation()
def offsets_shared(rng: random.Random, case: Case) -> None:
    source, target = one(rng, case), one(rng, case)
    for key in ("dtype", "shape", "data_offsets"):
        value = source[key]
        target.put(key, list(value) if isinstance(value, list) else value)


@mutation()
def tensor_removed(rng: random.Random, case: Case) -> None:
    case.tensors.remove(rng.choice(case.tensors))


@mutation()
def tensor_doubled(rng: random.Random, case: Case) -> None:
    name, value = rng.choice(list(case.tensors))
    if rng.random() < 0.5 and isinstance(name, str) and name and not isinstance(name, Raw):
        name = Raw('"' + "".join(f"\\u{ord(c):04x}" for c in name if ord(c) < 65536) + '"')
    case.tensors.insert(rng.randint(0, len(case.tensors)), [name, value])


@mutation()
def tensor_odd(rng: random.Random, case: Case) -> None:
    rng.choice(case.tensors)[1] = odd(rng)


@mutation()
def field_removed(rng: random.Random, case: Case) -> None:
    fields = one(rng, case)
    fields.remove(rng.choice(fields))


@mutation()
def field_doubled(rng: random.Random, case: Case) -> None:
    fields = one(rng, case)
    fields.append([rng.choice(fields)[0], odd(rng)])


@mutation()
def field_unknown(rng: random.Random, case: Case) -> None:
    key = rng.choice(("Dtype", "strides", "data_offset", "", "shape ", "__metadata__", "x" * 1000))
    one(rng, case).append([key, odd(rng)])


@mutation()
def name_length(rng: random.Random, case: Case) -> None:
    names = ("", "n" * 512, "n" * 513, "ü" * 256, "ü" * 257, "n" * 100_000)
    rng.choice(case.tensors)[0] = rng.choice(names)


@mutation()
def name_characters(rng: random.Random, case: Case) -> None:
    odd = (
        "\0",
        "\n",
        "\x1b[31m",
        "\x7f",
        "\u2028",
        "\u202e",
        "\ufeff",
        "\ud800",
        "\U000e0001",
        " ",
        "é",
    )
    pair = rng.choice(case.tensors)
    pair[0] = Raw(json.dumps(f"a{rng.choice(odd)}b"))


@mutation()
def name_path(rng: random.Random, case: Case) -> None:
    paths = (
        "../../etc/passwd",
        "/etc/passwd",
        "a/../b",
        "C:\\w",
        "\\\\host\\w",
        "..",
        "~/w",
        "a/b",
        "...",
    )
    rng.choice(case.tensors)[0] = rng.choice(paths)


@mutation()
def surrogate(rng: random.Random, case: Case) -> None:
    text = Raw(rng.choice(('"\\ud800"', '"\\udfff"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"')))
    if rng.random() < 0.5:
        rng.choice(case.tensors)[0] = text
    else:
        case.tensors.put("__metadata__", Pairs([["note", text]]))


@mutation(2)
def metadata(rng: random.Random, case: Case) -> None:
    literal = rng.choice((METADATA_LITERALS + " " + ODD_LITERALS).split())
    case.tensors.put("__metadata__", Raw(literal))


@mutation()
def metadata_doubled(rng: random.Random, case: Case) -> None:
    for _ in range(2):
        at = rng.randint(0, len(case.tensors))
        case.tensors.insert(at, ["__metadata__", Pairs([["format", "pt"]])])


@mutation(2)
def number(rng: random.Random, case: Case) -> None:
    fields = one(rng, case)
    where = rng.choice((fields["shape"], fields["data_offsets"]))
    where.insert(rng.randint(0, len(where)), Raw(rng.choice(NUMBERS.split())))


@mutation()
def depth(rng: random.Random, case: Case) -> None:
    levels = rng.choice((3, MAX_DEPTH - 2, MAX_DEPTH, MAX_DEPTH + 1, 1000, 100_000))
    opens, closes = rng.choice((("[", "]"), ('{"a":', "}")))
    closed = rng.random() < 0.7
    deep = Raw(opens * levels + "1" + closes * levels * closed)
    rng.choice((case.tensors, one(rng, case))).append(["deep", deep])


@mutation()
def empty(rng: random.Random, case: Case) -> None:
    case.tensors[:] = [["__metadata__", Pairs()]] if rng.random() < 0.5 else []
    case.data = b""


@mutation(2)
def length(rng: random.Random, case: Case) -> None:
    real = len(case.render()) - 8 - len(case.data)
    lengths = (0, 1, 2, real - 1, real + 1, real // 2, real + len(case.data), 2**63, 2**64 - 1,
               real + len(case.data) + 1, MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1, 100_000_001,
               rng.getrandbits(64), rng.getrandbits(10))  # fmt: skip
    case.length = rng.choice(lengths)


@mutation()
def lead(rng: random.Random, case: Case) -> None:
    case.lead = rng.choice((b" ", b"\n", b"\xef\xbb\xbf", b"\xff\xfe", b"[", b"\0", b"{", b"//"))


@mutation()
def padding(rng: random.Random, case: Case) -> None:
    case.padding += rng.choice(
        (b"\n", b"\0", b"\t", b" \n ", b"}", b"]", b"{}", b"\xc2\xa0", b" " * 4000)
    )


@mutation()
def text_encoding(rng: random.Random, case: Case) -> None:
    codec = rng.choice(("utf-16", "utf-16-le", "utf-32-le", "utf-8-sig"))
    case.edits.append(lambda header: header.decode("utf-8", "ignore").encode(codec))


@mutation()
def not_utf8(rng: random.Random, case: Case) -> None:
    bad = rng.choice((b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf8\x88\x80\x80\x80"))
    case.edits.append(lambda header: header.replace(b'":', bad + b'":', 1))


@mutation(3)
def header_bytes(rng: random.Random, case: Case) -> None:
    """Bytes of the header replaced, removed or inserted, as a bad disk or a hex editor would."""

    def edit(header: bytes) -> bytes:
        edited = bytearray(header)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(1, len(edited) + 1) if edited else 0
            byte = rng.choice((rng.randrange(256), rng.choice(b'{}[]",:0123456789eE-. \\u')))
            action = rng.randrange(3)
            edited[at : at + (action < 2)] = bytes([byte] * (action != 1))
        return bytes(edited)

    case.edits.append(edit)


@mutation()
def header_cut(rng: random.Random, case: Case) -> None:
    share = rng.random()
    case.edits.append(lambda header: header[: int(len(header) * share)])


@mutation(2)
def file_cut(rng: random.Random, case: Case) -> None:
    keep = rng.choice((0, 1, 7, 8, 9, 10, 11, None, None, None, None))
    share = rng.random()
    case.file_edits.append(lambda whole: whole[: int(len(whole) * share) if keep is None else keep])


@mutation()
def data_cut(rng: random.Random, case: Case) -> None:
    case.data = case.data[: -rng.randint(1, 9)]


@mutation()
def data_added(rng: random.Random, case: Case) -> None:
    case.data += rng.choice(
        (b"\0", b"PK\5\6" + bytes(18), pickle.dumps({"a": 1}), rng.randbytes(100))
    )


@mutation()
def foreign(rng: random.Random, case: Case) -> None:
    files = (
        pickle.dumps({"w": [1.0]}, protocol=rng.choice((2, 3, 4, 5))),
        b"PK\3\4\x14\0\0\0\x08\0" + bytes(40),
        b"\x89HDF\r\n\x1a\n" + bytes(40),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"<!DOCTYPE html><html></html>",
    )
    whole = rng.choice(files)
    case.file_edits.append(lambda _: whole)


def _many(key: str) -> Raw:
    tensor = '"%d":{"dtype":"U8","shape":[1],"' + key + '":[%d,%d]}'
    return Raw("{" + ",".join(tensor % (i, i, i + 1) for i in range(MAX_TENSORS + 1)) + "}")


CLAIMED, COUNTED = _many("data_offsets"), _many("data_offset\\u0073")
VALUES = Raw('{"a":[' + '"",' * (MAX_STRUCTURE // 2) + '""]}')


@mutation(0.2)
def crowd(rng: random.Random, case: Case) -> None:
    """More tensors or values than are allowed."""
    case.tensors = rng.choice((CLAIMED, COUNTED, VALUES))  # type: ignore[assignment]
    case.data = bytes(MAX_TENSORS + 1)


FUNCTIONS = [function for function, _ in MUTATIONS]
WEIGHTS = [weight for _, weight in MUTATIONS]


def make_case(seed: int, number: int) -> bytes:
    rng = random.Random(seed << 32 | number)
    case = valid_case(rng)
    for function in rng.choices(FUNCTIONS, WEIGHTS, k=rng.choice((1, 1, 1, 1, 1, 1, 2, 2, 3))):
        if not isinstance(case.tensors, Raw):
            if not case.tensors:
                case.tensors.append(["filler", 0])
            function(rng, case)
    return case.render()


def branch_of(message: str) -> str:
    found = [name for name, pattern in _BRANCHES.items() if pattern.search(message)]
    if len(found) != 1 or "\n" in message or len(message) > MAX_MESSAGE:
        raise AssertionError(
            f"{message!r} fits the branches {found}, wanted one short line that fits one"
        )
    return found[0]


def library_reads(whole: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Name -> dtype, shape, bytes as the safetensors library reads the file, None if it refuses."""
    try:
        read = safetensors.deserialize(whole)  # type: ignore[no-untyped-call]
    except (safetensors.SafetensorError, ValueError):
        return None
    return {n: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for n, t in read}


def check_accepted(tensors: dict[str, TensorEntry], whole: bytes) -> None:
    ours = {
        e.name: (e.dtype, e.shape, whole[e.offset : e.offset + e.nbytes]) for e in tensors.values()
    }
    theirs = library_reads(whole)
    if ours != theirs:
        raise AssertionError(f"read {ours}, the safetensors library {theirs}")


def overwrite(file: BinaryIO, content: bytes) -> None:
    # The files stay open: closing a file that was truncated waits for the disk on some systems.
    file.seek(0)
    file.write(content)
    file.truncate()
    file.flush()


def run_case(whole: bytes, path: Path) -> tuple[str, bool]:
    """The branch, and whether the safetensors library reads what was refused."""
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        tensors = read_header(path)
    except CheckpointError as error:
        return branch_of(str(error)), len(whole) < 100_000 and library_reads(whole) is not None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    check_accepted(tensors, whole)
    return "accepted", False


def work(cases: int, seed: int, folder: Path) -> dict[str, Any]:
    """Runs the cases in this process. The alarm's default action, death, ends a hang."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    hits: Counter[str] = Counter()
    stricter: Counter[str] = Counter()
    slowest, memory, began = 0.0, 0, time.perf_counter()
    path = folder / "case.safetensors"
    with path.open("wb") as case_file, (folder / PROGRESS).open("wb") as progress:
        for number in range(cases):
            overwrite(progress, b"%d" % number)
            whole = make_case(seed, number)
            overwrite(case_file, whole)
            start = time.thread_time()
            branch, only_theirs = run_case(whole, path)
            slowest = max(slowest, time.thread_time() - start)
            hits[branch] += 1
            stricter[branch] += only_theirs
            if number == 100:
                memory = peak_kib()
    return {
        "hits": hits,
        "stricter": stricter,
        "seconds": time.perf_counter() - began,
        "slowest": slowest,
        "grown_kib": peak_kib() - memory,
    }


def run(cases: int, seed: int) -> dict[str, Any]:
    """The worker's result. Raises AssertionError for a crash, a hang or a branch hit too rarely."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--cases", str(cases), "--seed", str(seed), "--worker", folder]
        worker = subprocess.run(
            [sys.executable, "-c", BOOT, *sys.path, "--", *arguments],
            capture_output=True,
            text=True,
        )
        if worker.returncode != 0:
            number = (Path(folder) / PROGRESS).read_text()
            hung = worker.returncode == -signal.SIGALRM
            fault = f"hung for {HANG_SECONDS} s" if hung else f"failed ({worker.returncode})"
            raise AssertionError(f"case {number} of seed {seed} {fault}: {worker.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(worker.stdout)
    wanted = FULL_HITS if cases >= FULL_RUN else 1
    rare = {
        name: n for name in ("accepted", *BRANCHES) if (n := result["hits"].get(name, 0)) < wanted
    }
    if rare:
        raise AssertionError(f"branches hit less than {wanted} times: {rare}")
    return result


# The worker sees the modules that its parent sees, however those were found.
BOOT = """import sys
cut = sys.argv.index("--")
sys.path[:] = sys.argv[1:cut]
del sys.argv[1 : cut + 1]
import fuzz_headers
fuzz_headers.main()
"""


def table(result: dict[str, Any], cases: int) -> str:
    lines = [f"{'branch':24}{'hits':>9}{'read by the library':>22}"]
    for name in ("accepted", *BRANCHES):
        stricter = result["stricter"].get(name, 0) or ""
        lines.append(f"{name:24}{result['hits'].get(name, 0):>9,}{stricter:>22}")
    rate = cases / result["seconds"]
    lines.append(
        f"{cases:,} cases in {result['seconds']:.1f} s ({rate:,.0f} a second), slowest "
        f"{1e3 * result['slowest']:.0f} ms, memory grown {result['grown_kib'] / 1024:.1f} MiB"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=FULL_RUN)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="write the bytes of this case to stdout")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        sys.stdout.buffer.write(make_case(options.seed, options.only))
    elif options.worker:
        print(json.dumps(work(options.cases, options.seed, options.worker)))
    else:
        print(table(run(options.cases, options.seed), options.cases))


if __name__ == "__main__":
    main()
