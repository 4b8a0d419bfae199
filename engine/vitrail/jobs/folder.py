"""A folder of embeddings, written in parts, so that an interruption loses one part at most.

``_job.json`` comes first and records the inputs, the model and the options; a folder is resumed
only with the same record. Each part is written under a temporary name, synced, read back, compared
and renamed. Then a line of ``_manifest.jsonl`` names its files with their SHA-256. Readers ignore
every file without such a line. Part boundaries depend only on the list of inputs, so a job that was
interrupted gives the same bytes as a job that was not.

Several processes or machines share a folder if each writes a `Shard`: its parts have the numbers
and names that they have in an unsharded run, and each shard has a manifest and drafts of its own. A
run skips the parts that any manifest names.

pyarrow, Spark and DuckDB skip names that begin with an underscore, and read the folder of the
layout "parquet" as one table. `part_files` describes the layouts.
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.durable import draft_prefix, put_file, sync
from vitrail.errors import InputError
from vitrail.jobs.arrow import pyarrow_modules
from vitrail.jobs.embedder import Embedder, cut_chunks
from vitrail.jobs.job_record import JOB, job_record, start_job
from vitrail.jobs.listing import Source, path_text
from vitrail.jobs.locks import LOCK, job_lock, other_counts, part_lock
from vitrail.jobs.manifest import (
    PartRecord,
    commit,
    manifest_files,
    manifest_name,
    part_records,
    read_manifest,
)
from vitrail.jobs.part_files import PATTERNS, SUBFOLDERS, decode_part, encode_part, outcomes
from vitrail.jobs.rows import EmbeddingRows, EmbedOptions, Summary, narrow
from vitrail.jobs.shards import WHOLE, Shard


@dataclass(slots=True)
class FolderSummary(Summary):
    """Counts the inputs and parts of the run's shard, and the parts that this run wrote.

    ``repaired`` lists parts whose files were missing or cut, which it wrote again. ``job_parts``
    and ``job_committed`` count the parts of all shards.
    """

    shard: Shard = WHOLE
    parts: int = 0
    written: int = 0
    repaired: list[int] = field(default_factory=list)
    job_parts: int = 0
    job_committed: int = 0

    def skip(self, record: PartRecord) -> None:
        """Counts a part that was committed before."""
        self.inputs += record.inputs
        self.failed += record.inputs - record.embedded

    def to_dict(self) -> dict[str, Any]:
        counts = {"parts": self.parts, "written": self.written, "repaired": self.repaired}
        job = {"job_parts": self.job_parts, "job_committed": self.job_committed}
        return Summary.to_dict(self) | {"shard": str(self.shard)} | counts | job

    def __str__(self) -> str:
        run = f"shard {self.shard}: " if self.shard.count > 1 else ""
        return f"{run}{Summary.__str__(self)}; wrote {self.written} of {self.parts} parts"

    @property
    def job_state(self) -> str:
        """How much of the job all shards have committed."""
        if self.job_committed == self.job_parts:
            return f"all {self.job_parts} parts of the job are committed"
        return (
            f"{self.job_committed} of the job's {self.job_parts} parts are committed; other shards "
            "write the rest"
        )


@dataclass(slots=True)
class _FailureStreak:
    """The number of consecutive failures, across the parts that this run computes."""

    limit: int
    length: int = 0

    def add(self, source: Source, error: str | None) -> None:
        self.length = 0 if error is None else self.length + 1
        if self.limit and self.length == self.limit:
            raise InputError(
                f"{self.length} inputs in a row failed, the last {path_text(source)}: {error}; "
                "stopped before this part was committed. Once the storage is back, run the same "
                "command again to resume, or use --stop-after 0 to record them as failures"
            )


def embed_to_folder(
    embedder: Embedder,
    sources: Sequence[Source],
    out: Path,
    options: EmbedOptions,
    progress: Callable[[int], None] = lambda done: None,
) -> FolderSummary:
    """Writes the missing parts of ``options.shard``. ``progress`` gets the shard's inputs done.

    The same call again resumes after an interruption, rewrites a part whose files are missing or
    have another size, and leaves a finished folder alone. ``options.overwrite`` starts from scratch
    and deletes the files of an earlier job, but no other files.

    Raises InputError if the folder holds another job or other files, if another process writes the
    folder or the shard, if it cannot be written (for example, a full disk; committed parts stay),
    or if ``options.stop_after`` inputs fail in a row, which suggests lost storage.
    """
    check_folder(out)
    job, shard = job_record(embedder, sources, options), options.shard
    with job_lock(out, shard), _disk_errors(out, shard):
        if options.overwrite:
            _delete_job(out)
        job = start_job(out, job, shard)
        _delete_drafts(out, shard)
        starts = range(0, len(sources), options.part_size)
        summary = FolderSummary(shard=shard, job_parts=len(starts))
        missing = _missing_parts(out, summary)
        progress(summary.inputs)
        streak = _FailureStreak(options.stop_after)
        asked: deque[int] = deque()  # the parts whose rows are still to come

        def chunks() -> Iterator[Sequence[Source]]:
            for number in missing:
                if record := _committed_elsewhere(out, number, shard):
                    summary.skip(record)
                    continue
                asked.append(number)
                start = starts[number]
                yield from cut_chunks(sources[start : start + options.part_size], options)

        for first in (computed := embedder.rows(chunks(), options)):
            number = asked.popleft()
            start = starts[number]
            rows = _gather_part(
                itertools.chain([first], computed),
                sources[start : start + options.part_size],
                streak,
                lambda done: progress(summary.inputs + done),
            )
            _commit_part(out, number, start, rows, job, summary)
            progress(summary.inputs)
        summary.job_committed = len(read_manifest(out))
    return summary


def _missing_parts(out: Path, summary: FolderSummary) -> list[int]:
    """The parts of the summary's shard that are to be written; counts the shard's parts."""
    missing = []
    committed = read_manifest(out)
    parts = summary.shard.parts(summary.job_parts)
    for number in parts:
        if number in committed and committed[number].is_complete(out):
            summary.skip(committed[number])
        else:
            missing.append(number)
    summary.parts = len(parts)
    summary.repaired = [number for number in missing if number in committed]
    return missing


def _gather_part(
    computed: Iterator[EmbeddingRows],
    sources: Sequence[Source],
    streak: _FailureStreak,
    progress: Callable[[int], None],
) -> EmbeddingRows:
    """All rows of a part, from those that the embedder gives next."""
    errors: list[str | None] = []
    embeddings = []
    while len(errors) < len(sources):
        rows = next(computed)
        for source, error in zip(rows.sources, rows.errors, strict=True):
            streak.add(source, error)
        errors += rows.errors
        embeddings.append(rows.embeddings)
        progress(len(errors))
    return EmbeddingRows(sources, errors, np.concatenate(embeddings))


def _commit_part(
    out: Path,
    number: int,
    start: int,
    rows: EmbeddingRows,
    job: dict[str, Any],
    summary: FolderSummary,
) -> None:
    """Writes and commits a part, unless a shard of another count was quicker."""
    shard = summary.shard
    with part_lock(out, number) if shard.count > 1 else nullcontext():
        if record := _committed_elsewhere(out, number, shard):
            summary.skip(record)
            return
        commit(out, _write_part(out, number, start, rows, job, shard), shard)
    summary.add(rows)
    summary.written += 1


def _committed_elsewhere(out: Path, number: int, shard: Shard) -> PartRecord | None:
    """The record of a part that a shard of another count has committed since this run began.

    A run of all parts is alone in its folder, and the shards of one count never share a part. So
    this need not look for manifests, which takes long in a folder of many parts.
    """
    if shard.count == 1:
        return None
    others = (Shard(number % count, count) for count in other_counts(out, shard.count))
    manifests = [file for other in others if (file := out / manifest_name(other)).exists()]
    records = part_records(manifests).get(number, [])
    return next((record for record in records if record.is_complete(out)), None)


def _write_part(
    out: Path, number: int, start: int, rows: EmbeddingRows, job: dict[str, Any], shard: Shard
) -> PartRecord:
    values = narrow(rows, job["dtype"])
    for subfolder in SUBFOLDERS[job["layout"]]:
        (out / subfolder).mkdir(exist_ok=True)
    files = encode_part(number, rows, values, job)
    paths, decoded, failures = decode_part(files)
    if decoded.tobytes() != values.tobytes() or (paths, failures) != outcomes(rows):
        raise InputError(f"{out}: part {number} does not read back as it was computed")
    entries = tuple((name, *put_file(out / name, data, shard.mark)) for name, data in files.items())
    return PartRecord(number, start, len(rows.sources), len(values), entries)


def check_folder(out: Path) -> None:
    """Raises InputError if no job can be written to ``out``. The check is cheap: call it early."""
    pyarrow_modules()
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, wanted a folder, or a name ending in .npy or .parquet")
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{out}: the folder {nearest} is not writable")
    if out.is_dir() and not (out / JOB).exists():
        foreign = sorted(
            path.name for path in out.iterdir() if not path.name.startswith((draft_prefix(), LOCK))
        )
        # Another shard may have started the job meanwhile; then its record came first.
        if foreign and not (out / JOB).exists():
            raise InputError(
                f"{out}: holds {foreign[0]!r} and no {JOB}, wanted a new folder or a former job's"
            )


@contextmanager
def _disk_errors(out: Path, shard: Shard) -> Iterator[None]:
    """Turns an OSError into an InputError that says which parts are safe; deletes drafts."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{out}: cannot write: {error.strerror or error}. {len(read_manifest(out))} committed "
            "parts are safe; free space or repair the disk, then run the same command to resume"
        ) from error
    finally:
        _delete_drafts(out, shard)


def _delete_drafts(out: Path, shard: Shard) -> None:
    """Deletes the drafts that a killed run has left: those of the shard, or all if it is alone."""
    for draft in out.rglob(f"{draft_prefix(shard.mark)}*"):
        draft.unlink(missing_ok=True)


def _delete_job(out: Path) -> None:
    """Deletes an earlier job's files: first its manifests, so that no reader trusts the rest."""
    for path in (*manifest_files(out), out / JOB):
        path.unlink(missing_ok=True)
    sync(out)
    for pattern in PATTERNS:
        for file in out.glob(pattern):
            file.unlink()
