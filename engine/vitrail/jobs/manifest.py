"""The manifests of a job's folder, a line per committed part, and the reader that trusts them.

An unsharded run appends to ``_manifest.jsonl``, shard K of N to ``_manifest-K-of-N.jsonl``.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitrail.durable import sync, write_all
from vitrail.errors import InputError
from vitrail.jobs.job_record import read_job
from vitrail.jobs.part_files import decode_part
from vitrail.jobs.shards import WHOLE, Shard

MANIFEST = "_manifest.jsonl"  # an unsharded run's


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

    def is_complete(self, out: Path) -> bool:
        """Whether each file of the part exists and has the size in the record."""
        return all(
            (out / name).is_file() and (out / name).stat().st_size == size
            for name, size, _ in self.files
        )


def manifest_name(shard: Shard) -> str:
    return f"{MANIFEST.removesuffix('.jsonl')}{shard.mark}.jsonl"


def manifest_files(out: Path) -> list[Path]:
    """The manifests of the folder's unsharded run and of its shards, of whatever count."""
    named = re.compile(r"_manifest(-\d+-of-\d+)?\.jsonl")
    return sorted(path for path in out.glob("_manifest*.jsonl") if named.fullmatch(path.name))


def read_manifest(out: Path) -> dict[int, PartRecord]:
    """The committed parts of all manifests by number; a part that several name counts once.

    Of several records, the first whose files are complete counts. Raises InputError as
    `part_records`.
    """
    return {
        number: next((record for record in records if record.is_complete(out)), records[-1])
        if len(records) > 1
        else records[0]
        for number, records in part_records(manifest_files(out)).items()
    }


def part_records(manifests: Iterable[Path]) -> dict[int, list[PartRecord]]:
    """The different records of each committed part. Within a manifest, the last line counts.

    A last line without a line end is a commit that never happened. Raises InputError if another
    line is damaged.
    """
    records: dict[int, list[PartRecord]] = {}
    for manifest in manifests:
        for number, record in sorted(_read_lines(manifest).items()):
            others = records.setdefault(number, [])
            if record not in others:
                others.append(record)
    return records


def _read_lines(manifest: Path) -> dict[int, PartRecord]:
    records = {}
    lines = manifest.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            fields = json.loads(line)
            files = tuple((f["name"], f["bytes"], f["sha256"]) for f in fields["files"])
            counts = {key: int(fields[key]) for key in ("part", "start", "inputs", "embedded")}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{manifest}: line {number} is damaged: {error}") from error
        records[counts["part"]] = PartRecord(**counts, files=files)
    return records


def commit(out: Path, record: PartRecord, shard: Shard = WHOLE) -> None:
    """Appends the record's line to the shard's manifest.

    Before, it cuts off the unfinished line of an earlier crash.
    """
    descriptor = os.open(out / manifest_name(shard), os.O_RDWR | os.O_CREAT, 0o644)
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

    @property
    def missing(self) -> int:
        """The number of inputs with neither a row nor an error: their parts are not committed."""
        inputs: int = self.job["inputs"]
        return inputs - len(self.paths) - len(self.errors)


Folder = str | os.PathLike[str]


def read_embeddings(folders: Folder | Sequence[Folder]) -> Embeddings:
    """The committed parts of a job in input order, each checked against its SHA-256.

    ``folders``: the job's folder, with any number of shards in it; or several folders with shards
    of the same job, for example from the disks of several machines. A part that is there several
    times counts once. If the job is not finished, `Embeddings.missing` is over 0.

    Raises InputError if a folder holds no job, if two hold different jobs, or if the files of a
    part differ from their line in the manifest.
    """
    outs = [Path(f) for f in ([folders] if isinstance(folders, str | os.PathLike) else folders)]
    if not outs:
        raise InputError("folders: got none, wanted one or more folders of a vitrail embed job")
    job = read_job(outs)
    copies: dict[int, list[tuple[Path, PartRecord]]] = {}
    for out in outs:
        for number, records in part_records(manifest_files(out)).items():
            copies.setdefault(number, []).extend((out, record) for record in records)
    rows = sum(max(record.embedded for _, record in parts) for parts in copies.values())
    embeddings = np.empty((rows, job["width"]), job["dtype"])
    paths: list[str] = []
    errors: list[tuple[str, str]] = []
    for _, part_copies in sorted(copies.items()):
        part_paths, values, failures = decode_part(_read_copy(part_copies))
        embeddings[len(paths) : len(paths) + len(part_paths)] = values
        paths += part_paths
        errors += failures
    return Embeddings(paths, embeddings[: len(paths)], errors, job)


def _read_copy(copies: Sequence[tuple[Path, PartRecord]]) -> dict[str, bytes]:
    """The files of the first copy of a part that is what its manifest says."""
    refusals = []
    for out, record in copies:
        try:
            return {name: _read_checked(out / name, sha256) for name, _, sha256 in record.files}
        except InputError as error:
            refusals.append(error)
    raise refusals[0]


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
