"""Resize and center crop in uint8, bit for bit as Pillow 12's two passes: across, then down.

Pillow 13 swaps the order of the passes for some sizes. That changes the bits, because the pixels
between the passes are rounded to uint8. A single pass gives the same bits in every Pillow, so each
pass is a call of its own here. Work that cannot reach the crop is skipped only if the bits provably
stay the same: whole rows and columns between the passes, and everything outside the window if a
pass would make over four times the pixels that are kept.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitrail.image.filters import NEAREST, PRECISION, filter_taps, nearest_source, rows_reached
from vitrail.image.geometry import Axis, down_first

Pixels = npt.NDArray[np.uint8]


def crop_axes(image: Image.Image, rows: Axis, columns: Axis, resample: int) -> Pixels:
    """Resizes and crops an "RGB" or "L" image to uint8 (height, width, channels)."""
    pixels = np.array(resize_window(image, rows, columns, resample))
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if (rows.kept, columns.kept) == (rows.out, columns.out):
        return pixels
    padded = np.zeros((rows.out, columns.out, pixels.shape[2]), np.uint8)
    padded[
        rows.before : rows.before + rows.kept, columns.before : columns.before + columns.kept
    ] = pixels
    return padded


def resize_window(image: Image.Image, rows: Axis, columns: Axis, resample: int) -> Image.Image:
    """The kept window of an "RGB" or "L" image, resized across and then down.

    Only the source rows that reach the window are resized across. As in Pillow 12, an image over
    100 times taller than wide that loses height goes down first.
    """
    if down_first(rows, columns):
        return _across(_down(image, rows, 0, resample), columns, resample)
    top, bottom = rows_reached(rows, resample)
    if 8 * (bottom - top) > 7 * rows.source:
        top, bottom = 0, rows.source
    if bottom - top < rows.source:
        image = image.crop((0, top, columns.source, bottom))
    image = _across(image, columns, resample)
    return _down(image, rows, top, resample)


def _across(image: Image.Image, axis: Axis, resample: int) -> Image.Image:
    if axis.narrow:
        lines = np.asarray(image).swapaxes(0, 1)
        window = _window_pass(lines, axis, 0, resample).swapaxes(0, 1)
        return Image.fromarray(np.ascontiguousarray(window))
    if axis.full != axis.source:
        image = image.resize((axis.full, image.height), Image.Resampling(resample))
    if axis.kept < axis.full:
        image = image.crop((axis.start, 0, axis.stop, image.height))
    return image


def _down(image: Image.Image, axis: Axis, top: int, resample: int) -> Image.Image:
    """``image`` holds the source rows from ``top`` on; rows above do not reach the window."""
    if axis.narrow:
        return Image.fromarray(_window_pass(np.asarray(image), axis, top, resample))
    if axis.full != axis.source:
        if image.height < axis.source:
            padded = Image.new(image.mode, (image.width, axis.source))
            padded.paste(image, (0, top))
            image, top = padded, 0
        image = image.resize((image.width, axis.full), Image.Resampling(resample))
    if axis.kept < image.height:
        image = image.crop((0, axis.start - top, image.width, axis.stop - top))
    return image


def _window_pass(lines: Pixels, axis: Axis, top: int, resample: int) -> Pixels:
    """Pillow's pass along the first axis, for the kept outputs only.

    ``lines`` (n, ...) holds the source from ``top`` on. The sums are integers, so their order is
    free.
    """
    if resample == NEAREST:
        return np.ascontiguousarray(lines[nearest_source(axis) - top])
    start, weights = filter_taps(axis, resample)
    total = np.full((axis.kept, *lines.shape[1:]), 1 << (PRECISION - 1), np.int32)
    shape = (-1,) + (1,) * (lines.ndim - 1)
    for tap in range(weights.shape[1]):
        source = np.minimum(start + tap, axis.source - 1) - top
        reached = lines[np.minimum(source, len(lines) - 1)].astype(np.int32)
        total += weights[:, tap].reshape(shape) * reached
    clipped: Pixels = np.clip(total >> PRECISION, 0, 255).astype(np.uint8)
    return clipped
