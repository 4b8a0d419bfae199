"""No item reaches another (N10), and results that are not finite are refused (N11)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vitrail
from gpu.common import DEVICE, DRY, HALVES, NAMES, POISONS, same_bits
from gpu.models import HALF, RUNNER, SMALL, Zoo, images, padded, texts
from helpers import make, save
from vitrail.errors import VitrailError
from vitrail.runtime.towers import TextTower, VisionTower
from vitrail.text.tokens import TokenIds
from vitrail.tools.agreement import compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("kernels"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # NumPy, in a dry run
]

COUNT = 4 if DRY else 9
BAD = (1, COUNT - 1)
GOOD = [item for item in range(COUNT) if item not in BAD]
MARKED = [int(item in BAD) for item in range(COUNT)]


def vision(model: vitrail.Model) -> VisionTower:
    """The tower itself: `Model` refuses NaN before it gets this far."""
    assert model._vision is not None
    return model._vision


def text(model: vitrail.Model) -> TextTower:
    assert model._text is not None
    return model._text


def same_but(bad: Any, a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Every output has the same bits for all items but ``bad``, whose bits differ."""
    for name, clean in a.items():
        if not name.endswith("status"):
            assert same_bits(b[name][GOOD], clean[GOOD]), f"{name}: others changed"
            assert not same_bits(b[name][list(bad)], clean[list(bad)]), f"{name}: no poison"


# -- N10 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
def test_poisoned_images_change_no_other(dtype: torch.dtype, poison: float, zoo: Zoo) -> None:
    tower = vision(zoo.ours("ViT-B/16", dtype))
    pixels = images(COUNT)
    last = tower.spec.blocks.layers
    clean = tower.embeddings(pixels), tower.dense(pixels, (0, 1, last))
    pixels[list(BAD)] = poison
    dirty = tower.embeddings(pixels), tower.dense(pixels, (0, 1, last))
    for a, b in zip(clean, dirty, strict=True):
        same_but(BAD, a, b)
    assert clean[0]["vision.status"].tolist() == [0] * COUNT
    if poison != poison or dtype == HALF:  # 65504 is an ordinary number in bf16
        assert dirty[0]["vision.status"].tolist() == MARKED


@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
def test_poisoned_texts_change_no_other(dtype: torch.dtype, poison: float, zoo: Zoo) -> None:
    """Packed, and in rows of one length. A word of the vocabulary is made the poison."""
    folder = zoo.folder("CLIP B/32", dtype)
    tower = text(vitrail.load(folder, device=DEVICE, dtype=dtype, backend=RUNNER))
    model = zoo.ours("CLIP B/32", dtype)
    word = 7
    ids = [[8 if i == word else i for i in row] for row in texts(model, COUNT)]
    ids = [row if len(row) > 2 else [3, 4, *row] for row in ids]
    clean = tower.embeddings(TokenIds.of(ids)), tower.dense(padded(ids), taps=(0, 1))
    tower.runner.weights["text.token"][word] = poison
    for item in BAD:
        ids[item][0] = word
    dirty = tower.embeddings(TokenIds.of(ids)), tower.dense(padded(ids), taps=(0, 1))
    for a, b in zip(clean, dirty, strict=True):
        same_but(BAD, a, b)
    if poison != poison:
        assert dirty[0]["text.status"].tolist() == MARKED


@pytest.mark.parametrize("poison", POISONS[1:] if DRY else POISONS, ids=str)
def test_forward_marks_the_item_that_is_not_finite_and_no_other(poison: float, zoo: Zoo) -> None:
    """`forward` takes pixels on a GPU without a look at their values."""
    model, pixels = zoo.ours("ViT-B/16"), images(COUNT)
    clean = model.forward(pixel_values=pixels)
    pixels[list(BAD)] = poison
    dirty = model.forward(pixel_values=pixels)
    assert clean.status is not None
    assert dirty.status is not None
    assert clean.last_hidden_state is not None
    assert dirty.last_hidden_state is not None
    assert clean.status.tolist() == [0] * COUNT
    assert dirty.status.tolist() == MARKED
    assert same_bits(dirty.last_hidden_state[GOOD], clean.last_hidden_state[GOOD])


# -- N11 -------------------------------------------------------------------------------------------


def blocks_of(model: Any) -> list[Any]:
    """Modules with an MLP: the blocks, in order."""
    return [module for module in model.modules() if hasattr(module, "mlp")]


CHANNEL, HIGH, MORE = 5, 60_000.0, 30_000.0
"""A channel that is already high in some items; a block's MLP adds to it: fp16 ends at 65,504."""


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT whose block 1 overflows fp16 on white images alone."""
    model = make("ViTModel", **SMALL["ViTModel"], num_hidden_layers=4, add_pooling_layer=False)
    projection = model.embeddings.patch_embeddings.projection
    with torch.no_grad():
        projection.weight[CHANNEL] = HIGH / projection.weight[CHANNEL].numel()
        projection.bias[CHANNEL] = 0
        blocks_of(model)[1].mlp.fc2.bias[CHANNEL] = MORE
    folder = tmp_path_factory.mktemp("bright")
    save(model, folder, dtype=HALF)
    return folder


def shades() -> Tensor:
    """Three images near black, of which the second is white."""
    pixels = 0.01 * torch.randn(3, 3, 32, 32, device=DEVICE)
    pixels[1] = 1
    return pixels


def test_an_image_that_overflows_is_named_with_its_block(bright: Path) -> None:
    model = vitrail.load(bright, device=DEVICE, dtype="float16", backend=RUNNER)
    told = (
        r"image 1: block 1 holds numbers that are not finite in float16; "
        r"load with dtype='bfloat16' or 'float32'"
    )
    with pytest.raises(VitrailError, match=told):
        model.encode_image(shades())
    kept = model.encode_image(shades(), on_error="skip")
    assert kept.index == (0, 2)
    assert list(kept.errors) == [1]
    assert torch.isfinite(kept.embeddings).all()
    status = model.forward(pixel_values=shades()).status
    assert status is not None
    assert status.tolist() == [0, 1, 0]


def test_what_overflows_fp16_is_right_in_bf16(bright: Path) -> None:
    """The advice of the message holds."""
    if DRY:
        pytest.skip("dry run: the interpreter's bf16 is garbage")
    model = vitrail.load(bright, device=DEVICE, dtype="bfloat16")
    exact = vitrail.load(bright, device=DEVICE, dtype="float32", backend="torch")
    found, wanted = model.encode_image(shades()), exact.encode_image(shades())
    assert compare(found, wanted, torch.bfloat16).reasons == ()


def test_a_text_that_overflows_is_named(tmp_path: Path) -> None:
    theirs = make("CLIPTextModelWithProjection", **SMALL["CLIPModel"]["text"])
    word = 9
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("token_embedding.weight"):
                parameter[word, CHANNEL] = HIGH
        blocks_of(theirs)[0].mlp.fc2.bias[CHANNEL] = MORE
    save(theirs, tmp_path, dtype=HALF)
    model = vitrail.load(tmp_path, device=DEVICE, dtype="float16", backend=RUNNER)
    end = text(model).spec.eos
    assert end is not None
    ids = [[3, 4, end], [3, word, 4, end], [word + 1, end]]
    told = r"text 1: the embedding holds numbers that are not finite in float16"
    with pytest.raises(VitrailError, match=told):
        model.encode_text(ids)
    assert torch.isfinite(model.encode_text([ids[0], ids[2]])).all()
