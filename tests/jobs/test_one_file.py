from __future__ import annotations

import csv
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from vitrail.errors import InputError
from vitrail.jobs.embedder import ModelEmbedder, cut_chunks
from vitrail.jobs.one_file import ROW_GROUP, check_file, embed_to_file
from vitrail.jobs.rows import EmbedOptions, Summary
from vitrail.model.outputs import EncodeResult

WIDTH = 5


def vector(path: Path) -> list[float]:
    """What the fake model makes of a file: numbers that no other file gives."""
    return [float(byte) / 3 for byte in path.read_bytes().ljust(WIDTH)[:WIDTH]]


class FakeModel:
    """``encode_image`` as documented; a file that starts with ``bad`` cannot be read."""

    name = "some/model"
    revision = "abc"
    fingerprint = "f00d"
    precision = "float32"
    spec = SimpleNamespace(architecture="Fake", vision=SimpleNamespace(embedding=WIDTH))

    def __init__(self) -> None:
        self.calls: list[tuple[int, dict[str, Any]]] = []

    def encode_image(self, images: Sequence[Path], **options: Any) -> EncodeResult:
        self.calls.append((len(images), options))
        errors = {
            i: f"image {i}: {path.name}: not an image"
            for i, path in enumerate(images)
            if path.read_bytes().startswith(b"bad")
        }
        index = tuple(i for i in range(len(images)) if i not in errors)
        rows = [vector(images[i]) for i in index]
        return EncodeResult(torch.tensor(rows).reshape(-1, WIDTH), index, errors)


def embed(
    model: Any,
    sources: Sequence[Any],
    out: Path,
    progress: Callable[[int], None] = lambda done: None,
    **options: Any,
) -> Summary:
    return embed_to_file(ModelEmbedder(model), sources, out, EmbedOptions(**options), progress)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Seven inputs, of which the third and the last cannot be read."""
    paths = [tmp_path / "photos" / f"{i}.jpg" for i in range(7)]
    touch(tmp_path / "photos", *(path.name for path in paths))
    for i in (2, 6):
        paths[i].write_bytes(b"bad")
    return paths


GOOD = [0, 1, 3, 4, 5]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


# Embedding


def test_a_few_batches_go_to_the_model_at_a_time(photos: list[Path]) -> None:
    model = FakeModel()
    options: dict[str, Any] = {"batch_size": 1, "size": (8, 9), "normalize": True}
    settings = EmbedOptions(**options)
    embedder: Any = ModelEmbedder(model)  # type: ignore[arg-type]
    batches = list(embedder.rows(cut_chunks(photos, settings), settings))
    assert model.calls == [(n, options | {"on_error": "skip"}) for n in (4, 3)]
    assert [list(rows.sources) for rows in batches] == [photos[:4], photos[4:]]
    assert [len(rows.embeddings) for rows in batches] == [3, 2]
    assert batches[0].errors == [None, None, "2.jpg: not an image", None]


def test_npy_holds_the_good_rows_and_its_table_every_input(
    photos: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.npy"
    counts: list[int] = []
    summary = embed(FakeModel(), photos, out, batch_size=1, progress=counts.append)
    array = np.load(out)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, np.float32([vector(photos[i]) for i in GOOD]))
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [str(path) for path in photos]
    assert [row["row"] for row in rows] == ["0", "1", "", "2", "3", "4", ""]
    assert [row["status"] for row in rows] == ["error" if i in (2, 6) else "ok" for i in range(7)]
    assert rows[6]["error"] == "6.jpg: not an image"
    assert rows[0]["error"] == ""
    about = json.loads((tmp_path / "out.json").read_text())
    assert (about["inputs"], about["embedded"], about["width"]) == (7, 5, WIDTH)
    assert (about["model"], about["revision"], about["fingerprint"]) == (
        "some/model",
        "abc",
        "f00d",
    )
    assert counts == [4, 7]
    assert (summary.inputs, summary.failed) == (7, 2)
    assert summary.reasons[0] == (photos[2], "2.jpg: not an image")


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_parquet_holds_every_input_and_says_what_made_it(
    precision: Any, photos: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.parquet"
    embed(FakeModel(), photos, out, precision=precision, size=(8, 9), normalize=True)
    table = pq.read_table(out)
    scalar = pa.float16() if precision == "float16" else pa.float32()
    assert table.schema.field("embedding").type == pa.list_(scalar, WIDTH)
    rows = table.to_pylist()
    assert [row["path"] for row in rows] == [str(path) for path in photos]
    assert [row["status"] for row in rows] == ["error" if i in (2, 6) else "ok" for i in range(7)]
    assert [row["error"] is None for row in rows] == [i in GOOD for i in range(7)]
    for i, row in enumerate(rows):
        expected = np.array(vector(photos[i]), precision).tolist() if i in GOOD else None
        assert row["embedding"] == expected
    about = json.loads(table.schema.metadata[b"vitrail"])
    assert about["size"] == [8, 9]
    assert about["normalized"] is True
    assert about["dtype"] == precision
    assert about["compute_dtype"] == "float32"
    assert about["fingerprint"] == "f00d"


def test_parquet_rows_are_grouped_whatever_the_batch(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    paths = [tmp_path / "a.jpg"] * (ROW_GROUP + 5)
    embed(FakeModel(), paths, tmp_path / "out.parquet", batch_size=100)
    file = pq.ParquetFile(tmp_path / "out.parquet")
    assert file.metadata.num_rows == ROW_GROUP + 5
    assert file.num_row_groups == 2


def test_float16_npy_is_the_rounded_array(photos: list[Path], tmp_path: Path) -> None:
    embed(FakeModel(), photos, tmp_path / "out.npy", precision="float16")
    expected = np.float32([vector(photos[i]) for i in GOOD]).astype(np.float16)
    array = np.load(tmp_path / "out.npy")
    assert array.dtype == np.float16
    np.testing.assert_array_equal(array, expected)


def test_a_value_beyond_float16_is_refused_rather_than_written_as_infinity(
    photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "vector", lambda path: [7e4] * WIDTH)
    with pytest.raises(InputError, match=r"got an embedding value of 7e\+04, wanted < 65504"):
        embed(FakeModel(), photos, tmp_path / "out.npy", precision="float16")
    assert left(tmp_path) == []


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_names_that_are_not_utf8_or_span_lines_survive(suffix: str, tmp_path: Path) -> None:
    names = [b"caf\xe9.jpg", b'two\nlines, "quoted".jpg', "naïve.jpg".encode()]
    paths = [Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)) for name in names]
    for path in paths:
        path.write_bytes(b"x")
    embed(FakeModel(), paths, tmp_path / f"out{suffix}")
    if suffix == ".npy":
        with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
            paths_written = [row["path"] for row in csv.DictReader(file)]
    else:
        paths_written = pq.read_table(tmp_path / "out.parquet").column("path").to_pylist()
    expected = ["caf\\xe9.jpg", 'two\nlines, "quoted".jpg', "naïve.jpg"]
    assert paths_written == [f"{tmp_path}/{name}" for name in expected]


# Outputs that fail


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_nothing_is_written_where_every_input_fails(
    suffix: str, photos: list[Path], tmp_path: Path
) -> None:
    summary = embed(FakeModel(), [photos[2], photos[6]], tmp_path / f"out{suffix}")
    assert (summary.inputs, summary.failed) == (2, 2)
    assert left(tmp_path) == []


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interruption_leaves_no_file_and_the_old_one_whole(
    error: type[BaseException], suffix: str, photos: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / f"out{suffix}"

    def stop(done: int) -> None:
        if done >= 4:
            raise error

    for former in ([], [out]):
        for path in former:
            path.write_bytes(b"old")
        with pytest.raises(error):
            embed(FakeModel(), photos, out, batch_size=1, overwrite=True, progress=stop)
        assert left(tmp_path) == [path.name for path in former]
    assert out.read_bytes() == b"old"


@contextmanager
def file_size_limit(count: int) -> Iterator[None]:
    """A disk that is full after ``count`` bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_a_full_disk_is_one_clean_error_and_leaves_nothing(suffix: str, tmp_path: Path) -> None:
    touch(tmp_path / "photos", "a.jpg")
    paths = [tmp_path / "photos" / "a.jpg"] * 20_000
    with (
        file_size_limit(1000),
        pytest.raises(InputError, match=rf"out{suffix}: cannot be written: .*[Ff]ile too large"),
    ):
        embed(FakeModel(), paths, tmp_path / f"out{suffix}", batch_size=5000)
    assert left(tmp_path) == []


def test_existing_outputs_are_kept_unless_overwritten(photos: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    (tmp_path / "out.csv").write_text("mine")
    with pytest.raises(InputError, match=r"out.csv: exists already \(--overwrite"):
        embed(FakeModel(), photos, out)
    assert left(tmp_path) == ["out.csv"]
    embed(FakeModel(), photos, out, overwrite=True)
    assert left(tmp_path) == ["out.csv", "out.json", "out.npy"]
    assert len(np.load(out)) == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.txt", "got the extension '.txt', wanted .npy or .parquet"),
        ("out", "got the extension '', wanted .npy"),
        ("nowhere/out.npy", "the folder .*nowhere does not exist"),
        ("folder.npy", "is a folder, wanted the name of a file"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_any_work(
    name: str, message: str, photos: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "folder.npy").mkdir()
    model = FakeModel()
    with pytest.raises(InputError, match=message):
        embed(model, photos, tmp_path / name, overwrite=True)
    assert model.calls == []


def test_a_folder_without_write_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(InputError, match=r"the folder .* is not writable"):
        check_file(tmp_path / "out.npy", overwrite=False)


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs pyarrow: pip install 'vitrail\[parquet\]'"):
        check_file(tmp_path / "out.parquet", overwrite=False)


def test_a_model_without_an_image_tower_is_refused(photos: list[Path], tmp_path: Path) -> None:
    model = FakeModel()
    model.spec = SimpleNamespace(architecture="CLIPTextModel", vision=None)
    with pytest.raises(InputError, match="CLIPTextModel has no image tower"):
        embed(model, photos, tmp_path / "out.npy")
