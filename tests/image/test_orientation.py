"""The EXIF orientation of a file is read as Pillow reads it, and applied."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image, ImageOps

from image.samples import brief, encode, photo, rgb
from vitrail.image.formats import read_orientation

TURNED: dict[int, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


def exif(value: int, order: str = "<", kind: int = 3, count: int = 1) -> bytes:
    """An EXIF block whose one directory holds a decoy entry and then the orientation."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    code = {1: "B3x", 3: "H2x", 4: "I"}[kind]
    entries = struct.pack(order + "HHII", 0x0100, 4, 1, 6)
    entries += struct.pack(order + "HHI" + code, 0x0112, kind, count, value)
    return b"Exif\0\0" + head + struct.pack(order + "H", 2) + entries + bytes(4)


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_the_exif_orientation_is_applied_to_files_and_not_to_pil_images(
    orientation: int, file_format: str
) -> None:
    for order in "<>":
        options = {"lossless": True} if file_format == "WEBP" else {}
        data = encode(photo(), file_format, exif=exif(orientation, order), **options)
        flat = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(rgb(data), TURNED[orientation](flat))
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert np.array_equal(rgb(data), np.asarray(upright.convert("RGB")))
        assert np.array_equal(rgb(Image.open(io.BytesIO(data))), flat)


@pytest.mark.parametrize(
    "block",
    [
        exif(99),
        exif(0),
        exif(9),
        exif(6, count=3),
        exif(6, count=0),
        exif(6, kind=1),
        exif(6)[:20],
        exif(6)[:-12],
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0garbage, not TIFF",
        b"",
    ],
    ids=brief,
)
def test_an_orientation_that_is_none_counts_as_upright(block: bytes) -> None:
    data = encode(photo(), "PNG", exif=block)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(rgb(data), np.asarray(photo()))


def test_the_orientation_is_read_where_pillow_reads_it() -> None:
    flat = np.asarray(photo())
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    text = "\nexif\n      42\n" + exif(8, ">").hex()
    pnginfo = PIL.PngImagePlugin.PngInfo()
    pnginfo.add_text("Raw profile type exif", text, zip=True)
    assert read_orientation({"xmp": xmp}) == 6
    assert read_orientation({"XML:com.adobe.xmp": xmp.decode()}) == 6
    assert read_orientation({"xmp": xmp, "exif": exif(3)}) == 3
    assert read_orientation({"exif": exif(8, kind=4)}) == 8
    assert read_orientation({"exif": exif(8, kind=3, count=2)}) == 8
    assert read_orientation({"Raw profile type exif": "no\nhex\nat\nall"}) == 1
    assert np.array_equal(rgb(encode(photo(), "PNG", pnginfo=pnginfo)), TURNED[8](flat))
    data = encode(photo(), "WEBP", lossless=True, xmp=xmp)
    assert np.array_equal(rgb(data), TURNED[6](flat))
