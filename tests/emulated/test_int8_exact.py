"""Compiled int8 kernels beside exact integers: sums for the largest codes, codes, and outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emulated.int8_cases import BLOCK, FORMS, Case, Tensors, forms, shift_of
from helpers import assert_close, assert_codes
from kernels.int8_cases import exact_grouped, exact_linear_int8
from kernels.test_operators import explicit_norm, same_bits
from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.device.stats import stats_ref
from vitrail_kernels.launch import Target
from vitrail_kernels.ops.linear_int8 import OFFSET, group_columns, is_unsigned

pytestmark = pytest.mark.usefixtures("emulated_kernels")

ARCHES = (80, 90)
DEPTH = 16_384
GROUP = 128


# -- sums ------------------------------------------------------------------------------------------


def extreme(*shape: int) -> Tensor:
    """Codes that are 127 or the smallest that there is."""
    return torch.where(torch.rand(shape) < 0.5, 127, -128).to(torch.int8)


def cancelling(rows: int, columns: int, depth: int, span: int) -> tuple[Tensor, Tensor]:
    """x and weight of the largest codes. The two halves of each ``span`` columns cancel but for a
    few products, so that sums are small, and halves of some sums as large as they can be."""
    half = span // 2
    x = extreme(rows, depth).view(rows, -1, 2, half)
    x[:, :, 1] = x[:, :, 0]
    weight = extreme(columns, depth).clamp(min=-127).view(columns, -1, 2, half)
    signs = torch.where(weight[:rows] > 0, 127, -128).to(torch.int8)  # row i goes with column i
    x[: len(signs), :, 0] = x[: len(signs), :, 1] = signs[:, :, 0]
    weight[:, :, 1] = -weight[:, :, 0]
    x = x.reshape(rows, depth)
    for row in range(rows):
        for k in torch.randint(depth, (7,)).tolist():
            x[row, k] -= torch.sign(x[row, k])
    return x, weight.reshape(columns, depth)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def of_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Case:
    """x W^T + b, where every scale is 1."""
    rows, columns = len(x), len(weight)
    inputs = {"x": x, "x_scale": ones(rows), "weight": weight}
    inputs |= {"weight_scale": ones(columns), "bias": bias}
    return Case("linear_int8", inputs, {"out": torch.empty(rows, columns).half()})


def of_grouped(x: Tensor, weight: Tensor, bias: Tensor) -> Case:
    """As `of_linear`; the codes of ``x`` stand for numbers 128 larger."""
    rows, columns = len(x), len(weight)
    inputs = {"x": x, "x_scale": ones(x.shape[1] // GROUP, rows), "weight": weight}
    inputs |= {"weight_scale": ones(columns), "shift": shift_of(weight, GROUP, True), "bias": bias}
    out = torch.empty(rows, columns).half()
    return Case("linear_int8_grouped", inputs, {"out": out}, {"group": GROUP})


def sums_of_linear(x: Tensor, weight: Tensor) -> Tensor:
    """In fp32, of exact sums."""
    return (x.long() @ weight.long().t()).float()


def sums_of_grouped(x: Tensor, weight: Tensor) -> Tensor:
    """Sums in fp32, in their order, of the exact sums of groups."""
    total = torch.zeros(len(x), len(weight))
    groups = zip(x.long().split(GROUP, 1), weight.long().split(GROUP, 1), strict=True)
    for codes, rows in groups:
        total += ((codes + 128) @ rows.t()).float()
    return total


OPERATORS = {
    "linear_int8": (of_linear, sums_of_linear, DEPTH),
    "linear_int8_grouped": (of_grouped, sums_of_grouped, GROUP),
}


def configs(case: Case, arch: int) -> list[KernelConfig]:
    """Each configuration of the launch's ladder, once."""
    (call,) = case.calls(Target(arch, 3))[1]
    assert call.ladder is not None, f"{case.op}: no ladder"
    return sorted({config for _, config in call.ladder()}, key=repr)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("op", OPERATORS)
def test_small_sums_of_large_products_are_exact(op: str, arch: int) -> None:
    make, sums, span = OPERATORS[op]
    x, weight = cancelling(20, 72, DEPTH, span)
    expected = sums(x, weight)
    assert 200 < expected.abs().max() <= 2048, "fp16 holds these numbers exactly"
    half = x.long()[:, : span // 2] @ weight.long()[:, : span // 2].t()
    assert half.abs().max() > 127 * 127 * span // 2
    ours = make(x, weight, torch.zeros(72)).run(arch)["out"]
    assert torch.equal(ours.float(), expected)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("op", OPERATORS)
def test_the_largest_sums_are_exact(op: str, arch: int) -> None:
    """Less the sum that is expected, in fp32: nothing remains. Every row is the same, as a bias is
    of a column."""
    make, sums, _ = OPERATORS[op]
    weight = extreme(72, DEPTH).clamp(min=-127)
    weight[0], weight[1] = 127, -127
    for code in (127, -128, 0):
        x = extreme(1, DEPTH) if code == 0 else torch.full((1, DEPTH), code, dtype=torch.int8)
        x = x.repeat(20, 1)
        expected = sums(x[:1], weight)[0]
        ours = make(x, weight, -expected).run(arch)["out"]
        assert not ours.any(), code
        step = torch.where(expected == 0, 1.0, expected.abs()).log2().floor().sub(23).exp2()
        apart = make(x, weight, step.clamp(min=1) - expected).run(arch)["out"]
        assert (apart == step.clamp(min=1)).all(), "an error in the last bit would not show"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("op", OPERATORS)
def test_sums_are_exact_in_every_configuration(op: str, arch: int) -> None:
    make, sums, span = OPERATORS[op]
    x, weight = cancelling(150, 200, 2048, min(span, 2048))
    case = make(x, weight, torch.zeros(200))
    expected = sums(x, weight)
    assert expected.abs().max() <= 2048
    for config in configs(case, arch):
        assert torch.equal(case.run(arch, config)["out"].float(), expected), config


# -- codes and outputs -----------------------------------------------------------------------------


def values_of(out: Tensors, activation: str | None, gated: bool) -> Tensor:
    """What codes and scales stand for."""
    scale = out["out_scale"].t().repeat_interleave(group_columns(gated), 1)
    if is_unsigned(activation, gated):
        return (out["out"].float() + 128) * scale - OFFSET
    return out["out"].float() * scale


def check_norm_quant(case: Case, ours: Tensors, theirs: Tensors) -> None:
    assert_codes(ours["out"], theirs["out"])
    assert_close(ours["out_scale"], theirs["out_scale"])
    x = case.inputs["x"].double()
    x = x[case.inputs["rows"].long()] if "rows" in case.inputs else x
    exact = explicit_norm(x, case.scalars["eps"]) * case.inputs["smooth"]
    assert ((exact / ours["out_scale"][:, None] - ours["out"]).abs() < 0.501).all()


def check_linear_int8(case: Case, ours: Tensors, theirs: Tensors) -> None:
    exact = exact_linear_int8(**case.inputs, **case.scalars)
    if "out_scale" not in ours:
        assert_close(ours["out"], exact, exact.half())
        return
    assert_codes(ours["out"], theirs["out"])
    values, peer = (values_of(out, **case.scalars).half() for out in (ours, theirs))
    assert_close(values, exact, peer)


def check_grouped(case: Case, ours: Tensors, theirs: Tensors) -> None:
    exact = exact_grouped(**case.inputs, **case.scalars)
    assert_close(ours["out"], exact, exact.half())
    if "stats" in ours:
        expected = torch.empty_like(ours["stats"])
        stats_ref(expected, ours["out"])
        assert_close(ours["stats"], expected)


CHECKS = {
    "norm_quant": check_norm_quant,
    "linear_int8": check_linear_int8,
    "linear_int8_grouped": check_grouped,
}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", forms())
def test_a_launch_is_its_formula(name: str, arch: int) -> None:
    """In three schedules, of which each gives the same bits."""
    case = FORMS[name](150)
    ours, theirs = case.run(arch, seed=0), case.reference()
    CHECKS[case.op](case, ours, theirs)
    for seed in (1, 2):
        again = case.run(arch, seed=seed)
        assert all(same_bits(again[name], ours[name]) for name in ours), f"seed {seed}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", BLOCK)
def test_every_schedule_gives_the_same_bits(name: str, arch: int) -> None:
    """Four blocks run side by side."""
    case = FORMS[name](150)
    ours = case.run(arch, seed=0)
    for seed in range(20):
        again = case.run(arch, seed=seed, sms=3, resident=4)
        assert all(same_bits(again[name], ours[name]) for name in ours), f"seed {seed}"
