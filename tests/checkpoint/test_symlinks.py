"""Symlinks are followed inside a folder and inside the hub's cache, nowhere else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from checkpoint.samples import (
    COMMIT,
    HUB_FILES,
    SHARDS,
    WEIGHTS_BLOB,
    B,
    checkpoint_folder,
    contents,
    hub_cache,
    refused,
    sharded,
)
from vitrail.checkpoint.files import open_checkpoint


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("link", ["../outside", "absolute"])
def test_a_symlink_out_of_the_folder_is_refused(file: str, link: str, tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path / "folder")
    outside = tmp_path / "outside"
    (folder / file).rename(outside)
    os.symlink(outside if link == "absolute" else link, folder / file)
    refused(
        lambda: open_checkpoint(folder),
        f"{folder / file}: got a symlink to ",
        "outside', wanted a file inside the checkpoint folder",
    )


def test_a_symlink_out_of_the_folder_is_refused_for_shards_and_single_paths(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "folder", SHARDS)
    (folder / B).rename(tmp_path / B)
    os.symlink(tmp_path / B, folder / B)
    for path in (folder, folder / B):
        refused(lambda: open_checkpoint(path), f"{folder / B}: got a symlink to ")  # noqa: B023


def test_symlinks_that_stay_within_and_a_linked_folder_are_followed(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path / "real")
    (folder / "sub").mkdir()
    (folder / "model.safetensors").rename(folder / "sub" / "w")
    os.symlink("sub/w", folder / "model.safetensors")
    os.symlink(folder, tmp_path / "linked")
    checkpoint = open_checkpoint(tmp_path / "linked")
    assert contents(checkpoint.tensors) == {"w": b"\1\2\3\4"}


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_dangling_and_circular_symlinks_say_so(file: str, tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path)
    (folder / file).unlink()
    os.symlink("nowhere", folder / file)
    refused(lambda: open_checkpoint(folder), f"{file}: cannot be read: No such file or directory")
    (folder / file).unlink()
    os.symlink(file, folder / file)
    refused(lambda: open_checkpoint(folder), f"{file}: cannot be read: Too many levels of symbolic")


def test_a_snapshot_of_the_hub_cache_can_be_opened_as_a_folder(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(hub_cache(tmp_path, HUB_FILES))
    assert contents(checkpoint.tensors) == {"w": b"\1\2\3\4"}
    assert checkpoint.preprocessor == {"size": 224}
    assert checkpoint.revision is None


def test_blobs_that_repositories_share_are_followed(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, HUB_FILES)
    blob = Path(os.path.realpath(snapshot / "model.safetensors"))
    shared = tmp_path / "blobs" / WEIGHTS_BLOB[:2] / WEIGHTS_BLOB
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    os.symlink(os.path.relpath(shared, blob.parent), blob)
    assert contents(open_checkpoint(snapshot).tensors) == {"w": b"\1\2\3\4"}


@pytest.mark.parametrize(
    "target", ["../../blobs/passwd", "../../refs/main", "../../../other/blobs/x"]
)
def test_a_snapshot_may_link_to_blobs_and_nothing_else(target: str, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, HUB_FILES)
    aim = snapshot / target
    Path(os.path.normpath(aim)).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(snapshot / "model.safetensors", os.path.normpath(aim))
    (snapshot / "model.safetensors").unlink()
    os.symlink(target, snapshot / "model.safetensors")
    refused(lambda: open_checkpoint(snapshot), "model.safetensors: got a symlink to ")


def test_snapshots_and_blobs_outside_a_hub_cache_mean_nothing(tmp_path: Path) -> None:
    repository = hub_cache(tmp_path, HUB_FILES).parents[1].rename(tmp_path / "download")
    snapshot = repository / "snapshots" / COMMIT
    refused(lambda: open_checkpoint(snapshot), "config.json: got a symlink to ")


def test_blobs_that_are_themselves_a_link_out_of_the_cache_are_refused(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path / "cache", HUB_FILES)
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", blobs)
    refused(lambda: open_checkpoint(snapshot), "config.json: got a symlink to ")
