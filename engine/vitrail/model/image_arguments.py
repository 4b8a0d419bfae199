"""Sort the images that users pass: preprocessed floats as a tensor, or a list of images."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.errors import InputError, VitrailError
from vitrail.image.normalize import linear_scale
from vitrail.image.sources import PixelInput, Readable
from vitrail.model.arguments import check_data
from vitrail.spec import ImageSpec, VisionSpec

Images = PixelInput | Sequence[PixelInput]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def sort_images(images: Images) -> Tensor | list[PixelInput]:
    """A float tensor (N, C, H, W) if ``images`` are preprocessed, else a list of single images."""
    if isinstance(images, Iterator) and not isinstance(images, io.IOBase):
        images = list(images)
    pixels = float_pixels(images)
    return list_images(images) if pixels is None else pixels


def list_images(images: Images) -> list[PixelInput]:
    """A list of single images, from a single image or from several.

    Raises InputError for a type that is neither, such as a dict.
    """
    if isinstance(
        images, str | bytes | bytearray | memoryview | os.PathLike | Image.Image | Readable
    ):
        return [images]
    if isinstance(images, np.ndarray | Tensor):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, Iterable) and not isinstance(images, Mapping | Set | io.IOBase):
        return list(images)
    raise InputError(
        f"images: got {type(images).__name__}, wanted paths, bytes, PIL images, arrays or tensors"
    )


def float_pixels(images: object) -> Tensor | None:
    """Float pixels as a tensor (N, C, H, W); None if ``images`` are of another type.

    Takes an array, a tensor, or a list of these in the same shape (C, H, W). Raises InputError for
    float64 and for pixels in several shapes.
    """
    if isinstance(images, list | tuple) and images and all(_is_float(image) for image in images):
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise InputError(f"pixels: got shapes {sorted(shapes)}, wanted one shape a batch")
        if any(len(shape) != 3 for shape in shapes):
            raise InputError(f"pixels: got a list of {shapes}, wanted each (C, height, width)")
        images = torch.stack([_float_tensor(image) for image in images])
    elif _is_float(images):
        images = _float_tensor(images)
    else:
        return None
    return images[None] if images.dim() == 3 else images


def required_pixels(
    name: str, pixels: object, tower: VisionSpec, image: ImageSpec | None, wait: bool = True
) -> Tensor:
    """The argument ``name`` as a float tensor (B, C, H, W) that `check_pixels` has checked."""
    tensor = float_pixels(pixels)
    if tensor is None:
        raise InputError(f"{name}: wanted a float tensor (B, C, height, width)")
    check_pixels(tensor, tower, image, wait=wait)
    return tensor


def check_pixels(
    pixels: Tensor,
    tower: VisionSpec,
    image: ImageSpec | None,
    strict: bool = True,
    wait: bool = True,
) -> dict[int, VitrailError]:
    """Check float pixels: their shape, that they are finite, and that they are preprocessed.

    Returns an error for each item with NaN or infinity, by position; ``strict`` raises the first of
    them. ``wait=False`` does not read the values of pixels on a GPU, because that would wait for
    it. Raises InputError for a wrong shape, or for values that look like 0..255.
    """
    shape_text = f"pixels: got shape {tuple(pixels.shape)}"
    if pixels.dim() != 4 or pixels.shape[1] != tower.channels:
        raise InputError(f"{shape_text}, wanted (N, {tower.channels}, height, width) floats")
    if pixels.shape[2] < tower.patch[0] or pixels.shape[3] < tower.patch[1]:
        raise InputError(
            f"{shape_text}, wanted at least one patch of {tower.patch} (height, width)"
        )
    if not pixels.numel() or (pixels.is_cuda and not wait):
        return {}
    errors: dict[int, VitrailError] = {}
    low, high = (float(value) for value in pixels.aminmax())
    if not np.isfinite(low) or not np.isfinite(high):
        finite = torch.isfinite(pixels).flatten(1).all(dim=1)
        for item in finite.logical_not().nonzero().flatten().tolist():
            reason = f"pixels: item {item} holds NaN or infinity, wanted finite numbers"
            errors[item] = InputError(reason)
            if strict:
                raise errors[item]
        if len(errors) == len(pixels):
            return errors
        low, high = (float(value) for value in pixels[finite].aminmax())
    if image is not None:
        factor, offset = linear_scale(image, tower.channels)
        reach = float(np.maximum(np.abs(offset), np.abs(255 * factor + offset)).max())
        if max(-low, high) > 8 * reach:
            raise InputError(
                f"pixels: got values from {low:.4g} to {high:.4g}, wanted preprocessed ones within "
                f"about +-{reach:.3g}; raw images go in as uint8 (N, H, W, C)"
            )
    return errors


def _float_tensor(image: Any) -> Tensor:
    """A float array or tensor as a tensor of a dtype that Vitrail computes with."""
    if isinstance(image, np.ndarray):
        if image.dtype.itemsize > 4:
            raise InputError(f"pixels: got {image.dtype}, wanted float32 or float16")
        # torch.from_numpy refuses negative strides, read-only memory and foreign byte order
        array = image.astype(image.dtype.newbyteorder("="), copy=False)
        usable = array.flags.writeable and all(stride >= 0 for stride in array.strides)
        image = torch.from_numpy(array if usable else array.copy())
    if image.dtype not in FLOATS:
        raise InputError(f"pixels: got {image.dtype}, wanted float32, float16 or bfloat16")
    check_data("pixels", image)
    if image.requires_grad:
        raise InputError("pixels: got a tensor that needs gradients, wanted x.detach()")
    tensor: Tensor = image
    return tensor


def _is_float(image: object) -> bool:
    if isinstance(image, Tensor):
        return image.dtype.is_floating_point
    return isinstance(image, np.ndarray) and image.dtype.kind == "f"
