"""The references of the int8 operators against formulas written out in fp64, and their costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import assert_close
from kernels.int8_cases import codes, exact_grouped, exact_linear_int8, grouped_case, int8_case
from kernels.test_operators import EPS, Guarded, cost_of, explicit_norm, normal, same_bits
from vitrail_kernels.device.stats import stats_ref, stats_shape
from vitrail_kernels.int8_product import int8_product
from vitrail_kernels.ops.linear_int8 import (
    OFFSET,
    group_columns,
    is_unsigned,
    linear_int8_ref,
)
from vitrail_kernels.ops.linear_int8_grouped import linear_int8_grouped_ref
from vitrail_kernels.ops.norm_quant import norm_quant_ref

HALF = torch.float16
ACTIVATIONS = (None, "gelu", "gelu_tanh", "quick_gelu", "relu", "silu")


def quantized(x: Tensor, smooth: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    count = len(x) if rows is None else len(rows)
    out, scale = Guarded(count, x.shape[1], dtype=torch.int8), Guarded(count, dtype=torch.float32)
    norm_quant_ref(out.out, scale.out, x, smooth, rows, eps=EPS)
    return out.done(), scale.done()


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, torch.float32], ids=str)
def test_norm_quant_is_its_formula(dtype: torch.dtype) -> None:
    x = (normal(50, 72) * torch.logspace(-1, 2, 50)[:, None] + 3).to(dtype)
    smooth, rows = normal(72).abs() + 0.1, torch.tensor([7, 49, 7], dtype=torch.int32)
    out, scale = quantized(x, smooth, rows)
    exact = explicit_norm(x[rows.long()].double(), EPS) * smooth.double()
    assert_close(scale, exact.abs().amax(dim=1) / 127, name="scale")
    error = (out.double() * scale.double()[:, None] - exact).abs()
    assert (error <= 0.5001 * scale.double()[:, None]).all(), "rounded to nearest"
    assert same_bits(out[0], out[2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_norm_quant_marks_a_row_that_is_not_finite(value: float) -> None:
    x, smooth = normal(9, 72, dtype=HALF), torch.ones(72)
    clean = quantized(x, smooth)
    x[4, 5] = value
    out, scale = quantized(x, smooth)
    keep = torch.arange(9) != 4
    assert scale.isnan().tolist() == [row == 4 for row in range(9)]
    assert same_bits(out[keep], clean[0][keep])
    assert same_bits(scale[keep], clean[1][keep])


def run_linear(operands: list[Tensor], dtype: torch.dtype, **scalars: Any) -> tuple[Tensor, Any]:
    gated = scalars.get("gated", False)
    m, width = len(operands[0]), len(operands[2]) // (1 + gated)
    out, scale = Guarded(m, width, dtype=dtype), None
    if dtype == torch.int8:
        scale = Guarded(width // group_columns(gated), m, dtype=torch.float32)
    linear_int8_ref(out.out, *operands, None if scale is None else scale.out, **scalars)
    return out.done(), None if scale is None else scale.done()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_int8_is_its_formula(activation: str | None, gated: bool) -> None:
    """Values; and codes, which stand for the values to half a step and fp16's rounding."""
    operands = int8_case(40, 256, 72)
    scalars = {"activation": activation, "gated": gated}
    exact = exact_linear_int8(*operands, **scalars)
    out, _ = run_linear(operands, torch.float32, **scalars)
    assert_close(out, exact, name="linear_int8")
    out, scale = run_linear(operands, torch.int8, **scalars)
    steps = scale.t().double().repeat_interleave(group_columns(gated), dim=1)
    values = out.double() * steps
    if is_unsigned(activation, gated):
        values = (out.double() + 128) * steps - OFFSET
    error = (values - exact).abs()
    assert (error <= 0.501 * steps + exact.abs() * 2**-10).all()
    groups = out.view(40, -1, group_columns(gated)).int()
    if is_unsigned(activation, gated):
        assert (groups.amax(dim=2) == 127).all(), "the largest value of a group has the top code"
    else:
        assert (groups.abs().amax(dim=2) == 127).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e6], ids=str)
def test_linear_int8_marks_the_groups_that_are_not_finite(value: float) -> None:
    """1e6 is not finite in fp16, to which values are rounded first."""
    operands = int8_case(9, 256, 72)
    clean_out, clean_scale = run_linear(operands, torch.int8, activation="gelu")
    operands[4][200] = value
    out, scale = run_linear(operands, torch.int8, activation="gelu")
    assert scale[1].isnan().all()
    assert same_bits(scale[0], clean_scale[0])
    assert same_bits(out[:, :128], clean_out[:, :128])


@pytest.mark.parametrize("unsigned", [True, False], ids=["unsigned", "signed"])
@pytest.mark.parametrize("group", [64, 128, 256])
@pytest.mark.parametrize("has", [(), ("scale", "residual"), ("residual_rows",)], ids=str)
def test_grouped_is_its_formula(has: tuple[str, ...], group: int, unsigned: bool) -> None:
    parts = dict.fromkeys(has, True)
    tensors, scalars = grouped_case(20, 24, 512, group, unsigned=unsigned, **parts)
    if "residual" in tensors:
        tensors["residual"] = tensors["residual"].float()
    out, stats = Guarded(20, 24, dtype=torch.float32), torch.empty(stats_shape(20, 24))
    linear_int8_grouped_ref(out.out, **tensors, stats=stats, **scalars)
    assert_close(out.done(), exact_grouped(**tensors, **scalars), name="linear_int8_grouped")
    expected = torch.empty_like(stats, dtype=torch.float64)
    stats_ref(expected, out.out.double())
    assert_close(stats, expected, name="statistics")


def test_grouped_over_its_own_residual() -> None:
    tensors, scalars = grouped_case(20, 24, 256, 128, residual=True)
    apart = torch.empty(20, 24, dtype=HALF)
    linear_int8_grouped_ref(apart, **tensors, **scalars)
    out = tensors["residual"]
    linear_int8_grouped_ref(out, **tensors, **scalars)
    assert same_bits(out, apart)


@pytest.mark.parametrize("k", [1, 1040, 16_384])
def test_products_of_the_largest_codes_are_exact(k: int) -> None:
    x, weight = codes(5, k), codes(7, k)
    x[0], x[1], weight[0], weight[1] = -128, 127, -128, 127
    assert torch.equal(int8_product(x, weight).long(), x.long() @ weight.long().t())


def test_costs_by_hand() -> None:
    """(FLOPs, bytes): rows of codes and of values, fp32 scales, int32 rows."""
    m, n, k, stored = 5, 128, 256, 37
    x, out = codes(m, k), torch.empty(m, n, dtype=HALF)
    smooth, rows = torch.empty(k), torch.empty(m, dtype=torch.int32)
    stream = torch.empty(stored, k, dtype=HALF)
    cost = cost_of("norm_quant", x, torch.empty(m), stream, smooth, rows)
    assert cost == (0, 3 * m * k + 4 * m + 4 * k + 4 * m), "of x only the rows are read"
    weights = codes(n, k), torch.empty(n), torch.empty(n)
    cost = cost_of("linear_int8", out, x, torch.empty(m), *weights)
    assert cost == (2 * m * n * k, m * k + n * k + 2 * m * n + 4 * (m + n + n))
    grouped = codes(m, n), x, torch.empty(m), *weights, torch.empty(1, m)
    cost = cost_of("linear_int8", *grouped)
    assert cost == (2 * m * n * k, m * k + n * k + m * n + 4 * (m + n + n + m))
    weight, scale, bias = weights
    tensors = out, x, torch.empty(2, m), weight, scale, torch.empty(2, n), bias
    cost = cost_of("linear_int8_grouped", *tensors, scale, stream[:, :n].contiguous(), rows)
    moved = m * k + n * k + 2 * 2 * m * n + 4 * (2 * m + n + 2 * n + n + n) + 4 * m
    assert cost == (2 * m * n * k, moved), "of the residual only the rows are read"
