"""patch_embed: pixels -> tokens, out[b, t] = table[t] + patch(b, t) W^T

    patch  the pixels under one patch; remainder pixels at the right and bottom edge are dropped
    table  position + class / register tokens + projection bias, see `position`
    FLOPs  2 B P C K      bytes  pixels + C K + B T C      bound  by memory for uint8 at small K

uint8 pixels come as (B, H, W, channels) with a weight that has the normalisation folded in and
runs (row, column, channel) along K; float pixels as (B, channels, H, W), already normalised, with a
weight that runs (channel, row, column). A uint8 value u enters as u / 256: exact in every dtype,
and it keeps weights with 1 / 255 folded in out of fp16's subnormals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrail_kernels.cost import Cost, traffic

UINT8_UNIT = 256
"""The uint8 value that would stand for 1."""


def _columns(pixels: Tensor, patch: tuple[int, int]) -> Tensor:
    """Patches as rows: (B, patches, K)."""
    down, across = patch
    if pixels.dtype == torch.uint8:
        batch, height, width, channels = pixels.shape
        h, w = height // down, width // across
        kept = pixels[:, : h * down, : w * across]
        split = kept.reshape(batch, h, down, w, across, channels).permute(0, 1, 3, 2, 4, 5)
    else:
        batch, channels, height, width = pixels.shape
        h, w = height // down, width // across
        kept = pixels[:, :, : h * down, : w * across]
        split = kept.reshape(batch, channels, h, down, w, across).permute(0, 2, 4, 1, 3, 5)
    return split.reshape(batch, h * w, down * across * channels)


def patch_embed_ref(
    out: Tensor,
    pixels: Tensor,
    weight: Tensor,
    table: Tensor,
    *,
    patch: tuple[int, int],
    channels: int,
    prefix: int,
) -> None:
    """Write ``out`` (B T, C) from ``pixels``, ``weight`` (C, K') and ``table`` (T, C) fp32.

    K' may be larger than the K numbers of a patch; what is past K is padding and not used.
    """
    batch, found = pixels.shape[0], pixels.shape[3 if pixels.dtype == torch.uint8 else 1]
    if found != channels:
        raise ValueError(f"pixels {tuple(pixels.shape)}: got {found} channels, wanted {channels}")
    if batch == 0:
        return
    # the sum stays wide until the table is added: over uint8 pixels it is large and mostly bias
    wide = torch.promote_types(weight.dtype, torch.float32)
    columns = _columns(pixels, patch).to(wide)
    if pixels.dtype == torch.uint8:
        columns /= UINT8_UNIT
    tokens = out.view(batch, table.shape[0], out.shape[1])
    tokens[:, :prefix] = table[:prefix]
    projected = torch.matmul(columns, weight[:, : columns.shape[2]].t().to(wide))
    if projected.dtype == out.dtype == table.dtype:
        torch.add(projected, table[prefix:], out=tokens[:, prefix:])
    else:
        tokens[:, prefix:] = projected + table[prefix:]


def patch_embed_cost(
    out: Tensor,
    pixels: Tensor,
    weight: Tensor,
    table: Tensor,
    *,
    patch: tuple[int, int],
    channels: int,
    prefix: int,
    **_: object,
) -> Cost:
    """FLOPs of the projection of every patch, padding along K left out."""
    values = patch[0] * patch[1] * channels
    patches = out.shape[0] // max(table.shape[0], 1) * (table.shape[0] - prefix)
    return Cost(2 * patches * out.shape[1] * values, traffic(out, pixels, weight, table))
