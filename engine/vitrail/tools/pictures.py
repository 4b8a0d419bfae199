"""The pictures that `vitrail quantize` calibrates with, and the pictures that it checks with."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import islice

import torch
from PIL import Image
from torch import Tensor

from vitrail.errors import ImageError, InputError, VitrailError
from vitrail.image.decoding import decode
from vitrail.image.preprocess import preprocess_uint8
from vitrail.image.sources import PixelInput
from vitrail.int8.record import Origin
from vitrail.jobs.listing import Source
from vitrail.spec import ImageSpec, VisionSpec

CROPS = 36
"""Crops of the sample photos that calibrate by default: 6 of each."""
CHECKED = 64
CALIBRATED = 64
SMALLEST_CROP = 0.45
"""The side of the smallest crop, as a fraction of the photo's shorter side."""
STEPS = tuple(1.2207440846057596**-power for power in (1, 2, 3))
"""Multiples of these numbers, less their integers, fill a cube evenly (the sequence R3, from the
root of x^4 = x + 1)."""
READ_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Pictures:
    """uint8 pixels (H, W, channels) as the model's processor makes them.

    ``origin`` of the ``calibration`` pictures. ``own``: the ``checked`` pictures are the user's.
    ``unread``: why some of the user's images were left out.
    """

    calibration: list[Tensor]
    checked: list[Tensor]
    origin: Origin
    own: bool
    unread: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """`pixel_digest` of the calibration pictures."""
        return pixel_digest(self.calibration)


def sample_pictures(
    image: ImageSpec, vision: VisionSpec, calibration: int = CROPS, checked: int = CHECKED
) -> Pictures:
    """Crops of the sample photos. The checked crops are none of those that calibrate."""
    crops = _crops(image, vision)
    return Pictures(
        list(islice(crops, calibration)), list(islice(crops, checked)), "bundled", own=False
    )


def own_pictures(
    sources: Sequence[Source],
    image: ImageSpec,
    vision: VisionSpec,
    calibration: int = CALIBRATED,
    checked: int = CHECKED,
) -> Pictures:
    """Readable images from all over ``sources``, each with pixels that no earlier one has.

    With a ``calibration`` of 0, crops of the sample photos calibrate. Raises InputError if there
    are too few images.
    """
    unread: list[str] = []
    pixels = list(islice(_distinct(sources, image, vision, unread), calibration + checked))
    if len(pixels) < calibration + checked:
        failed = f", and {len(unread)} that cannot be read, first: {unread[0]}" if unread else ""
        raise InputError(
            f"images: got {len(pixels)} different ones{failed}; wanted {calibration} to calibrate "
            f"with and {checked} to check with: give more images, or --calibration 0, by which the "
            "sample photos calibrate"
        )
    if calibration:
        return Pictures(pixels[:calibration], pixels[calibration:], "own", True, unread)
    crops = list(islice(_crops(image, vision), CROPS))
    return Pictures(crops, pixels, "bundled", True, unread)


def _distinct(
    sources: Sequence[Source], image: ImageSpec, vision: VisionSpec, unread: list[str]
) -> Iterator[Tensor]:
    # sorted by a hash, since neighbors in a listing are often alike
    order = sorted(range(len(sources)), key=lambda i: hashlib.sha256(f"{i}".encode()).digest())
    digests = set()
    for start in range(0, len(order), READ_AT_ONCE):
        images = [sources[i] for i in order[start : start + READ_AT_ONCE]]
        for source, pixels in zip(images, _preprocess(images, image, vision), strict=True):
            if isinstance(pixels, VitrailError):
                unread.append(str(pixels) if str(source) in str(pixels) else f"{source}: {pixels}")
                continue
            digest = pixel_digest([pixels])
            if digest not in digests:
                digests.add(digest)
                yield pixels


def _crops(image: ImageSpec, vision: VisionSpec) -> Iterator[Tensor]:
    """Crops of the sample photos without end: the first of each photo, the second of each, ..."""
    folder = resources.files("vitrail") / "assets" / "photos"
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    photos = [
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
        for pixels in (decode(file.read_bytes(), channels=vision.channels) for file in files)
    ]
    number = 0
    while True:
        crops = [photo.crop(crop_box(photo.width, photo.height, number)) for photo in photos]
        for pixels in _preprocess(crops, image, vision):
            if isinstance(pixels, VitrailError):
                raise pixels
            yield pixels
        number += 1


def crop_box(width: int, height: int, number: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a square crop, another for each ``number`` from 0."""
    size, across, down = (math.modf(0.5 + number * step)[0] for step in STEPS)
    side = max(1, round(min(width, height) * (SMALLEST_CROP + (1 - SMALLEST_CROP) * size)))
    left, top = round((width - side) * across), round((height - side) * down)
    return left, top, left + side, top + side


def _preprocess(
    images: Sequence[PixelInput], image: ImageSpec, vision: VisionSpec
) -> Iterator[Tensor | VitrailError]:
    for pixels in preprocess_uint8(images, image, vision.channels):
        if isinstance(pixels, VitrailError):
            yield pixels
        elif 0 in vision.grid_at(pixels.shape[:2]):
            height, width = pixels.shape[:2]
            down, across = vision.patch
            yield ImageError(
                f"got {width}x{height} pixels after preprocessing, wanted at least one patch of "
                f"{across}x{down}"
            )
        else:
            yield torch.from_numpy(pixels)


def pixel_digest(images: Iterable[Tensor]) -> str:
    """SHA-256 of the shapes and values of ``images``."""
    digest = hashlib.sha256()
    for pixels in images:
        digest.update(f"{tuple(pixels.shape)}".encode())
        digest.update(pixels.numpy().tobytes())
    return digest.hexdigest()
