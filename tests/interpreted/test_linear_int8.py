"""The kernels of linear_int8 in Triton's interpreter, against the reference and exact integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import assert_close, assert_codes
from interpreted.guard import at_page_end
from kernels.int8_cases import codes, exact_linear_int8, int8_case
from kernels.test_operators import Guarded, normal, same_bits
from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.launch import Target, launch
from vitrail_kernels.ops.linear_int8 import group_columns, linear_int8_calls, linear_int8_ref

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # NumPy, of NaN
]

TARGETS = {"tma": Target(90, 3), "pointers": Target(80, 3)}
HALF = torch.float16
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "quick_gelu": {"activation": "quick_gelu"},
    "relu": {"activation": "relu"},
    "silu": {"activation": "silu"},
    "gated": {"activation": "silu", "gated": True},
    "gated by default": {"gated": True},
    "gated gelu": {"activation": "gelu", "gated": True},
}


def run(
    target: Target, operands: list[Tensor], dtype: torch.dtype, **scalars: Any
) -> tuple[Tensor, Tensor | None]:
    """The output, and its scales if it is int8. Every input ends at an unreadable page."""
    arguments = [at_page_end(t) for t in operands]
    m, n = len(arguments[0]), len(arguments[2])
    gated = scalars.get("gated", False)
    width = n // 2 if gated else n
    out, scale = Guarded(m, width, dtype=dtype), None
    if dtype == torch.int8:
        scale = Guarded(width // group_columns(gated), m, dtype=torch.float32)
    out_scale = None if scale is None else scale.out
    launch(linear_int8_calls(target, out.out, *arguments, out_scale, **scalars))
    return out.done(), None if scale is None else scale.done()


def check(
    target: Target, operands: list[Tensor], dtype: torch.dtype, **scalars: Any
) -> tuple[Tensor, Tensor | None]:
    """Against the formula in fp64; codes and scales against the reference."""
    ours, scale = run(target, operands, dtype, **scalars)
    expected = torch.empty_like(ours)
    expected_scale = None if scale is None else torch.empty_like(scale)
    linear_int8_ref(expected, *operands, expected_scale, **scalars)
    if scale is None:
        exact = exact_linear_int8(*operands, **scalars)
        peer = None if dtype == torch.float32 else expected
        assert_close(ours, exact, peer, name="linear_int8")
    else:
        assert_codes(ours, expected)
        torch.testing.assert_close(scale, expected_scale, rtol=1e-3, atol=0)
    return ours, scale


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("scalars", FORMS.values(), ids=FORMS)
def test_each_activation(scalars: dict[str, Any], target: Target) -> None:
    check(target, int8_case(70, 256, 80), torch.int8, **scalars)
    check(target, int8_case(70, 136, 80), HALF, **scalars)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 64, 64), (63, 66, 16), (65, 48, 200), (129, 528, 48), (33, 70, 37)]
)
def test_sizes_beside_the_tiles(m: int, n: int, k: int, target: Target) -> None:
    """Also rows that tensor maps cannot describe."""
    check(target, int8_case(m, n, k), HALF, activation="gelu")
    check(target, int8_case(m, 128, k), torch.int8, activation="gelu")


@pytest.mark.interpreter_only("fp32 is for the interpreter alone")
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_fp32(target: Target) -> None:
    check(target, int8_case(70, 130, 80), torch.float32, activation="gelu")


def int_sums(target: Target, x: Tensor, weight: Tensor) -> Tensor:
    """The kernel's sums of products: in fp32, with scales of 1 and no bias."""
    ones = torch.ones(len(x)), torch.ones(len(weight)), torch.zeros(len(weight))
    out, _ = run(target, [x, ones[0], weight, *ones[1:]], torch.float32)
    return out


@pytest.mark.interpreter_only("fp32 is for the interpreter alone")
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("k", [1024, 16384])
def test_sums_of_extreme_codes_are_exact(k: int, target: Target) -> None:
    """Rows of 127 and -128, alone and in turns, and random rows; fp32 rounds sums above 2^24."""
    x, weight = codes(6, k), codes(5, k)
    x[0], x[1], x[2], weight[0], weight[1] = 127, -128, 127, 127, -128
    x[2, ::2] = -128
    weight[2, 1::2] = -128
    sums = int_sums(target, x, weight)
    assert torch.equal(sums, (x.long() @ weight.long().t()).float())
    assert sums[1, 1] == 128 * 128 * k


@pytest.mark.parametrize(
    ("has", "dtype"),
    [
        ("gelu", torch.int8),
        ("gated", HALF),
        *(
            pytest.param(has, dtype, marks=pytest.mark.slow)
            for has, dtype in (("gelu", HALF), ("gated", torch.int8), ("plain", torch.int8))
        ),
    ],
)
def test_every_tile_and_both_ways_of_loading_give_the_same_bits(
    has: str, dtype: torch.dtype
) -> None:
    operands, scalars = int8_case(130, 256, 80), FORMS[has]
    tiles = [(64, 128, 64), (128, 128, 64), (32, 128, 32), (64, 128, 128)]
    if dtype == HALF:
        tiles += [(64, 64, 64), (128, 256, 64)]
    results = []
    for tile in tiles:
        scalars = scalars | {"config": KernelConfig(*tile, 4, 3)}
        results += [run(target, operands, dtype, **scalars) for target in TARGETS.values()]
    for out, scale in results[1:]:
        assert same_bits(out, results[0][0])
        if dtype == torch.int8:
            assert scale is not None
            assert results[0][1] is not None
            assert same_bits(scale, results[0][1])


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("dtype", [HALF, torch.int8], ids=str)
@pytest.mark.parametrize("has", ["gelu", "gated"])
def test_a_row_that_is_not_finite_marks_itself_and_no_other(
    has: str, dtype: torch.dtype, target: Target
) -> None:
    operands = int8_case(130, 256, 64)
    clean, clean_scale = run(target, operands, dtype, **FORMS[has])
    bad = [0, 64, 129]
    good = [row for row in range(130) if row not in bad]
    operands[1][bad] = torch.tensor([torch.nan, torch.inf, torch.nan])
    dirty, dirty_scale = run(target, operands, dtype, **FORMS[has])
    assert same_bits(clean[good], dirty[good])
    if dtype == HALF:
        assert not dirty[bad].isfinite().any()
        return
    assert clean_scale is not None
    assert dirty_scale is not None
    assert same_bits(clean_scale[:, good], dirty_scale[:, good])
    assert dirty_scale[:, bad].isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e6], ids=str)
@pytest.mark.parametrize("has", ["gelu", "gated", "relu", "plain"])
def test_a_column_that_is_not_finite_marks_its_group_in_every_row(has: str, value: float) -> None:
    """1e6 overflows fp16, in which a group is rounded first."""
    operands = int8_case(70, 512, 64)
    operands[4][300] = value
    if has == "gated":  # the gate of an activation that is not 0
        operands[4][301] = 1.0
    _, scale = run(TARGETS["tma"], operands, torch.int8, **FORMS[has])
    assert scale is not None
    becomes_zero = value == -torch.inf and has == "relu"
    assert scale[2].isnan().all() == (not becomes_zero)
    assert scale[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("dtype", [HALF, torch.int8], ids=str)
def test_an_item_has_the_same_bits_alone_and_in_batches(dtype: torch.dtype, target: Target) -> None:
    x, x_scale, *rest = int8_case(33 * 5, 256, 64)
    every, every_scale = run(target, [x, x_scale, *rest], dtype, activation="quick_gelu")
    for items in (1, 2, 3, 16):
        rows = slice(5, 5 + 5 * items)
        some, some_scale = run(
            target, [x[rows], x_scale[rows], *rest], dtype, activation="quick_gelu"
        )
        assert same_bits(some, every[rows])
        if dtype == torch.int8:
            assert some_scale is not None
            assert every_scale is not None
            assert same_bits(some_scale, every_scale[:, rows])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "relu"])
def test_the_least_values_of_an_activation_have_codes(activation: str) -> None:
    """Around the activation's minimum, of every value that is near it: the offset covers them."""
    operands = int8_case(64, 128, 32)
    operands[0].zero_()
    operands[4].copy_(torch.linspace(-0.8, -0.6, 128) * (2.2 if activation == "quick_gelu" else 1))
    ours, scale = check(TARGETS["tma"], operands, torch.int8, activation=activation)
    assert scale is not None
    values = (ours[0].double() + 128) * scale[0, 0].double() - 0.17
    exact = exact_linear_int8(*operands, activation=activation)
    torch.testing.assert_close(values, exact[0], rtol=0, atol=float(scale[0, 0]) * 0.51 + 1e-4)


def test_no_rows_launch_nothing() -> None:
    operands = int8_case(0, 128, 64)
    for target in TARGETS.values():
        out, scale = torch.empty(0, 128, dtype=torch.int8), torch.empty(1, 0)
        assert linear_int8_calls(target, out, *operands, scale) == []


def _bad(**changes: Any) -> dict[str, Any]:
    names = ("x", "x_scale", "weight", "weight_scale", "bias")
    arguments = dict(zip(names, int8_case(4, 128, 64), strict=True))
    out = {"out": torch.empty(4, 128, dtype=torch.int8), "out_scale": torch.empty(1, 4)}
    return out | arguments | changes


HALVES = {"out": torch.empty(4, 128, dtype=HALF), "out_scale": None}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (_bad(weight=normal(128, 64)), "weight: got torch.float32"),
        (_bad(x=codes(4, 32)), r"x, weight: got shapes \(\(4, 32\), \(128, 64\)\)"),
        (_bad(x=codes(64, 4).t()), "x: got strides"),
        (_bad(x=codes(4, 64)[0]), "x, weight: got shapes"),
        (_bad(x=torch.empty(4, 131_072, dtype=torch.int8), weight=codes(128, 131_072)), "131071"),
        (_bad(out=torch.empty(5, 128, dtype=torch.int8)), "out: got shape"),
        (_bad(out=torch.empty(4, 128, dtype=HALF)), "out: got torch.float16"),
        (_bad(out_scale=None), "out: got torch.int8 without out_scale"),
        (_bad(out_scale=torch.empty(4, 1)), r"out_scale: got shape \(4, 1\), wanted \(1, 4\)"),
        (_bad(bias=normal(128, dtype=HALF)), "bias: got torch.float16"),
        (_bad(x_scale=normal(5)), "x_scale: got shape"),
        (_bad(weight_scale=normal(127)), "weight_scale: got shape"),
        (_bad(activation="swish"), "activation: got 'swish'"),
        (_bad(weight=codes(130, 64)), "got 130 columns, wanted groups of 128"),
        (_bad(weight=codes(192, 64), gated=True), "got 96 columns, wanted groups of 64"),
        (_bad(weight=codes(127, 64), gated=True, **HALVES), "gated: got 127 rows"),
        (_bad(x=torch.empty(4, 64, dtype=torch.int8, device="meta")), "a tensor on cpu"),
    ],
)
def test_arguments_that_the_kernel_does_not_take_are_refused(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear_int8_calls(Target(90, 3), **changed)
