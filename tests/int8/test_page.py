"""The tables of docs/int8.md are those of the estimate and of the committed record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from int8.test_estimate import VIT_B16, vit
from vitrail.int8.estimate import BATCHES, estimate
from vitrail.spec import VisionSpec

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/int8.md").read_text()
RECORD = json.loads((ROOT / "benchmarks/results/cpu/similarity.json").read_text())["results"]

ESTIMATED = {
    "ViT-B/16, 224 pixels": VIT_B16,
    "CLIP L/14, 224 pixels": vit(1024, 14, layers=24),
    "CLIP H/14, 224 pixels": vit(1280, 14, layers=32),
    "CLIP B/32, 224 pixels": vit(768, 32),
    "ViT-S/16, 224 pixels": vit(384, 16),
    "DINOv2-S, 518 pixels": vit(384, 14, 518),
    "DINOv2-B, 518 pixels": vit(768, 14, 518),
    "DINOv2-L, 518 pixels": vit(1024, 14, 518, layers=24),
}
MEASURED = {
    "DINOv2-small, 128 photographs": "photographs",
    "DINOv2-small, 1,797 handwritten digits": "handwritten digits",
    "DINOv2-small, 300 textiles that look alike": "alike textiles",
}


@pytest.mark.parametrize(("name", "spec"), ESTIMATED.items(), ids=ESTIMATED)
def test_estimates(name: str, spec: VisionSpec) -> None:
    rows = [estimate(spec, batch, linears=spec.blocks.int8_candidates) for batch in BATCHES]
    cells = " | ".join(f"{row.speedup:.2f}x" for row in rows)
    assert f"\n| {name} | {cells} |\n" in PAGE


@pytest.mark.parametrize(("row", "key"), MEASURED.items(), ids=MEASURED)
def test_similarities(row: str, key: str) -> None:
    x = RECORD[key]["figures"]
    cells = (
        f"{x['cosine_mean']:.5f}, {x['cosine_worst']:.5f}",
        f"{x['centered_mean']:.5f}, {x['centered_p1']:.5f}",
        f"{x['top10'] * 100:.1f} %",
        f"{x['sqnr']:.1f} dB",
    )
    assert f"\n| {row} | {' | '.join(cells)} |\n" in PAGE
    for distances, mean in (("plain", "cosine_mean"), ("centered", "centered_mean")):
        assert len(RECORD[key][distances]) == x["pictures"]
        assert 1 - np.mean(RECORD[key][distances]) == pytest.approx(x[mean], abs=1e-5)
