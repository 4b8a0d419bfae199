"""resize: uint8 images of mixed sizes -> one uint8 window of each, bit for bit as Pillow does

    middle  = clip((2^21 + sum_t u[first + t] weight[t]) >> 22), along each line that is needed
    out     = the same down the columns of middle

FLOPs  none counted      bytes  pixels + 2 middle + out      bound  by memory

First across, then down, with uint8 between: Pillow's order up to version 12, except that it takes
an image over 100 times taller than wide that loses height down first; such an image is its caller's
to resize. The first source pixels and 22-bit weights of all outputs are made by `resize_tables` on
the host, in double and in Pillow's order of operations; what follows is integers, so that every
implementation and order of sums has the same bits. Tables hold nothing of crops or filters:

    images  (B, 8) int64: first byte of pixels that is needed, bytes from line to line, lines
            needed, first group in middle, the columns' table and its taps, the rows' and its taps
    groups  (G,) int32: the image of each group of 16 lines of middle
    taps    int32 tables: (n,) first source, (n,) how many, (taps, n) weights for n outputs

Of an axis that keeps its size each output is its source with weight 2^22, which is exact; an output
outside its resized image has no sources and is 0, which is how transformers pads. At 255 times the
largest sum of weights (Lanczos at an edge) a sum takes 65 % of 31 bits.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitrail_kernels.configs import KernelConfig, tuned
from vitrail_kernels.cost import Cost, traffic
from vitrail_kernels.device.overlap import wait_for_previous
from vitrail_kernels.launch import (
    Call,
    Grid,
    Target,
    cdiv,
    check_tensor,
    jit,
    launch,
    target_of,
    tl,
)

LINES = 16
"""Lines of ``middle`` in a group, all of one image."""

TOGETHER = 4
"""Lines of a group that one program makes."""

FIELDS = 8
PRECISION = 22
NEAREST, LANCZOS, BILINEAR, BICUBIC, BOX, HAMMING = range(6)
"""Filters, by Pillow's numbers."""

Ints = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
Size = tuple[int, int]


def resize_ref(
    out: Tensor, middle: Tensor, pixels: Tensor, images: Tensor, groups: Tensor, taps: Tensor
) -> None:
    """Write ``out`` (B, h, w, channels) from ``pixels``, all uint8; see `resize_tables`.

    ``middle`` (16 G, w channels rounded up to 16) holds the lines between the passes.
    """
    _, height, width, channels = out.shape
    for image, window in zip(images.tolist(), out, strict=True):
        start, stride, lines, group, columns, column_taps, rows, row_taps = image
        across = taps[columns : columns + (2 + column_taps) * width].view(-1, width)
        down = taps[rows : rows + (2 + row_taps) * height].view(-1, height)
        if lines == 0:  # the window lies above or below the image
            window.zero_()
            continue
        needed = int((across[0] + across[1]).max())
        size, strides = (needed, lines, channels), (channels, stride, 1)
        made = _pass(pixels.as_strided(size, strides, start + pixels.storage_offset()), across)
        between = middle[LINES * group : LINES * group + lines, : width * channels]
        between.copy_(made.transpose(0, 1).flatten(1))
        window.copy_(_pass(between, down).view(window.shape))


def _pass(lines: Tensor, table: Tensor) -> Tensor:
    """``lines`` resampled along the first dimension, by one table of ``taps``."""
    first, count, weights = table[0].long(), table[1], table[2:]
    shape = (len(first),) + (1,) * (lines.dim() - 1)
    total = lines.new_full((len(first), *lines.shape[1:]), 1 << (PRECISION - 1), dtype=torch.int32)
    for tap, weight in enumerate(weights):
        used = tap < count
        source = torch.where(used, first + tap, 0)
        total += torch.where(used, weight, 0).view(shape) * lines[source].int()
    return (total >> PRECISION).clamp(0, 255).to(torch.uint8)


@jit()
def _byte_of(acc: tl.tensor) -> tl.tensor:
    """A sum in 22 binary places, rounded as Pillow rounds: half is in the sum from the start."""
    return tl.minimum(tl.maximum(acc >> 22, 0), 255).to(tl.uint8)


@jit(varying=("width", "stride"))
def _across_kernel(
    middle_ptr: tl.tensor,  # (G LINES, stride) uint8
    pixels_ptr: tl.tensor,  # uint8
    images_ptr: tl.tensor,  # (B, FIELDS) int64
    groups_ptr: tl.tensor,  # (G,) int32
    taps_ptr: tl.tensor,  # int32
    width: int,  # columns of the output
    stride: int,  # from one line of middle to the next
    CHANNELS: tl.constexpr,
    FIELDS: tl.constexpr,
    LINES: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """BLOCK_N numbers, (column, channel) in one, of four lines, which share the weights.

    Four vectors and no matrix: as one, which lanes of a warp lie side by side is up to the compiler
    and its version, and loads of single bytes are only fast along a line.
    """
    wait_for_previous(PDL)
    tl.static_assert(TOGETHER == 4, "the lines are written out below")
    PARTS: tl.constexpr = LINES // TOGETHER
    numbers = width * CHANNELS
    tiles = (numbers + BLOCK_N - 1) // BLOCK_N
    part = tl.program_id(0) // tiles
    group = part // PARTS
    offs_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < numbers
    image_ptr = images_ptr + tl.load(groups_ptr + group).to(tl.int64) * FIELDS

    # where the lines begin; one that the group has and the image has not is read as its last
    line = part - tl.load(image_ptr + 3) * PARTS
    line *= TOGETHER
    last = tl.load(image_ptr + 2) - 1
    line_stride = tl.load(image_ptr + 1)
    base = pixels_ptr + tl.load(image_ptr)
    line_0 = base + tl.minimum(line, last) * line_stride
    line_1 = base + tl.minimum(line + 1, last) * line_stride
    line_2 = base + tl.minimum(line + 2, last) * line_stride
    line_3 = base + tl.minimum(line + 3, last) * line_stride

    table_ptr = taps_ptr + tl.load(image_ptr + 4)
    column = offs_n // CHANNELS
    at = tl.load(table_ptr + column, mask=mask_n, other=0) * CHANNELS + offs_n % CHANNELS
    count = tl.load(table_ptr + width + column, mask=mask_n, other=0)
    weight_ptrs = table_ptr + 2 * width + column
    acc_0 = tl.full((BLOCK_N,), 1 << 21, tl.int32)
    acc_1, acc_2, acc_3 = acc_0, acc_0, acc_0
    taps = tl.where(line <= last, tl.load(image_ptr + 5), 0).to(tl.int32)
    for tap in range(taps):
        used = tap < count
        weight = tl.load(weight_ptrs + tap * width, mask=used, other=0)
        acc_0 += tl.load(line_0 + at, mask=used, other=0).to(tl.int32) * weight
        acc_1 += tl.load(line_1 + at, mask=used, other=0).to(tl.int32) * weight
        acc_2 += tl.load(line_2 + at, mask=used, other=0).to(tl.int32) * weight
        acc_3 += tl.load(line_3 + at, mask=used, other=0).to(tl.int32) * weight
        at += CHANNELS
    out_ptrs = middle_ptr + part.to(tl.int64) * TOGETHER * stride + offs_n
    tl.store(out_ptrs, _byte_of(acc_0), mask=mask_n & (line <= last))
    tl.store(out_ptrs + stride, _byte_of(acc_1), mask=mask_n & (line + 1 <= last))
    tl.store(out_ptrs + 2 * stride, _byte_of(acc_2), mask=mask_n & (line + 2 <= last))
    tl.store(out_ptrs + 3 * stride, _byte_of(acc_3), mask=mask_n & (line + 3 <= last))


@jit(varying=("height", "numbers", "stride"))
def _down_kernel(
    out_ptr: tl.tensor,  # (B, height, ALIGN numbers) uint8
    middle_ptr: tl.tensor,  # (G LINES, 16 stride) uint8
    images_ptr: tl.tensor,  # (B, FIELDS) int64
    taps_ptr: tl.tensor,  # int32
    height: int,  # of the output
    numbers: int,  # of a line of the output, in units of ALIGN
    stride: int,  # from one line of middle to the next, in 16 bytes
    ALIGN: tl.constexpr,
    FIELDS: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """BLOCK_N numbers of BLOCK_M lines of one image's output."""
    wait_for_previous(PDL)
    numbers *= ALIGN
    stride *= 16
    across = (numbers + BLOCK_N - 1) // BLOCK_N
    tiles = (height + BLOCK_M - 1) // BLOCK_M * across
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    offs_m = tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < height
    mask_n = offs_n < stride  # whole 16 bytes: what is past the output's numbers is not stored

    image_ptr = images_ptr + image * FIELDS
    table_ptr = taps_ptr + tl.load(image_ptr + 6)
    first = tl.load(table_ptr + offs_m, mask=mask_m, other=0)
    count = tl.load(table_ptr + height + offs_m, mask=mask_m, other=0)
    line_ptrs = middle_ptr + (tl.load(image_ptr + 3) * LINES + first) * stride
    weight_ptrs = table_ptr + 2 * height + offs_m
    acc = tl.full((BLOCK_M, BLOCK_N), 1 << 21, tl.int32)
    for tap in range(tl.load(image_ptr + 7).to(tl.int32)):
        used = tap < count
        weight = tl.load(weight_ptrs + tap * height, mask=used, other=0)
        mask = used[:, None] & mask_n[None, :]
        pixel = tl.load(line_ptrs[:, None] + offs_n[None, :], mask=mask, other=0)
        acc += pixel.to(tl.int32) * weight[:, None]
        line_ptrs += stride
    base = out_ptr + image * height * numbers
    mask = mask_m[:, None] & (offs_n < numbers)[None, :]
    tl.store(base + (offs_m[:, None] * numbers + offs_n[None, :]), _byte_of(acc), mask=mask)


def resize_cost(
    out: Tensor, middle: Tensor, pixels: Tensor, images: Tensor, groups: Tensor, taps: Tensor
) -> Cost:
    """Traffic with ``middle`` written and read; a crop leaves some of ``pixels`` unread."""
    return Cost(0, traffic(out, middle, middle, pixels, images, groups, taps))


# -- the launcher ----------------------------------------------------------------------------------


def _config(target: Target, kernel: str, channels: int, heuristic: KernelConfig) -> KernelConfig:
    return tuned(target.arch).get(f"resize|uint8|{kernel} {channels}", heuristic)


def check_resize(
    out: Tensor, middle: Tensor, pixels: Tensor, images: Tensor, groups: Tensor, taps: Tensor
) -> None:
    """Raises ValueError for what the kernels cannot take."""
    if out.dim() != 4 or 0 in out.shape[1:] or math.prod(out.shape[1:]) >= 1 << 31:
        raise ValueError(
            f"resize: out: got shape {tuple(out.shape)}, wanted (B, h, w, channels) of less than "
            "2^31 numbers an image"
        )
    batch, _, width, channels = out.shape
    stride = 16 * cdiv(width * channels, 16)
    check_tensor("resize: out", out, out, torch.uint8, out.shape)
    check_tensor("resize: pixels", pixels, out, torch.uint8, (pixels.numel(),))
    check_tensor("resize: images", images, out, torch.int64, (batch, FIELDS))
    check_tensor("resize: groups", groups, out, torch.int32, (groups.numel(),))
    check_tensor("resize: taps", taps, out, torch.int32, (taps.numel(),))
    check_tensor("resize: middle", middle, out, torch.uint8, (LINES * groups.numel(), stride))


def resize_calls(
    target: Target,
    out: Tensor,
    middle: Tensor,
    pixels: Tensor,
    images: Tensor,
    groups: Tensor,
    taps: Tensor,
) -> list[Call]:
    """The launches of `resize_ref`. Raises ValueError for another shape, dtype or layout.

    What the tables say is taken as it is: ``pixels`` holds as many bytes as they were made for.
    """
    check_resize(out, middle, pixels, images, groups, taps)
    batch, height, width, channels = out.shape
    numbers, stride = width * channels, middle.shape[1]
    align = math.gcd(numbers, 16) if out.data_ptr() % 16 == 0 else 1
    why = "one number a thread: neighbours on a line are neighbours in a warp"
    across = _config(target, "across", channels, KernelConfig(0, 128, 0, 4, 1, reason=why))
    why = "16 sums a thread, of the 16 bytes that it loads at a time"
    down = _config(target, "down", channels, KernelConfig(8, 256, 0, 4, 1, reason=why))
    shared = {"images_ptr": images, "taps_ptr": taps, "FIELDS": FIELDS, "LINES": LINES}
    shared["PDL"] = target.pdl
    first = {
        "middle_ptr": middle,
        "pixels_ptr": pixels,
        "groups_ptr": groups,
        "width": width,
        "stride": stride,
        "CHANNELS": channels,
        "TOGETHER": TOGETHER,
        "BLOCK_N": across.block_n,
    }
    second = {
        "out_ptr": out,
        "middle_ptr": middle,
        "height": height,
        "numbers": numbers // align,
        "stride": stride // 16,
        "ALIGN": align,
        "BLOCK_M": down.block_m,
        "BLOCK_N": down.block_n,
    }
    tiles = (LINES // TOGETHER) * cdiv(numbers, across.block_n)  # of a group
    parts = cdiv(height, down.block_m) * cdiv(numbers, down.block_n)  # of a window
    return [
        Call(_across_kernel, Grid(groups.numel(), times=tiles), shared | first, across),
        Call(_down_kernel, Grid(batch, times=parts), shared | second, down),
    ]


def resize(
    out: Tensor, middle: Tensor, pixels: Tensor, images: Tensor, groups: Tensor, taps: Tensor
) -> None:
    """`resize_ref` by the kernels; see `resize_calls`."""
    launch(resize_calls(target_of(out), out, middle, pixels, images, groups, taps))


# -- the tables ------------------------------------------------------------------------------------


class Tables(NamedTuple):
    """``images``, ``groups`` and ``taps`` on the CPU, the shape of ``middle``, and how many bytes
    of ``pixels`` they speak of."""

    images: Tensor
    groups: Tensor
    taps: Tensor
    middle: Size
    pixels: int


def resize_tables(
    sizes: Sequence[Size],
    targets: Sequence[Size],
    corners: Sequence[Size],
    *,
    window: Size,
    resample: int,
    channels: int,
) -> Tables:
    """Tables for images of ``sizes``, one after the other in ``pixels``, each (H, W, channels).

    Image i is resized to ``targets[i]``, of which the ``window`` from ``corners[i]`` = (top, left)
    is kept; what of it lies outside is 0. All sizes are (height, width). ``resample`` is Pillow's
    number of the filter. Raises ValueError for sizes below 1, lists of different lengths, an
    unknown filter, and lines of 2^27 bytes.
    """
    _check_sizes(sizes, targets, corners, window, resample, channels)
    pairs = [
        tuple(zip(size, target, corner, window, strict=True))
        for size, target, corner in zip(sizes, targets, corners, strict=True)
    ]
    keys = dict.fromkeys(key for pair in pairs for key in pair)
    axes = {key: _axis(*key, resample) for key in keys}
    sums = itertools.accumulate((axis.table.size for axis in axes.values()), initial=0)
    places = dict(zip(axes, sums, strict=False))

    start, group, images, owners = 0, 0, [], []
    for number, ((height, width), (down, across)) in enumerate(zip(sizes, pairs, strict=True)):
        rows, columns = axes[down], axes[across]
        first = start + (rows.first * width + columns.first) * channels
        image = (first, width * channels, rows.length, group)
        images.append(
            (*image, places[across], len(columns.table) - 2, places[down], len(rows.table) - 2)
        )
        owners += [number] * cdiv(rows.length, LINES)
        group = len(owners)
        start += height * width * channels
    taps = np.concatenate([axis.table.ravel() for axis in axes.values()] or [_NONE])
    return Tables(
        torch.tensor(images, dtype=torch.int64, device="cpu").view(-1, FIELDS),
        torch.tensor(owners, dtype=torch.int32, device="cpu"),
        torch.from_numpy(taps),
        (LINES * group, 16 * cdiv(window[1] * channels, 16)),
        start,
    )


def _check_sizes(
    sizes: Sequence[Size],
    targets: Sequence[Size],
    corners: Sequence[Size],
    window: Size,
    resample: int,
    channels: int,
) -> None:
    if not len(sizes) == len(targets) == len(corners):
        raise ValueError(
            f"resize: got {len(sizes)} sizes, {len(targets)} targets and {len(corners)} corners, "
            "wanted as many of each"
        )
    if resample not in range(6):
        raise ValueError(f"resize: resample: got {resample!r}, wanted one of Pillow's 0 to 5")
    least = min([channels, *window, *(side for size in (*sizes, *targets) for side in size)])
    if least < 1:
        raise ValueError(f"resize: got a side, or channels, of {least}, wanted at least 1")
    longest = max([window[1], *(width for _, width in sizes)]) * channels
    if longest >= 1 << 27:
        raise ValueError(f"resize: got a line of {longest} bytes, wanted less than 2^27")


class _Axis(NamedTuple):
    """One axis of a resize: ``table`` (2 + taps, n) counts sources from ``first``, of which it
    needs ``length``."""

    table: npt.NDArray[np.int32]
    first: int
    length: int


_NONE = np.zeros(0, np.int32)
_HAMMING_MEAN, _HAMMING_SWING = float(np.float32(0.54)), float(np.float32(0.46))


@functools.lru_cache(maxsize=512)
def _axis(source: int, full: int, start: int, kept: int, resample: int) -> _Axis:
    """``source`` pixels resized to ``full``, of which ``kept`` from ``start`` on are wanted."""
    low, high = max(start, 0), min(start + kept, full)
    if low >= high:
        return _Axis(np.zeros((2, kept), np.int32), 0, 0)
    if full == source or resample == NEAREST:
        first = _nearest(source, full, high)[low:]
        count, weights = np.ones_like(first), np.full((high - low, 1), 1 << PRECISION)
    else:
        first, count, weights = _windows(source, full, low, high, resample)
    top, taps = int(first.min()), weights.shape[1]
    table = np.zeros((2 + taps, kept), np.int32)
    table[:, low - start : high - start] = (first - top, count, *weights.T)
    table.setflags(write=False)
    return _Axis(table, top, int((first + count).max()) - top)


def _nearest(source: int, full: int, stop: int) -> Ints:
    """Pillow steps through the source by repeated addition; cumsum adds in the same order."""
    steps = np.full(stop, source / full)
    steps[0] *= 0.5
    return np.cumsum(steps).astype(np.int64)


def _windows(source: int, full: int, low: int, high: int, resample: int) -> tuple[Ints, Ints, Ints]:
    """First source (n,), number of sources (n,) and weights (n, taps) of outputs [low, high).

    Formula, order of operations and rounding are those of Pillow's Resample.c, in double.
    """
    support, function = _FILTERS[resample]
    scale = source / full
    stretch = max(scale, 1.0)
    reach = support * stretch
    centre = (np.arange(low, high) + 0.5) * scale
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + reach + 0.5).astype(np.int64), source) - first
    offsets = np.arange(int(count.max()))
    if (len(offsets) + 2) * len(first) >= 1 << 31:
        raise ValueError(f"resize: got {source} pixels to {full}: more than 2^31 weights")
    distance = (offsets + first[:, None] - centre[:, None] + 0.5) * (1.0 / stretch)
    values = np.where(offsets < count[:, None], function(distance), 0.0)
    total = np.cumsum(values, axis=1)[:, -1:]  # one after the other, unlike np.sum
    values /= np.where(total == 0.0, 1.0, total)
    fixed = values * (1 << PRECISION)
    weights = (fixed + np.where(fixed < 0, -0.5, 0.5)).astype(np.int64)
    reached = 255 * np.maximum(weights, 0).sum(1).max() + (1 << (PRECISION - 1))
    assert reached < 1 << 31, f"resize: {source} to {full}: sums of {reached}, wanted 31 bits"
    return first, count, weights


def _each(function: Callable[[float], float]) -> Callable[[Doubles], Doubles]:
    """The C library's own function of each value: NumPy's vector ones may round otherwise."""

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
    LANCZOS: (3.0, _each(_lanczos)),
    BILINEAR: (1.0, _bilinear),
    BICUBIC: (2.0, _bicubic),
    BOX: (0.5, _box),
    HAMMING: (1.0, _each(_hamming)),
}
