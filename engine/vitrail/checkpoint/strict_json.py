"""JSON read strictly: an object with a single meaning, within limits, or a CheckpointError."""

import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from vitrail.checkpoint.regular import read_file
from vitrail.errors import CheckpointError, refusal, show, show_path

MAX_JSON_BYTES = 1 << 20
MAX_DIGITS = 40
MAX_DEPTH = 64
MAX_STRUCTURE = 1_000_000

Raw = bytes | bytearray

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NOT_STRUCTURE = bytes(set(range(256)) - set(b",[]{}"))
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most ``limit`` bytes, as strict as `parse_json`."""
    return parse_json(read_file(path, limit, " bytes of JSON"), show_path(path))


def parse_json(raw: Raw, location: str) -> dict[str, Any]:
    """The JSON object in ``raw``. Messages begin with ``location``.

    Raises CheckpointError unless the text is UTF-8 without a byte order mark and has: no duplicate
    keys at any depth; no NaN, infinity, or number that overflows to infinity; integers of at most
    ``MAX_DIGITS`` digits; no lone surrogates; at most ``MAX_DEPTH`` levels, and at most
    ``MAX_STRUCTURE`` commas and brackets, or quotes. "-0" is the float -0.0, as JSON's minus sign
    says.
    """
    if raw.startswith(b"\xef\xbb\xbf"):
        raise refusal(location, "a byte order mark", "JSON in UTF-8 without one")
    _check_structure(raw, location)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            [(key, count)] = Counter(key for key, _ in pairs).most_common(1)
            raise refusal(location, f"the key {show(key)} {count} times", "each key once")
        return fields

    def integer(text: str) -> int | float:
        # transformers writes an integer of 31 digits, "no limit", into tokenizer_config.json
        if len(text) > MAX_DIGITS:
            actual = f"an integer of {len(text)} characters"
            raise refusal(location, actual, f"at most {MAX_DIGITS}")
        return -0.0 if text == "-0" else int(text)

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise refusal(location, f"the number {show(text)}", "finite numbers")
        return number

    try:
        text = raw.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_int=integer,
            parse_float=finite,
            parse_constant=finite,
        )
        if _ESCAPED_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{location}: not valid JSON: {error.msg}, at character {error.pos}"
        ) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{location}: not UTF-8 at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise refusal(location, "half of a surrogate pair", "whole characters") from error
    if not isinstance(value, dict):
        raise refusal(location, f"a JSON {type(value).__name__}", "a JSON object")
    return value


def _check_structure(raw: Raw, location: str) -> None:
    """Limits depth and size before the parser runs, which would spend stack and memory on them."""
    quotes = raw.count(b'"')
    structure = (
        _STRING.sub(b"", raw).translate(None, _NOT_STRUCTURE) if quotes <= MAX_STRUCTURE else b""
    )
    if max(quotes, len(structure)) > MAX_STRUCTURE:
        limit = f"at most {MAX_STRUCTURE:,} commas or quotes"
        raise refusal(location, "JSON of too many values", limit)
    brackets = structure.translate(_STEPS, b",")
    steps = memoryview(brackets).cast("b")
    if brackets.count(b"\x01") > MAX_DEPTH and max(itertools.accumulate(steps)) > MAX_DEPTH:
        actual = f"JSON nested deeper than {MAX_DEPTH} levels"
        raise refusal(location, actual, f"at most {MAX_DEPTH}")
