"""The files of a checkpoint folder: their names, which of them are the weights, and the index."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from vitrail.checkpoint.header import MAX_HEADER_BYTES, MAX_TENSORS
from vitrail.checkpoint.regular import reading
from vitrail.checkpoint.strict_json import read_json
from vitrail.errors import refusal, show, show_path

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
INT8 = "int8.json"
INT8_WEIGHTS = "int8.safetensors"
"""A folder that ``vitrail quantize`` wrote has both, and no other weights."""
SMALL_FILES = (CONFIG, INT8, PREPROCESSOR, PROCESSOR, TOKENIZER_CONFIG, *TOKENIZER_FILES)
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".npz")
HOW_TO_CONVERT = (
    "pickles and the like are never read; load it once with transformers and "
    "save_pretrained(folder, safe_serialization=True)"
)
MAX_SHARDS = 256

_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def file_names(folder: Path) -> set[str]:
    with reading(folder):
        return set(os.listdir(folder))


def inside(folder: Path, name: str) -> Path:
    """``folder / name``. Raises CheckpointError if symlinks lead out of the folder.

    Two links of the hub's cache are allowed: ``models--*/snapshots/<commit>/x`` leads to
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
    actual = f"a symlink to {show(str(target))}"
    raise refusal(show_path(path), actual, "a file inside the checkpoint folder")


def choose_weights(names: Iterable[str], location: str) -> str:
    """The weights among file ``names``: `SINGLE`, `INDEX`, or the only other .safetensors file."""
    names = set(names)
    for name in (SINGLE, INDEX):
        if name in names:
            return name
    safetensors = sorted(name for name in names if name.endswith(".safetensors"))
    if len(safetensors) == 1:
        return safetensors[0]
    expected = f"{SINGLE}, {INDEX} or one other .safetensors file"
    if safetensors:
        actual = f"{_listing(safetensors)} and no {SINGLE}"
        raise refusal(location, actual, f"{expected}; name one by its path")
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    if pickled:
        raise refusal(location, f"{_listing(pickled)} only", f"{expected}; {HOW_TO_CONVERT}")
    raise refusal(location, "no weights", expected)


def _listing(names: list[str]) -> str:
    """Up to six names, and how many more there are."""
    text = ", ".join(show_path(Path(name)) for name in names[:6])
    return text if len(names) <= 6 else f"{text} and {len(names) - 6} more"


def read_weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> shard, from the index. Its ``metadata.total_size`` is not trusted."""
    location = f"{show_path(folder / INDEX)}: weight_map"
    weight_map = read_json(inside(folder, INDEX), MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not 1 <= len(weight_map) <= MAX_TENSORS:
        raise refusal(location, show(weight_map), f"an object of 1 to {MAX_TENSORS:,} shard names")
    for tensor, shard in weight_map.items():
        plain = (
            isinstance(shard, str) and shard.isprintable() and not re.match(r"\.|.*[/\\]", shard)
        )
        if not plain or not shard.endswith(".safetensors"):
            expected = "the plain name of a .safetensors file in the folder"
            raise refusal(f"{location}: {show(tensor)}", show(shard), expected)
    shards = len(set(weight_map.values()))
    if shards > MAX_SHARDS:
        raise refusal(location, f"{shards:,} shards", f"at most {MAX_SHARDS}")
    return weight_map
