"""Durable writes: a file or folder gets its name only when it is complete and on the disk.

Every writer takes the same steps: write a draft beside the target, sync the draft, rename it to the
target, sync the folder that contains the target. A process that is killed leaves a draft, never
half a target.
"""

import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from vitrail.errors import InputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError into an InputError that says ``path`` cannot be written, and why."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Returns once the bytes of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    """Writes all of ``data`` (bytes) at ``offset``; returns the offset of its end."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
    return offset


def write_file(path: Path, *chunks: bytes | memoryview) -> None:
    """Writes the chunks in order, and returns once they are on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        end = 0
        for chunk in chunks:
            end = write_all(descriptor, chunk, end)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(drafts: Mapping[Path, Path]) -> None:
    """Renames synced drafts to their targets, in order, and syncs the folder of the targets."""
    for draft, target in drafts.items():
        os.replace(draft, target)
    sync(target.parent)


def draft_prefix(mark: str = "") -> str:
    """Begins the names of the drafts of `put_file`; the next run of a killed job deletes them.

    Writers of one folder have a ``mark`` each, such as "-2-of-4". Without a mark it is "_draft-",
    with which the prefixes of all writers begin.
    """
    return f"_draft{mark}-"


def put_file(path: Path, data: bytes, mark: str = "", replace: bool = True) -> tuple[int, str]:
    """Writes the whole file or nothing; returns its length in bytes and its SHA-256.

    ``mark``: see `draft_prefix`. Raises OSError if the file cannot be written or reads back
    differently, and FileExistsError if it exists and ``replace`` is false.
    """
    draft = path.with_name(draft_prefix(mark) + path.name)
    write_file(draft, data)
    if draft.read_bytes() != data:
        raise OSError(f"{path} reads back differently than it was written")
    if replace:
        publish({draft: path})
    else:
        _publish_new(draft, path)
    return len(data), hashlib.sha256(data).hexdigest()


def _publish_new(draft: Path, target: Path) -> None:
    """`publish` that leaves an existing target alone: then FileExistsError.

    A hard link takes the name in one step, even if another machine creates the file now. Without
    hard links (FAT, some network file systems) there is a moment between the look and the step.
    """
    try:
        try:
            os.link(draft, target)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            if target.exists():
                raise FileExistsError(errno.EEXIST, "exists", str(target)) from error
            os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    sync(target.parent)


@contextmanager
def draft_files(targets: Sequence[Path]) -> Iterator[dict[Path, Path]]:
    """Yields a dictionary draft -> target, for `publish`; then deletes unpublished drafts."""
    mark = f"{os.getpid()}-{secrets.token_hex(4)}"
    drafts = {path.with_name(f".{path.name}.{mark}.tmp"): path for path in targets}
    try:
        yield drafts
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


def check_replaceable(target: Path, mark: str, overwrite: bool) -> None:
    """Make the parents of ``target``, a folder that `draft_folder` may write.

    Raises InputError if there is something that must stay: a file, or a folder with contents,
    unless ``overwrite`` and it has the file ``mark``, which an earlier run has written.
    """
    with writing(target):
        if not os.path.lexists(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        elif not target.is_dir() or target.is_symlink():
            raise InputError(
                f"{target}: got something other than a folder, wanted a folder or nothing"
            )
        elif any(target.iterdir()):
            if not overwrite:
                raise InputError(f"{target}: got a folder with something in it; wanted --overwrite")
            if not (target / mark).is_file():
                raise InputError(
                    f"{target}: got a folder without {mark}, wanted one that the same command wrote"
                )
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise PermissionError(f"{target.parent}: cannot be written to")


@contextmanager
def draft_folder(target: Path) -> Iterator[Path]:
    """Yields a new folder that replaces ``target`` at the end, or is deleted after an error.

    Write its files with `write_file`. If renaming fails, the former folder gets its name back.
    """
    draft = Path(tempfile.mkdtemp(".partial", f".{target.name}.", target.parent))
    former = draft.with_suffix(".old")
    try:
        mask = os.umask(0)
        os.umask(mask)
        draft.chmod(0o777 & ~mask)  # mkdtemp makes a private folder
        yield draft
        for folder in (*(path for path in draft.iterdir() if path.is_dir()), draft):
            sync(folder)
        if target.exists() and any(target.iterdir()):
            target.rename(former)
        publish({draft: target})
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        if former.exists() and not target.exists():
            former.rename(target)
        raise
    shutil.rmtree(former, ignore_errors=True)
