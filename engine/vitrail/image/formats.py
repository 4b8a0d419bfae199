"""The format and size of an encoded image, read from its header before any decoder runs.

Five formats are read: JPEG, PNG, WEBP, BMP and GIF. Their first bytes tell them apart, never a
file name. A size limit costs microseconds, because the size comes from the header. Structures that
a decoder would walk without a limit (segments, chunks, blocks, scans) are counted here first.
Imports no Pillow.
"""

import re
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Format = Literal["JPEG", "PNG", "WEBP", "BMP", "GIF"]

MAX_JPEG_SEGMENTS = 4_096
MAX_JPEG_SCANS = 100
MAX_PNG_CHUNKS = 131_072
MAX_GIF_BLOCKS = 65_536

_WANTED = "not a JPEG, PNG, WEBP, BMP or GIF"
_PNG = b"\x89PNG\r\n\x1a\n"
_UNSUPPORTED: tuple[tuple[bytes, str], ...] = (
    (rb"\s*<!doctype html|\s*<html", "HTML"),
    (rb"\s*(<\?xml[^>]*>\s*)?<svg", "SVG"),
    (rb"\s*<\?xml", "XML"),
    (rb"%PDF", "PDF"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "EPS"),
    (rb"8BPS", "PSD"),
    (rb"SIMPLE  =", "FITS"),
    (rb"II[*+]\x00|MM\x00[*+]", "TIFF"),
    (rb"....ftyp(avif|avis)", "AVIF"),
    (rb"....ftyp(heic|heix|hevc|mif1|msf1)", "HEIC"),
    (rb"....ftyp", "a video"),
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (rb"\x00\x00\x01\x00", "an icon"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf", "an archive"),
    (rb"\s*[\[{]", "JSON"),
)


class FormatError(Exception):
    """Encoded bytes that will not be decoded. The message is safe to show: it quotes no address."""


@dataclass(frozen=True, slots=True)
class Header:
    """The format of encoded bytes, and the size in pixels that their header states."""

    format: Format
    width: int
    height: int


def read_header(data: bytes) -> Header:
    """Format and size of encoded image bytes.

    Raises FormatError if the bytes have none of the five formats, or their header is damaged.
    """
    if not data:
        raise FormatError("empty: 0 bytes")
    for name, accepts, read_size in _READERS:
        if accepts(data):
            try:
                width, height = read_size(data)
            except (IndexError, struct.error):
                raise FormatError(f"the {name} header is cut short") from None
            return Header(name, width, height)
    raise FormatError(f"{_WANTED}; {_hint(data)}")


def _hint(data: bytes) -> str:
    for pattern, name in _UNSUPPORTED:
        if re.match(pattern, data[:512], re.IGNORECASE | re.DOTALL):
            return f"it looks like {name}"
    return f"it starts with the bytes {data[:8].hex(' ')}"


# ITU-T T.81, table B.1. Frame headers are C0..CF but for C4 (tables), C8 (reserved) and CC.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE = frozenset({0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)})
_MARKER = re.compile(rb"\xff([\xc0-\xfe])", re.DOTALL)


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """The size in the last frame header before the first scan. Skips junk between segments."""
    size: tuple[int, int] | None = None
    at = 2
    for _ in range(MAX_JPEG_SEGMENTS):
        marker = _MARKER.search(data, at)
        if marker is None:
            break
        code, at = marker[1][0], marker.end()
        if code == 0xDA and size is not None:
            if data.count(b"\xff\xda", at) >= MAX_JPEG_SCANS:
                raise FormatError(f"the JPEG has more than {MAX_JPEG_SCANS} scans")
            return size
        if code in _FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 3)
            size = (width, height)
        if code not in _STANDALONE:
            at += max(2, int.from_bytes(data[at : at + 2]))
    raise FormatError("the JPEG header is damaged or cut short")


def _png_size(data: bytes) -> tuple[int, int]:
    if data[12:16] != b"IHDR":
        raise FormatError("the PNG header is damaged or cut short")
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _webp_size(data: bytes) -> tuple[int, int]:
    """RFC 9649: the canvas of VP8X, or the frame of a lone VP8 or VP8L chunk."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        _ = data[29]
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise FormatError("the WEBP header is damaged or cut short")


def _bmp_size(data: bytes) -> tuple[int, int]:
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    if header_bytes == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    return max(0, width), abs(height)


def _gif_size(data: bytes) -> tuple[int, int]:
    """The canvas, enlarged if the first frame reaches beyond it, as Pillow does."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    for _ in range(MAX_GIF_BLOCKS):
        if data[at] == 0x2C:
            x, y, frame_width, frame_height = struct.unpack_from("<HHHH", data, at + 1)
            return max(width, x + frame_width), max(height, y + frame_height)
        if data[at] == 0x21:
            at += 2
            while data[at]:
                at += 1 + data[at]
        elif data[at] == 0x3B:
            break
        at += 1
    raise FormatError("the GIF has no frame")


_READERS: tuple[tuple[Format, Callable[[bytes], bool], Callable[[bytes], tuple[int, int]]], ...] = (
    ("JPEG", lambda data: data.startswith(b"\xff\xd8\xff"), _jpeg_size),
    ("PNG", lambda data: data.startswith(_PNG), _png_size),
    ("WEBP", lambda data: data.startswith(b"RIFF") and data[8:12] == b"WEBP", _webp_size),
    ("GIF", lambda data: data.startswith((b"GIF87a", b"GIF89a")), _gif_size),
    ("BMP", lambda data: data.startswith(b"BM"), _bmp_size),
)


def check_png(data: bytes) -> None:
    """Raises FormatError unless every critical PNG chunk up to IEND is complete, with a right CRC.

    Decoders skip the CRC of pixel data, and they accept a file that ends early if the last row is
    complete. Bytes after IEND are ignored.
    """
    at, view = len(_PNG), memoryview(data)
    for _ in range(MAX_PNG_CHUNKS):
        if at + 12 > len(data):
            raise FormatError("truncated: the PNG ends before its last chunk")
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            raise FormatError("truncated: the PNG ends inside a chunk")
        critical = not name[0] & 0x20
        if critical and zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            raise FormatError("corrupt: a PNG chunk does not meet its CRC")
        if name == b"IEND":
            return
        at = end
    raise FormatError(f"the PNG has more than {MAX_PNG_CHUNKS} chunks")


def read_orientation(info: Mapping[Any, Any]) -> int:
    """The EXIF orientation 1..8 in Pillow's ``image.info``; 1 if it is absent or out of range.

    Searches the same fields as Pillow's ``exif_transpose``: the EXIF block, its hexadecimal text
    form in a PNG, then XMP. Pillow's own reader warns or fails on damaged blocks.
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
