"""Whole small models through the Triton runner, in the interpreter, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vitrail
from helpers import (
    CONFIGS,
    IMAGE_ARCHITECTURES,
    TEXT_ARCHITECTURES,
    arguments,
    assert_close,
    assert_same,
    image_embedding,
    make,
    outputs,
    save,
    text_embedding,
)
from kernels.test_operators import same_bits
from vitrail.errors import InputError

pytestmark = pytest.mark.interpreted

FP32 = pytest.mark.interpreter_only("on a GPU float32 goes through PyTorch, not these kernels")

# heads of 32, so that attention takes whole heads, and every fused path is met: 72 hidden numbers,
# widths that are not multiples of 64
SHAPES: dict[str, dict[str, Any]] = {
    name: {"hidden_size": 96, "num_attention_heads": 3} for name in CONFIGS if name != "CLIPModel"
}
SHAPES["CLIPModel"] = {
    "vision": {"hidden_size": 96, "num_attention_heads": 3, "patch_size": 14, "image_size": 42},
    "text": {"hidden_size": 64, "num_attention_heads": 2},
}
SWIGLU = {**SHAPES["Dinov2WithRegistersModel"], "use_swiglu_ffn": True}


def opened(folder: Path, dtype: str) -> vitrail.Model:
    model = vitrail.load(folder, dtype=dtype, backend="triton")
    assert model.backend == "triton"
    return model


@FP32
@pytest.mark.parametrize("architecture", CONFIGS)
def test_fp32_equals_transformers_field_by_field(architecture: str, tmp_path: Path) -> None:
    theirs = save(make(architecture, **SHAPES[architecture]), tmp_path)
    given = arguments(architecture, theirs.config, batch=2)
    ours = opened(tmp_path, "float32")
    assert_same(ours.forward(**given, output_hidden_states=True), outputs(theirs, given))
    if architecture in IMAGE_ARCHITECTURES:
        pixels = given["pixel_values"]
        expected = image_embedding(theirs, pixels)
        assert_close(ours.encode_image(pixels), expected, what="model", name="encode_image")
    if ours.spec.head is not None:
        result = ours.classify(given["pixel_values"]).logits
        with torch.no_grad():
            assert_close(result, theirs(**given).logits, what="scores", name="classify")
    if architecture in TEXT_ARCHITECTURES:
        ids = given["input_ids"]
        expected = text_embedding(theirs, ids)
        assert_close(ours.encode_text(ids), expected, what="model", name="encode_text")


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("ViTForImageClassification", SHAPES["ViTForImageClassification"]),
        ("CLIPModel", SHAPES["CLIPModel"]),
        ("Dinov2WithRegistersModel", SWIGLU),
    ],
)
def test_fp16_errs_at_most_twice_as_pytorch_does(
    architecture: str, config: dict[str, Any], tmp_path: Path
) -> None:
    theirs = save(make(architecture, **config), tmp_path, dtype=torch.float16)
    given = arguments(architecture, theirs.config, batch=4)
    ours = opened(tmp_path, "float16")
    out = ours.forward(**given, output_hidden_states=True)
    expected = outputs(theirs, given)
    halved = {k: v.half() if v.is_floating_point() else v for k, v in given.items()}
    assert_same(out, expected, outputs(theirs.half(), halved))


@FP32
def test_another_size_and_intermediate_layers(tmp_path: Path) -> None:
    theirs = save(make("Dinov2WithRegistersModel", **SWIGLU), tmp_path)
    pixels = torch.randn(2, 3, 51, 35)
    arguments = {"pixel_values": pixels}
    ours = opened(tmp_path, "float32")
    assert_same(ours.forward(**arguments, output_hidden_states=True), outputs(theirs, arguments))
    reference = vitrail.load(tmp_path, backend="torch")
    result = ours.get_intermediate_layers(pixels, n=2, reshape=True, return_class_token=True)
    expected = reference.get_intermediate_layers(pixels, n=2, reshape=True, return_class_token=True)
    for (a, a_class), (b, b_class) in zip(result, expected, strict=True):
        assert_close(a, b, what="model", name="patches")
        assert_close(a_class, b_class, what="model", name="class token")


@FP32
def test_masks_hide_what_they_hide(tmp_path: Path) -> None:
    theirs = save(make("CLIPTextModel", **SHAPES["CLIPTextModel"]), tmp_path)
    given = arguments("CLIPTextModel", theirs.config, batch=3)
    mask = torch.ones_like(given["input_ids"])
    mask[0, 7:] = 0
    mask[2, 3:] = 0
    given["attention_mask"] = mask
    out = opened(tmp_path, "float32").forward(**given, output_hidden_states=True)
    assert_same(out, outputs(theirs, given))


@FP32
def test_uint8_images_give_what_the_reference_gives(clip: Path) -> None:
    images = [torch.randint(256, (40 + 3 * i, 50, 3), dtype=torch.uint8) for i in range(3)]
    ours, reference = opened(clip, "float32"), vitrail.load(clip, backend="torch")
    assert_close(ours.encode_image(images), reference.encode_image(images), what="model")
    texts = ["red circle", "a", "blue square above a green star"]
    assert_close(ours.encode_text(texts), reference.encode_text(texts), what="model")
    assert ours.fingerprint != reference.fingerprint


@FP32
def test_images_resized_on_the_device_have_the_bits_of_the_host(clip: Path) -> None:
    images = [torch.randint(256, (40 + 9 * i, 50, 3), dtype=torch.uint8) for i in range(2)]
    host = opened(clip, "float32")
    there = vitrail.load(clip, dtype="float32", backend="triton", resize="device")
    assert there.resize == "device, by Triton kernels"
    assert torch.equal(there.encode_image(images), host.encode_image(images))


@pytest.mark.usefixtures("ordered_dot")
def test_an_image_and_a_text_have_the_same_bits_in_any_company(clip: Path) -> None:
    ours = opened(clip, "float16")
    images = torch.randn(3, 3, 56, 56)
    every = ours.encode_image(images)
    for i in (0, 2):
        assert same_bits(ours.encode_image(images[i : i + 1]), every[i : i + 1])
    texts = ["red circle", "a", "blue square above a green star"]
    every = ours.encode_text(texts)
    for i, text in enumerate(texts):
        assert same_bits(ours.encode_text(text), every[i : i + 1])


@pytest.fixture
def clip() -> Path:
    return Path(vitrail.__file__).parent / "assets/clip"


def test_nothing_in_gives_nothing_out(clip: Path) -> None:
    ours = opened(clip, "float16")
    assert ours.encode_image([]).shape == (0, ours.spec.vision.embedding)
    assert ours.encode_text([]).shape[0] == 0


def test_a_runner_that_is_unknown_is_refused(clip: Path) -> None:
    with pytest.raises(InputError, match="backend: got 'cuda'"):
        vitrail.load(clip, backend="cuda")
