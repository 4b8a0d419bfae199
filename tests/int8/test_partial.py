"""The partial folder: blocks are kept for the same inputs, and for no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vitrail.checkpoint.tensors import TensorReader
from vitrail.errors import InputError
from vitrail.int8.partial import PartialFolder

TENSORS = {"a.codes": torch.tensor([[1, -127]], dtype=torch.int8), "a.scale": torch.ones(1)}


def test_blocks_are_kept_for_the_same_key(tmp_path: Path) -> None:
    first = PartialFolder(tmp_path / "out", {"alpha": 0.7})
    assert not first.has(3)
    first.put(3, TENSORS)
    again = PartialFolder(tmp_path / "out", {"alpha": 0.7})
    assert again.has(3)
    sources = again.sources()
    assert sources.keys() == TENSORS.keys()
    raw = bytearray(2)
    with TensorReader() as reader:
        reader.read_into(sources["a.codes"].entry, 0, memoryview(raw))
    assert raw == b"\x01\x81"


def test_blocks_of_another_key_are_deleted(tmp_path: Path) -> None:
    PartialFolder(tmp_path / "out", {"alpha": 0.7}).put(0, TENSORS)
    other = PartialFolder(tmp_path / "out", {"alpha": 0.5})
    assert not other.has(0)
    assert other.sources() == {}


def test_it_can_be_removed(tmp_path: Path) -> None:
    partial = PartialFolder(tmp_path / "out", {})
    partial.put(0, TENSORS)
    partial.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"out\.partial: got a folder without partial\.json"):
        PartialFolder(tmp_path / "out", {})
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "precious"


def test_a_file_of_that_name_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("precious")
    with pytest.raises(InputError, match=r"out\.partial: cannot be written"):
        PartialFolder(tmp_path / "out", {})
