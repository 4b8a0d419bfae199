"""Rendered scenes: the training data of the bundled CLIP, and the pictures of the demo.

A scene is one to four equal things of one shape and color, small or large, on a plain background.
In training some colors, shapes and backgrounds have no name, and captions leave them out. So the
model learns a shape in every color, not only in the pairs of the training data.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from random import Random

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Points = tuple[tuple[float, float], ...]

COLORS: dict[str, RGB] = {
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
    "grey": (128, 130, 132),  # so spelled in the training captions
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
"""Half the height of a thing, smallest and largest; lengths are fractions of the picture's side."""


def _regular(corners: int, *radii: float, turn: float = 0.0) -> Points:
    """Corners around the origin; their distances cycle through ``radii``; ``turn`` in degrees."""
    return tuple(
        (radii[k % len(radii)] * math.sin(angle), -radii[k % len(radii)] * math.cos(angle))
        for k in range(corners)
        for angle in [math.tau * k / corners + math.radians(turn)]
    )


def _heart(t: float) -> tuple[float, float]:
    x = 16 * math.sin(t) ** 3
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return x / 15, -(y + 2.5) / 15


ARM = 0.34  # half the width of a cross's arms
HOLE = 0.55  # a ring's inner radius, as a fraction of its outer radius
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
    (color, shape)
    for i, color in enumerate(COLORS)
    for j, shape in enumerate(SHAPES)
    if (i + j) % 4 == 0
)
"""A quarter of the color-shape pairs, two of each color and of each shape: never in training."""

VALUES: dict[str, tuple[str, ...]] = {
    "shape": tuple(SHAPES),
    "color": tuple(COLORS),
    "count": tuple(COUNTS),
    "position": tuple(POSITIONS),
    "size": tuple(SIZES),
    "background": tuple(BACKGROUNDS),
}

JITTER = 14  # largest change of a named color in each channel
APART = 75.0  # RGB distance of a nameless color from all named ones, and of a thing from the ground
NAMELESS = {"color": 0.4, "shape": 0.1, "background": 0.25}  # probabilities in training scenes
MARGIN = 0.02  # free border of the picture
GAP = 1.2  # smallest distance of two things, in sums of their half heights
MAX_TURN = 12.0  # degrees
OFF_CENTER = 0.07  # largest offset of the center of a group "in the middle"
OVERSAMPLING = 4


@dataclass(frozen=True, slots=True)
class Scene:
    """The attributes of a scene by name (None: nameless), and how to draw it."""

    shape: str | None
    color: str | None
    count: str
    position: str
    size: str
    background: str | None
    paint: RGB
    ground: RGB
    outline: Points
    """Corners around the origin, about 1 away from it."""
    things: tuple[tuple[float, float, float, float], ...]
    """Center x and y, half the height, and the turn in degrees of each thing."""


FIELDS = tuple(field.name for field in fields(Scene))[:6]


def sample(dice: Random, *, nameless: bool = False, held_out: bool = False) -> Scene:
    """A random scene. ``nameless``: sometimes an attribute has no name, as in training.

    ``held_out``: whether its color-shape pair is from `HELD_OUT`, which training never shows.
    """
    while True:
        scene = _draw(dice, nameless)
        pair = (scene.color, scene.shape)
        if None not in pair and (pair in HELD_OUT) != held_out:
            continue
        complete = len(scene.things) == COUNTS[scene.count]
        if complete and math.dist(scene.paint, scene.ground) > APART:
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
        color=named["color"],
        count=names["count"],
        position=names["position"],
        size=size,
        background=named["background"],
        paint=_color(dice, COLORS, named["color"]),
        ground=_color(dice, BACKGROUNDS, named["background"]),
        outline=SHAPES[shape] if named["shape"] else _blob(dice),
        things=_things(dice, count, half, POSITIONS[names["position"]]),
    )


def _color(dice: Random, named: dict[str, RGB], name: str | None) -> RGB:
    if name is not None:
        return _rgb(min(255, max(0, x + dice.randint(-JITTER, JITTER))) for x in named[name])
    while True:
        color = _rgb(dice.randrange(256) for _ in range(3))
        if all(math.dist(color, other) > APART for other in named.values()):
            return color


def _rgb(values: Iterable[int]) -> RGB:
    red, green, blue = values
    return red, green, blue


def _blob(dice: Random) -> Points:
    """A nameless shape: seven to nine corners at random distances."""
    radii = [dice.uniform(0.45, 1.25) for _ in range(dice.randint(7, 9))]
    return _regular(len(radii), *radii, turn=dice.uniform(0, 360))


def _things(
    dice: Random, count: int, half: float, side: tuple[int, int]
) -> tuple[tuple[float, float, float, float], ...]:
    """Things on one ``side`` of the picture that do not touch; too few of them if the dice fail."""
    (left, right), (top, bottom) = (_range(towards, half, count, side) for towards in side)
    centers: list[tuple[float, float]] = []
    for _ in range(60):
        x = dice.uniform(left, right) if left < right else (left + right) / 2
        y = dice.uniform(top, bottom) if top < bottom else (top + bottom) / 2
        if all(math.dist((x, y), center) > 2 * GAP * half for center in centers):
            centers.append((x, y))
        if len(centers) == count:
            break
    offsets = (abs(sum(axis) / len(centers) - 0.5) for axis in zip(*centers, strict=True))
    if not any(side) and max(offsets) > OFF_CENTER:
        return ()
    return tuple((x, y, half, dice.uniform(-MAX_TURN, MAX_TURN)) for x, y in centers)


def _range(towards: int, half: float, count: int, side: tuple[int, int]) -> tuple[float, float]:
    """The range of centers on an axis; ``towards``: -1 low, 1 high, 0 anywhere on the axis.

    ``side`` holds ``towards`` of both axes.
    """
    low, high = MARGIN + 1.25 * half, 1 - MARGIN - 1.25 * half
    if towards:
        return (low, 0.38) if towards < 0 else (0.62, high)
    if count > 1:
        return low, high
    # A single thing stays near the middle of the other axis, so that its side is unambiguous.
    return (0.36, 0.64) if any(side) else (0.42, 0.58)


def render(scene: Scene, side: int) -> Image.Image:
    """An RGB picture of ``side`` x ``side`` pixels, drawn larger and averaged."""
    large = side * OVERSAMPLING
    image = Image.new("RGB", (large, large), scene.ground)
    draw = ImageDraw.Draw(image)
    for x, y, half, turn in scene.things:
        sin, cos = math.sin(math.radians(turn)), math.cos(math.radians(turn))
        corners = [
            (large * (x + half * (cos * a - sin * b)), large * (y + half * (sin * a + cos * b)))
            for a, b in scene.outline
        ]
        draw.polygon(corners, fill=scene.paint)
        if scene.shape == "ring":
            shift_x, shift_y = large * x * (1 - HOLE), large * y * (1 - HOLE)
            hole = [(HOLE * a + shift_x, HOLE * b + shift_y) for a, b in corners]
            draw.polygon(hole, fill=scene.ground)
    return image.reduce(OVERSAMPLING)
