"""Many threads on one model give the bits that one thread gives."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

import vitrail
from helpers import clip_folder

PHOTOS = sorted((Path(__file__).parents[2] / "engine/vitrail/assets/photos").glob("*.jpg"))
THREADS, CALLS = 16, 200


def calls(model: vitrail.Model, folder: Path) -> list[Callable[[], Any]]:
    """Calls of every kind on inputs of many sizes, bad ones among them."""
    dice = np.random.default_rng(0)
    broken = folder / "bad.jpg"
    broken.write_bytes(PHOTOS[0].read_bytes()[:900])
    arrays = [dice.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((32, 32), (50, 41), (33, 90))]
    pixels = torch.from_numpy(dice.normal(0, 1, (5, 3, 32, 32)).astype(np.float32))
    floats = torch.from_numpy(dice.normal(0, 1, (2, 3, 48, 64)).astype(np.float32))
    texts = ["a photo of a cat", "red", "two people on the mat near the window at night"]
    data = PHOTOS[2].read_bytes()

    def skipped() -> Any:
        result = model.encode_image([PHOTOS[1], broken, arrays[1]], on_error="skip")
        return result.embeddings, result.index, dict(result.errors)

    def failed() -> Any:
        with pytest.raises(vitrail.ImageError) as caught:
            model.encode_image([broken])
        return str(caught.value)

    return [
        lambda: model.encode_image(PHOTOS[:3]),
        lambda: model.encode_image([data, arrays[0], arrays[2]], normalize=True),
        lambda: model.encode_image(pixels),
        lambda: model.encode_image(floats),
        lambda: model.encode_image(PHOTOS[3], size=(40, 64)),
        lambda: model.encode_text(texts),
        lambda: model.encode_text(texts[1]),
        lambda: model.classify(arrays, labels=["cat", "dog"]).probs,
        lambda: model.forward(pixel_values=pixels[:2]).image_embeds,
        lambda: model.preprocess(PHOTOS[:2]),
        skipped,
        failed,
    ]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.slow
def test_sixteen_threads_on_one_model_give_the_serial_bits(tmp_path: Path) -> None:
    clip_folder(tmp_path)
    model = vitrail.load(tmp_path)
    every = calls(model, tmp_path)
    serial = [call() for call in every]

    def work(thread: int) -> list[int]:
        dice = Random(thread)
        chosen = [dice.randrange(len(every)) for _ in range(CALLS)]
        return [number for number in chosen if not same(every[number](), serial[number])]

    with ThreadPoolExecutor(THREADS) as pool:
        wrong = [number for found in pool.map(work, range(THREADS)) for number in found]
    assert wrong == []
    assert not same(serial[0], serial[1])
