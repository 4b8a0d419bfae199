"""Smoothing factors: SmoothQuant's formula, and columns of zeros."""

from __future__ import annotations

import pytest
import torch

from vitrail.int8.smoothing import FLOOR, smooth_factors


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_the_formula(alpha: float) -> None:
    x, weight = torch.randn(50, 24).double(), torch.randn(30, 24).double()
    x[:, 3] *= 100
    x_top, w_top = x.abs().amax(dim=0), weight.abs().amax(dim=0)
    factors = smooth_factors(x_top.float(), weight.float(), alpha).double()
    scales = x_top**alpha / w_top ** (1 - alpha)
    ratios = factors * scales
    torch.testing.assert_close(ratios, ratios[0].expand(24), rtol=1e-5, atol=0)
    assert factors.log().mean().item() == pytest.approx(0, abs=1e-6)


def test_the_extremes_even_out_the_inputs_or_the_weights() -> None:
    x_top, weight = torch.rand(24) + 0.1, torch.randn(30, 24)
    inputs = x_top * smooth_factors(x_top, weight, 1.0)
    torch.testing.assert_close(inputs, inputs[0].expand(24))
    columns = (weight / smooth_factors(x_top, weight, 0.0)).abs().amax(dim=0)
    torch.testing.assert_close(columns, columns[0].expand(24))


def test_columns_that_are_zero_get_a_bounded_factor() -> None:
    x_top, weight = torch.ones(24), torch.ones(30, 24)
    x_top[3], weight[:, 5] = 0, 0
    factors = smooth_factors(x_top, weight, 0.7)
    assert torch.isfinite(factors).all()
    assert (factors > 0).all()
    assert factors[3] / factors[0] == pytest.approx(FLOOR**-0.7, rel=1e-5)
    assert factors[5] / factors[0] == pytest.approx(FLOOR**0.3, rel=1e-5)


def test_nothing_but_zeros_changes_nothing() -> None:
    factors = smooth_factors(torch.zeros(24), torch.zeros(30, 24), 0.7)
    assert torch.equal(factors, torch.ones(24))
