"""Rendered scenes with captions: what the bundled CLIP was trained on and what the demo shows it.

A scene is one to four alike things of one shape and colour, small or large, somewhere on a plain
background. Some colours, shapes and backgrounds have no name, and captions leave them out: that is
how a model learns a shape in every colour, and not only in the pairs that it has seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from random import Random

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Points = tuple[tuple[float, float], ...]

COLOURS: dict[str, RGB] = {
    "red": (214, 38, 38),
    "orange": (247, 138, 22),
    "yellow": (246, 217, 43),
    "green": (44, 158, 66),
    "blue": (36, 88, 214),
    "purple": (128, 48, 170),
    "pink": (248, 142, 184),
    "brown": (120, 74, 38),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (250, 250, 248),
    "black": (14, 14, 16),
    "grey": (128, 130, 132),
    "beige": (226, 208, 172),
}
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
POSITIONS: dict[str, tuple[int, int]] = {
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the middle": (0, 0),
}
SIZES = {"small": (0.09, 0.115), "large": (0.17, 0.21)}
"""Half the height of a thing, least and most; lengths are of a side of the picture."""


def _regular(corners: int, *radii: float, turn: float = 0.0) -> Points:
    """Corners around the origin at distances that repeat ``radii``; ``turn`` in degrees."""
    return tuple(
        (radii[k % len(radii)] * math.sin(angle), -radii[k % len(radii)] * math.cos(angle))
        for k in range(corners)
        for angle in [math.tau * k / corners + math.radians(turn)]
    )


def _heart(t: float) -> tuple[float, float]:
    across = 16 * math.sin(t) ** 3
    up = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return across / 15, -(up + 2.5) / 15


ARM, HOLE = 0.34, 0.55  # half the width of a cross's arms; a ring's hole, of its radius
_SIDE = tuple(zip((-1.0, -ARM, -ARM, ARM, ARM, 1.0), (ARM, ARM, 1.0, 1.0, ARM, ARM), strict=True))
SHAPES: dict[str, Points] = {
    "circle": _regular(60, 0.95),
    "square": _regular(4, 1.2, turn=45),
    "triangle": _regular(3, 1.15),
    "star": _regular(10, 1.15, 0.46),
    "heart": tuple(_heart(math.tau * k / 60) for k in range(60)),
    "cross": _SIDE + tuple((-x, -y) for x, y in _SIDE),
    "ring": _regular(60, 1.0),
    "diamond": ((0.0, -1.15), (0.62, 0.0), (0.0, 1.15), (-0.62, 0.0)),
}

HELD_OUT = frozenset(
    (colour, shape)
    for i, colour in enumerate(COLOURS)
    for j, shape in enumerate(SHAPES)
    if (i + j) % 4 == 0
)
"""A quarter of the pairs, two of every colour and two of every shape: never in training."""

VALUES: dict[str, tuple[str, ...]] = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "count": tuple(COUNTS),
    "position": tuple(POSITIONS),
    "size": tuple(SIZES),
    "background": tuple(BACKGROUNDS),
}

JITTER = 14  # a named colour varies by this much in each channel
APART = 75.0  # in RGB, a nameless colour from every named one, and a thing from its background
NAMELESS = {"colour": 0.4, "shape": 0.1, "background": 0.25}
MARGIN = 0.02  # around the picture
GAP = 1.2  # least distance of two things, in sums of their half heights
MAX_TURN = 12.0
OFF_CENTRE = 0.07  # how far the centre of a group "in the middle" may be off
OVERSAMPLING = 4


@dataclass(frozen=True, slots=True)
class Scene:
    """What is to be seen, by name (None: it has none), and how to draw it."""

    shape: str | None
    colour: str | None
    count: str
    position: str
    size: str
    background: str | None
    paint: RGB
    ground: RGB
    outline: Points
    """Corners around the origin, about 1 away from it."""
    places: tuple[tuple[float, float, float, float], ...]
    """Centre x and y, half the height, and the turn in degrees of each thing."""


FIELDS = tuple(field.name for field in fields(Scene))[:6]


def sample(dice: Random, *, nameless: bool = False, held_out: bool = False) -> Scene:
    """A scene at random. ``nameless``: now and then without a name for something, as in training.

    ``held_out``: of the pairs of colour and shape that training never shows; else never of these.
    """
    while True:
        scene = _draw(dice, nameless)
        pair = (scene.colour, scene.shape)
        if None not in pair and (pair in HELD_OUT) != held_out:
            continue
        fits = len(scene.places) == COUNTS[scene.count]
        if fits and math.dist(scene.paint, scene.ground) > APART:
            return scene


def _draw(dice: Random, nameless: bool) -> Scene:
    names = {field: dice.choice(values) for field, values in VALUES.items()}
    missing = {field for field, chance in NAMELESS.items() if dice.random() < chance * nameless}
    shape, size = names["shape"], names["size"]
    half = dice.uniform(*SIZES[size])
    count = COUNTS[names["count"]]
    named: dict[str, str | None] = {f: None if f in missing else name for f, name in names.items()}
    return Scene(
        shape=named["shape"],
        colour=named["colour"],
        count=names["count"],
        position=names["position"],
        size=size,
        background=named["background"],
        paint=_colour(dice, COLOURS, named["colour"]),
        ground=_colour(dice, BACKGROUNDS, named["background"]),
        outline=SHAPES[shape] if named["shape"] else _blob(dice),
        places=_places(dice, count, half, POSITIONS[names["position"]]),
    )


def _colour(dice: Random, named: dict[str, RGB], name: str | None) -> RGB:
    if name is not None:
        return _rgb(min(255, max(0, x + dice.randint(-JITTER, JITTER))) for x in named[name])
    while True:
        colour = _rgb(dice.randrange(256) for _ in range(3))
        if all(math.dist(colour, other) > APART for other in named.values()):
            return colour


def _rgb(values: Iterable[int]) -> RGB:
    red, green, blue = values
    return red, green, blue


def _blob(dice: Random) -> Points:
    """A shape that has no name: seven to nine corners, each at its own distance."""
    radii = [dice.uniform(0.45, 1.25) for _ in range(dice.randint(7, 9))]
    return _regular(len(radii), *radii, turn=dice.uniform(0, 360))


def _places(
    dice: Random, count: int, half: float, side: tuple[int, int]
) -> tuple[tuple[float, float, float, float], ...]:
    """Centres that keep apart, on one side of the picture; fewer than ``count`` where they miss."""
    (left, right), (top, bottom) = (_range(towards, half, count, side) for towards in side)
    found: list[tuple[float, float]] = []
    for _ in range(60):
        x = dice.uniform(left, right) if left < right else (left + right) / 2
        y = dice.uniform(top, bottom) if top < bottom else (top + bottom) / 2
        if all(math.dist((x, y), other) > 2 * GAP * half for other in found):
            found.append((x, y))
        if len(found) == count:
            break
    off = (abs(sum(axis) / len(found) - 0.5) for axis in zip(*found, strict=True))
    if not any(side) and max(off) > OFF_CENTRE:
        return ()
    return tuple((x, y, half, dice.uniform(-MAX_TURN, MAX_TURN)) for x, y in found)


def _range(towards: int, half: float, count: int, side: tuple[int, int]) -> tuple[float, float]:
    """From where to where centres may lie on an axis that is on ``towards`` of a ``side``."""
    low, high = MARGIN + 1.25 * half, 1 - MARGIN - 1.25 * half
    if towards:
        return (low, 0.38) if towards < 0 else (0.62, high)
    if count > 1:
        return low, high
    # A lone thing keeps to the middle of the other axis, so that its side is the plain answer.
    return (0.36, 0.64) if any(side) else (0.42, 0.58)


def render(scene: Scene, side: int) -> Image.Image:
    """An RGB picture of ``side`` x ``side`` pixels, drawn larger and averaged down."""
    large = side * OVERSAMPLING
    image = Image.new("RGB", (large, large), scene.ground)
    draw = ImageDraw.Draw(image)
    for x, y, half, turn in scene.places:
        sin, cos = math.sin(math.radians(turn)), math.cos(math.radians(turn))
        corners = [
            (large * (x + half * (cos * a - sin * b)), large * (y + half * (sin * a + cos * b)))
            for a, b in scene.outline
        ]
        draw.polygon(corners, fill=scene.paint)
        if scene.shape == "ring":
            middle = large * x * (1 - HOLE), large * y * (1 - HOLE)
            hole = [(HOLE * a + middle[0], HOLE * b + middle[1]) for a, b in corners]
            draw.polygon(hole, fill=scene.ground)
    return image.reduce(OVERSAMPLING)


PREFIXES = ("", "", "", "a picture of ", "a photo of ")


Claims = tuple[str | None, ...]
"""What a text says of a scene, in the order of ``FIELDS``; None says nothing."""


def caption(dice: Random, scene: Scene, keep: float = 0.7) -> tuple[str, Claims]:
    """A text that is true of the scene, and what it claims.

    Each attribute is told with the chance ``keep``, what has no name never, and one thing always.
    """
    known = [field for field in FIELDS if getattr(scene, field) is not None]
    told = [field for field in known if dice.random() < keep] or [dice.choice(known)]
    claims = tuple(getattr(scene, field) if field in told else None for field in FIELDS)
    return words(dice, claims), claims


def words(dice: Random, claims: Claims) -> str:
    """A text that makes the claims, such as "a photo of two small red stars on the left"."""
    shape, colour, count, position, size, background = claims
    noun = " ".join(word for word in (size, colour, shape or "thing") if word)
    if count == "one":
        noun = f"{dice.choice(('a', 'one'))} {noun}"
    elif count:
        noun = f"{count} {noun}{'es' if noun.endswith('s') else 's'}"
    where = (position, f"on a {background} background" if background else None)
    text = " ".join([noun, *(word for word in where if word)])
    return f"{dice.choice(PREFIXES)}{text}"
