"""A folder is opened by the names of its files; wrong paths and arguments are named."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpoint.samples import (
    CONFIG,
    GOOD,
    INDEX,
    SINGLE,
    checkpoint_folder,
    packed,
    refused,
    tensor,
    write,
    write_json,
)
from vitrail.checkpoint.files import open_checkpoint
from vitrail.errors import InputError


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        ([SINGLE], SINGLE),
        ([SINGLE, "model.fp16.safetensors", "pytorch_model.bin", "tf_model.h5"], SINGLE),
        ([SINGLE, INDEX, "model-00001-of-00001.safetensors"], SINGLE),
        ([INDEX, "model-00001-of-00001.safetensors", "model.fp16.safetensors"], "model-00001-of-0"),
        (["open_clip_model.safetensors", "open_clip_pytorch_model.bin"], "open_clip_model"),
    ],
    ids=["single", "among variants", "single and shards", "shards and variant", "one other"],
)
def test_the_weights_are_chosen_by_name(present: list[str], chosen: str, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", CONFIG)
    for name in present:
        write(tmp_path / name, packed({"w": tensor()}))
    if INDEX in present:
        weight_map = {"w": "model-00001-of-00001.safetensors"}
        write_json(tmp_path / INDEX, {"metadata": {"total_size": -1}, "weight_map": weight_map})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors["w"].file.name.startswith(chosen)
    assert (checkpoint.folder, checkpoint.revision) == (tmp_path, None)


@pytest.mark.parametrize(
    ("present", "fragments"),
    [
        ([], ["got no weights, wanted model.safetensors, model.safetensors.index.json or one"]),
        (
            ["model.fp16.safetensors", "model.bf16.safetensors"],
            ["got model.bf16.safetensors, model.fp16.safetensors and no model.safetensors"],
        ),
        (
            ["pytorch_model.bin", "training_args.bin"],
            [
                "got pytorch_model.bin, training_args.bin only",
                "safe_serialization=True",
                "never read",
            ],
        ),
        (["model.pt"], ["got model.pt only", "never read"]),
        (["model.pth", "README.md"], ["got model.pth only", "never read"]),
        (["flax_model.msgpack"], ["got flax_model.msgpack only", "never read"]),
        (["tf_model.h5"], ["got tf_model.h5 only", "never read"]),
    ],
    ids=["none", "two variants", "bin", "pt", "pth", "msgpack", "h5"],
)
def test_weights_that_cannot_be_chosen_are_named(
    present: list[str], fragments: list[str], tmp_path: Path
) -> None:
    write_json(tmp_path / "config.json", CONFIG)
    for name in present:
        write(tmp_path / name, pickle.dumps("never read"))
    refused(lambda: open_checkpoint(tmp_path), f"{tmp_path}: ", *fragments)


def test_one_file_can_be_opened_by_its_path(tmp_path: Path) -> None:
    checkpoint_folder(tmp_path)
    path = write(tmp_path / "model.fp16.safetensors", packed({"half": tensor("F16", [2])}))
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.tensors.keys() == {"half"}
    assert (checkpoint.folder, checkpoint.source) == (tmp_path, str(path))
    assert checkpoint.config == CONFIG


@pytest.mark.parametrize(
    ("typed", "fragments"),
    [
        (
            "missing",
            ["'missing': got no such folder or file, wanted an existing checkpoint folder"],
        ),
        ("./a/b", ["'./a/b': got no such folder or file", '"org/name"']),
        ("a/b/c", ["'a/b/c': got no such folder or file"]),
        ("/no/such/folder", ["'/no/such/folder': got no such folder or file"]),
        ("google/..", ["'google/..': got no such folder or file"]),
        ("a--b/c", ["'a--b/c': got no such folder or file"]),
        ("nul\0/b", ["'nul\\x00/b': got no such folder or file"]),
        ("new\nline/b", ["'new\\nline/b': got no such folder or file"]),
        ("n" * 5000, ["cannot be read: File name too long"]),
        ("plain.txt", ["plain.txt: got a file, wanted a checkpoint folder or a .safetensors file"]),
        ("weights.bin", ["weights.bin: got a file", "pickles and the like are never read"]),
        ("plain.txt/a/b", ["'plain.txt/a/b': got no such folder or file"]),
        ("empty", ["empty: got no config.json, wanted a checkpoint folder"]),
        ("loose.safetensors", ["got no config.json"]),
    ],
)
def test_a_wrong_path_is_called_that_and_the_network_is_left_alone(
    typed: str, fragments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # an import of it fails
    for name in ("plain.txt", "weights.bin"):
        write(tmp_path / name, b"text")
    write(tmp_path / "loose.safetensors", packed(GOOD))
    (tmp_path / "empty").mkdir()
    refused(lambda: open_checkpoint(typed), *fragments)


def test_a_path_object_is_never_taken_for_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(lambda: open_checkpoint(Path("org/name")), "'org/name': got no such folder or file")
    refused(lambda: open_checkpoint("org/name"), "org/name: a hub id needs huggingface_hub: pip")


@pytest.mark.parametrize("value", [7, None, b"folder", "", ["a"]])
def test_an_argument_of_another_kind_is_an_input_error(value: Any) -> None:
    with pytest.raises(InputError, match=r"path_or_id: got .+, wanted a path or a hub id"):
        open_checkpoint(value)


def test_a_revision_means_nothing_to_a_local_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="revision: got 'main' for the local"):
        open_checkpoint(checkpoint_folder(tmp_path), revision="main")


NO_NETWORK = """
import os, socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("a local folder asked for the network")
socket.socket = socket.create_connection = socket.getaddrinfo = refuse
from vitrail.checkpoint.files import open_checkpoint
from vitrail.checkpoint.tensors import TensorReader
checkpoint = open_checkpoint(sys.argv[1])
with TensorReader() as reader:
    for entry in checkpoint.tensors.values():
        reader.read_into(entry, 0, memoryview(bytearray(entry.nbytes)))
heavy = {"huggingface_hub", "torch", "numpy", "safetensors", "pickle"} & set(sys.modules)
assert not heavy, heavy
print(len(checkpoint.tensors))
"""


@pytest.mark.parametrize("name", ["folder", "org/name"])
def test_a_local_folder_touches_no_network_and_imports_nothing_heavy(
    name: str, tmp_path: Path
) -> None:
    checkpoint_folder(tmp_path / name)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("HF_HUB_OFFLINE", None)
    for typed in (name, f"./{name}/model.safetensors", str(tmp_path / name)):
        done = subprocess.run(
            [sys.executable, "-c", NO_NETWORK, typed],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_configurations_that_are_absent_are_none(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_folder(tmp_path))
    assert checkpoint.preprocessor is None
    assert checkpoint.tokenizer_config is None
    assert checkpoint.file("tokenizer.json") is None


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ({"size": 1}, None, {"size": 1}),
        (None, {"image_processor": {"size": 2}}, {"size": 2}),
        ({"size": 1}, {"image_processor": {"size": 2}}, {"size": 2}),
        ({"size": 1}, {"processor_class": "CLIPProcessor"}, {"size": 1}),
        (None, {"processor_class": "CLIPProcessor"}, None),
        ({"size": 1}, {"image_processor": None}, {"size": 1}),
    ],
    ids=["old", "nested", "nested wins", "not nested", "neither", "null"],
)
def test_the_image_processor_is_found_where_transformers_finds_it(
    old: object, new: object, wanted: object, tmp_path: Path
) -> None:
    folder = checkpoint_folder(tmp_path)
    if old is not None:
        write_json(folder / "preprocessor_config.json", old)
    if new is not None:
        write_json(folder / "processor_config.json", new)
    assert open_checkpoint(folder).preprocessor == wanted


def test_an_image_processor_that_is_no_object_is_refused(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path)
    write_json(folder / "processor_config.json", {"image_processor": [1, 2]})
    refused(
        lambda: open_checkpoint(folder),
        "processor_config.json: image_processor: got [1, 2], wanted an object",
    )


def test_extra_files_are_found_inside_the_folder_only(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path / "folder")
    write(folder / "vocab.json", b"{}")
    write_json(folder / "tokenizer_config.json", {"model_max_length": 77})
    write(tmp_path / "secret", b"x")
    os.symlink(tmp_path / "secret", folder / "merges.txt")
    os.mkfifo(folder / "tokenizer.json")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tokenizer_config == {"model_max_length": 77}
    assert checkpoint.file("vocab.json") == folder / "vocab.json"
    refused(lambda: checkpoint.file("merges.txt"), "merges.txt: got a symlink to ", "secret")
    refused(lambda: checkpoint.file("tokenizer.json"), "got a FIFO, wanted a regular file")
