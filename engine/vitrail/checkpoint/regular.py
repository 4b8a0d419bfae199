"""Access to the regular files of a checkpoint. Every OSError becomes a CheckpointError."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitrail.errors import CheckpointError, refusal, show_path

Stamp = tuple[int, int, int, int]


def absolute(path: str) -> Path:
    """The path that a user wrote, as it stays after the process changes its current folder."""
    expanded = Path(os.path.expanduser(path))
    try:
        return expanded.absolute()
    except OSError:  # the current folder was removed; a hub id needs none
        return expanded


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the operating system's errors into CheckpointError with its reason."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(f"{show_path(path)}: cannot be read: {reason}") from error


def check_regular(path: Path, descriptor: int | None = None) -> None:
    """Raises CheckpointError unless ``path``, or the file opened from it, is a regular file."""
    with reading(path):
        mode = os.stat(path if descriptor is None else descriptor).st_mode
    if not stat.S_ISREG(mode):
        types = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
        file_type = next((name for is_type, name in types if is_type(mode)), "a device")
        raise refusal(show_path(path), file_type, "a regular file")


def open_regular(path: Path) -> int:
    """A descriptor of a regular file. Anything else is refused; opening a FIFO never blocks."""
    check_regular(path)
    with reading(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        check_regular(path, descriptor)
    except CheckpointError:
        os.close(descriptor)
        raise
    return descriptor


def file_stamp(descriptor: int) -> Stamp:
    """(device, inode, size in bytes, mtime in ns): differs once a file is changed or replaced."""
    return stamp_of(os.fstat(descriptor))


def stamp_of(status: os.stat_result) -> Stamp:
    """The `file_stamp` of a file with this status."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_exactly(descriptor: int, offset: int, out: memoryview, path: Path) -> None:
    """Fills ``out`` from byte ``offset`` on. Raises CheckpointError if the file ends early."""
    done = 0
    while done < len(out):
        with reading(path):
            count = os.preadv(descriptor, [out[done:]], offset + done)
        if count == 0:
            raise CheckpointError(
                f"{show_path(path)}: was truncated while loading, at byte {offset + done}"
            )
        done += count


def read_range(descriptor: int, offset: int, count: int, path: Path) -> bytearray:
    """``count`` bytes from byte ``offset`` on, by `read_exactly`."""
    data = bytearray(count)
    read_exactly(descriptor, offset, memoryview(data), path)
    return data


def read_file(path: Path, limit: int, content: str = "") -> bytearray:
    """The bytes of a regular file. Raises CheckpointError if it has more than ``limit`` bytes.

    ``content`` ends the message, for example " of JSON".
    """
    descriptor = open_regular(path)
    try:
        with reading(path):
            size = os.fstat(descriptor).st_size
        if size > limit:
            raise refusal(show_path(path), f"{size:,} bytes", f"at most {limit:,}{content}")
        return read_range(descriptor, 0, size, path)
    finally:
        os.close(descriptor)
