"""Images to pixels: decode, resize, crop and normalize as the processor of the model family does.

The bits are those of transformers' PIL processors under Pillow 12, in every Pillow. The resize
runs here (`preprocess_uint8`, `preprocess_float`) or on a device: a `CropTask` is a decoded image
with its resize still to be done.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from vitrail.errors import VitrailError
from vitrail.image.decoding import SixteenBit, as_array, check_arguments, open_image
from vitrail.image.geometry import Axis, down_first, geometry, spec_at
from vitrail.image.normalize import Floats, normalize, value_table
from vitrail.image.resize import Pixels, crop_axes, rows_reached
from vitrail.image.sources import LIMITS, PixelInput
from vitrail.spec import ImageSpec

Result = TypeVar("Result")


class CropTask(NamedTuple):
    """Decoded ``pixels``, uint8 (H, W, channels), and the resize and crop still to be done."""

    pixels: Pixels
    rows: Axis
    columns: Axis
    resample: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the crop."""
        return self.rows.out, self.columns.out

    @property
    def device_bytes(self) -> int:
        """Approximate device memory of the resize: source, lines between the passes, and crop."""
        top, bottom = rows_reached(self.rows, self.resample)
        channels = self.pixels.shape[2]
        lines = (bottom - top + self.rows.out) * self.columns.out
        return int(self.pixels.size + lines * channels)


def _decoder(
    spec: ImageSpec, channels: int, size: tuple[int, int] | None, sixteen_bit: SixteenBit
) -> Callable[[PixelInput], tuple[str, Image.Image | Pixels, Axis, Axis]]:
    """A function: image -> its name for messages, the decoded image, rows and columns."""
    check_arguments(channels, sixteen_bit)
    sized = spec_at(spec, size)

    def decode(image: PixelInput) -> tuple[str, Image.Image | Pixels, Axis, Axis]:
        location, opened = open_image(image, channels, LIMITS, sixteen_bit)
        if isinstance(opened, Image.Image):
            height, width = opened.height, opened.width
        else:
            height, width = opened.shape[:2]
        return location, opened, *geometry(height, width, sized, location)

    return decode


def _crop(image: Image.Image | Pixels, rows: Axis, columns: Axis, resample: int) -> Pixels:
    """If Pillow has no mode for the number of channels, each channel is resized by itself."""
    if isinstance(image, Image.Image):
        return crop_axes(image, rows, columns, resample)
    if image.shape[2] == 3:
        return crop_axes(Image.fromarray(image), rows, columns, resample)
    planes = [Image.fromarray(plane) for plane in np.ascontiguousarray(np.moveaxis(image, 2, 0))]
    return np.concatenate([crop_axes(plane, rows, columns, resample) for plane in planes], axis=2)


def preprocess_uint8(
    images: Sequence[PixelInput],
    spec: ImageSpec,
    channels: int,
    *,
    size: tuple[int, int] | None = None,
    sixteen_bit: SixteenBit = "scale",
) -> list[Pixels | VitrailError]:
    """Decodes, resizes and center-crops each image, in order, on a thread for every core.

    The bits are those of Pillow 12. ``size`` = (h, w) overrides the output of the processor as
    `spec_at` does. Returns uint8 (h, w, channels) for each image, or the ImageError or InputError
    of an image that cannot be used. Raises InputError only for arguments that no image could meet.
    """
    decode = _decoder(spec, channels, size, sixteen_bit)
    return _map(lambda image: _crop(*decode(image)[1:], spec.resample), images)


def preprocess_float(
    images: Sequence[PixelInput],
    spec: ImageSpec,
    channels: int,
    *,
    size: tuple[int, int] | None = None,
    sixteen_bit: SixteenBit = "scale",
) -> list[Floats | VitrailError]:
    """`preprocess_uint8` followed by `normalize`: float32 (channels, h, w) for each image."""
    decode = _decoder(spec, channels, size, sixteen_bit)
    value_table(spec, channels)  # raises here if the mean has another number of channels
    return _map(lambda image: normalize(_crop(*decode(image)[1:], spec.resample), spec), images)


def decode_crop_tasks(
    images: Sequence[PixelInput],
    spec: ImageSpec,
    channels: int,
    *,
    stop_bytes: int,
    size: tuple[int, int] | None = None,
    sixteen_bit: SixteenBit = "scale",
    fits: Callable[[CropTask], bool] = lambda task: True,
) -> list[CropTask | VitrailError]:
    """Decodes the first images, at least one, for the operator ``resize`` to crop on a device.

    No further image is begun once the tasks hold ``stop_bytes`` of device memory. An image that
    the operator does not take, or that does not fit there, is cropped here; its task leaves every
    pixel as it is.
    """
    decode = _decoder(spec, channels, size, sixteen_bit)

    def work(image: PixelInput) -> CropTask:
        location, opened, rows, columns = decode(image)
        if _operator_takes(rows, columns, channels):
            task = CropTask(as_array(location, opened), rows, columns, spec.resample)
            if fits(task):
                return task
            opened = task.pixels
        crop = _crop(opened, rows, columns, spec.resample)
        rows, columns = (Axis(side, side, 0, side, 0, side) for side in crop.shape[:2])
        return CropTask(crop, rows, columns, spec.resample)

    return _map_first(work, images, stop_bytes)


def _operator_takes(rows: Axis, columns: Axis, channels: int) -> bool:
    """Whether the operator ``resize`` takes such an image: its order of passes is fixed, and
    `resize_tables` and `resize_calls` limit the bytes of a line and of the crop."""
    line, out = max(columns.source, columns.out) * channels, rows.out * columns.out * channels
    return not down_first(rows, columns) and line < 1 << 27 and out < 1 << 31


# -- threads ---------------------------------------------------------------------------------------


_core_limit: list[int] = []


def limit_cores(count: int) -> None:
    """Limits `core_count`, for a process that shares the machine with its siblings."""
    _core_limit[:] = [count]


def core_count() -> int:
    """The CPU cores that this process may use."""
    if _core_limit:
        return _core_limit[0]
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _threads(images: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(images, core_count()), "vitrail-images")


def _attempt(work: Callable[[PixelInput], Result], image: PixelInput) -> Result | VitrailError:
    try:
        return work(image)
    except VitrailError as error:
        # a kept traceback would keep the pixels of the failed image alive
        return error.with_traceback(None)


def _map(
    work: Callable[[PixelInput], Result], images: Sequence[PixelInput]
) -> list[Result | VitrailError]:
    """``work`` of each image, in order; a single image is done in the calling thread."""
    if len(images) < 2:
        return [_attempt(work, image) for image in images]
    with _threads(len(images)) as threads:
        return list(threads.map(partial(_attempt, work), images))


def _map_first(
    work: Callable[[PixelInput], CropTask], images: Sequence[PixelInput], stop_bytes: int
) -> list[CropTask | VitrailError]:
    """`_map` until the tasks hold ``stop_bytes``; then images under way are finished."""
    if len(images) < 2:
        return _map(work, images)
    results: dict[int, CropTask | VitrailError] = {}
    running: dict[Future[CropTask | VitrailError], int] = {}
    begun = total = 0
    with _threads(len(images)) as threads:
        while True:
            while len(running) < core_count() and begun < len(images) and total < stop_bytes:
                running[threads.submit(_attempt, work, images[begun])] = begun
                begun += 1
            if not running:
                return [results[number] for number in range(begun)]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                result = results[running.pop(future)] = future.result()
                total += 0 if isinstance(result, VitrailError) else result.device_bytes
