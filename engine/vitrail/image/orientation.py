"""The EXIF orientation of an image. Pillow's own reader warns or fails on damaged blocks."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any


def read_orientation(info: Mapping[Any, Any]) -> int:
    """The EXIF orientation 1..8 in Pillow's ``image.info``; 1 if it is absent or out of range.

    Searches the same fields as Pillow's ``exif_transpose``: the EXIF block, its hexadecimal text
    form in a PNG, then XMP.
    """
    block = info.get("exif")
    if block is None and isinstance(text := info.get("Raw profile type exif"), str):
        try:
            block = bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            block = None
    value = _exif_orientation(block) if isinstance(block, bytes) else None
    if value is None:
        xmp = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
        xmp = xmp.encode("utf-8", "replace") if isinstance(xmp, str) else bytes(xmp)
        match = re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)
        value = int(match[1]) if match else 1
    return value if 1 <= value <= 8 else 1


def _exif_orientation(block: bytes) -> int | None:
    """Tag 0x0112 of the first directory of a TIFF structure (EXIF 2.3, 4.6.4); None if absent.

    Accepts any integer type and ignores a second value, as Pillow does.
    """
    while block.startswith(b"Exif\0\0"):
        block = block[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return None
    value = None
    codes = {3: "H", 4: "I", 8: "h", 9: "i", 13: "I"}
    try:
        (at,) = struct.unpack_from(order + "I", block, 4)
        (entries,) = struct.unpack_from(order + "H", block, at)
        for entry in range(at + 2, at + 2 + 12 * entries, 12):
            tag, code, count = struct.unpack_from(order + "HHI", block, entry)
            if tag == 0x0112 and code in codes and 1 <= count <= (2 if codes[code] in "Hh" else 1):
                (value,) = struct.unpack_from(order + codes[code], block, entry + 8)
    except struct.error:
        return value
    return value
