"""What an exported folder holds, by the model's spec: plans, their pixels, and the arena."""

import json

import torch
from torch import Tensor

from vitrail.checkpoint.contents import (
    PREPROCESSOR,
    PROCESSOR,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
)
from vitrail.plan.plan import Plan
from vitrail.plan.text import text_pooled
from vitrail.plan.vision import vision_pooled, vision_scores
from vitrail.spec import ModelSpec, VisionSpec
from vitrail.weights.layout import ALIGNMENT, arena_bytes

WEIGHTS = "weights.safetensors"
COPIED = (PREPROCESSOR, PROCESSOR, TOKENIZER_CONFIG, *TOKENIZER_FILES)
"""Files of the checkpoint that an export copies."""


def exported_plans(spec: ModelSpec) -> dict[str, Plan]:
    """The exported plans by name, for example "image.uint8"."""
    exported: dict[str, Plan] = {}
    if spec.vision is not None:
        for pixel_format in pixel_formats(spec):
            uint8 = pixel_format == "uint8"
            exported[f"image.{pixel_format}"] = vision_pooled(spec.vision, uint8=uint8)
            if spec.head is not None:
                scores = vision_scores(spec.vision, spec.head, uint8=uint8)
                exported[f"scores.{pixel_format}"] = scores
    if spec.text is not None:
        exported["text"] = text_pooled(spec.text)
    return exported


def pixel_formats(spec: ModelSpec) -> tuple[str, ...]:
    """The formats of pixels that the image tower takes; "uint8" needs an image processor."""
    if spec.vision is None:
        return ()
    return ("float",) if spec.image is None else ("float", "uint8")


def pixel_batch(vision: VisionSpec, pixel_format: str, size: tuple[int, int]) -> Tensor:
    """One image of ``size`` (height, width) on the meta device, in the shape that plans take."""
    if pixel_format == "uint8":
        return torch.empty(1, *size, vision.channels, dtype=torch.uint8, device="meta")
    return torch.empty(1, vision.channels, *size, dtype=torch.float32, device="meta")


def position_tables(
    spec: ModelSpec, dtype: torch.dtype, size: tuple[int, int] | None
) -> tuple[dict[str, tuple[int, int]], int]:
    """The arena's position tables: (start, stop) in bytes by pixel format; and the arena's bytes.

    The tables follow the packed weights, in the order of `pixel_formats`.
    """
    end = arena_bytes(spec, dtype)
    tables = {}
    if spec.vision is not None and size is not None:
        nbytes = spec.vision.tokens_at(size) * spec.vision.blocks.width * 4
        for pixel_format in pixel_formats(spec):
            tables[pixel_format] = end, end + nbytes
            end += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return tables, end


def weights_header(nbytes: int) -> bytes:
    """The safetensors header of an arena of ``nbytes``, which then begins at an `ALIGNMENT`."""
    entry = {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}
    text = json.dumps({"arena": entry}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
