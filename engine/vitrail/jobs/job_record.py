"""The record of a job, ``_job.json``: its inputs, model and options, the same for all shards."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vitrail.durable import put_file, sync
from vitrail.errors import InputError
from vitrail.jobs.embedder import Embedder, describe_run
from vitrail.jobs.listing import Source
from vitrail.jobs.rows import EmbedOptions
from vitrail.jobs.shards import Shard

FORMAT = 1
JOB = "_job.json"
_OF_NO_NUMBER = frozenset({"model", "revision", "vitrail"})


def job_record(
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


def start_job(out: Path, job: dict[str, Any], shard: Shard) -> dict[str, Any]:
    """Writes the job record, unless the folder has one; returns the record of the folder.

    All parts are written with that record, wherever a shard has loaded the model from. Raises
    InputError if the folder's record is that of a different job.
    """
    file = out / JOB
    if not file.exists():
        data = json.dumps(job, indent=2).encode() + b"\n"
        with suppress(FileExistsError):  # another shard was quicker: its record counts
            put_file(file, data, shard.mark, replace=False)
            return job
        sync(out)  # opening a folder of a network file system refreshes its names
    former = _read_record(out)
    if changed := changed_fields(former, job):
        if former.get("vitrail") != job.get("vitrail"):  # the reason why a fingerprint is another
            changed.append("vitrail")
        changes = "; ".join(f"{key}: then {former.get(key)}, now {job.get(key)}" for key in changed)
        scratch = "--overwrite" if shard.count == 1 else "delete this folder"
        raise InputError(
            f"{out}: was started with other inputs or options ({changes}). Use those, another "
            f"folder, or {scratch} to start from scratch"
        )
    return former


def read_job(folders: Sequence[Path]) -> dict[str, Any]:
    """The record of the job that all ``folders`` hold.

    Raises InputError if a folder holds no job, or another job than the first.
    """
    jobs: list[dict[str, Any]] = []
    for folder in folders:
        if not (folder / JOB).is_file():
            raise InputError(f"{folder}: has no {JOB}, wanted the folder of a vitrail embed job")
        jobs.append(_read_record(folder))
        if changed := changed_fields(jobs[0], jobs[-1]):
            values = "; ".join(
                f"{key}: {jobs[0].get(key)} and {jobs[-1].get(key)}" for key in changed
            )
            raise InputError(
                f"{folders[0]} and {folder}: hold different jobs ({values}), wanted shards of one"
            )
    return jobs[0]


def _read_record(folder: Path) -> dict[str, Any]:
    """Raises InputError if the record is damaged or has another format."""
    file = folder / JOB
    try:
        job = json.loads(file.read_bytes())
    except ValueError as error:
        raise InputError(f"{file}: is damaged: {error}; write the job to another folder") from error
    if not isinstance(job, dict) or job.get("format") != FORMAT:
        fields = job if isinstance(job, dict) else {}
        raise InputError(
            f"{file}: got format {fields.get('format')!r}, wanted {FORMAT}; use the version of "
            f"Vitrail that wrote it ({fields.get('vitrail', 'not named')})"
        )
    return job


def changed_fields(former: Mapping[str, Any], job: Mapping[str, Any]) -> list[str]:
    """The fields that make two records those of different jobs.

    Where the model was loaded from does not, nor does the version of Vitrail: the fingerprint says
    which numbers come out.
    """
    keys = [key for key in dict.fromkeys((*job, *former)) if key not in _OF_NO_NUMBER]
    return [key for key in keys if former.get(key) != job.get(key)]
