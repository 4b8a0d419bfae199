"""Activations inside a kernel, of every fp16 value, against formulas in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.device.activations import ACTIVATIONS, activate
from vitrail_kernels.launch import Call, Grid, jit, launch, tl

pytestmark = pytest.mark.interpreted

BLOCK = 1024


@jit()
def _activate_kernel(
    out_ptr: tl.tensor, x_ptr: tl.tensor, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, activate(tl.load(x_ptr + offsets), ACTIVATION))


def activated(x: Tensor, activation: str) -> Tensor:
    """The kernel's fp32 results for fp32 ``x``, a multiple of `BLOCK` of them."""
    out = torch.full_like(x, torch.nan)
    arguments = {"out_ptr": out, "x_ptr": x, "ACTIVATION": activation, "BLOCK": BLOCK}
    config = KernelConfig(0, 0, 0, 4, 1)
    launch([Call(_activate_kernel, Grid(x.numel(), BLOCK), arguments, config)])
    return out


def every_half() -> Tensor:
    """All 65,536 bit patterns of fp16 as fp32."""
    bits = torch.arange(1 << 16, dtype=torch.int32)
    return bits.to(torch.int16).view(torch.float16).float()


def erf_gelu(x: Tensor) -> Tensor:
    """x Phi(x), by the logarithm of Phi: 1 + erf cancels where Phi is small, in fp64 too."""
    return x * torch.special.log_ndtr(x).exp()


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": erf_gelu,
    "gelu_tanh": lambda x: x * (2 * 0.7978845608028654 * (x + 0.044715 * x**3)).sigmoid(),
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
    "relu": lambda x: x.clamp_min(0),
    "silu": lambda x: x * x.sigmoid(),
    "tanh": lambda x: x.tanh(),
}


def half_spacing(x: Tensor) -> Tensor:
    """The distance between fp16's numbers at ``x``."""
    exponent = torch.frexp(x.abs().clamp_min(2.0**-14)).exponent - 1
    return torch.ldexp(torch.ones_like(x), exponent - 10)


def test_gelu_is_within_its_bounds_for_every_half() -> None:
    x = every_half()
    x = x[x.isfinite()]
    padded = torch.cat([x, x.new_zeros(-len(x) % BLOCK)])
    exact = erf_gelu(x.double())
    error = (activated(padded, "gelu")[: len(x)].double() - exact).abs()
    small = x.abs() < 12
    assert float(error[small].max()) < 5.1e-7
    assert float((error / half_spacing(exact)).max()) < 0.006
    assert float(activated(x.new_zeros(BLOCK), "gelu").abs().max()) == 0.0


def test_gelu_of_what_no_half_holds() -> None:
    """As bf16's and fp32's sums are: past fp16's range, between its numbers, not finite."""
    large = torch.tensor([1e5, 3e38, -1e5, -3e38, torch.nan, torch.inf, -torch.inf])
    x = torch.cat([large, torch.linspace(-12, 12, (1 << 16) - len(large))])
    out = activated(x, "gelu")
    assert out[:4].tolist() == [x[0], x[1], 0.0, 0.0]
    assert bool(out[4:7].isnan().all()), "not finite must stay seen"
    error = (out[7:].double() - erf_gelu(x[7:].double())).abs()
    assert float(error.max()) < 5.1e-7


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "gelu"])
def test_activations_of_every_half(activation: str) -> None:
    """To fp32's precision at the larger of value and result, or at 1; NaN stays NaN."""
    x = every_half()
    out, exact = activated(x, activation).double(), FORMULAS[activation](x.double())
    finite = x.isfinite()
    size = torch.maximum(x.abs().double(), exact.abs())
    wrong = ((out - exact).abs() > 4e-7 * size + 5e-7)[finite]
    assert not bool(wrong.any()), x[finite][wrong][:5]
    assert bool(out[x.isnan()].isnan().all())
