"""An index and its shards agree, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTModel

from checkpoint.samples import (
    INDEX,
    SHARDS,
    A,
    B,
    contents,
    packed,
    refused,
    sharded,
    tensor,
    write,
)
from vitrail.checkpoint.files import open_checkpoint
from vitrail.checkpoint.header import MAX_HEADER_BYTES
from vitrail.checkpoint.strict_json import MAX_JSON_BYTES


def test_shards_saved_by_transformers_hold_what_its_single_file_holds(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
    )
    model = ViTModel(config).bfloat16()
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    model.save_pretrained(tmp_path / "single")
    shards, single = open_checkpoint(tmp_path / "shards"), open_checkpoint(tmp_path / "single")
    assert len({entry.file for entry in shards.tensors.values()}) > 2
    assert len(single.tensors) == len(model.state_dict())
    assert contents(shards.tensors) == contents(single.tensors)
    facts = {name: (entry.dtype, entry.shape) for name, entry in single.tensors.items()}
    assert facts == {n: (entry.dtype, entry.shape) for n, entry in shards.tensors.items()}
    saved = set(contents(single.tensors).values())
    state = model.state_dict().values()
    assert saved == {value.reshape(-1).view(torch.uint8).numpy().tobytes() for value in state}
    assert {entry.dtype for entry in shards.tensors.values()} == {"BF16"}


def test_the_total_size_an_index_claims_is_not_believed(tmp_path: Path) -> None:
    weight_map = {"a": A, "b": A, "c": B}
    index = {"metadata": {"total_size": 10**18, "x": None}, "weight_map": weight_map}
    checkpoint = open_checkpoint(sharded(tmp_path, SHARDS, index))
    assert {name: entry.nbytes for name, entry in checkpoint.tensors.items()} == {
        "a": 3,
        "b": 5,
        "c": 2,
    }


@pytest.mark.parametrize(
    "name",
    [
        *("../outside.safetensors", "/etc/outside.safetensors", "sub/x.safetensors"),
        *("a\\x.safetensors", "..", ".hidden.safetensors", "pytorch_model.bin", ""),
        *("a\0.safetensors", 7, None, ["a"]),
    ],
)
def test_an_index_names_plain_files_of_the_folder_only(name: object, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "folder", SHARDS, {"weight_map": {"a": name, "b": A, "c": B}})
    write(tmp_path / "outside.safetensors", packed({"a": tensor()}))
    refused(
        lambda: open_checkpoint(folder),
        f"{INDEX}: weight_map: 'a': got {name!r}, wanted the plain name of a .safetensors file",
    )


@pytest.mark.parametrize(
    ("index", "fragment"),
    [
        (
            {"weight_map": {"a": A, "b": A, "c": B, "d": "model-3.safetensors"}},
            f"{INDEX}: got the shard 'model-3.safetensors', which is not there, wanted every shard",
        ),
        (
            {"weight_map": {"a": A, "c": B}},
            f"{A}: got the tensor 'b', which the index lists nowhere, wanted each tensor in the",
        ),
        (
            {"weight_map": {"a": A, "b": B, "c": B}},
            f"{A}: got the tensor 'b', which the index lists in '{B}', wanted each tensor",
        ),
        (
            {"weight_map": {"a": A, "b": A, "c": B, "d": B}},
            f"{INDEX}: got 1 listed tensors in no shard, first 'd' ('{B}')",
        ),
        ({"weight_map": {}}, "weight_map: got {}, wanted an object of 1 to 20,000 shard names"),
        ({"weight_map": [A, B]}, "weight_map: got ['model-00001"),
        ({"metadata": {}}, "weight_map: got None, wanted an object"),
        (
            {"weight_map": {str(i): f"{i}.safetensors" for i in range(257)}},
            "weight_map: got 257 shards, wanted at most 256",
        ),
        (
            {"weight_map": dict.fromkeys(map(str, range(20_001)), A)},
            "wanted an object of 1 to 20,000 shard names",
        ),
    ],
    ids=[
        *("missing shard", "not listed", "listed elsewhere", "in no shard", "empty", "list"),
        *("absent", "257 shards", "20,001 tensors"),
    ],
)
def test_index_and_shards_that_disagree_are_refused(
    index: object, fragment: str, tmp_path: Path
) -> None:
    refused(lambda: open_checkpoint(sharded(tmp_path, SHARDS, index)), fragment)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {A: {"a": 3, "b": 5}, B: {"c": 2, "a": 3}})
    refused(
        lambda: open_checkpoint(folder),
        f"{A}: got the tensor 'a', which the index lists in '{B}', wanted each tensor in the shard",
    )


def test_an_index_may_be_larger_than_a_configuration_but_not_endless(tmp_path: Path) -> None:
    names = {f"{i:05d}." + "n" * 100: 1 for i in range(10_000)}
    folder = sharded(tmp_path, {A: names})
    assert (folder / INDEX).stat().st_size > MAX_JSON_BYTES
    assert len(open_checkpoint(folder).tensors) == 10_000
    with (folder / INDEX).open("ab") as file:
        file.truncate(MAX_HEADER_BYTES + 1)
    refused(lambda: open_checkpoint(folder), f"{INDEX}: got 16,777,217 bytes, wanted at most")
