"""Compiled kernels on disk: a warm start compiles nothing and imports no compiler.

    <folder>/<64 hex digits>.kernel     SHA-256 of the kernel binary, then the binary

The folder is $VITRAIL_CACHE, or else vitrail/kernels in $XDG_CACHE_HOME or ~/.cache. The name of an
entry is the SHA-256 of everything that determines the binary, so an entry is never out of date. Two
processes may write an entry at once: each writes its own draft and renames it. A damaged entry is
compiled again and replaced. The folder keeps at most `MAX_ENTRIES` entries of 30 to 150 KB. If the
folder cannot be used, every process compiles its kernels, and one warning says so.
"""

import hashlib
import os
import stat
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary

from vitrail import fork
from vitrail.durable import draft_files
from vitrail.plan.kernel_binary import KERNEL_MAGIC, compile_binary
from vitrail.plan.record import string
from vitrail_kernels import Call
from vitrail_kernels.toolchain import code_settings, triton_build

VARIABLE = "VITRAIL_CACHE"
"""Names the folder. If it is set to the empty string, there is no cache."""
DIGEST_BYTES = 32
MAX_ENTRIES = 4096
MAX_ENTRY_BYTES = 16 << 20

_warned: set[tuple[Path, bool]] = set()
_turns: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()
"""By key, while threads ask for it."""
_turns_lock = fork.lock()


def kernel_record(key: str, call: Call, arch: int) -> bytes:
    """The kernel binary of ``call``, whose `kernel_key` is ``key``.

    The function reads it from the folder. If it is not there, the function compiles the kernel and
    stores the binary. Replicas ask for the same kernels at once: the first compiles, the others
    wait and read. Raises VitrailError if the kernel does not compile.
    """
    path = _path(key)
    with _turns_lock:
        turn = _turns.get(key)
        if turn is None:
            turn = _turns[key] = fork.lock(brief=False)
    with turn:
        record = None if path is None else _read(path, key)
        if record is None:
            record = compile_binary(key, call, arch)
            keep(key, record)
        return record


def keep(key: str, record: bytes) -> None:
    """Store a kernel binary that was compiled elsewhere."""
    path = _path(key)
    if path is not None:
        _write(path, record)


def folder() -> Path | None:
    """The folder of the entries; None if the user wants no cache."""
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return Path(chosen) if chosen else None
    base = os.environ.get("XDG_CACHE_HOME")
    # the XDG specification says: ignore a relative path
    root = Path(base) if base and os.path.isabs(base) else Path(os.path.expanduser("~/.cache"))
    return root / "vitrail/kernels"


def _path(key: str) -> Path | None:
    root = folder()
    if root is None or os.environ.get("TRITON_ALWAYS_COMPILE") == "1":
        return None
    content = KERNEL_MAGIC, key, triton_build(), code_settings()
    return root / f"{hashlib.sha256(repr(content).encode()).hexdigest()}.kernel"


def _read(path: Path, key: str) -> bytes | None:
    """The kernel binary in ``path``; None if the file is missing or damaged."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_ENTRY_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(path.parent, error)
        return None
    digest, record = raw[:DIGEST_BYTES], raw[DIGEST_BYTES:]
    intact = digest == hashlib.sha256(record).digest()
    return record if intact and record.startswith(KERNEL_MAGIC + string(key)) else None


def _write(path: Path, record: bytes) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.parent.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            _warn(path.parent, "others can write there, and their kernels run on your GPU")
        with draft_files([path]) as drafts:
            (draft,) = drafts
            draft.touch(0o600, exist_ok=False)
            # not synced: an entry that a crash cuts off is damaged and compiled again
            draft.write_bytes(hashlib.sha256(record).digest() + record)
            draft.replace(path)
        _prune(path.parent)
    except OSError as error:
        _warn(path.parent, error)


def _prune(root: Path) -> None:
    """Delete the oldest quarter of the entries if there are more than `MAX_ENTRIES`."""
    names = os.listdir(root)
    if len(names) <= MAX_ENTRIES:
        return
    ages = []
    for name in names:
        with suppress(OSError):  # another process may prune too
            ages.append((os.stat(root / name).st_mtime_ns, name))
    for _, name in sorted(ages)[: MAX_ENTRIES // 4]:
        with suppress(OSError):
            os.unlink(root / name)


def _warn(root: Path, why: OSError | str) -> None:
    """Warn once per process and folder of each problem: it cannot be used, or others can write."""
    unusable = isinstance(why, OSError)
    if (root, unusable) in _warned:
        return
    _warned.add((root, unusable))
    if isinstance(why, OSError):
        why = f"{why.strerror or why}, so kernels are compiled in every process"
    warnings.warn(
        f"kernel cache: {root}: {why}; {VARIABLE} names another folder",
        RuntimeWarning,
        stacklevel=2,
    )
