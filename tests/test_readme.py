"""Every command and snippet of the README works as shown, with small random models."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

import hub_cache
import vitrail
from helpers import clip_folder, make, save
from hub_cache import PHOTOS, ROOT
from real_pictures import photographs

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
SNIPPETS = [text for kind, text in BLOCKS if kind == "python"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with photos, and an environment whose hub cache holds the README's models."""
    folder = tmp_path_factory.mktemp("desk")
    environment = hub_cache.desk(folder)
    (folder / "library").mkdir()
    for number, picture in enumerate(photographs(128)):
        picture.resize((96, 96)).save(folder / "library" / f"{number}.png")
    clip_folder(hub_cache.snapshot(folder / "hub", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"))
    dinov2 = hub_cache.snapshot(folder / "hub", "facebook/dinov2-with-registers-base")
    save(make("Dinov2WithRegistersModel", num_hidden_layers=4), dinov2)
    BitImageProcessorPil(size={"shortest_edge": 64}, crop_size=56).save_pretrained(dinov2)
    return folder, environment


def _run(words: list[str], desk: tuple[Path, dict[str, str]]) -> subprocess.CompletedProcess[str]:
    folder, environment = desk
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_readme_has_commands_and_snippets() -> None:
    assert {line.split()[0] for line in COMMANDS} == {"make", "vitrail", "export"}
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("vitrail")])
def test_commands_run_as_shown(line: str, desk: tuple[Path, dict[str, str]]) -> None:
    setting = next(line for line in COMMANDS if line.startswith("export"))
    done = _run(["bash", "-c", f"{setting}\n{line}"], desk)
    assert done.returncode == 0, done.stderr
    if "--out" in line:
        out = desk[0] / shlex.split(line)[-1]
        assert out.stat().st_size > 0
        if not out.suffix:
            assert len(vitrail.read_embeddings(out).paths) == len(list(PHOTOS.iterdir()))
        if out.suffix == ".npy":
            assert len(np.load(out)) == len(list(PHOTOS.iterdir()))
    else:
        words = {"classify": "cat", "quantize": "good"}.get(line.split()[1], "CLIPModel")
        assert words in done.stdout


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make")])
def test_make_commands_are_what_ci_runs(line: str) -> None:
    assert line in (ROOT / ".ci" / "run").read_text()
    target = line.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run_as_shown(snippet: str, desk: tuple[Path, dict[str, str]]) -> None:
    done = _run([sys.executable, "-c", snippet], desk)
    assert done.returncode == 0, done.stderr
    expected = "missing.jpg: no such file" if "missing.jpg" in snippet else "torch.Size([1, "
    assert expected in done.stdout


def test_the_search_example_ranks_every_photo(desk: tuple[Path, dict[str, str]]) -> None:
    model = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    (desk[0] / "more").mkdir()
    shutil.copytree(PHOTOS, desk[0] / "more" / "photos")
    (desk[0] / "more" / "torn.jpg").write_bytes(b"no picture")
    example = str(ROOT / "examples" / "search.py")
    done = _run([sys.executable, example, model, "more", "a rocket"], desk)
    assert done.returncode == 0, done.stderr
    rows = [line.split("  ") for line in done.stdout.splitlines()]
    assert len(rows) == 5
    assert [float(score) for score, _ in rows] == sorted((float(r[0]) for r in rows), reverse=True)
    assert "torn.jpg" in done.stderr


def test_the_speed_table_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import table

    assert f"{table.START}{table.render()}{table.END}" in README


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()
