"""Canonical tensors read in chunks, checked to be finite, and written to the arena."""

import hashlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vitrail.checkpoint.tensors import Source, TensorReader
from vitrail.dtypes import dtype_name, named_dtype
from vitrail.errors import CheckpointError
from vitrail.spec import ModelSpec
from vitrail.weights.layout import ALIGNMENT, arena_spans, arena_views

CHUNK_BYTES = 4 << 20  # small enough that a chunk is still in cache when it is rewritten


def _not_finite(values: Tensor) -> bool:
    # a cheap sum tells; only a suspicious sum is followed by a look at every value, since the sum
    # of a finite tensor may overflow
    total = values.sum(dtype=torch.float32).item()
    return not math.isfinite(total) and not bool(torch.isfinite(values).all())


class WeightLoader:
    """Reads canonical tensors from ``sources`` and writes packed tensors: ``packed`` by name, views
    of ``arena``. Raises CheckpointError for a weight that is not finite."""

    def __init__(
        self,
        spec: ModelSpec,
        sources: Mapping[str, Source],
        reader: TensorReader,
        dtype: torch.dtype,
    ) -> None:
        self.shapes, self.sources, self.reader = spec.tensor_shapes(), sources, reader
        spans, total = arena_spans(spec, dtype)
        try:
            self.arena = torch.empty(total, dtype=torch.uint8, device="cpu")
        except RuntimeError as error:
            raise CheckpointError(f"weights: got no memory, wanted {total} bytes of it") from error
        for _, stop in spans.values():  # the bytes between tensors are repeatable too
            self.arena[stop : -(-stop // ALIGNMENT) * ALIGNMENT] = 0
        self.packed = arena_views(spec, dtype, self.arena)
        self._staging = torch.empty(CHUNK_BYTES, dtype=torch.uint8, device="cpu")

    def _check_finite(self, name: str, values: Tensor) -> None:
        if _not_finite(values):
            raise CheckpointError(
                f"{self.locate(name)} holds NaN or infinity, wanted finite weights"
            )

    def check_rounded(self, name: str, packed: Tensor) -> None:
        """Refuse weights that are finite as stored and infinite in the compute dtype."""
        if packed.dtype != torch.float32 and _not_finite(packed):
            dtype = dtype_name(packed.dtype)
            raise CheckpointError(
                f"{self.locate(name)} as Vitrail uses it overflows {dtype}, "
                "wanted finite weights; load with dtype='float32', or 'bfloat16' for float16"
            )

    def _chunks(self, name: str, out: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, fp32 rows) of a canonical tensor seen as (rows, columns).

        If ``out`` is a contiguous fp32 tensor of that shape and the file holds fp32, the bytes are
        read straight into it. Otherwise chunks are fp32 temporaries, of `CHUNK_BYTES` in the file.
        """
        source, shape = self.sources[name], self.shapes[name]
        dtype = named_dtype(source.entry.dtype)
        rows, columns = (
            (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
        )
        row_bytes = columns * dtype.itemsize
        if source.transpose:
            yield 0, self._transposed(name, rows, columns, dtype)
            return
        offset = 0
        if source.rows is not None:
            offset = source.rows[0] * (source.entry.nbytes // source.entry.shape[0])
        direct = out is not None and dtype == torch.float32 == out.dtype and out.is_contiguous()
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            nbytes = (stop - start) * row_bytes
            if direct and out is not None:
                chunk = out.view(rows, columns)[start:stop]
                raw = chunk.view(-1).view(torch.uint8)
            else:
                if nbytes > self._staging.numel():
                    self._staging = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
                raw = self._staging[:nbytes]
                chunk = raw.view(dtype).view(stop - start, columns)
            self.reader.read_into(source.entry, offset + start * row_bytes, raw.numpy().data)
            chunk = chunk.float()
            self._check_finite(name, chunk)
            yield start, chunk

    def _transposed(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        entry = self.sources[name].entry
        raw = torch.empty(entry.nbytes, dtype=torch.uint8, device="cpu")
        self.reader.read_into(entry, 0, raw.numpy().data)
        values = raw.view(dtype).view(columns, rows).float()
        self._check_finite(name, values)
        return values.t()

    def read(self, name: str) -> Tensor:
        """A whole canonical tensor as fp32, in its canonical shape."""
        shape = self.shapes[name]
        values = torch.empty(shape, dtype=torch.float32, device="cpu")
        flat = values.view(shape[0], -1) if len(shape) > 1 else values.view(1, -1)
        for start, chunk in self._chunks(name, values):
            rows = flat[start : start + chunk.shape[0]]
            if rows.data_ptr() != chunk.data_ptr():
                rows.copy_(chunk)
        return values

    def read_codes(self, name: str) -> Tensor:
        """A whole canonical tensor of int8 codes."""
        codes = torch.empty(self.shapes[name], dtype=torch.int8, device="cpu")
        raw = codes.view(-1).view(torch.uint8).numpy().data
        self.reader.read_into(self.sources[name].entry, 0, raw)
        return codes

    def locate(self, name: str) -> str:
        """The file and the stored name of a canonical tensor, for messages."""
        entry = self.sources[name].entry
        return f"{entry.file.name}: tensor {entry.name!r}"

    def copy(self, *names: str) -> None:
        """Pack canonical tensors as they are."""
        for name in names:
            self.write_linear(self.packed[name], name)

    def write_linear(
        self,
        out: Tensor,
        name: str,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> Tensor | None:
        """Write the rows of ``name`` times ``gamma`` to ``out``; returns ``W beta`` (N,) fp64.

        ``sums`` (N,), with ``beta``: row sums of the rounded weights.
        """
        shift = None
        if beta is not None:
            shift = torch.empty(out.shape[0], dtype=torch.float64, device="cpu")
        flat = out if out.dim() == 2 else out.view(1, -1)
        for start, chunk in self._chunks(name, out):
            rows = flat[start : start + chunk.shape[0]]
            span = slice(start, start + len(rows))
            # in double, so that rounding does not depend on the chunks
            exact = chunk.double() if beta is not None else None
            if shift is not None and exact is not None and beta is not None:
                torch.mv(exact, beta, out=shift[span])
            if rows.data_ptr() == chunk.data_ptr():
                if gamma is not None:
                    chunk.mul_(gamma)
            else:
                rows.copy_(chunk if gamma is None else chunk * gamma)
                self.check_rounded(name, rows)
            if sums is not None and exact is not None and gamma is not None:
                if rows.dtype == torch.float32:  # its rounding does not show in a sum
                    sums[span] = exact.mv(gamma.double())
                else:  # as a product: ten times faster than a sum in double
                    sums[span] = rows.double().mv(exact.new_ones(exact.shape[1]))
        return shift


def hash_weights(spec: ModelSpec, sources: Mapping[str, Source]) -> str:
    """SHA-256 over (canonical name, dtype, shape, bytes) of every tensor, in order of name.

    The same for any order of tensors in a file, any sharding and either name dialect.
    """
    total = hashlib.sha256()
    shapes = spec.tensor_shapes()
    buffer = bytearray(CHUNK_BYTES)
    with TensorReader() as reader:
        for name in sorted(shapes):
            source, entry = sources[name], sources[name].entry
            start, stop = 0, entry.nbytes
            if source.rows is not None:
                row_bytes = entry.nbytes // entry.shape[0]
                start, stop = source.rows[0] * row_bytes, source.rows[1] * row_bytes
            digest = hashlib.sha256(
                f"{name} {entry.dtype} {shapes[name]} {source.transpose}".encode()
            )
            for offset in range(start, stop, CHUNK_BYTES):
                chunk = memoryview(buffer)[: min(CHUNK_BYTES, stop - offset)]
                reader.read_into(entry, offset, chunk)
                digest.update(chunk)
            total.update(digest.digest())
    return total.hexdigest()
