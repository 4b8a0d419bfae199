"""Normalized pixels have the bits of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import image_transforms

from image.samples import CLIP, spec_of
from pixels import cases
from vitrail.errors import InputError
from vitrail.image.normalize import linear_scale, normalize

STEPS = [*cases.LARGE.values(), *cases.SMALL.values()]


@pytest.mark.parametrize("steps", STEPS, ids=lambda s: f"{s.kind}-{s.rescale}-{s.mean}")
def test_every_byte_is_normalized_to_the_bits_of_transformers(steps: cases.Steps) -> None:
    pixels = np.stack([np.arange(256, dtype=np.uint8)] * 3, -1).reshape(16, 16, 3)
    pixels[..., 1] = pixels[::-1, :, 1]
    theirs = np.moveaxis(pixels, -1, 0)
    layout = image_transforms.ChannelDimension.FIRST
    if steps.rescale is not None:
        theirs = image_transforms.rescale(theirs, steps.rescale, input_data_format=layout)
    if steps.mean is not None:
        theirs = image_transforms.normalize(theirs, steps.mean, steps.std, input_data_format=layout)
    ours = normalize(pixels, spec_of(steps))
    assert ours.flags.c_contiguous
    assert ours.tobytes() == np.ascontiguousarray(theirs, np.float32).tobytes()
    a, b = linear_scale(spec_of(steps), 3)
    line = a[:, None, None] * np.moveaxis(pixels, -1, 0) + b[:, None, None]
    assert np.abs(line - ours).max() <= 3e-7 * max(1.0, np.abs(ours).max())


def test_a_batch_is_normalized_as_its_images_are() -> None:
    batch = cases.noise("batch", 3, 9, 7, 3)
    each = np.stack([normalize(image, CLIP) for image in batch])
    assert normalize(batch, CLIP).tobytes() == each.tobytes()
    assert (
        normalize(batch[::-1, :, ::-2], CLIP).tobytes()
        == np.ascontiguousarray(each[::-1, :, :, ::-2]).tobytes()
    )
    assert normalize(batch[:0], CLIP).shape == (0, 3, 9, 7)


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4, 3)), np.zeros((4, 3), np.uint8), np.zeros((3, 4, 4), np.uint8)]
)
def test_pixels_that_do_not_fit_are_not_normalized(bad: np.ndarray[Any, Any]) -> None:
    with pytest.raises(InputError, match="pixels: got"):
        normalize(bad, CLIP)
