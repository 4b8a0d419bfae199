"""The encoding of what C++ reads: little-endian, strings and lists with their length before them.

Its other half is csrc/reader.hpp.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence


def string(text: str | bytes) -> bytes:
    """A text in UTF-8, or bytes: their number in 64 bits, then they."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def items(encoded: Sequence[bytes]) -> bytes:
    """A list: how many there are in 32 bits, then they."""
    return struct.pack("<I", len(encoded)) + b"".join(encoded)
