"""The transformers processor that does the steps of a case."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

if TYPE_CHECKING:
    from pixels.cases import Steps

CLASSES = {"clip": CLIPImageProcessorPil, "vit": ViTImageProcessorPil, "bit": BitImageProcessorPil}


def processor(steps: Steps, channels: int) -> Any:
    """ViT's does not convert to RGB and fails on what is not; it is asked to, here, for all."""
    size: dict[str, int] = {"height": 1, "width": 1}
    if steps.resize is not None and steps.resize[0] == "shortest":
        size = {"shortest_edge": steps.resize[1]}
    elif steps.resize is not None:
        size = {"height": steps.resize[1], "width": steps.resize[2]}
    crop = steps.crop or (1, 1)
    return CLASSES[steps.kind](
        do_convert_rgb=channels == 3,
        do_resize=steps.resize is not None,
        size=size,
        resample=steps.resample,
        do_center_crop=steps.crop is not None,
        crop_size={"height": crop[0], "width": crop[1]},
        do_rescale=steps.rescale is not None,
        rescale_factor=1 / 255 if steps.rescale is None else steps.rescale,
        do_normalize=steps.mean is not None,
        image_mean=list(steps.mean or (0.0,) * channels),
        image_std=list(steps.std or (1.0,) * channels),
    )
