"""Tensor bytes are those of the file whose header was read."""

from __future__ import annotations

import dataclasses
import mmap
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from checkpoint.samples import contents, packed, refused, tensor, write
from vitrail.checkpoint.header import read_header
from vitrail.checkpoint.tensors import TensorEntry, TensorReader
from vitrail.errors import InputError


def one_tensor(folder: Path, size: int = 1000) -> tuple[TensorEntry, bytes]:
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tobytes()
    header = {"first": tensor(shape=[7], offsets=[0, 7]), "w": tensor("U8", [size], [7, 7 + size])}
    path = write(folder / "model.safetensors", packed(header, bytes(7) + data))
    return read_header(path)["w"], data


@pytest.mark.parametrize("most", [1, 3, 999])
def test_short_reads_are_continued(
    most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entry, data = one_tensor(tmp_path)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:most]], at))
    assert contents({"w": entry}) == {"w": data}
    assert read_header(entry.file)["w"] == entry


def test_a_range_lands_where_it_is_wanted_and_nowhere_else(tmp_path: Path) -> None:
    entry, data = one_tensor(tmp_path)
    out = bytearray(b"\xaa" * 100)
    with TensorReader() as reader:
        reader.read_into(entry, 990, memoryview(out)[40:50])
        assert out == b"\xaa" * 40 + data[990:] + b"\xaa" * 50
        values = np.zeros((5, 10), dtype=np.float32)
        reader.read_into(entry, 4, values.data)
        assert values.tobytes() == data[4:204]
        reader.read_into(entry, 1000, memoryview(bytearray()))


@pytest.mark.parametrize(
    ("start", "out", "message"),
    [
        (-1, bytearray(1), "got bytes -1 to 0, wanted a range within its 1000"),
        (991, bytearray(10), "got bytes 991 to 1001, wanted a range within its 1000"),
        (1001, bytearray(), "got bytes 1001 to 1001, wanted a range within"),
        (0, bytes(10), "read-only or strided"),
        (0, memoryview(bytearray(10))[::2], "read-only or strided"),
    ],
    ids=["before", "past", "past by nothing", "read-only", "strided"],
)
def test_a_wrong_range_or_buffer_is_an_input_error(
    start: int, out: bytes | bytearray | memoryview, message: str, tmp_path: Path
) -> None:
    entry, _ = one_tensor(tmp_path)
    with TensorReader() as reader, pytest.raises(InputError, match=message):
        reader.read_into(entry, start, memoryview(out))


def descriptors() -> set[str]:
    return {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}


def test_a_file_is_opened_once_and_closed_with_the_reader(tmp_path: Path) -> None:
    entry, _ = one_tensor(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    with TensorReader() as reader:
        assert str(entry.file) not in descriptors()
        for start in range(50):
            reader.read_into(entry, start, memoryview(bytearray(10)))
        assert str(entry.file) in descriptors()
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before
    reader.close()
    with pytest.raises(InputError, match="got a read after close"):
        reader.read_into(entry, 0, memoryview(bytearray(1)))


def test_nothing_is_mapped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry, data = one_tensor(tmp_path, 1 << 20)
    monkeypatch.setattr(mmap, "mmap", None)
    with TensorReader() as reader:
        out = bytearray(entry.nbytes)
        reader.read_into(entry, 0, memoryview(out))
        assert str(entry.file) not in Path("/proc/self/maps").read_text()
    assert out == data


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 500)


def replace(path: Path) -> None:
    copy = path.with_suffix(".new")
    shutil.copy2(path, copy)
    os.replace(copy, path)


def overwrite(path: Path) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


CHANGES: dict[Callable[[Path], None], str] = {
    truncate: "was truncated while loading",
    replace: "was changed or replaced while loading",
    overwrite: "was changed or replaced while loading",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_file_that_changed_since_its_header_was_read_is_refused(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    entry, _ = one_tensor(tmp_path)
    change(entry.file)
    refused(lambda: contents({"w": entry}), f"{entry.file}: {CHANGES[change]}; load it again")


@pytest.mark.parametrize("change", [truncate, overwrite], ids=lambda change: change.__name__)
def test_a_file_that_changes_between_two_reads_or_during_one_is_refused(
    change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entry, data = one_tensor(tmp_path)
    with TensorReader() as reader:
        out = bytearray(100)
        reader.read_into(entry, 0, memoryview(out))
        assert out == data[:100]
        change(entry.file)
        refused(lambda: reader.read_into(entry, 0, memoryview(out)), CHANGES[change])

    entry, data = one_tensor(tmp_path)
    real = os.preadv

    def read_then_change(fd: int, views: list[memoryview], at: int) -> int:
        count = real(fd, [views[0][:50]], at)
        monkeypatch.setattr(os, "preadv", real)
        change(entry.file)
        return count

    with TensorReader() as reader:
        monkeypatch.setattr(os, "preadv", read_then_change)
        refused(lambda: reader.read_into(entry, 0, memoryview(out)), CHANGES[change])


def test_a_file_that_ends_early_is_an_error_and_not_a_signal(tmp_path: Path) -> None:
    entry, _ = one_tensor(tmp_path)
    unstamped = dataclasses.replace(entry, stamp=None)
    truncate(entry.file)
    message = refused(lambda: contents({"w": unstamped}), "was truncated while loading, at byte ")
    assert message.endswith(str(entry.file.stat().st_size))


def test_a_file_that_vanished_is_an_error(tmp_path: Path) -> None:
    entry, _ = one_tensor(tmp_path)
    entry.file.unlink()
    refused(lambda: contents({"w": entry}), "cannot be read: No such file or directory")


def test_threads_share_a_reader_and_get_the_bytes_they_asked_for(tmp_path: Path) -> None:
    entry, data = one_tensor(tmp_path, 100_000)
    wrong: list[int] = []
    start = threading.Barrier(32)

    def read(reader: TensorReader, number: int) -> None:
        starts = np.random.default_rng(number).integers(0, 99_000, 100).tolist()
        start.wait()
        for at in starts:
            out = bytearray(1000)
            reader.read_into(entry, at, memoryview(out))
            if out != data[at : at + 1000]:
                wrong.append(at)

    before = len(os.listdir("/proc/self/fd"))
    with TensorReader() as reader:
        threads = [threading.Thread(target=read, args=(reader, number)) for number in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert wrong == []
