"""Figures of candidates: each linear is measured alone, on the inputs of the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from int8.subject import CPU, Subject, Tensors
from real_pictures import photographs
from vitrail.int8.calibration import batched
from vitrail.int8.integrity import check_integrity
from vitrail.int8.measure import Comparison
from vitrail.int8.similarity import linear_figures
from vitrail.plan.vision import vision_pooled
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.runtime.towers import VisionTower

CLIP = Path(__file__).parents[2] / "engine/vitrail/assets/clip"


@pytest.fixture(scope="module")
def subject(one_thread: None) -> Subject:
    return Subject(CLIP, photographs(16, 9))


@pytest.fixture(scope="module")
def tensors(subject: Subject) -> Tensors:
    return subject.quantize(subject.checked, gptq=False)


@pytest.fixture(scope="module")
def batches(subject: Subject) -> list[Tensor]:
    return [
        batch[start : start + 8]
        for batch in batched(subject.vision, subject.checked)
        for start in (0, 8)
    ]


def _comparison(subject: Subject, batches: list[Tensor]) -> Comparison:
    return Comparison(subject.reference, batches)


def test_every_int8_linear_has_figures(
    subject: Subject, tensors: Tensors, batches: list[Tensor]
) -> None:
    names = subject.blocks.int8_candidates
    measurement = _comparison(subject, batches).measure(subject.tower(tensors, names))
    assert tuple(measurement.linears) == names
    assert all(30 < figures.sqnr < 60 for figures in measurement.linears.values())
    assert measurement.accuracy.pictures == 16
    assert measurement.accuracy.sqnr > 30


def test_an_error_stays_with_its_linear(
    subject: Subject, tensors: Tensors, batches: list[Tensor]
) -> None:
    names = subject.blocks.int8_candidates
    sound = _comparison(subject, batches).measure(subject.tower(tensors, names))
    tensors = {**tensors, "vision.blocks.0.up.scale": tensors["vision.blocks.0.up.scale"] * 0.5}
    broken = _comparison(subject, batches).measure(subject.tower(tensors, names))
    assert broken.accuracy.sqnr < sound.accuracy.sqnr - 10
    for name in names:
        assert (broken.linears[name] == sound.linears[name]) is (name != "0.up")


def test_figures_are_those_of_the_outputs(
    subject: Subject, tensors: Tensors, batches: list[Tensor]
) -> None:
    """Block 0's qkv, from the weights: its input does not depend on any int8 linear."""
    measurement = _comparison(subject, batches).measure(subject.tower(tensors, ("0.qkv",)))
    weights, qkv = subject.loaded.weights, "vision.blocks.0.qkv"
    streams: list[Tensor] = []

    class _Keeping(TorchRunner):
        def run_step(self, step, arguments, longest):  # type: ignore[no-untyped-def]
            if step.label == qkv:
                streams.append(arguments["x"].clone())
            super().run_step(step, arguments, longest)

    keeping = VisionTower(subject.vision, None, _Keeping(weights, torch.float32, CPU))
    for pixels in batches:
        keeping.embeddings(pixels)
    x = torch.cat(streams).double()
    x = torch.nn.functional.layer_norm(x, x.shape[1:], eps=subject.blocks.eps)
    reference = x @ weights[f"{qkv}.weight"].double().t() + weights[f"{qkv}.bias"].double()
    rows = x * tensors[f"{qkv}.smooth"]
    scale = rows.abs().amax(dim=1, keepdim=True) / 127
    codes = (rows / scale).round()
    weight = tensors[f"{qkv}.codes"].double() * tensors[f"{qkv}.scale"].double()[:, None]
    wanted = linear_figures(codes * scale @ weight.t() + tensors[f"{qkv}.folded_bias"], reference)
    figures = measurement.linears["0.qkv"]
    assert figures.sqnr == pytest.approx(wanted.sqnr, abs=0.02)
    assert figures.layer_gain == pytest.approx(wanted.layer_gain, abs=2e-6)


def test_fewer_linears_are_measured_once(
    subject: Subject, tensors: Tensors, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = _comparison(subject, batches)
    names = subject.blocks.int8_candidates
    first = comparison.measure(subject.tower(tensors, names))
    runs: list[object] = []
    monkeypatch.setattr(comparison, "_run_reference", runs.append)
    fewer = comparison.measure(subject.tower(tensors, names[3:]))
    assert runs == []
    assert tuple(fewer.linears) == names[3:]
    assert fewer.linears == {name: first.linears[name] for name in names[3:]}
    assert fewer.integrity == first.integrity
    assert fewer.accuracy.sqnr > first.accuracy.sqnr
    monkeypatch.undo()
    comparison = _comparison(subject, batches)
    comparison.measure(subject.tower(tensors, names[3:]))
    assert comparison.measure(subject.tower(tensors, names)).linears == first.linears


def test_a_candidate_without_int8_linears_is_refused(
    subject: Subject, tensors: Tensors, batches: list[Tensor]
) -> None:
    with pytest.raises(ValueError, match="no int8 linear"):
        _comparison(subject, batches).measure(subject.tower(tensors, ()))


def test_integrity_needs_no_reference(
    subject: Subject, tensors: Tensors, batches: list[Tensor]
) -> None:
    tower = subject.tower(tensors, subject.blocks.int8_candidates)
    total = check_integrity(tower, batches[0])
    steps = vision_pooled(tower.spec, uint8=True).steps
    linears = [step for step in steps if step.op.startswith("linear_int8")]
    assert len(linears) == len(subject.blocks.int8_candidates)
    # 32 rows of every output: qkv 384 (256 in the last block), up 512, down 128
    assert total.sums == 32 * (3 * (384 + 512 + 128) + 256)
    # 256 rows: the inputs of qkv and up, 128 columns, and the hidden layer
    assert total.codes == 256 * (4 * 128 + 3 * 128 + 3 * 512)
    assert (total.wrong_sums, total.bad_scales) == (0, 0)
    assert total.code_difference <= 1


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["1.qkv.smooth", "1.up.weight_scale", "1.down.weight_scale"])
def test_bad_scales_are_counted(
    name: str, value: float, subject: Subject, tensors: Tensors, batches: list[Tensor]
) -> None:
    """After the loader's own check."""
    tower = subject.tower(
        tensors,
        subject.blocks.int8_candidates,
        lambda weights: weights[f"vision.blocks.{name}"][3:5].fill_(value),
    )
    assert check_integrity(tower, batches[0][:1]).bad_scales == 2
