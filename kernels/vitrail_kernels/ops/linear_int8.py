"""linear_int8: out = act(x_scale weight_scale (x W^T) + b), x and W in int8, one scale a row each

act    none, GELU (erf), tanh-GELU, QuickGELU, ReLU, SiLU; gated: act(gate) * up
out    the compute dtype, or int8 codes with a scale for each row and 128 columns (64 if gated)
FLOPs  2 M N K            bytes  M K + N K + M N times the size of an output
bound  by the tensor cores from a few hundred rows on, by the read of W below that

The sums of products are int32, so they are exact, in any order: |sum| <= 128 * 127 K < 2^31.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrail_kernels.device.activations import activate_ref_
from vitrail_kernels.int8_product import int8_product
from vitrail_kernels.ops.norm_quant import TINY

OFFSET = 0.17
"""Added to the outputs of an activation that is never below -0.17, so that codes need no sign."""
UNSIGNED = ("gelu", "gelu_tanh", "quick_gelu", "relu")
"""The activations with that lower bound (tanh-GELU misses it by 4e-5)."""


def is_unsigned(activation: str | None, gated: bool) -> bool:
    """Whether the int8 output of `linear_int8` has codes q with value = (q + 128) scale - OFFSET;
    otherwise value = q scale."""
    return activation in UNSIGNED and not gated


def group_columns(gated: bool) -> int:
    """How many columns of an int8 output share a scale."""
    return 64 if gated else 128


def linear_int8_ref(
    out: Tensor,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    out_scale: Tensor | None = None,
    *,
    activation: str | None = None,
    gated: bool = False,
) -> None:
    """Write ``out`` (M, N), or (M, N / 2) if ``gated``, from ``x`` (M, K) and ``weight`` (N, K).

    ``x`` and ``weight`` are int8. ``x_scale`` (M,), ``weight_scale`` (N,) and ``bias`` (N,) are
    fp32. If ``gated``, rows of gate and up alternate in ``weight``. If ``out`` is int8, values are
    first rounded to fp16, and ``out_scale`` (groups, M) fp32 receives a scale for each row and
    `group_columns`; `is_unsigned` says how codes stand for values. A row whose values are not
    finite has scales that are NaN.
    """
    y = int8_product(x, weight).float().mul_(x_scale[:, None]).mul_(weight_scale).add_(bias)
    if gated:
        y = activate_ref_(y[:, 0::2].contiguous(), activation or "silu").mul_(y[:, 1::2])
    elif activation is not None:
        y = activate_ref_(y, activation)
    if out_scale is None:
        out.copy_(y)
        return
    columns = group_columns(gated)
    y = y.half().float().view(y.shape[0], -1, columns)
    if is_unsigned(activation, gated):
        top = y.amax(dim=2).add_(OFFSET).clamp_(min=TINY)
        codes = (y + OFFSET).mul_((255 / top)[..., None]).sub_(128)
        scale = top / 255
    else:
        top = torch.maximum(y.amax(dim=2), -y.amin(dim=2)).clamp_(min=TINY)
        codes = y * (127 / top)[..., None]
        scale = top / 127
    out_scale.copy_(scale.add_(y.sum(dim=2).mul_(0)).t())
    out.copy_(codes.clamp_(-128, 127).round_().nan_to_num_(0).view(out.shape))
