"""Only regular files are opened; the reason of the system is given."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from checkpoint.samples import CONFIG, GOOD, checkpoint_folder, contents, packed, refused, write
from gauge import within
from vitrail.checkpoint.files import open_checkpoint
from vitrail.checkpoint.header import read_header
from vitrail.checkpoint.strict_json import read_json


@contextmanager
def special_file(kind: str, folder: Path) -> Iterator[Path]:
    path = folder / "model.safetensors"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a device":
        path = Path("/dev/zero")
    if kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            before = os.getcwd()
            os.chdir(folder)  # a socket's path is limited to 107 bytes
            server.bind(path.name)
            os.chdir(before)
            yield path
    else:
        yield path


@pytest.mark.machine
@pytest.mark.parametrize("kind", ["a folder", "a FIFO", "a device", "a socket"])
@pytest.mark.parametrize("read", [read_header, read_json], ids=["header", "json"])
def test_what_is_not_a_regular_file_is_refused_at_once(
    kind: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    with special_file(kind, tmp_path) as path, within(1.0):
        refused(lambda: read(path), str(path), f"got {kind}, wanted a regular file")


@pytest.mark.machine
def test_a_fifo_swapped_in_after_the_first_look_does_not_hang(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write(tmp_path / "model.safetensors", packed(GOOD))
    real = os.open

    def swap(name: Any, flags: int) -> int:
        path.unlink()
        os.mkfifo(path)
        return real(name, flags)

    monkeypatch.setattr(os, "open", swap)
    before = len(os.listdir("/proc/self/fd"))
    with within(1.0):
        refused(lambda: read_header(path), "got a FIFO, wanted a regular file")
    assert len(os.listdir("/proc/self/fd")) == before


@contextmanager
def without_rights(path: Path) -> Iterator[None]:
    """Nothing may read ``path``; the superuser, for whom that means little, becomes nobody."""
    mode = path.stat().st_mode
    path.chmod(0)
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)
        path.chmod(mode)


@pytest.mark.parametrize("denied", ["config.json", "model.safetensors", "."])
def test_permission_denied_is_the_reason_given(denied: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = checkpoint_folder(Path(name))
        folder.chmod(0o755)
        with without_rights(folder / denied):
            where = str(folder / denied)
            refused(lambda: open_checkpoint(folder), where, "cannot be read: Permission denied")
        assert open_checkpoint(folder).config == CONFIG


@pytest.mark.parametrize("fault", [errno.EIO, errno.ESTALE])
def test_a_disk_error_is_the_reason_given(
    fault: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = checkpoint_folder(tmp_path)

    def fail(*_: object) -> int:
        raise OSError(fault, os.strerror(fault))

    entry = read_header(folder / "model.safetensors")["w"]
    monkeypatch.setattr(os, "preadv", fail)
    reason = f"cannot be read: {os.strerror(fault)}"
    refused(lambda: read_header(folder / "model.safetensors"), "model.safetensors: ", reason)
    refused(lambda: read_json(folder / "config.json"), "config.json: ", reason)
    refused(lambda: contents({"w": entry}), "model.safetensors: ", reason)
