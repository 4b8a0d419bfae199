"""JSON has a single meaning, or is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from checkpoint.samples import CONFIG, checkpoint_folder, measure, refused, write
from gauge import within
from vitrail.checkpoint.files import open_checkpoint
from vitrail.checkpoint.strict_json import MAX_DEPTH, MAX_JSON_BYTES, read_json

BAD_JSON: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON: Expecting value, at character 0"),
    "array": (b"[1]", "got a JSON list, wanted a JSON object"),
    "string": (b'"a"', "got a JSON str, wanted a JSON object"),
    "null": (b"null", "got a JSON NoneType, wanted a JSON object"),
    "byte order mark": (
        b"\xef\xbb\xbf{}",
        "got a byte order mark, wanted JSON in UTF-8 without one",
    ),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8 at byte 0"),
    "Latin-1": ('{"a": "é"}'.encode("latin-1"), "not UTF-8 at byte 7"),
    "duplicate key": (b'{"a": 1, "a": 1}', "got the key 'a' 2 times, wanted each key once"),
    "duplicate key within": (b'{"a": [{"b": 1, "c": 2, "b": 3}]}', "got the key 'b' 2 times"),
    "NaN": (b'{"a": NaN}', "got the number 'NaN', wanted finite numbers"),
    "Infinity": (b'{"a": [Infinity]}', "got the number 'Infinity'"),
    "-Infinity": (b'{"a": -Infinity}', "got the number '-Infinity'"),
    "1e999": (b'{"a": 1e999}', "got the number '1e999'"),
    "integer of 5,000 digits": (
        b'{"a": ' + b"9" * 5000 + b"}",
        "got an integer of 5000 characters",
    ),
    "lone surrogate": (
        b'{"a": "\\udc00"}',
        "got half of a surrogate pair, wanted whole characters",
    ),
    "comment": (b'{"a": 1} // one', "not valid JSON: Extra data, at character 9"),
    "trailing comma": (b'{"a": 1,}', "not valid JSON: "),
    "65 levels": (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "nested deeper than 64 levels"),
    "100,000 levels": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deeper than 64 levels"),
    "100,000 objects deep": (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "deeper than 64 levels"),
    "10 MB": (b'{"a": "' + b"x" * 10_000_000 + b'"}', "10,000,009 bytes, wanted at most 1,048,576"),
}


@pytest.mark.machine
@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    content, fragment = BAD_JSON[name]
    checkpoint_folder(tmp_path)
    for file in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        kept = (tmp_path / file).read_bytes() if (tmp_path / file).exists() else b"{}"
        path = write(tmp_path / file, content)
        with within(1.0):
            refused(lambda: open_checkpoint(tmp_path), f"{path}: ", fragment)
        path.write_bytes(kept)
    assert open_checkpoint(tmp_path).config == CONFIG


def test_good_json_is_read_to_the_letter(tmp_path: Path) -> None:
    text = '{"ü": ["\\ud83d\\ude00", "\\\\ud800", 1e-12, 1.5, -7, true, -0, 18446744073709551615]}'
    assert read_json(write(tmp_path / "a.json", text.encode())) == json.loads(text)
    text = '{"model_max_length": 1000000000000000019884624838656}'  # transformers: no limit
    assert read_json(write(tmp_path / "a.json", text.encode())) == json.loads(text)
    deep = '{"a": ' + "[" * (MAX_DEPTH - 1) + '"]]"' + "]" * (MAX_DEPTH - 1) + "}"
    assert read_json(write(tmp_path / "a.json", deep.encode())) == json.loads(deep)
    brackets = json.dumps({"a": "[" * 1000 + '"{' * 1000})
    assert read_json(write(tmp_path / "a.json", brackets.encode())) == json.loads(brackets)
    full = b'{"a": "' + b"x" * (MAX_JSON_BYTES - 9) + b'"}'
    assert len(read_json(write(tmp_path / "a.json", full))["a"]) == MAX_JSON_BYTES - 9


def test_depth_is_refused_whatever_the_recursion_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", b'{"a": ' + b"[" * 400_000 + b"]" * 400_000 + b"}")
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000_000)
    try:
        refused(lambda: read_json(path), "nested deeper than 64 levels")
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.machine
def test_json_of_many_values_costs_little(tmp_path: Path) -> None:
    text = b'{"a": [' + b"[]," * 349_000 + b"[]]}"
    took, grown, outcome = measure(write(tmp_path / "a.json", text))
    assert "got JSON of too many values" in outcome
    assert took < 0.2
    assert grown < 20
