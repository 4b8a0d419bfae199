"""Whole preprocessing has the bits of transformers under Pillow 12, also in batches."""

from __future__ import annotations

import dataclasses
import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gauge import within
from image.samples import CASES, CLIP, FORMATS, crop_pixels, encode, photo, rgb, sound, spec_of
from pixels import cases
from pixels.theirs import processor
from vitrail.errors import ImageError, InputError
from vitrail.image import preprocess
from vitrail.image.decoding import decode
from vitrail.image.normalize import normalize
from vitrail.image.preprocess import preprocess_float, preprocess_uint8
from vitrail.spec import ImageSpec

GOLDENS: dict[str, str] = json.loads(
    Path(__file__).parents[1].joinpath("pixels").joinpath("goldens.json").read_text()
)["cases"]


def test_the_goldens_cover_every_case() -> None:
    assert len(CASES) >= 500
    assert [case.id for case in CASES] == list(GOLDENS)


@pytest.mark.parametrize("group", sorted({case.id.partition("/")[0] for case in CASES}))
def test_pixels_have_the_bits_of_transformers_under_pillow_12(group: str) -> None:
    wrong = []
    for case in CASES:
        if case.id.partition("/")[0] != group:
            continue
        spec = spec_of(case.steps)
        decoded = decode(case.make(), channels=case.channels, sixteen_bit=case.sixteen_bit)
        found = normalize(crop_pixels(decoded, spec), spec)
        (direct,) = preprocess_float(
            [case.make()], spec, case.channels, sixteen_bit=case.sixteen_bit
        )
        assert isinstance(direct, np.ndarray), direct
        if {cases.summary(found), cases.summary(direct)} != {GOLDENS[case.id]}:
            wrong.append(case.id)
    assert wrong == []


@pytest.mark.parametrize("name", ["clip-224", "dinov2-224", "vit-224"])
def test_pixels_have_the_bits_of_the_installed_processor_where_pillow_keeps_its_order(
    name: str,
) -> None:
    steps = cases.LARGE[name]
    pictures = [photo(640, 480), photo(500, 333), photo(300, 300)]
    theirs = processor(steps, 3)(pictures, return_tensors="np")["pixel_values"]
    ours = preprocess_float(pictures, spec_of(steps), 3)
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.machine
@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1)])
def test_a_thread_of_an_image_costs_only_its_crop(size: tuple[int, int]) -> None:
    image = cases.picture("thread", "L", *size)
    spec = dataclasses.replace(CLIP, mean=None, std=None)
    with within(2):
        (found,) = preprocess_uint8([image], spec, 1)
    assert isinstance(found, np.ndarray)
    # One side is a single pixel, so every line across it is the same.
    line = image.resize(
        (6_720_000, 1) if size[1] == 1 else (1, 6_720_000), Image.Resampling.BICUBIC
    )
    kept = np.asarray(line).ravel()[3_359_888 : 3_359_888 + 224]
    expected = np.broadcast_to(kept if size[1] == 1 else kept[:, None], (224, 224))
    assert np.array_equal(found[..., 0], expected)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_every_number_of_channels_is_resized_channel_by_channel(channels: int) -> None:
    image = cases.noise("channels", 40, 30, channels)
    spec = ImageSpec(True, ("shortest", 20), 3, (24, 18), None, None, None)
    whole = crop_pixels(image, spec)
    planes = [crop_pixels(image[..., c : c + 1], spec) for c in range(channels)]
    assert np.array_equal(whole, np.concatenate(planes, axis=2))


def test_an_identity_resize_leaves_the_pixels() -> None:
    image = cases.noise("identity", 33, 21, 3)
    spec = ImageSpec(True, ("exact", 33, 21), 3, None, None, None, None)
    found = crop_pixels(image, spec)
    assert np.array_equal(found, image)
    assert not np.shares_memory(found, image)


def test_one_pixel_is_an_image() -> None:
    for file_format in FORMATS:
        (found,) = preprocess_uint8(
            [encode(Image.new("RGB", (1, 1), (9, 9, 9)), file_format)], CLIP, 3
        )
        assert isinstance(found, np.ndarray)
        assert found.shape == (224, 224, 3)
        assert (found == found[0, 0, 0]).all()


@pytest.mark.parametrize("cores", [1, 5])
def test_a_batch_keeps_its_order_and_its_bad_images_to_themselves(
    cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "core_count", lambda: cores)
    path = tmp_path / "photo.png"
    path.write_bytes(encode(photo(90, 70, seed=5), "PNG"))
    given: list[Any] = [
        photo(80, 60),
        b"<html>",
        path,
        tmp_path / "missing.png",
        np.asarray(photo(33, 44)),
        sound("JPEG")[:3000],
        7,
        photo(80, 60),
        sound("WEBP"),
    ]
    found = preprocess_uint8(given, CLIP, 3)
    kinds = [type(result) for result in found]
    bad = {1: ImageError, 3: ImageError, 5: ImageError, 6: InputError}
    assert kinds == [bad.get(i, np.ndarray) for i in range(9)]
    assert "missing.png" in str(found[3])
    for index in (0, 2, 4, 7, 8):
        alone = crop_pixels(rgb(given[index]), CLIP)
        assert np.array_equal(found[index], alone)  # type: ignore[arg-type]
    floats = preprocess_float(given, CLIP, 3)
    assert [str(e) for e in floats if isinstance(e, Exception)] == [
        str(e) for e in found if isinstance(e, Exception)
    ]
    assert np.array_equal(floats[2], normalize(found[2], CLIP))  # type: ignore[arg-type]


def test_an_empty_batch_is_empty() -> None:
    assert preprocess_uint8([], CLIP, 3) == []
    assert preprocess_float([], CLIP, 3) == []


def test_a_mean_of_other_channels_fails_the_call_and_not_the_images() -> None:
    with pytest.raises(InputError, match="wanted 3"):
        preprocess_float([photo()], CLIP, 1)


def test_an_image_that_is_not_loaded_yet_may_be_given_many_times_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preprocess, "core_count", lambda: 8)

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            time.sleep(0.001)
            return super().read(size)

    data = encode(photo(300, 200), "PNG")
    expected = rgb(Image.open(io.BytesIO(data)))
    for _ in range(3):
        lazy = Image.open(Slow(data))
        spec = dataclasses.replace(CLIP, resize=None, crop=None)
        found = preprocess_uint8([lazy] * 16, spec, 3)
        assert all(np.array_equal(crop, expected) for crop in found)  # type: ignore[arg-type]


def test_many_threads_get_the_bits_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [encode(photo(70 + i, 50 + i, seed=i), FORMATS[i % 5]) for i in range(10)]
    given += [sound("PNG")[:500]]
    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "core_count", lambda: 1)
        expected = preprocess_float(given, CLIP, 3)
    results: list[Any] = []

    def call() -> None:
        for _ in range(3):
            results.append(preprocess_float(given, CLIP, 3))

    callers = [threading.Thread(target=call) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 18
    for found in results:
        assert str(found[-1]) == str(expected[-1])
        assert all(np.array_equal(a, b) for a, b in zip(found[:-1], expected[:-1], strict=True))
