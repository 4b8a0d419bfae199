"""The rendered scenes: what is drawn is what the names say, and captions claim what is true."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from skimage import measure

from vitrail.demo import scenes
from vitrail.demo.scenes import (
    APART,
    BACKGROUNDS,
    COLORS,
    COUNTS,
    FIELDS,
    HELD_OUT,
    JITTER,
    SHAPES,
    VALUES,
    Scene,
    render,
    sample,
)

sys.path.append(str(Path(__file__).parents[2] / "examples"))
captions: Any = importlib.import_module("scene_captions")
SIDE = 192


def _some(count: int, **options: bool) -> list[Scene]:
    dice = Random("tests")
    return [sample(dice, **options) for _ in range(count)]


def _regions(scene: Scene) -> list[measure._regionprops.RegionProperties]:
    """The connected areas of the picture that are nearer to the paint than to the ground."""
    pixels = np.asarray(render(scene, SIDE), np.float64)
    near = np.linalg.norm(pixels - scene.paint, axis=-1)
    far = np.linalg.norm(pixels - scene.ground, axis=-1)
    regions = measure.regionprops(measure.label(near < far))
    return [region for region in regions if region.area >= 12]


@pytest.mark.parametrize("nameless", [False, True])
def test_as_many_things_are_drawn_as_the_count_says(nameless: bool) -> None:
    for scene in _some(150, nameless=nameless):
        assert len(_regions(scene)) == COUNTS[scene.count], scene


def test_things_are_where_the_position_says_and_of_the_size_that_it_says() -> None:
    for scene in _some(150):
        regions = _regions(scene)
        y, x = np.mean([region.centroid for region in regions], axis=0) / SIDE - 0.5
        across, down = scenes.POSITIONS[scene.position]
        assert abs(x) < 0.12 if across == 0 and down == 0 else x * across >= 0, scene
        assert abs(y) < 0.12 if across == 0 and down == 0 else y * down >= 0, scene
        assert max(abs(x * across), abs(y * down)) > 0.1 or not (across or down), scene
        halves = [(region.bbox[2] - region.bbox[0]) / SIDE / 2 for region in regions]
        assert (max(halves) < 0.14) == (scene.size == "small"), scene


def test_named_colors_are_near_their_names_and_nameless_ones_far_from_all() -> None:
    for scene in _some(400, nameless=True):
        for name, real, named in (
            (scene.color, scene.paint, COLORS),
            (scene.background, scene.ground, BACKGROUNDS),
        ):
            if name is None:
                assert all(math.dist(real, named_color) > APART for named_color in named.values())
            else:
                assert np.abs(np.subtract(real, named[name])).max() <= JITTER
        assert math.dist(scene.paint, scene.ground) > APART


def test_every_color_can_be_told_from_every_other() -> None:
    for named in (COLORS, BACKGROUNDS):
        for a in named:
            assert all(math.dist(named[a], named[b]) > 2 * JITTER for b in named if b != a)


def test_training_never_shows_a_quarter_of_the_pairs() -> None:
    assert len(HELD_OUT) == len(COLORS) * len(SHAPES) // 4
    for names, at in ((COLORS, 0), (SHAPES, 1)):
        assert all(sum(pair[at] == name for pair in HELD_OUT) == 2 for name in names)
    shown = {(scene.color, scene.shape) for scene in _some(2000, nameless=True)}
    assert not shown & HELD_OUT
    named = {(color, shape) for color, shape in shown if color and shape}
    assert named == {(c, s) for c in COLORS for s in SHAPES} - HELD_OUT
    assert {(scene.color, scene.shape) for scene in _some(500, held_out=True)} == HELD_OUT


def test_a_caption_claims_what_is_true_and_says_what_it_claims() -> None:
    dice = Random("captions")
    for scene in _some(300, nameless=True):
        text, claims = captions.caption(dice, scene)
        assert any(claims)
        for field, claim in zip(FIELDS, claims, strict=True):
            assert claim in (None, getattr(scene, field))
            if claim == "one":
                assert text.split(" of ")[-1].split()[0] in ("a", "one")
            elif claim:
                assert claim in text
            else:
                said = [v for v in VALUES[field] if v in text.replace("background", "").split()]
                assert not said or field in ("color", "background"), (field, text)


@pytest.mark.parametrize(
    ("claims", "text"),
    [
        (("star", "red", "two", "on the left", "small", "black"),
         "two small red stars on the left on a black background"),
        (("cross", None, "three", None, None, None), "three crosses"),
        ((None, "blue", "four", None, None, None), "four blue things"),
        (("ring", "pink", None, None, "large", None), "large pink ring"),
    ],
)  # fmt: skip
def test_claims_in_words(claims: tuple[str | None, ...], text: str) -> None:
    said = {captions.words(Random(k), claims) for k in range(20)}
    assert said == {f"{prefix}{text}" for prefix in captions.PREFIXES}


def test_the_same_seed_gives_the_same_scene_and_picture() -> None:
    first, second = (sample(Random("one")) for _ in range(2))
    assert first == second
    assert render(first, 48).tobytes() == render(second, 48).tobytes()
    assert sample(Random("another")) != first
