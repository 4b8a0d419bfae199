"""The files of a part in the two layouts, encoded and decoded in memory.

Layout "parquet": ``part-00000.parquet`` has the columns path, status, error and embedding, a row
per input; the embedding of a failure is null. Layout "npy" is clip-retrieval's: readable images are
in ``img_emb/img_emb_00000.npy`` and ``metadata/metadata_00000.parquet`` (image_path), failures in
``failures/failures_00000.jsonl``.
"""

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from vitrail.jobs.arrow import pyarrow_modules, read_table, table_rows, table_schema, write_table
from vitrail.jobs.listing import path_text
from vitrail.jobs.rows import EmbeddingRows, Layout

SUBFOLDERS: dict[Layout, tuple[str, ...]] = {
    "parquet": ("",),
    "npy": ("img_emb", "metadata", "failures"),
}
PATTERNS = (
    "part-*.parquet",
    "img_emb/img_emb_*.npy",
    "metadata/metadata_*.parquet",
    "failures/failures_*.jsonl",
)


def outcomes(rows: EmbeddingRows) -> tuple[list[str], list[tuple[str, str]]]:
    """The paths of the readable images, and the failures as (path, reason)."""
    pairs = list(zip(map(path_text, rows.sources), rows.errors, strict=True))
    paths = [path for path, error in pairs if error is None]
    return paths, [(path, error) for path, error in pairs if error is not None]


def encode_part(
    number: int, rows: EmbeddingRows, values: npt.NDArray[Any], job: dict[str, Any]
) -> dict[str, bytes]:
    """The files of part ``number`` by name, in the layout of the record ``job``."""
    encode = _parquet_files if job["layout"] == "parquet" else _npy_files
    return dict(encode(number, rows, values, job))


def _parquet_files(
    number: int, rows: EmbeddingRows, values: npt.NDArray[Any], job: dict[str, Any]
) -> Iterator[tuple[str, bytes]]:
    pa, _ = pyarrow_modules()
    schema = table_schema({key: job[key] for key in job if not key.startswith("inputs")})
    table = pa.Table.from_batches([table_rows(rows, values, schema)])
    yield f"part-{number:05}.parquet", write_table(table)


def _npy_files(
    number: int, rows: EmbeddingRows, values: npt.NDArray[Any], job: dict[str, Any]
) -> Iterator[tuple[str, bytes]]:
    pa, _ = pyarrow_modules()
    paths, failures = outcomes(rows)
    array = io.BytesIO()
    np.save(array, values)
    yield f"img_emb/img_emb_{number:05}.npy", array.getvalue()
    table = pa.table({"image_path": pa.array(paths, pa.string())})
    yield f"metadata/metadata_{number:05}.parquet", write_table(table)
    lines = [json.dumps({"path": path, "error": error}) for path, error in failures]
    if lines:
        text = "".join(f"{line}\n" for line in lines)
        yield f"failures/failures_{number:05}.jsonl", text.encode()


def decode_part(
    files: dict[str, bytes],
) -> tuple[list[str], npt.NDArray[Any], list[tuple[str, str]]]:
    """A part's files by name, in either layout -> its paths, embeddings (K, D) and failures."""
    (table,) = (read_table(data) for name, data in files.items() if name.endswith(".parquet"))
    if "embedding" not in table.column_names:
        (array,) = (data for name, data in files.items() if name.endswith(".npy"))
        lines = b"".join(data for name, data in files.items() if name.endswith(".jsonl"))
        failures = [(line["path"], line["error"]) for line in map(json.loads, lines.splitlines())]
        return table["image_path"].to_pylist(), np.load(io.BytesIO(array)), failures
    pairs = list(zip(table["path"].to_pylist(), table["error"].to_pylist(), strict=True))
    paths = [path for path, error in pairs if error is None]
    failures = [(path, error) for path, error in pairs if error is not None]
    column = table["embedding"].combine_chunks()
    values = column.drop_null().flatten().to_numpy().reshape(-1, column.type.list_size)
    return paths, values, failures
