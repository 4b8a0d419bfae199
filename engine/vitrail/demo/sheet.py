"""A contact sheet: titled rows of captioned pictures, as one PNG."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]

BACKGROUND: RGB = (24, 25, 32)
INK: RGB = (236, 233, 224)
FAINT: RGB = (150, 150, 162)
GREEN: RGB = (126, 200, 120)
RED: RGB = (236, 106, 94)
PANE, GAP, MARGIN = 150, 14, 36
CAPTION, HEADING, TITLE = 15, 20, 40
LINE = 1.35
ROUND = 10


@dataclass(frozen=True, slots=True)
class Pane:
    """A picture and its caption, which is green or red if ``correct`` is a bool."""

    picture: Image.Image
    caption: str
    correct: bool | None = None


@dataclass(frozen=True, slots=True)
class Strip:
    """A row of panes under a heading; it may take several lines of the sheet."""

    heading: str
    panes: Sequence[Pane]


def contact_sheet(title: str, subtitle: str, strips: Sequence[Strip], columns: int) -> Image.Image:
    """An RGB image with ``columns`` panes per line. A caption is cut to the width of its pane."""
    heights = [_strip_height(len(strip.panes), columns) for strip in strips]
    width = 2 * MARGIN + columns * (PANE + GAP) - GAP
    top = MARGIN + round(LINE * (TITLE + HEADING)) + GAP
    sheet = Image.new("RGB", (width, top + sum(heights) + MARGIN - GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, _font(TITLE))
    draw.text((MARGIN, MARGIN + LINE * TITLE), subtitle, FAINT, _font(CAPTION))
    for strip, height in zip(strips, heights, strict=True):
        draw.text((MARGIN, top + GAP), strip.heading, INK, _font(HEADING))
        for index, pane in enumerate(strip.panes):
            x = MARGIN + index % columns * (PANE + GAP)
            y = top + GAP + round(LINE * HEADING) + GAP // 2 + index // columns * _pane_height()
            _draw_pane(sheet, draw, pane, x, y)
        top += height
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _pane_height() -> int:
    return PANE + round(LINE * CAPTION) + GAP


def _strip_height(panes: int, columns: int) -> int:
    return GAP + round(LINE * HEADING) + GAP // 2 + -(-panes // columns) * _pane_height()


def _draw_pane(sheet: Image.Image, draw: ImageDraw.ImageDraw, pane: Pane, x: int, y: int) -> None:
    """Draws the middle square of the picture with round corners, and the caption below it."""
    side = min(pane.picture.size)
    left, top = (pane.picture.width - side) // 2, (pane.picture.height - side) // 2
    square = pane.picture.convert("RGB").crop((left, top, left + side, top + side))
    mask = Image.new("L", (4 * PANE, 4 * PANE))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * PANE - 1, 4 * PANE - 1), 4 * ROUND, 255)
    sheet.paste(square.resize((PANE, PANE), Image.Resampling.LANCZOS), (x, y), mask.reduce(4))
    color = FAINT if pane.correct is None else GREEN if pane.correct else RED
    draw.text((x + 2, y + PANE + 3), _cut(draw, pane.caption), color, _font(CAPTION))


def _cut(draw: ImageDraw.ImageDraw, text: str) -> str:
    font = _font(CAPTION)
    if draw.textlength(text, font) <= PANE:
        return text
    while text and draw.textlength(f"{text}...", font) > PANE:
        text = text[:-1].rstrip()
    return f"{text}..."
