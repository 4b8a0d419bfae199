"""Sizes and digests of files.

A digest is SHA-256 over the SHA-256 of every 4 MiB of a file, so that threads can share the work.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from vitrail.checkpoint.regular import open_regular, read_exactly, reading
from vitrail.errors import refusal, show_path

CHUNK_BYTES = 4 << 20
THREADS = 16


class FileEntry(NamedTuple):
    """The bytes of a file as ``size``, and its digest of 32 bytes."""

    size: int
    digest: bytes


def hash_file(path: Path, out: memoryview | None = None) -> FileEntry:
    """The entry of a file. If ``out`` is given, the file's bytes are read into it.

    Raises CheckpointError if the file is not regular, cannot be read, or has another length than
    ``out``.
    """
    descriptor = open_regular(path)
    try:
        with reading(path):
            size = os.fstat(descriptor).st_size
        if out is not None and size != len(out):
            raise refusal(show_path(path), f"{size:,} bytes", f"{len(out):,}")

        def hash_chunk(start: int) -> bytes:
            stop = min(start + CHUNK_BYTES, size)
            chunk = memoryview(bytearray(stop - start)) if out is None else out[start:stop]
            read_exactly(descriptor, start, chunk, path)
            return hashlib.sha256(chunk).digest()

        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
            digests = pool.map(hash_chunk, range(0, size, CHUNK_BYTES))
            return FileEntry(size, hashlib.sha256(b"".join(digests)).digest())
    finally:
        os.close(descriptor)
