"""The norm_quant kernel in Triton's interpreter, against its reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import assert_codes
from interpreted.guard import at_page_end
from kernels.test_operators import EPS, Guarded, explicit_norm, normal, same_bits
from vitrail_kernels.launch import Target, launch
from vitrail_kernels.ops.layernorm import row_config
from vitrail_kernels.ops.norm_quant import norm_quant_calls, norm_quant_ref

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # NumPy, of NaN
]

TARGETS = (Target(90, 3), Target(80, 3))
HALF = torch.float16


def run(
    x: Tensor, smooth: Tensor, rows: Tensor | None = None, target: Target = TARGETS[0]
) -> tuple[Tensor, Tensor]:
    """Codes and scales; every input ends at an unreadable page."""
    count, width = len(x) if rows is None else len(rows), x.shape[1]
    out = Guarded(count, width, dtype=torch.int8)
    scale = Guarded(count, dtype=torch.float32)
    x, smooth = map(at_page_end, (x, smooth))
    rows = None if rows is None else at_page_end(rows)
    launch(norm_quant_calls(target, out.out, scale.out, x, smooth, rows, eps=EPS))
    return out.done(), scale.done()


def check(x: Tensor, smooth: Tensor, rows: Tensor | None = None, **options: Any) -> None:
    count = len(x) if rows is None else len(rows)
    codes, scale = torch.empty(count, x.shape[1], dtype=torch.int8), torch.empty(count)
    norm_quant_ref(codes, scale, x, smooth, rows, eps=EPS)
    our_codes, our_scale = run(x, smooth, rows, **options)
    assert_codes(our_codes, codes)
    torch.testing.assert_close(our_scale, scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("width", [32, 48, 200, 768, 1664])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_row_fewer_than_a_program_takes_as_many_and_a_row_more(
    width: int, extra: int, dtype: torch.dtype
) -> None:
    target = TARGETS[extra % 2]
    count = max(1, row_config(target, "", width).block_m + extra)
    x = (normal(count, width) * torch.logspace(-0.5, 2, count)[:, None] + 3).to(dtype)
    check(x, normal(width).abs() + 0.1, target=target)


def test_codes_times_scales_are_the_normalized_rows() -> None:
    x, smooth = normal(33, 200, dtype=HALF) * 5 + 20, normal(200).abs() + 0.1
    codes, scale = run(x, smooth)
    exact = explicit_norm(x.double(), EPS) * smooth.double()
    error = (codes.double() * scale.double()[:, None] - exact).abs()
    assert (error <= scale.double()[:, None] * 0.5001).all()
    assert codes.int().abs().amax(dim=1).tolist() == [127] * 33


def test_rows_are_picked_and_rows_alone_have_the_bits_they_have_among_others() -> None:
    x, smooth = normal(50, 200, dtype=HALF), normal(200)
    codes, scale = run(x, smooth)
    rows = torch.tensor([49, 0, 7, 7, 18], dtype=torch.int32)
    picked_codes, picked_scale = run(x, smooth, rows)
    assert same_bits(picked_codes, codes[rows.long()])
    assert same_bits(picked_scale, scale[rows.long()])
    for row in (0, 18, 49):
        alone_codes, alone_scale = run(x[row : row + 1], smooth)
        assert same_bits(alone_codes, codes[row : row + 1])
        assert same_bits(alone_scale, scale[row : row + 1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_row_that_is_not_finite_has_the_scale_nan_and_changes_no_other(value: float) -> None:
    x, smooth = normal(50, 72, dtype=HALF), normal(72)
    codes, scale = run(x, smooth)
    x[17, 3] = value
    dirty_codes, dirty_scale = run(x, smooth)
    others = torch.arange(50) != 17
    assert same_bits(dirty_codes[others], codes[others])
    assert same_bits(dirty_scale[others], scale[others])
    assert dirty_scale[17].isnan()


def test_a_column_scale_that_is_nan_marks_every_row() -> None:
    smooth = normal(72)
    smooth[5] = torch.nan
    assert run(normal(5, 72, dtype=HALF), smooth)[1].isnan().all()


def test_a_row_of_equal_values_has_codes_of_zero_and_a_finite_scale() -> None:
    codes, scale = run(torch.full((2, 64), 3.0, dtype=HALF), torch.ones(64))
    assert codes.count_nonzero() == 0
    assert (scale > 0).all()


def test_a_row_that_x_does_not_have_has_the_scale_nan() -> None:
    rows = torch.tensor([1, 5, -1], dtype=torch.int32)
    _, scale = run(normal(5, 64, dtype=HALF), torch.ones(64), rows)
    assert scale.isnan().tolist() == [False, True, True]


def test_no_rows_launch_nothing() -> None:
    codes, scale = run(torch.empty(0, 64, dtype=HALF), torch.ones(64))
    assert (codes.numel(), scale.numel()) == (0, 0)
