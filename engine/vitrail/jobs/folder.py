"""A folder of embeddings made in parts, so that a night's work survives whatever stops it.

``_plan.json`` comes first and says what is being made: a folder goes on only with the same inputs,
model and options. Each part is written under a temporary name, synced, read back, compared and
renamed, and then one line of ``_manifest.jsonl`` names its files with their SHA-256: what the
manifest does not name is not there. Part boundaries depend on the list of inputs alone, so a job
that was stopped any number of times gives the bytes of one that was not.

Layout "parquet": ``part-00000.parquet`` with path, status, error and embedding (null for failures),
a row an input; names with an underscore are left alone by pyarrow, Spark and DuckDB, which read the
folder as one table. Layout "npy" is clip-retrieval's: ``img_emb/img_emb_00000.npy`` and
``metadata/metadata_00000.parquet`` (image_path) of good rows, ``failures/failures_00000.jsonl``.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from vitrail.durable import DRAFT, put_file, sync
from vitrail.errors import InputError
from vitrail.jobs.listing import Source, path_text
from vitrail.jobs.manifest import (
    FORMAT,
    MANIFEST,
    PLAN,
    Part,
    commit,
    parse,
    read_manifest,
)
from vitrail.jobs.one_file import (
    Precision,
    Rows,
    Summary,
    about_model,
    embed_images,
    narrow,
    pyarrow_modules,
    table_rows,
    table_schema,
)

if TYPE_CHECKING:
    from vitrail.model.model import Model

Layout = Literal["parquet", "npy"]

LOCK = "_lock"
PART_SIZE = 4096
IN_A_ROW = 100
FOLDERS = {"parquet": ("",), "npy": ("img_emb", "metadata", "failures")}
OURS = ("part-*.parquet", "img_emb/img_emb_*.npy", "metadata/metadata_*.parquet",
        "failures/failures_*.jsonl")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """What decides the numbers and the files. ``in_a_row`` failures stop a job; 0: none do."""

    layout: Layout = "parquet"
    precision: Precision = "float32"
    part_size: int = PART_SIZE
    batch_size: int | None = None
    size: tuple[int, int] | None = None
    normalize: bool = False
    in_a_row: int = IN_A_ROW


@dataclass(slots=True)
class JobSummary(Summary):
    """Also of a folder: its parts, how many of them this run made, and which it made again."""

    parts: int = 0
    made: int = 0
    again: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Streak:
    """How many inputs have failed one after the other, across parts."""

    limit: int
    length: int = 0

    def add(self, source: Source, error: str | None) -> None:
        self.length = 0 if error is None else self.length + 1
        if self.limit and self.length == self.limit:
            raise InputError(
                f"{self.length} inputs in a row failed, the last {path_text(source)}: {error}; "
                "stopped before this part was committed. If the storage is back, the same command "
                "goes on; --stop-after 0 records them as failures"
            )


def run_job(
    model: Model,
    sources: Sequence[Source],
    out: Path,
    options: Options = Options(),
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> JobSummary:
    """Makes the parts of ``out`` that are not there yet; ``progress`` gets the inputs done so far.

    The same call again goes on where an earlier one stopped, makes anew a part whose files are
    missing or of another size, and does nothing more to a finished folder. ``overwrite`` starts
    from nothing and removes a former job's files, no others.

    Raises InputError where the folder holds another job or something else, where another process
    is writing it, where it cannot be written (a full disk: what is committed stays), or where
    ``options.in_a_row`` inputs fail one after the other, which looks like lost storage.
    """
    check_folder(out)
    plan = _plan(model, sources, options)
    with _locked(out), _explained(out):
        if overwrite:
            _remove(out)
        _begin(out, plan)
        done, again = _checked(out, read_manifest(out))
        for draft in out.rglob(f"{DRAFT}*"):
            draft.unlink()
        streak = _Streak(options.in_a_row)
        starts = range(0, len(sources), options.part_size)
        summary = JobSummary(parts=len(starts), again=again)
        for number, start in enumerate(starts):
            chosen = sources[start : start + options.part_size]
            if number in done:
                _count(summary, done[number], chosen)
            else:
                rows = _embedded(
                    model, chosen, options, streak, lambda n: progress(summary.inputs + n)
                )
                commit(out, _write(out, number, start, rows, plan, options))
                summary.add(rows)
                summary.made += 1
            progress(summary.inputs)
    return summary


def _count(summary: JobSummary, part: Part, chosen: Sequence[Source]) -> None:
    summary.inputs += len(chosen)
    summary.failed += part.inputs - part.embedded


def _embedded(
    model: Model,
    sources: Sequence[Source],
    options: Options,
    streak: _Streak,
    progress: Callable[[int], None],
) -> Rows:
    """All rows of a part."""
    errors: list[str | None] = []
    embeddings = []
    for rows in embed_images(
        model,
        sources,
        batch_size=options.batch_size,
        size=options.size,
        normalize=options.normalize,
    ):
        for source, error in zip(rows.sources, rows.errors, strict=True):
            streak.add(source, error)
        errors += rows.errors
        embeddings.append(rows.embeddings)
        progress(len(errors))
    return Rows(sources, errors, np.concatenate(embeddings))


# -- the plan and the lock -------------------------------------------------------------------------


def check_folder(out: Path) -> None:
    """Raises InputError where no job can be made in ``out``; costs nothing, so ask early."""
    pyarrow_modules()
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, wanted a folder, or a name ending in .npy or .parquet")
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{out}: the folder {nearest} is not writable")
    if out.is_dir() and not (out / PLAN).exists():
        others = sorted(
            path.name for path in out.iterdir() if not path.name.startswith((DRAFT, LOCK))
        )
        if others:
            raise InputError(
                f"{out}: holds {others[0]!r} and no {PLAN}, wanted a new folder or a former job's"
            )


def _plan(model: Model, sources: Sequence[Source], options: Options) -> dict[str, Any]:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(os.fsencode(str(source)) + b"\0")
    about = about_model(model, options.size, options.normalize, options.precision)
    return {
        "format": FORMAT,
        "inputs": len(sources),
        "inputs_sha256": digest.hexdigest(),
        "layout": options.layout,
        "part_size": options.part_size,
        "batch_size": options.batch_size,
        **about,
    }


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Writes the plan, or compares it with the one that is there."""
    file = out / PLAN
    if not file.exists():
        put_file(file, json.dumps(plan, indent=2).encode() + b"\n")
        return
    former = json.loads(file.read_bytes())
    changed = [
        key for key in plan if key not in ("model", "revision") and former.get(key) != plan[key]
    ]
    if changed:
        told = "; ".join(f"{key}: then {former.get(key)}, now {plan[key]}" for key in changed)
        raise InputError(
            f"{out}: was begun with other inputs or options ({told}). Use those, another "
            "folder, or --overwrite to begin anew"
        )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One process at a time, by a lock that ends with its process however that ends."""
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
def _explained(out: Path) -> Iterator[None]:
    """Leaves no temporary file; says of a failure to write what is safe and what to do."""
    try:
        yield
    except OSError as error:
        kept = len({part.part for part in read_manifest(out)})
        raise InputError(
            f"{out}: cannot write: {error.strerror or error}. {kept} committed parts are safe; "
            "make room, or mend the disk, and the same command goes on"
        ) from error
    finally:
        for draft in out.rglob(f"{DRAFT}*"):
            draft.unlink(missing_ok=True)


def _remove(out: Path) -> None:
    """A former job's files; the manifest first, so that nothing half removed is trusted."""
    for name in (MANIFEST, PLAN):
        (out / name).unlink(missing_ok=True)
    sync(out)
    for pattern in OURS:
        for file in out.glob(pattern):
            file.unlink()


# -- parts ---------------------------------------------------------------------------------------


def _checked(out: Path, parts: Sequence[Part]) -> tuple[dict[int, Part], list[int]]:
    """Parts whose files are all there in their size, and the numbers of the others."""
    last = {part.part: part for part in parts}
    whole = {
        number: part
        for number, part in last.items()
        if all(
            (out / name).is_file() and (out / name).stat().st_size == count
            for name, count, _ in part.files
        )
    }
    return whole, sorted(last.keys() - whole.keys())


def _write(
    out: Path, number: int, start: int, rows: Rows, plan: dict[str, Any], options: Options
) -> Part:
    values = narrow(rows, options.precision)
    for folder in FOLDERS[options.layout]:
        (out / folder).mkdir(exist_ok=True)
    made = dict((_parquet if options.layout == "parquet" else _npy)(number, rows, values, plan))
    good, written, bad = parse(made)
    told = list(zip(map(path_text, rows.sources), rows.errors, strict=True))
    if (
        written.tobytes() != values.tobytes()
        or good != [path for path, error in told if error is None]
        or bad != [(path, error) for path, error in told if error is not None]
    ):
        raise InputError(f"{out}: part {number} does not read back as what was computed")
    files = tuple((name, *put_file(out / name, data)) for name, data in made.items())
    return Part(number, start, len(rows.sources), len(values), files)


def _parquet(
    number: int, rows: Rows, values: npt.NDArray[Any], plan: dict[str, Any]
) -> Iterator[tuple[str, bytes]]:
    pa, _ = pyarrow_modules()
    schema = table_schema({key: plan[key] for key in plan if not key.startswith("inputs")})
    yield (
        f"part-{number:05}.parquet",
        _table(pa.Table.from_batches([table_rows(rows, values, schema)])),
    )


def _npy(
    number: int, rows: Rows, values: npt.NDArray[Any], plan: dict[str, Any]
) -> Iterator[tuple[str, bytes]]:
    pa, _ = pyarrow_modules()
    array = io.BytesIO()
    np.save(array, values)
    yield f"img_emb/img_emb_{number:05}.npy", array.getvalue()
    told = list(zip(map(path_text, rows.sources), rows.errors, strict=True))
    good = pa.array([path for path, error in told if error is None], pa.string())
    yield f"metadata/metadata_{number:05}.parquet", _table(pa.table({"image_path": good}))
    bad = [json.dumps({"path": path, "error": error}) for path, error in told if error is not None]
    if bad:
        yield f"failures/failures_{number:05}.jsonl", "".join(f"{line}\n" for line in bad).encode()


def _table(table: Any) -> bytes:
    _, parquet = pyarrow_modules()
    data = io.BytesIO()
    parquet.write_table(
        table, data, use_dictionary=["status"] if "status" in table.column_names else False
    )
    return data.getvalue()
