"""The manifest of a job's folder, a line a part, and reading the embeddings it vouches for."""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitrail.durable import sync, write_all
from vitrail.errors import InputError
from vitrail.jobs.one_file import pyarrow_modules

FORMAT = 1
PLAN, MANIFEST = "_plan.json", "_manifest.jsonl"


@dataclass(frozen=True, slots=True)
class Part:
    """A committed part: inputs from ``start`` on, and its files as name, bytes and SHA-256."""

    part: int
    start: int
    inputs: int
    embedded: int
    files: tuple[tuple[str, int, str], ...]

    def line(self) -> bytes:
        files = [dict(zip(("name", "bytes", "sha256"), file, strict=True)) for file in self.files]
        counts = {"part": self.part, "start": self.start, "inputs": self.inputs}
        counts |= {"embedded": self.embedded, "failed": self.inputs - self.embedded}
        return json.dumps({**counts, "files": files}).encode() + b"\n"


def read_manifest(out: Path) -> list[Part]:
    """The committed parts, in the order of their commits; the last line of a part counts.

    A last line without its end is a commit that never happened. Raises InputError for a line that
    is damaged otherwise.
    """
    if not (out / MANIFEST).exists():
        return []
    parts = []
    lines = (out / MANIFEST).read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            given = json.loads(line)
            files = tuple((f["name"], f["bytes"], f["sha256"]) for f in given["files"])
            counts = {key: int(given[key]) for key in ("part", "start", "inputs", "embedded")}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{out / MANIFEST}: line {number} is damaged: {error}") from error
        parts.append(Part(**counts, files=files))
    return parts


def commit(out: Path, part: Part) -> None:
    """Appends the part's line. What an earlier crash left of a line is cut off first."""
    descriptor = os.open(out / MANIFEST, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(descriptor, whole)
        write_all(descriptor, part.line(), whole)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync(out)


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Embeddings:
    """What a job made: ``embeddings`` (K, D) float32 or float16 with a path a row.

    ``errors`` holds the failures as (path, reason).
    """

    paths: list[str]
    embeddings: npt.NDArray[Any]
    errors: list[tuple[str, str]]
    plan: dict[str, Any]


def read_embeddings(folder: str | os.PathLike[str]) -> Embeddings:
    """The committed parts of a job's folder in input order, each checked against its SHA-256.

    Raises InputError where the folder holds no job, or a file is not what the manifest says.
    """
    out = Path(folder)
    if not (out / PLAN).is_file():
        raise InputError(f"{out}: no {PLAN} there, wanted the folder of a vitrail embed job")
    plan = json.loads((out / PLAN).read_bytes())
    last = {part.part: part for part in read_manifest(out)}
    parts = [last[number] for number in sorted(last)]
    every = np.empty((sum(part.embedded for part in parts), plan["width"]), np.dtype(plan["dtype"]))
    paths: list[str] = []
    errors: list[tuple[str, str]] = []
    for part in parts:
        files = {name: _vouched(out, name, sha256) for name, _, sha256 in part.files}
        good, values, bad = parse(files)
        every[len(paths) : len(paths) + len(good)] = values
        paths += good
        errors += bad
    return Embeddings(paths, every, errors, plan)


def _vouched(out: Path, name: str, sha256: str) -> bytes:
    try:
        data = (out / name).read_bytes()
    except OSError as error:
        raise InputError(f"{out / name}: cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(
            f"{out / name}: is not what the manifest says (SHA-256); delete it, run the job again"
        )
    return data


def _table(data: bytes) -> Any:
    # read_table leaves the bytes to a thread of its own, which aborts the process where it lets go
    # of them while the interpreter ends. ParquetFile reads in this thread.
    pa, parquet = pyarrow_modules()
    with parquet.ParquetFile(pa.BufferReader(data)) as file:
        return file.read(use_threads=False)


def parse(files: dict[str, bytes]) -> tuple[list[str], npt.NDArray[Any], list[tuple[str, str]]]:
    """A part's files by name -> its good paths, their embeddings (K, D), and the failures."""
    tables = [_table(data) for name, data in files.items() if name.endswith(".parquet")]
    (table,) = tables
    if "embedding" not in table.column_names:
        (array,) = (data for name, data in files.items() if name.endswith(".npy"))
        lines = b"".join(data for name, data in files.items() if name.endswith(".jsonl"))
        bad = [(line["path"], line["error"]) for line in map(json.loads, lines.splitlines())]
        values = np.load(io.BytesIO(array))
        return table["image_path"].to_pylist(), values, bad
    good, bad = [], []
    for path, error in zip(table["path"].to_pylist(), table["error"].to_pylist(), strict=True):
        if error is None:
            good.append(path)
        else:
            bad.append((path, error))
    column = table["embedding"].combine_chunks()
    width = column.type.list_size
    return good, column.drop_null().flatten().to_numpy().reshape(-1, width), bad
