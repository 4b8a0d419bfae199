"""The contact sheet: every pane in its place, captions that fit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vitrail.demo import sheet
from vitrail.demo.sheet import GAP, MARGIN, PANE, Pane, Strip, contact_sheet

RED, BLUE = (200, 10, 20), (10, 20, 200)


def _picture(color: tuple[int, int, int], size: tuple[int, int] = (60, 60)) -> Image.Image:
    return Image.new("RGB", size, color)


def _where(image: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Bounds (left, top, right, bottom) of the pixels of a color."""
    rows, columns = np.nonzero((np.asarray(image) == color).all(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_panes_stand_side_by_side_and_go_on_below() -> None:
    panes = [Pane(_picture((50 + k, 0, 0)), str(k)) for k in range(5)]
    image = contact_sheet("Title", "subtitle", [Strip("five", panes)], 3)
    assert image.width == 2 * MARGIN + 3 * PANE + 2 * GAP
    boxes = [_where(image, (50 + k, 0, 0)) for k in range(5)]
    for k, (left, top, right, bottom) in enumerate(boxes):
        assert (right - left, bottom - top) == (PANE, PANE)
        assert left == MARGIN + k % 3 * (PANE + GAP)
        assert top == boxes[k - k % 3][1]
    assert boxes[3][1] > boxes[0][3]
    assert image.height > boxes[4][3]


def test_a_wide_picture_gives_its_middle_square() -> None:
    wide = Image.new("RGB", (300, 100), BLUE)
    wide.paste(RED, (100, 0, 200, 100))
    image = contact_sheet("", "", [Strip("", [Pane(wide, "")])], 1)
    left, top, right, bottom = _where(image, RED)
    assert right - left >= PANE - 2
    assert bottom - top == PANE
    assert not (np.asarray(image) == BLUE).all(-1).any()


@pytest.mark.parametrize(
    ("right", "color"), [(True, sheet.GREEN), (False, sheet.RED), (None, sheet.FAINT)]
)
def test_the_caption_says_by_its_color_whether_it_is_right(
    right: bool | None, color: tuple[int, int, int]
) -> None:
    image = contact_sheet("", "", [Strip("", [Pane(_picture(RED), "III", right)])], 1)
    pixels = np.asarray(image)[_where(image, RED)[3] :]
    assert (pixels == color).all(-1).any()
    other_colors = {sheet.GREEN, sheet.RED, sheet.FAINT} - {color}
    assert not any((pixels == other_color).all(-1).any() for other_color in other_colors)


def test_a_long_caption_is_cut_to_its_pane() -> None:
    draw = ImageDraw.Draw(Image.new("RGB", (10, 10)))
    cut = sheet._cut(draw, "a caption that is much too long for one pane")
    assert cut.startswith("a caption")
    assert cut.endswith("...")
    assert draw.textlength(cut, sheet._font(sheet.CAPTION)) <= PANE
    assert sheet._cut(draw, "short") == "short"
