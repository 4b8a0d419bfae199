"""Activations by name, in PyTorch and inside a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrail_kernels.launch import jit, tl

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "tanh")


def activate_ref_(y: Tensor, activation: str) -> Tensor:
    """Apply the activation, in place where the dtype allows it; 16-bit values go through fp32."""
    if y.dtype in (torch.float16, torch.bfloat16):
        return activate_ref_(y.float(), activation).to(y.dtype)
    if activation == "gelu":
        return torch.ops.aten.gelu_(y)  # type: ignore[no-any-return]
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_(y, approximate="tanh")  # type: ignore[no-any-return]
    if activation == "quick_gelu":
        # x sigmoid(1.702 x) = silu(1.702 x) / 1.702: three passes in place, no temporary
        return torch.ops.aten.silu_(y.mul_(1.702)).mul_(1 / 1.702)  # type: ignore[no-any-return]
    if activation == "relu":
        return y.relu_()
    if activation == "silu":
        return torch.ops.aten.silu_(y)  # type: ignore[no-any-return]
    if activation == "tanh":
        return y.tanh_()
    raise ValueError(f"activation: got {activation!r}, wanted one of {ACTIVATIONS}")


@jit()
def activate(y: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """Of fp32 values. NaN stays NaN."""
    # sigmoid(s) = 1 / (1 + 2^(-s log2 e)), with the factors of the exponent multiplied beforehand
    LOG2E: tl.constexpr = 1.4426950408889634
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = sigmoid(2 u)
        SLOPE: tl.constexpr = -1.5957691216057308 * LOG2E
        y = y / (1.0 + tl.exp2(y * tl.fma(y * y, 0.044715 * SLOPE, SLOPE)))
    elif ACTIVATION == "quick_gelu":
        y = y / (1.0 + tl.exp2(y * (-1.702 * LOG2E)))
    elif ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)
    elif ACTIVATION == "silu":
        y = y / (1.0 + tl.exp2(y * -LOG2E))
    elif ACTIVATION == "tanh":
        y = 2.0 / (1.0 + tl.exp2(y * (-2.0 * LOG2E))) - 1.0
    return y
