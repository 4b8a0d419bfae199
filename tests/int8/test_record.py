"""int8.json: what is written is read again, and everything else is refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from vitrail.errors import CheckpointError
from vitrail.int8.figures import Accuracy, Integrity, LinearFigures
from vitrail.int8.guard import NOT_VERIFIED, GuardReport
from vitrail.int8.recipe import Recipe, float_linears
from vitrail.int8.record import CalibrationRecord, Int8Record, Quantized, parse_record
from vitrail.spec import BlockSpec, ModelSpec, VisionSpec

BLOCKS = BlockSpec(width=64, layers=2, heads=2, mlp=256, activation="gelu", eps=1e-6)
LINEARS = ("0.qkv", "1.qkv")
STAY = float_linears(BLOCKS, ["0.up"])
GUARD = GuardReport(
    NOT_VERIFIED,
    ("the pictures were not yours; give --images",),
    False,
    Accuracy(64, 0.9999, 0.999, 0.998, 0.9995, 0.998, 0.997, 0.95, 0.96, 34.0),
    Integrity(1000, 0, 5000, 3, 1, 0),
    dict.fromkeys(LINEARS, LinearFigures(37.0, 0.0001, 0.01)),
    {},
)
RECORD = Int8Record(
    spec=ModelSpec("vit", "ViTModel", VisionSpec(BLOCKS, (32, 32), (8, 8))).with_int8(LINEARS),
    weights="ab" * 32,
    source=Quantized("photos", None, "cd" * 32),
    recipe=Recipe(rounding="nearest"),
    float_linears=STAY,
    calibration=CalibrationRecord(36, "ef" * 32, "bundled"),
    guard=GUARD,
)


def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(RECORD.encode())
    return content


def test_a_record_survives_json() -> None:
    assert parse_record(_content(), "int8.json") == RECORD


def test_the_bytes_are_the_same_each_time() -> None:
    assert RECORD.encode() == parse_record(_content(), "int8.json").encode()
    assert RECORD.encode().endswith(b"}\n")


def test_a_later_version_may_have_written_it() -> None:
    content = _content() | {"version": "99.0"}
    assert parse_record(content, "int8.json").version == "99.0"


def _paths(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The keys of every object in ``value``, but those of figures and of spec."""
    if not isinstance(value, dict) or path[:1] == ("spec",) or path[:1] == ("guard",):
        return [path]
    return [path, *(found for key, item in value.items() for found in _paths(item, (*path, key)))]


PATHS = [path for path in _paths(_content()) if path]


def _damaged(path: tuple[str, ...], change: Callable[[dict[str, Any], str], None]) -> Any:
    content = copy.deepcopy(_content())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return content


def _refused(content: Any, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        parse_record(content, "folder/int8.json")
    message = str(error.value)
    assert message.startswith("folder/int8.json"), message
    for word in (*words, "got", "wanted"):
        assert word in message, message


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_a_missing_key_is_refused(path: tuple[str, ...]) -> None:
    _refused(_damaged(path, lambda inner, key: inner.pop(key)))


@pytest.mark.parametrize("path", PATHS, ids=".".join)
@pytest.mark.parametrize("value", [None, [], True, -1, {"odd": 1}, ""], ids=repr)
def test_a_value_of_another_type_is_refused(path: tuple[str, ...], value: Any) -> None:
    if path == ("source", "revision") and value is None:
        return
    _refused(_damaged(path, lambda inner, key: inner.__setitem__(key, value)))


@pytest.mark.parametrize("path", [(), ("source",), ("recipe",), ("calibration",)], ids=str)
def test_an_unknown_key_is_refused(path: tuple[str, ...]) -> None:
    content = _damaged((*path, "odd"), lambda inner, key: inner.__setitem__(key, 1))
    _refused(content, "'odd'", "quantize the checkpoint again")


@pytest.mark.parametrize("number", [0, 2, 1.5, "1"])
def test_another_format_is_refused(number: Any) -> None:
    _refused(_content() | {"format": number}, "format", repr(number))


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        (("recipe", "alpha"), 1.5, "alpha"),
        (("recipe", "rounding"), "up", "rounding"),
        (("recipe", "group"), 256, "group"),
        (("recipe", "offset"), 0.2, "offset"),
        (("calibration", "pictures"), 0, "pictures"),
        (("calibration", "origin"), "elsewhere", "origin"),
    ],
)
def test_an_impossible_value_is_refused(path: tuple[str, ...], value: Any, word: str) -> None:
    _refused(_damaged(path, lambda inner, key: inner.__setitem__(key, value)), word)


def test_parts_must_agree_about_the_linears() -> None:
    content = _content()
    content["float_linears"].pop("0.up")
    _refused(content, "float_linears", "'0.up'")
    content = _content()
    content["guard"]["linears"].pop("0.qkv")
    _refused(content, "guard", "'0.qkv'")
    content = _content()
    content["spec"]["vision"]["blocks"]["int8"] = ["0.qkv"]
    _refused(content, "'1.qkv'")


def test_a_record_without_int8_linears_is_refused() -> None:
    content = _content()
    content["spec"] = RECORD.spec.with_int8(()).to_dict()
    _refused(content, "no int8 linears")
