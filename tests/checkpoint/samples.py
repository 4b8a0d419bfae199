"""Checkpoint files and expected refusals that the checkpoint tests share."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from vitrail.checkpoint.tensors import TensorEntry, TensorReader
from vitrail.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = {"model_type": "vit", "hidden_size": 8}


def tensor(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def packed(header: object, data: bytes = bytes(4), length: int | None = None) -> bytes:
    """A file in the layout of safetensors; ``header`` is JSON, as text, as bytes or as values."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def checkpoint_folder(path: Path, weights: str = "model.safetensors") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", CONFIG)
    write(path / weights, packed({"w": tensor()}, b"\1\2\3\4"))
    return path


def refused(call: Callable[[], object], *fragments: str) -> str:
    """The message of the CheckpointError ``call`` raises: one short line with the fragments."""
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    for fragment in fragments:
        assert fragment in message
    return message


def contents(tensors: dict[str, TensorEntry]) -> dict[str, bytes]:
    """Every tensor's bytes, through a TensorReader."""
    with TensorReader() as reader:
        out = {name: bytearray(entry.nbytes) for name, entry in tensors.items()}
        for name, entry in tensors.items():
            reader.read_into(entry, 0, memoryview(out[name]))
    return {name: bytes(data) for name, data in out.items()}


GOOD = json.dumps({"w": tensor()})


DEEP = '{"w":' + "[" * 100_000 + "]" * 100_000 + "}"


def two(first: Sequence[int], second: Sequence[int], sizes: Sequence[int] = (4, 4)) -> object:
    return {
        "first": tensor(shape=[sizes[0]], offsets=first),
        "second": tensor(shape=[sizes[1]], offsets=second),
    }


MEASURE = """
import sys, time
from pathlib import Path
from gauge import peak_kib
from vitrail.errors import CheckpointError
from vitrail.checkpoint.header import read_header
from vitrail.checkpoint.strict_json import read_json
read = read_json if sys.argv[1].endswith("json") else read_header
before, start, outcome = peak_kib(), time.thread_time(), "read"
try:
    read(Path(sys.argv[1]))
except CheckpointError as error:
    outcome = str(error)
print(time.thread_time() - start, (peak_kib() - before) / 1024, outcome)
"""


def measure(path: Path) -> tuple[float, float, str]:
    """Seconds, MiB of peak memory and outcome of reading ``path`` in a fresh process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEASURE, str(path)]
    output = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    seconds, mib, outcome = output.split(" ", 2)
    return float(seconds), float(mib), outcome.strip()


def sharded(folder: Path, shards: dict[str, dict[str, int]], index: object = None) -> Path:
    """Shards of U8 tensors, {shard: {tensor: bytes}}, and their index or another."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", CONFIG)
    for shard, sizes in shards.items():
        header, end = {}, 0
        for name, size in sizes.items():
            header[name] = tensor(shape=[size], offsets=[end, end + size])
            end += size
        write(folder / shard, packed(header, os.urandom(end)))
    whole = {name: shard for shard, sizes in shards.items() for name in sizes}
    write_json(folder / INDEX, {"weight_map": whole} if index is None else index)
    return folder


A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


SHARDS = {A: {"a": 3, "b": 5}, B: {"c": 2}}


BLOB = "0123456789abcdef0123456789abcdef01234567"


WEIGHTS_BLOB = "0123456789abcdef" * 4


COMMIT = "c" * 40


def hub_cache(
    cache: Path, files: dict[str, bytes], repo: str = "org/name", commit: str = COMMIT
) -> Path:
    """A repository in the hub's cache: refs, blobs, a snapshot of relative symlinks."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for folder in ("refs", "blobs"):
        (root / folder).mkdir()
    (root / "refs" / "main").write_text(commit)
    for number, (name, content) in enumerate(files.items()):
        blob = (
            f"{number:02d}{BLOB[2:]}"
            if name.endswith(".json")
            else f"{number:02d}{WEIGHTS_BLOB[2:]}"
        )
        write(root / "blobs" / blob, content)
        os.symlink(f"../../blobs/{blob}", snapshot / name)
    return snapshot


HUB_FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": packed({"w": tensor()}, b"\1\2\3\4"),
    "preprocessor_config.json": b'{"size": 224}',
}
