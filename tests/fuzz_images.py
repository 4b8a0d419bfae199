"""Mutated images through the engine's decoder and resize; prints what became of them as JSON.

    python tests/fuzz_images.py SEED COUNT CASE_FILE

Case n of a seed is the same bytes every time: ``case(seed, n)``. CASE_FILE holds the number of the
present case, so that whoever kills a hanging process knows which one it was.
"""

from __future__ import annotations

import functools
import io
import json
import mmap
import re
import struct
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, PngImagePlugin

from gauge import peak_kib
from vitrail.errors import VitrailError
from vitrail.image.preprocess import preprocess_uint8
from vitrail.spec import ImageSpec

SPEC = ImageSpec(
    convert_rgb=True,
    resize=("shortest", 32),
    resample=3,
    crop=(32, 32),
    rescale=1 / 255,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
EXTREMES = (0, 1, 2, 3, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@functools.cache
def seeds() -> dict[str, list[bytes]]:
    """Small sound files of the five formats, in the modes and kinds that Pillow can write."""
    dice = np.random.default_rng(0)
    rgb = Image.fromarray(dice.integers(0, 256, (6, 7, 3), np.uint8)).resize((56, 48))
    alpha = rgb.copy()
    alpha.putalpha(rgb.convert("L"))
    palette, gray = rgb.quantize(32), rgb.convert("L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "stained glass " * 40, zip=True)
    frames = [rgb.rotate(turn) for turn in (90, 180)]

    def saved(image: Image.Image, kind: str, **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    return {
        "JPEG": [
            saved(rgb, "JPEG"),
            saved(rgb, "JPEG", progressive=True, quality=95, exif=exif.tobytes()),
            saved(gray, "JPEG"),
            saved(rgb.convert("CMYK"), "JPEG"),
            saved(rgb, "JPEG", icc_profile=bytes(range(256)) * 4, restart_marker_blocks=2),
        ],
        "PNG": [
            saved(rgb, "PNG"),
            saved(alpha, "PNG", pnginfo=text),
            saved(palette, "PNG", transparency=3),
            saved(deep, "PNG"),
            saved(rgb.convert("1"), "PNG"),
            saved(gray, "PNG", icc_profile=bytes(range(256)) * 4, exif=exif.tobytes()),
            saved(rgb, "PNG", save_all=True, append_images=frames),
        ],
        "WEBP": [
            saved(rgb, "WEBP"),
            saved(alpha, "WEBP"),
            saved(rgb, "WEBP", lossless=True, exif=exif.tobytes()),
            saved(rgb, "WEBP", save_all=True, append_images=frames),
        ],
        "GIF": [
            saved(palette, "GIF"),
            saved(palette, "GIF", transparency=2, interlace=0),
            saved(rgb, "GIF", save_all=True, append_images=frames),
        ],
        "BMP": [saved(i, "BMP") for i in (rgb, alpha, palette, gray, rgb.convert("1"))],
    }


def case(seed: int, number: int) -> tuple[str, bytes]:
    """Format of the file that was mutated, and the bytes."""
    dice = Random(f"{seed} {number}")
    kind = dice.choice(list(seeds()))
    data = bytearray(dice.choice(seeds()[kind]))
    for _ in range(dice.choice((1, 1, 1, 2, 3, 6))):
        if data:
            dice.choice(MUTATIONS)(dice, data)
    if kind == "PNG" and dice.random() < 0.7:
        data = bytearray(with_checksums(bytes(data)))
    return kind, bytes(data)


def flip(dice: Random, data: bytearray) -> None:
    for _ in range(dice.choice((1, 1, 4, 20))):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def header(dice: Random, data: bytearray) -> None:
    data[dice.randrange(min(len(data), 64))] = dice.randrange(256)


def number(dice: Random, data: bytearray) -> None:
    """An integer of 2 or 4 bytes somewhere, often early, becomes an extreme one."""
    form = dice.choice(("<H", ">H", "<I", ">I"))
    size = struct.calcsize(form)
    if len(data) > size:
        at = dice.randrange(min(len(data) - size, dice.choice((64, len(data)))) or 1)
        struct.pack_into(form, data, at, dice.choice(EXTREMES) & (256**size - 1))


def cut(dice: Random, data: bytearray) -> None:
    del data[dice.randrange(len(data)) :]


def remove(dice: Random, data: bytearray) -> None:
    at = dice.randrange(len(data))
    del data[at : at + dice.choice((1, 4, 40, 400))]


def repeat(dice: Random, data: bytearray) -> None:
    at = dice.randrange(len(data))
    piece = data[at : at + dice.choice((1, 12, 120))]
    data[at:at] = piece * dice.choice((1, 2, 50))


def splice(dice: Random, data: bytearray) -> None:
    other = dice.choice(seeds()[dice.choice(list(seeds()))])
    data[dice.randrange(len(data)) :] = other[dice.randrange(len(other)) :]


def noise(dice: Random, data: bytearray) -> None:
    at = dice.randrange(len(data))
    data[at:at] = dice.randbytes(dice.choice((1, 16, 300)))


MUTATIONS = (flip, header, number, cut, remove, repeat, splice, noise)


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks meet their CRC, as far as its chunks can be followed."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4])
        if end + 4 > len(out):
            break
        struct.pack_into(">I", out, end, zlib.crc32(out[at + 4 : end]))
        at = end + 4
    return bytes(out)


def reason(error: VitrailError) -> str:
    """The words of a refusal without its numbers."""
    return re.sub(r"\d+", "#", str(error).partition(": ")[2])[:60]


def main() -> None:
    seed, count, path = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    path.write_bytes(bytes(8))
    sound = seeds()["JPEG"][0]
    (wanted,) = preprocess_uint8([sound], SPEC, 3)
    assert isinstance(wanted, np.ndarray), wanted
    accepted: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    slowest, slowest_case = 0.0, -1
    with (
        open(path, "r+b") as file,
        mmap.mmap(file.fileno(), 8) as present,
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        for n in range(count):
            present[:] = struct.pack("<q", n)
            kind, data = case(seed, n)
            start = time.process_time()
            (found,) = preprocess_uint8([data], SPEC, 3)
            seconds = time.process_time() - start
            if seconds > slowest:
                slowest, slowest_case = seconds, n
            if isinstance(found, VitrailError):
                refused[f"{kind}: {reason(found)}"] += 1
                (again,) = preprocess_uint8([sound], SPEC, 3)
                assert np.array_equal(again, wanted), f"case {n} changed what came after it"
            else:
                assert found.shape == (32, 32, 3), f"case {n}: {found.shape}"
                accepted[kind] += 1
    facts = {
        "accepted": accepted,
        "refused": refused,
        "slowest": slowest,
        "slowest_case": slowest_case,
        "peak_kib": peak_kib(),
        "warnings": sorted({str(one.message) for one in warned}),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
