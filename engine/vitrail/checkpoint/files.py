"""A folder or hub id -> the configurations of a checkpoint and the positions of its tensors.

Nothing is unpickled, no code of a checkpoint runs, and a local folder never touches the network.
Imports no torch. Whatever a checkpoint contains, the result is a ``Checkpoint`` or a
CheckpointError of a single line.
"""

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitrail.checkpoint import contents
from vitrail.checkpoint.header import read_header
from vitrail.checkpoint.hub import download
from vitrail.checkpoint.regular import Stamp, absolute, check_regular, reading, stamp_of
from vitrail.checkpoint.strict_json import read_json
from vitrail.checkpoint.tensors import TensorEntry
from vitrail.errors import CheckpointError, InputError, refusal, show, show_path

_HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as stored: parsed configurations and the position of every tensor.

    ``source`` is the user's text; ``revision`` the hub commit, None for a local folder.
    ``preprocessor`` is the configuration of the image processor; it and ``tokenizer_config`` are
    None if the folder has none. ``tensors`` maps the stored names. ``int8`` is the record of a
    folder that ``vitrail quantize`` wrote; None for any other folder.
    """

    folder: Path
    source: str
    revision: str | None
    config: dict[str, Any]
    preprocessor: dict[str, Any] | None
    tokenizer_config: dict[str, Any] | None
    tensors: dict[str, TensorEntry] = field(repr=False)
    int8: dict[str, Any] | None = field(default=None, repr=False)
    _stamps: dict[str, Stamp | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # text is tokenized later, by files that must still be those of the checkpoint
        object.__setattr__(self, "_stamps", {n: self._stamp(n) for n in contents.TOKENIZER_FILES})

    def _stamp(self, name: str) -> Stamp | None:
        try:
            return stamp_of(os.stat(self.folder / name))
        except OSError:
            return None

    @property
    def name(self) -> str:
        """The hub id, or the folder's own name: records that leave a machine hold no path of it."""
        return self.folder.resolve().name if self.revision is None else self.source

    def file(self, name: str) -> Path | None:
        """The regular file of this name in the folder, such as "tokenizer.json"; None if absent.

        Raises CheckpointError if it is a tokenizer's, and has changed since the opening.
        """
        if name in self._stamps and self._stamp(name) != self._stamps[name]:
            location = show_path(self.folder / name)
            raise CheckpointError(
                f"{location}: was changed or replaced since loading; load it again"
            )
        if not os.path.lexists(self.folder / name):
            return None
        path = contents.inside(self.folder, name)
        check_regular(path)
        return path


def open_checkpoint(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Opens a folder, a .safetensors file beside its config.json, or a hub id "org/name".

    A path that exists is never looked up on the hub, and only a string can be a hub id. From a hub
    repository, the small configuration files and a single set of weights are downloaded;
    ``local_files_only`` takes them from the hub's cache. Reads configurations and headers only.

    Raises CheckpointError if the checkpoint is faulty or cannot be downloaded; InputError for
    arguments of the wrong type.
    """
    source = _as_text(path_or_id)
    local = absolute(source)
    mode = _mode(local)
    if mode is not None and revision is not None:
        raise InputError(
            f"revision: got {show(revision)} for the local {show(source)}, wanted None"
        )
    if mode is None:
        if not isinstance(path_or_id, str) or not _HUB_ID.fullmatch(source):
            expected = 'an existing checkpoint folder, or a hub id such as "org/name"'
            raise refusal(show(source), "no such folder or file", expected)
        folder = download(source, revision, local_files_only)
        return _open(folder, source, folder.name, None)
    if stat.S_ISDIR(mode):
        return _open(local, source, None, None)
    if local.suffix != ".safetensors":
        advice = f"; {contents.HOW_TO_CONVERT}" if local.suffix in contents.PICKLED else ""
        expected = f"a checkpoint folder or a .safetensors file{advice}"
        raise refusal(show_path(local), "a file", expected)
    return _open(local.parent, source, None, local.name)


def _as_text(path_or_id: object) -> str:
    text = os.fspath(path_or_id) if isinstance(path_or_id, os.PathLike) else path_or_id
    if not isinstance(text, str) or not text:
        raise InputError(f"path_or_id: got {show(text)}, wanted a path or a hub id")
    return text


def _mode(path: Path) -> int | None:
    """The mode bits of an existing path, None if there is nothing."""
    with reading(path):
        try:
            return os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
            return None


def _open(folder: Path, source: str, revision: str | None, weights: str | None) -> Checkpoint:
    names = contents.file_names(folder)
    if contents.EXPORT in names:
        expected = "the checkpoint that it was exported from"
        raise refusal(show_path(folder / contents.EXPORT), "an exported folder", expected)
    if contents.CONFIG not in names:
        expected = "a checkpoint folder as transformers saves it"
        raise refusal(show_path(folder), f"no {contents.CONFIG}", expected)
    config = read_json(contents.inside(folder, contents.CONFIG))
    weights = _weights(folder, names, weights)

    def optional(name: str) -> dict[str, Any] | None:
        return read_json(contents.inside(folder, name)) if name in names else None

    # as transformers chooses: the nested object that version 5 writes, else the older file
    preprocessor = (optional(contents.PROCESSOR) or {}).get("image_processor")
    if preprocessor is None:
        preprocessor = optional(contents.PREPROCESSOR)
    elif not isinstance(preprocessor, dict):
        location = f"{show_path(folder / contents.PROCESSOR)}: image_processor"
        raise refusal(location, show(preprocessor), "an object")
    return Checkpoint(
        folder=folder,
        source=source,
        revision=revision,
        config=config,
        preprocessor=preprocessor,
        tokenizer_config=optional(contents.TOKENIZER_CONFIG),
        tensors=(
            _read_shards(folder, names)
            if weights == contents.INDEX
            else read_header(contents.inside(folder, weights))
        ),
        int8=optional(contents.INT8),
    )


def _weights(folder: Path, names: set[str], weights: str | None) -> str:
    """The weights' file: ``weights`` if given. int8.json and int8.safetensors go together."""
    int8, pair = contents.INT8 in names, f"{contents.INT8} and {contents.INT8_WEIGHTS}"
    if weights is None and int8:
        weights = contents.INT8_WEIGHTS
    weights = weights or contents.choose_weights(names, show_path(folder))
    if int8 != (weights == contents.INT8_WEIGHTS):
        actual = f"the weights {show(weights)} {'with' if int8 else 'without'} {contents.INT8}"
        raise refusal(show_path(folder), actual, f"{pair}, as vitrail quantize wrote them")
    if int8 and weights not in names:
        expected = f"{pair}; quantize the checkpoint again"
        raise refusal(show_path(folder), f"no {weights}", expected)
    return weights


def _read_shards(folder: Path, names: set[str]) -> dict[str, TensorEntry]:
    """The tensors of every shard, each in the shard that the index names, and none besides."""
    location = show_path(folder / contents.INDEX)
    weight_map = contents.read_weight_map(folder)
    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if shard not in names:
            raise refusal(location, f"the shard {show(shard)}, which is not there", "every shard")
        for name, entry in read_header(contents.inside(folder, shard)).items():
            listed = weight_map.get(name)
            if listed != shard:
                listing = "nowhere" if listed is None else f"in {show(listed)}"
                actual = f"the tensor {show(name)}, which the index lists {listing}"
                expected = "each tensor in the shard the index names"
                raise refusal(show_path(folder / shard), actual, expected)
            tensors[name] = entry
    missing = sorted(weight_map.keys() - tensors.keys())
    if missing:
        example = f"{show(missing[0])} ({show(weight_map[missing[0]])})"
        actual = f"{len(missing):,} listed tensors in no shard, first {example}"
        raise refusal(location, actual, "every listed tensor in its shard")
    return tensors
