"""A folder that `vitrail export` wrote: every byte is checked before it counts for anything."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail._version import __version__
from vitrail.checkpoint.contents import (
    CONFIG,
    EXPORT,
    INDEX,
    PREPROCESSOR,
    SINGLE,
    TOKENIZER_CONFIG,
)
from vitrail.checkpoint.files import Checkpoint
from vitrail.checkpoint.regular import reading
from vitrail.checkpoint.strict_json import parse_json, read_json
from vitrail.dtypes import HALVES, named_dtype
from vitrail.errors import CheckpointError, InputError, refusal, show, show_path
from vitrail.exported.format import (
    COPIED,
    FORMAT,
    NATIVE,
    WEIGHTS,
    exported_plans,
    manifest_bytes,
    pixel_batch,
    read_digest,
    table_places,
    weights_header,
)
from vitrail.plan.lowering import Program
from vitrail.plan.plan import Plan
from vitrail.spec import MAX_IMAGE_SIDE, ModelSpec
from vitrail.weights.layout import Weights, arena_bytes, arena_views

MOST_BYTES = 1 << 26
"""Of any file but the weights."""

_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "format": int,
    "version": str,
    "source": str,
    "revision": (str, type(None)),
    "spec": dict,
    "dtype": str,
    "size": (list, type(None)),
    "weights": str,
    "logit_scale": (float, type(None)),
    "builds": dict,
    "files": dict,
}
_BUILT = re.compile(r"sm_([1-9][0-9]{1,2})/((image|scores)\.(uint8|float)|text)\.plan")
_IMAGE = re.compile(r"sm_([1-9][0-9]{1,2})/[0-9a-f]{64}\.image")


@dataclass(slots=True)
class Exported:
    """An exported folder. ``source``: what the user typed; ``origin`` what it was made of.

    ``size`` (height, width): of the images its plans take; None without an image tower. ``builds``:
    architecture -> the identity of the runner whose bits its kernels give. ``weights_hash``: see
    `weights.loader.hash_weights`. ``tables``: position tables (T, C) fp32 on the CPU by kind
    of pixels, once `load` has read them.
    """

    folder: Path
    source: str
    origin: str
    spec: ModelSpec
    dtype: torch.dtype
    size: tuple[int, int] | None
    builds: dict[int, str]
    weights_hash: str
    logit_scale: float | None
    files: dict[str, str]
    tables: dict[str, Tensor] = field(default_factory=dict)

    def checkpoint(self) -> Checkpoint:
        """Its tokenizer and image processor files, as a checkpoint without tensors."""

        def optional(name: str) -> dict[str, Any] | None:
            return read_json(self._path(name)) if name in self.files else None

        return Checkpoint(
            folder=self.folder,
            source=self.source,
            revision=None,
            config={},
            preprocessor=optional(PREPROCESSOR),
            tokenizer_config=optional(TOKENIZER_CONFIG),
            tensors={},
        )

    def _path(self, name: str) -> Path:
        """Where a file of the folder is; refuses links that lead out of it."""
        root = Path(os.path.realpath(self.folder))
        path = self.folder / name
        if not Path(os.path.realpath(path)).is_relative_to(root):
            raise refusal(show_path(path), "a link out of the folder", "a file of the export")
        return path

    def read(self, name: str) -> bytes:
        """A file other than the weights. Raises CheckpointError where its digest is another."""
        path = self._path(name)
        with reading(path):
            size = os.stat(path).st_size
        if size > MOST_BYTES:
            raise refusal(show_path(path), f"{size:,} bytes", f"at most {MOST_BYTES:,}")
        raw = bytearray(size)
        self._compare(path, name, read_digest(path, memoryview(raw))[0])
        return bytes(raw)

    def _compare(self, path: Path, name: str, digest: str) -> None:
        if digest != self.files[name]:
            wanted = f"{self.files[name][:16]}..., as {EXPORT} says: damaged; export it again"
            raise refusal(show_path(path), f"the digest {digest[:16]}...", wanted)

    def load(self) -> Weights:
        """Reads and checks every file, the weights once, into memory of the CPU.

        Raises CheckpointError naming the first file that is not as it was written.
        """
        for name in self.files:
            if name != WEIGHTS:
                self.read(name)
        places, total = table_places(self.spec, self.dtype, self.size)
        path, head = self._path(WEIGHTS), weights_header(total)
        with reading(path):
            size = os.stat(path).st_size
        if size != len(head) + total:
            raise refusal(show_path(path), f"{size:,} bytes", f"{len(head) + total:,}")
        try:
            raw = torch.empty(size, dtype=torch.uint8, device="cpu")
        except RuntimeError as error:
            raise CheckpointError(f"weights: got no memory, wanted {size} bytes of it") from error
        memory: memoryview = raw.numpy().data
        self._compare(path, WEIGHTS, read_digest(path, memory)[0])
        if bytes(memory[: len(head)]) != head:
            raise refusal(show_path(path), "another header", f"one tensor of {total:,} bytes")
        arena = raw[len(head) :]
        if self.spec.vision is not None:
            shape = -1, self.spec.vision.blocks.width
            self.tables |= {  # copies, so as not to hold the arena too
                kind: arena[start:stop].view(torch.float32).view(shape).clone()
                for kind, (start, stop) in places.items()
            }
        packed = arena[: arena_bytes(self.spec, self.dtype)]
        return Weights(arena_views(self.spec, self.dtype, packed), packed, self.logit_scale)

    def program(self, arch: int, plan: Plan, pixels: Tensor | None) -> Program | None:
        """The stored program of ``plan`` for pixels of this shape; None where there is none."""
        if arch not in self.builds:
            return None
        for name, own in exported_plans(self.spec).items():
            if own != plan:
                continue
            if pixels is not None and self.spec.vision is not None and self.size is not None:
                stored = pixel_batch(self.spec.vision, name.partition(".")[2], self.size)
                if (pixels.shape[1:], pixels.dtype) != (stored.shape[1:], stored.dtype):
                    return None
            externals = tuple(buffer.name for buffer in plan.buffers if buffer.slot is None)
            return Program(self.read(f"sm_{arch}/{name}.plan"), {}, externals)
        return None

    def image(self, arch: int, key: str) -> bytes | None:
        """The stored image of a kernel; None where it is not among them."""
        name = f"sm_{arch}/{key}.image"
        return self.read(name) if name in self.files else None

    def lacks(self, arch: int) -> CheckpointError:
        """Why it cannot serve another architecture where triton is missing."""
        wanted = f"sm_{arch}, which this GPU is: export it for that, or install triton"
        return refusal(show_path(self.folder / EXPORT), f"kernels for {self.architectures}", wanted)

    @property
    def arena_bytes(self) -> int:
        """Bytes of packed weights and position tables."""
        return table_places(self.spec, self.dtype, self.size)[1]

    @property
    def architectures(self) -> str:
        return ", ".join(f"sm_{arch}" for arch in self.builds)

    @property
    def extent(self) -> str:
        """What its programs give, in words."""
        found = "pooled embeddings"
        if self.spec.head is not None:
            found += " and class scores"
        image = [] if self.size is None else [f"images of {self.size[0]}x{self.size[1]}"]
        return f"{found} of {' and '.join(image + ['texts'] * (self.spec.text is not None))}"


def open_exported(path_or_id: object, revision: str | None = None) -> Exported | None:
    """The exported folder at a path; None where there is none. Reads vitrail.json alone.

    Raises CheckpointError: damaged, another format's or version's, files that are missing or that
    it may not have, or a checkpoint beside it; InputError for a ``revision``.
    """
    source = os.fspath(path_or_id) if isinstance(path_or_id, str | os.PathLike) else None
    if not isinstance(source, str):
        return None
    folder = Path(os.path.expanduser(source))
    if not os.path.lexists(folder / EXPORT):
        return None
    if revision is not None:
        raise InputError(
            f"revision: got {show(revision)} for the local {show(source)}, wanted None"
        )
    where = show_path(folder / EXPORT)
    for name in (CONFIG, SINGLE, INDEX):
        if os.path.lexists(folder / name):
            wanted = "an exported folder or a checkpoint, not both in one"
            raise refusal(show_path(folder), f"both {EXPORT} and {name}", wanted)
    content = _content(folder / EXPORT, where)
    try:
        spec = ModelSpec.from_dict(content["spec"])
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if content["dtype"] not in HALVES:
        raise refusal(f"{where}: dtype", show(content["dtype"]), f"one of {HALVES}")
    builds = _builds(content["builds"], where)
    exported = Exported(
        folder=folder,
        source=source,
        origin=content["source"],
        spec=spec,
        dtype=named_dtype(content["dtype"]),
        size=_size(content["size"], spec, where),
        builds=builds,
        weights_hash=content["weights"],
        logit_scale=content["logit_scale"],
        files=content["files"],
    )
    _check_files(exported, where)
    return exported


def _content(path: Path, where: str) -> dict[str, Any]:
    """What vitrail.json says, once it is sure that it is as it was written."""
    with reading(path):
        size = os.stat(path).st_size
    if size > MOST_BYTES:
        raise refusal(where, f"{size:,} bytes", f"at most {MOST_BYTES:,}")
    raw = bytearray(size)
    read_digest(path, memoryview(raw))
    content = parse_json(raw, where)
    digest = content.pop("digest", None)
    if content.get("format") != FORMAT:
        raise refusal(f"{where}: format", show(content.get("format")), str(FORMAT))
    if manifest_bytes(content) != bytes(raw):
        got = f"bytes whose digest is not its own, {show(digest)}"
        raise refusal(where, got, "them as they were written: damaged; export it again")
    if content.get("version") != __version__:
        got, wanted = show(content.get("version")), f"this one's, {__version__}; export it again"
        raise refusal(f"{where}: version", got, wanted)
    if content.keys() != _FIELDS.keys():
        odd = sorted(content.keys() ^ _FIELDS.keys())
        raise refusal(where, f"other fields ({', '.join(map(show, odd))})", "those of an export")
    for name, kinds in _FIELDS.items():
        if not isinstance(content[name], kinds):
            raise refusal(f"{where}: {name}", show(content[name]), "the type that it is written in")
    return content


def _builds(given: Mapping[str, Any], where: str) -> dict[int, str]:
    for arch, build in given.items():
        good = isinstance(build, dict) and build.keys() == {"runner", "fingerprint"}
        good = good and all(isinstance(value, str) for value in build.values())
        if not re.fullmatch(r"[1-9][0-9]{1,2}", arch) or not good:
            wanted = "a runner and a fingerprint by architecture"
            raise refusal(f"{where}: builds", show({arch: build}), wanted)
    if not given:
        raise refusal(f"{where}: builds", "none", "one architecture at least")
    return {arch: given[str(arch)]["runner"] for arch in sorted(map(int, given))}


def _size(given: Any, spec: ModelSpec, where: str) -> tuple[int, int] | None:
    vision = spec.vision
    if vision is None and given is None:
        return None
    good = isinstance(given, list) and [type(side) for side in given] == [int, int]
    if vision is None or not good:
        raise refusal(f"{where}: size", show(given), "[height, width] for an image tower")
    if any(not p <= s <= MAX_IMAGE_SIDE for s, p in zip(given, vision.patch, strict=True)):
        raise refusal(f"{where}: size", show(given), f"a patch, {vision.patch}, at least")
    return given[0], given[1]


def _check_files(exported: Exported, where: str) -> None:
    """Refuses names that no export has, and an export that lacks what every one has."""
    for name, digest in exported.files.items():
        built = _BUILT.fullmatch(name) or _IMAGE.fullmatch(name)
        own = name in (NATIVE, WEIGHTS, *COPIED) or (built and int(built[1]) in exported.builds)
        if not own:
            raise refusal(f"{where}: files", show(name), "only what an export holds")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise refusal(f"{where}: files: {name}", show(digest), "64 hex digits")
        if not os.path.lexists(exported.folder / name):
            raise refusal(
                show_path(exported.folder / name), "no such file", f"it, as {EXPORT} says"
            )
    named = itertools.product(exported.builds, exported_plans(exported.spec))
    for name in (NATIVE, WEIGHTS, *(f"sm_{arch}/{plan}.plan" for arch, plan in named)):
        if name not in exported.files:
            raise refusal(f"{where}: files", f"no {name}", "it among them")
