"""A folder that `vitrail export` wrote. Every byte is checked before it is used."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.checkpoint.contents import (
    CONFIG,
    EXPORT,
    INDEX,
    PREPROCESSOR,
    SINGLE,
    TOKENIZER_CONFIG,
    inside,
)
from vitrail.checkpoint.files import Checkpoint
from vitrail.checkpoint.regular import absolute, read_file
from vitrail.checkpoint.strict_json import read_json
from vitrail.errors import CheckpointError, InputError, refusal, show, show_path
from vitrail.exported import contents
from vitrail.exported.digest import hash_file
from vitrail.exported.format import RECORD, ExportRecord, decode_record
from vitrail.exported.head import AGAIN
from vitrail.plan.lowering import NativePlan
from vitrail.plan.plan import Plan
from vitrail.spec import ModelSpec
from vitrail.weights.layout import Weights, arena_bytes, arena_views

MAX_BYTES = 1 << 26
"""Limit for every file but the weights."""


@dataclass(slots=True)
class ExportFolder:
    """An exported folder.

    ``source``: the path as the user wrote it. ``tables``: position tables (T, C) fp32 on the CPU,
    by pixel format; empty until `load` has read them.
    """

    folder: Path
    source: str
    record: ExportRecord
    tables: dict[str, Tensor] = field(default_factory=dict)

    @property
    def spec(self) -> ModelSpec:
        return self.record.spec

    @property
    def dtype(self) -> torch.dtype:
        return self.record.dtype

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the images that the plans take; None without an image tower."""
        return self.record.size

    @property
    def builds(self) -> dict[int, str]:
        """Identity of the runner whose bits the kernels give, by architecture."""
        return {arch: build.runner for arch, build in self.record.builds.items()}

    def checkpoint(self) -> Checkpoint:
        """The tokenizer and image processor files, as a checkpoint without tensors."""

        def optional(name: str) -> dict[str, Any] | None:
            return read_json(inside(self.folder, name)) if name in self.record.files else None

        return Checkpoint(
            folder=self.folder,
            source=self.source,
            revision=None,
            config={},
            preprocessor=optional(PREPROCESSOR),
            tokenizer_config=optional(TOKENIZER_CONFIG),
            tensors={},
        )

    def read(self, name: str) -> bytes:
        """A file other than the weights.

        Raises CheckpointError if its bytes are not those that were exported.
        """
        size = self.record.files[name].size
        if size > MAX_BYTES:
            location = show_path(self.folder / name)
            raise refusal(location, f"{size:,} bytes", f"at most {MAX_BYTES:,}")
        raw = bytearray(size)
        self._read_into(name, memoryview(raw))
        return bytes(raw)

    def _read_into(self, name: str, out: memoryview) -> None:
        path, exported = inside(self.folder, name), self.record.files[name].digest.hex()[:16]
        entry = hash_file(path, out)
        if entry != self.record.files[name]:
            digest = f"the digest {entry.digest.hex()[:16]}..."
            raise refusal(show_path(path), digest, f"{exported}..., as {RECORD} says: {AGAIN}")

    def load(self) -> Weights:
        """Reads and checks every file; the weights go into CPU memory.

        Raises CheckpointError naming the first file that is not as it was exported.
        """
        for name in self.record.files:
            if name != contents.WEIGHTS:
                self.read(name)
        tables, total = contents.position_tables(self.spec, self.dtype, self.size)
        header = contents.weights_header(total)
        size = len(header) + total
        try:
            raw = torch.empty(size, dtype=torch.uint8, device="cpu")
        except RuntimeError as error:
            raise CheckpointError(f"weights: got no memory, wanted {size} bytes of it") from error
        memory: memoryview = raw.numpy().data
        self._read_into(contents.WEIGHTS, memory)
        if bytes(memory[: len(header)]) != header:
            location = show_path(self.folder / contents.WEIGHTS)
            raise refusal(location, "another header", f"one tensor of {total:,} bytes")
        arena = raw[len(header) :]
        if self.spec.vision is not None:
            shape = -1, self.spec.vision.blocks.width
            self.tables |= {  # copies: a view would keep the whole arena alive
                pixel_format: arena[start:stop].view(torch.float32).view(shape).clone()
                for pixel_format, (start, stop) in tables.items()
            }
        packed = arena[: arena_bytes(self.spec, self.dtype)]
        views = arena_views(self.spec, self.dtype, packed)
        return Weights(views, packed, self.record.logit_scale)

    def native_plan(self, arch: int, plan: Plan, pixels: Tensor | None) -> NativePlan | None:
        """The exported form of ``plan`` for pixels of this shape; None if there is none."""
        if arch not in self.record.builds:
            return None
        for name, exported in contents.exported_plans(self.spec).items():
            if exported != plan:
                continue
            if pixels is not None and self.spec.vision is not None and self.size is not None:
                stored = contents.pixel_batch(self.spec.vision, name.partition(".")[2], self.size)
                if (pixels.shape[1:], pixels.dtype) != (stored.shape[1:], stored.dtype):
                    return None
            externals = tuple(buffer.name for buffer in plan.buffers if buffer.slot is None)
            return NativePlan(self.read(f"sm_{arch}/{name}.plan"), {}, externals)
        return None

    def kernel(self, arch: int, key: str) -> bytes | None:
        """An exported kernel binary; None if there is none of this key."""
        name = f"sm_{arch}/{key}.kernel"
        return self.read(name) if name in self.record.files else None

    def lacks(self, arch: int) -> CheckpointError:
        """The error that the folder has no kernels for this GPU and triton is missing."""
        return refusal(
            show_path(self.folder / RECORD),
            f"kernels for {self.architectures}",
            f"sm_{arch}, which this GPU is: export it for that, or install triton",
        )

    @property
    def arena_bytes(self) -> int:
        """Bytes of the packed weights and position tables."""
        return contents.position_tables(self.spec, self.dtype, self.size)[1]

    @property
    def architectures(self) -> str:
        return ", ".join(f"sm_{arch}" for arch in self.record.builds)

    @property
    def extent(self) -> str:
        """The results that the exported plans give, in words."""
        results = "pooled embeddings"
        if self.spec.head is not None:
            results += " and class scores"
        images = [] if self.size is None else [f"images of {self.size[0]}x{self.size[1]}"]
        texts = ["texts"] * (self.spec.text is not None)
        return f"{results} of {' and '.join(images + texts)}"


def open_exported(path_or_id: object, revision: str | None = None) -> ExportFolder | None:
    """The exported folder at a path; None if it is none. Reads the record and vitrail.json.

    Raises CheckpointError as `decode_record`, if a file is missing, or if there is a checkpoint in
    the same folder; InputError for a ``revision``.
    """
    source = os.fspath(path_or_id) if isinstance(path_or_id, str | os.PathLike) else None
    if not isinstance(source, str):
        return None
    folder = absolute(source)
    if not os.path.lexists(folder / EXPORT):
        return None
    if revision is not None:
        raise InputError(
            f"revision: got {show(revision)} for the local {show(source)}, wanted None"
        )
    for name in (CONFIG, SINGLE, INDEX):
        if os.path.lexists(folder / name):
            raise refusal(
                show_path(folder),
                f"both {EXPORT} and {name}",
                "an exported folder or a checkpoint, not both in one",
            )
    record = decode_record(_read_small(folder / RECORD), show_path(folder / RECORD))
    if _read_small(folder / EXPORT) != record.summary():
        location = show_path(folder / EXPORT)
        raise refusal(location, f"other bytes than {RECORD} has", f"a copy of them: {AGAIN}")
    for name in record.files:
        _check_exists(folder / name)
    return ExportFolder(folder, source, record)


def _read_small(path: Path) -> bytes:
    """A file of at most `MAX_BYTES`."""
    _check_exists(path)
    return bytes(read_file(path, MAX_BYTES))


def _check_exists(path: Path) -> None:
    if not os.path.lexists(path):
        raise refusal(show_path(path), "no such file", "it, as part of the export")
