"""The encoding of records that Python writes and C++ reads (csrc/reader.hpp).

A record begins with `magic`. Numbers are little-endian. Byte strings and lists begin with their
length.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
FORMAT = 2


def magic(kind: str) -> bytes:
    """The first bytes of a record: ``kind`` is "plan", "kernel" or "export"."""
    return f"vitrail {kind} {FORMAT}\n".encode()


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
