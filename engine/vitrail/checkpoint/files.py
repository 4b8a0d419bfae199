"""A folder or hub id -> the configurations of a checkpoint, and where each of its tensors lies.

Nothing is unpickled, no code of a checkpoint is run, and a local folder never touches the network:
``huggingface_hub`` is imported only for a hub id. Imports no torch. Whatever a checkpoint holds,
the outcome is a ``Checkpoint`` or a one-line CheckpointError.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitrail.checkpoint.header import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    TensorEntry,
    check_regular,
    file_stamp,
    open_regular,
    read_exactly,
    read_header,
    read_json,
    reading,
)
from vitrail.errors import CheckpointError, InputError, VitrailError, refusal, show, show_path

__all__ = [
    "Checkpoint",
    "TensorEntry",
    "TensorReader",
    "open_checkpoint",
    "read_header",
    "read_json",
]

CONFIG = "config.json"
EXPORT = "vitrail.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
SMALL_FILES = (CONFIG, PREPROCESSOR, PROCESSOR, TOKENIZER_CONFIG, *TOKENIZER_FILES)
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".npz")
HOW_TO_CONVERT = (
    "pickles and the like are never read; load it once with transformers and "
    "save_pretrained(folder, safe_serialization=True)"
)
MAX_SHARDS = 256

_HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w./-]{0,254}", re.ASCII)
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_STORAGE_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as found: parsed configurations and the place of every tensor.

    ``source`` is what the user typed; ``revision`` the hub commit, None for a local folder.
    ``preprocessor`` is the image processor's configuration; it and ``tokenizer_config`` are None
    where the folder has none. ``tensors`` maps the stored names.
    """

    folder: Path
    source: str
    revision: str | None
    config: dict[str, Any]
    preprocessor: dict[str, Any] | None
    tokenizer_config: dict[str, Any] | None
    tensors: dict[str, TensorEntry] = field(repr=False)

    def file(self, name: str) -> Path | None:
        """The regular file of this name in the folder, such as "tokenizer.json"; None if absent."""
        if not os.path.lexists(self.folder / name):
            return None
        path = _inside(self.folder, name)
        check_regular(path)
        return path


def open_checkpoint(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Opens a folder, one .safetensors file beside its config.json, or a hub id "org/name".

    What exists locally is never looked up elsewhere, and only a string can be a hub id. Of a hub
    repository, the small configuration files and one set of weights are downloaded.
    ``local_files_only`` takes them from the hub's cache. Reads configurations and headers only.

    Raises CheckpointError for whatever is wrong with the checkpoint or with getting it; InputError
    for arguments of the wrong kind.
    """
    source = _as_text(path_or_id)
    local = Path(os.path.expanduser(source))
    mode = _mode(local)
    if mode is not None and revision is not None:
        raise InputError(
            f"revision: got {show(revision)} for the local {show(source)}, wanted None"
        )
    if mode is None:
        if not isinstance(path_or_id, str) or not _HUB_ID.fullmatch(source):
            wanted = 'an existing checkpoint folder, or a hub id such as "org/name"'
            raise refusal(show(source), "no such folder or file", wanted)
        folder = _download(source, revision, local_files_only)
        return _open(folder, source, folder.name, None)
    if stat.S_ISDIR(mode):
        return _open(local, source, None, None)
    if local.suffix != ".safetensors":
        advice = f"; {HOW_TO_CONVERT}" if local.suffix in PICKLED else ""
        raise refusal(
            show_path(local), "a file", f"a checkpoint folder or a .safetensors file{advice}"
        )
    return _open(local.parent, source, None, local.name)


def _as_text(path_or_id: object) -> str:
    text = os.fspath(path_or_id) if isinstance(path_or_id, os.PathLike) else path_or_id
    if not isinstance(text, str) or not text:
        raise InputError(f"path_or_id: got {show(text)}, wanted a path or a hub id")
    return text


def _mode(path: Path) -> int | None:
    with reading(path):
        try:
            return os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:  # a NUL in the path: no file can have that name
            return None


def _open(folder: Path, source: str, revision: str | None, weights: str | None) -> Checkpoint:
    names = _names(folder)
    if EXPORT in names:
        wanted = "a checkpoint: this was made of one by vitrail export, and only loads"
        raise refusal(show_path(folder / EXPORT), "an exported folder", wanted)
    if CONFIG not in names:
        raise refusal(
            show_path(folder), f"no {CONFIG}", "a checkpoint folder as transformers saves it"
        )
    config = read_json(_inside(folder, CONFIG))
    weights = weights or _choose_weights(names, show_path(folder))
    return Checkpoint(
        folder=folder,
        source=source,
        revision=revision,
        config=config,
        preprocessor=_preprocessor(folder, names),
        tokenizer_config=_optional(folder, names, TOKENIZER_CONFIG),
        tensors=(
            _read_shards(folder, names)
            if weights == INDEX
            else read_header(_inside(folder, weights))
        ),
    )


def _names(folder: Path) -> set[str]:
    with reading(folder):
        return set(os.listdir(folder))


def _inside(folder: Path, name: str) -> Path:
    """``folder / name``, refused where symlinks lead out of the folder.

    The hub's cache is let be: there ``models--*/snapshots/<commit>/x`` leads to
    ``models--*/blobs/<hash>``, or on to ``blobs/<2 digits>/<hash>``, which repositories share.
    """
    path = folder / name
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if target.is_relative_to(root):
        return path
    repository = root.parents[1] if len(root.parents) > 2 else root
    if root.parent.name == "snapshots" and repository.name.startswith("models--"):
        shared = repository.parent / "blobs" / target.name[:2]
        if target.parent in (repository / "blobs", shared) and _BLOB.fullmatch(target.name):
            return path
    got = f"a symlink to {show(str(target))}"
    raise refusal(show_path(path), got, "a file inside the checkpoint folder")


def _optional(folder: Path, names: set[str], name: str) -> dict[str, Any] | None:
    return read_json(_inside(folder, name)) if name in names else None


def _preprocessor(folder: Path, names: set[str]) -> dict[str, Any] | None:
    """As transformers chooses: the nested part that version 5 writes, else the older file."""
    nested = (_optional(folder, names, PROCESSOR) or {}).get("image_processor")
    if nested is None:
        return _optional(folder, names, PREPROCESSOR)
    if not isinstance(nested, dict):
        where = f"{show_path(folder / PROCESSOR)}: image_processor"
        raise refusal(where, show(nested), "an object")
    return nested


def _choose_weights(names: Iterable[str], where: str) -> str:
    """The weights among file ``names``: one file, an index of shards, or the only other file."""
    names = set(names)
    for name in (SINGLE, INDEX):
        if name in names:
            return name
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if len(others) == 1:
        return others[0]
    wanted = f"{SINGLE}, {INDEX} or one other .safetensors file"
    if others:
        raise refusal(
            where, f"{_listing(others)} and no {SINGLE}", f"{wanted}; name one by its path"
        )
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    if pickled:
        raise refusal(where, f"{_listing(pickled)} only", f"{wanted}; {HOW_TO_CONVERT}")
    raise refusal(where, "no weights", wanted)


def _listing(names: list[str]) -> str:
    some = ", ".join(show_path(Path(name)) for name in names[:6])
    return some if len(names) <= 6 else f"{some} and {len(names) - 6} more"


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> shard, from the index. Its ``metadata.total_size`` is not trusted."""
    where = f"{show_path(folder / INDEX)}: weight_map"
    weight_map = read_json(_inside(folder, INDEX), MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not 1 <= len(weight_map) <= MAX_TENSORS:
        raise refusal(where, show(weight_map), f"an object of 1 to {MAX_TENSORS:,} shard names")
    for tensor, shard in weight_map.items():
        plain = (
            isinstance(shard, str) and shard.isprintable() and not re.match(r"\.|.*[/\\]", shard)
        )
        if not plain or not shard.endswith(".safetensors"):
            wanted = "the plain name of a .safetensors file in the folder"
            raise refusal(f"{where}: {show(tensor)}", show(shard), wanted)
    shards = len(set(weight_map.values()))
    if shards > MAX_SHARDS:
        raise refusal(where, f"{shards:,} shards", f"at most {MAX_SHARDS}")
    return weight_map


def _read_shards(folder: Path, names: set[str]) -> dict[str, TensorEntry]:
    where = show_path(folder / INDEX)
    weight_map = _weight_map(folder)
    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if shard not in names:
            raise refusal(where, f"the shard {show(shard)}, which is not there", "every shard")
        for name, entry in read_header(_inside(folder, shard)).items():
            listed = weight_map.get(name)
            if listed != shard:
                got = f"the tensor {show(name)}, which the index lists " + (
                    "nowhere" if listed is None else f"in {show(listed)}"
                )
                raise refusal(
                    show_path(folder / shard), got, "each tensor in the shard the index names"
                )
            tensors[name] = entry
    missing = sorted(weight_map.keys() - tensors.keys())
    if missing:
        shard = weight_map[missing[0]]
        got = (
            f"{len(missing):,} listed tensors in no shard, first {show(missing[0])} ({show(shard)})"
        )
        raise refusal(where, got, "every listed tensor in its shard")
    return tensors


def _download(repo: str, revision: str | None, local_files_only: bool) -> Path:
    """The snapshot folder of a hub repository, named after its commit."""
    if revision is not None and not _REVISION.fullmatch(revision):
        raise InputError(f"revision: got {show(revision)}, wanted a branch, a tag or a commit")
    with _hub_errors(repo, revision):
        from huggingface_hub import constants

        # Of a commit, some versions of the client ask the hub even where it is offline.
        local_files_only = local_files_only or constants.HF_HUB_OFFLINE
        folder = _small_files(repo, revision, local_files_only)
        names = _names(folder)
        if local_files_only or SINGLE in names:
            return folder
        from huggingface_hub import HfApi, snapshot_download

        if INDEX in names:
            weights = sorted(set(_weight_map(folder).values()))
        else:
            listed = HfApi().list_repo_files(repo, revision=folder.name)
            weights = [_choose_weights((name for name in listed if "/" not in name), repo)]
        patterns = [glob.escape(name) for name in weights]
        snapshot_download(repo, revision=folder.name, allow_patterns=patterns)
        return folder


def _small_files(repo: str, revision: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    # A repository may hold the same weights many times over: only the name that is used is asked
    # for, which is the single file if there is one.
    patterns = [*SMALL_FILES, SINGLE, INDEX]
    try:
        found = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=patterns,
            local_files_only=local_files_only,
        )
    except errors.LocalEntryNotFoundError as error:
        # The hub client knows that cached files are missing. Tokenizer and preprocessor files may
        # be: the call that needs one says so. The rest may not.
        if not hasattr(error, "snapshot_path"):
            raise
        found = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[CONFIG, SINGLE, INDEX],
            local_files_only=True,
        )
    return Path(found)


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except VitrailError:
        raise
    except Exception as error:  # the hub client lets the errors of several HTTP libraries through
        raise CheckpointError(f"{repo}: {_hub_reason(error, revision)}") from error


def _hub_reason(error: Exception, revision: str | None) -> str:
    """What went wrong with the hub, and what to do next, on one line."""
    if isinstance(error, ImportError):
        return "a hub id needs huggingface_hub: pip install huggingface_hub, or give a local folder"
    from huggingface_hub import errors

    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"the repository is gated: accept its terms on its hub page, then {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such local folder and no such hub repository; if it is private, {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"got revision {show(revision)}, wanted a branch, tag or commit of the repository"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return (
            "no such local folder, not all in the hub's cache, and the hub was not or could not be "
            "asked; connect and load it once without local_files_only, or give a local folder"
        )
    detail = show(" ".join(str(error).split()))
    if isinstance(error, OSError) and error.errno in _STORAGE_FAULTS:
        return f"the download cannot be stored: {detail}; make room, or set HF_HOME to another disk"
    return (
        f"the hub could not be read: {type(error).__name__}: {detail}; try again, or give a folder"
    )


class TensorReader:
    """Reads tensor bytes into memory the caller owns; a context manager, safe to share by threads.

    Each file is opened once and read with preadv, never mapped, so that a file which shrinks gives
    an error, not a signal. Every read checks that the file is still the one whose header was read.
    Close it after the last read has returned.
    """

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        with self._lock:
            self._closed = True
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def read_into(self, entry: TensorEntry, start: int, out: memoryview) -> None:
        """Bytes ``[start, start + out.nbytes)`` of the tensor into writable, contiguous ``out``.

        Raises CheckpointError when the file cannot be read, ends early or has changed since its
        header was read; InputError when the range or ``out`` is wrong.
        """
        if out.readonly or not out.c_contiguous:
            raise InputError(
                "out: got a read-only or strided buffer, wanted a writable contiguous one"
            )
        if not 0 <= start <= entry.nbytes - out.nbytes:
            raise InputError(
                f"tensor {show(entry.name)}: got bytes {start} to {start + out.nbytes}, "
                f"wanted a range within its {entry.nbytes}"
            )
        descriptor = self._descriptor(entry)
        self._check(entry, descriptor)
        if out.nbytes == 0:
            return
        read_exactly(descriptor, entry.offset + start, out.cast("B"), entry.file)
        self._check(entry, descriptor)

    def _descriptor(self, entry: TensorEntry) -> int:
        with self._lock:
            if self._closed:
                raise InputError("TensorReader: got a read after close, wanted it before")
            if entry.file not in self._descriptors:
                self._descriptors[entry.file] = open_regular(entry.file)
            return self._descriptors[entry.file]

    def _check(self, entry: TensorEntry, descriptor: int) -> None:
        with reading(entry.file):
            now = file_stamp(descriptor)
        if entry.stamp is None or now == entry.stamp:
            return
        fault = "was truncated" if now[2] < entry.stamp[2] else "was changed or replaced"
        raise CheckpointError(f"{show_path(entry.file)}: {fault} while loading; load it again")
