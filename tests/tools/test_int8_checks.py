"""``vitrail verify``, ``info`` and `load` on a folder of int8 weights."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from vitrail.checkpoint.contents import INT8
from vitrail.cli import app
from vitrail.demo import scenes
from vitrail.errors import InputError
from vitrail.int8 import measure, similarity
from vitrail.int8.figures import Accuracy
from vitrail.model.loading import load
from vitrail.runtime import RUNNERS
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.tools import export
from vitrail.tools.info import describe, read
from vitrail.tools.report import Check, Report
from vitrail.tools.verify import verify

CLIP = Path(__file__).parents[2] / "engine/vitrail/assets/clip"
NOT_VERIFIED = "not verified on your data"

pytestmark = pytest.mark.filterwarnings("ignore:.*not verified on your data")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """64 scenes, of two sizes."""
    folder, dice = tmp_path_factory.mktemp("scenes"), Random(3)
    paths = [folder / f"{number}.png" for number in range(64)]
    for number, path in enumerate(paths):
        scenes.render(scenes.sample(dice), 56 + number % 2).save(path)
    return [str(path) for path in paths]


def checks(report: Report) -> dict[str, Check]:
    return {check.name: check for check in report.checks}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def with_verdict(folder: Path, to: Path, verdict: str, *reasons: str) -> Path:
    """A copy whose guard said ``verdict``."""
    shutil.copytree(folder, to)
    content = json.loads((to / INT8).read_text())
    content["guard"] |= {"verdict": verdict, "reasons": list(reasons), "own": True}
    (to / INT8).write_text(json.dumps(content))
    return to


# ---- verify


def test_copies_of_a_picture_count_once(int8_clip: Path, pictures: list[str]) -> None:
    report = verify(load(int8_clip), [*pictures[:4], *pictures[:2]], ["a red heart"], against=CLIP)
    facts = checks(report)["accuracy"].facts
    assert facts["pictures"] == 4
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))
    with pytest.raises(InputError, match="3 pictures, all of them equal, wanted at least 2"):
        verify(load(int8_clip), [pictures[0]] * 3, ["a red heart"], against=CLIP)


def test_own_pictures_and_the_source_give_a_verdict(int8_clip: Path, pictures: list[str]) -> None:
    report = verify(load(int8_clip), pictures, ["a red heart"], against=CLIP)
    assert report.passed, report
    assert report.dtype == "int8"
    assert report.reference == str(CLIP)
    found = checks(report)
    assert [*found] == [
        "pixels, Pillow",
        "pixels, processor",
        "record",
        "integrity",
        "accuracy",
        "images, from files",
        "headroom",
        "tokens",
    ]
    accuracy, integrity = found["accuracy"], found["integrity"]
    assert accuracy.verdict == "pass"
    assert accuracy.facts["verdict"] == "good"
    assert accuracy.facts["pictures"] == 64
    assert 0.999 < accuracy.facts["centered_mean"] < 1
    assert 0.9 < accuracy.facts["top10"] <= 1
    assert "64 of your own pictures" in accuracy.text
    vision = load(int8_clip).spec.vision
    assert vision is not None
    assert set(integrity.facts["linears"]) == set(vision.blocks.int8)
    assert integrity.facts["linears"]["1.up"]["sqnr"] > 30


def test_few_pictures_are_a_note(int8_clip: Path, pictures: list[str]) -> None:
    accuracy = checks(verify(load(int8_clip), pictures[:10], against=CLIP))["accuracy"]
    assert accuracy.verdict == "note"
    assert NOT_VERIFIED in accuracy.text
    assert "10 pictures, wanted at least 64" in accuracy.text


def test_without_the_source_codes_and_sums_are_checked(
    int8_clip: Path, pictures: list[str]
) -> None:
    report = verify(load(int8_clip), pictures[:3])
    found = checks(report)
    assert report.passed
    assert found["integrity"].facts["wrong_sums"] == 0
    assert found["integrity"].facts["sums"] > 100_000
    assert found["accuracy"].verdict == "note"
    assert "with --against give clip, which it was made from" in found["accuracy"].text


def test_a_source_that_differs_is_refused(
    int8_clip: Path, pictures: list[str], tmp_path: Path
) -> None:
    model = load(int8_clip)
    shutil.copytree(CLIP, tmp_path / "other")
    path = tmp_path / "other/model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("fc1.weight"))
    tensors[name][0, 0] += 0.5
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match="with other weights, wanted clip"):
        verify(model, pictures[:3], against=tmp_path / "other")
    with pytest.raises(InputError, match="whose weights are int8, wanted clip"):
        verify(model, pictures[:3], against=int8_clip)
    shutil.copytree(CLIP, tmp_path / "config")
    config = tmp_path / "config/config.json"
    text = config.read_text()
    assert '"hidden_act": "quick_gelu"' in text
    config.write_text(text.replace('"hidden_act": "quick_gelu"', '"hidden_act": "gelu"'))
    with pytest.raises(InputError, match="with another configuration, wanted clip"):
        verify(model, pictures[:3], against=tmp_path / "config")


def test_the_source_of_a_model_in_16_bits_has_no_meaning(pictures: list[str]) -> None:
    with pytest.raises(InputError, match="are not int8"):
        verify(load(CLIP), pictures[:3], against=CLIP)


def test_one_picture_has_no_mean(int8_clip: Path, pictures: list[str]) -> None:
    with pytest.raises(InputError, match="wanted at least 2"):
        verify(load(int8_clip), pictures[:1], against=CLIP)
    assert verify(load(int8_clip), pictures[:1]).passed


class _Faulty(TorchRunner):
    """Every hidden code is one too low, and each fifth one two."""

    def run_step(self, step: Any, arguments: Any, longest: int) -> None:
        super().run_step(step, arguments, longest)
        if "out_scale" in arguments and step.op == "linear_int8":
            codes = arguments["out"]
            codes.sub_(1)
            codes[:, ::5].sub_(1)


@pytest.mark.parametrize("against", [None, CLIP])
def test_a_faulty_device_fails(
    against: Path | None, int8_clip: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(int8_clip)
    monkeypatch.setitem(RUNNERS, "torch", _Faulty)
    report = verify(model, pictures[:8], against=against)
    assert not report.passed
    integrity = checks(report)["integrity"]
    assert integrity.verdict == "fail"
    assert "codes" in integrity.text
    assert integrity.facts["code_difference"] > 1


def test_weights_that_are_too_coarse_fail(
    int8_clip: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def coarse(y: Tensor, r: Tensor) -> Accuracy:
        return replace(similarity.accuracy(y, r), centered_mean=0.996)

    monkeypatch.setattr(measure, "accuracy", coarse)
    model = load(int8_clip)
    accuracy = checks(verify(model, pictures[:4], against=CLIP))["accuracy"]
    assert accuracy.verdict == "fail"
    assert accuracy.facts["verdict"] == "refused"


def test_the_command_names_int8_and_its_source(int8_clip: Path, pictures: list[str]) -> None:
    few = pictures[:4]
    result = run("verify", *few, "--model", int8_clip, "--against", CLIP, "--text", "a heart")
    assert result.exit_code == 0, result.output
    assert f"CLIPModel in int8 against {CLIP}" in result.stdout
    assert "PASS  integrity" in result.stdout
    assert "NOTE  accuracy" in result.stdout
    assert "centered cosine mean 0.99" in result.stdout
    assert "4 of your own pictures" in result.stdout


def test_the_sample_photos_are_not_the_users(int8_clip: Path) -> None:
    result = run("verify", "--model", int8_clip, "--against", CLIP, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["dtype"] == "int8"
    (accuracy,) = (check for check in report["checks"] if check["name"] == "accuracy")
    assert accuracy["facts"]["verdict"] == NOT_VERIFIED


def test_the_command_fails_for_another_source(int8_clip: Path, pictures: list[str]) -> None:
    result = run("verify", pictures[0], pictures[1], "--model", int8_clip, "--against", int8_clip)
    assert result.exit_code == 1
    assert "wanted clip" in result.output


# ---- info


def test_info_has_the_record(int8_clip: Path) -> None:
    spec, facts = read(str(int8_clip))
    text = describe(spec, facts)
    for words in (
        "10 of the 12 qkv, up and down projections, made from clip",
        "smoothing 0.7, rounding gptq",
        "3.up, 3.down: in the last block only the class token needs it",
        "36 crops of the sample photos",
        "not verified on your data",
        "centered cosine",
        "0 of 106,496 integer sums are wrong",
        "10 in int8",
        "int8 and float32",
    ):
        assert words in text, words
    assert json.loads(json.dumps(facts))["int8"]["guard"]["verdict"] == NOT_VERIFIED
    assert run("info", int8_clip).exit_code == 0


def test_info_of_other_models_has_no_word_of_int8() -> None:
    assert "int8" not in describe(*read(str(CLIP)))


# ---- load


@pytest.mark.filterwarnings("error")
def test_load_warns_of_what_the_guard_found(int8_clip: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="int8 is not verified on your data") as caught:
        load(int8_clip)
    (warning,) = caught
    assert f"vitrail verify PICTURES --model {int8_clip} --against MODEL" in str(warning.message)
    assert warning.filename == __file__
    warned = with_verdict(int8_clip, tmp_path / "warned", "warned", "mean centered cosine 0.998")
    with pytest.warns(UserWarning, match=r"int8 is warned: mean centered cosine 0\.998"):
        load(warned)
    load(with_verdict(int8_clip, tmp_path / "good", "good"))


def test_load_warns_once(int8_clip: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            load(int8_clip)
    assert len(caught) == 1


def test_export_warns_because_it_keeps_no_record(
    int8_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class _Started(Exception):
        pass

    def start(*_: object) -> None:
        raise _Started

    monkeypatch.setattr(export, "_Export", start)
    with (
        pytest.warns(UserWarning, match="int8 is not verified") as caught,
        pytest.raises(_Started),
    ):
        export.export_model(int8_clip, tmp_path / "out", [90])
    assert caught[0].filename == __file__


def test_commands_say_the_warning(int8_clip: Path, pictures: list[str], tmp_path: Path) -> None:
    warned = with_verdict(int8_clip, tmp_path / "warned", "warned", "mean centered cosine 0.998")
    result = run("embed", pictures[0], "--model", warned, "--out", tmp_path / "out.npy")
    assert result.exit_code == 0, result.output
    assert "vitrail: " in result.stderr
    assert "int8 is warned: mean centered cosine 0.998" in result.stderr
    assert ".py:" not in result.stderr
