"""A damaged folder of int8 weights is a CheckpointError that names the damage, at load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitrail.checkpoint.contents import INT8, INT8_WEIGHTS
from vitrail.checkpoint.files import open_checkpoint
from vitrail.errors import CheckpointError
from vitrail.model.loading import load
from vitrail.tools.info import read
from vitrail.tools.quantize import quantize_model
from vitrail.weights.loader import hash_weights
from vitrail.zoo import map_tensors, read_spec

CLIP = Path(__file__).parents[2] / "engine/vitrail/assets/clip"
UP, DOWN = "vision.blocks.1.up", "vision.blocks.1.down"

Tensors = dict[str, Tensor]
Content = dict[str, Any]


@pytest.fixture
def folder(int8_clip: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(int8_clip, tmp_path / "clip"))


def _edit_json(folder: Path, change: Callable[[Content], object]) -> None:
    content = json.loads((folder / INT8).read_text())
    change(content)
    (folder / INT8).write_text(json.dumps(content))


def _edit_tensors(folder: Path, change: Callable[[Tensors], object], *, rehash: bool) -> None:
    """Change the stored tensors. ``rehash``: int8.json then has the hash of the changed ones."""
    tensors = load_file(folder / INT8_WEIGHTS)
    change(tensors)
    save_file(tensors, folder / INT8_WEIGHTS)
    if rehash:
        checkpoint = open_checkpoint(folder)
        spec = read_spec(checkpoint)
        digest = hash_weights(spec, map_tensors(checkpoint, spec))
        _edit_json(folder, lambda content: content.update(weights=digest))


def _refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load(folder, device="cpu")
    for word in words:
        assert word in str(error.value)


@pytest.mark.filterwarnings("ignore:.*not verified on your data")
def test_the_folder_is_sound_before_it_is_damaged(folder: Path) -> None:
    load(folder, device="cpu")
    _edit_tensors(folder, lambda tensors: None, rehash=True)
    load(folder, device="cpu")


# ---- tensors


def _set(name: str, value: float, row: int = 3) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[name].view(-1)[row].fill_(value)


VALUES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "zero scale": (_set(f"{UP}.scale", 0.0), f"{UP}.scale"),
    "negative scale": (_set(f"{UP}.scale", -0.01), f"{UP}.scale"),
    "NaN scale": (_set(f"{UP}.scale", float("nan")), f"{UP}.scale"),
    "infinite scale": (_set(f"{DOWN}.scale", float("inf")), f"{DOWN}.scale"),
    "subnormal scale": (_set(f"{DOWN}.scale", 1e-40), f"{DOWN}.scale"),
    "zero smoothing": (_set(f"{UP}.smooth", 0.0), f"{UP}.smooth"),
    "negative smoothing": (_set(f"{UP}.smooth", -1.0), f"{UP}.smooth"),
    "NaN smoothing": (_set(f"{UP}.smooth", float("nan")), f"{UP}.smooth"),
    "NaN bias": (_set(f"{UP}.folded_bias", float("nan")), f"{UP}.folded_bias"),
    "infinite bias of down": (_set(f"{DOWN}.bias", float("inf")), f"{DOWN}.bias"),
    "code -128": (_set(f"{UP}.codes", -128), f"{UP}.codes"),
    "code -128 in down": (_set(f"{DOWN}.codes", -128), f"{DOWN}.codes"),
    "NaN in a 16-bit weight": (
        _set("vision.blocks.1.out.weight", float("nan")),
        "vision.blocks.1.out.weight",
    ),
}


@pytest.mark.parametrize("damage", VALUES)
def test_a_value_that_cannot_be(damage: str, folder: Path) -> None:
    """The hash in int8.json is that of the damaged tensors: the value alone tells."""
    change, name = VALUES[damage]
    _edit_tensors(folder, change, rehash=True)
    _refused(folder, INT8_WEIGHTS, name)


@pytest.mark.parametrize("name", [f"{UP}.codes", f"{DOWN}.scale", "text.norm.weight"])
def test_a_value_that_can_be_is_seen_by_the_hash(name: str, folder: Path) -> None:
    def flip(tensors: Tensors) -> None:
        tensors[name].view(-1).view(torch.uint8)[0] ^= 1

    _edit_tensors(folder, flip, rehash=False)
    _refused(folder, INT8_WEIGHTS, "other tensors", "quantize the checkpoint again")


def _drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def _rename(name: str, to: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({to: tensors.pop(name)})


def _recast(name: str, dtype: torch.dtype) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def _reshape(name: str, *shape: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name].view(*shape)})


TENSORS: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    "missing codes": (_drop(f"{UP}.codes"), ("missing", f"{UP}.codes")),
    "missing scale": (_drop(f"{DOWN}.scale"), ("missing", f"{DOWN}.scale")),
    "missing LayerNorm": (_drop("vision.blocks.3.norm1.weight"), ("missing", "3.norm1.weight")),
    "renamed": (
        _rename(f"{UP}.smooth", f"{UP}.smoothing"),
        ("missing", "unexpected", f"{UP}.smoothing"),
    ),
    "unexpected": (_rename(f"{UP}.folded_bias", f"{UP}.weight"), ("unexpected", f"{UP}.weight")),
    "misshaped codes": (
        _reshape(f"{UP}.codes", 128, 512),
        (f"{UP}.codes: got (128, 512), wanted (512, 128)",),
    ),
    "misshaped scale": (_reshape(f"{UP}.scale", 512, 1), (f"{UP}.scale: got (512, 1)",)),
    "codes as floats": (
        _recast(f"{UP}.codes", torch.float32),
        (f"{UP}.codes: got F32, wanted I8",),
    ),
    "codes as uint8": (_recast(f"{UP}.codes", torch.uint8), (f"{UP}.codes", "U8")),
    "scale in 16 bits": (
        _recast(f"{UP}.scale", torch.float16),
        (f"{UP}.scale: got F16, wanted F32",),
    ),
    "smoothing in 16 bits": (
        _recast(f"{UP}.smooth", torch.bfloat16),
        (f"{UP}.smooth: got BF16, wanted F32",),
    ),
    "a weight as int8": (
        _recast("vision.blocks.1.out.weight", torch.int8),
        ("vision.blocks.1.out.weight", "I8"),
    ),
}


@pytest.mark.parametrize("damage", TENSORS)
def test_tensors_that_do_not_fit_the_record(damage: str, folder: Path) -> None:
    change, words = TENSORS[damage]
    _edit_tensors(folder, change, rehash=False)
    _refused(folder, *words)


# ---- files


def test_weights_that_end_early(folder: Path) -> None:
    path = folder / INT8_WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    _refused(folder, INT8_WEIGHTS)


@pytest.mark.parametrize(("name", "words"), [(INT8, (INT8,)), (INT8_WEIGHTS, (INT8_WEIGHTS,))])
def test_a_file_that_is_missing(name: str, words: tuple[str, ...], folder: Path) -> None:
    (folder / name).unlink()
    _refused(folder, *words)


def test_the_record_of_another_checkpoint(folder: Path) -> None:
    def others(content: Content) -> None:
        content["spec"]["vision"]["blocks"]["layers"] = 5
        content["spec"]["vision"]["blocks"]["int8"] += ["3.up", "3.down", "4.qkv"]
        content["float_linears"] = {f"4.{name}": "the last block" for name in ("up", "down")}
        figures = content["guard"]["linears"]["0.qkv"]
        content["guard"]["linears"] |= dict.fromkeys(("3.up", "3.down", "4.qkv"), figures)

    _edit_json(folder, others)
    _refused(folder, "do not fit int8.json", "missing", "vision.blocks.4.qkv.codes")


def test_the_record_of_another_quantization(folder: Path, tmp_path: Path) -> None:
    quantize_model(CLIP, tmp_path / "other", keep_fp16=["0.*"], device="cpu")
    shutil.copy(tmp_path / "other" / INT8, folder / INT8)
    _refused(folder, "do not fit int8.json", "vision.blocks.0.norm1.weight")


def test_the_record_of_other_codes(folder: Path) -> None:
    """The same linears, and tensors that fit: only the hash tells."""
    _edit_json(folder, lambda content: content.update(weights="0" * 64))
    _refused(folder, INT8_WEIGHTS, "other tensors")


RECORDS: dict[str, tuple[Callable[[Content], object], str]] = {
    "unknown key": (lambda c: c.update(extra=1), "extra"),
    "missing key": (lambda c: c.pop("guard"), "guard"),
    "format 2": (lambda c: c.update(format=2), "format: got 2"),
    "no format": (lambda c: c.pop("format"), "format: got None"),
    "spec of no model": (lambda c: c.update(spec=None), "spec: got None"),
    "spec with another key": (lambda c: c["spec"].update(extra=1), "spec"),
    "no int8 linears": (lambda c: c["spec"]["vision"]["blocks"].pop("int8"), "int8"),
    "down without up": (
        lambda c: c["spec"]["vision"]["blocks"]["int8"].remove("1.up"),
        "int8 linears",
    ),
    "linears out of order": (
        lambda c: c["spec"]["vision"]["blocks"]["int8"].reverse(),
        "int8 linears",
    ),
    "a linear of no block": (
        lambda c: c["spec"]["vision"]["blocks"]["int8"].append("9.qkv"),
        "int8 linears",
    ),
    "the last block's up": (
        lambda c: c["spec"]["vision"]["blocks"]["int8"].append("3.up"),
        "int8 linears",
    ),
    "hash of no text": (lambda c: c.update(weights=3), "weights: got 3"),
    "another recipe": (lambda c: c["recipe"].update(rounding="up"), "rounding: got 'up'"),
    "a verdict of its own": (lambda c: c["guard"].update(verdict="fine"), "verdict: got 'fine'"),
    "a figure in words": (lambda c: c["guard"]["accuracy"].update(sqnr="high"), "sqnr"),
    "figures of another linear": (
        lambda c: c["guard"]["linears"].update({"7.up": c["guard"]["linears"]["1.up"]}),
        "7.up",
    ),
}


@pytest.mark.parametrize("damage", RECORDS)
def test_a_damaged_record(damage: str, folder: Path) -> None:
    change, word = RECORDS[damage]
    _edit_json(folder, change)
    _refused(folder, INT8, word)
    with pytest.raises(CheckpointError):
        read(str(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1, "format": 1}', "\ufeff{}", "null"])
def test_a_record_that_is_no_json_object(text: str, folder: Path) -> None:
    (folder / INT8).write_text(text)
    _refused(folder, INT8)
