"""The bytes of an image, from a path or an object, and the pixels of an array or tensor."""

import os
import stat
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from vitrail.errors import ImageError, InputError
from vitrail.image.resize import Pixels


@runtime_checkable
class Readable(Protocol):
    """An object that gives encoded bytes: a `TarMember`, a ``zipfile.Path``, a package resource."""

    def read_bytes(self) -> bytes: ...


PixelInput = (
    (str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[Any])
    | torch.Tensor
    | Readable
)


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest image that is accepted: pixels in all, pixels a side, encoded bytes."""

    max_pixels: int = 50_000_000
    max_side: int = 65_535
    max_bytes: int = 256 << 20


LIMITS = Limits()


def check_size(location: str, width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{location}: got {width} x {height} pixels, wanted at least 1 x 1")
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        raise ImageError(
            f"{location}: got {width} x {height} pixels, wanted at most {limits.max_side} a side "
            f"and {limits.max_pixels} in all"
        )


def check_bytes(location: str, count: int, limits: Limits) -> None:
    if count > limits.max_bytes:
        raise ImageError(f"{location}: got {count} bytes, wanted at most {limits.max_bytes}")


def read_file(location: str, path: str | os.PathLike[str], limits: Limits) -> bytes:
    """Every byte of a regular file. A pipe or device is refused; opening it never blocks."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
        try:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode):
                check_bytes(location, status.st_size, limits)
                with open(descriptor, "rb", closefd=False) as file:
                    return file.read(status.st_size)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise ImageError(f"{location}: no such file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise ImageError(f"{location}: cannot be read: {reason}") from None
    file_type = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
    raise ImageError(f"{location}: is {file_type}, wanted a regular file")


def read_object(location: str, image: Readable) -> bytes:
    """The bytes that ``image.read_bytes()`` returns. Its exceptions become ImageError."""
    try:
        data = image.read_bytes()
    except Exception as error:  # an error of a storage library fails this image only
        raise ImageError(f"{location}: cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(data, bytes | bytearray | memoryview):
        raise InputError(f"{location}: read_bytes() gave {type(data).__name__}, wanted bytes")
    return bytes(data)


def array_pixels(image: npt.NDArray[Any] | torch.Tensor, channels: int, limits: Limits) -> Pixels:
    """A uint8 array or CPU tensor as contiguous uint8 (height, width, channels).

    Raises InputError for another dtype, device, shape or memory layout, ImageError beyond
    ``limits``.
    """
    expected = f"wanted uint8 (height, width, {channels}) on the CPU"
    if isinstance(image, torch.Tensor):
        if image.device.type != "cpu" or image.dtype != torch.uint8:
            raise InputError(f"image array: got {image.dtype} on {image.device}, {expected}")
        try:
            image = image.detach().numpy()
        except (RuntimeError, TypeError):
            raise InputError(
                f"image array: got a tensor without plain memory, {expected}"
            ) from None
    array = np.asarray(image)
    actual = f"image array: got {array.dtype} {array.shape}"
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 3:
        raise InputError(f"{actual}, {expected}")
    if array.shape[2] == 1 and channels == 3:
        array = np.broadcast_to(array, (*array.shape[:2], 3))
    if array.shape[2] != channels:
        hint = ", which looks like channels first" if array.shape[0] in (1, 3, 4, channels) else ""
        raise InputError(f"{actual}{hint}, {expected}")
    check_size("image array", array.shape[1], array.shape[0], limits)
    return np.ascontiguousarray(array)
