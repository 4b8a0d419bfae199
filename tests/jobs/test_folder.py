"""A job's folder: what is committed, what resuming does, and what is refused."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import vitrail
from jobs.digits import BAD, GOOD, INPUTS, SOURCES, WIDTH, Digits, failing, files, run, vectors
from vitrail.errors import InputError
from vitrail.jobs.folder import check_folder
from vitrail.jobs.job_record import JOB
from vitrail.jobs.listing import TarMember
from vitrail.jobs.locks import LOCK
from vitrail.jobs.manifest import MANIFEST, read_embeddings, read_manifest
from vitrail.model.outputs import EncodeResult

# Contents


@pytest.mark.parametrize("layout", ["parquet", "npy"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_job_holds_every_embedding_and_every_failure(
    layout: str, precision: str, tmp_path: Path
) -> None:
    summary = run(tmp_path / "out", layout=layout, precision=precision)
    assert (summary.inputs, summary.failed, summary.parts, summary.written) == (INPUTS, 4, 7, 7)
    result = vitrail.read_embeddings(tmp_path / "out")
    assert result.paths == [SOURCES[n] for n in GOOD]
    assert result.embeddings.dtype == precision
    assert np.array_equal(result.embeddings, vectors(GOOD).astype(precision))
    assert result.errors == [(SOURCES[n], f"{n}.jpg: empty: 0 bytes") for n in sorted(BAD)]
    assert result.job["fingerprint"] == "f00d"


def test_parquet_readers_take_the_folder_as_one_table(tmp_path: Path) -> None:
    run(tmp_path)
    table = pq.read_table(tmp_path).sort_by("path")
    assert table.column_names == ["path", "status", "error", "embedding"]
    assert sorted(table["path"].to_pylist()) == sorted(SOURCES)
    assert table["status"].to_pylist().count("error") == len(BAD)
    assert table["embedding"].type.list_size == WIDTH
    assert table["embedding"].null_count == len(BAD)


def test_the_npy_layout_is_clip_retrievals(tmp_path: Path) -> None:
    run(tmp_path, layout="npy")
    arrays = sorted((tmp_path / "img_emb").iterdir())
    tables = sorted((tmp_path / "metadata").iterdir())
    assert [p.name for p in arrays] == [f"img_emb_{k:05}.npy" for k in range(7)]
    assert [p.name for p in tables] == [f"metadata_{k:05}.parquet" for k in range(7)]
    for array, table in zip(arrays, tables, strict=True):
        paths = pq.read_table(table)["image_path"].to_pylist()
        assert np.array_equal(np.load(array), vectors(int(Path(p).stem) for p in paths))
    assert [p.name for p in sorted((tmp_path / "failures").iterdir())] == [
        f"failures_{k:05}.jsonl" for k in (0, 2, 5)
    ]


def test_the_manifest_has_sizes_and_checksums_of_all_files(tmp_path: Path) -> None:
    import hashlib

    run(tmp_path, layout="npy")
    named = {file for part in read_manifest(tmp_path).values() for file in part.files}
    assert named == {
        (name, len(data), hashlib.sha256(data).hexdigest())
        for name, data in files(tmp_path).items()
        if not name.startswith("_")
    }
    lines = (tmp_path / MANIFEST).read_text().splitlines()
    assert [json.loads(line)["failed"] for line in lines] == [1, 0, 2, 0, 0, 1, 0]


def test_members_of_tars_are_sources(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    run(tmp_path / "out", sources=[TarMember("a.tar", f"{n}.jpg", 0, 0) for n in (5, 6)])
    assert read_embeddings(tmp_path / "out").paths == ["a.tar/5.jpg", "a.tar/6.jpg"]


def test_an_input_given_twice_is_there_twice(tmp_path: Path) -> None:
    twice = ["5.jpg", "3.jpg", "5.jpg", "3.jpg"]
    run(tmp_path, sources=twice)
    result = read_embeddings(tmp_path)
    assert result.paths == ["5.jpg", "5.jpg"]
    assert [path for path, _ in result.errors] == ["3.jpg", "3.jpg"]


def test_an_empty_part_is_a_part(tmp_path: Path) -> None:
    for layout in ("parquet", "npy"):
        out = tmp_path / layout
        summary = run(out, Digits(bad=frozenset(range(10))), SOURCES[:10], layout=layout)
        assert summary.failed == 10
        result = read_embeddings(out)
        assert result.embeddings.shape == (0, WIDTH)
        assert len(result.errors) == 10


# Going on


class Stop(Exception):
    pass


def stopped(out: Path, after: int, **options: Any) -> None:
    """A job that is interrupted once ``after`` parts were asked for."""
    model = Digits()
    real = model.encode_image

    def encode(images: Sequence[Any], **given: Any) -> EncodeResult:
        if len(model.asked) >= 8 * after:
            raise Stop
        return real(images, **given)

    model.encode_image = encode  # type: ignore[method-assign]
    with pytest.raises(Stop):
        run(out, model, **options)


@pytest.mark.parametrize("layout", ["parquet", "npy"])
@pytest.mark.parametrize("after", [0, 1, 6])
def test_the_same_call_goes_on_and_ends_with_the_same_bytes(
    layout: str, after: int, tmp_path: Path
) -> None:
    run(tmp_path / "whole", layout=layout)
    out = tmp_path / "out"
    stopped(out, after, layout=layout)
    assert len(read_manifest(out)) == after
    model = Digits()
    summary = run(out, model, layout=layout)
    assert model.asked == list(range(8 * after, INPUTS))
    assert (summary.inputs, summary.failed, summary.written) == (INPUTS, 4, 7 - after)
    assert files(out) == files(tmp_path / "whole")


def test_a_finished_job_is_left_alone(tmp_path: Path) -> None:
    run(tmp_path)
    before, model = files(tmp_path), Digits()
    summary = run(tmp_path, model)
    assert model.asked == []
    assert (summary.written, summary.inputs, summary.failed) == (0, INPUTS, 4)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sources": SOURCES[:-1]}, "inputs: then 50, now 49"),
        ({"sources": [*SOURCES[:-1], "photos/99.jpg"]}, "inputs_sha256: then"),
        ({"sources": [SOURCES[1], SOURCES[0], *SOURCES[2:]]}, "inputs_sha256: then"),
        ({"model": Digits("beef")}, "fingerprint: then f00d, now beef"),
        ({"part_size": 9}, "part_size: then 8, now 9"),
        ({"batch_size": 4}, "batch_size: then None, now 4"),
        ({"layout": "npy"}, "layout: then parquet, now npy"),
        ({"precision": "float16"}, "dtype: then float32, now float16"),
        ({"normalize": True}, "normalized: then False, now True"),
        ({"size": (32, 48)}, r"size: then None, now \[32, 48\]"),
    ],
)
def test_another_configuration_is_refused(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    stopped(tmp_path, 2)
    before = files(tmp_path)
    with pytest.raises(InputError, match=told):
        run(tmp_path, **change)
    assert files(tmp_path) == before


def test_overwrite_begins_anew_and_removes_no_other_file(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    run(tmp_path, Digits("beef"), SOURCES[:9], layout="npy", overwrite=True)
    assert len(read_embeddings(tmp_path).paths) == 8
    assert not list(tmp_path.glob("part-*"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("harm", ["deleted", "cut"])
def test_a_part_whose_file_is_gone_or_cut_is_made_again(harm: str, tmp_path: Path) -> None:
    run(tmp_path)
    before = files(tmp_path)
    file = tmp_path / "part-00003.parquet"
    file.unlink() if harm == "deleted" else os.truncate(file, 100)
    model = Digits()
    summary = run(tmp_path, model)
    assert (summary.repaired, summary.written, model.asked) == ([3], 1, list(range(24, 32)))
    after = files(tmp_path)
    assert after.pop(MANIFEST) != before.pop(MANIFEST)
    assert after == before
    assert len(read_embeddings(tmp_path).paths) == len(GOOD)


@pytest.mark.parametrize("left", [1, 40, -1])
def test_a_torn_last_line_is_no_commit(left: int, tmp_path: Path) -> None:
    run(tmp_path)
    before = files(tmp_path)
    lines = before[MANIFEST].splitlines(keepends=True)
    (tmp_path / MANIFEST).write_bytes(b"".join(lines[:-1]) + lines[-1][:left])
    assert len(read_manifest(tmp_path)) == 6
    assert run(tmp_path).written == 1
    assert files(tmp_path) == before


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    run(tmp_path)
    lines = (tmp_path / MANIFEST).read_bytes().splitlines(keepends=True)
    (tmp_path / MANIFEST).write_bytes(b"".join([*lines[:2], b'{"part": 2}\n', *lines[3:]]))
    for call in (lambda: run(tmp_path), lambda: read_embeddings(tmp_path)):
        with pytest.raises(InputError, match="line 3 is damaged"):
            call()


@pytest.mark.parametrize("at", [10, 200, -5])
def test_one_changed_bit_is_noticed_by_the_reader(at: int, tmp_path: Path) -> None:
    run(tmp_path)
    file = tmp_path / "part-00004.parquet"
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"part-00004.parquet: is not what the manifest says"):
        read_embeddings(tmp_path)


def test_what_the_manifest_does_not_name_is_not_read(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "part-00099.parquet").write_bytes(b"rubbish")
    assert len(read_embeddings(tmp_path).paths) == len(GOOD)


# Refusals and faults


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=rf"holds 'cat.jpg' and no {JOB}"):
        check_folder(tmp_path)
    with pytest.raises(InputError, match="is a file, wanted a folder"):
        check_folder(tmp_path / "cat.jpg")
    with pytest.raises(InputError, match="wanted the folder of a vitrail embed job"):
        read_embeddings(tmp_path)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    run(tmp_path)
    with open(tmp_path / LOCK, "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is writing there"):
            run(tmp_path)
    assert run(tmp_path).written == 0


def test_many_failures_in_a_row_stop_the_job_before_their_part(tmp_path: Path) -> None:
    gone = Digits(bad=frozenset(range(20, 50)))
    with pytest.raises(InputError, match=r"20 inputs in a row failed, the last photos/39.jpg"):
        run(tmp_path, gone, part_size=25, stop_after=20)
    assert len(read_manifest(tmp_path)) == 1
    assert run(tmp_path, Digits(bad=frozenset()), part_size=25, stop_after=20).failed == 5
    unlimited = tmp_path / "other"
    assert run(unlimited, gone, part_size=25, stop_after=0).failed == 30


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
def test_a_full_disk_keeps_what_is_committed_and_says_what_to_do(
    code: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole")
    out = tmp_path / "out"
    stopped(out, 3)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(code))
        with pytest.raises(InputError, match=f"{os.strerror(code)}.*3 committed parts are safe"):
            run(out)
    assert not list(out.rglob("_draft-*"))
    assert run(out).written == 4
    assert files(out) == files(tmp_path / "whole")


def test_a_disk_that_reads_back_otherwise_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: real(path)[:-1] + b"?")
    with pytest.raises(InputError, match="reads back differently than it was written"):
        run(tmp_path)


def test_a_value_beyond_float16_is_an_error_and_no_infinity(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="float16 output: got an embedding value of"):
        run(tmp_path, sources=["5.jpg", "900.jpg"], precision="float16")
    assert read_manifest(tmp_path) == {}
