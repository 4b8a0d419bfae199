"""`LoadedTowers`: the towers of a model under its fingerprint, for modules and saved programs."""

from typing import Any, Self

import torch
from torch import Tensor

from vitrail.errors import InputError
from vitrail.model.fingerprint import Fingerprint
from vitrail.model.forward import finite_status
from vitrail.model.load_arguments import LoadArguments
from vitrail.runtime.runner import Runner
from vitrail.runtime.towers import TextTower, VisionTower
from vitrail.spec import TextSpec, VisionSpec
from vitrail.torch_modes import public_call
from vitrail.tower_operators import add_towers


class LoadedTowers:
    """The image and the text tower of a model, of which either may be None.

    They keep the model's weights in memory. Copies are the object itself. Unpickling finds it in
    the process by its fingerprint and device, or loads the model again (`vitrail.model.pickled`).
    ``source``: the call that loads the model (`vitrail.tower_operators.embed_image`).
    """

    def __init__(
        self,
        image: VisionTower | None,
        text: TextTower | None,
        runner: Runner,
        fingerprint_content: Fingerprint,
        source: str,
        load_arguments: LoadArguments | None,
    ) -> None:
        self.image, self.text, self.device = image, text, runner.device
        self.memory_limit = runner.budget.limit
        self.fingerprint, self.source = fingerprint_content.digits, source
        self._fingerprint_content, self._load_arguments = fingerprint_content, load_arguments
        add_towers(self)

    @public_call
    def embed_image(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, D) fp32 of `check_pixel_batch`'s pixels; NaN for items not finite."""
        assert self.image is not None, "the fingerprint is of a model with an image tower"
        check_pixel_batch(pixels, self.image.spec)
        out = self.image.embeddings(pixels)
        return _finite(out["vision.embedding"], out["vision.status"])

    @public_call
    def embed_text(self, ids: Tensor) -> Tensor:
        """Embeddings (B, D) fp32 of `check_id_batch`'s ids; NaN for items not finite."""
        assert self.text is not None, "the fingerprint is of a model with a text tower"
        check_id_batch(ids, self.text.spec)
        text = self.text

        def compute(part: slice) -> Tensor:
            out = text.dense(ids[part])
            if "text.embedding" in out:
                return _finite(out["text.embedding"], out["text.status"])
            embedding = out["text.pooler"].float()  # a tower without a projection
            return _finite(embedding, finite_status(embedding))

        parts = text.dense_in_parts(ids, compute)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        from vitrail.model import pickled

        return pickled.load_towers, pickled.state(self._load_arguments, self._fingerprint_content)


def _finite(embedding: Tensor, status: Tensor) -> Tensor:
    return torch.where(status[:, None] == 0, embedding, float("nan"))


def check_pixel_batch(pixels: Tensor, spec: VisionSpec) -> None:
    """Raise InputError unless ``pixels`` are (B, channels, H, W) floats or (B, H, W, channels)
    uint8, of at least one patch."""
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


def check_id_batch(ids: Tensor, spec: TextSpec) -> None:
    """Raise InputError unless ``ids`` are (B, T) int32 or int64 of at most ``context`` a row."""
    if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise InputError(
            f"ids: got {tuple(ids.shape)} of {ids.dtype}, wanted (B, T) int32 or int64"
        )
    if not 1 <= ids.shape[1] <= spec.context:
        raise InputError(f"ids: got {ids.shape[1]} per row, wanted 1 to {spec.context}")
