"""Lists of images to one file of embeddings, with a row for each input: good, or bad and why.

``.npy`` holds the good rows alone, float (K, D); beside it a ``.csv`` has a line per input (path,
status, error, row of the array) and a ``.json`` says which model, settings and version made them.
``.parquet`` holds it all in one file, with null embeddings for failures.
A file appears under its own name only once it is complete.
"""

from __future__ import annotations

import csv
import io
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from vitrail._version import __version__
from vitrail.dtypes import dtype_name
from vitrail.durable import draft_files, publish, sync, writing
from vitrail.errors import InputError
from vitrail.jobs.listing import Source, path_text

if TYPE_CHECKING:
    from vitrail.model.model import Model

Precision = Literal["float32", "float16"]
Floats = npt.NDArray[np.float32]

CALL = 256  # images a call where the caller names no batch size: four batches of decoded images
BATCHES = 4  # batches a call else: the model decodes the next while it computes one
ROW_GROUP = 8192  # parquet rows written together
REASONS = 5  # failures a summary quotes


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive inputs; where ``errors[i]`` is None, input i has the next row of embeddings."""

    sources: Sequence[Source]
    errors: Sequence[str | None]
    embeddings: Floats  # (inputs without error, D)


def embed_images(
    model: Model,
    sources: Sequence[Source],
    *,
    batch_size: int | None = None,
    size: tuple[int, int] | None = None,
    normalize: bool = False,
) -> Iterator[Rows]:
    """Embeds a batch at a time, so that one batch of pixels is in memory, never all of them."""
    step = BATCHES * batch_size if batch_size else CALL
    for start in range(0, len(sources), step):
        batch = sources[start : start + step]
        result = model.encode_image(
            batch, batch_size=batch_size, size=size, normalize=normalize, on_error="skip"
        )
        errors: list[str | None] = [None] * len(batch)
        for position, reason in result.errors.items():
            errors[position] = reason.removeprefix(f"image {position}: ")
        yield Rows(batch, errors, result.embeddings.numpy())


Write = Callable[[Rows, npt.NDArray[Any]], None]


@dataclass(slots=True)
class Summary:
    """What became of the inputs; ``reasons`` quotes the first failures as (source, reason)."""

    inputs: int = 0
    failed: int = 0
    reasons: list[tuple[Source, str]] = field(default_factory=list)

    def add(self, rows: Rows) -> None:
        bad = [(s, e) for s, e in zip(rows.sources, rows.errors, strict=True) if e is not None]
        self.inputs += len(rows.sources)
        self.failed += len(bad)
        self.reasons += bad[: REASONS - len(self.reasons)]


def embed(
    model: Model,
    sources: Sequence[Source],
    out: Path,
    *,
    batch_size: int | None = None,
    size: tuple[int, int] | None = None,
    normalize: bool = False,
    precision: Precision = "float32",
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Summary:
    """Embeds ``sources`` into ``out`` (.npy or .parquet); ``progress`` gets the inputs done so far.

    Where every input fails nothing is written. Raises InputError where ``out`` cannot be written,
    or exists without ``overwrite``, or a value leaves float16's range.
    """
    check_output(out, overwrite)
    about = about_model(model, size, normalize, precision)
    summary = Summary()
    with writing(out), draft_files(_targets(out)) as drafts:
        with (_parquet if out.suffix == ".parquet" else _npy)(list(drafts), about) as write:
            for rows in embed_images(
                model, sources, batch_size=batch_size, size=size, normalize=normalize
            ):
                summary.add(rows)
                write(rows, narrow(rows, precision))
                progress(summary.inputs)
        if summary.failed < summary.inputs:
            for draft in drafts:
                sync(draft)
            publish(drafts)
    return summary


def check_output(out: Path, overwrite: bool) -> None:
    """Raises InputError where ``embed`` could not write ``out``; costs nothing, so ask early."""
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
    """The files an output consists of; the one that says the rest is there comes last."""
    if out.suffix == ".parquet":
        return [out]
    return [out.with_suffix(".csv"), out.with_suffix(".json"), out]


def about_model(
    model: Model, size: tuple[int, int] | None, normalize: bool, precision: Precision
) -> dict[str, Any]:
    """What made the numbers, ready for JSON."""
    vision = model.spec.vision
    if vision is None:
        raise InputError(
            f"{model.spec.architecture} has no image tower, wanted one to embed images"
        )
    return {
        "vitrail": __version__,
        "model": model.source,
        "revision": model.revision,
        "fingerprint": model.fingerprint,
        "compute_dtype": dtype_name(model.dtype),
        "size": list(size) if size else None,
        "normalized": normalize,
        "width": vision.embedding,
        "dtype": precision,
    }


def narrow(rows: Rows, precision: Precision) -> npt.NDArray[Any]:
    """The embeddings in the precision they are stored in; InputError beyond float16's range."""
    if precision == "float32":
        return rows.embeddings
    with np.errstate(over="ignore"):
        narrow = rows.embeddings.astype(np.float16)
    if not np.isfinite(narrow).all():
        largest = float(np.abs(rows.embeddings).max())
        raise InputError(f"float16 output: got an embedding value of {largest:.4g}, wanted < 65504")
    return narrow


@contextmanager
def _npy(names: Sequence[Path], about: dict[str, Any]) -> Iterator[Write]:
    table, sidecar, array = names
    inputs = good = 0
    with open(table, "xb") as lines, open(array, "xb") as data:

        def write(rows: Rows, values: npt.NDArray[Any]) -> None:
            nonlocal inputs, good
            lines.write(_csv_lines(rows, good))
            data.write(np.ascontiguousarray(values).data)
            inputs, good = inputs + len(rows.sources), good + len(values)

        lines.write(b"path,status,error,row\r\n")
        data.write(_npy_header(0, about))
        yield write
        data.seek(0)
        data.write(_npy_header(good, about))
    counts = {"inputs": inputs, "embedded": good}
    sidecar.write_text(json.dumps(about | counts, indent=2) + "\n")


def _npy_header(rows: int, about: dict[str, Any]) -> bytes:
    """Version 1.0 of NumPy's format, always 128 bytes, so that the row count can come last."""
    kind = np.dtype(about["dtype"]).newbyteorder("<").str
    text = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': ({rows}, {about['width']}), }}"
    return struct.pack("<6sBBH117sc", b"\x93NUMPY", 1, 0, 118, text.ljust(117).encode(), b"\n")


def _csv_lines(rows: Rows, row: int) -> bytes:
    text = io.StringIO(newline="")
    lines = csv.writer(text)
    for source, error in zip(rows.sources, rows.errors, strict=True):
        lines.writerow(
            [path_text(source), "ok" if error is None else "error", error, None if error else row]
        )
        row += error is None
    return text.getvalue().encode()


@contextmanager
def _parquet(names: Sequence[Path], about: dict[str, Any]) -> Iterator[Write]:
    pa, parquet = pyarrow_modules()
    schema = table_schema(about)
    waiting: list[Any] = []

    def flush() -> None:
        file.write_table(pa.Table.from_batches(waiting, schema))
        waiting.clear()

    def write(rows: Rows, values: npt.NDArray[Any]) -> None:
        waiting.append(table_rows(rows, values, schema))
        if sum(batch.num_rows for batch in waiting) >= ROW_GROUP:
            flush()

    with parquet.ParquetWriter(names[0], schema, use_dictionary=["status"]) as file:
        yield write
        flush()


def table_schema(about: dict[str, Any]) -> Any:
    """path, status, error and embedding, a list of fixed size; ``about`` as metadata."""
    pa, _ = pyarrow_modules()
    kind = pa.float16() if about["dtype"] == "float16" else pa.float32()
    vector = pa.list_(kind, about["width"])
    text = pa.string()
    return pa.schema(
        [("path", text), ("status", text), ("error", text), ("embedding", vector)],
        metadata={"vitrail": json.dumps(about)},
    )


def table_rows(rows: Rows, values: npt.NDArray[Any], schema: Any) -> Any:
    """A record batch with a row for each input; ``values`` are the rows' narrowed embeddings."""
    pa, _ = pyarrow_modules()
    text, vector = pa.string(), schema.field("embedding").type
    bad = np.array([error is not None for error in rows.errors], dtype=bool)
    every = np.zeros((len(bad), values.shape[1]), values.dtype)
    every[~bad] = values
    columns = [
        pa.array(map(path_text, rows.sources), text),
        pa.array(np.where(bad, "error", "ok"), text),
        pa.array(rows.errors, text),
        pa.FixedSizeListArray.from_arrays(every.ravel(), type=vector, mask=pa.array(bad)),
    ]
    return pa.record_batch(columns, schema)


def pyarrow_modules() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet; InputError where they are not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            "parquet output needs pyarrow: pip install 'vitrail[parquet]', or ask for .npy"
        ) from error
    return pyarrow, parquet
