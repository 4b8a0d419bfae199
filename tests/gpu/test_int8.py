"""The int8 operators at the shapes of published models: exact sums, codes, isolation, tiles."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu.cases import INT8_OPS, SHAPES, Case, Work, case_of, different, int8_works
from gpu.common import DEVICE, DRY, same_bits
from gpu.test_kernels import poisoned, rows_of
from helpers import assert_close, assert_codes, reference_numbers
from kernels.int8_cases import codes
from vitrail.plan.plan import Step
from vitrail_kernels import OPERATORS
from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.device.stats import stats_ref

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

HALF = torch.float16
TOWERS = [name for name in SHAPES if "text" not in name and "head" not in name]
TILES = (
    KernelConfig(64, 128, 128, 4, 3),
    KernelConfig(64, 64, 128, 4, 4, ctas=2),
    KernelConfig(64, 128, 64, 4, 4, ctas=2),
    KernelConfig(128, 128, 128, 8, 3),
    KernelConfig(128, 64, 128, 4, 3, ctas=2),
)


def launches(names: list[str]) -> list[Any]:
    return [
        pytest.param(work, launch, id=f"{name} {label}")
        for name in names
        for label, work, launch in different(list(int8_works(SHAPES[name])))
        if launch.op in INT8_OPS
    ]


def test_all_int8_operators_are_met() -> None:
    assert {launch.values[1].op for launch in launches(TOWERS)} == {*INT8_OPS}


@pytest.mark.parametrize(("work", "launch"), launches(TOWERS))
def test_an_int8_kernel_is_its_reference(work: Work, launch: Step) -> None:
    """Codes by the rule for codes, scales to fp32's rounding, values by the rule for kernels."""
    case = case_of(work, launch, HALF)
    ours = case.run()
    with reference_numbers():
        expected = case.reference()
    if "out_scale" in ours:
        assert_codes(ours["out"], expected["out"])
        torch.testing.assert_close(ours["out_scale"], expected["out_scale"], rtol=1e-3, atol=0)
        return
    # the reference's arithmetic is fp32, whatever it writes
    outputs = {"out": (case.outputs["out"][0], torch.float32)}
    with reference_numbers():
        exact = dataclasses.replace(case, outputs=outputs).reference()["out"]
    assert_close(ours["out"], exact, expected["out"], name=case.op)
    if "stats" in ours:
        sums = torch.empty_like(ours["stats"], dtype=torch.float64)
        stats_ref(sums, ours["out"].double())
        assert_close(ours["stats"], sums, name="statistics")


@pytest.mark.parametrize("k", [768, 4096] if DRY else [768, 4096, 16_384])
def test_sums_of_the_largest_codes_are_exact(k: int) -> None:
    m, n = (6, 8) if DRY else (300, 264)
    x, weight = codes(m, k), codes(n, k)
    x[0], x[1], x[2], weight[0], weight[1] = 127, -128, 127, 127, -128
    x[2, ::2] = -128
    ones = torch.ones(m), torch.ones(n), torch.zeros(n)
    out = torch.empty(m, n, device=DEVICE)
    x_scale, weight_scale, bias = (t.to(DEVICE) for t in ones)
    operands = x.to(DEVICE), x_scale, weight.to(DEVICE), weight_scale, bias
    OPERATORS["linear_int8"].launch(out, *operands)
    exact = x.double() @ weight.double().t()
    assert torch.equal(out.cpu(), exact.float())


@pytest.mark.parametrize(("work", "launch"), launches(["CLIP H/14" if DRY else "ViT-B/16"]))
def test_an_item_that_is_nan_marks_itself_and_no_other(work: Work, launch: Step) -> None:
    case = case_of(work, launch, HALF)
    count = len(case.lengths)
    items = sorted({1, count - 1})
    others = [item for item in range(count) if item not in items]
    clean, dirty = case.run(), case.run(poisoned(case, items, float("nan")))
    for name in case.outputs:
        rows, dimension = case.rows[name]
        kept, marked = rows_of(case, rows, others), rows_of(case, rows, items)
        a, b = (result[name].index_select(dimension, kept) for result in (clean, dirty))
        assert same_bits(a, b), f"{name}: {int((a != b).sum())} numbers of other items changed"
        values = dirty[name].index_select(dimension, marked)
        assert (name == "out" and values.dtype == torch.int8) or values.isnan().all(), name


@pytest.mark.parametrize(("work", "launch"), launches(["CLIP H/14" if DRY else "ViT-B/16"]))
def test_every_tile_gives_the_same_bits(
    work: Work, launch: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    if launch.op == "norm_quant":
        pytest.skip("its tile does not depend on the number of rows")
    case: Case = case_of(work, launch, HALF)
    results: list[dict[str, Tensor]] = []
    for config in TILES:
        chooser = f"vitrail_kernels.ops.{launch.op}.linear_int8_config"
        monkeypatch.setattr(chooser, lambda *_, c=config: c)
        results.append(case.run())
    for config, result in zip(TILES, results, strict=True):
        for name, values in result.items():
            assert same_bits(values, results[0][name]), f"{name}: {config} gives other bits"
