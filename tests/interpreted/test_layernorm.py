"""The layernorm kernel in Triton's interpreter, against fp64 and against what it must not touch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import assert_close
from interpreted.guard import at_page_end
from kernels.test_operators import EPS, POISONS, Guarded, check, explicit_norm, normal, same_bits
from vitrail_kernels.device.stats import stats_ref, stats_shape
from vitrail_kernels.launch import Target, launch
from vitrail_kernels.ops.layernorm import LAYERNORM, layernorm_calls, row_config

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # NumPy, of the poisons
]

TARGETS = (Target(90, 3), Target(80, 3))
DTYPES = (torch.float16, torch.float32)
WIDTHS = (32, 48, 64, 192, 200, 768, 1664)


def run(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    rows: Tensor | None = None,
    *,
    eps: float = EPS,
    target: Target = TARGETS[0],
) -> tuple[Tensor, Tensor]:
    """Output and statistics; every input ends at a page that nobody may read."""
    count, width = len(x) if rows is None else len(rows), x.shape[1]
    out = Guarded(count, width, dtype=x.dtype)
    stats = Guarded(*stats_shape(count, width), dtype=torch.float32)
    x, gamma, beta = map(at_page_end, (x, gamma, beta))
    rows = None if rows is None else at_page_end(rows)
    launch(layernorm_calls(target, out.out, x, gamma, beta, rows, stats.out, eps=eps))
    return out.done(), stats.done()


def affine(width: int) -> tuple[Tensor, Tensor]:
    return normal(width) + 1, normal(width)


def judge(x: Tensor, eps: float = EPS, target: Target = TARGETS[0]) -> None:
    """Both outputs of ``x`` as they are within the rules."""
    gamma, beta = affine(x.shape[1])
    out, stats = run(x, gamma, beta, eps=eps, target=target)
    reference = explicit_norm(x.double(), eps) * gamma.double() + beta.double()
    peer = F.layer_norm(x, (x.shape[1],), gamma.to(x.dtype), beta.to(x.dtype), eps)
    check(out, reference, peer, "layernorm")
    expected = torch.empty(stats.shape, dtype=torch.float64)
    stats_ref(expected, out.double())
    chunks = len(stats) // 2
    assert_close(stats[:chunks], expected[:chunks], name="sums")
    assert_close(stats[chunks:], expected[chunks:], name="squares")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_it_is_its_formula(width: int, extra: int, dtype: torch.dtype) -> None:
    """A row fewer than a program takes, as many, and one more."""
    target = TARGETS[extra % 2]
    count = max(1, row_config(target, "", width).block_m + extra)
    scales = torch.logspace(-2, 2, count)[:, None]
    judge((normal(count, width) * scales + 3).to(dtype), target=target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [48, 200, 768])
@pytest.mark.parametrize("mean", [20.0, 1000.0])
def test_means_far_above_the_deviation(width: int, mean: float, dtype: torch.dtype) -> None:
    judge((normal(5, width) + mean * torch.tensor([1, -1, 1, 0.5, 0])[:, None]).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_massive_channels(dtype: torch.dtype) -> None:
    x = normal(3, 200)
    x[:, 7] *= 300
    x[1, 199] = 60_000
    judge(x.to(dtype))


@pytest.mark.parametrize("width", [48, 200, 768])
def test_deviations_of_a_few_units_in_the_last_place(width: int) -> None:
    """The rounding of the mean is as large as they are."""
    judge(1000.3 + torch.randint(-2, 3, (4, width)) * 2.0**-14, eps=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-12, 1e-5])
@pytest.mark.parametrize("width", [48, 200, 768])
def test_equal_values_come_out_as_beta(width: int, eps: float, dtype: torch.dtype) -> None:
    """1000.3 has no exact mean in fp32: its rounding is all the deviation that there is."""
    values = torch.tensor([0.0, 1.0, 1000.3, -1000.3, 65504.0])
    x = values[:, None].expand(5, width).to(dtype)
    gamma, beta = affine(width)
    out, _ = run(x, gamma, beta, eps=eps)
    expected = beta.double().expand(5, width)
    check(out, expected, expected.to(dtype), "equal values")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [48, 200])
def test_a_row_has_the_same_bits_alone_and_anywhere(width: int, dtype: torch.dtype) -> None:
    x, weights = normal(41, width, dtype=dtype), affine(width)
    out, stats = run(x, *weights)
    for row in (0, 31, 40):
        alone, its = run(x[row : row + 1], *weights)
        assert same_bits(alone, out[row : row + 1])
        assert same_bits(its, stats[:, row : row + 1])


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [48, 200])
def test_no_row_sees_another(width: int, dtype: torch.dtype, poison: float) -> None:
    x, weights = normal(41, width, dtype=dtype), affine(width)
    out, stats = run(x, *weights)
    x[17] = poison
    x[18, width - 1] = poison
    changed, its = run(x, *weights)
    keep = torch.ones(41, dtype=torch.bool)
    keep[17:19] = False
    assert same_bits(changed[keep], out[keep])
    assert same_bits(its[:, keep], stats[:, keep])
    if poison != poison:
        assert changed[~keep].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [48, 200])
def test_gathered_rows_are_those_rows(width: int, dtype: torch.dtype) -> None:
    """Repeated ones, the last one, in any order; the others are full of NaN."""
    x, weights = normal(41, width, dtype=dtype), affine(width)
    out, stats = run(x, *weights)
    rows = torch.tensor([40, 3, 3, 0, 40, 12, 7, 3, 9], dtype=torch.int32)
    unused = torch.ones(41, dtype=torch.bool)
    unused[rows.long()] = False
    x[unused] = float("nan")
    picked, its = run(x, *weights, rows)
    assert same_bits(picked, out[rows.long()])
    assert same_bits(its, stats[:, rows.long()])


def test_rows_that_x_does_not_have_come_out_as_nan() -> None:
    x, weights = normal(5, 48), affine(48)
    out, _ = run(x, *weights)
    rows = torch.tensor([4, -1, 5, 2**31 - 1, -(2**31), 0], dtype=torch.int32)
    picked, stats = run(x, *weights, rows)
    assert same_bits(picked[[0, 5]], out[[4, 0]])
    assert picked[1:5].isnan().all()
    assert stats[:, 1:5].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_over_its_own_input(dtype: torch.dtype) -> None:
    x, weights = normal(41, 200, dtype=dtype), affine(200)
    out, _ = run(x, *weights)
    LAYERNORM.launch(x, x, *weights, eps=EPS)
    assert same_bits(x, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(dtype: torch.dtype) -> None:
    none = torch.empty(0, dtype=torch.int32)
    for x, rows in ((normal(0, 48, dtype=dtype), None), (normal(3, 48, dtype=dtype), none)):
        out, stats = run(x, *affine(48), rows)
        assert (len(out), stats.shape) == (0, (2, 0))


def test_rows_past_two_to_the_31_elements() -> None:
    """Untouched memory costs nothing: two rows of it are written."""
    width, weights = 64, affine(64)
    count = 2**31 // width + 3
    x = torch.empty(count, width, dtype=torch.float16)
    last, two = normal(2, width, dtype=torch.float16), [count - 1, count - 3]
    x[two] = last
    out = Guarded(2, width, dtype=torch.float16)
    LAYERNORM.launch(out.out, x, *weights, torch.tensor(two, dtype=torch.int32), eps=EPS)
    assert same_bits(out.done(), run(last, *weights)[0])


def test_what_it_refuses() -> None:
    x, gamma, beta = normal(6, 48, dtype=torch.float16), *affine(48)
    rows, long = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    out, stats = torch.empty_like(x), torch.empty(2, 6)
    wide = normal(2, 8193)
    wrong = {
        "x: got shape": (wide, wide, normal(8193), normal(8193)),
        "x: got torch.float64": (out, x.double(), gamma, beta),
        "x: got strides": (out[:, :24], x[:, :24], gamma[:24], beta[:24]),
        "out: got shape": (out[1:], x, gamma, beta),
        "out: got torch.float32": (out.float(), x, gamma, beta),
        "gamma: got torch.float16": (out, x, gamma.half(), beta),
        "beta: got shape": (out, x, gamma, beta[1:]),
        "gamma: got a tensor on meta": (out, x, gamma.to("meta"), beta),
        "rows: got torch.int64": (out[:2], x, gamma, beta, long),
        "stats: got shape": (out, x, gamma, beta, None, stats[:1]),
        "out: got a tensor over x": (x[:2], x, gamma, beta, rows),
    }
    for message, tensors in wrong.items():
        with pytest.raises(ValueError, match=f"layernorm: {message}"):
            layernorm_calls(TARGETS[0], *tensors, eps=EPS)
