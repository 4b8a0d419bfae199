"""Decodes an image of any kind to RGB, gray, or an array of pixels.

Decoding is strict: five formats, sizes checked before pixels are decoded, and never half an image.
"""

import io
import os
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import numpy as np
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

from vitrail import fork
from vitrail.errors import ImageError, InputError
from vitrail.image.formats import FormatError, check_png, read_header, read_orientation
from vitrail.image.resize import Pixels
from vitrail.image.sources import (
    LIMITS,
    Limits,
    PixelInput,
    Readable,
    array_pixels,
    check_bytes,
    check_size,
    read_file,
    read_object,
)

SixteenBit = Literal["scale", "clip"]
Result = TypeVar("Result")

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
_LOADING = tuple(fork.lock() for _ in range(16))


def decode(
    image: PixelInput,
    *,
    channels: int,
    limits: Limits = LIMITS,
    sixteen_bit: SixteenBit = "scale",
) -> Pixels:
    """Decodes an image to contiguous uint8 (height, width, channels), upright, not resized.

    ``channels`` is the model's: 3 gives RGB and 1 gray, whatever the mode of the image and
    whatever the processor's ``do_convert_rgb`` says (without it, transformers fails on all but RGB
    images). ``image`` is:

    * A path, bytes, or an object with ``read_bytes()``: JPEG, PNG, WEBP, BMP or GIF, recognized by
      content. Decodes the first frame and turns it upright by its EXIF orientation (values other
      than 1..8 count as 1).
    * A PIL image of any mode that Pillow converts to RGB. It is not turned. If loading its pixels
      fails, it is closed, because Pillow's second load would give wrong pixels in silence.
    * uint8 (height, width, channels) or (height, width), as a numpy array or CPU tensor of any
      strides. A single channel is repeated for RGB. The result may share the array's memory.
      Channel counts other than 1 and 3 are accepted only in this form.

    Transparent pixels are laid over white and palettes are looked up, as transformers'
    ``convert_to_rgb`` does. 16-bit gray (modes "I;16" and "I") becomes
    ``round(value * 255 / 65535)``; with ``sixteen_bit="clip"``, ``min(value, 255)``, which is
    Pillow's own conversion. Mode "F" is refused.

    A decode without an error does not prove that the file is undamaged: JPEG has no checksum, so
    damage that still parses gives wrong pixels in every decoder.

    Raises ImageError for an image that cannot be read, is damaged, empty or over ``limits``, and
    for every encoded image while ``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` is set; InputError for
    the wrong type, dtype or layout. Both name the file.
    """
    check_arguments(channels, sixteen_bit)
    return as_array(*open_image(image, channels, limits, sixteen_bit))


def as_array(location: str, image: Image.Image | Pixels) -> Pixels:
    """The result of `open_image` as uint8 (height, width, channels)."""
    if isinstance(image, np.ndarray):
        return image
    pixels = _guarded(location, lambda: np.array(image))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def check_arguments(channels: int, sixteen_bit: str) -> None:
    if type(channels) is not int or channels < 1:
        raise InputError(f"channels: got {channels!r}, wanted an integer of at least 1")
    if sixteen_bit not in ("scale", "clip"):
        raise InputError(f"sixteen_bit: got {sixteen_bit!r}, wanted 'scale' or 'clip'")


def open_image(
    image: PixelInput, channels: int, limits: Limits, sixteen_bit: SixteenBit
) -> tuple[str, Image.Image | Pixels]:
    """The image's name for messages, and the image as "RGB", "L" or uint8 (H, W, channels)."""
    if isinstance(image, torch.Tensor | np.ndarray):
        return "image array", array_pixels(image, channels, limits)
    if isinstance(image, Image.Image):
        location, opened = _name(image), image
    elif isinstance(image, bytes | bytearray | memoryview):
        location = f"image of {memoryview(image).nbytes} bytes"
        opened = _from_bytes(location, image, limits)
    elif isinstance(image, str | os.PathLike):
        location = os.fsencode(image).decode("utf-8", "backslashreplace")
        opened = _from_bytes(location, read_file(location, image, limits), limits)
    elif isinstance(image, Readable):
        location = str(image).encode("utf-8", "backslashreplace").decode()
        opened = _from_bytes(location, read_object(location, image), limits)
    else:
        raise InputError(
            f"image: got {type(image).__name__}, wanted a path, bytes, a PIL image, an object "
            "with read_bytes(), or a uint8 array or tensor (height, width, channels)"
        )
    if channels not in (1, 3):
        raise InputError(
            f"{location}: this model takes {channels} channels, which only a uint8 array "
            f"(height, width, {channels}) can give"
        )
    if opened is image:
        check_size(location, opened.width, opened.height, limits)
        _load_shared(location, opened)
    return location, _converted(location, opened, "RGB" if channels == 3 else "L", sixteen_bit)


def _name(image: Image.Image) -> str:
    name = getattr(image, "filename", "")
    if not isinstance(name, str | bytes | os.PathLike) or not name:
        return "PIL image"
    return "PIL image " + os.fsencode(name).decode("utf-8", "backslashreplace")


def _from_bytes(location: str, data: bytes | bytearray | memoryview, limits: Limits) -> Image.Image:
    """The first frame, fully loaded and upright. Pillow gets only the formats of `read_header`."""
    check_bytes(location, memoryview(data).nbytes, limits)
    data = bytes(data)
    try:
        header = read_header(data)
        check_size(location, header.width, header.height, limits)
        if header.format == "PNG":
            check_png(data)
    except FormatError as error:
        raise ImageError(f"{location}: {error}") from None

    def load() -> Image.Image:
        _check_switch()
        image = _PLUGINS[header.format](io.BytesIO(data))
        if image.size != (header.width, header.height):
            raise ValueError("the decoder and the header disagree on the size")
        image.load()
        _check_switch()
        turn = _UPRIGHT.get(read_orientation(image.info))
        return image if turn is None else image.transpose(turn)

    return _guarded(location, load)


def _check_switch() -> None:
    """Refuses to decode while Pillow, in the whole process, fills missing pixels with gray.

    Other libraries set the switch, and other threads rely on it, so it is not changed here.
    Checked before and after each load.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ImageError(
            "not decoded, because PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set and Pillow would "
            "make up missing pixels; set it to False, or pass decoded pixels"
        )


def _load_shared(location: str, image: Image.Image) -> None:
    """Loads a caller's image. Other threads may use it too, and Pillow's lazy load is not safe.

    Images cannot be hashed or kept in a weak set, so all of them share a few locks.
    """

    def load() -> None:
        pending = bool(getattr(image, "tile", ()))
        if pending:
            _check_switch()
        try:
            image.load()
            if pending:
                _check_switch()
        except Exception:
            Image.Image.close(image)
            raise

    with _LOADING[id(image) // 16 % len(_LOADING)]:
        _guarded(location, load)


def _converted(
    location: str, image: Image.Image, mode: Literal["RGB", "L"], sixteen_bit: SixteenBit
) -> Image.Image:
    if image.mode == "F":
        raise ImageError(f"{location}: got 32-bit float pixels (mode F), wanted 8-bit or 16-bit")

    def convert() -> Image.Image:
        key = image.info.get("transparency")
        if image.mode.startswith("I"):
            return _from_sixteen_bit(image, key, sixteen_bit).convert(mode)
        if "A" in image.getbands() or key is not None:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image.convert("RGBA")).convert(mode)
        return image if image.mode == mode else image.convert(mode)

    return _guarded(location, convert)


def _from_sixteen_bit(image: Image.Image, key: Any, sixteen_bit: SixteenBit) -> Image.Image:
    """8-bit gray of modes "I;16", "I;16B" and "I"; the transparent value ``key`` becomes white."""
    values = np.asarray(image).astype(np.int64)
    if sixteen_bit == "clip":
        gray = values.clip(0, 255)
    elif values.min() < 0 or values.max() > 65_535:
        raise ImageError("32-bit integer pixels beyond 0..65535")
    else:
        # 65535 = 255 * 257. As 257 is odd, no value lies half way: adding 128 rounds to nearest.
        gray = (values + 128) // 257
    if isinstance(key, int):
        gray[values == key] = 255
    return Image.fromarray(gray.astype(np.uint8))


def _guarded(location: str, step: Callable[[], Result]) -> Result:
    """``step()``; an exception of Pillow becomes an ImageError with a text from a fixed table.

    The error is raised outside the handler, so it holds no frame of Pillow's: a batch keeps errors.
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
        truncated = "truncated" in str(error)
        reason = "truncated: the image data ends early" if truncated else _DAMAGED
    raise ImageError(f"{location}: {reason}")
