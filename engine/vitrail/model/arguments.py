"""What users pass, checked and brought to one form before anything is computed."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.cuda import cuda_capability, why_no_cuda
from vitrail.errors import InputError, VitrailError
from vitrail.image.decoding import PixelInput, Readable
from vitrail.image.preprocess import linear_scale
from vitrail.spec import ImageSpec, VisionSpec
from vitrail.text.tokens import TokenIds

Images = PixelInput | Sequence[PixelInput]
Texts = str | Sequence[str] | Sequence[Sequence[int]] | Tensor | np.ndarray[Any, Any]
OnError = Literal["raise", "skip"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_pixels(
    values: Tensor,
    tower: VisionSpec,
    image: ImageSpec | None,
    strict: bool = True,
    wait: bool = True,
) -> dict[int, VitrailError]:
    """Refuse float pixels of another layout, that are not finite, or that look like 0..255.

    Without ``wait`` the values of pixels on a GPU are not looked at.

    Returns the items that hold NaN or infinity, by position; with ``strict`` the first is raised.
    """
    got = f"pixels: got shape {tuple(values.shape)}"
    if values.dim() != 4 or values.shape[1] != tower.channels:
        raise InputError(f"{got}, wanted (N, {tower.channels}, height, width) floats")
    if values.shape[2] < tower.patch[0] or values.shape[3] < tower.patch[1]:
        raise InputError(f"{got}, wanted at least one patch of {tower.patch} (height, width)")
    if not values.numel() or (values.is_cuda and not wait):
        return {}
    bad: dict[int, VitrailError] = {}
    low, high = (float(x) for x in values.aminmax())
    if not np.isfinite(low) or not np.isfinite(high):
        finite = torch.isfinite(values).flatten(1).all(dim=1)
        for item in finite.logical_not().nonzero().flatten().tolist():
            reason = f"pixels: item {item} holds NaN or infinity, wanted finite numbers"
            bad[item] = InputError(reason)
            if strict:
                raise bad[item]
        if len(bad) == len(values):
            return bad
        low, high = (float(x) for x in values[finite].aminmax())
    if image is not None:
        a, b = linear_scale(image, tower.channels)
        reach = float(np.maximum(np.abs(b), np.abs(255 * a + b)).max())
        if max(-low, high) > 8 * reach:
            raise InputError(
                f"pixels: got values from {low:.4g} to {high:.4g}, wanted preprocessed ones within "
                f"about +-{reach:.3g}; raw images go in as uint8 (N, H, W, C)"
            )
    return bad


def listed(images: Images) -> list[PixelInput]:
    """One image or many -> a list of single images."""
    if isinstance(images, str | bytes | bytearray | memoryview | os.PathLike | Image.Image):
        return [images]
    if isinstance(images, Readable):
        return [images]
    if isinstance(images, np.ndarray | Tensor):
        if images.ndim == 4:
            return list(images)
        return [images]
    if isinstance(images, Iterable) and not isinstance(images, Mapping | Set | io.IOBase):
        return list(images)
    raise InputError(
        f"images: got {type(images).__name__}, wanted paths, bytes, PIL images, arrays or tensors"
    )


def floats(images: object) -> Tensor | None:
    """Float pixels (N, C, H, W) as a tensor; None where ``images`` is something else."""
    if isinstance(images, list | tuple) and images and all(_is_float(i) for i in images):
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


def _float_tensor(image: Any) -> Tensor:
    """A float array or tensor as a tensor of numbers that PyTorch can compute with."""
    if isinstance(image, np.ndarray):
        if image.dtype.itemsize > 4:
            raise InputError(f"pixels: got {image.dtype}, wanted float32 or float16")
        # torch wraps neither negative strides nor read-only memory nor foreign byte order
        native = image.astype(image.dtype.newbyteorder("="), copy=False)
        plain = native.flags.writeable and all(stride >= 0 for stride in native.strides)
        image = torch.from_numpy(native if plain else native.copy())
    if image.dtype not in FLOATS:
        raise InputError(f"pixels: got {image.dtype}, wanted float32, float16 or bfloat16")
    _check_data("pixels", image)
    if image.requires_grad:
        raise InputError("pixels: got a tensor that needs gradients, wanted x.detach()")
    tensor: Tensor = image
    return tensor


def _check_data(what: str, tensor: Tensor) -> None:
    """Refuse tensors that hold no numbers in rows: meta and fake ones, sparse ones."""
    if tensor.device.type == "meta" or getattr(tensor, "fake_mode", None) is not None:
        raise InputError(f"{what}: got a tensor without data, wanted one with numbers")
    if tensor.layout != torch.strided:
        raise InputError(f"{what}: got the layout {tensor.layout}, wanted a dense tensor")


def _is_float(image: object) -> bool:
    if isinstance(image, Tensor):
        return image.dtype.is_floating_point
    return isinstance(image, np.ndarray) and image.dtype.kind == "f"


def check_device(device: str | torch.device, what: str = "device") -> torch.device:
    """The torch device by that name; "auto" is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refusal = InputError(f"{what}: got {device!r}, wanted 'auto', 'cpu' or 'cuda'")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise refusal from error
    if place.type not in ("cpu", "cuda"):
        raise refusal
    if place.type == "cuda":
        count = torch.cuda.device_count()
        if (place.index or 0) >= count:
            why = why_no_cuda()
            reason = f"PyTorch finds {count} CUDA devices" if why is None else why
            raise InputError(f"{what}: got {device!r}, but {reason}")
        cuda_capability(place)
    return place


def check_options(batch_size: int | None, size: tuple[int, int] | None, on_error: OnError) -> None:
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


def any_string(texts: Sequence[Any]) -> bool:
    return any(isinstance(text, str) for text in texts)


def token_ids(ids: object, vocab: int, context: int) -> TokenIds:
    """Token ids as `TokenIds`: from a tensor or array (N, T), or nested lists of any lengths."""
    if isinstance(ids, np.ndarray):
        if ids.dtype.kind != "i":
            raise InputError(f"texts: got an array of {ids.dtype}, wanted strings or int64 ids")
        ids = torch.from_numpy(ids.astype(ids.dtype.newbyteorder("=")))
    if isinstance(ids, Tensor):
        matrix = check_id_tensor(ids, vocab, context).cpu().numpy()
        texts, tokens = matrix.shape
        return TokenIds(matrix.reshape(-1), tokens * np.arange(texts + 1))
    if not isinstance(ids, Sequence):
        raise InputError(f"texts: got {type(ids).__name__}, wanted strings or token ids")
    if ids and all(isinstance(token, int) for token in ids):
        ids = [ids]
    for position, row in enumerate(ids):
        plain = isinstance(row, Sequence) and set(map(type, row)) == {int}
        if isinstance(row, str) or not plain:
            raise InputError(f"text {position}: got {row!r:.80}, wanted a string or a list of ids")
        if len(row) > context or min(row) < 0 or max(row) >= vocab:
            raise InputError(
                f"text {position}: got {len(row)} ids from {min(row)} to {max(row)}, "
                f"wanted at most {context} from 0 to {vocab - 1}"
            )
    return TokenIds.of(ids)


def check_id_tensor(ids: Tensor, vocab: int, context: int) -> Tensor:
    """Token ids (B, T) int64 within the vocabulary and the context."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"input_ids: got {kind}, wanted an int32 or int64 tensor (B, T)")
    _check_data("input_ids", ids)
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or not 1 <= ids.shape[1] <= context:
        raise InputError(
            f"input_ids: got shape {tuple(ids.shape)}, wanted (B, T) with T from 1 to {context}"
        )
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab):
        raise InputError(
            f"input_ids: got ids from {int(ids.min())} to {int(ids.max())}, wanted 0 to {vocab - 1}"
        )
    return ids.long()


def mask_lengths(mask: Tensor, ids: Tensor) -> Tensor | None:
    """(B,) tokens to attend to from a right-padded mask; None where nothing is masked."""
    if not isinstance(mask, Tensor) or tuple(mask.shape) != tuple(ids.shape):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"attention_mask: got {shape}, wanted a tensor of shape {tuple(ids.shape)}"
        )
    _check_data("attention_mask", mask)
    kept = mask != 0
    lengths = kept.sum(dim=1)
    expected = torch.arange(ids.shape[1], device=mask.device) < lengths[:, None]
    if not torch.equal(kept, expected) or not torch.equal(kept.to(mask.dtype), mask):
        raise InputError("attention_mask: wanted ones, then zeros (right padding) in every row")
    if bool((lengths == 0).any()):
        row = int((lengths == 0).nonzero()[0])
        raise InputError(f"attention_mask: row {row} lets no token through, wanted one or more")
    return None if bool(kept.all()) else lengths
