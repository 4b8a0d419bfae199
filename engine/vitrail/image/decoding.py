"""Images in, decoded pixels out: one image of any kind as RGB, grey, or an array.

Decoding is strict: five formats, sizes checked before pixels, and never half an image.
"""

from __future__ import annotations

import io
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from vitrail.errors import ImageError, InputError
from vitrail.image.formats import Refused, check_png, read_header, read_orientation
from vitrail.image.resize import Pixels


@runtime_checkable
class Readable(Protocol):
    """Encoded bytes somewhere: a `TarMember`, a ``zipfile.Path``, a resource of a package."""

    def read_bytes(self) -> bytes: ...


PixelInput = (
    (str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[Any])
    | torch.Tensor
    | Readable
)
SixteenBit = Literal["scale", "clip"]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest image that is taken: pixels in all, pixels a side, encoded bytes."""

    max_pixels: int = 50_000_000
    max_side: int = 65_535
    max_bytes: int = 256 << 20


LIMITS = Limits()

_PLUGINS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DAMAGED = "damaged, or of a kind that Pillow does not read"
_LOADING = tuple(threading.Lock() for _ in range(16))


def decode(
    image: PixelInput,
    *,
    channels: int,
    limits: Limits = LIMITS,
    sixteen_bit: SixteenBit = "scale",
) -> Pixels:
    """One image as contiguous uint8 (height, width, channels), upright, before any resize.

    ``channels`` is the model's: 3 makes RGB and 1 grey, whatever the image holds and whatever the
    processor's ``do_convert_rgb`` says (without it, transformers fails on all but RGB images).

    * A path, bytes, or an object with ``read_bytes()``: JPEG, PNG, WEBP, BMP or GIF, told by
      content; the first frame; turned upright by EXIF orientation, where values other than 1..8
      count as 1.
    * A PIL image of any mode that Pillow converts to RGB: taken as it is, not turned. One whose
      pixels fail to load is closed, since Pillow's second load would give wrong pixels in silence.
    * uint8 (height, width, channels) or (height, width), numpy or a CPU tensor of any strides; one
      channel is repeated for RGB. The result may share the array's memory. Channel counts other
      than 1 and 3 come only this way.

    Transparency is laid over white and palettes are looked up, as transformers' ``convert_to_rgb``
    does. 16-bit grey (modes "I;16" and "I") is ``round(value * 255 / 65535)``, or with
    ``sixteen_bit="clip"`` ``min(value, 255)``, as Pillow's own conversion. Mode "F" is refused.

    A sound decode is no proof of an undamaged file: JPEG has no checksum, so damage that still
    parses shows as wrong pixels in every decoder.

    Raises ImageError for an image that cannot be read, is damaged, empty or over ``limits``, and
    InputError for the wrong type, dtype or layout. Both name the file.
    """
    check_arguments(channels, sixteen_bit)
    return as_array(*open_image(image, channels, limits, sixteen_bit))


def as_array(where: str, opened: Image.Image | Pixels) -> Pixels:
    """What `open_image` gives as uint8 (height, width, channels)."""
    if isinstance(opened, np.ndarray):
        return opened
    pixels = _guarded(where, lambda: np.array(opened))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def check_arguments(channels: int, sixteen_bit: str) -> None:
    if type(channels) is not int or channels < 1:
        raise InputError(f"channels: got {channels!r}, wanted an integer of at least 1")
    if sixteen_bit not in ("scale", "clip"):
        raise InputError(f"sixteen_bit: got {sixteen_bit!r}, wanted 'scale' or 'clip'")


def open_image(
    image: PixelInput, channels: int, limits: Limits, sixteen_bit: SixteenBit
) -> tuple[str, Image.Image | Pixels]:
    """What to call the image in a message, and it as "RGB", "L" or uint8 (H, W, channels)."""
    if isinstance(image, torch.Tensor | np.ndarray):
        return "image array", _from_array(image, channels, limits)
    if isinstance(image, Image.Image):
        where, opened = _name(image), image
    elif isinstance(image, bytes | bytearray | memoryview):
        where = f"image of {memoryview(image).nbytes} bytes"
        opened = _from_bytes(where, image, limits)
    elif isinstance(image, str | os.PathLike):
        where = os.fsencode(image).decode("utf-8", "backslashreplace")
        opened = _from_bytes(where, _read_file(where, image, limits), limits)
    elif isinstance(image, Readable):
        where = str(image).encode("utf-8", "backslashreplace").decode()
        opened = _from_bytes(where, _read_object(where, image), limits)
    else:
        raise InputError(
            f"image: got {type(image).__name__}, wanted a path, bytes, a PIL image, an object "
            "with read_bytes(), or a uint8 array or tensor (height, width, channels)"
        )
    if channels not in (1, 3):
        raise InputError(
            f"{where}: this model takes {channels} channels, which only a uint8 array "
            f"(height, width, {channels}) can give"
        )
    if opened is image:
        _check_size(where, opened.width, opened.height, limits)
        _load_shared(where, opened)
    return where, _converted(where, opened, "RGB" if channels == 3 else "L", sixteen_bit)


def _name(image: Image.Image) -> str:
    name = getattr(image, "filename", "")
    if not isinstance(name, str | bytes | os.PathLike) or not name:
        return "PIL image"
    return "PIL image " + os.fsencode(name).decode("utf-8", "backslashreplace")


def _check_size(where: str, width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{where}: got {width} x {height} pixels, wanted at least 1 x 1")
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        raise ImageError(
            f"{where}: got {width} x {height} pixels, wanted at most {limits.max_side} a side and "
            f"{limits.max_pixels} in all"
        )


def _read_file(where: str, path: str | os.PathLike[str], limits: Limits) -> bytes:
    """Every byte of a regular file. A pipe or device is refused without waiting for it."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
        try:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode):
                _check_bytes(where, status.st_size, limits)
                with open(descriptor, "rb", closefd=False) as file:
                    return file.read(status.st_size)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise ImageError(f"{where}: no such file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise ImageError(f"{where}: cannot be read: {reason}") from None
    kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
    raise ImageError(f"{where}: is {kind}, wanted a regular file")


def _read_object(where: str, image: Readable) -> bytes:
    try:
        data = image.read_bytes()
    except Exception as error:  # whatever a storage library raises costs this image only
        raise ImageError(f"{where}: cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(data, bytes | bytearray | memoryview):
        raise InputError(f"{where}: read_bytes() gave {type(data).__name__}, wanted bytes")
    return bytes(data)


def _check_bytes(where: str, count: int, limits: Limits) -> None:
    if count > limits.max_bytes:
        raise ImageError(f"{where}: got {count} bytes, wanted at most {limits.max_bytes}")


def _from_bytes(where: str, data: bytes | bytearray | memoryview, limits: Limits) -> Image.Image:
    """The first frame, every pixel loaded, turned upright. Pillow sees a sniffed format only."""
    _check_bytes(where, memoryview(data).nbytes, limits)
    data = bytes(data)
    try:
        header = read_header(data)
        _check_size(where, header.width, header.height, limits)
        if header.format == "PNG":
            check_png(data)
    except Refused as refused:
        raise ImageError(f"{where}: {refused}") from None

    def load() -> Image.Image:
        image = _PLUGINS[header.format](io.BytesIO(data))
        if image.size != (header.width, header.height):
            raise ValueError("the decoder and the header disagree on the size")
        _load(image)
        turn = _UPRIGHT.get(read_orientation(image.info))
        return image if turn is None else image.transpose(turn)

    return _guarded(where, load)


def _load_shared(where: str, image: Image.Image) -> None:
    """Load a caller's image, which other threads may hold too: Pillow's lazy load is not safe.

    The images have no hash and no weak set will take them, hence a few locks for all of them.
    """

    def load() -> None:
        try:
            _load(image)
        except Exception:
            Image.Image.close(image)
            raise

    with _LOADING[id(image) // 16 % len(_LOADING)]:
        _guarded(where, load)


def _load(image: Image.Image) -> None:
    """Load every pixel or raise, even where ``ImageFile.LOAD_TRUNCATED_IMAGES`` is set.

    That switch of the whole process makes Pillow fill what is missing with grey. It is left alone;
    the image is loaded by Pillow's own function, bound to a copy of its globals with the switch
    off. Formats with a load of their own (WEBP, TIFF) get no such copy: WEBP does not need it.
    """
    base = ImageFile.ImageFile.load
    if not ImageFile.LOAD_TRUNCATED_IMAGES or type(image).load is not base:
        image.load()
        return
    strict = FunctionType(
        base.__code__,
        {**base.__globals__, "LOAD_TRUNCATED_IMAGES": False},
        base.__name__,
        base.__defaults__,
        base.__closure__,
    )
    if isinstance(image, JpegImagePlugin.JpegImageFile) and image.fp is not None:
        # Its own reader, under the switch, makes up an end marker for libjpeg.
        vars(image)["load_read"] = image.fp.read
    strict(image)


def _converted(
    where: str, image: Image.Image, mode: Literal["RGB", "L"], sixteen_bit: SixteenBit
) -> Image.Image:
    if image.mode == "F":
        raise ImageError(f"{where}: got 32-bit float pixels (mode F), wanted 8-bit or 16-bit ones")

    def convert() -> Image.Image:
        key = image.info.get("transparency")
        if image.mode.startswith("I"):
            return _from_sixteen_bit(image, key, sixteen_bit).convert(mode)
        if "A" in image.getbands() or key is not None:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image.convert("RGBA")).convert(mode)
        return image if image.mode == mode else image.convert(mode)

    return _guarded(where, convert)


def _from_sixteen_bit(image: Image.Image, key: Any, sixteen_bit: SixteenBit) -> Image.Image:
    """8-bit grey of modes "I;16", "I;16B" and "I"; the transparent value ``key`` becomes white."""
    values = np.asarray(image).astype(np.int64)
    if sixteen_bit == "clip":
        grey = values.clip(0, 255)
    elif values.min() < 0 or values.max() > 65_535:
        raise ImageError("32-bit integer pixels beyond 0..65535")
    else:
        # 65535 = 255 * 257, and with 257 odd no value lies half way: 128 rounds to nearest.
        grey = (values + 128) // 257
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey.astype(np.uint8))


def _guarded(where: str, step: Callable[[], Result]) -> Result:
    """``step()``; whatever Pillow raises on hostile bytes becomes an ImageError from a fixed table.

    Raised outside the handler, so that the error, which a batch keeps, holds no frame of Pillow's.
    """
    try:
        return step()
    except ImageError as error:
        reason = str(error)
    except (MemoryError, RecursionError):
        reason = "not enough memory to decode it"
    except EOFError:
        reason = "truncated: the image data ends early"
    except Exception as error:
        early = "truncated" in str(error)
        reason = "truncated: the image data ends early" if early else _DAMAGED
    raise ImageError(f"{where}: {reason}")


def _from_array(image: npt.NDArray[Any] | torch.Tensor, channels: int, limits: Limits) -> Pixels:
    wanted = f"wanted uint8 (height, width, {channels}) on the CPU"
    if isinstance(image, torch.Tensor):
        if image.device.type != "cpu" or image.dtype != torch.uint8:
            raise InputError(f"image array: got {image.dtype} on {image.device}, {wanted}")
        try:
            image = image.detach().numpy()
        except (RuntimeError, TypeError):
            raise InputError(f"image array: got a tensor without plain memory, {wanted}") from None
    array = np.asarray(image)
    got = f"image array: got {array.dtype} {array.shape}"
    if array.dtype != np.uint8:
        raise InputError(f"{got}, {wanted}")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise InputError(f"{got}, {wanted}")
    if array.shape[2] == 1 and channels == 3:
        array = np.broadcast_to(array, (*array.shape[:2], 3))
    if array.shape[2] != channels:
        first = array.shape[0] in (1, 3, 4, channels)
        raise InputError(f"{got}{', which looks like channels first' if first else ''}, {wanted}")
    _check_size("image array", array.shape[1], array.shape[0], limits)
    return np.ascontiguousarray(array)
