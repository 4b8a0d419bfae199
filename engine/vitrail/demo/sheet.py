"""A contact sheet: titled rows of captioned pictures, as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]

LEAD: RGB = (24, 25, 32)
INK: RGB = (236, 233, 224)
FAINT: RGB = (150, 150, 162)
GOOD: RGB = (126, 200, 120)
BAD: RGB = (236, 106, 94)
PANE, GAP, MARGIN = 150, 14, 36
CAPTION, HEADING, TITLE = 15, 20, 40
LINE = 1.35
ROUND = 10


@dataclass(frozen=True, slots=True)
class Pane:
    """A picture and what is written below it; ``right``: framed green or red, None plain."""

    picture: Image.Image
    text: str
    right: bool | None = None


@dataclass(frozen=True, slots=True)
class Row:
    heading: str
    panes: Sequence[Pane]


def contact_sheet(title: str, subtitle: str, rows: Sequence[Row], columns: int) -> Image.Image:
    """RGB; rows with more panes than ``columns`` go on below. Captions are cut to their pane."""
    heights = [_row_height(len(row.panes), columns) for row in rows]
    width = 2 * MARGIN + columns * (PANE + GAP) - GAP
    top = MARGIN + round(LINE * (TITLE + HEADING)) + GAP
    sheet = Image.new("RGB", (width, top + sum(heights) + MARGIN - GAP), LEAD)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, _font(TITLE))
    draw.text((MARGIN, MARGIN + LINE * TITLE), subtitle, FAINT, _font(CAPTION))
    for row, height in zip(rows, heights, strict=True):
        draw.text((MARGIN, top + GAP), row.heading, INK, _font(HEADING))
        for place, pane in enumerate(row.panes):
            x = MARGIN + place % columns * (PANE + GAP)
            y = top + GAP + round(LINE * HEADING) + GAP // 2 + place // columns * _pane_height()
            _put(sheet, draw, pane, x, y)
        top += height
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _pane_height() -> int:
    return PANE + round(LINE * CAPTION) + GAP


def _row_height(panes: int, columns: int) -> int:
    return GAP + round(LINE * HEADING) + GAP // 2 + -(-panes // columns) * _pane_height()


def _put(sheet: Image.Image, draw: ImageDraw.ImageDraw, pane: Pane, x: int, y: int) -> None:
    """The middle square of the picture with round corners, and its caption."""
    side = min(pane.picture.size)
    left, upper = (pane.picture.width - side) // 2, (pane.picture.height - side) // 2
    square = pane.picture.convert("RGB").crop((left, upper, left + side, upper + side))
    mask = Image.new("L", (4 * PANE, 4 * PANE))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * PANE - 1, 4 * PANE - 1), 4 * ROUND, 255)
    sheet.paste(square.resize((PANE, PANE), Image.Resampling.LANCZOS), (x, y), mask.reduce(4))
    colour = FAINT if pane.right is None else GOOD if pane.right else BAD
    draw.text((x + 2, y + PANE + 3), _cut(draw, pane.text), colour, _font(CAPTION))


def _cut(draw: ImageDraw.ImageDraw, text: str) -> str:
    font = _font(CAPTION)
    if draw.textlength(text, font) <= PANE:
        return text
    while text and draw.textlength(f"{text}...", font) > PANE:
        text = text[:-1].rstrip()
    return f"{text}..."
