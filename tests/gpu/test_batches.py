"""The same bits again (N8), and the same bits in any company (N9)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import vitrail
from gpu.common import DEVICE, DRY, HALVES, NAMES, bits, same_bits
from gpu.models import BUNDLED, HALF, RUNNER, Zoo, images, padded, texts
from helpers import image_embedding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("kernels", *(["ordered_dot"] if DRY else [])),
]

SIZES = (1, 2, 3) if DRY else (1, 2, 3, 5, 8, 16, 31, 32, 33, 64, 256)
REPEATS = {1: 2, 2: 2} if DRY else {1: 250, 60: 250, 256: 50}


def unlike(got: Tensor, wanted: Tensor) -> list[int]:
    """The rows whose bits are not those wanted."""
    return (bits(got) != bits(wanted)).flatten(1).any(dim=1).nonzero().flatten().tolist()


def in_company(
    encode: Callable[[list[int]], Tensor], count: int, sizes: tuple[int, ...] = SIZES
) -> Iterator[str]:
    """The differences between ``encode`` of several of ``count`` items and of each alone.

    Every batch is taken twice, its items at other places.
    """
    alone = torch.cat([encode([item]) for item in range(count)])
    assert not same_bits(alone[0], alone[1]), "two items are alike"
    for size in sizes:
        for turn in (0, count // 2 + 1):
            items = [(turn + place) % count for place in range(size)]
            wrong = unlike(encode(items), alone[items])
            if wrong:
                yield f"batch of {size} from {turn}: {len(wrong)} differ, at {wrong[:5]}"


# -- N8 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", REPEATS)
def test_repeats_are_bit_identical(batch: int, zoo: Zoo) -> None:
    """ViT-B/16: 250 times at batch 1 and 60; 50 times at 256, to save time."""
    model, pixels = zoo.ours("ViT-B/16"), images(batch)
    first = model.encode_image(pixels, batch_size=batch)
    wrong = {
        number: rows[:5]
        for number in range(1, REPEATS[batch])
        if (rows := unlike(model.encode_image(pixels, batch_size=batch), first))
    }
    assert wrong == {}, f"{len(wrong)} of {REPEATS[batch]} repeats differ"


def test_repeats_of_the_dense_pass_are_bit_identical(zoo: Zoo) -> None:
    """DINOv2 at 518, every token: 50 times at batch 4."""
    model, pixels = zoo.ours("DINOv2-B registers"), images(2 if DRY else 4, (518, 518))
    first = model.forward(pixel_values=pixels).last_hidden_state
    assert first is not None
    for number in range(1, 2 if DRY else 50):
        again = model.forward(pixel_values=pixels).last_hidden_state
        assert again is not None
        assert same_bits(again, first), f"repeat {number}: {unlike(again, first)}"


# -- N9 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
def test_an_image_has_its_bits_in_any_batch(dtype: torch.dtype, zoo: Zoo) -> None:
    model, pool = zoo.ours("ViT-B/16", dtype), images(max(SIZES))

    def encode(items: list[int]) -> Tensor:
        return model.encode_image(pool[items], batch_size=len(items))

    assert list(in_company(encode, len(pool))) == []


@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
def test_a_text_has_its_bits_in_any_batch(dtype: torch.dtype, zoo: Zoo) -> None:
    """Lengths from 2 to 77, packed."""
    model = zoo.ours("CLIP B/32", dtype)
    pool = texts(model, max(SIZES))

    def encode(items: list[int]) -> Tensor:
        return model.encode_text([pool[item] for item in items], batch_size=len(items))

    assert list(in_company(encode, len(pool))) == []


@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
def test_a_large_image_has_its_bits_in_any_batch(dtype: torch.dtype, zoo: Zoo) -> None:
    """DINOv2 with registers at 518: 1374 tokens an image."""
    sizes = SIZES if DRY else (1, 2, 3, 5, 8, 16)
    model, pool = zoo.ours("DINOv2-B registers", dtype), images(max(sizes), (518, 518))

    def encode(items: list[int]) -> Tensor:
        return model.encode_image(pool[items], batch_size=len(items))

    assert list(in_company(encode, len(pool), sizes)) == []


@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
def test_every_token_has_its_bits_in_any_batch(dtype: torch.dtype, zoo: Zoo) -> None:
    """The dense passes, of images and of texts of one length."""
    vit, clip = zoo.ours("ViT-B/16", dtype), zoo.ours("CLIP B/32", dtype)
    sizes = SIZES if DRY else (1, 2, 3, 8, 33, 64)
    pool = images(max(sizes))
    ids = padded(texts(clip, max(sizes)))

    def see(items: list[int]) -> Tensor:
        out = vit.forward(pixel_values=pool[items]).last_hidden_state
        assert out is not None
        return out

    def read(items: list[int]) -> Tensor:
        out = clip.forward(input_ids=ids[items]).text_model_output
        assert out is not None
        assert out.last_hidden_state is not None
        return out.last_hidden_state

    wrong = [f"image {line}" for line in in_company(see, len(pool), sizes)]
    wrong += [f"text {line}" for line in in_company(read, len(ids), sizes)]
    assert wrong == []


@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
def test_bytes_and_strings_of_the_bundled_model(dtype: torch.dtype) -> None:
    """uint8 pixels, through the projection with the normalization folded in."""
    model = vitrail.load(BUNDLED, device=DEVICE, dtype=dtype, backend=RUNNER)
    pool = torch.randint(256, (max(SIZES[:-1]), 56, 56, 3), dtype=torch.uint8).numpy()
    words = ["a red star", "a circle", "a blue square above a green star", "two"]
    said = [f"{words[i % 4]} {'and a circle ' * (i % 3)}{i}" for i in range(len(pool))]

    def see(items: list[int]) -> Tensor:
        return model.encode_image([pool[item] for item in items], batch_size=len(items))

    def read(items: list[int]) -> Tensor:
        return model.encode_text(
            [said[item] for item in items], batch_size=len(items), overflow="truncate"
        )

    for what, encode in (("image", see), ("text", read)):
        assert list(in_company(encode, len(pool), SIZES[:-1])) == [], what


# -- controls --------------------------------------------------------------------------------------


@pytest.mark.skipif(DRY, reason="dry run: of PyTorch on a GPU")
def test_pytorchs_own_bits_depend_on_the_batch(zoo: Zoo) -> None:
    """The comparison can fail: the same model in eager PyTorch does not pass it."""
    peer, pool = zoo.peer("ViT-B/16"), images(64).to(HALF)

    def encode(items: list[int]) -> Tensor:
        return image_embedding(peer, pool[items])

    assert list(in_company(encode, len(pool), SIZES[:-1])) != []


def test_a_changed_pixel_would_be_noticed(zoo: Zoo) -> None:
    model, pixels = zoo.ours("ViT-B/16"), images(2)
    before = model.encode_image(pixels)
    pixels[1, 0, 3, 3] += 0.5
    assert unlike(model.encode_image(pixels), before) == [1]
