"""pool: one token a sequence -> LayerNorm -> projection -> fp32 embedding, and is it finite

    out = norm(x)[rows] W^T + b, status = 0 where every value is finite, else 1
    FLOPs  2 B D C      bytes  B C + D C + B D      bound  by the read of W

class_mean: the class token beside the mean of the patch tokens (DINOv2's linear head).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail_kernels.cost import Cost, traffic


def _as(dtype: torch.dtype, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def pool_ref(
    out: Tensor,
    status: Tensor,
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    *,
    eps: float,
) -> None:
    """Write ``out`` (B, D) fp32, ``status`` (B,) int32 from ``rows`` (B,) of ``x`` (M, C).

    With ``weight`` (D, C) and ``bias`` (D,): the LayerNorm's affine part is folded into them.
    Without: ``gamma`` and ``beta`` (C,) fp32 are the LayerNorm's own, and D = C.
    """
    if rows is not None:
        x = x.index_select(0, rows)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.layer_norm(x.to(wide), (x.shape[1],), _as(wide, gamma), _as(wide, beta), eps)
    out.copy_(y if weight is None else F.linear(y, weight.to(wide), _as(wide, bias)))
    status.copy_(torch.isfinite(out).all(dim=1).logical_not_())


def pool_cost(
    out: Tensor,
    status: Tensor,
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    **_: object,
) -> Cost:
    """FLOPs of the projection, where there is one."""
    batch, width = out.shape[0], x.shape[1]
    flops = 0 if weight is None else 2 * batch * weight.numel()
    read = batch * width * x.element_size()
    return Cost(flops, read + traffic(out, status, gamma, beta, weight, bias, rows))


def class_mean_ref(out: Tensor, x: Tensor, *, tokens: int, prefix: int) -> None:
    """Write ``out`` (B, 2 C): of each ``tokens`` rows of ``x`` the first, and the mean past
    ``prefix``."""
    sequences = x.view(-1, tokens, x.shape[1])
    width = x.shape[1]
    out[:, :width] = sequences[:, 0]
    wide = torch.promote_types(x.dtype, torch.float32)
    out[:, width:] = sequences[:, prefix:].mean(dim=1, dtype=wide)


def class_mean_cost(out: Tensor, x: Tensor, **_: object) -> Cost:
    """No matrix product; every token is read once."""
    return Cost(0, traffic(out, x))
