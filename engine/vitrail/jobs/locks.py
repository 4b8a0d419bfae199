"""The locks of a job's folder: a run that writes all parts is alone; shards share the folder.

The locks are flock's: they end with the process, however it ends, and reach the other machines of
a shared file system, unless it was mounted with locks of this machine alone (NFS: nolock or
local_lock). Even then no two shards of one count write the same file.
"""

import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from vitrail import fork
from vitrail.errors import InputError
from vitrail.jobs.shards import Shard

LOCK = "_lock"
PART_LOCK = "_lock-parts"  # a byte for each part
COUNTS = "_lock-counts"  # the counts of shards that have started, one a line

_COUNTS_BYTE = 1 << 40  # of PART_LOCK: beyond all parts

_ONE_PART = fork.lock(brief=False)  # POSIX locks do not part the threads of a process


@contextmanager
def job_lock(out: Path, shard: Shard) -> Iterator[None]:
    """Admits one run that writes all parts, or one process for each shard. Makes the folder.

    Raises InputError that names the holder if the folder or the shard is locked, and if the file
    system refuses locks.
    """
    alone = shard.count == 1
    with ExitStack() as locks:
        if not locks.enter_context(_locked(out, LOCK, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)):
            holders = _holder(out / LOCK) or (_shard_holders(out) if alone else "")
            raise InputError(
                f"{out}: another process is writing there{holders}; wait for it or stop it"
            )
        if not alone and not locks.enter_context(_locked(out, LOCK + shard.mark, fcntl.LOCK_EX)):
            raise InputError(
                f"{out}: another process is writing shard {shard} there"
                f"{_holder(out / (LOCK + shard.mark))}; wait for it or stop it, or give each "
                "process a shard of its own"
            )
        if not alone:
            _note_count(out, shard.count)
        yield


@contextmanager
def part_lock(out: Path, number: int) -> Iterator[None]:
    """Waits until no other shard, of whatever count, writes part ``number``; then holds it.

    Raises OSError if the file system refuses the lock.
    """
    with _ONE_PART:
        descriptor = os.open(out / PART_LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, number)
            yield
        finally:
            os.close(descriptor)


def other_counts(out: Path, count: int) -> list[int]:
    """The counts of shards that have started in the folder, without ``count``."""
    try:
        lines = (out / COUNTS).read_text().split()
    except FileNotFoundError:
        return []
    return sorted({int(line) for line in lines if line.isdigit()} - {count})


def _note_count(out: Path, count: int) -> None:
    try:
        with part_lock(out, _COUNTS_BYTE), open(out / COUNTS, "a+") as file:
            file.seek(0)
            if str(count) not in file.read().split():
                file.write(f"\n{count}\n")
    except OSError as error:
        raise InputError(f"{out}: cannot write there: {error.strerror}") from error


@contextmanager
def _locked(out: Path, name: str, kind: int) -> Iterator[bool]:
    """Whether the lock was free; then it is held. The file of an exclusive lock names its holder,
    until the holder ends in an orderly way."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / name, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f"{out}: cannot write there: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise InputError(
                f"{out}: cannot be locked: {error.strerror}; mount its file system with locks, or "
                "write to another folder"
            ) from error
        _write_holder(descriptor, kind)
        try:
            yield True
        finally:
            os.truncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _write_holder(descriptor: int, kind: int) -> None:
    """Deletes the name of an earlier holder that was killed, and writes that of this process.

    A disk that takes no name is left to the job: its own files need more.
    """
    os.truncate(descriptor, 0)
    if kind == fcntl.LOCK_EX:
        with suppress(OSError):
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())


def _holder(file: Path) -> str:
    """The text of the process that holds a lock, in brackets, or nothing."""
    text = file.read_text(errors="replace")[:100] if file.is_file() else ""
    return f" ({text})" if text.isprintable() and text else ""


def _shard_holders(out: Path) -> str:
    """Those that the lock files of shards name; one that was killed may still be among them."""
    holders = [
        f"shard {match[1]}/{match[2]}{_holder(file)}"
        for file in sorted(out.glob(f"{LOCK}-*"))
        if (match := re.fullmatch(rf"{LOCK}-(\d+)-of-(\d+)", file.name)) and file.stat().st_size
    ]
    return f": {', '.join(holders)}" if holders else ""
