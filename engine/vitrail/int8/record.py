"""int8.json: how a folder of int8 weights was made, and what the guard says of it.

The record is read strictly: an unknown or a missing key, or a value of another type, is an error.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vitrail._version import __version__
from vitrail.checkpoint.contents import INT8
from vitrail.checkpoint.files import Checkpoint
from vitrail.errors import CheckpointError, InputError, refusal, show, show_path
from vitrail.int8.guard import GuardReport
from vitrail.int8.recipe import Recipe
from vitrail.spec import ModelSpec
from vitrail.zoo.int8 import AGAIN, FORMAT, check_format, parse_spec

Origin = Literal["bundled", "own"]


@dataclass(frozen=True, slots=True)
class Quantized:
    """The checkpoint that was quantized: its ``name``, the hub ``revision`` (None for a local
    folder), and the hash of its ``weights``."""

    name: str
    revision: str | None
    weights: str


@dataclass(frozen=True, slots=True)
class CalibrationRecord:
    """How many ``pictures`` calibrated, the SHA-256 of their ``pixels``, and whether they are the
    sample photos or the user's own."""

    pictures: int
    pixels: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class Int8Record:
    """The contents of int8.json.

    ``version`` of Vitrail, which wrote it. ``spec``: of the model, with its int8 linears.
    ``weights``: the hash of the stored tensors. ``float_linears``: the linears among qkv, up and
    down that stay in 16 bits, each with the reason.
    """

    spec: ModelSpec
    weights: str
    source: Quantized
    recipe: Recipe
    float_linears: Mapping[str, str]
    calibration: CalibrationRecord
    guard: GuardReport
    version: str = __version__

    def encode(self) -> bytes:
        """The bytes of int8.json."""
        content = {
            "format": FORMAT,
            "version": self.version,
            "source": dataclasses.asdict(self.source),
            "recipe": dataclasses.asdict(self.recipe),
            "calibration": dataclasses.asdict(self.calibration),
            "guard": self.guard.to_dict(),
            "float_linears": dict(self.float_linears),
            "weights": self.weights,
            "spec": self.spec.to_dict(),
        }
        return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def read_record(checkpoint: Checkpoint) -> Int8Record:
    """The record of a folder of int8 weights.

    Raises CheckpointError that names the file, the key, the value and what was wanted.
    """
    location = show_path(checkpoint.folder / INT8)
    if checkpoint.int8 is None:
        raise refusal(location, "no such file", "a folder that vitrail quantize wrote")
    return parse_record(checkpoint.int8, location)


def parse_record(content: Mapping[str, Any], location: str) -> Int8Record:
    """The record in the JSON object ``content``. Errors: see `read_record`."""
    check_format(content, location)
    _check_keys(content, {"format", *(f.name for f in dataclasses.fields(Int8Record))}, location)
    for name in ("version", "weights"):
        _check_text(content[name], f"{location}: {name}")
    record = Int8Record(
        parse_spec(content["spec"], location),
        content["weights"],
        _source(content["source"], f"{location}: source"),
        _recipe(content["recipe"], f"{location}: recipe"),
        _reasons(content["float_linears"], f"{location}: float_linears"),
        _calibration(content["calibration"], f"{location}: calibration"),
        GuardReport.from_dict(content["guard"], f"{location}: guard"),
        content["version"],
    )
    _check_linears(record, location)
    return record


def _check_linears(record: Int8Record, location: str) -> None:
    """Refuses a record whose parts disagree about the linears that are int8."""
    assert record.spec.vision is not None, "the spec has int8 linears"
    blocks = record.spec.vision.blocks
    linears = {*blocks.int8_candidates, *(f"{blocks.layers - 1}.{x}" for x in ("up", "down"))}
    int8 = {*blocks.int8}
    stay = linears - int8
    for name, names, expected in (
        ("float_linears", {*record.float_linears}, stay),
        ("guard", {*record.guard.int8}, int8),
    ):
        if names != expected:
            odd = sorted(names ^ expected)
            actual = f"other linears than spec has: {show(odd)}"
            raise refusal(f"{location}: {name}", actual, f"the same, {AGAIN}")


def _source(value: object, location: str) -> Quantized:
    content = _object(value, location)
    _check_keys(content, {"name", "revision", "weights"}, location)
    for name in ("name", "weights"):
        _check_text(content[name], f"{location}: {name}")
    if content["revision"] is not None:
        _check_text(content["revision"], f"{location}: revision")
    return Quantized(**content)


def _recipe(value: object, location: str) -> Recipe:
    content = _object(value, location)
    _check_keys(content, {field.name for field in dataclasses.fields(Recipe)}, location)
    for name, types in (("alpha", (int, float)), ("offset", (int, float)), ("group", (int,))):
        _check_number(content[name], types, f"{location}: {name}")
    try:
        return Recipe(**content)
    except InputError as error:
        raise CheckpointError(f"{location}: {error}; {AGAIN}") from None


def _calibration(value: object, location: str) -> CalibrationRecord:
    content = _object(value, location)
    _check_keys(content, {"pictures", "pixels", "origin"}, location)
    _check_number(content["pictures"], (int,), f"{location}: pictures")
    if content["pictures"] < 1:
        raise refusal(f"{location}: pictures", show(content["pictures"]), f"at least 1, {AGAIN}")
    _check_text(content["pixels"], f"{location}: pixels")
    if content["origin"] not in get_args(Origin):
        expected = f"one of {get_args(Origin)}, {AGAIN}"
        raise refusal(f"{location}: origin", show(content["origin"]), expected)
    return CalibrationRecord(**content)


def _reasons(value: object, location: str) -> dict[str, str]:
    content = _object(value, location)
    for name, reason in content.items():
        _check_text(reason, f"{location}: {name}")
    return content


def _object(value: object, location: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise refusal(location, show(value), f"an object, {AGAIN}")
    return value


def _check_keys(content: Mapping[str, Any], keys: set[str], location: str) -> None:
    for fault, names in (("no", keys - content.keys()), ("the key", content.keys() - keys)):
        if names:
            raise refusal(location, f"{fault} {show(min(names))}", f"the keys of format 1, {AGAIN}")


def _check_text(value: object, location: str) -> None:
    if not isinstance(value, str) or not value:
        raise refusal(location, show(value), f"a text, {AGAIN}")


def _check_number(value: object, types: tuple[type, ...], location: str) -> None:
    if not isinstance(value, types) or isinstance(value, bool):
        expected = "an integer" if types == (int,) else "a number"
        raise refusal(location, show(value), f"{expected}, {AGAIN}")
