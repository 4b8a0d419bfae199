"""The kernels of `linear` in Triton's interpreter, against formulas in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import assert_close
from interpreted.guard import at_page_end
from kernels.test_operators import (
    GUARD,
    LINEARS,
    POISONS,
    Guarded,
    _default_gate,
    bits,
    explicit_linear,
    linear_case,
    normal,
    plain_linear,
    same_bits,
)
from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.device.stats import mean_rstd_ref, stats_ref, stats_shape
from vitrail_kernels.launch import Target, launch
from vitrail_kernels.ops.linear import LINEAR, linear_calls

pytestmark = pytest.mark.interpreted

TARGETS = {"tma": Target(90, 3), "pointers": Target(80, 3)}
HALF = torch.float16


def run(
    target: Target, operands: list[Tensor | None], alias: bool = False, **scalars: Any
) -> tuple[Tensor, Tensor]:
    """The kernel's output and its row statistics, which stay NaN where it is gated.

    Every input ends at an unreadable page.
    """
    arguments = [None if t is None else at_page_end(t) for t in operands]
    x, weight, _, _, residual, rows, residual_rows = arguments
    assert x is not None
    assert weight is not None
    m = next((len(r) for r in (rows, residual_rows) if r is not None), x.shape[0])
    n = weight.shape[0] // (2 if scalars.get("gated") else 1)
    guarded = Guarded(m, n, dtype=x.dtype)
    if alias:
        assert residual is not None
        guarded.out.copy_(residual)
        arguments[4] = guarded.out
    x_stats = row_sums = None
    if scalars.get("norm_eps") is not None:
        x_stats = at_page_end(torch.empty(stats_shape(*x.shape)))
        stats_ref(x_stats, x)
        row_sums = at_page_end(weight.float().sum(1))
    stats = torch.full(stats_shape(m, n), torch.nan)
    expected = None if scalars.get("gated") else stats
    launch(linear_calls(target, guarded.out, *arguments, x_stats, row_sums, expected, **scalars))
    return guarded.done(), stats


def check(target: Target, m: int, n: int, k: int, dtype: torch.dtype, **has: Any) -> None:
    operands, scalars, alias = linear_case(m, n, k, dtype, **has)
    formula = {**scalars, **_default_gate(scalars)}
    ours, stats = run(target, operands, alias, **scalars)
    peer = plain_linear(*operands, **formula) if dtype == HALF else None
    assert_close(ours, explicit_linear(*operands, **formula), peer, name="linear")
    if scalars["gated"]:
        return
    expected = torch.empty_like(stats, dtype=torch.float64)
    stats_ref(expected, ours.double())
    assert_close(stats, expected, name="statistics")


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("has", LINEARS.values(), ids=LINEARS)
def test_each_combination(has: dict[str, Any], target: Target) -> None:
    check(target, 70, 136, 72, HALF, **has)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 64, 64), (63, 65, 8), (65, 48, 200), (197, 192, 64), (129, 520, 40)]
)
def test_sizes_beside_the_tiles(m: int, n: int, k: int, target: Target) -> None:
    check(target, m, n, k, HALF, norm=True, activation="gelu")
    check(target, m, n, k, HALF, residual=True, alias=True, scale=True)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_rows_that_tensor_maps_cannot_describe(target: Target) -> None:
    check(target, 33, 70, 36, HALF, norm=True)
    check(target, 33, 3, 37, HALF)


@pytest.mark.interpreter_only("fp32 has a configuration for the interpreter alone")
def test_fp32() -> None:
    for target in TARGETS.values():
        check(target, 70, 130, 72, torch.float32, norm=True, activation="gelu")
        check(target, 70, 130, 72, torch.float32, residual=True, scale=True)


@pytest.mark.usefixtures("ordered_dot")
def test_every_tile_and_both_ways_of_loading_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operands, scalars, _ = linear_case(130, 200, 72, HALF, norm=True, activation="gelu")
    results = []
    for tile in ((64, 64, 64), (64, 128, 64), (128, 128, 64), (128, 256, 64)):
        config = KernelConfig(*tile, 4, 3)
        monkeypatch.setattr("vitrail_kernels.ops.linear.linear_config", lambda *_, c=config: c)
        results += [run(target, operands, **scalars) for target in TARGETS.values()]
    for y, stats in results[1:]:
        assert same_bits(y, results[0][0])
        assert same_bits(stats, results[0][1])
    reference, peer = explicit_linear(*operands, **scalars), plain_linear(*operands, **scalars)
    assert_close(results[0][0], reference, peer, name="linear")


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_row_changes_no_other(poison: float, target: Target) -> None:
    operands, scalars, _ = linear_case(
        130, 72, 64, HALF, norm=True, residual=True, activation="gelu"
    )
    clean, clean_stats = run(target, operands, **scalars)
    for tensor in (operands[0], operands[4]):
        assert tensor is not None
        tensor[[0, 64, 129]] = poison
    dirty, dirty_stats = run(target, operands, **scalars)
    other_rows = [row for row in range(130) if row not in (0, 64, 129)]
    assert same_bits(clean[other_rows], dirty[other_rows])
    assert same_bits(clean_stats[:, other_rows], dirty_stats[:, other_rows])
    if poison != poison:
        assert dirty[[0, 64, 129]].isnan().all()


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_row_alone_has_the_bits_it_has_among_others(target: Target) -> None:
    operands, scalars, _ = linear_case(130, 136, 72, HALF, norm=True, activation="quick_gelu")
    every, _ = run(target, operands, **scalars)
    for row in (0, 64, 129):
        x, *rest = operands
        assert x is not None
        alone, _ = run(target, [x[row : row + 1], *rest], **scalars)
        assert same_bits(alone, every[row : row + 1])


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_layernorm_holds_where_the_mean_is_large(target: Target) -> None:
    """Mean 20 times the deviation, channels 300 times the rest: no worse than LayerNorm first."""
    operands, scalars, _ = linear_case(64, 72, 192, HALF, norm=True)
    x = operands[0]
    assert x is not None
    operands[0] = (x.float() + 20).half()
    operands[0][:, 5] *= 15
    ours, _ = run(target, operands, **scalars)
    reference, peer = explicit_linear(*operands, **scalars), plain_linear(*operands, **scalars)
    assert_close(ours, reference, peer, name="linear")


def test_statistics_hold_where_the_mean_is_a_thousand_deviations() -> None:
    x = (normal(64, 200).double() * 0.5 + 500).float()
    stats = torch.empty(stats_shape(64, 200))
    stats_ref(stats, x)
    mean, rstd = mean_rstd_ref(stats, 200, 1e-6)
    assert_close(mean, x.double().mean(1), name="mean")
    expected = (x.double().var(1, correction=0) + 1e-6).rsqrt()
    assert_close(rstd, expected, name="1 / deviation")


def test_no_rows_launch_nothing() -> None:
    operands, scalars, _ = linear_case(0, 64, 64, HALF)
    for target in TARGETS.values():
        assert linear_calls(target, torch.empty(0, 64, dtype=HALF), *operands, **scalars) == []


def test_the_launcher_is_the_reference_by_other_means() -> None:
    operands, scalars, _ = linear_case(5, 64, 64, HALF)
    out = torch.full((5 + 2 * GUARD, 64), torch.nan, dtype=HALF)
    before = bits(out).clone()
    LINEAR.launch(out[GUARD:-GUARD], *operands, **scalars)
    assert_close(
        out[GUARD:-GUARD], explicit_linear(*operands), plain_linear(*operands), name="linear"
    )
    assert torch.equal(bits(out)[:GUARD], before[:GUARD])


def _bad(**changes: Any) -> dict[str, Any]:
    x, w = normal(4, 64, dtype=HALF), normal(64, 64, dtype=HALF)
    return {"out": torch.empty(4, 64, dtype=HALF), "x": x, "weight": w} | changes


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (_bad(weight=normal(64, 64)), "weight: got torch.float32"),
        (_bad(weight=normal(64, 32, dtype=HALF)), r"x: got shape \(4, 64\), wanted \(4, 32\)"),
        (_bad(x=normal(64, 4, dtype=HALF).t()), "x: got strides"),
        (_bad(out=torch.empty(5, 64, dtype=HALF)), "out: got shape"),
        (_bad(bias=normal(64, dtype=HALF)), "bias: got torch.float16"),
        (_bad(norm_eps=1e-5), "norm_eps without x_stats"),
        (_bad(activation="swish"), "activation: got 'swish'"),
        (_bad(rows=torch.zeros(4)), "rows: got torch.float32"),
        (_bad(gated=True, scale=normal(64)), "gated"),
        (_bad(x=torch.empty(4, 64, dtype=HALF, device="meta")), "weight: got a tensor on cpu"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        linear_calls(Target(90, 3), **given)
