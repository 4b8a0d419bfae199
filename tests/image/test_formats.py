"""Formats are told by content, and sizes and structure refused before a decoder runs."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from gauge import within
from image.samples import brief, chunk, encode, photo, png, refusal, rgb
from vitrail.image import decoding
from vitrail.image.decoding import decode
from vitrail.image.sources import Limits


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encode(photo(), "PNG"))
    for given in (path, str(path)):
        assert np.array_equal(rgb(given), np.asarray(photo()))


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "looks like HTML"),
        (b"  <html><body>404", "looks like HTML"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "looks like SVG"),
        (b"<?xml version='1.0'?>\n<svg/>", "looks like SVG"),
        (b"%PDF-1.7", "looks like PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "looks like EPS"),
        (b"\xc5\xd0\xd3\xc6" + bytes(40), "looks like EPS"),
        (b"8BPS\0\1", "looks like PSD"),
        (b"SIMPLE  =                    T", "looks like FITS"),
        (b"\0\0\0\x1cftypavif", "looks like AVIF"),
        (b"\0\0\0\x1cftypheic", "looks like HEIC"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"\xca\xfe\xba\xbe", "starts with the bytes ca fe ba be"),
        (b"\xff\xd8", "starts with the bytes ff d8"),
        (encode(photo(), "TIFF"), "looks like TIFF"),
        (encode(Image.new("F", (3, 3)), "TIFF"), "looks like TIFF"),
        (encode(photo(), "EPS"), "looks like EPS"),
        (encode(photo(), "JPEG2000"), "looks like JPEG 2000"),
        (encode(photo(), "PPM"), "starts with the bytes 50 36"),
    ],
    ids=brief,
)
def test_other_content_is_refused_by_its_first_bytes(
    data: bytes, hint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(decoding, "_PLUGINS", {})
    text = refusal(data)
    assert hint in text
    assert f"image of {len(data)} bytes" in text
    assert not data or "not a JPEG, PNG, WEBP, BMP or GIF" in text
    path = tmp_path / "a picture.jpg"
    path.write_bytes(data)
    assert refusal(path).startswith(f"{path}: ")


def bmp(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


def jpeg_header(width: int, height: int) -> bytes:
    frame = struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0"
    scan = b"\1\1\0\0\x3f\0"
    return (
        b"\xff\xd8\xff\xc0" + struct.pack(">H", 2 + len(frame)) + frame + b"\xff\xda\0\x08" + scan
    )


def webp_header(kind: bytes, width: int, height: int) -> bytes:
    if kind == b"VP8X":
        body = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == b"VP8L":
        body = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14)
    else:
        body = bytes(3) + b"\x9d\x01\x2a" + struct.pack("<HH", width, height)
    return b"RIFF" + bytes(4) + b"WEBP" + kind + struct.pack("<I", len(body)) + body + bytes(9)


def gif_header(width: int, height: int, across: int = 1, down: int = 1) -> bytes:
    comment = b"\x21\xfe\x03abc\0"
    frame = b"," + struct.pack("<HHHHB", 0, 0, across, down, 0)
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + comment + frame


HUGE = {
    "png 900 MP": png(30_000, 30_000),
    "png 169 MP": png(13_000, 13_000),
    "png over our cap": png(8_000, 6_251),
    "png side": png(70_000, 1),
    "bmp": bmp(30_000, 30_000),
    "bmp top down": bmp(30_000, -30_000),
    "jpeg": jpeg_header(30_000, 30_000),
    "webp VP8X": webp_header(b"VP8X", 30_000, 30_000),
    "webp VP8L": webp_header(b"VP8L", 16_000, 16_000),
    "webp VP8 ": webp_header(b"VP8 ", 16_000, 16_000),
    "gif canvas": gif_header(30_000, 30_000),
    "gif frame": gif_header(1, 1, 30_000, 30_000),
}


@pytest.mark.machine
@pytest.mark.parametrize("name", HUGE)
def test_a_size_over_the_limit_is_refused_from_the_header(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_PLUGINS", {})
    with within(0.1):
        text = refusal(HUGE[name])
    assert "wanted at most 65535 a side and 50000000 in all" in text


def test_pillows_own_limit_neither_warns_nor_moves() -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in HUGE.values():
            refusal(data)
        data = encode(Image.new("L", (11_000, 9_000)), "PNG")
        assert decode(data, channels=1, limits=Limits(max_pixels=10**8)).shape == (9_000, 11_000, 1)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_the_limits_hold_for_every_kind_of_image(tmp_path: Path) -> None:
    limits = Limits(max_pixels=3_000, max_bytes=10_000)
    wide = photo(64, 48)
    for given in (wide, np.asarray(wide), encode(wide, "GIF"), encode(photo(63, 48), "PNG")):
        assert "wanted at most" in refusal(given, limits=limits)
    assert rgb(photo(60, 50), limits=limits).shape == (50, 60, 3)
    path = tmp_path / "long.png"
    path.write_bytes(encode(photo(5, 5), "PNG") + bytes(10_000))
    assert "bytes, wanted at most 10000" in refusal(path, limits=limits)
    assert "long.png" in refusal(path, limits=limits)
    assert "bytes, wanted at most 10000" in refusal(path.read_bytes(), limits=limits)


@pytest.mark.parametrize(
    "data",
    [png(0, 5), png(5, 0), bmp(0, 5), bmp(-5, 5), jpeg_header(5, 0), gif_header(0, 0, 0, 0)],
    ids=("png width", "png height", "bmp", "bmp minus", "jpeg", "gif"),
)
def test_an_image_without_pixels_is_refused(data: bytes) -> None:
    assert "wanted at least 1 x 1" in refusal(data)


@pytest.mark.parametrize("part", [b"IHDR", b"IDAT", b"IEND"])
def test_a_png_chunk_with_a_bad_crc_is_refused(part: bytes) -> None:
    data = bytearray(encode(photo(), "PNG"))
    start = data.index(part)
    (length,) = struct.unpack_from(">I", data, start - 4)
    data[start + 4 + length] ^= 1
    assert "does not meet its CRC" in refusal(bytes(data))


def test_junk_between_the_segments_of_a_jpeg_is_stepped_over() -> None:
    data = encode(photo(), "JPEG")
    table = data.index(b"\xff\xdb")
    padded = data[:table] + bytes(7) + b"\xff\0\xff\xff\xff" + data[table:]
    assert np.array_equal(rgb(padded), rgb(data))


def test_a_jpeg_of_countless_scans_is_refused() -> None:
    data = encode(photo(), "JPEG", progressive=True)
    start = data.index(b"\xff\xda")
    scan = data[start : data.index(b"\xff\xda", start + 2)]
    scan = scan[: scan.rindex(b"\xff\xc4")] if b"\xff\xc4" in scan else scan
    many = data[:start] + scan * 200 + data[start:]
    assert "more than 100 scans" in refusal(many)


@pytest.mark.machine
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff\xd8" + b"\xff\xe0\0\x02" * 5_000, "JPEG header"),
        (b"\xff\xd8" + b"\xff" * 5_000_000, "JPEG header"),
        (
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", png(4, 4)[16:29]) + chunk(b"tEXt", b"") * 140_000,
            "chunks",
        ),
        (gif_header(4, 4)[:19] + b"\x21\xfe\0" * 70_000, "no frame"),
        (gif_header(4, 4)[:19] + b";", "no frame"),
        (gif_header(4, 4)[:19], "cut short"),
        (b"RIFF\0\0\0\0WEBPVP8 " + bytes(30), "WEBP header"),
        (b"BM\0\0", "cut short"),
        (png(4, 4)[:14], "PNG header"),
    ],
    ids=brief,
)
def test_endless_and_missing_structure_is_refused_at_once(data: bytes, reason: str) -> None:
    with within(1):
        assert reason in refusal(data)
