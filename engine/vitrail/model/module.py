"""A tower as a torch.nn.Module, for use inside torch.compile and CUDA graphs.

Each tower is one custom operator. torch.compile knows the shapes of its outputs and calls it
without a graph break. The operator never reads a tensor's values on the host, so that a CUDA graph
can capture it.
"""

import itertools
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.model.forward import finite_status
from vitrail.runtime.towers import TextTower, VisionTower
from vitrail.torch_modes import default_modes

_VISION: WeakValueDictionary[int, VisionTower] = WeakValueDictionary()
_TEXT: WeakValueDictionary[int, TextTower] = WeakValueDictionary()
_NUMBERS = itertools.count()


@torch.library.custom_op("vitrail::embed_image", mutates_args=())
def embed_image(pixels: Tensor, tower: int, width: int) -> tuple[Tensor, Tensor]:
    """Embeddings (B, ``width``) fp32 and status (B,) int32; ``tower``: `ImageModule.number`."""
    with default_modes():
        out = _VISION[tower].embeddings(pixels)
    return out["vision.embedding"], out["vision.status"]


@torch.library.custom_op("vitrail::embed_text", mutates_args=())
def embed_text(ids: Tensor, tower: int, width: int) -> tuple[Tensor, Tensor]:
    """The same for token ids (B, T); ``tower``: `TextModule.number`."""
    with default_modes():
        out = _TEXT[tower].dense(ids)
        if "text.embedding" in out:
            return out["text.embedding"], out["text.status"]
        embedding = out["text.pooler"].float()  # a tower without a projection
        return embedding, finite_status(embedding)


@embed_image.register_fake
@embed_text.register_fake
def _shapes(items: Tensor, tower: int, width: int) -> tuple[Tensor, Tensor]:
    embedding = items.new_empty((items.shape[0], width), dtype=torch.float32)
    return embedding, items.new_empty((items.shape[0],), dtype=torch.int32)


class ImageModule(nn.Module):
    """Pixels to embeddings (B, D) fp32, on the model's device.

    ``pixels``: preprocessed floats (B, channels, H, W), or uint8 (B, H, W, channels) that have been
    resized and cropped. An item that is not finite gives a row of NaN. No gradient flows. Raises
    InputError for another shape, dtype or device.
    """

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.tower, self.number = tower, next(_NUMBERS)
        _VISION[self.number] = tower

    def forward(self, pixels: Tensor) -> Tensor:
        spec, device = self.tower.spec, self.tower.runner.device
        uint8 = pixels.dtype == torch.uint8
        channels, sides = (
            (pixels.shape[-1], pixels.shape[1:3]) if uint8 else (pixels.shape[1], pixels.shape[2:])
        )
        fits = pixels.dim() == 4 and channels == spec.channels
        if not fits or any(s < p for s, p in zip(sides, spec.patch, strict=True)):
            raise InputError(
                f"pixels: got {tuple(pixels.shape)} of {pixels.dtype}, wanted (B, {spec.channels}, "
                f"H, W) floats or (B, H, W, {spec.channels}) uint8 of at least one patch"
            )
        if not uint8 and not pixels.is_floating_point():
            raise InputError(f"pixels: got {pixels.dtype}, wanted floats or uint8")
        _check_device("pixels", pixels, device)
        return _finite(*embed_image(pixels.detach(), self.number, spec.embedding))


class TextModule(nn.Module):
    """Token ids (B, T) int32 or int64 to embeddings (B, D) fp32, on the model's device.

    Rows are padded on the right and pooled at the end token, as in transformers. Every token is
    computed, because the end of a row is known only from its values. Ids are not checked: an id out
    of range gives NaN from the kernels, and an IndexError from PyTorch on the CPU. Raises
    InputError for another shape, dtype or device.
    """

    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        self.tower, self.number = tower, next(_NUMBERS)
        _TEXT[self.number] = tower

    def forward(self, ids: Tensor) -> Tensor:
        spec = self.tower.spec
        if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
            raise InputError(
                f"ids: got {tuple(ids.shape)} of {ids.dtype}, wanted (B, T) int32 or int64"
            )
        if not 1 <= ids.shape[1] <= spec.context:
            raise InputError(f"ids: got {ids.shape[1]} per row, wanted 1 to {spec.context}")
        _check_device("ids", ids, self.tower.runner.device)
        return _finite(*embed_text(ids, self.number, spec.embedding))


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise InputError(f"{name}: got a tensor on {tensor.device}, wanted {device}")


def _finite(embedding: Tensor, status: Tensor) -> Tensor:
    return torch.where(status[:, None] == 0, embedding, float("nan"))
