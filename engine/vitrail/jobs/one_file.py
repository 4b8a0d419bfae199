"""Embeddings of a list of images in one file, with an entry for each input.

``.npy`` holds the embeddings of the readable images, float (K, D). Beside it, ``.csv`` has a line
per input (path, status, error, row of the array), and ``.json`` records the model, the settings and
the version. ``.parquet`` holds all of this in one file; the embedding of a failure is null.
A file gets its name only when it is complete.
"""

import csv
import io
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitrail.durable import draft_files, publish, sync, writing
from vitrail.errors import InputError
from vitrail.jobs.arrow import pyarrow_modules, table_rows, table_schema
from vitrail.jobs.embedder import Embedder, cut_chunks, describe_run
from vitrail.jobs.listing import Source, path_text
from vitrail.jobs.rows import EmbeddingRows, EmbedOptions, Summary, narrow
from vitrail.jobs.shards import WHOLE, Shard

ROW_GROUP = 8192  # parquet rows written together

Write = Callable[[EmbeddingRows, npt.NDArray[Any]], None]
"""Appends rows; the array holds their embeddings, narrowed."""


def embed_to_file(
    embedder: Embedder,
    sources: Sequence[Source],
    out: Path,
    options: EmbedOptions,
    progress: Callable[[int], None] = lambda done: None,
) -> Summary:
    """Embeds ``sources`` into ``out`` (.npy or .parquet). ``progress`` gets the inputs done so far.

    Writes nothing if every input fails. Raises InputError if ``out`` cannot be written, if it
    exists and ``options.overwrite`` is false, or if a value exceeds float16's range.
    """
    check_file(out, options.overwrite, options.shard)
    about = describe_run(embedder, options)
    summary = Summary()
    writer = _parquet_writer if out.suffix == ".parquet" else _npy_writer
    with writing(out), draft_files(_targets(out)) as drafts:
        with writer(list(drafts), about) as write:
            for rows in embedder.rows(cut_chunks(sources, options), options):
                summary.add(rows)
                write(rows, narrow(rows, options.precision))
                progress(summary.inputs)
        if summary.failed < summary.inputs:
            for draft in drafts:
                sync(draft)
            publish(drafts)
    return summary


def check_file(out: Path, overwrite: bool, shard: Shard = WHOLE) -> None:
    """Raises InputError if ``out`` cannot be written. The check is cheap: call it early."""
    if shard.count > 1:
        raise InputError(
            f"{out}: shard {shard} cannot write one file; name a folder, which the shards share, "
            "or embed everything in this process with --shard 0/1"
        )
    if out.suffix not in (".npy", ".parquet"):
        raise InputError(
            f"{out}: got the extension {out.suffix!r}, wanted .npy or .parquet, or "
            "the name of a folder without one"
        )
    if not out.parent.is_dir():
        raise InputError(f"{out}: the folder {out.parent} does not exist")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise InputError(f"{out}: the folder {out.parent} is not writable")
    for target in _targets(out):
        if target.is_dir():
            raise InputError(f"{target}: is a folder, wanted the name of a file")
        if target.exists() and not overwrite:
            raise InputError(f"{target}: exists already (--overwrite, or overwrite=True, replaces)")
    if out.suffix == ".parquet":
        pyarrow_modules()


def _targets(out: Path) -> list[Path]:
    """The files of an output. ``out`` comes last: once it exists, the others exist too."""
    if out.suffix == ".parquet":
        return [out]
    return [out.with_suffix(".csv"), out.with_suffix(".json"), out]


@contextmanager
def _npy_writer(files: Sequence[Path], about: dict[str, Any]) -> Iterator[Write]:
    table, sidecar, array = files
    inputs = embedded = 0
    with open(table, "xb") as lines, open(array, "xb") as data:

        def write(rows: EmbeddingRows, values: npt.NDArray[Any]) -> None:
            nonlocal inputs, embedded
            lines.write(_csv_lines(rows, embedded))
            data.write(np.ascontiguousarray(values).data)
            inputs, embedded = inputs + len(rows.sources), embedded + len(values)

        lines.write(b"path,status,error,row\r\n")
        data.write(_npy_header(0, about))
        yield write
        data.seek(0)
        data.write(_npy_header(embedded, about))
    counts = {"inputs": inputs, "embedded": embedded}
    sidecar.write_text(json.dumps(about | counts, indent=2) + "\n")


def _npy_header(rows: int, about: dict[str, Any]) -> bytes:
    """Version 1.0 of NumPy's format, always 128 bytes, so that the row count can be filled in."""
    dtype = np.dtype(about["dtype"]).newbyteorder("<").str
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': ({rows}, {about['width']}), }}"
    return struct.pack("<6sBBH117sc", b"\x93NUMPY", 1, 0, 118, text.ljust(117).encode(), b"\n")


def _csv_lines(rows: EmbeddingRows, row: int) -> bytes:
    """A line per input; ``row`` is the array row of the next readable image."""
    text = io.StringIO(newline="")
    lines = csv.writer(text)
    for source, error in zip(rows.sources, rows.errors, strict=True):
        lines.writerow(
            [path_text(source), "ok" if error is None else "error", error, None if error else row]
        )
        row += error is None
    return text.getvalue().encode()


@contextmanager
def _parquet_writer(files: Sequence[Path], about: dict[str, Any]) -> Iterator[Write]:
    pa, parquet = pyarrow_modules()
    schema = table_schema(about)
    waiting: list[Any] = []

    def flush() -> None:
        file.write_table(pa.Table.from_batches(waiting, schema))
        waiting.clear()

    def write(rows: EmbeddingRows, values: npt.NDArray[Any]) -> None:
        waiting.append(table_rows(rows, values, schema))
        if sum(batch.num_rows for batch in waiting) >= ROW_GROUP:
            flush()

    with parquet.ParquetWriter(files[0], schema, use_dictionary=["status"]) as file:
        yield write
        flush()
