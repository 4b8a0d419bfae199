"""The pictures that calibrate and check: crops of the sample photos, or a user's own images."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.errors import InputError
from vitrail.spec import BlockSpec, ImageSpec, VisionSpec
from vitrail.tools.pictures import crop_box, own_pictures, sample_pictures

VISION = VisionSpec(BlockSpec(32, 2, 2, 40, "gelu", 1e-6), (32, 32), (8, 8))
IMAGE = ImageSpec(True, ("exact", 32, 32), 3, None, 1 / 255, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def folder(tmp_path: Path) -> list[str]:
    """Paths of twenty images of noise."""
    dice = np.random.default_rng(0)
    for number in range(20):
        pixels = dice.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02}.png")
    return [str(path) for path in sorted(tmp_path.iterdir())]


def _bytes(images: list[torch.Tensor]) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


def test_crops_are_many_and_different() -> None:
    pictures = sample_pictures(IMAGE, VISION)
    assert (len(pictures.calibration), len(pictures.checked)) == (36, 64)
    assert (pictures.origin, pictures.own) == ("bundled", False)
    every = _bytes(pictures.calibration) + _bytes(pictures.checked)
    assert len({*every}) == 100
    assert all(image.shape == (32, 32, 3) for image in pictures.calibration)


def test_crops_are_the_same_each_time() -> None:
    first, second = sample_pictures(IMAGE, VISION, 8, 4), sample_pictures(IMAGE, VISION, 8, 4)
    assert first.digest == second.digest
    assert _bytes(first.checked) == _bytes(second.checked)
    assert first.digest != sample_pictures(IMAGE, VISION, 7, 4).digest


@pytest.mark.parametrize(("width", "height"), [(320, 213), (40, 300), (1, 3)])
def test_boxes_are_squares_within_the_photo(width: int, height: int) -> None:
    boxes = [crop_box(width, height, number) for number in range(500)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert right - left == bottom - top >= round(0.45 * min(width, height))
    if width > 3:
        assert len({*boxes}) > 400
        assert all(first != second for first, second in pairwise(boxes))


def test_own_images_calibrate_or_check_and_never_both(folder: list[str]) -> None:
    pictures = own_pictures(folder, IMAGE, VISION, 12, 8)
    assert (len(pictures.calibration), len(pictures.checked)) == (12, 8)
    assert (pictures.origin, pictures.own, pictures.unread) == ("own", True, [])
    assert not {*_bytes(pictures.calibration)} & {*_bytes(pictures.checked)}


def test_own_images_come_from_all_over_the_listing(folder: list[str]) -> None:
    """Of a listing sorted by class, neither half would do."""
    last = {*_bytes(own_pictures(folder[10:], IMAGE, VISION, 5, 5).calibration)}
    last |= {*_bytes(own_pictures(folder[10:], IMAGE, VISION, 5, 5).checked)}
    pictures = own_pictures(folder, IMAGE, VISION, 10, 10)
    assert 2 <= len({*_bytes(pictures.calibration)} & last) <= 8


def test_a_copy_of_an_image_counts_once(folder: list[str]) -> None:
    with pytest.raises(InputError, match="got 3 different ones; wanted 2 to calibrate"):
        own_pictures([*folder[:3], *folder[:3]], IMAGE, VISION, 2, 2)


def test_unreadable_images_are_left_out(folder: list[str], tmp_path: Path) -> None:
    torn = tmp_path / "torn.jpg"
    torn.write_bytes(b"no image")
    pictures = own_pictures([str(torn), *folder[:4]], IMAGE, VISION, 2, 2)
    assert len(pictures.checked) == 2
    (reason,) = pictures.unread
    assert "torn.jpg" in reason
    with pytest.raises(InputError, match=r"got 4 different ones, and 1 that cannot be read.*torn"):
        own_pictures([str(torn), *folder[:4]], IMAGE, VISION, 3, 2)


def test_without_calibration_images_the_sample_photos_calibrate(folder: list[str]) -> None:
    pictures = own_pictures(folder, IMAGE, VISION, 0, 20)
    assert (pictures.origin, pictures.own) == ("bundled", True)
    assert pictures.digest == sample_pictures(IMAGE, VISION).digest
    assert len(pictures.checked) == 20


def test_an_image_smaller_than_a_patch_is_left_out(folder: list[str], tmp_path: Path) -> None:
    """A processor without a fixed size can make such pixels."""
    image = ImageSpec(True, None, 3, None, 1 / 255, None, None)
    thin = tmp_path / "thin.png"
    Image.new("RGB", (50, 5)).save(thin)
    pictures = own_pictures([str(thin), *folder[:2]], image, VISION, 1, 1)
    (reason,) = pictures.unread
    assert reason.endswith("got 50x5 pixels after preprocessing, wanted at least one patch of 8x8")
