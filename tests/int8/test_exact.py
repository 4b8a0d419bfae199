"""The quantizers in fp64, against the references of the operators and worked cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.int8 import exact
from vitrail_kernels import OPERATORS
from vitrail_kernels.ops.linear_int8 import OFFSET, is_unsigned


def test_rows_are_those_of_the_operator() -> None:
    dice = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(64, 96, generator=dice) + 1
    x[5] = 2.0  # a constant row: its normalized values are zero
    smooth = torch.rand(96, generator=dice) + 0.5
    out, scale = torch.empty(64, 96, dtype=torch.int8), torch.empty(64)
    OPERATORS["norm_quant"].reference(out=out, out_scale=scale, x=x, smooth=smooth, eps=1e-6)
    codes, wanted = exact.exact_rows(x.double(), smooth.double(), 1e-6)
    assert (codes != out).float().mean() < 1e-3
    assert (codes.int() - out.int()).abs().max() <= 1
    torch.testing.assert_close(scale.double(), wanted, rtol=1e-5, atol=1e-30)
    assert codes.abs().amax(dim=1).tolist() == [0 if row == 5 else 127 for row in range(64)]


@pytest.mark.parametrize(
    ("activation", "gated"),
    [("gelu", False), ("quick_gelu", False), ("relu", False), ("silu", True), ("silu", False)],
)
def test_hidden_codes_are_those_of_the_operator(activation: str, gated: bool) -> None:
    dice = torch.Generator().manual_seed(1)
    x = torch.randint(-127, 128, (32, 96), generator=dice).to(torch.int8)
    weight = torch.randint(-127, 128, (256, 96), generator=dice).to(torch.int8)
    inputs: dict[str, Any] = {
        "x": x,
        "x_scale": torch.rand(32, generator=dice) * 0.02,
        "weight": weight,
        "weight_scale": torch.rand(256, generator=dice) * 0.01,
        "bias": torch.randn(256, generator=dice),
    }
    columns = 128 if gated else 256
    out = torch.empty(32, columns, dtype=torch.int8)
    scale = torch.empty(2, 32)
    OPERATORS["linear_int8"].reference(
        out=out, out_scale=scale, **inputs, activation=activation, gated=gated
    )
    codes, wanted = exact.exact_hidden(**inputs, activation=activation, gated=gated)
    assert (codes != out).float().mean() < 1e-3
    assert (codes.int() - out.int()).abs().max() <= 1
    torch.testing.assert_close(scale.double(), wanted, rtol=1e-3, atol=0.0)
    # codes and scales stand for the values, up to half a code
    y = (x.double() @ weight.double().t()) * inputs["x_scale"][:, None] * inputs["weight_scale"]
    y += inputs["bias"]
    act: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": torch.nn.functional.gelu,
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
        "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    }
    y = act[activation](y[:, 0::2]) * y[:, 1::2] if gated else act[activation](y)
    values = exact.value_of_codes(codes, wanted, is_unsigned(activation, gated))
    steps = wanted.t().repeat_interleave(columns // 2, dim=1)
    assert ((values - y).abs() / steps).max() < 0.5 + 255 * 2**-11


def test_unsigned_codes_span_the_range_from_the_least_value_of_gelu() -> None:
    y = torch.tensor([[-OFFSET, 0.0, 4.0, 8.0]], dtype=torch.float64)
    codes, scale = exact.exact_groups(y, True, 4)
    top = float(torch.tensor(8.0).half()) + OFFSET
    assert scale.tolist() == [[pytest.approx(top / 255)]]
    assert codes[0, 3] == 127
    assert codes[0, 0] == -128
    signed, scale = exact.exact_groups(y, False, 2)
    assert signed.tolist() == [[-127, 0, 64, 127]]
    assert scale.shape == (2, 1)
