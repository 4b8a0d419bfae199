"""Images and processors whose pixels are pinned by ``goldens.json``.

Every input is made here, from raw PCG64 words, whose stream numpy promises never to change. What
is encoded is lossless (PNG, BMP, GIF), so that no codec version reaches the pixels. Imports
neither transformers nor vitrail: both sides build what they need from these plain values.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

CLIP_MEAN, CLIP_STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
NEAREST, LANCZOS, BILINEAR, BICUBIC, BOX, HAMMING = range(6)


@dataclass(frozen=True)
class Steps:
    """What a processor does, in the words of ImageSpec."""

    kind: Literal["clip", "vit", "bit"]
    resize: tuple[Any, ...] | None
    resample: int = BICUBIC
    crop: tuple[int, int] | None = None
    rescale: float | None = 1 / 255
    mean: tuple[float, ...] | None = CLIP_MEAN
    std: tuple[float, ...] | None = CLIP_STD


@dataclass(frozen=True)
class Case:
    """One image through one processor.

    ``make`` gives what Vitrail is handed: a PIL image or encoded bytes. ``reference`` gives the PIL
    image that transformers is handed, where that is another one.
    """

    id: str
    steps: Steps
    make: Callable[[], Image.Image | bytes]
    reference: Callable[[], Image.Image] | None = None
    channels: int = 3
    sixteen_bit: Literal["scale", "clip"] = field(default="clip")


CLIP_224 = Steps("clip", ("shortest", 224), BICUBIC, (224, 224))
VIT_224 = Steps("vit", ("exact", 224, 224), BILINEAR, None, 1 / 255, HALF, HALF)
DINOV2_224 = Steps(
    "bit", ("shortest", 256), BICUBIC, (224, 224), 1 / 255, IMAGENET_MEAN, IMAGENET_STD
)
LARGE = {
    "clip-224": CLIP_224,
    "clip-336": Steps("clip", ("shortest", 336), BICUBIC, (336, 336)),
    "vit-224": VIT_224,
    "vit-384": Steps("vit", ("exact", 384, 384), BILINEAR, None, 1 / 255, HALF, HALF),
    "dinov2-224": DINOV2_224,
}
SMALL = {
    "clip-32": Steps("clip", ("shortest", 32), BICUBIC, (32, 32)),
    "dinov2-28": Steps(
        "bit", ("shortest", 32), BICUBIC, (28, 28), 1 / 255, IMAGENET_MEAN, IMAGENET_STD
    ),
    "vit-32": Steps("vit", ("exact", 32, 32), BILINEAR, None, 1 / 255, HALF, HALF),
    "exact-24x40-bicubic": Steps("vit", ("exact", 24, 40)),
    "exact-41x23-lanczos": Steps("vit", ("exact", 41, 23), LANCZOS),
    "shortest-32-nearest": Steps("clip", ("shortest", 32), NEAREST, (32, 32)),
    "shortest-32-lanczos": Steps("clip", ("shortest", 32), LANCZOS, (30, 30)),
    "shortest-32-bilinear": Steps("clip", ("shortest", 32), BILINEAR, (32, 32)),
    "shortest-32-box": Steps("clip", ("shortest", 32), BOX, (32, 32)),
    "shortest-32-hamming": Steps("clip", ("shortest", 32), HAMMING, (32, 32)),
    "shortest-20-no-crop": Steps("clip", ("shortest", 20), BICUBIC, None),
    "crop-only": Steps("clip", None, BICUBIC, (40, 56)),
    "crop-only-odd": Steps("clip", None, BICUBIC, (33, 31)),
    "no-resize-no-crop": Steps("vit", None),
    "crop-not-square": Steps("bit", ("shortest", 32), BICUBIC, (24, 40)),
    "crop-larger": Steps("bit", ("shortest", 24), BICUBIC, (33, 36)),
    "no-rescale": Steps(
        "clip", ("shortest", 32), BICUBIC, (32, 32), None, (120.5, 117.0, 104.0), (58.0, 57.5, 57.0)
    ),
    "no-normalise": Steps("clip", ("shortest", 32), BICUBIC, (32, 32), 1 / 255, None, None),
    "only-resized": Steps("clip", ("shortest", 32), BICUBIC, (32, 32), None, None, None),
    "rescale-127.5": Steps("vit", ("exact", 32, 32), BILINEAR, None, 1 / 127.5, HALF, HALF),
}
# Width, height. Tall and thin is where Pillow 12 and 13 part, beyond 100:1 by a rule of their own.
SIZES = (
    (1, 1), (1, 7), (7, 1), (1, 260), (260, 1), (2, 203), (3, 310), (31, 37), (97, 89), (32, 32),
    (33, 32), (101, 503), (503, 101), (40, 700), (700, 40), (13, 257), (160, 120), (120, 160),
    (64, 48), (300, 299),
)  # fmt: skip
LARGE_SIZES = (
    (640, 480), (480, 640), (211, 1009), (1009, 211), (224, 224), (100, 75), (1, 40), (50, 1),
)  # fmt: skip


def noise(name: str, *shape: int) -> npt.NDArray[np.uint8]:
    """Bytes that depend on ``name`` alone."""
    count = int(np.prod(shape))
    words = np.random.PCG64(zlib.crc32(name.encode())).random_raw(-(-count // 8))
    return np.asarray(words).astype("<u8").view(np.uint8)[:count].reshape(shape)


def picture(name: str, mode: str, width: int, height: int) -> Image.Image:
    """Noise of any Pillow mode; palettes are noise too, "+" asks for transparency."""
    base, _, transparent = mode.partition("+")
    if base == "1":
        return Image.fromarray(noise(name, height, width)).point(lambda v: 255 * (v > 127), "1")
    if base == "I":
        wide = noise(name, height, width, 2).view("<u2")[..., 0]
        return Image.fromarray(wide.astype(np.int32))
    if base == "I;16":
        return Image.fromarray(noise(name, height, width, 2).view("<u2")[..., 0])
    if base == "I;16B":
        return Image.frombytes("I;16B", (width, height), noise(name, height, width, 2).tobytes())
    bands = Image.getmodebands(base)
    pixels = noise(name, height, width, bands)
    image = Image.frombytes(base, (width, height), pixels.tobytes())
    if base == "P":
        image.putpalette(noise(name + "palette", 768).tobytes())
    if transparent == "index":
        image.info["transparency"] = int(pixels[0, 0, 0])
    elif transparent == "alphas":
        image.info["transparency"] = noise(name + "alphas", 256).tobytes()
    elif transparent == "colour":
        image.info["transparency"] = tuple(int(value) for value in pixels[0, 0])
    return image


def encoded(image: Image.Image, file_format: str) -> bytes:
    buffer = io.BytesIO()
    options = {"transparency": t} if (t := image.info.get("transparency")) is not None else {}
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _plain() -> Iterator[Case]:
    for sets, sizes in ((SMALL, SIZES), (LARGE, LARGE_SIZES)):
        for name, steps in sets.items():
            for width, height in sizes:
                key = f"{name}/{width}x{height}"
                yield Case(key, steps, lambda k=key, w=width, h=height: picture(k, "RGB", w, h))
    edge_8 = Steps("clip", ("shortest", 8), BICUBIC, (8, 8))
    exact_8 = Steps("vit", ("exact", 8, 8), BILINEAR, None, 1 / 255, HALF, HALF)
    for name, steps in (("clip-8", edge_8), ("vit-8", exact_8)):
        for width, height in ((1, 30_000), (30_000, 1), (2, 9_001), (9_001, 3)):
            key = f"{name}/{width}x{height}"
            yield Case(key, steps, lambda k=key, w=width, h=height: picture(k, "RGB", w, h))


MODES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("1", (None, "PNG", "BMP")),
    ("L", (None, "PNG", "BMP", "GIF")),
    ("L+index", (None, "PNG")),
    ("LA", (None, "PNG")),
    ("P", (None, "PNG", "BMP", "GIF")),
    ("P+index", (None, "PNG", "GIF")),
    ("P+alphas", (None, "PNG")),
    ("RGB", ("PNG", "BMP")),
    ("RGB+colour", (None, "PNG")),
    ("RGBA", (None, "PNG")),
    ("RGBX", (None,)),
    ("CMYK", (None,)),
    ("YCbCr", (None,)),
    ("HSV", (None,)),
    ("PA", (None,)),
    ("I;16", (None, "PNG")),
    ("I", (None,)),
)


def _modes() -> Iterator[Case]:
    for mode, formats in MODES:
        for file_format in formats:
            for name in ("clip-32", "vit-32"):
                key = f"{name}/{mode}/{file_format or 'PIL'}"

                def make(k: str = key, m: str = mode, f: str | None = file_format) -> Any:
                    image = picture(k, m, 45, 34)
                    return image if f is None else encoded(image, f)

                yield Case(key, SMALL[name], make)


def _sixteen_bit() -> Iterator[Case]:
    """``scale`` has no counterpart in transformers: it is handed the scaled 8-bit grey."""
    for width, height in ((61, 43), (32, 90), (9, 5), (256, 256)):
        for mode, file_format in (("I;16", "PNG"), ("I;16", None), ("I;16B", None), ("I", None)):
            key = f"scaled/{mode}/{file_format or 'PIL'}/{width}x{height}"

            def make(
                k: str = key,
                m: str = mode,
                f: str | None = file_format,
                w: int = width,
                h: int = height,
            ) -> Any:
                image = picture(k, m, w, h)
                return image if f is None else encoded(image, f)

            def scaled(k: str = key, m: str = mode, w: int = width, h: int = height) -> Image.Image:
                values = np.asarray(picture(k, m, w, h)).astype(np.int64)
                return Image.fromarray(((values * 510 + 65_535) // 131_070).astype(np.uint8))

            yield Case(key, SMALL["clip-32"], make, scaled, sixteen_bit="scale")


def _grey() -> Iterator[Case]:
    """One-channel models, whose processors do not convert to RGB."""
    one = {"mean": (0.5,), "std": (0.25,)}
    processors = {
        "grey-clip": Steps("clip", ("shortest", 28), BICUBIC, (28, 28), 1 / 255, **one),
        "grey-vit": Steps("vit", ("exact", 28, 28), BILINEAR, None, 1 / 255, **one),
    }
    for name, steps in processors.items():
        for width, height in SIZES:
            key = f"{name}/{width}x{height}"
            yield Case(
                key, steps, lambda k=key, w=width, h=height: picture(k, "L", w, h), channels=1
            )


def all_cases() -> list[Case]:
    return [*_plain(), *_modes(), *_sixteen_bit(), *_grey()]


def summary(pixels: npt.NDArray[np.float32]) -> str:
    """Shape and SHA-256 of float32 (C, h, w), little endian."""
    from hashlib import sha256

    shape = "x".join(map(str, pixels.shape))
    return f"{shape} {sha256(np.ascontiguousarray(pixels, '<f4').tobytes()).hexdigest()}"
