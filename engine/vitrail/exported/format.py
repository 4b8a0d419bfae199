"""The format of a folder that `vitrail export` writes.

    model.vitrail         the record: the model, its plans and kernels, the digest of every file
    vitrail.json          a copy of the record's summary, for people; written last
    weights.safetensors   one tensor "arena": packed weights, then position tables
    sm_90/*.plan          native plans (`vitrail.plan.lowering`), a folder for each architecture
    sm_90/*.kernel        the kernel binaries that the plans launch, by key
    tokenizer.json, ...   copies of the checkpoint's files

The record, in the encoding of `vitrail.plan.record` (csrc/export_folder.cpp reads it too):

    head                  see `vitrail.exported.head`: digest, two numbers, version
    summary               a string: JSON, for Python alone
    files                 a list: path, bytes (uint64), digest (32 bytes)
    weights               number of the weights file, the arena's offset and bytes, bytes of weights
    vision, text          a byte 0, or a byte 1 and the sizes, labels and scores of the tower
    builds                a list, one item per architecture: its number, the fingerprint, a list of
                          plans (name, file number, offset of the position table or -1), and a list
                          of kernels (file numbers)

Digests reveal damage, not forgery: kernels are code, so trust a folder as you trust a program.
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vitrail.checkpoint.strict_json import parse_json
from vitrail.dtypes import HALVES, dtype_name, named_dtype
from vitrail.errors import CheckpointError, refusal, show
from vitrail.exported import contents
from vitrail.exported.digest import FileEntry
from vitrail.exported.head import AGAIN, encode_record, read_head
from vitrail.plan.record import KERNEL_ABI, PLAN_GRAMMAR, items, string
from vitrail.spec import MAX_IMAGE_SIDE, ModelSpec
from vitrail.weights.layout import arena_bytes

RECORD = "model.vitrail"

_SUMMARY_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "plan_grammar": int,
    "kernel_abi": int,
    "version": str,
    "source": str,
    "revision": (str, type(None)),
    "spec": dict,
    "dtype": str,
    "size": (list, type(None)),
    "weights": str,
    "logit_scale": (float, type(None)),
    "builds": dict,
}
_BUILT = re.compile(
    r"sm_([1-9][0-9]{1,2})/"
    r"(((image|scores)\.(uint8|float)|text)\.plan|[0-9a-f]{64}\.kernel)"
)


class Build(NamedTuple):
    """The export for one architecture.

    ``runner``: identity of the runner whose bits the kernels give. ``fingerprint``: the fingerprint
    of the model with these kernels.
    """

    runner: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class ExportRecord:
    """The record of an exported folder.

    ``version`` of Vitrail, which exported it. ``source``, ``revision``: the checkpoint that was
    exported. ``size``: (height, width) of images; None without an image tower. ``weights_hash``:
    see `vitrail.weights.loader.hash_weights`. ``files``: every file but the record itself and
    vitrail.json, by path.
    """

    version: str
    source: str
    revision: str | None
    spec: ModelSpec
    dtype: torch.dtype
    size: tuple[int, int] | None
    weights_hash: str
    logit_scale: float | None
    builds: dict[int, Build]
    files: dict[str, FileEntry]

    def summary(self) -> bytes:
        """The text of vitrail.json."""
        content = {
            "plan_grammar": PLAN_GRAMMAR,
            "kernel_abi": KERNEL_ABI,
            "version": self.version,
            "source": self.source,
            "revision": self.revision,
            "spec": self.spec.to_dict(),
            "dtype": dtype_name(self.dtype),
            "size": self.size,
            "weights": self.weights_hash,
            "logit_scale": self.logit_scale,
            "builds": {str(arch): build._asdict() for arch, build in self.builds.items()},
        }
        return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()

    def encode(self) -> bytes:
        """The bytes of the record."""
        files = [
            string(path) + struct.pack("<Q", entry.size) + entry.digest
            for path, entry in self.files.items()
        ]
        numbers = {path: number for number, path in enumerate(self.files)}
        tables, total = contents.position_tables(self.spec, self.dtype, self.size)
        arena = len(contents.weights_header(total)), total, arena_bytes(self.spec, self.dtype)
        body = (
            string(self.summary())
            + items(files)
            + struct.pack("<IQQQ", numbers[contents.WEIGHTS], *arena)
            + _vision(self.spec, self.size)
            + _text(self.spec)
            + items(list(self._builds(numbers, tables)))
        )
        return encode_record(self.version, body)

    def _builds(
        self, numbers: Mapping[str, int], tables: Mapping[str, tuple[int, int]]
    ) -> Iterator[bytes]:
        for arch, build in self.builds.items():
            plans = []
            for name in contents.exported_plans(self.spec):
                number = numbers[f"sm_{arch}/{name}.plan"]
                table, _ = tables.get(name.partition(".")[2], (-1, -1))
                plans.append(string(name) + struct.pack("<Iq", number, table))
            kernels = [
                struct.pack("<I", number)
                for path, number in numbers.items()
                if path.startswith(f"sm_{arch}/") and path.endswith(".kernel")
            ]
            head = struct.pack("<I", arch) + string(build.fingerprint)
            yield head + items(plans) + items(kernels)


def _vision(spec: ModelSpec, size: tuple[int, int] | None) -> bytes:
    if spec.vision is None or size is None:
        return b"\0"
    vision, head = spec.vision, spec.head
    sizes = *size, vision.channels, vision.embedding, vision.tokens_at(size)
    labels = () if head is None else head.labels
    scores = "" if head is None else head.scores
    return b"\1" + struct.pack("<5I", *sizes) + items([*map(string, labels)]) + string(scores)


def _text(spec: ModelSpec) -> bytes:
    if (text := spec.text) is None:
        return b"\0"
    eos = -1 if text.eos is None else text.eos
    return b"\1" + struct.pack("<IIIi", text.vocab, text.context, text.embedding, eos)


# -- decoding --------------------------------------------------------------------------------------


def decode_record(raw: bytes, location: str) -> ExportRecord:
    """The record in ``raw``. Messages begin with ``location``.

    Raises CheckpointError if the record is damaged or has another plan grammar or kernel ABI, if it
    lists a file that no export has, or if it lacks a file that every export has.
    """
    version, reader = read_head(raw, location)
    try:
        summary = reader.string()
        files = dict(
            reader.items(lambda: (reader.string().decode(), FileEntry(*reader.numbers("Q32s"))))
        )
    except ValueError as error:
        raise refusal(location, str(error), f"a whole record: {AGAIN}") from None
    record = _record(parse_json(summary, location), files, location)
    _check_files(record, f"{location}: files")
    if record.version != version or record.encode() != raw:
        raise refusal(location, "parts that contradict each other", f"one model: {AGAIN}")
    return record


def _record(content: dict[str, Any], files: dict[str, FileEntry], location: str) -> ExportRecord:
    if content.keys() != _SUMMARY_TYPES.keys():
        odd = ", ".join(map(show, sorted(content.keys() ^ _SUMMARY_TYPES.keys())))
        raise refusal(location, f"other fields ({odd})", "those of an export")
    for name, types in _SUMMARY_TYPES.items():
        if not isinstance(content[name], types):
            raise refusal(f"{location}: {name}", show(content[name]), "the type it is written in")
    try:
        spec = ModelSpec.from_dict(content["spec"])
    except CheckpointError as error:
        raise CheckpointError(f"{location}: {error}") from None
    if content["dtype"] not in HALVES:
        raise refusal(f"{location}: dtype", show(content["dtype"]), f"one of {HALVES}")
    return ExportRecord(
        content["version"],
        content["source"],
        content["revision"],
        spec,
        named_dtype(content["dtype"]),
        _size(content["size"], spec, f"{location}: size"),
        content["weights"],
        content["logit_scale"],
        _builds(content["builds"], f"{location}: builds"),
        files,
    )


def _builds(content: Mapping[str, Any], location: str) -> dict[int, Build]:
    if not content:
        raise refusal(location, "none", "at least one architecture")
    for arch, build in content.items():
        valid = isinstance(build, dict) and build.keys() == set(Build._fields)
        valid = valid and all(isinstance(value, str) for value in build.values())
        if not valid or not re.fullmatch(r"[1-9][0-9]{1,2}", arch):
            raise refusal(location, show({arch: build}), "runner and fingerprint by architecture")
    return {arch: Build(**content[str(arch)]) for arch in sorted(map(int, content))}


def _size(size: Any, spec: ModelSpec, location: str) -> tuple[int, int] | None:
    if spec.vision is None and size is None:
        return None
    if spec.vision is None or size is None or [type(side) for side in size] != [int, int]:
        raise refusal(location, show(size), "[height, width] for an image tower")
    height, width = size
    patch = spec.vision.patch
    if not (patch[0] <= height <= MAX_IMAGE_SIDE and patch[1] <= width <= MAX_IMAGE_SIDE):
        raise refusal(location, show(size), f"at least a patch, {patch}")
    return height, width


def _check_files(record: ExportRecord, location: str) -> None:
    """Refuses paths that no export has, and a record without a file that every export has."""
    for path in record.files:
        built = _BUILT.fullmatch(path)
        if not (
            path in (contents.WEIGHTS, *contents.COPIED)
            or (built and int(built[1]) in record.builds)
        ):
            raise refusal(location, show(path), "only files of an export")
    names = contents.exported_plans(record.spec)
    plans = (f"sm_{arch}/{name}.plan" for arch in record.builds for name in names)
    for path in (contents.WEIGHTS, *plans):
        if path not in record.files:
            raise refusal(location, f"no {path}", "it among them")
    _, total = contents.position_tables(record.spec, record.dtype, record.size)
    size = record.files[contents.WEIGHTS].size
    expected = len(contents.weights_header(total)) + total
    if size != expected:
        raise refusal(location, f"{size:,} bytes of {contents.WEIGHTS}", f"{expected:,}")
