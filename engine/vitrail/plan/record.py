"""The encoding of records that Python writes and C++ reads (csrc/reader.hpp).

Numbers are little-endian. Byte strings and lists begin with their length. Plans and kernel binaries
begin with `magic`; an exported record has a head of its own (`vitrail.exported.head`).

An exported folder loads in every version of Vitrail that has the folder's two numbers below.
csrc/numbers.hpp has the same two. CONTRIBUTING.md ("The two numbers") says when to raise them.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

PLAN_GRAMMAR = 4
"""How records, plans and the files of an exported folder are encoded, and what they mean.

Preprocessing, tokenization and the fingerprint are part of it: a folder that is read or computed
differently than the version that wrote it did needs another number.
"""
KERNEL_ABI = 1
"""The conventions between plans and kernel binaries: parameters, tensor maps, launch attributes."""


def magic(kind: str) -> bytes:
    """The first bytes of a record: ``kind`` is "plan" or "kernel"."""
    return f"vitrail {kind} {PLAN_GRAMMAR}.{KERNEL_ABI}\n".encode()


def string(text: str | bytes) -> bytes:
    """A byte string: its length as uint64, then the bytes. `str` is encoded as UTF-8."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def items(encoded: Sequence[bytes]) -> bytes:
    """A list: the number of items as uint32, then the items."""
    return struct.pack("<I", len(encoded)) + b"".join(encoded)


class RecordReader:
    """Decodes a record that begins with ``head``. Raises ValueError if it ends early."""

    def __init__(self, record: bytes, head: bytes) -> None:
        self._record, self._position = record, len(head)
        if not record.startswith(head):
            raise ValueError(f"other first bytes than {head!r}")

    def numbers(self, layout: str) -> tuple[Any, ...]:
        """Numbers in a layout of `struct`."""
        return struct.unpack(f"<{layout}", self._take(struct.calcsize(f"<{layout}")))

    def string(self) -> bytes:
        return self._take(*self.numbers("Q"))

    def _take(self, count: int) -> bytes:
        start, self._position = self._position, self._position + count
        if self._position > len(self._record):
            raise ValueError(f"{len(self._record):,} bytes, which end early")
        return self._record[start : self._position]

    def items(self, read: Callable[[], T]) -> list[T]:
        """A list; ``read`` reads one item."""
        return [read() for _ in range(*self.numbers("I"))]
