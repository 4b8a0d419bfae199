"""Replicas on every GPU, or two on the only one: the bits of one model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import vitrail
from gpu.common import DEVICE, DRY, gpu_alone, same_bits
from gpu.models import BUNDLED, HALF, RUNNER, texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("kernels", *(["ordered_dot"] if DRY else [])),
]
COUNT = 3 if DRY else 200


@pytest.fixture(scope="module")
def model() -> vitrail.Model:
    return vitrail.load(BUNDLED, device=DEVICE, dtype=HALF, backend=RUNNER)


@pytest.fixture(scope="module")
def replicas() -> vitrail.Replicas:
    gpus = 0 if DRY else torch.cuda.device_count()
    devices = [f"cuda:{number}" for number in range(gpus)] if gpus > 1 else [DEVICE] * 2
    return vitrail.load_replicas(BUNDLED, devices=devices, dtype=HALF, backend=RUNNER)


def pictures(count: int) -> list[Any]:
    dice = torch.Generator().manual_seed(count)
    return list(torch.randint(256, (count, 40, 50, 3), dtype=torch.uint8, generator=dice))


def test_images_and_texts_have_the_bits_of_one_model(
    model: vitrail.Model, replicas: vitrail.Replicas
) -> None:
    assert replicas.fingerprint == model.fingerprint
    images = [*pictures(COUNT), b"no image"]
    for batch_size in (2,) if DRY else (None, 3):
        options: dict[str, Any] = {"batch_size": batch_size}
        alone = model.encode_image(images, on_error="skip", **options)
        spread = replicas.encode_image(images, on_error="skip", **options)
        assert same_bits(spread.embeddings, alone.embeddings)
        assert (spread.index, spread.errors) == (alone.index, alone.errors)
        ids = texts(model, COUNT)
        assert same_bits(replicas.encode_text(ids, **options), model.encode_text(ids, **options))


@gpu_alone
def test_pixels_of_a_stream_of_the_callers_are_waited_for(
    model: vitrail.Model, replicas: vitrail.Replicas
) -> None:
    pixels = model.preprocess(pictures(16))
    expected = model.encode_image(pixels)
    with torch.cuda.stream(torch.cuda.Stream()):
        late = torch.zeros(pixels.shape, device=DEVICE)
        torch.cuda._sleep(200_000_000)
        late.copy_(pixels)
        assert same_bits(replicas.encode_image(late, batch_size=2), expected)


@gpu_alone
def test_threads_on_all_replicas_give_the_serial_bits(
    model: vitrail.Model, replicas: vitrail.Replicas
) -> None:
    batches = [pictures(count) for count in (1, 7, 40)]
    expected = [model.encode_image(images) for images in batches]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(replicas.encode_image, batches * 20))
    for result, wanted in zip(results, expected * 20, strict=True):
        assert same_bits(result, wanted)
