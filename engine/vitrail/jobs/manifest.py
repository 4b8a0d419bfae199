"""The manifest of a job's folder, a line per committed part, and the reader that trusts it."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitrail.durable import sync, write_all
from vitrail.errors import InputError
from vitrail.jobs.part_files import decode_part

FORMAT = 1
JOB, MANIFEST = "_job.json", "_manifest.jsonl"


@dataclass(frozen=True, slots=True)
class PartRecord:
    """A committed part: ``inputs`` inputs from ``start`` on; files as (name, bytes, SHA-256)."""

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


def read_manifest(out: Path) -> dict[int, PartRecord]:
    """The committed parts by number. If a part has several lines, its last line counts.

    A last line without a line end is a commit that never happened. Raises InputError if another
    line is damaged.
    """
    if not (out / MANIFEST).exists():
        return {}
    records = {}
    lines = (out / MANIFEST).read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            fields = json.loads(line)
            files = tuple((f["name"], f["bytes"], f["sha256"]) for f in fields["files"])
            counts = {key: int(fields[key]) for key in ("part", "start", "inputs", "embedded")}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{out / MANIFEST}: line {number} is damaged: {error}") from error
        records[counts["part"]] = PartRecord(**counts, files=files)
    return records


def commit(out: Path, record: PartRecord) -> None:
    """Appends the record's line, after it cuts off the unfinished line of an earlier crash."""
    descriptor = os.open(out / MANIFEST, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.ftruncate(descriptor, end)
        write_all(descriptor, record.line(), end)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync(out)


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The result of a job: ``embeddings`` (K, D), float32 or float16, and a path for each row.

    ``errors`` holds the failures as (path, reason). ``job`` is the record of the model, the inputs
    and the options.
    """

    paths: list[str]
    embeddings: npt.NDArray[Any]
    errors: list[tuple[str, str]]
    job: dict[str, Any]


def read_embeddings(folder: str | os.PathLike[str]) -> Embeddings:
    """The committed parts of a job's folder in input order, each checked against its SHA-256.

    Raises InputError if the folder holds no job, or a file differs from its line in the manifest.
    """
    out = Path(folder)
    if not (out / JOB).is_file():
        raise InputError(f"{out}: has no {JOB}, wanted the folder of a vitrail embed job")
    job = json.loads((out / JOB).read_bytes())
    records = [record for _, record in sorted(read_manifest(out).items())]
    rows = sum(record.embedded for record in records)
    embeddings = np.empty((rows, job["width"]), job["dtype"])
    paths: list[str] = []
    errors: list[tuple[str, str]] = []
    for record in records:
        files = {name: _read_checked(out / name, sha256) for name, _, sha256 in record.files}
        part_paths, values, failures = decode_part(files)
        embeddings[len(paths) : len(paths) + len(part_paths)] = values
        paths += part_paths
        errors += failures
    return Embeddings(paths, embeddings, errors, job)


def _read_checked(file: Path, sha256: str) -> bytes:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(
            f"{file}: is not what the manifest says (SHA-256); delete it, run the job again"
        )
    return data
