"""What `load` remembers: enough to load the same model from another folder of the same machine."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

import vitrail
from checkpoint.samples import COMMIT, hub_cache
from helpers import clip_folder
from vitrail.model.load_arguments import LoadArguments
from vitrail.model.loading import load_again
from vitrail.tools.export import export_model


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "clip"
    clip_folder(folder)
    return folder


def test_every_argument_is_kept_as_it_was_resolved(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clip.parent)
    options: dict[str, Any] = {"sixteen_bit": "clip", "resize": "device", "local_files_only": True}
    model = vitrail.load("clip", dtype="half", device="cpu", **options)
    wanted = LoadArguments(
        source=str(clip),
        revision=None,
        device="cpu",
        dtype="float16",
        backend="torch",
        **options,
    )
    assert model.load_arguments == wanted
    monkeypatch.chdir(clip)  # the files of a model are found from another folder too
    assert model.tokenize("a cat").shape == (1, 40)
    again = load_again(wanted)
    assert again.load_arguments == wanted
    assert again.fingerprint == model.fingerprint
    values = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.encode_image(values), model.encode_image(values))


def test_a_path_below_the_home_folder_is_made_absolute(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(clip.parent))
    arguments = vitrail.load("~/clip/model.safetensors", device="cpu").load_arguments
    assert arguments is not None
    assert arguments.source == f"{clip}/model.safetensors"


def test_a_hub_id_is_kept_with_its_commit(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub_cache(tmp_path, {path.name: path.read_bytes() for path in clip.iterdir()})
    model = vitrail.load("org/name", device="cpu")
    arguments = model.load_arguments
    assert arguments is not None
    assert (arguments.source, arguments.revision) == ("org/name", COMMIT)
    assert f"vitrail.load('org/name', revision='{COMMIT}'" in model.as_module("image").source
    assert load_again(arguments).fingerprint == model.fingerprint


@pytest.mark.usefixtures("uncompiled")
def test_folders_of_int8_and_of_exports_are_loaded_again(
    clip: Path, int8_clip: Path, tmp_path: Path
) -> None:
    export_model(clip, tmp_path / "export", [90], dtype="bfloat16")
    for folder, dtype in ((int8_clip, "int8"), (tmp_path / "export", "bfloat16")):
        with warnings.catch_warnings(record=True) as caught:
            model = vitrail.load(folder, device="cpu")
        assert len(caught) == (dtype == "int8"), "load warns of int8, and load_again does not"
        arguments = model.load_arguments
        assert arguments is not None
        assert (arguments.source, arguments.dtype) == (str(folder), dtype)
        assert load_again(arguments).fingerprint == model.fingerprint


@pytest.mark.gpu
def test_a_gpu_is_kept_by_its_number(clip: Path) -> None:
    arguments = vitrail.load(clip, device="cuda").load_arguments
    assert arguments is not None
    assert arguments.device == f"cuda:{torch.cuda.current_device()}"
    assert dataclasses.replace(arguments, device="cpu").keywords()["device"] == "cpu"
