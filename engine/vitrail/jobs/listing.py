"""Which images a job is about: files, folders, patterns, lists and tar shards, in a fixed order."""

from __future__ import annotations

import glob
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vitrail.errors import InputError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
UNREAD = frozenset(
    {".avif", ".heic", ".heif", ".jp2", ".jxl", ".psd", ".raw", ".svg", ".tif", ".tiff"}
)
"""Other formats of images, which a folder's listing leaves out and counts."""
NAMED = 5  # missing inputs that one message names
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file inside an uncompressed tar, read in place; nothing is ever unpacked."""

    tar: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"

    def read_bytes(self) -> bytes:
        """The encoded image. Raises OSError where the tar cannot be read or has become shorter."""
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(f"the tar ends after {len(data)} of {self.size} bytes")
        return data


Source = str | TarMember
"""A path, or a member of a tar; ``str()`` of it is the name that outputs hold."""


@dataclass(slots=True)
class Listing:
    """``unread``: how many images of formats that Vitrail does not read were left out, by name."""

    sources: list[Source] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)


def find_images(inputs: Sequence[str], lists: Sequence[str] = ()) -> Listing:
    """The images that files, folders, patterns and tars stand for, in the order given; then lists.

    A file is taken whatever its name. A folder is searched through its sub-folders (not through
    links to folders, nor hidden names) for jpg, jpeg, png, webp, bmp and gif in any case. A pattern
    (``**`` crosses folders) is what it matches. A ``.tar`` gives its members with these endings, in
    its own order. Folders and matches are sorted, and give no path that is already there; what is
    named, in ``inputs`` or a list, is taken as often as it is named.

    ``lists``: files of paths, one a line ("-" is stdin) or apart by NUL, relative to the current
    folder. What a list names need not exist: it fails when its turn comes, and harms no other.

    Raises InputError where an input does not exist, cannot be listed, or nothing is found.
    """
    found = Listing()
    seen: set[str] = set()
    missing = [name for name in inputs if not (os.path.lexists(name) or glob.has_magic(name))]
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        names = ", ".join(map(repr, missing[:NAMED]))
        raise InputError(f"{names}{more}: no such file or folder")
    for name in inputs:
        if os.path.lexists(name) and not os.path.isdir(name):
            paths: Iterable[str] = [name]
        else:
            paths = [path for path in _expand(name, found.unread) if path not in seen]
        for path in paths:
            seen.add(path)
            found.sources += _members(path) if path.lower().endswith(".tar") else [path]
    for name in lists:
        found.sources += _lines(name)
    if not found.sources:
        what = ", ".join([*inputs, *lists])
        raise InputError(f"{what}: no image there{_aside(found.unread)}, wanted {_wanted()}")
    return found


def _wanted() -> str:
    return ", ".join(sorted(EXTENSIONS))


def _aside(unread: Counter[str]) -> str:
    if not unread:
        return ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(unread.items()))
    return f" but {kinds}, which Vitrail does not read"


def _expand(name: str, unread: Counter[str]) -> list[str]:
    if os.path.isdir(name):
        paths = _walk(name, unread)
        if not paths:
            raise InputError(f"{name}: no image there{_aside(unread)}, wanted {_wanted()}")
        return paths
    matches = glob.glob(name, recursive=True)
    if not matches:
        raise InputError(f"{name!r}: matches no file")
    files = {path for path in matches if not os.path.isdir(path)}
    if "**" not in name:
        for folder in set(matches) - files:
            files.update(_walk(folder, unread))
    if not files:
        raise InputError(f"{name}: no image there{_aside(unread)}, wanted {_wanted()}")
    return sorted(files)


def _walk(root: str, unread: Counter[str]) -> list[str]:
    def refuse(error: OSError) -> None:
        raise InputError(
            f"{error.filename}: cannot list the folder: {error.strerror}; make it readable, or "
            "name the folders to read, or give a list of files with --list"
        ) from error

    found: list[str] = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            kind = os.path.splitext(name)[1].lower()
            if kind in EXTENSIONS and not name.startswith("."):
                found.append(os.path.join(folder, name))
            elif kind in UNREAD:
                unread[kind] += 1
    return sorted(found)


def _members(path: str) -> list[Source]:
    """The images of an uncompressed tar; tarfile itself takes later damage for the end."""
    found: list[Source] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                kind = os.path.splitext(member.name)[1].lower()
                hidden = os.path.basename(member.name).startswith(".")
                if member.isreg() and not member.issparse() and kind in EXTENSIONS and not hidden:
                    found.append(TarMember(path, member.name, member.offset_data, member.size))
            end = tar.offset
        with open(path, "rb") as file:
            file.seek(end)
            last = file.read(_BLOCK)
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or "not an uncompressed tar"
        raise InputError(
            f"{path}: {reason}; decompress a .tar.gz before, or name folders"
        ) from error
    if last != bytes(_BLOCK):
        raise InputError(
            f"{path}: the tar is damaged or cut short at byte {end}, after {len(found)} images; "
            "fetch or make it again, or unpack what it holds"
        )
    if not found:
        raise InputError(f"{path}: no image in the tar, wanted members ending in {_wanted()}")
    return found


def _lines(name: str) -> list[Source]:
    """The paths of a list; bytes that are no UTF-8 stay as the file system gives them."""
    try:
        if name == "-":
            data = sys.stdin.buffer.read()
        else:
            with open(name, "rb") as file:
                data = file.read()
    except OSError as error:
        raise InputError(f"{name}: cannot read the list: {error.strerror}") from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    lines = (
        data.split(b"\0") if b"\0" in data else [line.rstrip(b"\r") for line in data.split(b"\n")]
    )
    paths: list[Source] = [os.fsdecode(line) for line in lines if line.strip()]
    if not paths:
        raise InputError(f"{name}: the list is empty, wanted one path a line")
    return paths


def path_text(source: object) -> str:
    """A path as text; bytes that are no UTF-8, which a file name may hold, as \\xNN."""
    return os.fsencode(str(source)).decode("utf-8", "backslashreplace")


def shown(source: object) -> str:
    """A path for a terminal: control characters, which could act there, as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in path_text(source))
