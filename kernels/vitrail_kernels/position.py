"""position: the position table at another grid, with all that is added to a token beside its pixels

    out[:prefix] = prefix          out[prefix:] = resize(table[1:]) + projection bias
    FLOPs  none counted      bytes  2 T C      bound  by memory, and cached: once for each image
    size

The resize is bicubic with align_corners=False in fp32, antialiased where the family says so: what
transformers' `interpolate_pos_encoding` does.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vitrail_kernels.cost import Cost, traffic


def position_ref(
    out: Tensor,
    table: Tensor,
    prefix: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    target: tuple[int, int],
    antialias: bool,
) -> None:
    """Write ``out`` (P + h w, C) fp32 for the ``target`` grid (h, w).

    ``table`` (1 + grid_h grid_w, C) fp32 is the checkpoint's, its first row the class token's (part
    of ``prefix``); ``prefix`` (P, C) fp32 holds the class token with its position, then the
    registers; ``bias`` (C,) fp32 is the patch projection's.
    """
    patches = table[1:]
    if target != grid:
        width = table.shape[1]
        square = patches.view(1, *grid, width).permute(0, 3, 1, 2)
        resized = F.interpolate(
            square, size=target, mode="bicubic", align_corners=False, antialias=antialias
        )
        patches = resized.permute(0, 2, 3, 1).reshape(-1, width)
    out[: prefix.shape[0]] = prefix
    out[prefix.shape[0] :] = patches if bias is None else patches + bias


def position_cost(
    out: Tensor, table: Tensor, prefix: Tensor, bias: Tensor | None = None, **_: object
) -> Cost:
    """Both tables once."""
    return Cost(0, traffic(out, table, prefix, bias))
