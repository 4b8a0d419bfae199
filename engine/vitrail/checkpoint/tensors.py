"""Stored tensors: position in a file (`TensorEntry`), use by a model (`Source`), and a reader."""

import os
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from vitrail.checkpoint.regular import Stamp, file_stamp, open_regular, read_exactly, reading
from vitrail.errors import CheckpointError, InputError, show, show_path


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Position of a tensor in a file. ``dtype`` is the safetensors code ("F32", "BF16", ...).

    ``offset`` is the absolute offset of its first byte in ``file``, ``nbytes`` its length.
    ``stamp`` is the file's `file_stamp` when its header was read, or None for an entry that came
    from no file; None is not compared.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    stamp: Stamp | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """The stored tensor, or part of it, that a canonical tensor comes from.

    ``rows``: the slice of the stored tensor's leading dimension; None for all of it.
    ``transpose``: the canonical tensor is the stored tensor, two-dimensional and transposed.
    """

    entry: TensorEntry
    rows: tuple[int, int] | None = None
    transpose: bool = False


class TensorReader(AbstractContextManager["TensorReader"]):
    """Reads tensor bytes into the caller's memory; a context manager that threads may share.

    Each file is opened once and read with preadv, never mapped: if a file shrinks, the read fails
    with an error, not with a signal. Every read checks that the file is still the same as when its
    header was read. Close the reader after the last read has returned.
    """

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._closed = False

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        with self._lock:
            self._closed = True
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def read_into(self, entry: TensorEntry, start: int, out: memoryview) -> None:
        """Reads bytes ``[start, start + out.nbytes)`` of the tensor into ``out``.

        Raises CheckpointError if the file cannot be read, ends early or has changed since its
        header was read; InputError if the range is outside the tensor, or ``out`` is read-only or
        not contiguous.
        """
        if out.readonly or not out.c_contiguous:
            raise InputError(
                "out: got a read-only or strided buffer, wanted a writable contiguous one"
            )
        if not 0 <= start <= entry.nbytes - out.nbytes:
            raise InputError(
                f"tensor {show(entry.name)}: got bytes {start} to {start + out.nbytes}, "
                f"wanted a range within its {entry.nbytes}"
            )
        descriptor = self._descriptor(entry)
        self._check_unchanged(entry, descriptor)
        if out.nbytes == 0:
            return
        read_exactly(descriptor, entry.offset + start, out.cast("B"), entry.file)
        self._check_unchanged(entry, descriptor)

    def _descriptor(self, entry: TensorEntry) -> int:
        with self._lock:
            if self._closed:
                raise InputError("TensorReader: got a read after close, wanted it before")
            if entry.file not in self._descriptors:
                self._descriptors[entry.file] = open_regular(entry.file)
            return self._descriptors[entry.file]

    def _check_unchanged(self, entry: TensorEntry, descriptor: int) -> None:
        with reading(entry.file):
            stamp = file_stamp(descriptor)
        if entry.stamp is None or stamp == entry.stamp:
            return
        fault = "was truncated" if stamp[2] < entry.stamp[2] else "was changed or replaced"
        raise CheckpointError(f"{show_path(entry.file)}: {fault} while loading; load it again")
