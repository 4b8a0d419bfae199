"""The input images of a job, from files, folders, patterns, lists and tars, in a fixed order."""

import glob
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vitrail.errors import InputError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
UNREAD_EXTENSIONS = frozenset(
    {".avif", ".heic", ".heif", ".jp2", ".jxl", ".psd", ".raw", ".svg", ".tif", ".tiff"}
)
"""Image formats that Vitrail does not read; a listing skips and counts them."""
NAMED = 5  # missing inputs that an error names
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file inside an uncompressed tar, read in place: ``size`` bytes from ``offset`` on."""

    tar: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"

    def read_bytes(self) -> bytes:
        """The encoded image. Raises OSError if the tar cannot be read or has become shorter."""
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(f"the tar ends after {len(data)} of {self.size} bytes")
        return data


Source = str | TarMember
"""A path, or a member of a tar. Outputs name it by its ``str()``."""


@dataclass(slots=True)
class ImageListing:
    """The images, and how many files of each unread extension were skipped."""

    sources: list[Source] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)


def find_images(inputs: Sequence[str], lists: Sequence[str] = ()) -> ImageListing:
    """The images of ``inputs`` in order (files, folders, patterns, tars), then those of ``lists``.

    A file may have any name. A folder is searched recursively, except for links to folders and
    hidden names, for jpg, jpeg, png, webp, bmp and gif in upper or lower case. In a pattern ``**``
    crosses folders. A ``.tar`` gives its members with these extensions in its own order. Folders
    and matches are sorted, and skip a path that the listing has already; a file that ``inputs`` or
    a list names twice is taken twice.

    ``lists``: files of paths relative to the current folder, one per line or separated by NUL ("-"
    is stdin). A path in a list may be missing: it fails later, when it is read, and stops no other.

    Raises InputError if an input does not exist or cannot be listed, or if there is no image.
    """
    listing = ImageListing()
    listed: set[str] = set()
    missing = [name for name in inputs if not (os.path.lexists(name) or glob.has_magic(name))]
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        names = ", ".join(map(repr, missing[:NAMED]))
        raise InputError(f"{names}{more}: no such file or folder")
    for name in inputs:
        if os.path.lexists(name) and not os.path.isdir(name):
            paths: Iterable[str] = [name]
        else:
            paths = [path for path in _expand(name, listing.unread) if path not in listed]
        for path in paths:
            listed.add(path)
            listing.sources += _members(path) if path.lower().endswith(".tar") else [path]
    for name in lists:
        listing.sources += _lines(name)
    if not listing.sources:
        raise _no_image(", ".join([*inputs, *lists]), listing.unread)
    return listing


def _no_image(name: str, unread: Counter[str]) -> InputError:
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
    skipped = f" but {counts}, which Vitrail does not read" if unread else ""
    return InputError(f"{name}: no image there{skipped}, wanted {', '.join(sorted(EXTENSIONS))}")


def _expand(name: str, unread: Counter[str]) -> list[str]:
    if os.path.isdir(name):
        paths = _walk(name, unread)
        if not paths:
            raise _no_image(name, unread)
        return paths
    matches = glob.glob(name, recursive=True)
    if not matches:
        raise InputError(f"{name!r}: matches no file")
    files = {path for path in matches if not os.path.isdir(path)}
    if "**" not in name:
        for folder in set(matches) - files:
            files.update(_walk(folder, unread))
    if not files:
        raise _no_image(name, unread)
    return sorted(files)


def _walk(root: str, unread: Counter[str]) -> list[str]:
    def refuse(error: OSError) -> None:
        raise InputError(
            f"{error.filename}: cannot list the folder: {error.strerror}; make it readable, or "
            "name the folders to read, or give a list of files with --list"
        ) from error

    paths: list[str] = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in EXTENSIONS and not name.startswith("."):
                paths.append(os.path.join(folder, name))
            elif suffix in UNREAD_EXTENSIONS:
                unread[suffix] += 1
    return sorted(paths)


def _members(path: str) -> list[Source]:
    """The images of an uncompressed tar.

    tarfile takes a damaged header for the end of the tar, so the end block is checked too.
    """
    members: list[Source] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                suffix = os.path.splitext(member.name)[1].lower()
                hidden = os.path.basename(member.name).startswith(".")
                if member.isreg() and not member.issparse() and suffix in EXTENSIONS and not hidden:
                    members.append(TarMember(path, member.name, member.offset_data, member.size))
            end = tar.offset
        with open(path, "rb") as file:
            file.seek(end)
            end_block = file.read(_BLOCK)
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or "not an uncompressed tar"
        raise InputError(
            f"{path}: {reason}; decompress a .tar.gz first, or name folders"
        ) from error
    if end_block != bytes(_BLOCK):
        raise InputError(
            f"{path}: the tar is damaged or cut short at byte {end}, after {len(members)} images; "
            "fetch or make it again, or unpack it"
        )
    if not members:
        extensions = ", ".join(sorted(EXTENSIONS))
        raise InputError(f"{path}: no image in the tar, wanted members ending in {extensions}")
    return members


def _lines(name: str) -> list[Source]:
    """The paths of a list. Bytes that are not UTF-8 are decoded as the file system does."""
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
        raise InputError(f"{name}: the list is empty, wanted one path per line")
    return paths


def path_text(source: object) -> str:
    """A path as text; a byte of a file name that is not UTF-8 becomes \\xNN."""
    return os.fsencode(str(source)).decode("utf-8", "backslashreplace")


def shown(source: object) -> str:
    """A path for a terminal: control characters, which a terminal would obey, are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in path_text(source))
