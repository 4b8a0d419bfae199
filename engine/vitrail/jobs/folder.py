"""A folder of embeddings, written in parts, so that an interruption loses one part at most.

``_job.json`` comes first and records the inputs, the model and the options; a folder is resumed
only with the same record. Each part is written under a temporary name, synced, read back, compared
and renamed. Then a line of ``_manifest.jsonl`` names its files with their SHA-256. Readers ignore
every file without such a line. Part boundaries depend only on the list of inputs, so a job that was
interrupted gives the same bytes as a job that was not.

pyarrow, Spark and DuckDB skip names that begin with an underscore, and read the folder of the
layout "parquet" as one table. `part_files` describes the layouts.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.durable import DRAFT, put_file, sync
from vitrail.errors import InputError
from vitrail.jobs.arrow import pyarrow_modules
from vitrail.jobs.embedder import Embedder, cut_chunks, describe_run
from vitrail.jobs.listing import Source, path_text
from vitrail.jobs.manifest import FORMAT, JOB, MANIFEST, PartRecord, commit, read_manifest
from vitrail.jobs.part_files import PATTERNS, SUBFOLDERS, decode_part, encode_part, outcomes
from vitrail.jobs.rows import EmbeddingRows, EmbedOptions, Summary, narrow

LOCK = "_lock"


@dataclass(slots=True)
class FolderSummary(Summary):
    """Also counts the parts, and those that this run wrote; ``repaired`` lists parts whose files
    were missing or cut, which it wrote again."""

    parts: int = 0
    written: int = 0
    repaired: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        counts = {"parts": self.parts, "written": self.written, "repaired": self.repaired}
        return Summary.to_dict(self) | counts

    def __str__(self) -> str:
        return f"{Summary.__str__(self)}; wrote {self.written} of {self.parts} parts"


@dataclass(slots=True)
class _FailureStreak:
    """The number of consecutive failures, across parts."""

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
    """Writes the missing parts of ``out``. ``progress`` gets the inputs done so far.

    The same call again resumes after an interruption, rewrites a part whose files are missing or
    have another size, and leaves a finished folder alone. ``options.overwrite`` starts from scratch
    and deletes the files of an earlier job, but no other files.

    Raises InputError if the folder holds another job or other files, if another process writes it,
    if it cannot be written (for example, a full disk; committed parts stay), or if
    ``options.stop_after`` inputs fail in a row, which suggests lost storage.
    """
    check_folder(out)
    job = _job_record(embedder, sources, options)
    with _locked(out), _disk_errors(out):
        if options.overwrite:
            _delete_job(out)
        _start_job(out, job)
        committed = read_manifest(out)
        complete = {n: record for n, record in committed.items() if _is_complete(out, record)}
        for draft in out.rglob(f"{DRAFT}*"):
            draft.unlink()
        streak = _FailureStreak(options.stop_after)
        starts = range(0, len(sources), options.part_size)
        repaired = sorted(committed.keys() - complete.keys())
        summary = FolderSummary(parts=len(starts), repaired=repaired)
        missing = (start for number, start in enumerate(starts) if number not in complete)
        chunks = (
            chunk
            for start in missing
            for chunk in cut_chunks(sources[start : start + options.part_size], options)
        )
        computed = embedder.rows(chunks, options)
        for number, start in enumerate(starts):
            part_sources = sources[start : start + options.part_size]
            if number in complete:
                summary.inputs += len(part_sources)
                summary.failed += complete[number].inputs - complete[number].embedded
            else:
                rows = _gather_part(
                    computed, part_sources, streak, lambda n: progress(summary.inputs + n)
                )
                commit(out, _write_part(out, number, start, rows, job))
                summary.add(rows)
                summary.written += 1
            progress(summary.inputs)
    return summary


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


def _write_part(
    out: Path, number: int, start: int, rows: EmbeddingRows, job: dict[str, Any]
) -> PartRecord:
    values = narrow(rows, job["dtype"])
    for subfolder in SUBFOLDERS[job["layout"]]:
        (out / subfolder).mkdir(exist_ok=True)
    files = encode_part(number, rows, values, job)
    paths, decoded, failures = decode_part(files)
    if decoded.tobytes() != values.tobytes() or (paths, failures) != outcomes(rows):
        raise InputError(f"{out}: part {number} does not read back as it was computed")
    entries = tuple((name, *put_file(out / name, data)) for name, data in files.items())
    return PartRecord(number, start, len(rows.sources), len(values), entries)


def _is_complete(out: Path, record: PartRecord) -> bool:
    """Whether each file of the part exists and has the size in its record."""
    return all(
        (out / name).is_file() and (out / name).stat().st_size == size
        for name, size, _ in record.files
    )


# -- the job record and the lock -------------------------------------------------------------------


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
            path.name for path in out.iterdir() if not path.name.startswith((DRAFT, LOCK))
        )
        if foreign:
            raise InputError(
                f"{out}: holds {foreign[0]!r} and no {JOB}, wanted a new folder or a former job's"
            )


def _job_record(
    embedder: Embedder, sources: Sequence[Source], options: EmbedOptions
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(os.fsencode(str(source)) + b"\0")
    return {
        "format": FORMAT,
        "inputs": len(sources),
        "inputs_sha256": digest.hexdigest(),
        "layout": options.layout,
        "part_size": options.part_size,
        "batch_size": options.batch_size,
        **describe_run(embedder, options),
    }


def _start_job(out: Path, job: dict[str, Any]) -> None:
    """Writes the job record; InputError if the folder has the record of a different job."""
    file = out / JOB
    if not file.exists():
        put_file(file, json.dumps(job, indent=2).encode() + b"\n")
        return
    former = json.loads(file.read_bytes())
    changed = [
        key for key in job if key not in ("model", "revision") and former.get(key) != job[key]
    ]
    if changed:
        changes = "; ".join(f"{key}: then {former.get(key)}, now {job[key]}" for key in changed)
        raise InputError(
            f"{out}: was started with other inputs or options ({changes}). Use those, another "
            "folder, or --overwrite to start from scratch"
        )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Admits one process at a time. The lock ends with the process, however the process ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"{out}: cannot write there: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise InputError(
            f"{out}: another process is writing there; wait for it or stop it"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Turns an OSError into an InputError that says which parts are safe; deletes drafts."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{out}: cannot write: {error.strerror or error}. {len(read_manifest(out))} committed "
            "parts are safe; free space or repair the disk, then run the same command to resume"
        ) from error
    finally:
        for draft in out.rglob(f"{DRAFT}*"):
            draft.unlink(missing_ok=True)


def _delete_job(out: Path) -> None:
    """Deletes an earlier job's files: first its manifest, so that no reader trusts the rest."""
    for name in (MANIFEST, JOB):
        (out / name).unlink(missing_ok=True)
    sync(out)
    for pattern in PATTERNS:
        for file in out.glob(pattern):
            file.unlink()
