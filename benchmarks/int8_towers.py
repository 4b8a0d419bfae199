"""Image towers in fp32 and in int8 from one checkpoint: quantized in a minute, without the guard.

Random weights, whose int8 embeddings the guard would refuse, are as fast as trained ones.
"""

from __future__ import annotations

from pathlib import Path

import torch

from vitrail.int8.blocks import quantize_block
from vitrail.int8.calibration import Calibration
from vitrail.int8.partial import PartialFolder
from vitrail.int8.recipe import Recipe, float_linears, int8_linears
from vitrail.model.loading import pixel_scale, read_model
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.runtime.towers import VisionTower
from vitrail.weights.folding import load_weights
from vitrail.zoo import map_tensors
from vitrail_kernels.ops.linear_int8 import group_columns

CPU = torch.device("cpu")


def image_towers(checkpoint: Path) -> tuple[VisionTower, VisionTower]:
    """The tower in fp32, and with every linear in int8 that may be (nearest rounding)."""
    loaded = read_model(checkpoint, torch.float32)
    spec, vision = loaded.spec, loaded.spec.vision
    assert vision is not None, "the checkpoint has an image tower"
    linears = int8_linears(vision.blocks, float_linears(vision.blocks))
    pixels = torch.randint(0, 256, (2, 224, 224, vision.channels), dtype=torch.uint8)
    calibration = Calibration(vision, loaded.weights, pixels)
    recipe = Recipe(rounding="nearest", group=group_columns(vision.blocks.gated))
    partial = PartialFolder(checkpoint, {})
    for layer in range(vision.blocks.layers):
        moments = calibration.advance(
            [name for name in ("qkv", "up", "down") if f"{layer}.{name}" in linears],
            hessian=False,
        )
        partial.put(layer, quantize_block(loaded.weights, layer, moments, recipe))
    quantized = spec.with_int8(linears)
    assert quantized.vision is not None, "int8 linears change no tower"
    stored = map_tensors(loaded.checkpoint, spec) | partial.sources()
    sources = {name: stored[name] for name in quantized.tensor_shapes()}
    weights = load_weights(quantized, sources, torch.float32, pixel_scale(quantized))
    return (
        VisionTower(vision, spec.head, TorchRunner(loaded.weights, torch.float32, CPU)),
        VisionTower(quantized.vision, spec.head, TorchRunner(weights, torch.float32, CPU)),
    )
