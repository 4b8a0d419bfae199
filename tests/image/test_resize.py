"""The two passes of a resize: Pillow 12's bits, also for a window of the result."""

from __future__ import annotations

import random

import numpy as np
import PIL
import pytest
from PIL import Image

from pixels import cases
from vitrail.image.geometry import crop_axis
from vitrail.image.resize import _window_pass, nearest_source, resize_window, rows_reached

PILLOW = int(PIL.__version__.partition(".")[0])


STRONG = [(211, 1009, 224, 40), (101, 503, 96, 32), (40, 700, 40, 32), (300, 3000, 200, 20)]


def test_one_call_of_pillow_13_would_give_other_bits() -> None:
    differs = []
    for width, height, w, h in STRONG:
        image = cases.picture("strong", "RGB", width, height)
        once = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC))
        rows, columns = crop_axis(height, h, None), crop_axis(width, w, None)
        twice = np.asarray(resize_window(image, rows, columns, 3))
        differs.append(not np.array_equal(once, twice))
    assert any(differs) if PILLOW >= 13 else not any(differs)


def two_passes(image: Image.Image, width: int, height: int, resample: int) -> Image.Image:
    """Whole passes of the installed Pillow, in the order of Pillow 12."""
    code = Image.Resampling(resample)
    if image.height > 100 * image.width and height < image.height:
        return image.resize((image.width, height), code).resize((width, height), code)
    return image.resize((width, image.height), code).resize((width, height), code)


@pytest.mark.parametrize("resample", range(6))
def test_the_window_of_a_resize_is_cut_from_the_whole(resample: int) -> None:
    draw = random.Random(resample)
    narrow = 0
    for number in range(400):
        width, height, w, h = (int(2 ** draw.uniform(0, 8.5)) for _ in range(4))
        crop = int(2 ** draw.uniform(0, 6)), int(2 ** draw.uniform(0, 6))
        image = cases.picture(f"{resample} {number}", "RGB" if number % 2 else "L", width, height)
        rows, columns = crop_axis(height, h, min(crop[0], h)), crop_axis(width, w, min(crop[1], w))
        narrow += rows.narrow or columns.narrow
        box = columns.start, rows.start, columns.stop, rows.stop
        whole = two_passes(image, w, h, resample).crop(box)
        window = resize_window(image, rows, columns, resample)
        assert window.tobytes() == whole.tobytes(), (image.size, (w, h), box)
        if PILLOW < 13:
            once = image.resize((w, h), Image.Resampling(resample)).crop(box)
            assert window.tobytes() == once.tobytes(), (image.size, (w, h), box)
    assert narrow > 50


@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize("source", [1, 2, 30_000])
def test_the_window_of_a_million_pixels_is_cut_from_the_whole(resample: int, source: int) -> None:
    image = cases.picture(f"long {resample} {source}", "L", source, 1)
    axis = crop_axis(source, 1_000_003, 224)
    code = Image.Resampling(resample)
    whole = np.asarray(image.resize((axis.full, 1), code))[0, axis.start : axis.stop]
    assert np.array_equal(_window_pass(np.asarray(image)[0], axis, 0, resample), whole)


@pytest.mark.parametrize("resample", range(6))
def test_a_window_of_many_lines_is_cut_from_the_whole(resample: int) -> None:
    """Enough pixels for one unit in the last of 22 bits of one weight to show."""
    code = Image.Resampling(resample)
    for source, full, crop in ((262, 372, 34), (278, 220, 50), (97, 1000, 60)):
        image = cases.picture(f"lines {resample}", "L", 2000, source)
        axis = crop_axis(source, full, crop)
        whole = np.asarray(image.resize((2000, full), code))[axis.start : axis.stop]
        assert np.array_equal(_window_pass(np.asarray(image), axis, 0, resample), whole)


def test_rows_that_reach_the_crop_hold_every_row_used() -> None:
    for source, full, crop in [(480, 298, 224), (1000, 224, 10), (7, 900, 3), (500, 256, 224)]:
        axis = crop_axis(source, full, crop)
        top, bottom = rows_reached(axis, 0)
        used = nearest_source(axis)
        assert top <= used.min()
        assert used.max() < bottom
        for resample in range(1, 6):
            image = cases.picture("reach", "L", 1, source)
            changed = np.array(image)
            top, bottom = rows_reached(axis, resample)
            changed[:top] ^= 255
            changed[bottom:] ^= 255
            two = [
                np.asarray(i.resize((1, full), Image.Resampling(resample)))[axis.start : axis.stop]
                for i in (image, Image.fromarray(changed))
            ]
            assert np.array_equal(*two)
