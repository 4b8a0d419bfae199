"""Images in, pixels out: decode, resize, crop and normalise as the model family's processor does.

The result is bit for bit that of transformers' PIL processors under Pillow 12, whichever Pillow is
installed. One step decodes and says what is wanted of the resized image, another resamples, here or
on a device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitrail.errors import InputError, VitrailError
from vitrail.image.decoding import (
    LIMITS,
    Limits,
    PixelInput,
    SixteenBit,
    as_array,
    check_arguments,
    open_image,
)
from vitrail.image.resize import Axis, Pixels, crop_at, down_first, frame, rows_reached, spec_at
from vitrail.spec import ImageSpec

Floats = npt.NDArray[np.float32]
Result = TypeVar("Result")
Opened = TypeVar("Opened", bound=Image.Image | Pixels)


class Framed(NamedTuple, Generic[Opened]):
    """A decoded image, "RGB", "L" or uint8 (H, W, channels), and which rows and columns of it, once
    it is resized, are wanted."""

    opened: Opened
    rows: Axis
    columns: Axis
    resample: int


def _framed(where: str, opened: Opened, spec: ImageSpec) -> Framed[Opened]:
    height, width = (
        (opened.height, opened.width) if isinstance(opened, Image.Image) else opened.shape[:2]
    )
    return Framed(opened, *frame(height, width, spec, where), spec.resample)


def _cropped(framed: Framed[Opened]) -> Pixels:
    opened, axes = framed.opened, framed[1:]
    if isinstance(opened, Image.Image):
        return crop_at(opened, *axes)
    if opened.shape[2] == 3:
        return crop_at(Image.fromarray(opened), *axes)
    planes = [Image.fromarray(plane) for plane in np.ascontiguousarray(np.moveaxis(opened, 2, 0))]
    return np.concatenate([crop_at(plane, *axes) for plane in planes], axis=2)


def crop_pixels(decoded: Pixels, spec: ImageSpec, size: tuple[int, int] | None = None) -> Pixels:
    """Resize and centre crop uint8 (height, width, channels) to uint8 (h, w, channels).

    The bits are those of Pillow 12. ``size`` = (h, w) overrides the processor's output:
    ``resize.spec_at`` says how. Channel counts that Pillow has no mode for are resized one by one.
    Raises InputError for another dtype, shape or ``size``, ImageError where the resized image would
    be over 100 million pixels.
    """
    if decoded.dtype != np.uint8 or decoded.ndim != 3 or 0 in decoded.shape:
        raise InputError(
            f"decoded: got {decoded.dtype} {decoded.shape}, wanted uint8 (height, width, channels)"
        )
    return _cropped(_framed("image", decoded, spec_at(spec, size)))


def normalise(pixels: Pixels, spec: ImageSpec) -> Floats:
    """uint8 (h, w, C) to float32 (C, h, w), or (N, h, w, C) to (N, C, h, w).

    Rescale and normalise have the bits of transformers' PIL processors: looked up in a table made
    by their formula for each of the 256 values. Raises InputError where the dtype, the shape or the
    number of channels does not fit.
    """
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise InputError(
            f"pixels: got {pixels.dtype} {pixels.shape}, wanted uint8 (h, w, C) or (N, h, w, C)"
        )
    channels = pixels.shape[-1]
    table = _table(spec.rescale, spec.mean, spec.std, channels)
    planes = np.moveaxis(pixels, -1, -3)
    out = np.empty(planes.shape, np.float32)
    for channel in range(channels):
        # "clip" spares a bounds check; every uint8 is within the table.
        one = (..., channel, slice(None), slice(None))
        np.take(table[channel], planes[one], out=out[one], mode="clip")
    return out


@lru_cache(maxsize=64)
def _table(
    rescale: float | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    channels: int,
) -> Floats:
    """What every uint8 becomes, (channels, 256): the product in double, the rest in float32."""
    values = np.arange(256, dtype=np.float64)
    scaled = (values if rescale is None else values * rescale).astype(np.float32)
    table = np.repeat(scaled[None], channels, axis=0)
    if mean is not None and std is not None:
        table = (table - _column(mean, channels)) / _column(std, channels)
    table.flags.writeable = False
    return table


def _column(values: tuple[float, ...], channels: int) -> Floats:
    """float32 (channels, 1)."""
    if len(values) != channels:
        raise InputError(f"pixels: got {channels} channels, wanted {len(values)} as the mean has")
    return np.array(values, np.float32)[:, None]


def linear_scale(
    spec: ImageSpec, channels: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """float64 (channels,) ``a`` and ``b`` with ``normalise(x) = a * x + b``, for uint8 x.

    From the float32 mean and std that ``normalise`` uses; equal to it up to float32 rounding.
    """
    a = np.full(channels, 1.0 if spec.rescale is None else spec.rescale, np.float64)
    b = np.zeros(channels)
    if spec.mean is not None and spec.std is not None:
        mean, std = (_column(v, channels)[:, 0].astype(np.float64) for v in (spec.mean, spec.std))
        a, b = a / std, -mean / std
    return a, b


def preprocess_uint8(
    images: Sequence[PixelInput],
    spec: ImageSpec,
    channels: int,
    *,
    size: tuple[int, int] | None = None,
    executor: Executor | None = None,
    limits: Limits = LIMITS,
    sixteen_bit: SixteenBit = "scale",
) -> list[Pixels | VitrailError]:
    """``decode`` and ``crop_pixels`` for each image, in order, on the threads of ``executor``.

    Gives uint8 (h, w, channels), or for an image that cannot be used its ImageError or InputError,
    which is returned and harms no neighbour. Without an executor the call starts, and ends, a
    thread for every core the process may use. One image is done in the calling thread. Raises
    InputError only for arguments that no image could meet.
    """
    check_arguments(channels, sixteen_bit)
    sized = spec_at(spec, size)

    def work(image: PixelInput) -> Pixels:
        return _cropped(_framed(*open_image(image, channels, limits, sixteen_bit), sized))

    return _each(work, images, executor)


def preprocess_float(
    images: Sequence[PixelInput],
    spec: ImageSpec,
    channels: int,
    *,
    size: tuple[int, int] | None = None,
    executor: Executor | None = None,
    limits: Limits = LIMITS,
    sixteen_bit: SixteenBit = "scale",
) -> list[Floats | VitrailError]:
    """``preprocess_uint8`` followed by ``normalise``: float32 (channels, h, w) for each image."""
    check_arguments(channels, sixteen_bit)
    _table(spec.rescale, spec.mean, spec.std, channels)
    sized = spec_at(spec, size)

    def work(image: PixelInput) -> Floats:
        framed = _framed(*open_image(image, channels, limits, sixteen_bit), sized)
        return normalise(_cropped(framed), sized)

    return _each(work, images, executor)


def preprocess_framed(
    images: Sequence[PixelInput],
    spec: ImageSpec,
    channels: int,
    *,
    enough: int,
    size: tuple[int, int] | None = None,
    limits: Limits = LIMITS,
    sixteen_bit: SixteenBit = "scale",
) -> list[Framed[Pixels] | VitrailError]:
    """The first step of ``preprocess_uint8``, for the operator ``resize`` to do the other.

    Of the first images only, one or more: no further one is begun once they hold ``enough`` bytes.
    What the operator leaves to its caller is cropped here, and then framed as it is.
    """
    check_arguments(channels, sixteen_bit)
    sized = spec_at(spec, size)

    def work(image: PixelInput) -> Framed[Pixels]:
        where, opened = open_image(image, channels, limits, sixteen_bit)
        framed = _framed(where, opened, sized)
        if _for_operator(framed.rows, framed.columns, channels):
            return Framed(as_array(where, opened), *framed[1:])
        crop = _cropped(framed)
        down, across = (Axis(side, side, 0, side, 0, side) for side in crop.shape[:2])
        return Framed(crop, down, across, framed.resample)

    return _first_of(work, images, enough)


def held_bytes(framed: Framed[Pixels]) -> int:
    """About what the operator holds for an image: source, lines between the passes, and output."""
    top, bottom = rows_reached(framed.rows, framed.resample)
    height, width, channels = framed.opened.shape
    made = (bottom - top + framed.rows.out) * framed.columns.out
    return int((height * width + made) * channels)


def _for_operator(rows: Axis, columns: Axis, channels: int) -> bool:
    """Whether the operator takes such an image: by the rules in the head of its file, and
    `resize_tables` and `resize_calls`."""
    line, out = max(columns.source, columns.out) * channels, rows.out * columns.out * channels
    return not down_first(rows, columns) and line < 1 << 27 and out < 1 << 31


def _tried(work: Callable[[PixelInput], Result], image: PixelInput) -> Result | VitrailError:
    try:
        return work(image)
    except VitrailError as error:
        # A kept traceback would keep the failed image's pixels alive.
        return error.with_traceback(None)


def _each(
    work: Callable[[PixelInput], Result], images: Sequence[PixelInput], executor: Executor | None
) -> list[Result | VitrailError]:
    if len(images) < 2:
        return [_tried(work, image) for image in images]
    if executor is None:
        with ThreadPoolExecutor(min(len(images), _cores()), "vitrail-images") as threads:
            return _each(work, images, threads)
    futures = [executor.submit(_tried, work, image) for image in images]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


def _first_of(
    work: Callable[[PixelInput], Framed[Pixels]], images: Sequence[PixelInput], enough: int
) -> list[Framed[Pixels] | VitrailError]:
    """As `_each`, until there are ``enough`` bytes: what is under way by then is finished."""
    if len(images) < 2:
        return [_tried(work, image) for image in images]
    done: dict[int, Framed[Pixels] | VitrailError] = {}
    running: dict[Future[Framed[Pixels] | VitrailError], int] = {}
    held = begun = 0
    count = min(len(images), _cores())
    with ThreadPoolExecutor(count, "vitrail-images") as threads:
        while True:
            while len(running) < count and begun < len(images) and held < enough:
                running[threads.submit(_tried, work, images[begun])] = begun
                begun += 1
            if not running:
                return [done[number] for number in range(begun)]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                found = done[running.pop(future)] = future.result()
                held += 0 if isinstance(found, VitrailError) else held_bytes(found)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
