"""Resize and centre crop in uint8, bit for bit as Pillow's two passes: across, then down.

Pillow up to 12 resizes across first and then down; Pillow 13 swaps the order for some sizes, and
the bits with it, because the pixels between the passes are rounded to uint8. Each pass called by
itself gives the published bits on every Pillow, so that is what happens here. Work that cannot
reach the crop is left out only where the bits provably stay: whole rows and columns between the
passes, and, where a pass would make over four times what is kept, everything but the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitrail.errors import ImageError, InputError
from vitrail.spec import MAX_IMAGE_SIDE, ImageSpec

Pixels = npt.NDArray[np.uint8]
Doubles = npt.NDArray[np.float64]

MAX_RESIZED_PIXELS = 100_000_000
"""The most pixels that one resize pass may make before the crop."""

_NEAREST = 0
_PRECISION = 22
_HAMMING_MEAN, _HAMMING_SWING = float(np.float32(0.54)), float(np.float32(0.46))


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: ``source`` pixels are resized to ``full``, of which [start, stop) are kept.

    The kept ones lie ``before`` zeros into an output of ``out`` pixels.
    """

    source: int
    full: int
    start: int
    stop: int
    before: int
    out: int

    @property
    def kept(self) -> int:
        return self.stop - self.start

    @property
    def narrow(self) -> bool:
        """Whether a whole pass would mostly make pixels that the crop throws away."""
        return self.full != self.source and self.full > 4 * self.kept

    @property
    def made(self) -> int:
        """Pixels along this axis that the pass makes."""
        return self.kept if self.narrow else self.full


def _axis(source: int, full: int, crop: int | None) -> Axis:
    """Centre crop as transformers does it: floor of half the rest, ceiling of half the padding."""
    if crop is None:
        return Axis(source, full, 0, full, 0, full)
    if crop <= full:
        start = (full - crop) // 2
        return Axis(source, full, start, start + crop, 0, crop)
    return Axis(source, full, 0, full, (crop - full + 1) // 2, crop)


def geometry(height: int, width: int, spec: ImageSpec) -> tuple[Axis, Axis]:
    """Rows and columns of the resize and crop of an image of ``height`` x ``width`` pixels."""
    full = (height, width)
    if spec.resize is not None and spec.resize[0] == "exact":
        full = (spec.resize[1], spec.resize[2])
    elif spec.resize is not None:
        edge = spec.resize[1]
        tall = int(edge * height / width), edge
        wide = edge, int(edge * width / height)
        full = tall if width <= height else wide
    crop = spec.crop or (None, None)
    return _axis(height, full[0], crop[0]), _axis(width, full[1], crop[1])


def spec_at(spec: ImageSpec, size: tuple[int, int] | None) -> ImageSpec:
    """``spec`` with its output changed to ``size`` = (height, width) pixels; None: unchanged.

    An exact resize without a crop becomes that size. Elsewhere the crop becomes ``size`` and the
    resize grows by the same factor, the larger of the two axes, rounded half up; a shortest-edge
    resize without a crop counts as cropped to its edge. Raises InputError where ``size`` is not
    two integers from 1 to 16384, or the processor neither resizes nor crops.
    """
    if size is None:
        return spec
    good = isinstance(size, tuple | list) and len(size) == 2
    if not good or not all(type(side) is int and 1 <= side <= MAX_IMAGE_SIDE for side in size):
        raise InputError(f"size: got {size!r}, wanted (height, width) from 1 to {MAX_IMAGE_SIDE}")
    size = size[0], size[1]
    if spec.resize is None:
        if spec.crop is None:
            raise InputError(f"size: got {size!r}, but this processor neither resizes nor crops")
        return replace(spec, crop=size)
    if spec.resize[0] == "exact":
        if spec.crop is None:
            return replace(spec, resize=("exact", *size))
        down = _scaled(spec.resize[1], size[0], spec.crop[0])
        return replace(
            spec, resize=("exact", down, _scaled(spec.resize[2], size[1], spec.crop[1])), crop=size
        )
    edge = spec.resize[1]
    crop = spec.crop or (edge, edge)
    edge = max(_scaled(edge, size[0], crop[0]), _scaled(edge, size[1], crop[1]))
    return replace(spec, resize=("shortest", edge), crop=size)


def _scaled(value: int, numerator: int, denominator: int) -> int:
    scaled = (2 * value * numerator + denominator) // (2 * denominator)
    if not 1 <= scaled <= MAX_IMAGE_SIDE:
        raise InputError(f"size: wants a resize to {scaled} pixels, the most is {MAX_IMAGE_SIDE}")
    return scaled


def frame(height: int, width: int, spec: ImageSpec, where: str) -> tuple[Axis, Axis]:
    """`geometry`. Raises ImageError where the resized image would be over 100 million pixels."""
    rows, columns = geometry(height, width, spec)
    if max(columns.made * rows.source, columns.kept * rows.made) > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"{where}: {width} x {height} pixels would be resized to {columns.full} x "
            f"{rows.full}, over the limit of {MAX_RESIZED_PIXELS} pixels"
        )
    return rows, columns


def crop_image(image: Image.Image, spec: ImageSpec, where: str = "image") -> Pixels:
    """Resize and crop an "RGB" or "L" image to uint8 (height, width, channels).

    Raises ImageError where the resized image would be over 100 million pixels.
    """
    return crop_at(image, *frame(image.height, image.width, spec, where), spec.resample)


def crop_at(image: Image.Image, rows: Axis, columns: Axis, resample: int) -> Pixels:
    """`crop_image` to a `frame`."""
    pixels = np.array(resize_window(image, rows, columns, resample))
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if (rows.kept, columns.kept) == (rows.out, columns.out):
        return pixels
    padded = np.zeros((rows.out, columns.out, pixels.shape[2]), np.uint8)
    padded[
        rows.before : rows.before + rows.kept, columns.before : columns.before + columns.kept
    ] = pixels
    return padded


def down_first(rows: Axis, columns: Axis) -> bool:
    """Whether Pillow 12 takes such an image down before it takes it across."""
    return rows.source > 100 * columns.source and rows.full < rows.source


def resize_window(image: Image.Image, rows: Axis, columns: Axis, resample: int) -> Image.Image:
    """The kept window of ``image`` resized across and then down; mode "RGB" or "L".

    Only the source rows which reach the window are resized across. As in Pillow 12, an image over
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
    """``image`` holds the rows from ``top`` on; the others do not reach the kept rows."""
    if axis.narrow:
        return Image.fromarray(_window_pass(np.asarray(image), axis, top, resample))
    if axis.full != axis.source:
        if image.height < axis.source:
            whole = Image.new(image.mode, (image.width, axis.source))
            whole.paste(image, (0, top))
            image, top = whole, 0
        image = image.resize((image.width, axis.full), Image.Resampling(resample))
    if axis.kept < image.height:
        image = image.crop((0, axis.start - top, image.width, axis.stop - top))
    return image


def rows_reached(axis: Axis, resample: int) -> tuple[int, int]:
    """Source rows [top, bottom) that the kept rows are made of, with a row to spare."""
    if axis.full == axis.source:
        return axis.start, axis.stop
    scale = axis.source / axis.full
    reach = _SUPPORTS[resample] * max(scale, 1.0) + 2
    top = math.floor((axis.start + 0.5) * scale - reach)
    bottom = math.ceil((axis.stop - 0.5) * scale + reach)
    return max(0, top), min(axis.source, bottom)


def _window_pass(lines: Pixels, axis: Axis, top: int, resample: int) -> Pixels:
    """Pillow's pass along the first axis, for the kept outputs only.

    ``lines`` (n, ...) holds the source from ``top`` on. Integers, so the order of sums is free.
    """
    if resample == _NEAREST:
        return np.ascontiguousarray(lines[_nearest(axis) - top])
    first, weights = _taps(axis, resample)
    total = np.full((axis.kept, *lines.shape[1:]), 1 << (_PRECISION - 1), np.int32)
    shape = (-1,) + (1,) * (lines.ndim - 1)
    for tap in range(weights.shape[1]):
        source = np.minimum(first + tap, axis.source - 1) - top
        reached = lines[np.minimum(source, len(lines) - 1)].astype(np.int32)
        total += weights[:, tap].reshape(shape) * reached
    clipped: Pixels = np.clip(total >> _PRECISION, 0, 255).astype(np.uint8)
    return clipped


def _nearest(axis: Axis) -> npt.NDArray[np.int64]:
    """Pillow steps through the source by repeated addition; cumsum adds in the same order."""
    steps = np.full(axis.stop, axis.source / axis.full)
    steps[0] *= 0.5
    return np.cumsum(steps)[axis.start :].astype(np.int64)


def _taps(axis: Axis, resample: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """First source index (n,) and 22-bit weights (n, taps) of the kept outputs.

    The formula, its order of operations and its rounding are those of Pillow's Resample.c; a sum
    of doubles depends on its order, hence the loop over taps.
    """
    scale = axis.source / axis.full
    stretch = max(scale, 1.0)
    reach = _SUPPORTS[resample] * stretch
    centre = (np.arange(axis.start, axis.stop) + 0.5) * scale
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + reach + 0.5).astype(np.int64), axis.source) - first
    taps = int(count.max())
    offsets = np.arange(taps)
    distance = ((offsets + first[:, None]) - centre[:, None] + 0.5) * (1.0 / stretch)
    values = np.where(offsets < count[:, None], _FILTERS[resample](distance), 0.0)
    total = np.zeros(axis.kept)
    for tap in range(taps):
        total += values[:, tap]
    values /= np.where(total == 0.0, 1.0, total)[:, None]
    fixed = values * (1 << _PRECISION)
    return first, (fixed + np.where(fixed < 0, -0.5, 0.5)).astype(np.int32)


def _each(function: Callable[[float], float]) -> Callable[[Doubles], Doubles]:
    """The C library's own function of each value: numpy's vector ones may round otherwise."""

    def apply(values: Doubles) -> Doubles:
        flat = [function(value) for value in values.ravel().tolist()]
        return np.array(flat).reshape(values.shape)

    return apply


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
_FILTERS = {1: _each(_lanczos), 2: _bilinear, 3: _bicubic, 4: _box, 5: _each(_hamming)}
