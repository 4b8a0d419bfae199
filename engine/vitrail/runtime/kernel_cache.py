"""Compiled kernels on disk, by content: a warm start compiles nothing and reads none of Triton.

    <folder>/<64 hex digits>.kernel     MAGIC, SHA-256 of the rest, the record for C++

The folder is the one that VITRAIL_CACHE names, else vitrail/kernels in $XDG_CACHE_HOME or ~/.cache.
A name is the SHA-256 of all that the record follows from, so no entry is ever out of date, and two
processes may write one at once: each writes a file of its own and renames it. An entry that is not
as it was written is compiled again and replaced. At most `MOST_ENTRIES` stay, of 30 to 150 KB each.
If the folder cannot be used, kernels are compiled in every process, and one warning says so.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from vitrail.plan.lowering import IMAGE_MAGIC, image_record
from vitrail.plan.record import string
from vitrail_kernels import Call
from vitrail_kernels.toolchain import code_settings, triton_build

VARIABLE = "VITRAIL_CACHE"
"""Names the folder; set to nothing there is no cache."""
MAGIC = b"vitrail kernel 1\n"
MOST_ENTRIES = 4096
MOST_BYTES = 16 << 20
"""Of an entry that is read."""

_warned: set[tuple[Path, bool]] = set()


def kernel_record(key: str, call: Call, arch: int) -> bytes:
    """`image_record` of ``call``, whose `image_key` is ``key``: from the folder, else compiled and
    kept there. Raises VitrailError if it does not compile."""
    path = _path(key)
    record = None if path is None else _read(path, key)
    if record is None:
        record = image_record(key, call, arch)
        if path is not None:
            _write(path, record)
    return record


def keep(key: str, record: bytes) -> None:
    """Keep a record that was compiled elsewhere."""
    path = _path(key)
    if path is not None:
        _write(path, record)


def folder() -> Path | None:
    """Where entries are; None if the user wants no cache."""
    own = os.environ.get(VARIABLE)
    if own is not None:
        return Path(own) if own else None
    base = os.environ.get("XDG_CACHE_HOME")
    # the specification: a relative path is ignored
    root = Path(base) if base and os.path.isabs(base) else Path(os.path.expanduser("~/.cache"))
    return root / "vitrail/kernels"


def _path(key: str) -> Path | None:
    root = folder()
    if root is None or os.environ.get("TRITON_ALWAYS_COMPILE") == "1":
        return None
    parts = MAGIC, key, triton_build(), code_settings()
    return root / f"{hashlib.sha256(repr(parts).encode()).hexdigest()}.kernel"


def _read(path: Path, key: str) -> bytes | None:
    """The record in ``path``; None if there is none, or another than was written."""
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(path.parent, error)
        return None
    head, record = raw[: len(MAGIC) + 32], raw[len(MAGIC) + 32 :]
    whole = head == MAGIC + hashlib.sha256(record).digest()
    return record if whole and record.startswith(IMAGE_MAGIC + string(key)) else None


def _write(path: Path, record: bytes) -> None:
    try:
        _prepare(path.parent)
        with _draft(path) as file:
            file.write(MAGIC + hashlib.sha256(record).digest() + record)
        _prune(path.parent)
    except OSError as error:
        _warn(path.parent, error)


def _prepare(root: Path) -> None:
    """The folder, its owner's alone if it is new."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        _warn(root, "others can write there, and what they write runs on your GPU")


@contextmanager
def _draft(path: Path) -> Iterator[BinaryIO]:
    """A file beside ``path`` that takes its place once all is written, or goes. It is not synced:
    what a crash cuts off is compiled again."""
    descriptor, name = tempfile.mkstemp(".draft", f".{path.name[:16]}.", path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def _prune(root: Path) -> None:
    """Let the oldest quarter go once there are more than `MOST_ENTRIES`."""
    names = os.listdir(root)
    if len(names) <= MOST_ENTRIES:
        return
    ages = []
    for name in names:
        with suppress(OSError):  # another process may prune too
            ages.append((os.stat(root / name).st_mtime_ns, name))
    for _, name in sorted(ages)[: MOST_ENTRIES // 4]:
        with suppress(OSError):
            os.unlink(root / name)


def _warn(root: Path, why: OSError | str) -> None:
    """Once a process for each folder, of what fails and of who may write."""
    broken = isinstance(why, OSError)
    if (root, broken) in _warned:
        return
    _warned.add((root, broken))
    if isinstance(why, OSError):
        why = f"{why.strerror or why}, so kernels are compiled in every process"
    warnings.warn(
        f"kernel cache: {root}: {why}; {VARIABLE} names another folder",
        RuntimeWarning,
        stacklevel=2,
    )
