"""`vitrail quantize` as a command: its report, its exit codes, wrong usage."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner, Result

from vitrail.cli import app
from vitrail.demo.demo import bundled
from vitrail.demo.scenes import render, sample
from vitrail.int8.guard import NOT_VERIFIED

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 80 pictures of the kind that the bundled CLIP was trained on, and a file that is
    no image."""
    folder, dice = tmp_path_factory.mktemp("scenes"), Random("command")
    for number in range(80):
        render(sample(dice), 64).save(folder / f"{number:03}.png")
    (folder / "torn.jpg").write_bytes(b"no image")
    return folder


def _run(*arguments: object, **env: str) -> Result:
    words = ["quantize", *map(str, arguments)]
    return CliRunner().invoke(app, words, env=env, prog_name="vitrail")


def test_own_pictures_that_are_good_exit_with_0(scenes: Path, tmp_path: Path) -> None:
    options = "--images", scenes, "--calibration", 16
    result = _run(bundled(), tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "verdict          good\n" in result.stdout
    assert "calibration      16 of your own pictures" in result.stdout
    assert f"written          {tmp_path / 'out'}: " in result.stdout
    assert "vitrail: checking 10 int8 linears on 64 pictures\n" in result.stderr
    assert "left out: " in result.stderr
    assert "torn.jpg" in result.stderr


def test_the_sample_photos_verify_nothing_and_exit_with_3(tmp_path: Path) -> None:
    result = _run(bundled(), tmp_path / "out", "--check", 8, "--json")
    assert result.exit_code == 3, result.output
    assert "which verify nothing" in result.stderr
    facts = json.loads(result.stdout)
    assert facts["guard"]["verdict"] == NOT_VERIFIED
    assert facts["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


def test_a_refusal_exits_with_1_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.int8.guard.LAYER_GAIN", 0.0)
    result = _run(bundled(), tmp_path / "out", "--check", 8)
    assert result.exit_code == 1
    assert "verdict          refused: " in result.stdout
    assert "written          nothing" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_options_reach_the_recipe(tmp_path: Path) -> None:
    options = "--no-gptq", "--alpha", 0.5, "--keep-fp16", "0.*", "--keep-fp16", "1.up"
    result = _run(bundled(), tmp_path / "out", "--check", 8, *options)
    assert result.exit_code == 3, result.output
    record = json.loads((tmp_path / "out" / "int8.json").read_text())
    assert (record["recipe"]["alpha"], record["recipe"]["rounding"]) == (0.5, "nearest")
    assert record["spec"]["vision"]["blocks"]["int8"] == [
        "1.qkv",
        "2.qkv",
        "2.up",
        "2.down",
        "3.qkv",
    ]


def test_the_model_may_come_from_the_environment(tmp_path: Path) -> None:
    """Then FOLDER would be taken for it, so that the name is an error, not a surprise."""
    result = _run(tmp_path / "out", VITRAIL_MODEL=str(bundled()))
    assert result.exit_code == 2
    assert "wanted a folder to write" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "wanted a checkpoint folder"),
        (["model"], "wanted a folder to write"),
        (["model", "out", "--alpha", "2"], "--alpha"),
        (["model", "out", "--check", "1"], "--check"),
        (["model", "out", "--calibration", "-1"], "--calibration"),
        (["model", "out", "--min-centered", "1.5"], "--min-centered"),
        (["model", "out", "more"], "more"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], message: str) -> None:
    result = _run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "absent"], "'absent': no such file or folder"),
        (["--keep-fp16", "qkv"], "'qkv', which matches no linear"),
    ],
)
def test_an_error_is_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    result = _run(bundled(), tmp_path / "out", *options)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
