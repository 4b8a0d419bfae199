"""The guard's integrity through the Triton runner, in the interpreter: it launches the kernels that
serve a GPU, one by one, and its exact references find a fault in their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import BitImageProcessorPil

import real_pictures
from helpers import make, save
from int8.subject import Subject
from vitrail.int8.calibration import batched
from vitrail.int8.guard import CHANNEL_GAIN, LAYER_GAIN
from vitrail.int8.integrity import check_integrity
from vitrail.int8.measure import Comparison
from vitrail.runtime.triton import TritonRunner

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.interpreter_only("the runner is on the CPU"),
]


@pytest.mark.parametrize("gated", [False, True])
def test_the_triton_runner_is_exact(gated: bool, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    save(make("Dinov2Model", use_swiglu_ffn=gated, mlp_ratio=4, **sizes), tmp_path)
    crop = {"height": 32, "width": 32}
    BitImageProcessorPil(size={"shortest_edge": 36}, crop_size=crop).save_pretrained(tmp_path)
    subject = Subject(tmp_path, real_pictures.photographs(2, seed=3))
    tensors, names = subject.quantize(subject.checked, gptq=False), subject.blocks.int8_candidates
    batches = list(batched(subject.vision, subject.checked))
    tower = subject.tower(tensors, names, runner=TritonRunner)
    measurement = Comparison(subject.reference, batches).measure(tower)
    exact = measurement.integrity
    assert (exact.wrong_sums, exact.bad_scales) == (0, 0)
    assert exact.sums > 10_000
    assert exact.codes > 10_000
    assert exact.code_difference <= 1
    assert exact.differing_codes <= 0.001 * exact.codes
    for figures in measurement.linears.values():
        assert figures.layer_gain < LAYER_GAIN
        assert figures.channel_gain < CHANNEL_GAIN
    broken = subject.tower(
        tensors,
        names,
        lambda weights: weights["vision.blocks.0.down.shift"][0, 3:5].add_(1),
        TritonRunner,
    )
    rows = 17 * len(subject.checked)
    groups = len(broken.runner.weights["vision.blocks.0.down.shift"])
    assert check_integrity(broken, batches[0]).wrong_sums == 2 * -(-min(rows, 32) // groups)
