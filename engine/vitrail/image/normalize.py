"""Rescale and normalize uint8 pixels to float32, by a table of the 256 values of each channel."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from vitrail.errors import InputError
from vitrail.image.resize import Pixels
from vitrail.spec import ImageSpec

Floats = npt.NDArray[np.float32]


def normalize(pixels: Pixels, spec: ImageSpec) -> Floats:
    """uint8 (h, w, C) to float32 (C, h, w), or (N, h, w, C) to (N, C, h, w).

    The bits are those of transformers' PIL processors, whose formula makes the table. Raises
    InputError for another dtype or shape, or if the channels do not match the mean.
    """
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise InputError(
            f"pixels: got {pixels.dtype} {pixels.shape}, wanted uint8 (h, w, C) or (N, h, w, C)"
        )
    channels = pixels.shape[-1]
    table = value_table(spec, channels)
    planes = np.moveaxis(pixels, -1, -3)
    out = np.empty(planes.shape, np.float32)
    for channel in range(channels):
        # mode "clip" avoids a bounds check; every uint8 is within the table
        plane = (..., channel, slice(None), slice(None))
        np.take(table[channel], planes[plane], out=out[plane], mode="clip")
    return out


@lru_cache(maxsize=64)
def value_table(spec: ImageSpec, channels: int) -> Floats:
    """The float32 of every uint8, (channels, 256): the product in float64, the rest in float32."""
    values = np.arange(256, dtype=np.float64)
    scaled = (values if spec.rescale is None else values * spec.rescale).astype(np.float32)
    table = np.repeat(scaled[None], channels, axis=0)
    if spec.mean is not None and spec.std is not None:
        table = (table - _column(spec.mean, channels)) / _column(spec.std, channels)
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
    """float64 (channels,) ``a`` and ``b`` with ``normalize(x) = a * x + b``, for uint8 x.

    From the float32 mean and std that ``normalize`` uses; equal to it up to float32 rounding.
    """
    a = np.full(channels, 1.0 if spec.rescale is None else spec.rescale, np.float64)
    b = np.zeros(channels)
    if spec.mean is not None and spec.std is not None:
        mean, std = (_column(v, channels)[:, 0].astype(np.float64) for v in (spec.mean, spec.std))
        a, b = a / std, -mean / std
    return a, b
