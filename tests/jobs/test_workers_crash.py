"""Jobs on several devices whose workers, parent or disk fail end with the bytes of one device."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vitrail
from jobs.crash_server import IMPORTS, Ask, crash_server, make_desk
from jobs.digits import files
from jobs.processes import GUARD
from vitrail.errors import InputError, VitrailError
from vitrail.jobs.embedder import ModelEmbedder
from vitrail.jobs.folder import embed_to_folder
from vitrail.jobs.listing import Source
from vitrail.jobs.manifest import read_embeddings, read_manifest
from vitrail.jobs.narrowing import TRIES
from vitrail.jobs.rows import EmbedOptions
from vitrail.jobs.workers import DeviceWorkers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

IMAGES = 1200
MOMENTS = 20
KILLED = 9
OPTIONS = EmbedOptions(part_size=60, batch_size=4)
PARTS = IMAGES // 60


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP, and small images of which every tenth cannot be read, with their list."""
    folder = tmp_path_factory.mktemp("desk")
    make_desk(folder, IMAGES)
    return folder


@pytest.fixture(scope="module")
def sources(desk: Path) -> list[Source]:
    return list((desk / "list").read_text().splitlines())


@pytest.fixture(scope="module")
def expected(desk: Path, sources: list[Source], one_thread: None) -> dict[str, bytes]:
    """The files of a job on one device."""
    out = desk / "one"
    embed_to_folder(ModelEmbedder(vitrail.load(desk / "clip")), sources, out, OPTIONS)
    return files(out)


def test_twenty_kills_of_workers_change_nothing(
    desk: Path, sources: list[Source], expected: dict[str, bytes], tmp_path: Path
) -> None:
    """At random moments: while they compute, wait or load. Jobs follow until all are done."""
    dice = random.Random(0)
    kills: list[bool] = []  # whether the worker had loaded
    while_loading = [0, 0]  # in a row: the third ends a job
    ended = threading.Event()

    def kill() -> None:
        while len(kills) < MOMENTS and not ended.wait(dice.uniform(0, 1)):
            number = dice.randrange(2)
            process = workers._processes[number]
            if process is None:
                continue
            while_loading[number] = 0 if process.is_loaded else while_loading[number] + 1
            if while_loading[number] < TRIES:
                kills.append(process.is_loaded)
                process._process.kill()

    with DeviceWorkers(desk / "clip", ["cpu", "cpu"]) as workers:
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            job = 0
            while killer.is_alive() or job == 0:
                embed_to_folder(workers, sources, tmp_path / f"{job}", OPTIONS)
                assert files(tmp_path / f"{job}") == expected
                job += 1
        finally:
            ended.set()
            killer.join(GUARD)
    assert len(kills) == MOMENTS
    assert sum(kills) >= MOMENTS // 4
    assert not multiprocessing.active_children()


def test_a_full_disk_at_twenty_moments_changes_nothing(
    desk: Path,
    sources: list[Source],
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A write of a random number takes half of its data, and the disk is full; then all is well."""
    dice, real = random.Random(0), os.pwrite
    out, resumed = tmp_path / "out", 0
    with DeviceWorkers(desk / "clip", ["cpu", "cpu"]) as workers:
        for moment in range(MOMENTS):
            writes = dice.randrange(1, 2 if moment % 2 else 2 * (PARTS - len(read_manifest(out))))

            def write(descriptor: int, data: Any, at: int) -> int:
                nonlocal writes
                writes -= 1
                if writes == 0:
                    return real(descriptor, data[: len(data) // 2], at)
                if writes < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(descriptor, data, at)

            committed = len(read_manifest(out))
            with monkeypatch.context() as patch:
                patch.setattr(os, "pwrite", write)
                with pytest.raises(InputError, match=r"No space left on device\. \d+ committed"):
                    embed_to_folder(workers, sources, out, OPTIONS)
            assert not list(out.rglob("_draft-*"))
            assert committed <= len(read_manifest(out)) < PARTS
            resumed += committed > 0
            if len(read_manifest(out)) > PARTS - 3:
                embed_to_folder(workers, sources, out, OPTIONS)
                assert files(out) == expected
                out = tmp_path / f"after-{moment}"
        embed_to_folder(workers, sources, out, OPTIONS)
    assert files(out) == expected
    assert resumed > MOMENTS // 4


@pytest.fixture
def ask(desk: Path) -> Iterator[Ask]:
    job = {"model": str(desk / "clip"), "list": str(desk / "list"), "devices": ["cpu", "cpu"]}
    # a worker may say on stderr that it lost its parent half started
    with crash_server(subprocess.DEVNULL, **job, part_size=60, batch_size=4) as server:
        yield server


def test_twenty_kills_of_the_parent_change_nothing_and_leave_no_process(
    ask: Ask, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """At random moments: while workers start and load, while they compute, and at commits."""
    dice, out = random.Random(0), tmp_path / "out"
    begun = time.monotonic()
    answer = ask(tmp_path / "whole")
    assert (answer["status"], answer["left"]) == (0, 0)
    whole = time.monotonic() - begun
    assert files(tmp_path / "whole") == expected
    kills = resumed = 0
    for moment in range(3 * MOMENTS):
        if kills == MOMENTS:
            break
        had = len(read_manifest(out))
        if moment % 3 == 0:
            answer = ask(out, early=True, after=dice.uniform(0, whole / 2))
        else:
            answer = ask(
                out, commits=moment % 3 if had < PARTS - 3 else 0, after=dice.uniform(0, 0.1)
            )
        assert answer["left"] == 0, moment
        if answer["status"] == 0:  # it ended before the kill
            assert files(out) == expected
            out = tmp_path / f"after-{moment}"
        else:
            assert answer == {"status": KILLED, "left": 0}, moment
            kills, resumed = kills + 1, resumed + (had > 0)
    assert kills == MOMENTS
    assert resumed > MOMENTS // 4
    assert ask(out)["status"] == 0
    assert files(out) == expected


DEADLY = """
import os, signal, warnings
from vitrail.image import decoding

real = decoding.open_image

def open_image(image, *rest):
    if str(image).endswith("0013.jpg"):
        os.kill(os.getpid(), signal.SIGSEGV)
    warnings.warn("planted")
    return real(image, *rest)

decoding.open_image = open_image
"""


def test_an_image_that_kills_its_process_becomes_a_failure_and_the_rest_has_its_bits(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EmbedOptions(part_size=10, batch_size=1)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        data = (desk / "images" / f"{number:04}.jpg").read_bytes()
        (folder / f"{number:04}.jpg").write_bytes(b"" if number == 13 else data)
    images: list[Source] = sorted(map(str, folder.iterdir()))
    model = vitrail.load(desk / "clip")
    embed_to_folder(ModelEmbedder(model), images, tmp_path / "one", options)
    (folder / "0013.jpg").write_bytes((desk / "images/0012.jpg").read_bytes())

    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(DEADLY)
    monkeypatch.setenv("PYTHONPATH", f"{hooks}{os.pathsep}{IMPORTS}")
    said: list[str] = []
    with (
        pytest.warns(UserWarning, match="planted") as warned,
        DeviceWorkers(desk / "clip", ["cpu", "cpu"], said.append) as workers,
    ):
        summary = embed_to_folder(workers, images, tmp_path / "two", options)
    assert len([warning for warning in warned if "planted" in str(warning.message)]) == 1
    deaths = TRIES + 1 + TRIES  # of the chunk of 4, the half, and the image alone
    assert said == ["cpu: a worker process has died (SIGSEGV); another replaces it"] * deaths
    assert (summary.inputs, summary.failed) == (20, 2)
    one, two = read_embeddings(tmp_path / "one"), read_embeddings(tmp_path / "two")
    assert two.paths == one.paths
    assert two.embeddings.tobytes() == one.embeddings.tobytes()
    reason = "killed the process that read it 3 times (SIGSEGV)"
    assert [path for path, _ in two.errors] == [path for path, _ in one.errors]
    assert dict(two.errors) == dict(one.errors) | {images[13]: reason}


def test_a_worker_that_dies_three_times_while_it_loads_is_an_error(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nfrom vitrail.model import loading\n"
        "loading.load = lambda *rest, **more: os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{IMPORTS}")
    told = r"cpu: 3 processes have died while they loaded the model \(SIGKILL\)"
    with pytest.raises(VitrailError, match=told):
        DeviceWorkers(desk / "clip", ["cpu"])
    assert not multiprocessing.active_children()
