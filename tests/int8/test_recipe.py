"""The recipe, and the linears that a user keeps in 16 bits."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vitrail.errors import InputError
from vitrail.int8.recipe import LAST_BLOCK, UP_STAYS, Recipe, float_linears, int8_linears
from vitrail.spec import BlockSpec

BLOCKS = BlockSpec(width=64, layers=3, heads=2, mlp=256, activation="gelu", eps=1e-6)
LAST = {"2.up": LAST_BLOCK, "2.down": LAST_BLOCK}


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": 1.01}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"rounding": "up"}, "rounding"),
        ({"offset": 0.25}, "offset"),
        ({"group": 256}, "group"),
    ],
)
def test_a_recipe_that_no_kernel_follows_is_refused(values: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        Recipe(**values)


def test_the_last_block_keeps_its_mlp() -> None:
    assert float_linears(BLOCKS) == LAST
    expected = ("0.qkv", "0.up", "0.down", "1.qkv", "1.up", "1.down", "2.qkv")
    assert int8_linears(BLOCKS, LAST) == expected


@pytest.mark.parametrize(
    ("patterns", "stay"),
    [
        (["0.*"], {"0.qkv", "0.up", "0.down"}),
        (["*.down"], {"0.down", "1.down"}),
        (["1.up"], {"1.up", "1.down"}),
        (["1.qkv", "2.qkv"], {"1.qkv", "2.qkv"}),
        (["2.*"], {"2.qkv"}),
    ],
)
def test_patterns_keep_linears(patterns: list[str], stay: set[str]) -> None:
    reasons = float_linears(BLOCKS, patterns)
    assert reasons.keys() == stay | LAST.keys()
    int8 = int8_linears(BLOCKS, reasons)
    assert {*int8} == {*BLOCKS.int8_candidates} - stay
    BlockSpec(64, 3, 2, 256, "gelu", 1e-6, int8=int8)  # refuses a down without its up


def test_reasons_name_the_pattern_or_the_rule() -> None:
    reasons = float_linears(BLOCKS, ["1.up", "*.qkv"])
    assert reasons["1.up"] == "--keep-fp16 1.up"
    assert reasons["1.down"] == UP_STAYS
    assert reasons["0.qkv"] == "--keep-fp16 *.qkv"
    assert reasons["2.up"] == LAST_BLOCK


@pytest.mark.parametrize("pattern", ["3.*", "qkv", "0.out", ""])
def test_a_pattern_without_a_linear_is_an_error(pattern: str) -> None:
    with pytest.raises(InputError, match=r"matches no linear.*0\.qkv to 2\.qkv"):
        float_linears(BLOCKS, [pattern])
