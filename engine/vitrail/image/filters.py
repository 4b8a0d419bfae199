"""Pillow's resampling filters, and the taps and integer weights of an axis that follow from them.

Formulas, order of operations and rounding are those of Pillow's Resample.c.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vitrail.image.geometry import Axis

Doubles = npt.NDArray[np.float64]

NEAREST = 0
PRECISION = 22
"""Fraction bits of the integer weights."""
_HAMMING_MEAN, _HAMMING_SWING = float(np.float32(0.54)), float(np.float32(0.46))


def _each(function: Callable[[float], float]) -> Callable[[Doubles], Doubles]:
    """Applies the C library's own function to each value: numpy's vector versions may round
    differently."""

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


_SUPPORTS = {NEAREST: 0.5, 1: 3.0, 2: 1.0, 3: 2.0, 4: 0.5, 5: 1.0}
_FILTERS = {1: _each(_lanczos), 2: _bilinear, 3: _bicubic, 4: _box, 5: _each(_hamming)}


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
    """The source index (n,) of each kept output under NEAREST.

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
    fixed = values * (1 << PRECISION)
    return start, (fixed + np.where(fixed < 0, -0.5, 0.5)).astype(np.int32)
