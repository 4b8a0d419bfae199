"""The kernels of linear_int8_grouped in Triton's interpreter, against formulas in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import assert_close
from interpreted.guard import at_page_end
from kernels.int8_cases import codes, exact_grouped, grouped_case
from kernels.test_operators import Guarded, normal, same_bits
from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.device.stats import stats_ref, stats_shape
from vitrail_kernels.launch import Target, launch
from vitrail_kernels.ops.linear_int8_grouped import (
    linear_int8_grouped_calls,
    linear_int8_grouped_ref,
)

pytestmark = pytest.mark.interpreted

TARGETS = {"tma": Target(90, 3), "pointers": Target(80, 3)}
HALF = torch.float16
FORMS: dict[str, dict[str, Any]] = {
    "bare": {},
    "signed": {"unsigned": False},
    "residual": {"residual": True},
    "all": {"scale": True, "residual": True},
    "scale": {"scale": True},
    "residual_rows": {"residual_rows": True},
}


def run(
    target: Target,
    tensors: dict[str, Tensor],
    scalars: dict[str, Any],
    alias: bool = False,
    dtype: torch.dtype = HALF,
) -> tuple[Tensor, Tensor]:
    """The output and its row statistics. Every input ends at an unreadable page."""
    arguments = {name: at_page_end(t) for name, t in tensors.items()}
    m, n = len(tensors["x"]), len(tensors["weight"])
    out = Guarded(m, n, dtype=dtype)
    stats = Guarded(*stats_shape(m, n), dtype=torch.float32)
    if alias:
        out.out.copy_(arguments["residual"])
        arguments["residual"] = out.out
    launch(linear_int8_grouped_calls(target, out.out, stats=stats.out, **arguments, **scalars))
    return out.done(), stats.done()


def check(target: Target, tensors: dict[str, Tensor], scalars: dict[str, Any], **has: Any) -> None:
    ours, stats = run(target, tensors, scalars, **has)
    peer = torch.empty_like(ours)
    linear_int8_grouped_ref(peer, **tensors, **scalars)
    assert_close(ours, exact_grouped(**tensors, **scalars), peer, name="linear_int8_grouped")
    expected = torch.empty_like(stats, dtype=torch.float64)
    stats_ref(expected, ours.double())
    assert_close(stats, expected, name="statistics")


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("has", FORMS.values(), ids=FORMS)
def test_each_combination(has: dict[str, Any], target: Target) -> None:
    check(target, *grouped_case(70, 136, 256, 128, **has))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(
    ("m", "n", "k", "group"),
    [(1, 64, 128, 128), (63, 66, 192, 64), (65, 48, 512, 256), (129, 264, 128, 64)],
)
def test_sizes_beside_the_tiles(m: int, n: int, k: int, group: int, target: Target) -> None:
    check(target, *grouped_case(m, n, k, group, residual=True), alias=True)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("group", [64, 128, 256])
def test_sums_of_extreme_codes_are_exact(group: int, target: Target) -> None:
    """One group at a time: the largest sums there are, of codes that 128 is added to or not."""
    k = 4 * group
    for unsigned in (True, False):
        tensors, scalars = grouped_case(6, 5, k, group, unsigned=False)
        x, weight = tensors["x"], tensors["weight"]
        x[0], x[1], x[2], weight[0], weight[1] = 127, -128, 127, 127, -127
        x[2, ::2] = -128
        weight[2, 1::2] = -127
        sums = weight.view(5, -1, group).double().sum(2).t()
        tensors["shift"] = (12582912.0 - 128.0 * unsigned * sums).float()
        for name in ("weight_scale", "bias"):
            tensors[name].fill_(name == "weight_scale")
        for number in range(4):
            tensors["x_scale"].zero_()[number] = 1.0
            ours, _ = run(target, tensors, scalars, dtype=torch.float32)
            part = slice(number * group, (number + 1) * group)
            values = x[:, part].long() + 128 * unsigned
            assert torch.equal(ours.long(), values @ weight[:, part].long().t())


@pytest.mark.parametrize("has", [pytest.param("bare", marks=pytest.mark.slow), "all"])
def test_every_tile_and_both_ways_of_loading_give_the_same_bits(has: str) -> None:
    tensors, scalars = grouped_case(70, 200, 256, 128, **FORMS[has])
    results = []
    for tile in ((64, 64, 64), (64, 128, 128), (128, 128, 64), (128, 128, 128), (32, 64, 128)):
        forced = scalars | {"config": KernelConfig(*tile, 4, 3)}
        results += [run(target, tensors, forced) for target in TARGETS.values()]
    for y, stats in results[1:]:
        assert same_bits(y, results[0][0])
        assert same_bits(stats, results[0][1])


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_row_that_is_not_finite_marks_itself_and_no_other(target: Target) -> None:
    tensors, scalars = grouped_case(130, 72, 256, 128, residual=True)
    clean, clean_stats = run(target, tensors, scalars)
    bad = [0, 64, 129]
    good = [row for row in range(130) if row not in bad]
    tensors["x_scale"][1, bad] = torch.nan
    dirty, dirty_stats = run(target, tensors, scalars)
    assert same_bits(clean[good], dirty[good])
    assert same_bits(clean_stats[:, good], dirty_stats[:, good])
    assert dirty[bad].isnan().all()
    assert dirty_stats[:, bad].isnan().all()


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_an_item_has_the_same_bits_alone_and_in_batches(target: Target) -> None:
    tensors, scalars = grouped_case(33 * 5, 136, 256, 128, residual=True, scale=True)
    every, every_stats = run(target, tensors, scalars)
    for items in (1, 2, 3, 16):
        rows = slice(5, 5 + 5 * items)
        some = tensors | {name: tensors[name][rows] for name in ("x", "residual")}
        some["x_scale"] = tensors["x_scale"][:, rows].contiguous()
        out, stats = run(target, some, scalars)
        assert same_bits(out, every[rows])
        assert same_bits(stats, every_stats[:, rows])


def test_no_rows_launch_nothing() -> None:
    tensors, scalars = grouped_case(0, 64, 128, 128)
    for target in TARGETS.values():
        out = torch.empty(0, 64, dtype=HALF)
        assert linear_int8_grouped_calls(target, out, **tensors, **scalars) == []


def _bad(**changes: Any) -> dict[str, Any]:
    tensors, scalars = grouped_case(4, 64, 256, 128, residual=True)
    return {"out": torch.empty(4, 64, dtype=HALF)} | tensors | scalars | changes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (_bad(weight=normal(64, 256)), "weight: got torch.float32"),
        (_bad(x=codes(4, 128)), "x, weight: got shapes"),
        (_bad(x=codes(256, 4).t()), "x: got strides"),
        (_bad(group=96), "group: got 96 for 256 columns"),
        (_bad(group=512), "group: got 512 for 256 columns"),
        (_bad(x=codes(4, 192), weight=codes(64, 192)), "group: got 128 for 192 columns"),
        (_bad(x_scale=normal(2, 5)), r"x_scale: got shape \(2, 5\), wanted \(2, 4\)"),
        (_bad(shift=normal(64, 2)), "shift: got shape"),
        (_bad(out=torch.empty(4, 64, dtype=torch.int8)), "out: got torch.int8"),
        (_bad(residual=normal(4, 64)), "residual: got torch.float32"),
        (_bad(residual=normal(3, 64, dtype=HALF)), "residual: got shape"),
        (_bad(residual_rows=torch.zeros(4)), "residual_rows: got torch.float32"),
        (_bad(stats=normal(1, 4)), "stats: got shape"),
        (_bad(scale=normal(63)), "scale: got shape"),
    ],
)
def test_arguments_that_the_kernel_does_not_take_are_refused(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear_int8_grouped_calls(Target(90, 3), **changed)
