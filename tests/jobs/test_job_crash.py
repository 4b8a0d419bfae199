"""Jobs that are killed, again and again, end with the bytes of one that was not."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import vitrail
from jobs.crash_server import Ask, crash_server, make_desk
from jobs.digits import files
from vitrail.jobs.manifest import MANIFEST, read_embeddings, read_manifest

IMAGES, PART = 2000, 64
KILLS, AFTER_FIRST = 50, 35
KILLED = 9


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP, and small images of which every tenth cannot be read, with their list."""
    folder = tmp_path_factory.mktemp("desk")
    names = make_desk(folder, IMAGES, lambda path, number: harm(path, number // 10 % 4))
    (folder / "short").write_text("\n".join(names[: 3 * PART]))
    return folder


def harm(path: Path, how: int) -> None:
    data = path.read_bytes()
    path.write_bytes((b"", data[:300], b"<html>not found</html>", b"")[how])
    if how == 3:
        path.unlink()


@pytest.fixture(scope="module")
def ask(desk: Path) -> Iterator[Ask]:
    with crash_server(model=str(desk / "clip"), part_size=PART) as server:
        yield server


@pytest.mark.slow
def test_fifty_kills_change_nothing_and_bad_inputs_are_exactly_known(
    desk: Path, ask: Ask, tmp_path: Path
) -> None:
    start = time.monotonic()
    assert ask(tmp_path / "whole", list=str(desk / "list"))["status"] == 0
    part_seconds = (time.monotonic() - start) / (IMAGES / PART)

    # Every third kill waits for a commit, so that no machine is too slow to get anywhere; all come
    # after a random time, short where few parts are left, so that none is too fast to be killed.
    out, dice = tmp_path / "out", random.Random(0)
    late = 0
    for kill in range(KILLS):
        had = len(read_manifest(out))
        few = IMAGES / PART - had < 4
        answer = ask(
            out,
            list=str(desk / "list"),
            commits=int(kill % 3 == 0 and not few),
            after=dice.uniform(0, (0.1 if few else 0.9) * part_seconds),
        )
        assert answer["status"] == KILLED, f"the job ended by itself after {kill} kills"
        late += had > 0
    assert late >= AFTER_FIRST
    assert 0 < len(read_manifest(out)) < IMAGES / PART
    assert ask(out, list=str(desk / "list"))["status"] == 0
    assert files(out) == files(tmp_path / "whole")

    result = read_embeddings(out)
    unreadable = [number for number in range(IMAGES) if number % 10 == 3]
    assert [int(Path(path).stem) for path, _ in result.errors] == unreadable
    kinds = [
        ("empty: 0 bytes", "cut short", "not a JPEG", "no such file")[n // 10 % 4]
        for n in unreadable
    ]
    for (_, why), reason in zip(result.errors, kinds, strict=True):
        assert reason in why
    assert [int(Path(path).stem) for path in result.paths] == sorted(
        set(range(IMAGES)) - set(unreadable)
    )
    sample = slice(0, 40)
    alone = vitrail.load(desk / "clip").encode_image(result.paths[sample]).numpy()
    assert np.abs(result.embeddings[sample] - alone).max() <= 1e-4 * np.abs(alone).max()


@pytest.mark.slow
def test_a_kill_at_each_write_sync_rename_and_manifest_step_changes_nothing(
    desk: Path, ask: Ask, tmp_path: Path
) -> None:
    finished = ask(tmp_path / "whole", list=str(desk / "short"))
    calls = finished["calls"]
    # The job record: write, sync, link, sync of its folder. A part: those for its file, with a
    # rename; then the manifest's line: write, sync, sync of the folder.
    put = ["pwrite", "fsync", "replace", "fsync"]
    assert calls == ["pwrite", "fsync", "link", "fsync"] + 3 * ([*put, "pwrite", "fsync", "fsync"])
    expected = files(tmp_path / "whole")
    for nth, call in enumerate(calls, 1):
        for when in ("before", "after", *(["half"] if call == "pwrite" else [])):
            out = tmp_path / f"{nth}-{when}"
            killed = ask(out, list=str(desk / "short"), nth=nth, when=when)
            assert killed["status"] == KILLED, (nth, call, when)
            before = read_embeddings(out) if (out / "_job.json").exists() else None
            resumed = ask(out, list=str(desk / "short"))
            assert resumed["status"] == 0, (nth, call, when)
            assert files(out) == expected, (nth, call, when)
            if before is not None:  # what was readable in between is what the end has
                end = read_embeddings(out)
                assert end.paths[: len(before.paths)] == before.paths
                assert np.array_equal(end.embeddings[: len(before.paths)], before.embeddings)


@pytest.mark.slow
def test_memory_stays_flat(desk: Path, ask: Ask, tmp_path: Path) -> None:
    """Less than 1 MB per 10,000 images, over 20,000 that follow a warm-up of as many."""
    names = (desk / "list").read_text()
    (tmp_path / "list").write_text("\n".join([names] * 20))
    answer = ask(tmp_path / "out", list=str(tmp_path / "list"), part_size=500)
    assert answer["status"] == 0
    done, kib = np.array(answer["memory"], float).T
    assert done[-1] == 20 * IMAGES
    warm = done > 10 * IMAGES
    slope = np.polyfit(done[warm], kib[warm], 1)[0] * 10_000 / 1024
    print(f"{slope:.2f} MiB per 10,000 images")
    assert slope < 1, f"{slope:.2f} MiB per 10,000 images"
    assert len(read_manifest(tmp_path / "out")) == 80
    assert (tmp_path / "out" / MANIFEST).stat().st_size > 0
