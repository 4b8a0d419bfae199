"""The tables of `resize`: the sources and weights of all outputs, from Pillow's filters

    images  (B, 8) int64, for each image: the first byte that is needed, bytes from line to line,
            lines that are needed, its first group in middle, the start of its columns' table in
            taps and that table's taps, then the same for its rows
    groups  (G,) int32: the image of each group of 16 lines of middle
    taps    int32, tables one after the other: (n,) first source, (n,) number of sources,
            (taps, n) weights of n outputs

The tables are made on the host, and the kernels know nothing of crops or filters. If an axis keeps
its size, each output is its source with weight 2^22, which is exact. An output outside the resized
image has no sources and is 0, as transformers pads.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitrail_kernels.launch import cdiv

LINES = 16
"""The lines of ``middle`` in a group, all of the same image."""

FIELDS = 8
"""The fields of an image in ``images``."""

PRECISION = 22
NEAREST, LANCZOS, BILINEAR, BICUBIC, BOX, HAMMING = range(6)
"""Filters, by Pillow's numbers."""

Ints = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
Size = tuple[int, int]


class ResizeTables(NamedTuple):
    """``images``, ``groups`` and ``taps`` on the CPU, the shape of ``middle``, and the number of
    bytes in ``pixels``."""

    images: Tensor
    groups: Tensor
    taps: Tensor
    middle: Size
    pixels: int


def resize_tables(
    sizes: Sequence[Size],
    outputs: Sequence[Size],
    corners: Sequence[Size],
    *,
    window: Size,
    resample: int,
    channels: int,
) -> ResizeTables:
    """The tables for images of ``sizes``, one after the other in ``pixels``, (H, W, channels) each.

    Image i is resized to ``outputs[i]``. The ``window`` from ``corners[i]`` = (top, left) of the
    result is kept, and is 0 outside the result. All sizes are (height, width). ``resample`` is
    Pillow's number of the filter. Raises ValueError for sizes below 1, lists of different lengths,
    an unknown filter, and lines of 2^27 bytes or more.
    """
    if not len(sizes) == len(outputs) == len(corners):
        raise ValueError(
            f"resize: got {len(sizes)} sizes, {len(outputs)} outputs and {len(corners)} corners, "
            "wanted as many of each"
        )
    if resample not in range(6):
        raise ValueError(f"resize: resample: got {resample!r}, wanted one of Pillow's 0 to 5")
    smallest = min([channels, *window, *(side for size in (*sizes, *outputs) for side in size)])
    if smallest < 1:
        raise ValueError(f"resize: got a side, or channels, of {smallest}, wanted at least 1")
    line_bytes = max([window[1], *(width for _, width in sizes)]) * channels
    if line_bytes >= 1 << 27:
        raise ValueError(f"resize: got a line of {line_bytes} bytes, wanted less than 2^27")
    pairs = [
        tuple(zip(size, output, corner, window, strict=True))
        for size, output, corner in zip(sizes, outputs, corners, strict=True)
    ]
    keys = dict.fromkeys(key for pair in pairs for key in pair)
    axes = {key: _axis(*key, resample) for key in keys}
    sums = itertools.accumulate((axis.table.size for axis in axes.values()), initial=0)
    offsets = dict(zip(axes, sums, strict=False))

    start, images = 0, []
    groups: list[int] = []
    for number, ((height, width), (down, across)) in enumerate(zip(sizes, pairs, strict=True)):
        rows, columns = axes[down], axes[across]
        first_byte = start + (rows.first * width + columns.first) * channels
        image = (first_byte, width * channels, rows.length, len(groups))
        column_table = offsets[across], len(columns.table) - 2
        row_table = offsets[down], len(rows.table) - 2
        images.append((*image, *column_table, *row_table))
        groups += [number] * cdiv(rows.length, LINES)
        start += height * width * channels
    taps = np.concatenate([axis.table.ravel() for axis in axes.values()] or [_NO_TAPS])
    return ResizeTables(
        torch.tensor(images, dtype=torch.int64, device="cpu").view(-1, FIELDS),
        torch.tensor(groups, dtype=torch.int32, device="cpu"),
        torch.from_numpy(taps),
        (LINES * len(groups), 16 * cdiv(window[1] * channels, 16)),
        start,
    )


class _Axis(NamedTuple):
    """An axis of a resize: it needs ``length`` sources from ``first`` on, and ``table`` (2 + taps,
    n) counts sources from ``first``."""

    table: npt.NDArray[np.int32]
    first: int
    length: int


_NO_TAPS = np.zeros(0, np.int32)
_HAMMING_MEAN, _HAMMING_SWING = float(np.float32(0.54)), float(np.float32(0.46))


@functools.lru_cache(maxsize=512)
def _axis(source: int, output: int, start: int, length: int, resample: int) -> _Axis:
    """The axis from ``source`` pixels to ``output``, cropped to ``length`` from ``start``."""
    low, high = max(start, 0), min(start + length, output)
    if low >= high:
        return _Axis(np.zeros((2, length), np.int32), 0, 0)
    if output == source or resample == NEAREST:
        sources = _nearest(source, output, high)[low:]
        count, weights = np.ones_like(sources), np.full((high - low, 1), 1 << PRECISION)
    else:
        sources, count, weights = _windows(source, output, low, high, resample)
    top, taps = int(sources.min()), weights.shape[1]
    table = np.zeros((2 + taps, length), np.int32)
    table[:, low - start : high - start] = (sources - top, count, *weights.T)
    table.setflags(write=False)
    return _Axis(table, top, int((sources + count).max()) - top)


def _nearest(source: int, output: int, stop: int) -> Ints:
    """The source of each output before ``stop``. Pillow steps by repeated addition; cumsum adds in
    the same order."""
    steps = np.full(stop, source / output)
    steps[0] *= 0.5
    return np.cumsum(steps).astype(np.int64)


def _windows(
    source: int, output: int, low: int, high: int, resample: int
) -> tuple[Ints, Ints, Ints]:
    """First source (n,), number of sources (n,) and weights (n, taps) of outputs [low, high).

    Formula, order of operations and rounding are those of Pillow's Resample.c, in double.
    """
    support, function = _FILTERS[resample]
    scale = source / output
    stretch = max(scale, 1.0)
    reach = support * stretch
    center = (np.arange(low, high) + 0.5) * scale
    start = np.maximum((center - reach + 0.5).astype(np.int64), 0)
    count = np.minimum((center + reach + 0.5).astype(np.int64), source) - start
    offsets = np.arange(int(count.max()))
    if (len(offsets) + 2) * len(start) >= 1 << 31:
        raise ValueError(f"resize: got {source} pixels to {output}: more than 2^31 weights")
    distance = (offsets + start[:, None] - center[:, None] + 0.5) * (1.0 / stretch)
    values = np.where(offsets < count[:, None], function(distance), 0.0)
    total = np.cumsum(values, axis=1)[:, -1:]  # adds in order, unlike np.sum
    values /= np.where(total == 0.0, 1.0, total)
    fixed = values * (1 << PRECISION)
    weights = (fixed + np.where(fixed < 0, -0.5, 0.5)).astype(np.int64)
    largest = 255 * np.maximum(weights, 0).sum(1).max() + (1 << (PRECISION - 1))
    assert largest < 1 << 31, f"resize: {source} to {output}: sums of {largest}, wanted 31 bits"
    return start, count, weights


def _elementwise(function: Callable[[float], float]) -> Callable[[Doubles], Doubles]:
    """``function`` of every value by the C library: NumPy's vectorized sin may round otherwise."""

    def apply(values: Doubles) -> Doubles:
        flat = [function(value) for value in values.ravel().tolist()]
        return np.array(flat).reshape(values.shape)

    return apply


def _sinc(x: float) -> float:
    return 1.0 if x == 0.0 else math.sin(x * math.pi) / (x * math.pi)


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3.0 <= x < 3.0 else 0.0


def _hamming(x: float) -> float:
    x = abs(x)
    if x == 0.0 or x >= 1.0:
        return 1.0 - min(x, 1.0)
    x *= math.pi
    return math.sin(x) / x * (_HAMMING_MEAN + _HAMMING_SWING * math.cos(x))


def _bicubic(x: Doubles) -> Doubles:
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _bilinear(x: Doubles) -> Doubles:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _box(x: Doubles) -> Doubles:
    return ((x > -0.5) & (x <= 0.5)).astype(np.float64)


_FILTERS = {
    LANCZOS: (3.0, _elementwise(_lanczos)),
    BILINEAR: (1.0, _bilinear),
    BICUBIC: (2.0, _bicubic),
    BOX: (0.5, _box),
    HAMMING: (1.0, _elementwise(_hamming)),
}
