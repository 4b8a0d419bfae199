"""How far an image is resized, and which window is kept."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import image_transforms

from image.samples import CLIP, crop_pixels
from pixels import cases
from vitrail.errors import ImageError, InputError
from vitrail.image.geometry import geometry, spec_at
from vitrail.image.preprocess import preprocess_uint8
from vitrail.spec import ImageSpec


def test_a_resize_without_a_crop_is_bounded() -> None:
    (error,) = preprocess_uint8(
        [Image.new("RGB", (1, 30_000))], dataclasses.replace(CLIP, crop=None), 3
    )
    assert isinstance(error, ImageError)
    assert "1 x 30000" in str(error)
    assert "224 x 6720000" in str(error)


@pytest.mark.parametrize("full", range(1, 8))
@pytest.mark.parametrize("crop", range(1, 10))
def test_the_crop_is_that_of_transformers(full: int, crop: int) -> None:
    image = cases.noise(f"{full} {crop}", full, 9 - full, 3)
    spec = ImageSpec(True, None, 3, (crop, 10 - crop), None, None, None)
    theirs = image_transforms.center_crop(
        image, (crop, 10 - crop), input_data_format="channels_last", data_format="channels_last"
    )
    assert np.array_equal(crop_pixels(image, spec), theirs)


@pytest.mark.parametrize(
    ("resize", "crop", "size", "wanted"),
    [
        (("exact", 224, 224), None, (96, 128), (("exact", 96, 128), None)),
        (("shortest", 224), (224, 224), (336, 336), (("shortest", 336), (336, 336))),
        (("shortest", 256), (224, 224), (448, 448), (("shortest", 512), (448, 448))),
        (("shortest", 256), (224, 224), (100, 98), (("shortest", 114), (100, 98))),
        (("shortest", 256), (224, 224), (112, 448), (("shortest", 512), (112, 448))),
        (("shortest", 32), None, (20, 64), (("shortest", 64), (20, 64))),
        (("exact", 256, 128), (224, 64), (112, 96), (("exact", 128, 192), (112, 96))),
        (None, (224, 224), (50, 60), (None, (50, 60))),
    ],
)
def test_a_size_scales_the_resize_with_the_crop(
    resize: Any, crop: Any, size: Any, wanted: Any
) -> None:
    spec = ImageSpec(True, resize, 3, crop, None, None, None)
    changed = spec_at(spec, size)
    assert (changed.resize, changed.crop) == wanted
    assert spec_at(spec, list(size)) == changed  # type: ignore[arg-type]
    assert crop_pixels(np.zeros((70, 90, 3), np.uint8), spec, size).shape == (*size, 3)
    assert spec_at(spec, None) is spec


@pytest.mark.parametrize("size", [(0, 5), (5,), 224, (3.0, 4), (True, 9), (16_385, 1), "ab"])
def test_a_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(InputError, match="size: got"):
        preprocess_uint8([], CLIP, 3, size=size)


def test_a_size_for_a_processor_that_leaves_sizes_alone_is_refused() -> None:
    with pytest.raises(InputError, match="neither resizes nor crops"):
        spec_at(dataclasses.replace(CLIP, resize=None, crop=None), (5, 5))


def test_a_size_that_needs_a_huge_resize_is_refused() -> None:
    with pytest.raises(InputError, match="the most is 16384"):
        spec_at(dataclasses.replace(CLIP, crop=(8, 8)), (16_000, 16_000))


def test_the_geometry_truncates_the_long_side_as_transformers_does() -> None:
    from transformers.image_transforms import get_resize_output_image_size

    for height in (1, 2, 37, 480, 683, 1009):
        for width in (1, 3, 37, 640, 1024, 997):
            blank = np.broadcast_to(np.uint8(0), (height, width, 3))
            theirs = get_resize_output_image_size(
                blank, 224, default_to_square=False, input_data_format="channels_last"
            )
            rows, columns = geometry(height, width, CLIP)
            assert (rows.full, columns.full) == theirs
