"""What users pass, checked and sorted: options, images (floats or to decode), texts, token ids."""

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.cuda import cuda_capability, refuse_lost_cuda, why_no_cuda
from vitrail.dtypes import NAMES, parse_dtype
from vitrail.errors import InputError, VitrailError
from vitrail.image.normalize import linear_scale
from vitrail.image.sources import PixelInput, Readable
from vitrail.spec import ImageSpec, ModelSpec, TextSpec, VisionSpec
from vitrail.text.tokens import TokenIds

Images = PixelInput | Sequence[PixelInput]
Texts = str | Sequence[str] | Sequence[Sequence[int]] | Tensor | np.ndarray[Any, Any]
Size = tuple[int, int]
"""(height, width) in pixels."""
OnError = Literal["raise", "skip"]
Resize = Literal["host", "device"]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_device(device: str | int | torch.device, name: str = "device") -> torch.device:
    """The device that the argument ``name`` asks for; "auto" is CUDA if there is a GPU.

    As in PyTorch, the number N means "cuda:N". Raises InputError for another kind of device, and
    for a GPU that PyTorch does not find; DeviceError for a GPU if a fork has lost CUDA.
    """
    if isinstance(device, str) and device == "auto":
        if torch.cuda.device_count():  # in such a fork PyTorch says that no GPU is available
            refuse_lost_cuda()
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refusal = InputError(
        f"{name}: got {device!r}, wanted 'auto', 'cpu', 'cuda', or 'cuda:N' for GPU N, from 0"
    )
    try:
        checked = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    except (RuntimeError, TypeError) as error:
        raise refusal from error
    if checked.type not in ("cpu", "cuda"):
        raise refusal
    if checked.type == "cuda":
        count = torch.cuda.device_count()
        if (checked.index or 0) >= count:
            reason = why_no_cuda() or f"PyTorch finds {count} CUDA devices"
            raise InputError(f"{name}: got {device!r}, but {reason}")
        refuse_lost_cuda()
        cuda_capability(checked)
        return checked
    return torch.device("cpu")  # PyTorch takes a number here too, which means nothing


INT8 = "int8"


def check_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in; "auto" is float32 on the CPU and float16 on CUDA.

    So is "int8": it names the dtype of weights, which the checkpoint decides (`check_precision`).
    """
    if dtype in ("auto", INT8, torch.int8):
        return torch.float32 if device.type == "cpu" else torch.float16
    return parse_dtype(dtype, (*NAMES, INT8), auto=True)


def check_precision(dtype: str | torch.dtype, spec: ModelSpec, source: str) -> None:
    """Refuse int8 for weights that are not int8, and any other dtype for weights that are."""
    is_int8 = dtype in (INT8, torch.int8)
    if spec.int8 and dtype != "auto" and not is_int8:
        raise InputError(
            f"dtype: got {dtype!r}, wanted 'int8': {source} no longer holds the weights that "
            "became int8; load the checkpoint that it was made from"
        )
    if is_int8 and not spec.int8:
        raise InputError(
            f"dtype: got 'int8', but the weights of {source} are not int8; "
            "run `vitrail quantize MODEL FOLDER` once, and load that folder"
        )


def check_options(batch_size: int | None, size: Size | None, on_error: OnError) -> None:
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise InputError(f"batch_size: got {batch_size!r}, wanted None or a number over 0")
    if size is not None and (
        not isinstance(size, tuple | list)
        or len(size) != 2
        or any(not isinstance(side, int) or side < 1 for side in size)
    ):
        raise InputError(f"size: got {size!r}, wanted (height, width) in pixels")
    if on_error not in ("raise", "skip"):
        raise InputError(f"on_error: got {on_error!r}, wanted 'raise' or 'skip'")


def sort_images(images: Images) -> Tensor | list[PixelInput]:
    """A float tensor (N, C, H, W) if ``images`` are preprocessed, else a list of single images."""
    if isinstance(images, Iterator) and not isinstance(images, io.IOBase):
        images = list(images)
    pixels = float_pixels(images)
    return list_images(images) if pixels is None else pixels


def list_images(images: Images) -> list[PixelInput]:
    """A list of single images. Raises InputError for a type that holds none, such as a dict."""
    if isinstance(images, str | bytes | bytearray | memoryview | os.PathLike):
        return [images]
    if isinstance(images, Image.Image | Readable):
        return [images]
    if isinstance(images, np.ndarray | Tensor):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, Iterable) and not isinstance(images, Mapping | Set | io.IOBase):
        return list(images)
    raise InputError(
        f"images: got {type(images).__name__}, wanted paths, bytes, PIL images, arrays or tensors"
    )


def float_pixels(images: object) -> Tensor | None:
    """An array, a tensor or a list of these as a float tensor (N, C, H, W); None if not floats.

    Raises InputError for float64, and for a list of several shapes.
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
    check_pixels(tensor, tower, image, strict=True, wait=wait)
    return tensor


def check_pixels(
    pixels: Tensor, tower: VisionSpec, image: ImageSpec | None, strict: bool, wait: bool = True
) -> dict[int, VitrailError]:
    """The errors of items with NaN or infinity, by position; ``strict`` raises the first of them.

    ``wait=False``: do not read pixels on a GPU, which would wait for it. Raises InputError for a
    wrong shape, or for values that look like 0..255.
    """
    prefix = f"pixels: got shape {tuple(pixels.shape)}, wanted"
    if pixels.dim() != 4 or pixels.shape[1] != tower.channels:
        raise InputError(f"{prefix} (N, {tower.channels}, height, width) floats")
    if pixels.shape[2] < tower.patch[0] or pixels.shape[3] < tower.patch[1]:
        raise InputError(f"{prefix} at least one patch of {tower.patch} (height, width)")
    if not pixels.numel() or (pixels.is_cuda and not wait):
        return {}
    errors: dict[int, VitrailError] = {}
    low, high = (float(value) for value in pixels.aminmax())
    if not np.isfinite(low) or not np.isfinite(high):
        finite = torch.isfinite(pixels).flatten(1).all(dim=1)
        for item in finite.logical_not().nonzero().flatten().tolist():
            errors[item] = InputError(
                f"pixels: item {item} holds NaN or infinity, wanted finite numbers"
            )
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
    if isinstance(image, np.ndarray):
        if image.dtype.itemsize > 4:
            raise InputError(f"pixels: got {image.dtype}, wanted float32 or float16")
        # torch.from_numpy refuses negative strides, read-only memory and foreign byte order
        array = image.astype(image.dtype.newbyteorder("="), copy=False)
        usable = array.flags.writeable and all(stride >= 0 for stride in array.strides)
        image = torch.from_numpy(array if usable else array.copy())
    if image.dtype not in FLOATS:
        raise InputError(f"pixels: got {image.dtype}, wanted float32, float16 or bfloat16")
    _check_data("pixels", image)
    if image.requires_grad:
        raise InputError("pixels: got a tensor that needs gradients, wanted x.detach()")
    tensor: Tensor = image
    return tensor


def _is_float(image: object) -> bool:
    if isinstance(image, Tensor):
        return image.dtype.is_floating_point
    return isinstance(image, np.ndarray) and image.dtype.kind == "f"


def sort_texts(texts: Texts, tower: TextSpec) -> TokenIds | str | Sequence[str]:
    """``texts`` as `TokenIds` if they are token ids or an empty list, else unchanged.

    Raises InputError for bytes, and for ids that ``tower`` does not take.
    """
    if isinstance(texts, bytes | bytearray | memoryview):
        raise InputError("texts: got bytes, wanted strings or token ids")
    if isinstance(texts, str):
        return texts
    if isinstance(texts, Sequence):
        if not len(texts):
            return TokenIds.of([])
        if any(isinstance(text, str) for text in texts):
            return cast("Sequence[str]", texts)
    return _token_ids(texts, tower)


def check_strings(name: str, values: Sequence[str]) -> tuple[str, ...]:
    """``values`` as a tuple. Raises InputError unless they are a list of at least one string."""
    if isinstance(values, str) or not values or not all(isinstance(value, str) for value in values):
        raise InputError(f"{name}: got {values!r:.80}, wanted a list of one string or more")
    return tuple(values)


def _token_ids(ids: object, tower: TextSpec) -> TokenIds:
    """From a tensor or array (N, T), or from lists of any lengths."""
    if isinstance(ids, np.ndarray):
        if ids.dtype.kind != "i":
            raise InputError(f"texts: got an array of {ids.dtype}, wanted strings or int64 ids")
        ids = torch.from_numpy(ids.astype(ids.dtype.newbyteorder("=")))
    if isinstance(ids, Tensor):
        matrix = check_id_tensor(ids, tower).cpu().numpy()
        texts, tokens = matrix.shape
        return TokenIds(matrix.reshape(-1), tokens * np.arange(texts + 1))
    if not isinstance(ids, Sequence):
        raise InputError(f"texts: got {type(ids).__name__}, wanted strings or token ids")
    if ids and all(isinstance(token, int) for token in ids):
        ids = [ids]
    for position, row in enumerate(ids):
        integers = isinstance(row, Sequence) and set(map(type, row)) == {int}
        if isinstance(row, str) or not integers:
            raise InputError(f"text {position}: got {row!r:.80}, wanted a string or a list of ids")
        if len(row) > tower.context or min(row) < 0 or max(row) >= tower.vocab:
            raise InputError(
                f"text {position}: got {len(row)} ids from {min(row)} to {max(row)}, "
                f"wanted at most {tower.context} from 0 to {tower.vocab - 1}"
            )
    return TokenIds.of(ids)


def check_id_tensor(ids: Tensor, tower: TextSpec) -> Tensor:
    """Token ids (B, T) int64 from int32 or int64 (B, T) or (T,).

    Raises InputError: another type or shape, ids out of range, more than ``context`` ids in a row.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        type_text = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"input_ids: got {type_text}, wanted an int32 or int64 tensor (B, T)")
    _check_data("input_ids", ids)
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or not 1 <= ids.shape[1] <= tower.context:
        raise InputError(
            f"input_ids: got shape {tuple(ids.shape)}, wanted (B, T) with T from 1 to "
            f"{tower.context}"
        )
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= tower.vocab:
            raise InputError(
                f"input_ids: got ids from {low} to {high}, wanted 0 to {tower.vocab - 1}"
            )
    return ids.long()


def mask_lengths(mask: Tensor, ids: Tensor) -> Tensor | None:
    """The number of ones (B,) in each row of a mask (B, T); None if there are no zeros.

    Raises InputError unless each row is ones, then zeros.
    """
    if not isinstance(mask, Tensor) or tuple(mask.shape) != tuple(ids.shape):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"attention_mask: got {shape}, wanted a tensor of shape {tuple(ids.shape)}"
        )
    _check_data("attention_mask", mask)
    attended = mask != 0
    lengths = attended.sum(dim=1)
    expected = torch.arange(ids.shape[1], device=mask.device) < lengths[:, None]
    if not torch.equal(attended, expected) or not torch.equal(attended.to(mask.dtype), mask):
        raise InputError("attention_mask: wanted ones, then zeros (right padding) in every row")
    if bool((lengths == 0).any()):
        row = int((lengths == 0).nonzero()[0])
        raise InputError(f"attention_mask: row {row} lets no token through, wanted one or more")
    return None if bool(attended.all()) else lengths


def _check_data(name: str, tensor: Tensor) -> None:
    """Refuse a tensor without numbers (meta, fake) and a tensor that is not dense (sparse)."""
    if tensor.device.type == "meta" or getattr(tensor, "fake_mode", None) is not None:
        raise InputError(f"{name}: got a tensor without data, wanted one with numbers")
    if tensor.layout != torch.strided:
        raise InputError(f"{name}: got the layout {tensor.layout}, wanted a dense tensor")
