"""The folder of int8 weights: the bits of what stays, and nothing after an error."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTImageProcessorPil

from helpers import make, save
from vitrail.checkpoint.contents import INT8, INT8_WEIGHTS
from vitrail.checkpoint.files import Checkpoint, open_checkpoint
from vitrail.checkpoint.header import read_header
from vitrail.checkpoint.tensors import Source
from vitrail.errors import InputError
from vitrail.int8.folder import write_folder
from vitrail.spec import ModelSpec
from vitrail.weights.loader import hash_weights
from vitrail.zoo import map_tensors, read_spec


class _Record:
    """Stands for an `Int8Record`, of which the writer needs the bytes alone."""

    def __init__(self, weights: str) -> None:
        self.weights = weights

    def encode(self) -> bytes:
        return self.weights.encode()


@pytest.fixture
def source(tmp_path: Path) -> tuple[Checkpoint, ModelSpec, dict[str, Source]]:
    """A ViTModel in bfloat16."""
    folder = tmp_path / "source"
    save(make("ViTModel"), folder, dtype=torch.bfloat16)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    (folder / "README.md").write_text("not copied")
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    return checkpoint, spec, map_tensors(checkpoint, spec)


def _write(out: Path, source: tuple[Checkpoint, ModelSpec, dict[str, Source]]) -> int:
    record: Any = _Record
    return write_folder(out, *source, record)


def test_tensors_keep_their_bits_and_dtypes(
    tmp_path: Path, source: tuple[Checkpoint, ModelSpec, dict[str, Source]]
) -> None:
    checkpoint, spec, sources = source
    written = _write(tmp_path / "out", source)
    names = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert names.keys() == {"config.json", "preprocessor_config.json", INT8, INT8_WEIGHTS}
    assert written == sum(path.stat().st_size for path in names.values())
    modes = {stat.S_IMODE(path.stat().st_mode) for path in names.values()}
    assert len(modes) == 1
    stored, tensors = (
        load_file(checkpoint.folder / "model.safetensors"),
        load_file(names[INT8_WEIGHTS]),
    )
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == spec.tensor_shapes()
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, stored[sources[name].entry.name].view(tensor.shape)), name


def test_the_record_has_the_hash_of_the_written_tensors(
    tmp_path: Path, source: tuple[Checkpoint, ModelSpec, dict[str, Source]]
) -> None:
    _write(tmp_path / "out", source)
    entries = read_header(tmp_path / "out" / INT8_WEIGHTS)
    sources = {name: Source(entry) for name, entry in entries.items()}
    assert (tmp_path / "out" / INT8).read_text() == hash_weights(source[1], sources)


def test_parts_and_transposes_of_stored_tensors(
    tmp_path: Path, source: tuple[Checkpoint, ModelSpec, dict[str, Source]]
) -> None:
    checkpoint, spec, sources = source
    block = "vision.blocks.0"
    fused, turned = torch.randn(96, 32), torch.randn(32, 40).half()
    save_file({"fused": fused, "turned": turned}, tmp_path / "other.safetensors")
    entries = read_header(tmp_path / "other.safetensors")
    sources[f"{block}.k.weight"] = Source(entries["fused"], rows=(32, 64))
    sources[f"{block}.up.weight"] = Source(entries["turned"], transpose=True)
    _write(tmp_path / "out", (checkpoint, spec, sources))
    tensors = load_file(tmp_path / "out" / INT8_WEIGHTS)
    assert torch.equal(tensors[f"{block}.k.weight"], fused[32:64])
    assert torch.equal(tensors[f"{block}.up.weight"], turned.t())
    assert tensors[f"{block}.up.weight"].dtype == torch.float16


def test_the_bytes_are_the_same_each_time(
    tmp_path: Path, source: tuple[Checkpoint, ModelSpec, dict[str, Source]]
) -> None:
    _write(tmp_path / "one", source)
    _write(tmp_path / "two", source)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_an_error_leaves_nothing(
    tmp_path: Path, source: tuple[Checkpoint, ModelSpec, dict[str, Source]]
) -> None:
    def fail(_: str) -> Any:
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"out: cannot be written: No space left"):
        write_folder(tmp_path / "out", *source, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
