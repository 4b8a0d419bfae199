"""A tower as a torch.nn.Module, for use inside torch.compile, torch.export and CUDA graphs.

Each tower is one custom operator (`vitrail.tower_operators`). torch.compile knows the shape of its
output and calls it without a graph break. The operator never reads a tensor's values on the host,
so that a CUDA graph can capture it. A program that is saved with it holds no weights: it runs where
`vitrail.load` has loaded the same model, and names that model where it is not loaded.

A module pickles without weights too: unpickling loads the model again. A deep copy shares them.
"""

import torch
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.model.loaded_towers import LoadedTowers, check_id_batch, check_pixel_batch
from vitrail.runtime.towers import TextTower, VisionTower
from vitrail.tower_operators import embed_image, embed_text


class ImageModule(nn.Module):
    """Pixels to embeddings (B, D) fp32, on the model's device.

    ``pixels``: preprocessed floats (B, channels, H, W), or uint8 (B, H, W, channels) that have been
    resized and cropped. An item that is not finite gives a row of NaN. No gradient flows. Raises
    InputError for another shape, dtype or device.
    """

    def __init__(self, towers: LoadedTowers, tower: VisionTower) -> None:
        super().__init__()
        self.towers, self.spec, self.device = towers, tower.spec, towers.device
        self.fingerprint, self.source = towers.fingerprint, towers.source

    def forward(self, pixels: Tensor) -> Tensor:
        if not _is_traced():
            check_pixel_batch(pixels, self.spec)
            _check_device("pixels", pixels, self.device)
        width = self.spec.embedding
        out: Tensor = embed_image(pixels.detach(), self.fingerprint, self.source, width)
        return out


class TextModule(nn.Module):
    """Token ids (B, T) int32 or int64 to embeddings (B, D) fp32, on the model's device.

    Rows are padded on the right and pooled at the end token, as in transformers. Every token is
    computed, because the end of a row is known only from its values. Ids are not checked: an id out
    of range gives NaN from the kernels, and an IndexError from PyTorch on the CPU. Raises
    InputError for another shape, dtype or device.
    """

    def __init__(self, towers: LoadedTowers, tower: TextTower) -> None:
        super().__init__()
        self.towers, self.spec, self.device = towers, tower.spec, towers.device
        self.fingerprint, self.source = towers.fingerprint, towers.source

    def forward(self, ids: Tensor) -> Tensor:
        if not _is_traced():
            check_id_batch(ids, self.spec)
            _check_device("ids", ids, self.device)
        out: Tensor = embed_text(ids, self.fingerprint, self.source, self.spec.embedding)
        return out


def _is_traced() -> bool:
    """Whether torch.jit.trace runs: shapes are tensors then, and the operator alone checks them."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise InputError(f"{name}: got a tensor on {tensor.device}, wanted {device}")
