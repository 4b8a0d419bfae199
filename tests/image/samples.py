"""Images, encoded files and expected refusals that the image tests share."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixels import cases
from vitrail.errors import ImageError
from vitrail.image.decoding import decode
from vitrail.image.preprocess import preprocess_uint8
from vitrail.spec import ImageSpec

CASES = cases.all_cases()


CLIP = ImageSpec(True, ("shortest", 224), 3, (224, 224), 1 / 255, cases.CLIP_MEAN, cases.CLIP_STD)


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")


def spec_of(steps: cases.Steps) -> ImageSpec:
    return ImageSpec(
        True, steps.resize, steps.resample, steps.crop, steps.rescale, steps.mean, steps.std
    )


def photo(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """Smooth colors with a little noise: compresses like a photo, and has no symmetry."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9 + k) * 60 + np.cos(y / (5 + k)) * 50 + 128 for k in range(3)]
    noise = np.random.default_rng(seed).integers(-9, 10, (height, width, 3))
    return Image.fromarray((np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def brief(value: object) -> str | None:
    """A test's name for bytes: the last few, which tell these apart."""
    return value[-8:].hex() if isinstance(value, bytes) else None


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG header of any size, for 8-bit gray, and the given chunks."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def rgb(image: Any, **options: Any) -> np.ndarray[Any, Any]:
    return decode(image, channels=3, **options)


def crop_pixels(
    image: np.ndarray[Any, Any], spec: ImageSpec, size: tuple[int, int] | None = None
) -> np.ndarray[Any, Any]:
    """uint8 (height, width, channels) resized and cropped."""
    (crop,) = preprocess_uint8([image], spec, image.shape[2], size=size)
    assert isinstance(crop, np.ndarray), crop
    return crop


def refusal(image: Any, kind: type[Exception] = ImageError, **options: Any) -> str:
    """The message ``image`` is refused with; one line, with no address in it."""
    with pytest.raises(kind) as caught:
        rgb(image, **options)
    text = str(caught.value)
    assert "0x" not in text
    assert "\n" not in text
    assert "object at" not in text
    return text


def sound(name: str) -> bytes:
    """An undamaged 200 x 150 image."""
    image, file_format = photo(200, 150), name.partition(" ")[0]
    if name == "BMP RLE":
        return rle_bmp(image.convert("P"))
    if name == "PNG interlaced":
        return interlaced_png(image)
    return encode(image, file_format, **({"progressive": True} if "prog" in name else {}))


def rle_bmp(image: Image.Image) -> bytes:
    """8-bit run lengths of one pixel each, rows from the bottom."""
    rows = np.asarray(image)[::-1]
    body = (
        b"".join(b"".join(bytes((1, v)) for v in row) + b"\0\0" for row in rows.tolist()) + b"\0\1"
    )
    palette = np.zeros((256, 4), np.uint8)
    found = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    palette[: len(found), :3] = found[:, ::-1]
    info = struct.pack("<IiiHHIIiiII", 40, *image.size, 1, 8, 1, len(body), 0, 0, 256, 0)
    head = b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078)
    return head + info + palette.tobytes() + body


def interlaced_png(image: Image.Image) -> bytes:
    """Adam7, filter 0."""
    pixels, lines = np.asarray(image), b""
    for y, x, down, across in (
        (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
        (1, 0, 2, 1),
    ):  # fmt: skip
        lines += b"".join(b"\0" + row.tobytes() for row in pixels[y::down, x::across])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *image.size, 8, 2, 0, 0, 1))
    data = chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")
