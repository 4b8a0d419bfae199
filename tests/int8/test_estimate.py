"""The estimated speed-up of int8: figures of the model that were worked out before this code."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import pytest

from vitrail.int8.estimate import block, describe, estimate, last_block
from vitrail.spec import BlockSpec, VisionSpec

LINEARS = ("qkv", "up", "down")


def vit(width: int, patch: int, side: int = 224, layers: int = 12) -> VisionSpec:
    blocks = BlockSpec(width, layers, width // 64, 4 * width, "gelu", 1e-6)
    return VisionSpec(blocks, (side, side), (patch, patch))


VIT_B16 = vit(768, 16)

SPEEDUPS = [
    (VIT_B16, {1: 1.123, 16: 1.334, 64: 1.366, 256: 1.377}),
    (vit(1024, 14, layers=24), {1: 1.227, 64: 1.425, 256: 1.431}),
    (vit(1280, 14, layers=32), {64: 1.466}),
    (vit(768, 32), {256: 1.365}),
    (vit(384, 16), {64: 1.193}),
    (vit(384, 14, 518), {64: 1.120}),
    (vit(768, 14, 518), {64: 1.255}),
    (vit(1024, 14, 518), {64: 1.313}),
]
"""Figures for an H100 of the prototype of this model, a script of its own."""


def _speedup(spec: VisionSpec, batch: int, int8: Collection[str] = LINEARS) -> float:
    """That of a block but the last."""
    tokens = spec.tokens_at(spec.image)
    before, after = (
        sum(x.seconds for x in block(spec.blocks, batch, tokens, names)) for names in ((), int8)
    )
    return before / after


@pytest.mark.parametrize(("spec", "figures"), SPEEDUPS)
def test_speedups_are_those_of_the_prototype(spec: VisionSpec, figures: dict[int, float]) -> None:
    for batch, speedup in figures.items():
        assert _speedup(spec, batch) == pytest.approx(speedup, abs=0.0006), batch


def test_the_last_block_computes_one_token_of_an_image() -> None:
    full, last = (
        {x.name: x for x in launches(VIT_B16.blocks, 256, 197, ("qkv",))}
        for launches in (block, last_block)
    )
    assert last["up"].seconds < full["up"].seconds / 50
    assert [x.name for x in last_block(VIT_B16.blocks, 256, 197)].count("qkv") == 2
    one = dataclasses.replace(VIT_B16, blocks=dataclasses.replace(VIT_B16.blocks, layers=1))
    seconds = [
        sum(x.seconds for x in last_block(one.blocks, 64, 197, names)) for names in ((), ("qkv",))
    ]
    assert estimate(one, 64).speedup == pytest.approx(seconds[0] / seconds[1])
    two = dataclasses.replace(one, blocks=dataclasses.replace(one.blocks, layers=2))
    full_block = sum(x.seconds for x in block(two.blocks, 64, 197))
    assert estimate(two, 64).float16 == pytest.approx(seconds[0] + full_block)


def test_microseconds_of_each_launch_of_vit_b16_at_batch_256() -> None:
    float16 = {x.name: round(x.seconds * 1e6) for x in block(VIT_B16.blocks, 256, 197)}
    assert float16 == {"qkv": 345, "attention": 110, "out": 120, "up": 497, "down": 448}
    int8 = [(x.name, round(x.seconds * 1e6)) for x in block(VIT_B16.blocks, 256, 197, LINEARS)]
    assert int8 == [
        ("norm_quant", 44),
        ("qkv", 181),
        ("attention", 110),
        ("out", 120),
        ("norm_quant", 44),
        ("up", 294),
        ("down", 311),
    ]


def test_bytes_of_a_block() -> None:
    float16 = sum(x.bytes for x in block(VIT_B16.blocks, 256, 197))
    int8 = sum(x.bytes for x in block(VIT_B16.blocks, 256, 197, LINEARS))
    assert (round(float16 / 1e6), round(int8 / 1e6)) == (1718, 1557)


def test_linears_kept_in_fp16_cost_speed() -> None:
    assert _speedup(VIT_B16, 256, ("qkv", "up")) == pytest.approx(1.240, abs=0.0006)
    full = estimate(VIT_B16, 256).speedup
    names = VIT_B16.blocks.int8_candidates
    assert estimate(VIT_B16, 256, linears=names).speedup == full
    assert 1 < estimate(VIT_B16, 256, linears=names[:18]).speedup < full
    none = estimate(VIT_B16, 256, linears=[])
    assert none.speedup == pytest.approx(1)
    assert not none.worthwhile
    assert none.limits == ("too few linears are in int8",)


def test_a_gated_mlp_has_twice_the_products_of_up() -> None:
    plain = BlockSpec(1536, 40, 24, 4096, "silu", 1e-6)
    gated = BlockSpec(1536, 40, 24, 4096, "silu", 1e-6, gated=True)
    up, gated_up = (
        next(x for x in block(spec, 64, 257, LINEARS) if x.name == "up") for spec in (plain, gated)
    )
    assert 1.9 < gated_up.seconds / up.seconds < 2.1


def test_padded_columns_of_an_mlp_are_counted() -> None:
    short, padded = (BlockSpec(1152, 27, 16, mlp, "gelu", 1e-6) for mlp in (4304, 4352))
    assert block(short, 64, 257, LINEARS)[-1] == block(padded, 64, 257, LINEARS)[-1]
    assert block(short, 64, 257)[-1].bytes < block(padded, 64, 257)[-1].bytes


@pytest.mark.parametrize(
    ("spec", "batch", "words"),
    [
        (vit(768, 32), 1, "few rows"),
        (vit(384, 14, 518), 64, "attention over 1370 tokens"),
        (vit(128, 8, 56), 64, "width 128"),
    ],
)
def test_a_small_speedup_comes_with_its_cause(spec: VisionSpec, batch: int, words: str) -> None:
    row = estimate(spec, batch)
    assert not row.worthwhile
    assert any(words in limit for limit in row.limits)
    assert estimate(VIT_B16, 256).limits == ()


def test_the_description_says_that_it_is_an_estimate() -> None:
    lines = describe(VIT_B16)
    assert lines[0].startswith("an estimate, not a measurement")
    assert "1.11x at batch 1, 1.33x at batch 16, 1.38x at batch 256" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == ["under 1.15x at batch 1"]
    small = describe(VIT_B16, (32, 32))
    assert "32x32 pixels" in small[0]
    causes = "few rows: launches cannot be shorter, and int8 has more of them"
    assert small[1:] == [f"under 1.15x at batch 1, 16: {causes}"]
