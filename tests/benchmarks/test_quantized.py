"""The suite that compares int8 with fp16, rehearsed on a CPU with the references."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail.spec import BlockSpec, VisionSpec

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
harness, quantized, report = map(importlib.import_module, ("harness", "quantized", "report"))

BUILDS = {
    "qkv": lambda: quantized.product_case("cpu", 40, 256, 64),
    "up": lambda: quantized.product_case("cpu", 40, 256, 64, "gelu", True),
    "down": lambda: quantized.down_case("cpu", 40, 64, 256, True),
}


@pytest.mark.parametrize("name", BUILDS)
def test_products_are_right_and_compared_with_fp16(name: str) -> None:
    results = harness.measure(BUILDS[name](), rounds=1, ceilings={"tflops": 0.1, "gbs": 10.0})
    assert not harness.faults(results), results
    assert results["ratios"].keys() == {"float16"}
    assert all("gbs" in variant for variant in results["variants"].values()), results
    ours = [variant for variant in results["variants"] if variant.startswith("vitrail ")]
    assert len(ours) == 2, ours


@pytest.mark.parametrize("name", BUILDS)
def test_a_product_that_is_wrong_is_found(name: str) -> None:
    case = BUILDS[name]()
    run = case.variants["vitrail product" if name != "down" else "vitrail"]

    def ours() -> Any:
        tensors = run()
        tensors["out"][3] = 3 - tensors["out"][3]
        return tensors

    variants = {**case.variants, "vitrail": ours}
    results = harness.measure(dataclasses.replace(case, variants=variants), rounds=1)
    assert "wrong" in results["variants"]["vitrail"], results
    assert "ratios" not in results


def test_a_tower_in_int8_runs_beside_its_fp16() -> None:
    blocks = BlockSpec(64, 2, 2, 256, "gelu", 1e-6)
    case = quantized.tower_case("cpu", VisionSpec(blocks, (32, 32), (16, 16)), 3)
    int8, float16 = (case.variants[name]() for name in ("vitrail", "float16"))
    assert int8.isfinite().all()
    assert not torch.equal(int8, float16)
    results = harness.measure(case, rounds=1)
    assert not harness.faults(results), results
    assert results["ratios"].keys() == {"float16"}
    with pytest.raises(AssertionError, match="not finite"):
        case.check("vitrail", int8 * torch.nan)


def test_every_named_product_can_be_built() -> None:
    cases = quantized.cases("meta")
    assert next(iter(cases)) == "B/16 x 256 down", "the price of groups is measured first"
    for name, build in cases.items():
        if not name.endswith("tower"):
            assert build().bytes["vitrail"] > 0, name


def test_the_report_has_a_line_a_case() -> None:
    results = {"B/16 x 64 down": harness.measure(BUILDS["down"](), rounds=1)}
    (_, line) = report.LINES["int8"](results)
    assert line.startswith("B/16 x 64 down")
    assert "float16" in line
    assert "groups of 256" in line
