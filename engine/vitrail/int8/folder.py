"""Writes the folder that `vitrail quantize` makes: a checkpoint's small files and int8 weights."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vitrail.checkpoint.contents import CONFIG, INT8, INT8_WEIGHTS, SMALL_FILES
from vitrail.checkpoint.files import Checkpoint
from vitrail.checkpoint.header import read_header
from vitrail.checkpoint.tensors import Source, TensorReader
from vitrail.dtypes import named_dtype
from vitrail.durable import draft_folder, sync, write_file, writing
from vitrail.int8.record import Int8Record
from vitrail.spec import ModelSpec, Shape
from vitrail.weights.loader import hash_weights


def write_folder(
    out: Path,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    sources: Mapping[str, Source],
    record: Callable[[str], Int8Record],
) -> int:
    """Write the folder ``out``, or nothing after an error; returns its bytes.

    ``sources``: of every tensor of ``spec``, whose values and dtypes are kept. ``record``: from the
    hash of the written weights. Raises InputError if the folder cannot be written.
    """
    with writing(out), draft_folder(out) as draft:
        for name in SMALL_FILES:
            path = checkpoint.file(name)
            if path is not None:
                write_file(draft / name, path.read_bytes())
        weights = draft / INT8_WEIGHTS
        save_file(_tensors(spec, sources), weights)
        shutil.copymode(draft / CONFIG, weights)  # safetensors writes a private file
        sync(weights)
        stored = {name: Source(entry) for name, entry in read_header(weights).items()}
        write_file(draft / INT8, record(hash_weights(spec, stored)).encode())
        return sum(path.stat().st_size for path in draft.iterdir())


def _tensors(spec: ModelSpec, sources: Mapping[str, Source]) -> dict[str, Tensor]:
    with TensorReader() as reader:
        return {
            name: _read(sources[name], shape, reader)
            for name, shape in spec.tensor_shapes().items()
        }


def _read(source: Source, shape: Shape, reader: TensorReader) -> Tensor:
    """A stored tensor in its own dtype and in its canonical ``shape``."""
    entry = source.entry
    start, stop = 0, entry.nbytes
    if source.rows is not None:
        row_bytes = entry.nbytes // entry.shape[0]
        start, stop = (row * row_bytes for row in source.rows)
    raw = torch.empty(stop - start, dtype=torch.uint8, device="cpu")
    reader.read_into(entry, start, raw.numpy().data)
    values = raw.view(torch.int8 if entry.dtype == "I8" else named_dtype(entry.dtype))
    if source.transpose:
        return values.view(shape[1], shape[0]).t().contiguous()
    return values.view(shape)
