"""Shards of a job: what each writes, what they are together, and how runs of them meet."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import pickle
import random
import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest

import vitrail
from jobs.digits import (
    BAD,
    GOOD,
    INPUTS,
    SOURCES,
    Digits,
    data_files,
    failing,
    files,
    run,
    vectors,
)
from jobs.processes import GUARD, finish, forks, run_at_once
from vitrail.durable import put_file
from vitrail.errors import InputError
from vitrail.jobs import job_record
from vitrail.jobs.folder import check_folder
from vitrail.jobs.job_record import JOB
from vitrail.jobs.locks import COUNTS, LOCK, PART_LOCK, job_lock, other_counts
from vitrail.jobs.manifest import manifest_files, part_records, read_embeddings, read_manifest
from vitrail.jobs.one_file import check_file
from vitrail.jobs.shards import WHOLE, Shard
from vitrail.model.outputs import EncodeResult

LAYOUTS = ["parquet", "npy"]


def run_shard(out: Path, shard: str, model: Any = None, **options: Any) -> Any:
    return run(out, model, shard=Shard.parse(shard), **options)


def same_rows(result: vitrail.Embeddings) -> bool:
    """Whether a job's result is that of all `SOURCES`."""
    assert result.paths == [SOURCES[n] for n in GOOD]
    assert [path for path, _ in result.errors] == [SOURCES[n] for n in sorted(BAD)]
    return np.array_equal(result.embeddings, vectors(GOOD)) and result.missing == 0


# Which parts a shard has


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("inputs", [0, 1, 8, 9, 50])
def test_shards_divide_parts_and_inputs(count: int, inputs: int) -> None:
    shards = [Shard(index, count) for index in range(count)]
    parts = len(range(0, inputs, 8))
    assert sorted(itertools.chain(*(shard.parts(parts) for shard in shards))) == list(range(parts))
    assert sum(shard.inputs(inputs, 8) for shard in shards) == inputs
    assert max(len(s.parts(parts)) for s in shards) - min(len(s.parts(parts)) for s in shards) <= 1
    assert len({shard.mark for shard in shards}) == count


def test_a_shard_counts_its_own_inputs() -> None:
    assert [Shard(k, 3).inputs(50, 8) for k in range(3)] == [18, 16, 16]  # parts 0 3 6, 1 4, 2 5


@pytest.mark.parametrize(
    "text", ["", "1", "/", "1/", "/3", "a/b", "3/3", "4/3", "0/0", "-1/3", "1/3/5", "1 /3", "²/3"]
)
def test_another_text_is_no_shard(text: str) -> None:
    with pytest.raises(InputError, match=r"shard: got .*, wanted K/N"):
        Shard.parse(text)


# Together they are one run


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [2, 3, 9])
def test_shards_one_after_another_write_the_bytes_of_one_run(
    layout: str, count: int, tmp_path: Path
) -> None:
    run(tmp_path / "whole", layout=layout)
    out = tmp_path / "out"
    progress: list[int] = []
    summaries = [
        run(out, layout=layout, shard=Shard(k, count), progress=progress.append)
        for k in range(count)
    ]
    assert data_files(out) == data_files(tmp_path / "whole")
    assert sum(summary.inputs for summary in summaries) == INPUTS
    assert sum(summary.failed for summary in summaries) == len(BAD)
    assert [summary.parts for summary in summaries] == [
        len(range(k, 7, count)) for k in range(count)
    ]
    assert [summary.written for summary in summaries] == [s.parts for s in summaries]
    committed = list(itertools.accumulate(summary.parts for summary in summaries))
    assert [summary.job_committed for summary in summaries] == committed
    assert {summary.job_parts for summary in summaries} == {7}
    names = {path.name for path in manifest_files(out)}
    assert names == {f"_manifest-{k}-of-{count}.jsonl" for k in range(min(count, 7))}
    assert progress[-1] == summaries[-1].inputs
    assert same_rows(read_embeddings(out))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_processes_at_once_write_the_bytes_of_one_run(layout: str, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(whole, layout=layout, part_size=2)
    jobs = [partial(run_shard, out, f"{k}/3", layout=layout, part_size=2) for k in range(3)]
    run_at_once(*jobs)
    assert data_files(out) == data_files(whole)
    assert len(read_manifest(out)) == 25
    assert not list(out.rglob("_draft-*"))
    assert same_rows(read_embeddings(out))


def test_pyarrow_reads_shards_as_one_table(tmp_path: Path) -> None:
    for k in range(3):
        run_shard(tmp_path / "parquet", f"{k}/3")
        run_shard(tmp_path / "npy", f"{k}/3", layout="npy")
    table = ds.dataset(tmp_path / "parquet").to_table()
    assert table["path"].to_pylist() == SOURCES
    assert table["embedding"].null_count == len(BAD)
    table = ds.dataset(tmp_path / "npy/metadata").to_table()
    assert table["image_path"].to_pylist() == [SOURCES[n] for n in GOOD]


def test_a_shard_without_parts_is_done_at_once(tmp_path: Path) -> None:
    model = Digits()
    summary = run_shard(tmp_path, "8/9", model)
    assert (summary.inputs, summary.parts, summary.written, model.asked) == (0, 0, 0, [])
    assert str(summary) == "shard 8/9: embedded 0 of 0 images; wrote 0 of 0 parts"
    assert summary.job_state == (
        "0 of the job's 7 parts are committed; other shards write the rest"
    )


def test_a_model_at_another_place_gives_the_same_bytes(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    run_shard(tmp_path / "out", "0/2")
    moved = Digits()
    moved.source, moved.revision = "other/place", "main"
    run_shard(tmp_path / "out", "1/2", moved)
    assert data_files(tmp_path / "out") == data_files(tmp_path / "whole")


def test_a_streak_of_failures_counts_the_shards_own_inputs(tmp_path: Path) -> None:
    gone = Digits(bad=frozenset(range(8, 24)))  # parts 1 and 2
    for k in range(2):  # each shard has one of the two
        run_shard(tmp_path / "two", f"{k}/2", gone, stop_after=9)
    with pytest.raises(InputError, match=r"9 inputs in a row failed, the last photos/16.jpg"):
        run(tmp_path / "one", gone, stop_after=9)
    own = Digits(bad=frozenset([*range(8), *range(16, 24)]))  # parts 0 and 2 are neighbors in 0/2
    with pytest.raises(InputError, match=r"9 inputs in a row failed, the last photos/16.jpg"):
        run_shard(tmp_path / "own", "0/2", own, stop_after=9)
    assert list(read_manifest(tmp_path / "own")) == [0]


# Going on with another count


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("then", [["0/1"], ["0/2", "1/2"], ["2/3", "1/3", "0/3"]])
def test_any_count_goes_on_with_what_is_missing(
    layout: str, then: list[str], tmp_path: Path
) -> None:
    run(tmp_path / "whole", layout=layout)
    out, model = tmp_path / "out", Digits()
    run_shard(out, "1/3", layout=layout)  # parts 1 and 4
    for shard in then:
        summary = run_shard(out, shard, model, layout=layout)
    expected = [n for n in range(INPUTS) if n // 8 not in (1, 4)]
    assert sorted(model.asked) == expected
    assert summary.job_committed == 7
    assert data_files(out) == data_files(tmp_path / "whole")
    again = Digits()
    assert run(out, again, layout=layout).inputs == INPUTS
    assert again.asked == []


def test_a_shard_makes_its_own_lost_part_again_whoever_wrote_it(tmp_path: Path) -> None:
    run(tmp_path)
    before = data_files(tmp_path)
    for number in (2, 3):
        (tmp_path / f"part-0000{number}.parquet").unlink()
    summary = run_shard(tmp_path, "1/2")
    assert (summary.repaired, summary.written) == ([3], 1)
    assert run_shard(tmp_path, "0/2").repaired == [2]
    assert data_files(tmp_path) == before
    assert same_rows(read_embeddings(tmp_path))


class Slow(Digits):
    """Takes its time, so that a kill finds it at work."""

    def encode_image(self, images: Sequence[Any], **options: Any) -> EncodeResult:
        time.sleep(0.002)
        return super().encode_image(images, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attempts", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_kills_at_random_moments_and_other_counts_lose_and_double_nothing(
    attempts: int, layout: str, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(whole, layout=layout, part_size=1)
    dice = random.Random(layout)
    kills = 0
    for attempt in range(attempts):
        count = dice.choice([1, 2, 3, 4])
        jobs = [
            partial(run_shard, out, f"{k}/{count}", Slow(), layout=layout, part_size=1)
            for k in range(count)
        ]
        with forks(*jobs) as processes:
            time.sleep(dice.uniform(0.005, 0.06))
            processes[dice.randrange(count)].kill()
            if attempt % 2:  # the others go on a little
                time.sleep(dice.uniform(0, 0.02))
            for process in processes:
                process.kill()
            kills += [finish(process) for process in processes].count(-9)
        if (out / JOB).exists():
            result = read_embeddings(out)
            rows = [SOURCES.index(path) for path in result.paths]
            assert rows == sorted(set(rows))
            assert np.array_equal(result.embeddings, vectors(rows))
            if result.missing < 10:
                shutil.rmtree(out)
    assert kills >= attempts
    run_at_once(*(partial(run_shard, out, f"{k}/2", layout=layout, part_size=1) for k in range(2)))
    assert run(out, layout=layout, part_size=1).written == 0
    assert data_files(out) == data_files(whole)
    assert same_rows(read_embeddings(out))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_of_two_and_of_three_shards_at_once(layout: str, tmp_path: Path) -> None:
    """Five processes start together, and each part is wanted by two of them.

    The run of three cannot read some images that the run of two can: their parts have other bytes,
    and no part may have files of both.
    """
    for attempt in range(5):
        out = tmp_path / str(attempt)
        shards = [f"{k}/{count}" for count in (2, 3) for k in range(count)]
        bad = {"2": frozenset(BAD), "3": frozenset(BAD | set(range(20, 30)))}
        run_at_once(
            *(
                partial(
                    run_shard, out, shard, Digits(bad=bad[shard[-1]]), layout=layout, part_size=2
                )
                for shard in shards
            )
        )
        records = part_records(manifest_files(out))
        assert sorted(records) == list(range(25))
        assert {len(copies) for copies in records.values()} == {1}
        lines = [path.read_bytes().count(b"\n") for path in manifest_files(out)]
        assert sum(lines) == 25
        result = read_embeddings(out)
        assert result.missing == 0
        rows = [SOURCES.index(path) for path in result.paths]
        assert np.array_equal(result.embeddings, vectors(rows))
        assert set(rows) >= set(GOOD) - set(range(20, 30))


def test_a_part_is_written_by_one_shard_at_a_time(tmp_path: Path) -> None:
    """A shard waits while a shard of another count writes the part that it has computed."""
    run_shard(tmp_path, "1/2")  # parts 1, 3 and 5
    reading, writing = os.pipe()

    class Announced(Digits):
        def encode_image(self, images: Sequence[Any], **options: Any) -> EncodeResult:
            os.write(writing, b".")
            return super().encode_image(images, **options)

    def third() -> None:
        assert run_shard(tmp_path, "0/3", Announced()).written == 1  # part 6

    descriptor = os.open(tmp_path / PART_LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, 0)  # a fork does not inherit it
    with forks(third) as (process,):
        assert os.read(reading, 1) == b"."
        time.sleep(0.3)
        assert not (tmp_path / "part-00000.parquet").exists()
        donor = tmp_path / "donor"
        run_shard(donor, "0/2")
        shutil.copy(donor / "part-00000.parquet", tmp_path)
        line = (donor / "_manifest-0-of-2.jsonl").read_bytes().splitlines(keepends=True)[0]
        (tmp_path / "_manifest-0-of-2.jsonl").write_bytes(line)
        os.close(descriptor)
        assert finish(process) == 0
    assert [len(copies) for copies in part_records(manifest_files(tmp_path)).values()] == 5 * [1]


# Who may write at the same time


def hold(out: Path, shard: Shard, ready: int) -> None:
    with job_lock(out, shard):
        os.write(ready, b".")
        time.sleep(GUARD)


@pytest.mark.parametrize(
    ("held", "wanted", "told"),
    [
        (["0/1"], "0/1", r"another process is writing there \(process {0} on {host}\); wait for"),
        (["0/1"], "1/3", r"another process is writing there \(process {0} on {host}\); wait for"),
        (
            ["0/3", "2/3"],
            "0/1",
            r"writing there: shard 0/3 \(process {0} on {host}\), "
            r"shard 2/3 \(process {1} on {host}\); wait for it or stop it",
        ),
        (
            ["0/3", "1/3"],
            "1/3",
            r"another process is writing shard 1/3 there \(process {1} on {host}\); .*give each "
            "process a shard of its own",
        ),
    ],
)
def test_a_refusal_names_who_writes(
    held: list[str], wanted: str, told: str, tmp_path: Path
) -> None:
    reading, writing = os.pipe()
    jobs = [partial(hold, tmp_path, Shard.parse(shard), writing) for shard in held]
    with forks(*jobs) as processes:
        for _ in held:
            os.read(reading, 1)
        message = told.format(*(p.pid for p in processes), host=re.escape(socket.gethostname()))
        with pytest.raises(InputError, match=message):
            run_shard(tmp_path, wanted)
    assert run_shard(tmp_path, wanted).written  # their locks ended with them
    assert (tmp_path / LOCK).read_bytes() == b""


def test_a_killed_holder_is_not_named_later(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with forks(partial(hold, tmp_path, WHOLE, writing)):
        os.read(reading, 1)
    assert b"process" in (tmp_path / LOCK).read_bytes()
    with job_lock(tmp_path, Shard(0, 2)), pytest.raises(InputError) as refused:
        run(tmp_path)
    assert f"shard 0/2 (process {os.getpid()} on" in str(refused.value)
    assert str(refused.value).count("process ") == 2


def test_other_shards_and_counts_do_not_exclude_each_other(tmp_path: Path) -> None:
    held = [Shard(0, 3), Shard(1, 3), Shard(0, 2)]
    with job_lock(tmp_path, held[0]), job_lock(tmp_path, held[1]), job_lock(tmp_path, held[2]):
        assert run_shard(tmp_path, "2/3").written == 2


def test_counts_are_noted_once(tmp_path: Path) -> None:
    assert other_counts(tmp_path, 2) == []
    for shard in ("0/2", "1/2", "0/12", "1/3", "2/12", "0/1"):
        run_shard(tmp_path, shard)
    assert other_counts(tmp_path, 2) == [3, 12]
    assert (tmp_path / COUNTS).read_text().split() == ["2", "12", "3"]


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    with pytest.raises(InputError, match="cannot be locked: No locks available; mount"):
        run(tmp_path)


def test_a_shard_deletes_its_own_drafts_and_a_whole_run_all(tmp_path: Path) -> None:
    run_shard(tmp_path, "0/2")
    drafts = ["_draft-1-of-2-part-00001.parquet", "_draft-1-of-20-x", "_draft-part-00003.parquet"]
    for name in drafts:
        (tmp_path / name).write_bytes(b"half")
    run_shard(tmp_path, "0/2")
    assert {path.name for path in tmp_path.glob("_draft-*")} == set(drafts)
    run_shard(tmp_path, "1/2")
    assert {path.name for path in tmp_path.glob("_draft-*")} == set(drafts[1:])
    run(tmp_path)
    assert not list(tmp_path.glob("_draft-*"))


def test_a_full_disk_stops_one_shard_and_keeps_the_drafts_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_shard(tmp_path, "0/2")
    (tmp_path / "_draft-0-of-2-part-00002.parquet").write_bytes(b"being written")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(errno.ENOSPC))
        with pytest.raises(
            InputError, match=r"No space left on device. 4 committed parts are safe"
        ):
            run_shard(tmp_path, "1/2")
    assert [path.name for path in tmp_path.glob("_draft-*")] == ["_draft-0-of-2-part-00002.parquet"]
    assert run_shard(tmp_path, "1/2").written == 3


# The job record


@pytest.mark.parametrize("links", [True, False])
def test_the_record_that_is_there_first_counts(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another shard writes the record between this shard's look and its write."""

    def late(path: Path, data: bytes, mark: str, replace: bool) -> tuple[int, str]:
        path.write_bytes(rival)
        return put_file(path, data, mark, replace)

    run(tmp_path / "whole")
    rival = (tmp_path / "whole" / JOB).read_bytes()
    monkeypatch.setattr(job_record, "put_file", late)
    if not links:
        monkeypatch.setattr(os, "link", failing(errno.EPERM))
    assert run_shard(tmp_path / "a", "0/2").written == 4
    rival = rival.replace(b"f00d", b"beef")
    with pytest.raises(InputError, match=r"fingerprint: then beef, now f00d.*delete this folder"):
        run_shard(tmp_path / "b", "0/2")
    assert (tmp_path / "b" / JOB).read_bytes() == rival
    assert not list(tmp_path.rglob("_draft-*"))


def test_a_job_that_starts_while_the_folder_is_looked_at_is_no_foreign_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.iterdir

    def late(path: Path) -> Iterator[Path]:
        (path / JOB).write_bytes(b"{}")
        return real(path)

    monkeypatch.setattr(Path, "iterdir", late)
    check_folder(tmp_path)


def test_a_file_system_without_links_takes_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole")
    monkeypatch.setattr(os, "link", failing(errno.ENOTSUP))
    run(tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_shard_that_would_overwrite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"overwrite: got it with shard 1/2.*delete the folder"):
        run_shard(tmp_path, "1/2", overwrite=True)
    run_shard(tmp_path, "1/2")
    run(tmp_path, sources=SOURCES[:8], overwrite=True)
    assert [path.name for path in manifest_files(tmp_path)] == ["_manifest.jsonl"]
    assert len(read_embeddings(tmp_path).paths) == 7


def test_shards_do_not_share_one_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="shard 0/2 cannot write one file; name a folder"):
        check_file(tmp_path / "a.npy", False, Shard(0, 2))


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (b"", "is damaged"),
        (b'{"format": 1', "is damaged"),
        (b"[1]", "got format None, wanted 1"),
        (b'{"format": 2, "vitrail": "9.9"}', r"got format 2, wanted 1; .*wrote it \(9.9\)"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(record: bytes, told: str, tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / JOB).write_bytes(record)
    for call in (lambda: run(tmp_path), lambda: read_embeddings(tmp_path)):
        with pytest.raises(InputError, match=f"{JOB}: {told}"):
            call()


def change_record(out: Path, **facts: str) -> None:
    record = json.loads((out / JOB).read_bytes())
    (out / JOB).write_text(json.dumps(record | facts))


def test_another_version_of_vitrail_with_the_same_fingerprint_goes_on(tmp_path: Path) -> None:
    run_shard(tmp_path, "0/2")
    change_record(tmp_path, vitrail="0.0.1")
    assert run_shard(tmp_path, "1/2").job_committed == 7


def test_a_refusal_names_both_versions(tmp_path: Path) -> None:
    run_shard(tmp_path, "0/2")
    change_record(tmp_path, vitrail="0.0.1", fingerprint="other")
    wanted = f"fingerprint: then other, now .*; vitrail: then 0.0.1, now {vitrail.__version__}"
    with pytest.raises(InputError, match=wanted):
        run_shard(tmp_path, "1/2")


# The reader


def test_the_reader_takes_shards_from_several_folders(tmp_path: Path) -> None:
    outs = [tmp_path / f"disk{k}" for k in range(3)]
    for k, out in enumerate(outs):
        run_shard(out, f"{k}/3")
    assert same_rows(read_embeddings(outs))
    assert same_rows(read_embeddings([str(out) for out in reversed(outs)]))
    two = read_embeddings(outs[:2])
    assert two.missing == 16  # of parts 2 and 5
    assert two.missing == INPUTS - len(two.paths) - len(two.errors)
    restored = pickle.loads(pickle.dumps(two))
    assert restored.missing == 16
    assert np.array_equal(restored.embeddings, two.embeddings)
    for out in outs[1:]:  # put together: the names differ, except for the job's record
        shutil.copytree(out, outs[0], dirs_exist_ok=True)
    assert same_rows(read_embeddings(outs[0]))
    assert run(outs[0]).written == 0
    run(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "_manifest.jsonl", outs[0])
    assert {len(copies) for copies in part_records(manifest_files(outs[0])).values()} == {1}


def test_a_part_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run_shard(tmp_path / "b", "1/2")
    folders = [tmp_path / "a", tmp_path / "b"]
    assert same_rows(read_embeddings(folders))
    assert same_rows(read_embeddings([tmp_path / "a", tmp_path / "a"]))
    (tmp_path / "a" / "part-00003.parquet").write_bytes(b"damaged")
    assert same_rows(read_embeddings(folders))
    (tmp_path / "b" / "part-00003.parquet").unlink()
    with pytest.raises(InputError, match=r"a/part-00003.parquet: is not what the manifest says"):
        read_embeddings(folders)


def test_of_two_records_the_one_that_the_files_have_counts(tmp_path: Path) -> None:
    """Part 1 was written with a failure, was lost, and was written again without it."""
    out = tmp_path / "out"
    run_shard(out, "1/2", Digits(bad=frozenset(BAD | {9})), layout="npy")
    (out / "img_emb/img_emb_00001.npy").unlink()
    assert run_shard(out, "1/3", layout="npy").repaired == [1]
    assert {len(r) for n, r in part_records(manifest_files(out)).items() if n == 1} == {2}
    for layout_files in (read_manifest(out)[1].files, read_manifest(out)[1].files):
        assert [name for name, _, _ in layout_files if "failures" in name] == []
    assert run(out, layout="npy").written == 7 - 4
    assert same_rows(read_embeddings(out))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": Digits("beef")}, r"fingerprint: f00d and beef"),
        ({"sources": [*SOURCES[:-1], "9.jpg"]}, r"inputs_sha256: \w+ and \w+"),
        ({"sources": SOURCES[:-1]}, r"inputs: 50 and 49; inputs_sha256"),
        ({"part_size": 9}, r"part_size: 8 and 9"),
        ({"precision": "float16"}, r"dtype: float32 and float16"),
        ({"normalize": True}, r"normalized: False and True"),
        ({"layout": "npy"}, r"layout: parquet and npy"),
    ],
)
def test_folders_of_different_jobs_are_refused(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    run_shard(tmp_path / "a", "0/2")
    run(tmp_path / "b", shard=Shard(1, 2), **change)
    message = rf"/a and .*/b: hold different jobs \({told}.*\), wanted shards of one"
    with pytest.raises(InputError, match=message):
        read_embeddings([tmp_path / "a", tmp_path / "b"])


def test_a_folder_without_a_job_and_no_folder_are_refused(tmp_path: Path) -> None:
    run_shard(tmp_path / "a", "0/2")
    with pytest.raises(InputError, match=r"b: has no _job.json"):
        read_embeddings([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(InputError, match="folders: got none"):
        read_embeddings([])


@pytest.mark.parametrize("shard", ["0/1", "1/2"])
def test_a_damaged_line_of_any_manifest_is_named(shard: str, tmp_path: Path) -> None:
    for name in ("0/2", shard):
        run_shard(tmp_path, name)
    manifest = tmp_path / f"_manifest{Shard.parse(shard).mark}.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b'{"part": 2}\n' + b"".join(lines[1:]))
    for call in (lambda: run(tmp_path), lambda: read_embeddings(tmp_path)):
        with pytest.raises(InputError, match=f"{manifest.name}: line 1 is damaged"):
            call()


def test_a_torn_line_of_one_shard_hides_no_other(tmp_path: Path) -> None:
    for shard in ("0/2", "1/2"):
        run_shard(tmp_path, shard)
    before = files(tmp_path)
    manifest = tmp_path / "_manifest-0-of-2.jsonl"
    os.truncate(manifest, manifest.stat().st_size - 9)
    assert len(read_manifest(tmp_path)) == 6
    assert read_embeddings(tmp_path).missing == 2
    assert run_shard(tmp_path, "1/2").written == 0
    assert run_shard(tmp_path, "0/2").written == 1
    assert files(tmp_path) == before


def test_other_names_are_no_manifests(tmp_path: Path) -> None:
    run(tmp_path)
    for name in ("_manifest-old.jsonl", "_manifest-1-of-2.jsonl.bak", "_manifest-a-of-2.jsonl"):
        (tmp_path / name).write_bytes(b"rubbish\n")
    assert same_rows(read_embeddings(tmp_path))
