"""``vitrail verify`` passes where the engine is right and says what is wrong where it is not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil
from typer.testing import CliRunner, Result

from helpers import clip_folder, make, perturb, save
from vitrail.cli import app
from vitrail.errors import CheckpointError, InputError
from vitrail.model import loading
from vitrail.spec import ModelSpec
from vitrail.tools.report import Report
from vitrail.tools.verify import verify

PHOTOS = sorted((Path(__file__).parents[2] / "engine/vitrail/assets/photos").glob("*.jpg"))
IMAGES = [str(path) for path in PHOTOS]
TEXTS = ["a photo of a cat", "the red window", "two dogs at night near the sea"]
SOUND = (
    "CLIPModel",
    "ViTModel",
    "ViTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "Dinov2WithRegistersModel",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint with its processor of each kind, with parameters away from their defaults."""
    root = tmp_path_factory.mktemp("verify")
    clip_folder(root / "CLIPModel")
    for name in SOUND[1:]:
        save(perturb(make(name)), root / name)
        size = {"height": 32, "width": 32}
        processor: Any = ViTImageProcessorPil(size=size, resample=3)
        if name == "Dinov2WithRegistersModel":
            processor = CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size=size)
        processor.save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}


def faults(report: Report) -> set[str]:
    return {check.name for check in report.checks if check.verdict == "fail"}


def check(name: str, folders: dict[str, Path], dtype: str = "float32") -> Report:
    texts = TEXTS if name == "CLIPModel" else []
    return verify(loading.load(folders[name], dtype=dtype), IMAGES, texts)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", SOUND)
def test_a_sound_engine_passes(name: str, dtype: str, folders: dict[str, Path]) -> None:
    report = check(name, folders, dtype)
    assert report.passed, report
    names = [check.name for check in report.checks]
    expected = ["contract", "pixels, Pillow", "pixels, processor", "images", "images, from files"]
    assert names == [*expected, "headroom", *(["tokens", "texts"] if name == "CLIPModel" else [])]


def test_a_transformers_that_wants_another_package_is_noted(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 5.17 wants torchvision of whoever asks for its processors."""

    def wanting(*_: object, **__: object) -> None:
        raise ImportError("\nAutoImageProcessor requires\nthe Torchvision library")

    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", wanting)
    report = check("ViTModel", folders)
    assert report.passed, report
    (processor_check,) = [entry for entry in report.checks if entry.name == "pixels, processor"]
    assert processor_check.verdict == "note"
    assert processor_check.text.endswith(": AutoImageProcessor requires the Torchvision library")


Plant = Callable[[ModelSpec], ModelSpec]


def vision(**changes: Any) -> Plant:
    def plant(spec: ModelSpec) -> ModelSpec:
        assert spec.vision
        return replace(
            spec, vision=replace(spec.vision, blocks=replace(spec.vision.blocks, **changes))
        )

    return plant


def text(**changes: Any) -> Plant:
    def plant(spec: ModelSpec) -> ModelSpec:
        assert spec.text
        return replace(spec, text=replace(spec.text, blocks=replace(spec.text.blocks, **changes)))

    return plant


def image(**changes: Any) -> Plant:
    def plant(spec: ModelSpec) -> ModelSpec:
        assert spec.image
        return replace(spec, image=replace(spec.image, **changes))

    return plant


def swapped(spec: ModelSpec) -> ModelSpec:
    assert spec.image
    return replace(spec, image=replace(spec.image, mean=spec.image.std, std=spec.image.mean))


def another_end(spec: ModelSpec) -> ModelSpec:
    assert spec.text
    return replace(spec, text=replace(spec.text, eos=5))


PLANTED: list[tuple[str, str, Plant, set[str]]] = [
    ("quick_gelu for gelu", "ViTModel", vision(activation="quick_gelu"), {"contract", "images"}),
    ("gelu for quick_gelu", "CLIPModel", vision(activation="gelu"), {"contract", "images"}),
    ("gelu in texts", "CLIPModel", text(activation="gelu"), {"contract", "texts"}),
    ("bilinear for bicubic", "CLIPModel", image(resample=2), {"pixels, processor"}),
    ("eps 1e-6 for 1e-5", "CLIPModel", vision(eps=1e-6), {"contract"}),
    ("eps 1e-3 for 1e-5", "CLIPModel", vision(eps=1e-3), {"contract", "images"}),
    ("eps in texts", "CLIPModel", text(eps=1e-12), {"contract"}),
    ("eps 1e-5 for 1e-12", "ViTModel", vision(eps=1e-5), {"contract"}),
    ("mean and std swapped", "CLIPModel", swapped, {"pixels, processor"}),
    ("another crop", "Dinov2WithRegistersModel", image(crop=(24, 24)), {"pixels, processor"}),
    ("heads", "ViTModel", vision(heads=4), {"contract", "images"}),
    ("the end of a text", "CLIPModel", another_end, {"texts"}),
]


@pytest.mark.parametrize(("fault", "name", "plant", "seen"), PLANTED, ids=[p[0] for p in PLANTED])
def test_a_fault_in_the_spec_is_caught(
    fault: str,
    name: str,
    plant: Plant,
    seen: set[str],
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = loading.read_spec
    monkeypatch.setattr(loading, "read_spec", lambda checkpoint: plant(real(checkpoint)))
    if fault == "the end of a text":
        # An end that no text holds is refused by the engine's own check, before any comparison.
        with pytest.raises(CheckpointError, match="at which the text tower pools"):
            check(name, folders)
        return
    failed = faults(check(name, folders))
    assert seen <= failed, failed
    assert not (seen == {"pixels, processor"} and failed & {"images", "contract"}), failed


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("fault", ["rows", "blocks", "scale"])
def test_a_fault_in_the_weights_is_caught_and_its_block_named(
    fault: str, dtype: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loading.map_tensors

    def planted(checkpoint: Any, spec: Any) -> Any:
        sources = dict(real(checkpoint, spec))
        block_sources = {n: s for n, s in sources.items() if ".0." in n and "vision" in n}
        assert block_sources
        if fault == "blocks":
            for name_0 in block_sources:
                name_1 = name_0.replace(".0.", ".1.")
                sources[name_0], sources[name_1] = sources[name_1], sources[name_0]
        return sources

    name = "Dinov2WithRegistersModel"
    if fault == "blocks":
        monkeypatch.setattr(loading, "map_tensors", planted)
        loaded = loading.load(folders[name], dtype=dtype)
    else:
        loaded = loading.load(folders[name], dtype=dtype)
        weights = loaded._vision.runner.weights  # type: ignore[union-attr]
        suffix = ".up." if fault == "rows" else "scale"
        tensors = {n: t for n, t in weights.tensors.items() if ".1." in n and suffix in n}
        assert tensors, sorted(weights.tensors)
        for tensor in tensors.values():
            tensor.copy_(tensor.flip(0) if fault == "rows" else torch.ones_like(tensor))
    report = verify(loaded, IMAGES)
    assert "images" in faults(report)
    (told,) = (check.text for check in report.checks if check.name == "images")
    assert f"first off after block {1 if fault == 'blocks' else 2}" in told
    assert any(path in told for path in IMAGES)


def test_without_transformers_it_says_what_it_cannot_see(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    report = check("CLIPModel", folders, "float16")
    assert report.passed
    assert "transformers is not installed" in report.reference
    assert any("are not seen" in check.text for check in report.checks)
    loaded = loading.load(folders["CLIPModel"], dtype="float16")
    real = loaded.encode_image
    monkeypatch.setattr(loaded, "encode_image", lambda *a, **k: real(*a, **k).roll(1, 1))
    assert "images" in faults(verify(loaded, IMAGES))


def test_a_bad_image_is_left_out_and_only_bad_ones_are_an_error(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    loaded = loading.load(folders["ViTModel"])
    report = verify(loaded, [str(tmp_path / "bad.jpg"), *IMAGES])
    assert report.passed
    assert any("1 left out" in check.text for check in report.checks)
    with pytest.raises(InputError, match="none of 1 images can be read"):
        verify(loaded, [str(tmp_path / "bad.jpg")])


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_the_command_says_pass_or_fail_by_its_exit_code(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    passing = run(*IMAGES[:2], "--model", folders["CLIPModel"], "--text", "a red cat")
    assert passing.exit_code == 0, passing.output
    assert passing.stdout.endswith("PASS\n")
    real = loading.read_spec
    monkeypatch.setattr(loading, "read_spec", lambda c: vision(activation="gelu")(real(c)))
    failing = run(*IMAGES[:2], "--model", folders["CLIPModel"])
    assert failing.exit_code == 1
    assert failing.stdout.endswith("FAIL\n")
    facts = json.loads(run(*IMAGES[:2], "--model", folders["CLIPModel"], "--json").stdout)
    assert not facts["passed"]
    assert {c["name"] for c in facts["checks"] if c["verdict"] == "fail"} >= {"contract", "images"}


def test_the_sample_photos_serve_where_none_are_given(folders: dict[str, Path]) -> None:
    result = run("--model", folders["ViTModel"])
    assert result.exit_code == 0, result.output
    assert "no images given; using the sample photos" in result.stderr


def test_the_bundled_model_passes_with_the_captions_of_the_command_itself() -> None:
    """What a newcomer types first; its texts are of at most 24 tokens."""
    clip = Path(loading.__file__).parents[1] / "assets/clip"
    result = run("--model", clip)
    assert result.exit_code == 0, result.output
    assert "the ids of 3 texts are equal" in result.output
