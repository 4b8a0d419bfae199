"""The quantizers of the int8 operators in fp64, as the guard and tests compare with them."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrail_kernels.device.activations import activate_ref_
from vitrail_kernels.ops.linear_int8 import OFFSET, group_columns, is_unsigned
from vitrail_kernels.ops.norm_quant import TINY


def exact_rows(x: Tensor, smooth: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Codes (M, K) int8 and scales (M,) fp64 that `norm_quant` writes for ``x`` (M, K) fp64."""
    y = torch.nn.functional.layer_norm(x, (x.shape[1],), smooth, eps=eps)
    top = y.abs().amax(dim=1).clamp_(min=TINY)
    codes = (y * (127 / top)[:, None]).clamp_(-127, 127).round_()
    return codes.to(torch.int8), top / 127


def exact_hidden(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    *,
    activation: str | None,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """Codes and scales that `linear_int8` writes for its arguments, as `exact_groups`."""
    sums = x.double() @ weight.double().t()  # integers below 2^53
    y = sums * x_scale.double()[:, None] * weight_scale.double() + bias.double()
    if gated:
        y = activate_ref_(y[:, 0::2].contiguous(), activation or "silu") * y[:, 1::2]
    elif activation is not None:
        y = activate_ref_(y, activation)
    return exact_groups(y, is_unsigned(activation, gated), group_columns(gated))


def exact_groups(y: Tensor, unsigned: bool, columns: int) -> tuple[Tensor, Tensor]:
    """Codes (M, F) int8 and scales (F / columns, M) fp64 of ``y`` (M, F) fp64.

    A scale is that of a row and ``columns`` columns. Values are first rounded to fp16.
    """
    groups = y.half().double().view(len(y), -1, columns)
    if unsigned:
        top = groups.amax(dim=2).add_(OFFSET).clamp_(min=TINY)
        codes, scale = (groups + OFFSET) * (255 / top)[..., None] - 128, top / 255
    else:
        top = groups.abs().amax(dim=2).clamp_(min=TINY)
        codes, scale = groups * (127 / top)[..., None], top / 127
    return codes.clamp_(-128, 127).round_().to(torch.int8).view(y.shape), scale.t().contiguous()


def value_of_codes(codes: Tensor, scale: Tensor, unsigned: bool) -> Tensor:
    """The values (M, F) fp32 that codes (M, F) with scales (groups, M) stand for."""
    groups = codes.float().view(len(codes), scale.shape[0], -1)
    if unsigned:
        values = (groups + 128) * scale.t()[..., None] - OFFSET
    else:
        values = groups * scale.t()[..., None]
    return values.view(codes.shape)
