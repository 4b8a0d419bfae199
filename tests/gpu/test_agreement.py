"""Full-size models against transformers: N2 in fp32, N4 by block, N5 and N6 of embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import vitrail
from gpu.common import DEVICE, DRY, HALVES
from gpu.models import HALF, Zoo, images, in_parts, padded, texts
from helpers import (
    assert_close,
    assert_same,
    image_embedding,
    outputs,
    reference_numbers,
    text_embedding,
)
from vitrail.tools.agreement import CORPUS, compare

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

BFLOAT = HALVES[-1]
OWN = (518, 518)


def given(model: vitrail.Model, count: int, size: tuple[int, int] | None) -> dict[str, Tensor]:
    """Pixels, and texts where the model takes them: one more, so that the two are told apart."""
    inputs = {"pixel_values": images(count, size)}
    if model.spec.text is not None:
        inputs["input_ids"] = padded(texts(model, count + 1))
    return inputs


def in_dtype(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


# -- N2 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("ViT-B/16", None),
        ("ViT-B/16", (256, 320)),
        ("CLIP B/32", None),
        ("DINOv2-B registers", (224, 224)),
        ("DINOv2-B registers", OWN),
    ],
    ids=str,
)
def test_fp32_equals_transformers(name: str, size: tuple[int, int] | None, zoo: Zoo) -> None:
    """N2, by PyTorch's operators on the GPU: every field, and the embedding."""
    theirs = zoo.theirs(name)
    ours = vitrail.load(zoo.folder(name), device=DEVICE, dtype="float32", backend="torch")
    inputs = given(ours, 3, size)
    with reference_numbers():
        out = ours.forward(**inputs, output_hidden_states=True)
        embedding = ours.encode_image(inputs["pixel_values"])
    assert_same(out, outputs(theirs, inputs))
    wanted = image_embedding(theirs, inputs["pixel_values"])
    assert_close(embedding, wanted, what="model", name="encode_image")


# -- N4 --------------------------------------------------------------------------------------------


def streams(output: Any) -> dict[str, tuple[Tensor, ...]]:
    """The residual stream before every block and after the last, of each tower."""
    towers = {"": output} | {
        tower: getattr(output, f"{tower}_model_output", None) for tower in ("vision", "text")
    }
    found = {name: getattr(tower, "hidden_states", None) for name, tower in towers.items()}
    return {name: states for name, states in found.items() if states is not None}


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("ViT-B/16", HALF, None),
        ("ViT-B/16", BFLOAT, None),
        ("CLIP B/32", HALF, None),
        ("CLIP L/14", HALF, None),
        ("DINOv2-B registers", HALF, OWN),
    ],
    ids=str,
)
def test_each_block_errs_no_more_than_pytorch(
    name: str, dtype: torch.dtype, size: tuple[int, int] | None, zoo: Zoo
) -> None:
    """N1 of every block's output; the first that fails is named. Then the other fields, by N5."""
    ours = zoo.ours(name, dtype)
    inputs = given(ours, 3 if DRY else 8, size)
    out = ours.forward(**inputs, output_hidden_states=True)
    exact = outputs(zoo.theirs(name, dtype), inputs)
    peer = outputs(zoo.peer(name, dtype), in_dtype(inputs, dtype))
    for tower, states in streams(out).items():
        wanted, theirs = streams(exact)[tower], streams(peer)[tower]
        assert len(states) == len(wanted), f"{tower}: {len(states)} streams, not {len(wanted)}"
        for number, (y, r, p) in enumerate(zip(states, wanted, theirs, strict=True)):
            where = f"{tower} block {number - 1}" if number else f"{tower} embedding"
            assert_close(y, r, p, name=where)
    assert_same(out, exact, peer)
    assert out.status is not None
    assert not out.status.any(), "finite items are marked"


# -- N5, N6 ----------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    """How many images of ``size`` go through which model."""

    name: str
    dtype: torch.dtype
    outliers: bool
    items: int
    size: tuple[int, int] | None = None


CORPORA = {
    "ViT-B/16": Corpus("ViT-B/16", HALF, False, CORPUS),
    "ViT-B/16, outliers": Corpus("ViT-B/16", HALF, True, CORPUS),
    "ViT-B/16, bf16": Corpus("ViT-B/16", BFLOAT, False, CORPUS),
    "ViT-B/16, bf16, outliers": Corpus("ViT-B/16", BFLOAT, True, CORPUS),
    "CLIP B/32": Corpus("CLIP B/32", HALF, False, CORPUS),
    "CLIP B/32, outliers": Corpus("CLIP B/32", HALF, True, CORPUS),
    "CLIP L/14": Corpus("CLIP L/14", HALF, False, 64),
    "CLIP L/14, outliers": Corpus("CLIP L/14", HALF, True, 64),
    "DINOv2-B at 224": Corpus("DINOv2-B", HALF, False, 64),
    "DINOv2-B at 518": Corpus("DINOv2-B", HALF, False, 16, OWN),
    "DINOv2-B registers at 224": Corpus("DINOv2-B registers", HALF, False, 64),
    "DINOv2-B registers at 518": Corpus("DINOv2-B registers", HALF, False, 16, OWN),
    "DINOv2-B registers, bf16": Corpus("DINOv2-B registers", BFLOAT, False, 64),
}


def report(name: str, ours: Tensor, exact: Tensor, peer: Tensor) -> None:
    """A line for the log, whatever comes of it; then the rules."""
    y, p = (compare(x, exact, peer.dtype) for x in (ours, peer))
    print(
        f"{name}: {y.items} items, cosine {y.cosine_mean:.7f} (PyTorch {p.cosine_mean:.7f}), worst "
        f"{y.cosine_worst:.7f} ({p.cosine_worst:.7f}), error {y.error:.2e} ({p.error:.2e})"
    )
    assert_close(ours, exact, peer, what="model", name=name)


@pytest.mark.parametrize("corpus", CORPORA.values(), ids=CORPORA)
def test_image_embeddings_err_at_most_twice_as_pytorchs(corpus: Corpus, zoo: Zoo) -> None:
    which = corpus.name, corpus.dtype, corpus.outliers
    pixels = images(4 if DRY else corpus.items, corpus.size)
    theirs, half = zoo.theirs(*which), zoo.peer(*which)
    exact = in_parts(lambda x: image_embedding(theirs, x), pixels, 32)
    peer = in_parts(lambda x: image_embedding(half, x.to(corpus.dtype)), pixels, 32)
    report(f"{which}", zoo.ours(*which).encode_image(pixels), exact, peer)


@pytest.mark.parametrize("outliers", [False, True], ids=["plain", "outliers"])
def test_text_embeddings_err_at_most_twice_as_pytorchs(outliers: bool, zoo: Zoo) -> None:
    """Of all lengths; ours cut and packed, theirs padded."""
    which = "CLIP B/32", HALF, outliers
    ours, theirs, half = zoo.ours(*which), zoo.theirs(*which), zoo.peer(*which)
    ids = texts(ours, 6 if DRY else CORPUS)
    rows = padded(ids)
    exact = in_parts(lambda x: text_embedding(theirs, x), rows)
    peer = in_parts(lambda x: text_embedding(half, x), rows)
    report(f"texts, {which}", ours.encode_text(ids), exact, peer)


def test_another_image_is_not_near(zoo: Zoo) -> None:
    """The rules can fail: a mirrored image is too far away."""
    pixels = images(8)
    exact = image_embedding(zoo.theirs("ViT-B/16"), pixels)
    peer = image_embedding(zoo.peer("ViT-B/16"), pixels.half())
    ours = zoo.ours("ViT-B/16").encode_image(pixels.flip(3))
    with pytest.raises(AssertionError, match="worst cosine"):
        assert_close(ours, exact, peer, what="model")
