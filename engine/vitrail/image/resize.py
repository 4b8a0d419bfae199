"""Resize and center crop in uint8, bit for bit as Pillow 12's two passes: across, then down.

Pillow 13 swaps the order of the passes for some sizes. That changes the bits, because the pixels
between the passes are rounded to uint8. A single pass gives the same bits in every Pillow, so each
pass is a call of its own here. Work that cannot reach the crop is skipped only if the bits provably
stay the same: whole rows and columns between the passes, and everything outside the window if a
pass would make over four times the pixels that are kept.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitrail.image.geometry import Axis, down_first

Pixels = npt.NDArray[np.uint8]
Doubles = npt.NDArray[np.float64]

_NEAREST = 0
_PRECISION = 22  # fraction bits of the integer weights
_HAMMING_MEAN, _HAMMING_SWING = float(np.float32(0.54)), float(np.float32(0.46))


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
    if resample == _NEAREST:
        return np.ascontiguousarray(lines[nearest_source(axis) - top])
    start, weights = filter_taps(axis, resample)
    total = np.full((axis.kept, *lines.shape[1:]), 1 << (_PRECISION - 1), np.int32)
    shape = (-1,) + (1,) * (lines.ndim - 1)
    for tap in range(weights.shape[1]):
        source = np.minimum(start + tap, axis.source - 1) - top
        reached = lines[np.minimum(source, len(lines) - 1)].astype(np.int32)
        total += weights[:, tap].reshape(shape) * reached
    clipped: Pixels = np.clip(total >> _PRECISION, 0, 255).astype(np.uint8)
    return clipped


# -- filters, with the formulas, order of operations and rounding of Pillow's Resample.c ----------


def _hamming(x: float) -> float:
    x = abs(x)
    if x == 0.0:
        return 1.0
    if x >= 1.0:
        return 0.0
    x *= math.pi
    return math.sin(x) / x * (_HAMMING_MEAN + _HAMMING_SWING * math.cos(x))


def _sinc(x: float) -> float:
    return 1.0 if x == 0.0 else math.sin(x * math.pi) / (x * math.pi)


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3.0 <= x < 3.0 else 0.0


def _bicubic(x: Doubles) -> Doubles:
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _bilinear(x: Doubles) -> Doubles:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _box(x: Doubles) -> Doubles:
    return ((x > -0.5) & (x <= 0.5)).astype(np.float64)


_SUPPORTS = {_NEAREST: 0.5, 1: 3.0, 2: 1.0, 3: 2.0, 4: 0.5, 5: 1.0}
# vectorize calls the C library's sine for each value; numpy's own sine may round differently
_FILTERS: dict[int, Callable[[Doubles], Doubles]] = {
    1: np.vectorize(_lanczos, otypes=[np.float64]),
    2: _bilinear,
    3: _bicubic,
    4: _box,
    5: np.vectorize(_hamming, otypes=[np.float64]),
}


def rows_reached(axis: Axis, resample: int) -> tuple[int, int]:
    """Source rows [top, bottom) that the kept rows depend on, with a row to spare."""
    if axis.full == axis.source:
        return axis.start, axis.stop
    scale = axis.source / axis.full
    reach = _SUPPORTS[resample] * max(scale, 1.0) + 2
    top = math.floor((axis.start + 0.5) * scale - reach)
    bottom = math.ceil((axis.stop - 0.5) * scale + reach)
    return max(0, top), min(axis.source, bottom)


def nearest_source(axis: Axis) -> npt.NDArray[np.int64]:
    """The source index (n,) of each kept output under Pillow's NEAREST.

    Pillow steps through the source by repeated addition; cumsum adds in the same order.
    """
    steps = np.full(axis.stop, axis.source / axis.full)
    steps[0] *= 0.5
    return np.cumsum(steps)[axis.start :].astype(np.int64)


def filter_taps(axis: Axis, resample: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """First source index (n,) and integer weights (n, taps) of each kept output.

    The loop over taps keeps Pillow's order of additions: a sum of doubles depends on its order.
    """
    scale = axis.source / axis.full
    stretch = max(scale, 1.0)
    reach = _SUPPORTS[resample] * stretch
    center = (np.arange(axis.start, axis.stop) + 0.5) * scale
    start = np.maximum((center - reach + 0.5).astype(np.int64), 0)
    count = np.minimum((center + reach + 0.5).astype(np.int64), axis.source) - start
    taps = int(count.max())
    offsets = np.arange(taps)
    distance = ((offsets + start[:, None]) - center[:, None] + 0.5) * (1.0 / stretch)
    values = np.where(offsets < count[:, None], _FILTERS[resample](distance), 0.0)
    total = np.zeros(axis.kept)
    for tap in range(taps):
        total += values[:, tap]
    values /= np.where(total == 0.0, 1.0, total)[:, None]
    fixed = values * (1 << _PRECISION)
    return start, (fixed + np.where(fixed < 0, -0.5, 0.5)).astype(np.int32)
