"""Parquet tables of embeddings, read and written with pyarrow."""

import io
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from vitrail.errors import InputError
from vitrail.jobs.listing import path_text
from vitrail.jobs.rows import EmbeddingRows


def pyarrow_modules() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet; InputError if they are not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            "parquet output needs pyarrow: pip install 'vitrail[parquet]', or ask for .npy"
        ) from error
    return pyarrow, parquet


def table_schema(about: dict[str, Any]) -> Any:
    """Columns path, status, error and embedding (a list of fixed size), with ``about`` as metadata.

    ``about`` is a `describe_run`.
    """
    pa, _ = pyarrow_modules()
    dtype = pa.float16() if about["dtype"] == "float16" else pa.float32()
    vector = pa.list_(dtype, about["width"])
    text = pa.string()
    return pa.schema(
        [("path", text), ("status", text), ("error", text), ("embedding", vector)],
        metadata={"vitrail": json.dumps(about)},
    )


def table_rows(rows: EmbeddingRows, values: npt.NDArray[Any], schema: Any) -> Any:
    """A record batch with a row per input; ``values`` are the embeddings of ``rows``, narrowed."""
    pa, _ = pyarrow_modules()
    text, vector = pa.string(), schema.field("embedding").type
    failed = np.array([error is not None for error in rows.errors], dtype=bool)
    padded = np.zeros((len(failed), values.shape[1]), values.dtype)
    padded[~failed] = values
    columns = [
        pa.array(map(path_text, rows.sources), text),
        pa.array(np.where(failed, "error", "ok"), text),
        pa.array(rows.errors, text),
        pa.FixedSizeListArray.from_arrays(padded.ravel(), type=vector, mask=pa.array(failed)),
    ]
    return pa.record_batch(columns, schema)


def write_table(table: Any) -> bytes:
    """The parquet file of ``table``."""
    _, parquet = pyarrow_modules()
    data = io.BytesIO()
    parquet.write_table(
        table, data, use_dictionary=["status"] if "status" in table.column_names else False
    )
    return data.getvalue()


def read_table(data: bytes) -> Any:
    """The table of a parquet file.

    pyarrow's own read_table hands the bytes to a thread. If the thread releases them while the
    interpreter ends, the process aborts. ParquetFile reads in the calling thread.
    """
    pa, parquet = pyarrow_modules()
    with parquet.ParquetFile(pa.BufferReader(data)) as file:
        return file.read(use_threads=False)
