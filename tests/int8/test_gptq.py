"""Rounding to codes: the scales, the nearest codes, and GPTQ against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitrail.errors import VitrailError
from vitrail.int8 import gptq
from vitrail.int8.gptq import round_gptq, round_nearest, row_scales


def _inputs(rows: int, columns: int, correlated: float = 1.0) -> Tensor:
    """Inputs whose columns share a few directions, as activations do."""
    x = torch.randn(rows, columns, dtype=torch.float64)
    return x + correlated * torch.randn(rows, 4).double() @ torch.randn(4, columns).double()


def _error(weight: Tensor, codes: Tensor, scale: Tensor, x: Tensor) -> float:
    difference = codes.double() * scale.double()[:, None] - weight.double()
    return float((x @ difference.t()).square().sum())


def _gptq_by_its_definition(weight: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """Round a column, then move the columns that are left to the least error, exactly: each time
    from the inverse of the Hessian of those columns."""
    columns = weight.shape[1]
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns).double()
    weight, codes = weight.double().clone(), torch.empty_like(weight, dtype=torch.int8)
    left = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        column = left[0]
        code = (weight[:, column] / scale.double()).round().clamp(-127, 127)
        codes[:, column] = code.to(torch.int8)
        error = (weight[:, column] - code * scale.double()) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return codes


def test_scales_are_the_largest_magnitudes_over_127() -> None:
    weight = torch.randn(20, 30)
    weight[7] = 0
    scale = row_scales(weight)
    assert scale.dtype == torch.float32
    expected = weight.abs().amax(dim=1) / 127
    expected[7] = 1
    torch.testing.assert_close(scale, expected)


def test_scales_of_tiny_rows_are_normal_numbers() -> None:
    scale = row_scales(torch.full((2, 3), 1e-42))
    assert (scale >= torch.finfo(torch.float32).tiny).all()


def test_nearest_codes_are_within_half_a_step() -> None:
    weight = torch.randn(20, 30) * torch.logspace(-6, 6, 20)[:, None]
    scale = row_scales(weight)
    codes = round_nearest(weight, scale)
    assert codes.dtype == torch.int8
    assert codes.abs().amax(dim=1).eq(127).all()
    difference = (codes.double() * scale.double()[:, None] - weight.double()).abs()
    assert (difference <= 0.500001 * scale.double()[:, None]).all()


@pytest.mark.parametrize("columns", [5, 40, 150])
def test_gptq_is_its_definition(columns: int) -> None:
    """150 columns are more than a block of `gptq.BLOCK`."""
    weight, x = torch.randn(6, columns), _inputs(300, columns)
    scale, hessian = row_scales(weight), x.t() @ x
    codes = round_gptq(weight, scale, hessian)
    assert torch.equal(codes, _gptq_by_its_definition(weight, scale, hessian))


def test_gptq_gives_better_outputs() -> None:
    weight, x = torch.randn(64, 150), _inputs(400, 150, 2.0)
    scale = row_scales(weight)
    by_gptq = _error(weight, round_gptq(weight, scale, x.t() @ x), scale, x)
    assert by_gptq < 0.5 * _error(weight, round_nearest(weight, scale), scale, x)


def test_gptq_of_inputs_without_correlation_is_the_nearest() -> None:
    weight = torch.randn(10, 20)
    scale, hessian = row_scales(weight), torch.diag(torch.rand(20) + 1).double()
    assert torch.equal(round_gptq(weight, scale, hessian), round_nearest(weight, scale))


def test_gptq_stays_within_127() -> None:
    weight, x = torch.sign(torch.randn(30, 50)), _inputs(200, 50, 10.0)
    codes = round_gptq(weight, row_scales(weight), x.t() @ x)
    assert int(codes.max()) <= 127
    assert int(codes.min()) >= -127


@pytest.mark.parametrize("rows", [0, 1, 10])
def test_fewer_inputs_than_columns(rows: int) -> None:
    weight, x = torch.randn(10, 40), _inputs(rows, 40)
    scale = row_scales(weight)
    codes = round_gptq(weight, scale, x.t() @ x)
    assert _error(weight, codes, scale, x) <= _error(weight, round_nearest(weight, scale), scale, x)


def test_inputs_that_are_not_finite_are_an_error() -> None:
    hessian = torch.eye(8).double()
    hessian[2, 3] = torch.nan
    with pytest.raises(VitrailError, match="not finite"):
        round_gptq(torch.randn(4, 8), torch.ones(4), hessian)


def test_more_damping_is_tried_before_gptq_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix with a negative eigenvalue of 0.05 of the mean: 0.01 is too little, 0.1 is not."""
    hessian = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.15])).double()
    weight = torch.randn(4, 4)
    scale = row_scales(weight)
    assert torch.equal(round_gptq(weight, scale, hessian), round_nearest(weight, scale))
    monkeypatch.setattr(gptq, "DAMPING", (0.01,))
    with pytest.raises(VitrailError, match="--no-gptq"):
        round_gptq(weight, scale, hessian)
