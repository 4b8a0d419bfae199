"""A job on several devices: the bytes of one device, and errors by their names."""

from __future__ import annotations

import dataclasses
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitrail
from jobs.crash_server import make_desk
from jobs.digits import files
from vitrail.errors import CheckpointError, InputError, VitrailError
from vitrail.image import preprocess
from vitrail.jobs import worker
from vitrail.jobs import workers as workers_module
from vitrail.jobs.embedder import Embedder, ModelEmbedder
from vitrail.jobs.folder import embed_to_folder
from vitrail.jobs.listing import Source, find_images
from vitrail.jobs.manifest import read_embeddings
from vitrail.jobs.one_file import embed_to_file
from vitrail.jobs.rows import EmbedOptions
from vitrail.jobs.shards import Shard
from vitrail.jobs.worker import WorkerSettings
from vitrail.jobs.workers import DeviceWorkers
from vitrail.model import loading

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = 50


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP; 50 images of which every tenth is cut short, as files, in a tar, in a list."""
    folder = tmp_path_factory.mktemp("desk")
    names = make_desk(folder, IMAGES, step=1)
    with tarfile.open(folder / "images.tar", "w") as tar:
        tar.add(folder / "images", "images")
    (folder / "list").write_text("\n".join([*names[:9], "missing.jpg", *names[9:20]]))
    return folder


@pytest.fixture(scope="module")
def one(desk: Path, one_thread: None) -> Embedder:
    return ModelEmbedder(vitrail.load(desk / "clip"))


@pytest.fixture(scope="module")
def two(desk: Path, one_thread: None) -> Iterator[Embedder]:
    with DeviceWorkers(desk / "clip", ["cpu", "cpu"]) as workers:
        yield workers


def images(desk: Path) -> list[Source]:
    return find_images([str(desk / "images")]).sources


def test_the_workers_know_the_model(one: Embedder, two: Embedder) -> None:
    assert two.facts == one.facts


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "npy"},
        {"precision": "float16"},
        {"normalize": True},
        {"size": (32, 48)},
        {"batch_size": 1},
        {"batch_size": 3, "part_size": 20},
        {"batch_size": 2, "part_size": 7, "layout": "npy"},
        {"part_size": 1},
    ],
    ids=str,
)
def test_a_folder_has_the_bytes_of_one_device(
    options: dict[str, Any], desk: Path, one: Embedder, two: Embedder, tmp_path: Path
) -> None:
    settings = EmbedOptions(**{"part_size": 16, **options})
    summaries = []
    for name, embedder in (("one", one), ("two", two)):
        counts: list[int] = []
        summary = embed_to_folder(
            embedder, images(desk), tmp_path / name, settings, progress=counts.append
        )
        assert counts == sorted(counts)
        assert counts[-1] == IMAGES
        summaries.append(summary)
    assert summaries[0] == summaries[1]
    assert summaries[0].failed == IMAGES // 10
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize("name", ["list", "images.tar"])
def test_tars_and_lists_have_the_bytes_of_one_device(
    name: str, desk: Path, one: Embedder, two: Embedder, tmp_path: Path
) -> None:
    chosen = str(desk / name)
    listing = find_images([], [chosen]) if name == "list" else find_images([chosen])
    for folder, embedder in (("one", one), ("two", two)):
        settings = EmbedOptions(part_size=8, batch_size=1)
        embed_to_folder(embedder, listing.sources, tmp_path / folder, settings)
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize("name", ["out.npy", "out.parquet"])
def test_a_file_has_the_bytes_of_one_device(
    name: str, desk: Path, one: Embedder, two: Embedder, tmp_path: Path
) -> None:
    for folder, embedder in (("one", one), ("two", two)):
        (tmp_path / folder).mkdir()
        settings = EmbedOptions(batch_size=2)
        embed_to_file(embedder, images(desk), tmp_path / folder / name, settings)
    assert files(tmp_path / "one") == files(tmp_path / "two")


class Stop(Exception):
    pass


def stop_at(count: int) -> Callable[[int], None]:
    def progress(done: int) -> None:
        if done >= count:
            raise Stop

    return progress


def test_jobs_change_between_one_device_and_several(
    desk: Path, one: Embedder, two: Embedder, tmp_path: Path
) -> None:
    """Interrupted, resumed, repaired, written by shards, overwritten."""
    settings = EmbedOptions(part_size=8, batch_size=1)

    def job(name: str, embedder: Embedder, **changes: Any) -> Any:
        progress = changes.pop("progress", lambda done: None)
        chosen = dataclasses.replace(settings, **changes)
        return embed_to_folder(embedder, images(desk), tmp_path / name, chosen, progress)

    job("one", one)
    expected = files(tmp_path / "one")
    for first, second in ((one, two), (two, one), (two, two)):
        with pytest.raises(Stop):
            job("resumed", first, progress=stop_at(27))
        assert job("resumed", second).written == 4
        assert files(tmp_path / "resumed") == expected
        for name in ("one", "resumed"):
            (tmp_path / name / "part-00002.parquet").write_bytes(b"")
        assert job("one", one).repaired == job("resumed", second).repaired == [2]
        assert files(tmp_path / "resumed") == files(tmp_path / "one")
        job("one", one, overwrite=True)
        job("resumed", second, overwrite=True)
        assert files(tmp_path / "resumed") == files(tmp_path / "one") == expected
        (tmp_path / "resumed").rename(tmp_path / f"done-{len(list(tmp_path.iterdir()))}")
    job("shards", two, shard=Shard(1, 2))
    job("shards", one, shard=Shard(0, 2))
    whole, shards = read_embeddings(tmp_path / "one"), read_embeddings(tmp_path / "shards")
    assert shards.paths == whole.paths
    assert np.array_equal(shards.embeddings, whole.embeddings)


def test_many_failures_in_a_row_stop_a_job_as_on_one_device(
    desk: Path, one: Embedder, two: Embedder, tmp_path: Path
) -> None:
    sources = [*images(desk)[:22], *(f"lost-{n}.jpg" for n in range(18)), *images(desk)[:10]]
    settings = EmbedOptions(part_size=10, batch_size=1, stop_after=18)
    for name, embedder in (("one", one), ("two", two)):
        with pytest.raises(InputError, match=r"18 inputs in a row failed, the last lost-17.jpg"):
            embed_to_folder(embedder, sources, tmp_path / name, settings)
    assert len(read_embeddings(tmp_path / "two").paths) == 20
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_an_error_of_a_call_comes_when_its_rows_are_due(
    desk: Path, two: Embedder, tmp_path: Path
) -> None:
    sources: list[Any] = images(desk)[:40]
    sources[32:36] = [np.zeros((3, 32, side), np.float32) for side in range(32, 36)]  # refused
    settings = EmbedOptions(part_size=8, batch_size=1)
    with pytest.raises(InputError, match="pixels: got shapes"):
        embed_to_folder(two, sources, tmp_path / "out", settings)
    assert len(read_embeddings(tmp_path / "out").paths) == 29
    embed_to_folder(two, images(desk), tmp_path / "next", settings)
    assert len(read_embeddings(tmp_path / "next").paths) == 45


def test_unequal_fingerprints_are_refused(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = workers_module._settings

    def settings(*given: Any) -> Any:
        first, second = real(*given)
        return [first, dataclasses.replace(second, keywords={"dtype": "bfloat16"})]

    monkeypatch.setattr(workers_module, "_settings", settings)
    prints = [vitrail.load(desk / "clip", dtype=d).fingerprint for d in ("float32", "bfloat16")]
    with pytest.raises(InputError, match="devices: the model on cpu has the fingerprint") as caught:
        DeviceWorkers(desk / "clip", ["cpu", "cpu"])
    assert all(text in str(caught.value) for text in (*prints, "bfloat16", "float32"))


def test_an_error_of_loading_has_its_class_and_names_the_device(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"^cpu: ") as caught:
        DeviceWorkers(tmp_path, ["cpu"])
    with pytest.raises(CheckpointError) as alone:
        vitrail.load(tmp_path)
    assert str(caught.value) == f"cpu: {alone.value}"
    assert isinstance(caught.value, VitrailError)


def test_a_worker_of_a_gpu_makes_it_current_before_it_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: calls.append(count))
    monkeypatch.setattr(preprocess, "limit_cores", lambda count: calls.append(-count))
    monkeypatch.setattr(loading, "load", lambda source, **keywords: calls.append(keywords))
    worker._load(WorkerSettings("folder", "cuda:1", {"dtype": "float16"}, 3, 8, False))
    assert calls == [-3, 8, "cuda:1", {"device": "cuda:1", "dtype": "float16"}]


def test_workers_share_the_cores_and_have_the_threads_of_one_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preprocess, "core_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    settings = workers_module._settings("folder", ["cpu"] * 3, {"dtype": "float16"})
    assert settings == [WorkerSettings("folder", "cpu", {"dtype": "float16"}, 2, 6, True)] * 3
    assert not workers_module._settings("folder", ["cpu"], {})[0].patient
