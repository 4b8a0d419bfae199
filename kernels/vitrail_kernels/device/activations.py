"""Activations by name, in PyTorch and inside a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrail_kernels.launch import jit, tl

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "tanh")


def activate_ref_(y: Tensor, activation: str) -> Tensor:
    """Apply the activation, in place if possible; 16-bit values are computed in fp32."""
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
def gelu(y: tl.tensor) -> tl.tensor:
    """x Phi(x) of fp32 values as max(x, 0) - |x| 2^p(|x|), where p approximates log2 Phi(-|x|).

    Against erf in fp64, for every fp16 value, the error is at most 5.1e-7 and at most 0.006 of
    fp16's spacing at the result. erf in fp32 has the same absolute error, but is 1.5 spacings off,
    because 1 + erf cancels. An infinity gives NaN.

    This takes one exponential and eleven instructions, which hold their constants. libdevice's erf
    takes 32 instructions, and a third of them move constants into registers. The coefficients are a
    least squares fit of degree 7 over 0 < |x| <= 6. The weights of the fit were raised at the
    largest errors, in fp16's spacings, until the error was level. The leading coefficient is
    negative, so that the power is 0 for all larger |x|.
    """
    size = tl.abs(y)
    p = tl.fma(size, -9.29414796e-07, 4.77642279e-05)
    p = tl.fma(size, p, -0.000847924908)
    p = tl.fma(size, p, 0.00826437213)
    p = tl.fma(size, p, -0.0535915047)
    p = tl.fma(size, p, -0.458733797)
    p = tl.fma(size, p, -1.15117252)
    p = tl.fma(size, p, -1.0)
    return tl.fma(-size, tl.exp2(p), tl.maximum(y, 0.0))


@jit()
def times_sigmoid(y: tl.tensor, s: tl.tensor) -> tl.tensor:
    """y sigmoid(-s ln 2) = y / (1 + 2^s) of fp32 values, with a relative error of at most 3e-7.

    The square of the reciprocal root takes two instructions. A division takes six, because it also
    handles the full range.
    """
    root = tl.rsqrt(1.0 + tl.exp2(s))
    return y * root * root


@jit()
def activate(y: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """The activation of fp32 values. NaN stays NaN."""
    LOG2E: tl.constexpr = 1.4426950408889634
    if ACTIVATION == "gelu":
        y = gelu(y)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = sigmoid(2 u)
        SLOPE: tl.constexpr = -1.5957691216057308 * LOG2E
        y = times_sigmoid(y, y * tl.fma(y * y, 0.044715 * SLOPE, SLOPE))
    elif ACTIVATION == "quick_gelu":
        y = times_sigmoid(y, y * (-1.702 * LOG2E))
    elif ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)
    elif ACTIVATION == "silu":
        y = times_sigmoid(y, y * -LOG2E)
    elif ACTIVATION == "tanh":
        y = tl.fma(times_sigmoid(2.0, y * (-2.0 * LOG2E)), 1.0, -1.0)
    return y
