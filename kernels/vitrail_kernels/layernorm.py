"""layernorm: out = (x - mean) / sqrt(var + eps) * gamma + beta, per row, statistics in fp32

    FLOPs  none counted       bytes  2 M C       bound  by memory

Only where a normalised tensor is itself an output or the residual stream; elsewhere LayerNorm is
part of `linear`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail_kernels.cost import Cost, traffic


def layernorm_ref(
    out: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, rows: Tensor | None = None, *, eps: float
) -> None:
    """Write ``out`` (M', C), may be ``x``; ``gamma`` and ``beta`` (C,) fp32; ``rows`` (M',)."""
    if rows is not None:
        x = x.index_select(0, rows)
    wide = torch.promote_types(x.dtype, torch.float32)
    out.copy_(F.layer_norm(x.to(wide), (x.shape[1],), gamma.to(wide), beta.to(wide), eps))


def layernorm_cost(
    out: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, rows: Tensor | None = None, **_: object
) -> Cost:
    """No matrix product; each row is read and written once."""
    read = out.numel() * x.element_size()
    return Cost(0, read + traffic(out, gamma, beta, rows))
