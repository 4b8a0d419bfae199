"""``vitrail demo``: what it prints is what the model does, and the picture shows it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from helpers import clip_folder, make, save
from vitrail import cli
from vitrail.cli import options
from vitrail.demo import demo, sheet

runner = CliRunner()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TIMED_SECONDS": 0.0, "JUDGED": 100, "GALLERY": 40}.items():
        monkeypatch.setattr(demo, name, value)


def _demo(*arguments: object) -> Result:
    return runner.invoke(cli.app, ["demo", *map(str, arguments)])


def test_it_names_and_finds_scenes_and_photos_and_says_what_it_does_not_know(
    tmp_path: Path,
) -> None:
    out = tmp_path / "sheet.png"
    result = _demo("--sheet", out, "--seed", 3)
    assert result.exit_code == 0, result.output
    rates = dict(re.findall(r"^(color and shape|count|position|size|background) .*? ([\d.]+)%",
                            result.stdout, re.M))  # fmt: skip
    assert len(rates) == 5
    assert all(float(rate) >= 80 for rate in rates.values()), rates
    hits = re.findall(
        r"^(?:three yellow|a large|two blue|four purple).* (\d)$", result.stdout, re.M
    )
    assert len(hits) == 4
    assert sum(map(int, hits)) >= 4 * demo.HITS * 0.7
    assert "nothing of the world" in result.stdout
    assert f"vitrail demo --model {options.EXAMPLE}" in result.stdout
    assert (
        _demo("--sheet", out, "--seed", 3).stdout.splitlines()[:12]
        == (result.stdout.splitlines()[:12])
    )
    with Image.open(out) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert image.format == "PNG"
    assert image.width == 2 * sheet.MARGIN + demo.COLUMNS * (sheet.PANE + sheet.GAP) - sheet.GAP
    assert (pixels == sheet.GREEN).all(-1).any()


def test_scenes_are_new_each_time_unless_a_seed_is_given(tmp_path: Path) -> None:
    seeds = {
        re.search(r"scenes of seed (\d+)", _demo("--sheet", tmp_path / "a.png").stdout)[1]  # type: ignore[index]
        for _ in range(3)
    }
    assert len(seeds) > 1


def test_the_sheet_marks_a_wrong_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip_folder(tmp_path / "random")
    out = tmp_path / "sheet.png"
    result = _demo("--model", tmp_path / "random", "--sheet", out)
    assert result.exit_code == 0, result.output
    assert "nothing of the world" not in result.stdout
    pair = re.search(r"^color and shape .*? ([\d.]+)%", result.stdout, re.M)
    assert pair
    assert float(pair[1]) < 20
    with Image.open(out) as image:
        assert (np.asarray(image.convert("RGB")) == sheet.RED).all(-1).any()


def test_a_model_without_texts_finds_photos_only(tmp_path: Path) -> None:
    from transformers import ViTImageProcessorPil

    save(make("ViTModel"), tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    result = _demo("--model", tmp_path / "vit", "--sheet", tmp_path / "sheet.png")
    assert result.exit_code == 0, result.output
    assert "searched by altered copies" in result.stdout
    assert "never showed" not in result.stdout
    assert (tmp_path / "sheet.png").stat().st_size > 0


def test_a_sheet_that_cannot_be_written_is_an_error_before_any_work(tmp_path: Path) -> None:
    result = _demo("--sheet", tmp_path / "missing" / "sheet.png")
    assert result.exit_code == 1
    assert "missing" in result.stderr
    assert "--sheet" in result.stderr
    assert "seed" not in result.stdout
