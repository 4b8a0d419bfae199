"""`Model` as users meet it: what goes in, what comes out, what is refused, what stays as it was."""

from __future__ import annotations

import copy
import io
import json
import random
import shutil
import struct
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vitrail
from helpers import (
    arguments,
    assert_close,
    assert_same,
    clip_folder,
    image_embedding,
    make,
    outputs,
    save,
    text_embedding,
)
from vitrail.errors import CheckpointError, ImageError, InputError, VitrailError
from vitrail.model.outputs import EncodeResult, PreprocessResult
from vitrail.model.texts import TextEncoder

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(40, 40), (64, 48), (48, 64), (90, 70), (33, 57), (120, 100), (32, 32)]


def photo(number: int) -> Image.Image:
    """A picture of its own: a slope in each channel, and grain."""
    width, height = SIZES[number % len(SIZES)]
    dice = np.random.default_rng(number)
    down, across = np.mgrid[0:height, 0:width]
    slopes = dice.uniform(-2, 2, (2, 3))
    flat = dice.uniform(60, 200, 3) + down[..., None] * slopes[0] + across[..., None] * slopes[1]
    noisy = flat + dice.normal(0, 15, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A CLIPModel folder, the transformers model and its processor."""
    folder = tmp_path_factory.mktemp("clip")
    return folder, *clip_folder(folder)


@pytest.fixture(scope="module")
def clip(pair: tuple[Path, Any, Any]) -> vitrail.Model:
    return vitrail.load(pair[0])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(7):
        (folder / f"{number}.png").write_bytes(encoded(photo(number)))
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def wanted(pair: tuple[Path, Any, Any]) -> Tensor:
    """The embeddings of the seven photos, by transformers' processor and model."""
    _, model, processor = pair
    images = [photo(number) for number in range(7)]
    pixels = processor.image_processor(images, return_tensors="pt").pixel_values
    return image_embedding(model, pixels)


@pytest.fixture
def vit(tmp_path: Path) -> vitrail.Model:
    """A ViTModel without any processor."""
    save(make("ViTModel"), tmp_path / "vit")
    return vitrail.load(tmp_path / "vit")


def near(ours: Tensor, theirs: Tensor) -> None:
    assert_close(ours, theirs, what="model")


def edit(folder: Path, other: Path, name: str, **fields: Any) -> Path:
    """A copy of a checkpoint folder with fields of one JSON file changed."""
    shutil.copytree(folder, other)
    content = json.loads((other / name).read_text())
    (other / name).write_text(json.dumps(content | fields))
    return other


# -- images in -------------------------------------------------------------------------------------


def test_images_of_every_kind_have_transformers_embedding(
    clip: vitrail.Model, photos: list[Path], wanted: Tensor
) -> None:
    pictures = [photo(number) for number in range(7)]
    arrays = [np.asarray(picture) for picture in pictures]
    kinds: dict[str, list[Any]] = {
        "path": photos,
        "str": [str(path) for path in photos],
        "bytes": [path.read_bytes() for path in photos],
        "bytearray": [bytearray(path.read_bytes()) for path in photos],
        "PIL": pictures,
        "array": arrays,
        "tensor": [torch.tensor(array) for array in arrays],
        "pixels": list(clip.preprocess(pictures)),
        "mixed": [photos[0], pictures[1], arrays[2], str(photos[3]), *pictures[4:]],
    }
    for kind, items in kinds.items():
        for given in (items, tuple(items)):
            got = clip.encode_image(given)
            assert_close(got, wanted, what="model", name=kind)
        got = clip.encode_image(items[3])
        assert_close(got, wanted[3:4], what="model", name=f"one {kind}")
    for kind in ("path", "PIL", "array", "mixed"):
        items = kinds[kind]
        assert_close(clip.encode_image(item for item in items), wanted, what="model", name=kind)


def test_batches_of_arrays_and_of_pixels_are_taken(
    clip: vitrail.Model, pair: tuple[Path, Any, Any]
) -> None:
    dice = np.random.default_rng(0)
    batch = dice.integers(0, 256, (4, 50, 60, 3), dtype=np.uint8)
    pixels = pair[2].image_processor(list(batch), return_tensors="pt").pixel_values
    embeddings = image_embedding(pair[1], pixels)
    for images in (batch, torch.tensor(batch), list(batch), pixels, pixels.numpy(), list(pixels)):
        near(clip.encode_image(images), embeddings)
    near(clip.encode_image(pixels[2]), embeddings[2:3])
    near(clip.encode_image(pixels[2].numpy()), embeddings[2:3])


def test_pixels_are_the_processors_bit_for_bit(
    clip: vitrail.Model, pair: tuple[Path, Any, Any], photos: list[Path]
) -> None:
    images = [photo(number) for number in range(7)]
    theirs = pair[2].image_processor(images, return_tensors="pt").pixel_values
    ours = clip.preprocess(photos)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)
    assert torch.equal(clip.preprocess(images[0]), theirs[:1])
    assert clip.preprocess([]).shape == (0, 3, 32, 32)
    assert clip.preprocess([], size=(64, 48)).shape == (0, 3, 64, 48)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 32, 32), np.uint8), "channels first"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), "channels first"),
        (np.zeros((2, 3, 32, 32), np.uint8), "channels first"),
        (np.zeros((32, 32, 3), np.int64), "int64"),
        (np.zeros((32, 32, 3), np.uint16), "uint16"),
        (torch.zeros(32, 32, 3, dtype=torch.int32), "int32"),
        (np.zeros((32, 32, 2), np.uint8), "2"),
        (np.zeros((32, 32, 4), np.uint8), "4"),
        (np.zeros((1, 1, 32, 32, 3), np.uint8), "5|image array"),
        (np.zeros((), np.uint8), "image array"),
        (None, "NoneType"),
        (7, "int"),
        ({"image": 1}, "image"),
        ([None], "image 0.*NoneType"),
        ([[1, 2]], "image 0.*list"),
        (np.array(["a.jpg"]), "image"),
        (np.zeros((2, 2), object), "image"),
        (b"", "image"),
    ],
    ids=lambda value: f"{type(value).__name__}{getattr(value, 'shape', '')}",
)
def test_what_is_no_image_is_refused_in_words(
    clip: vitrail.Model, image: Any, message: str
) -> None:
    with pytest.raises((InputError, ImageError), match=message):
        clip.encode_image(image)


def test_a_list_of_paths_and_pixels_is_refused_or_right(
    clip: vitrail.Model, photos: list[Path], wanted: Tensor
) -> None:
    for mixed in ([photos[0], clip.preprocess(photos[1])[0]], [clip.preprocess(photos[0])[0], 7]):
        with pytest.raises(InputError, match=r"image [01]"):
            clip.encode_image(mixed)
    result = clip.encode_image([photos[0], clip.preprocess(photos[1])[0]], on_error="skip")
    assert result.index == (0,)
    near(result.embeddings, wanted[:1])


# -- pixels in -------------------------------------------------------------------------------------


def layouts(x: Tensor) -> dict[str, Any]:
    """The same numbers in every layout memory can have."""
    batch, channels, height, width = x.shape
    raw = np.zeros(x.numel() * 4 + 1, np.uint8)
    misaligned = raw[1:].view(np.float32).reshape(x.shape)
    misaligned[...] = x.numpy()
    frozen = x.numpy().copy()
    frozen.flags.writeable = False
    wide = torch.zeros(batch, channels, height, 2 * width)
    wide[..., ::2] = x
    return {
        "channels last": x.to(memory_format=torch.channels_last),
        "permuted": x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "every other column": wide[..., ::2],
        "offset": torch.cat([torch.zeros(1, *x.shape[1:]), x])[1:],
        "negative strides": np.ascontiguousarray(x.numpy()[:, :, ::-1, ::-1])[:, :, ::-1, ::-1],
        "Fortran order": np.asfortranarray(x.numpy()),
        "read-only": frozen,
        "misaligned": misaligned,
        "big-endian": x.numpy().astype(">f4"),
        "float16": x.half().float().half(),
        "bfloat16": x.bfloat16(),
        "half array": x.numpy().astype(np.float16),
    }


@pytest.mark.parametrize("name", layouts(torch.zeros(1, 1, 1, 1)))
def test_pixels_in_any_layout_are_right_or_refused(vit: vitrail.Model, name: str) -> None:
    x = arguments("ViTModel", make("ViTModel").config, batch=3)["pixel_values"]
    if "16" in name or "half" in name:
        x = x.bfloat16().float().clamp(-8, 8)
    given, expected = layouts(x)[name], vit.encode_image(x)
    for pixels in (given, list(given)):
        try:
            got = vit.encode_image(pixels)
        except InputError:
            assert name in ("misaligned", "big-endian")
        else:
            near(got, expected)
    if isinstance(given, Tensor):
        near(vit.forward(given).last_hidden_state, vit.forward(x).last_hidden_state)


def test_an_expanded_image_is_each_of_its_copies(vit: vitrail.Model) -> None:
    one = torch.randn(1, 3, 32, 32)
    near(vit.encode_image(one.expand(4, -1, -1, -1)), vit.encode_image(one.repeat(4, 1, 1, 1)))
    gray = torch.randn(2, 1, 32, 32)
    near(vit.encode_image(gray.expand(-1, 3, -1, -1)), vit.encode_image(gray.repeat(1, 3, 1, 1)))


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.zeros(1, 3, 32, 32)


BAD_PIXELS: dict[str, Any] = {
    "one too few dimensions": (torch.zeros(32, 32), r"shape \(32, 32\)"),
    "one too many": (torch.zeros(1, 1, 3, 32, 32), r"shape \(1, 1, 3, 32, 32\)"),
    "one channel": (torch.zeros(1, 1, 32, 32), "wanted .*3"),
    "two channels": (torch.zeros(1, 2, 32, 32), "wanted .*3"),
    "four channels": (torch.zeros(1, 4, 32, 32), "wanted .*3"),
    "channels last": (torch.zeros(1, 32, 32, 3), r"\(1, 32, 32, 3\)"),
    "less than a patch": (torch.zeros(1, 3, 7, 32), "patch"),
    "no pixels": (torch.zeros(1, 3, 0, 32), "patch"),
    "float64": (torch.zeros(1, 3, 32, 32, dtype=torch.float64), "float64"),
    "float64 array": (np.zeros((1, 3, 32, 32)), "float64"),
    "long double array": (np.zeros((1, 3, 32, 32), np.longdouble), "pixels"),
    "float8": (torch.zeros(1, 3, 32, 32).to(torch.float8_e5m2), "float8"),
    "NaN": (torch.full((1, 3, 32, 32), torch.nan), "item 0 holds NaN"),
    "infinity": (torch.full((1, 3, 32, 32), torch.inf), "item 0 holds NaN or inf"),
    "minus infinity": (torch.full((1, 3, 32, 32), -torch.inf), "item 0 holds NaN or inf"),
    "gradients": (torch.zeros(1, 3, 32, 32, requires_grad=True), "grad"),
    "a parameter": (nn.Parameter(torch.zeros(1, 3, 32, 32)), "grad"),
    "meta": (torch.zeros(1, 3, 32, 32, device="meta"), "data"),
    "sparse": (torch.zeros(1, 3, 32, 32).to_sparse(), "pixels"),
}


@pytest.mark.parametrize("name", BAD_PIXELS)
def test_bad_pixels_are_refused_before_anything_runs(vit: vitrail.Model, name: str) -> None:
    pixels, message = BAD_PIXELS[name]
    calls: list[Any] = [vit.encode_image]
    if isinstance(pixels, Tensor):
        calls += [vit.forward, vit.get_intermediate_layers]
    for call in calls:
        with pytest.raises(InputError, match=message):
            call(pixels)


def test_pixels_without_data_are_refused(vit: vitrail.Model) -> None:
    for call in (vit.encode_image, vit.forward, vit.get_intermediate_layers):
        with pytest.raises(InputError, match="pixels"):
            call(fake())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool])
def test_whole_numbers_are_no_pixel_values(vit: vitrail.Model, dtype: torch.dtype) -> None:
    pixels = torch.zeros(1, 3, 32, 32, dtype=dtype)
    for call in (vit.forward, vit.get_intermediate_layers):
        with pytest.raises(InputError, match="wanted a float tensor"):
            call(pixels)


def test_one_bad_item_of_a_batch_is_named(vit: vitrail.Model) -> None:
    pixels = torch.zeros(5, 3, 32, 32)
    pixels[3, 1, 4, 5] = torch.nan
    with pytest.raises(InputError, match="item 3 holds NaN"):
        vit.encode_image(pixels)


def test_raw_pixels_passed_as_preprocessed_ones_are_refused(
    clip: vitrail.Model, photos: list[Path]
) -> None:
    raw = torch.tensor(np.asarray(photo(0))).permute(2, 0, 1).float()[None]
    for call in (clip.encode_image, clip.forward, clip.get_intermediate_layers):
        with pytest.raises(InputError, match="uint8"):
            call(raw)
    near(clip.encode_image(raw / 255), clip.encode_image(raw / 255))


def test_inputs_are_left_as_they_were(clip: vitrail.Model) -> None:
    pixels, array = torch.randn(3, 3, 32, 32), np.asarray(photo(1)).copy()
    ids = torch.tensor([[1, 2, 590, 7]])
    kept = pixels.clone(), array.copy(), ids.clone()
    clip.forward(pixels, ids)
    clip.encode_image(pixels)
    clip.encode_image(array)
    clip.encode_text(ids)
    assert torch.equal(pixels, kept[0])
    assert np.array_equal(array, kept[1])
    assert torch.equal(ids, kept[2])


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts_are_normalized_each_by_its_own_mean(
    channels: int, tmp_path: Path
) -> None:
    model = make("ViTModel", num_channels=channels)
    save(model, tmp_path)
    mean, std = [0.1, 0.4, 0.6, 0.9][:channels], [0.2, 0.5, 0.3, 0.7][:channels]
    processor = {"do_resize": False, "image_mean": mean, "image_std": std}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, channels), dtype=np.uint8)
    pixels = (torch.tensor(images) / 255 - torch.tensor(mean)) / torch.tensor(std)
    embeddings = image_embedding(model, pixels.permute(0, 3, 1, 2).contiguous())
    ours = vitrail.load(tmp_path)
    near(ours.encode_image(images), embeddings)
    near(ours.encode_image(ours.preprocess(images)), embeddings)
    if channels == 1:
        near(ours.encode_image([Image.fromarray(image[..., 0]) for image in images]), embeddings)
        near(ours.encode_image([image[..., 0] for image in images]), embeddings)


# -- embeddings out --------------------------------------------------------------------------------


def test_one_gives_one_row_and_none_gives_none(clip: vitrail.Model, photos: list[Path]) -> None:
    assert clip.encode_image(photos[0]).shape == (1, 20)
    assert clip.encode_image([photos[0]]).shape == (1, 20)
    assert clip.encode_text("a cat").shape == (1, 20)
    for nothing in ([], (), torch.zeros(0, 3, 32, 32), np.zeros((0, 9, 9, 3), np.uint8)):
        got = clip.encode_image(nothing)
        assert (got.shape, got.dtype) == ((0, 20), torch.float32)
        skipped = clip.encode_image(nothing, on_error="skip")
        assert (skipped.embeddings.shape, skipped.index, skipped.errors) == ((0, 20), (), {})
    for nothing in ([], (), torch.zeros(0, 5, dtype=torch.int64)):
        got = clip.encode_text(nothing)
        assert (got.shape, got.dtype) == ((0, 20), torch.float32)


def test_embeddings_have_unit_length_only_when_asked(
    clip: vitrail.Model, photos: list[Path], wanted: Tensor
) -> None:
    assert not torch.allclose(wanted.norm(dim=1), torch.ones(7), rtol=0.05)
    near(clip.encode_image(photos, normalize=True), wanted / wanted.norm(dim=1, keepdim=True))
    texts = ["a cat", "a dog on the mat"]
    plain = clip.encode_text(texts)
    near(clip.encode_text(texts, normalize=True), plain / plain.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 8, 1000])
def test_any_batch_size_gives_the_same_rows(
    clip: vitrail.Model, photos: list[Path], wanted: Tensor, batch_size: int
) -> None:
    near(clip.encode_image(photos, batch_size=batch_size), wanted)
    near(clip.encode_image(clip.preprocess(photos), batch_size=batch_size), wanted)
    texts = [
        "a cat",
        "",
        "a dog on the red mat near the window",
        "the sea",
        "glass",
        "a",
        "at night",
    ]
    near(clip.encode_text(texts, batch_size=batch_size), clip.encode_text(texts))


def test_more_than_fits_at_once_is_split(vit: vitrail.Model) -> None:
    pixels = torch.randn(4500, 3, 32, 32)
    got = vit.encode_image(pixels)
    for start in (0, 4090, 4499):
        near(got[start : start + 7], vit.encode_image(pixels[start : start + 7], batch_size=2))


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": -1},
        {"batch_size": 2.0},
        {"batch_size": "2"},
        {"size": 32},
        {"size": (32,)},
        {"size": (32, 0)},
        {"size": (32.0, 32.0)},
        {"size": (32, 32, 3)},
        {"size": (1 << 20, 32)},
        {"on_error": "ignore"},
        {"output_device": "nowhere"},
    ],
    ids=str,
)
def test_wrong_options_are_refused_by_name(clip: vitrail.Model, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        clip.encode_image(photo(0), **options)


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (40, 100), (35, 33), (8, 8)])
def test_another_size_is_what_the_processor_gives_at_that_size(
    clip: vitrail.Model, pair: tuple[Path, Any, Any], size: tuple[int, int]
) -> None:
    _, model, processor = pair
    images = [photo(1), photo(3)]
    height, width = size
    pixels = processor.image_processor(
        images,
        size={"shortest_edge": max(size)},
        crop_size={"height": height, "width": width},
        return_tensors="pt",
    ).pixel_values
    assert torch.equal(clip.preprocess(images, size=size), pixels)
    near(clip.encode_image(images, size=size), image_embedding(model, pixels))


def test_images_that_come_out_in_several_sizes_are_embedded_each_in_its_own(
    pair: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "uncropped"
    shutil.copytree(pair[0], folder)
    config = json.loads((folder / "processor_config.json").read_text())
    config["image_processor"]["do_center_crop"] = False
    (folder / "processor_config.json").write_text(json.dumps(config))
    ours, images = vitrail.load(folder), [photo(number) for number in range(7)]
    got = ours.encode_image(images)
    for number, image in enumerate(images):
        one = ours.preprocess(image)
        near(got[number : number + 1], image_embedding(pair[1], one))
    with pytest.raises(InputError, match="sizes"):
        ours.preprocess(images)


def is_plain(got: Tensor, where: str) -> None:
    assert type(got) is Tensor, where
    assert got.dtype == torch.float32, where
    assert got.device.type == "cpu", where
    assert got.is_contiguous(), where
    assert not got.requires_grad, where
    assert not got.is_inference(), where


SURROUNDINGS: dict[str, Any] = {
    "inference mode": lambda: torch.inference_mode(),
    "gradients": lambda: torch.enable_grad(),
    "float64 by default": lambda: default_dtype(torch.float64),
    "float16 by default": lambda: default_dtype(torch.float16),
    "meta by default": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


class default_dtype:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_results_are_plain_tensors_of_the_same_bits_in_any_surroundings(
    clip: vitrail.Model, pair: tuple[Path, Any, Any], photos: list[Path], name: str
) -> None:
    pixels, ids = clip.preprocess(photos), torch.tensor([[5, 6, 590, 1], [9, 590, 7, 7]])
    labels = ["cat", "dog"]

    def run(model: vitrail.Model) -> list[Tensor]:
        found = model.classify(photos, labels, templates=["a {}", "the {}"])
        return [
            model.encode_image(photos),
            model.encode_image(photos, normalize=True, batch_size=2),
            model.encode_image(photos, on_error="skip").embeddings,
            model.encode_image(pixels),
            model.encode_text(["a cat", "dogs"]),
            model.encode_text(ids, normalize=True),
            model.preprocess(photos),
            found.logits,
            found.probs,
        ]

    def dense(model: vitrail.Model) -> list[Tensor]:
        out = model.forward(pixels, ids, output_hidden_states=True)
        assert out.vision_model_output is not None
        assert out.vision_model_output.hidden_states is not None
        layers = model.get_intermediate_layers(pixels, n=2, reshape=True)
        tensors = [out.logits_per_image, out.text_embeds, out.status]
        return [*tensors, *out.vision_model_output.hidden_states, *layers]  # type: ignore[list-item]

    plain = run(vitrail.load(pair[0])), dense(clip)
    with SURROUNDINGS[name]():
        fresh = vitrail.load(pair[0])
        for model in (fresh, clip):
            for number, (got, expected) in enumerate(zip(run(model), plain[0], strict=True)):
                is_plain(got, f"{name}, result {number}")
                assert torch.equal(got, expected), f"{name}, result {number}"
            for number, (got, expected) in enumerate(zip(dense(model), plain[1], strict=True)):
                assert got.dtype == expected.dtype
                assert torch.equal(got, expected), f"{name}, forward {number}"


def test_loading_and_calling_change_no_global_state(
    pair: tuple[Path, Any, Any], photos: list[Path]
) -> None:
    def state() -> dict[str, Any]:
        return {
            "dtype": torch.get_default_dtype(),
            "device": torch.get_default_device(),
            "threads": torch.get_num_threads(),
            "interop": torch.get_num_interop_threads(),
            "grad": torch.is_grad_enabled(),
            "inference": torch.is_inference_mode_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "precision": torch.get_float32_matmul_precision(),
            "tf32": torch.backends.cudnn.allow_tf32,
            "mkldnn": torch.backends.mkldnn.enabled,
            "flush": torch.tensor([1e-45]).item(),
            "torch": torch.get_rng_state().tolist(),
            "numpy": str(np.random.get_state()),
            "random": random.getstate(),
            "pillow": Image.MAX_IMAGE_PIXELS,
            "filters": list(warnings.filters),
        }

    before = state()
    model = vitrail.load(pair[0])
    model.encode_image(photos)
    model.classify(photos, ["a", "b"])
    model.forward(model.preprocess(photos), torch.tensor([[590]]))
    assert model.fingerprint
    with pytest.raises(VitrailError):
        model.encode_image(b"")
    assert state() == before


# -- images that fail ------------------------------------------------------------------------------


@pytest.fixture
def seven(photos: list[Path], tmp_path: Path) -> list[Any]:
    """Seven inputs: the third is cut short, the fifth is no image, the last is missing."""
    whole = photos[2].read_bytes()
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole[: len(whole) // 2])
    return [photos[0], photos[1], cut, photos[3], b"<html>", photos[5], tmp_path / "missing.jpg"]


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 5])
def test_a_bad_image_never_costs_another(
    clip: vitrail.Model, seven: list[Any], wanted: Tensor, batch_size: int | None
) -> None:
    result = clip.encode_image(seven, on_error="skip", batch_size=batch_size)
    assert isinstance(result, EncodeResult)
    assert result.index == (0, 1, 3, 5)
    near(result.embeddings, wanted[list(result.index)])
    assert sorted(result.errors) == [2, 4, 6]
    for position, word in ((2, "cut.png"), (4, "6 bytes"), (6, "missing.jpg")):
        assert f"image {position}: " in result.errors[position]
        assert word in result.errors[position]
    unit = clip.encode_image(seven, on_error="skip", batch_size=batch_size, normalize=True)
    near(unit.embeddings, nn.functional.normalize(wanted[list(result.index)], dim=1))


def test_only_bad_images_give_no_rows(clip: vitrail.Model, seven: list[Any]) -> None:
    result = clip.encode_image([seven[2], seven[6]], on_error="skip")
    assert (result.embeddings.shape, result.index) == ((0, 20), ())
    assert sorted(result.errors) == [0, 1]


def test_pixels_and_classes_skip_bad_images_as_embeddings_do(
    clip: vitrail.Model, seven: list[Any]
) -> None:
    index, errors = (0, 1, 3, 5), clip.encode_image(seven, on_error="skip").errors
    good = [seven[position] for position in index]
    pixels = clip.preprocess(seven, on_error="skip")
    assert isinstance(pixels, PreprocessResult)
    assert (pixels.index, pixels.errors) == (index, errors)
    assert torch.equal(pixels.pixel_values, clip.preprocess(good))
    nothing = clip.preprocess([seven[2]], on_error="skip")
    assert (nothing.pixel_values.shape, nothing.index) == ((0, 3, 32, 32), ())
    classes = clip.classify(seven, ["cat", "dog"], on_error="skip")
    assert (classes.index, classes.errors) == (index, errors)
    strict = clip.classify(good, ["cat", "dog"])
    assert (strict.index, strict.errors) == ((0, 1, 2, 3), {})
    near(classes.probs, strict.probs)
    assert len(classes.top(1)) == 4
    assert clip.classify([seven[2]], ["cat", "dog"], on_error="skip").probs.shape == (0, 2)
    for call in (clip.preprocess, lambda x, **o: clip.classify(x, ["cat", "dog"], **o)):
        with pytest.raises(InputError, match="on_error: got 'ignore', wanted 'raise' or 'skip'"):
            call(seven, on_error="ignore")


def test_an_error_names_the_first_bad_image(clip: vitrail.Model, seven: list[Any]) -> None:
    for batch_size in (None, 1, 2, 4):
        with pytest.raises(ImageError, match=r"^image 2: .*cut\.png"):
            clip.encode_image(seven, batch_size=batch_size)
    with pytest.raises(ImageError, match=r"^image 2: .*cut\.png"):
        clip.preprocess(seven)
    with pytest.raises(ImageError, match=r"^image 2: .*cut\.png"):
        clip.classify(seven, ["a", "b"])
    with pytest.raises(ImageError, match=r"missing\.jpg: no such file"):
        clip.encode_image(seven[6])


def test_an_image_smaller_than_a_patch_after_preprocessing_costs_only_itself(
    pair: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "as it is"
    shutil.copytree(pair[0], folder)
    config = json.loads((folder / "processor_config.json").read_text())
    config["image_processor"] |= {"do_center_crop": False, "do_resize": False}
    (folder / "processor_config.json").write_text(json.dumps(config))
    ours = vitrail.load(folder)
    images = [photo(0), photo(1).crop((0, 0, 20, 7)), photo(2)]
    result = ours.encode_image(images, on_error="skip")
    assert result.index == (0, 2)
    assert "patch" in result.errors[1]
    near(result.embeddings[1:], image_embedding(pair[1], ours.preprocess(images[2])))


# -- texts in --------------------------------------------------------------------------------------


def test_texts_and_ids_of_every_kind_have_transformers_embedding(
    clip: vitrail.Model, pair: tuple[Path, Any, Any]
) -> None:
    _, model, processor = pair
    texts = ["a photo of a cat", "", "stained glass windows of the church; don't they look old?"]
    padded = processor.tokenizer(texts, padding="max_length", return_tensors="pt", max_length=40)
    embeddings = text_embedding(model, padded.input_ids, padded.attention_mask)
    lists = processor.tokenizer(texts).input_ids
    for given in (
        texts,
        tuple(texts),
        padded.input_ids,
        padded.input_ids.int(),
        padded.input_ids.numpy(),
        padded.input_ids.numpy().astype(np.int32),
        padded.input_ids.t().contiguous().t(),
        lists,
        tuple(tuple(row) for row in lists),
        clip.tokenize(texts),
    ):
        near(clip.encode_text(given), embeddings)
    for given in (texts[2], padded.input_ids[2], padded.input_ids[2].numpy(), lists[2]):
        near(clip.encode_text(given), embeddings[2:])
    assert torch.equal(clip.tokenize(texts), padded.input_ids)


def test_long_and_short_texts_in_any_order_keep_their_rows(clip: vitrail.Model) -> None:
    texts = [("cat " * n).strip() for n in (9, 0, 30, 3, 30, 1, 17, 9)]
    alone = torch.cat([clip.encode_text(text) for text in texts])
    for batch_size in (None, 1, 3):
        near(clip.encode_text(texts, batch_size=batch_size), alone)
    near(clip.encode_text(texts[::-1]), alone.flip(0))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([1, 2, 3], "text 0: got no end token"),
        ([[1, 590], [1, 2]], "text 1: got no end token"),
        ([[1, 590], []], "text 1"),
        ([[1, 591]], "591"),
        ([[-1, 590]], "-1"),
        ([[1] * 40 + [590]], "41"),
        (["a", 1], "text"),
        ([["a"]], "text 0"),
        ([[True, 590]], "text 0"),
        ([[1.0, 590]], "text 0"),
        (7, "int"),
        (None, "NoneType"),
        (b"a cat", "bytes|text"),
        ({"input_ids": [[590]]}, "dict"),
        (torch.tensor([[1.0, 590.0]]), "float32"),
        (torch.tensor([[1, 700]]), "700"),
        (torch.tensor([[-1, 590]]), "-1"),
        (torch.zeros(1, 41, dtype=torch.int64), r"\(1, 41\)"),
        (torch.zeros(1, 0, dtype=torch.int64), r"\(1, 0\)"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"\(1, 2, 3\)"),
        (torch.zeros(1, 3, dtype=torch.int64, device="meta"), "ids"),
        (np.array([[1.5, 590]]), "float64"),
        (np.array(["a cat"]), "text"),
        (np.array([[590]], dtype=np.uint16), "uint16"),
        ("a\ud800", "surrogate"),
    ],
    ids=str,
)
def test_what_is_no_text_is_refused_in_words(clip: vitrail.Model, texts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        clip.encode_text(texts)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[1.0, 590.0]]), "float32"),
        (torch.tensor([[True, False]]), "bool"),
        (torch.tensor([[1, 591]]), "591"),
        (torch.tensor([[-1, 590]]), "-1"),
        (torch.zeros(1, 41, dtype=torch.int64), r"\(1, 41\)"),
        (torch.zeros(1, 0, dtype=torch.int64), r"\(1, 0\)"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"\(1, 2, 3\)"),
        (torch.zeros(1, 3, dtype=torch.int64, device="meta"), "ids"),
        ([[1, 590]], "list"),
        (np.array([[1, 590]]), "ndarray"),
    ],
    ids=str,
)
def test_bad_ids_are_refused_by_forward(clip: vitrail.Model, ids: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        clip.forward(input_ids=ids)


def test_forward_needs_an_input_for_a_tower_that_is_there(
    clip: vitrail.Model, vit: vitrail.Model, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="neither"):
        clip.forward()
    with pytest.raises(InputError, match="attention_mask without"):
        clip.forward(torch.zeros(1, 3, 32, 32), attention_mask=torch.ones(1, 4))
    with pytest.raises(InputError, match="ViTModel has no text tower"):
        vit.forward(input_ids=torch.tensor([[1]]))
    for call in (vit.encode_text, vit.tokenize):
        with pytest.raises(InputError, match="ViTModel has no text tower"):
            call("a cat")
    save(make("CLIPTextModel"), tmp_path / "text")
    text = vitrail.load(tmp_path / "text")
    for call in (text.encode_image, text.get_intermediate_layers, text.forward, text.preprocess):
        with pytest.raises(InputError, match="CLIPTextModel has no image tower"):
            call(torch.zeros(1, 3, 32, 32))


def test_a_text_too_long_is_an_error_a_warning_or_cut(
    clip: vitrail.Model, pair: tuple[Path, Any, Any]
) -> None:
    texts = ["a cat", "cat " * 60]
    for call in (clip.encode_text, clip.tokenize):
        with pytest.raises(InputError, match="text 1: got 62 tokens, wanted at most 40"):
            call(texts)
    tokens = pair[2].tokenizer(texts, padding=True, truncation=True, max_length=40)
    ids = torch.tensor(tokens.input_ids)
    embeddings = text_embedding(pair[1], ids, torch.tensor(tokens.attention_mask))
    with pytest.warns(UserWarning, match="1 of 2 texts were cut to 40 tokens"):
        near(clip.encode_text(texts, overflow="warn"), embeddings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near(clip.encode_text(texts, overflow="truncate"), embeddings)
        assert torch.equal(clip.tokenize(texts, overflow="truncate"), ids)
    with pytest.raises(InputError, match="overflow"):
        clip.encode_text(texts, overflow="ignore")  # type: ignore[arg-type]


# -- files that are not there ----------------------------------------------------------------------


def test_a_missing_preprocessor_stops_only_the_calls_that_need_it(
    pair: tuple[Path, Any, Any], clip: vitrail.Model, photos: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(pair[0], folder)
    (folder / "processor_config.json").unlink()
    bare = vitrail.load(folder)
    for call in (
        lambda: bare.encode_image(photos),
        lambda: bare.encode_image(photos, on_error="skip"),
        lambda: bare.preprocess(photos),
        lambda: bare.classify(photos, ["a", "b"]),
    ):
        with pytest.raises(CheckpointError, match=r"preprocessor_config\.json") as caught:
            call()
        assert "processor_config.json" in str(caught.value)
    pixels = clip.preprocess(photos)
    assert torch.equal(bare.encode_image(pixels), clip.encode_image(pixels))
    assert torch.equal(bare.encode_text(["a cat"]), clip.encode_text(["a cat"]))
    got, kept = bare.classify(pixels, ["a", "b"]), clip.classify(pixels, ["a", "b"])
    assert torch.equal(got.probs, kept.probs)


def test_a_missing_tokenizer_stops_only_the_calls_that_need_it(
    pair: tuple[Path, Any, Any], clip: vitrail.Model, photos: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "mute"
    shutil.copytree(pair[0], folder)
    (folder / "tokenizer.json").unlink()
    mute = vitrail.load(folder)
    for call in (
        lambda: mute.encode_text(["a cat"]),
        lambda: mute.encode_text("a cat"),
        lambda: mute.tokenize(["a cat"]),
        lambda: mute.classify(photos, ["a", "b"]),
    ):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            call()
    assert torch.equal(mute.encode_image(photos), clip.encode_image(photos))
    ids = clip.tokenize(["a cat", "a dog"])
    assert torch.equal(mute.encode_text(ids), clip.encode_text(ids))


# -- classes ---------------------------------------------------------------------------------------


def test_several_templates_are_averaged_as_unit_vectors(
    clip: vitrail.Model, pair: tuple[Path, Any, Any], photos: list[Path], wanted: Tensor
) -> None:
    _, model, processor = pair
    labels = ["cat", "dog on the mat", "church window"]
    templates = ["a photo of a {}", "the {} at night", "{}", "{} and {}"]
    matrix = []
    for label in labels:
        texts = [template.replace("{}", label) for template in templates]
        tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
        each = text_embedding(model, tokens.input_ids, tokens.attention_mask)
        mean = (each / each.norm(dim=1, keepdim=True)).mean(dim=0)
        matrix.append(mean / mean.norm())
    images = wanted / wanted.norm(dim=1, keepdim=True)
    logits = model.logit_scale.detach().exp() * images @ torch.stack(matrix).t()
    found = clip.classify(photos, labels, templates)
    assert found.labels == tuple(labels)
    near(found.logits, logits)
    near(found.probs, logits.softmax(dim=1))
    best = found.top(2)
    assert [row[0][0] for row in best] == [labels[i] for i in logits.argmax(dim=1)]
    for row, values in zip(
        best, logits.softmax(dim=1).sort(dim=1, descending=True)[0], strict=True
    ):
        assert [p for _, p in row] == pytest.approx(values[:2].tolist(), abs=1e-4)


def test_label_embeddings_are_computed_once_for_a_set_of_labels_and_templates(
    pair: tuple[Path, Any, Any], photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = vitrail.load(pair[0]), []
    encode = TextEncoder.encode

    def counted(self: TextEncoder, texts: Any, **options: Any) -> Tensor:
        calls.append(list(texts))
        return encode(self, texts, **options)

    monkeypatch.setattr(TextEncoder, "encode", counted)
    first = model.classify(photos[:2], ["cat", "dog"])
    again = model.classify(photos[:2], ["cat", "dog"])
    assert calls == [["a photo of a cat", "a photo of a dog"]]
    assert torch.equal(first.logits, again.logits)
    turned = model.classify(photos[:2], ["dog", "cat"])
    assert_close(turned.logits, first.logits.flip(1), what="model")
    other = model.classify(photos[:2], ["cat", "dog"], ["the {} at night"])
    assert calls[2] == ["the cat at night", "the dog at night"]
    assert not torch.allclose(other.logits, first.logits, atol=1e-3)
    for number in range(40):
        model.classify(photos[:1], [f"cat {number}", "dog"])
    assert torch.equal(model.classify(photos[:2], ["cat", "dog"]).logits, first.logits)


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        ([], ["a {}"], "labels"),
        (["a", 1], ["a {}"], "labels"),
        ("cat", ["a {}"], "labels"),
        (["a"], [], "templates"),
        (["a"], ["a photo"], "templates"),
        (["a"], "a {}", "templates"),
    ],
)
def test_wrong_labels_and_templates_are_refused(
    clip: vitrail.Model, labels: Any, templates: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        clip.classify(photo(0), labels, templates)


def test_a_head_gives_its_own_labels(tmp_path: Path) -> None:
    for architecture in ("ViTForImageClassification", "Dinov2WithRegistersForImageClassification"):
        model = make(architecture)
        save(model, tmp_path / architecture)
        kind = "ViT" if "ViT" in architecture else "Bit"
        processor: dict[str, Any] = {"image_processor_type": f"{kind}ImageProcessor"}
        processor["size"] = {"height": 32, "width": 32} if kind == "ViT" else {"shortest_edge": 32}
        processor["crop_size"] = {"height": 32, "width": 32}
        processor["do_center_crop"] = kind == "Bit"
        (tmp_path / architecture / "preprocessor_config.json").write_text(json.dumps(processor))
        ours = vitrail.load(tmp_path / architecture)
        images = [photo(number) for number in range(7)]
        pixels = ours.preprocess(images)
        logits = outputs(model, {"pixel_values": pixels}).logits
        for given, batch_size in ((images, None), (pixels, None), (images, 2), (pixels, 3)):
            found = ours.classify(given, batch_size=batch_size)
            assert found.labels == tuple(f"label {i}" for i in range(7))
            near(found.logits, logits)
            near(found.probs, logits.softmax(dim=1))
        assert ours.classify([]).probs.shape == (0, 7)
        skipped = ours.classify([images[0], b"<html>", images[2]], on_error="skip")
        assert (skipped.index, sorted(skipped.errors)) == ((0, 2), [1])
        near(skipped.logits, logits[[0, 2]])
        with pytest.raises(InputError, match="no image and text tower"):
            ours.classify(images, ["a", "b"])


def test_without_head_or_labels_there_are_no_classes(
    clip: vitrail.Model, vit: vitrail.Model
) -> None:
    for model, name in ((clip, "CLIPModel"), (vit, "ViTModel")):
        with pytest.raises(InputError, match=f"{name} has no classification head"):
            model.classify(torch.zeros(1, 3, 32, 32))


# -- many threads ----------------------------------------------------------------------------------


def test_sixteen_threads_get_the_bits_that_one_gets(
    pair: tuple[Path, Any, Any], photos: list[Path]
) -> None:
    model = vitrail.load(pair[0])
    pixels = model.preprocess(photos)
    ids = model.tokenize(["a cat", "a dog on the mat", "the sea at night"])
    calls = [
        lambda m: m.encode_image(photos),
        lambda m: m.encode_image(photos[::-1], batch_size=2, normalize=True),
        lambda m: m.encode_image(pixels[:3]),
        lambda m: m.encode_image(photos[1], size=(64, 40)),
        lambda m: m.encode_text(["a cat", "dogs and cats on a red mat"]),
        lambda m: m.encode_text(ids),
        lambda m: m.classify(photos[:2], ["cat", "dog"]).probs,
        lambda m: m.forward(pixels[:2], ids).logits_per_image,
        lambda m: m.get_intermediate_layers(pixels[:1], n=2)[0],
    ]
    serial = [call(model) for call in calls]
    fresh = vitrail.load(pair[0])  # its caches are cold when sixteen threads arrive
    barrier = threading.Barrier(16)

    def work(thread: int) -> int:
        barrier.wait()
        wrong = 0
        for turn in range(60):
            number = (thread * 7 + turn) % len(calls)
            wrong += not torch.equal(calls[number](fresh), serial[number])
        return wrong

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(work, range(16))) == 0


# -- fingerprint -----------------------------------------------------------------------------------


def in_order(path: Path, names: list[str]) -> None:
    """Rewrite a safetensors file with its tensors in another order."""
    tensors = load_file(path)
    header, data = {}, b""
    for name in names:
        raw = tensors[name].numpy().tobytes()
        shape = list(tensors[name].shape)
        ends = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": ends}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_the_fingerprint_is_the_weights_however_they_are_written(tmp_path: Path) -> None:
    for architecture in ("ViTModel", "Dinov2Model", "CLIPVisionModel"):
        config = {"use_swiglu_ffn": True} if architecture == "Dinov2Model" else {}
        model = make(architecture, **config)
        folder = tmp_path / architecture
        save(model, folder / "one")
        save(model, folder / "shards", shards="9KB")
        save(model, folder / "five", dialect=5)
        assert len(list((folder / "shards").glob("*.safetensors"))) > 2
        shutil.copytree(folder / "one", folder / "turned")
        names = sorted(load_file(folder / "one/model.safetensors"), reverse=True)
        in_order(folder / "turned/model.safetensors", names)
        prints = {vitrail.load(path).fingerprint for path in folder.iterdir()}
        assert len(prints) == 1
        (print_,) = prints
        assert len(print_) == 64
        assert set(print_) <= set("0123456789abcdef")


def test_the_fingerprint_differs_on_any_bit_of_any_weight(tmp_path: Path) -> None:
    save(make("ViTForImageClassification"), tmp_path / "one")
    tensors = load_file(tmp_path / "one/model.safetensors")
    prints = {vitrail.load(tmp_path / "one").fingerprint}
    for number, name in enumerate(tensors):
        other = shutil.copytree(tmp_path / "one", tmp_path / str(number))
        changed = {**tensors, name: tensors[name].clone()}
        flat = changed[name].view(-1).view(torch.int32)
        flat[len(flat) // 2] ^= 1
        save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
        prints.add(vitrail.load(other).fingerprint)
    assert len(prints) == len(tensors) + 1


def test_the_fingerprint_differs_on_all_that_changes_numbers(
    pair: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    folder = pair[0]
    prints = {name: vitrail.load(folder, dtype=name).fingerprint for name in ("float32", "float16")}
    prints["bfloat16"] = vitrail.load(folder, dtype=torch.bfloat16).fingerprint
    assert prints["float32"] == vitrail.load(folder, dtype=torch.float32).fingerprint
    assert prints["float32"] == vitrail.load(shutil.copytree(folder, tmp_path / "copy")).fingerprint
    processor = json.loads((folder / "processor_config.json").read_text())
    for number, change in enumerate(
        (
            {"image_mean": [0.5, 0.5, 0.5]},
            {"resample": 2},
            {"do_center_crop": False},
            {"size": {"shortest_edge": 40}},
            {"do_convert_rgb": False},
            {"rescale_factor": 1 / 256},
        )
    ):
        changed = {"image_processor": processor["image_processor"] | change}
        other = edit(folder, tmp_path / f"processor {number}", "processor_config.json", **changed)
        prints[str(change)] = vitrail.load(other).fingerprint
    for key, value in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-6)):
        text = json.loads((folder / "config.json").read_text())["text_config"] | {key: value}
        other = edit(folder, tmp_path / key, "config.json", text_config=text)
        prints[key] = vitrail.load(other).fingerprint
    shutil.copytree(folder, tmp_path / "stored")
    save(copy.deepcopy(pair[1]), tmp_path / "stored", dtype=torch.float16)
    prints["stored"] = vitrail.load(tmp_path / "stored").fingerprint
    assert len(set(prints.values())) == len(prints), prints


# -- numbers that are not finite -------------------------------------------------------------------


def planted(folder: Path, other: Path, change: dict[str, Any]) -> Path:
    """A copy of a checkpoint with ``change[name](tensor)`` in the place of some tensors."""
    shutil.copytree(folder, other)
    tensors = load_file(folder / "model.safetensors")
    changed = {
        name: change[name](t.clone()) if name in change else t for name, t in tensors.items()
    }
    assert set(change) <= set(tensors)
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    return other


def test_an_overflow_names_the_block_and_the_way_out(tmp_path: Path) -> None:
    model = make("CLIPVisionModelWithProjection", num_hidden_layers=3)
    save(model, tmp_path / "good")
    block = "vision_model.encoder.layers.{}.mlp.fc2.weight"
    for name, where, factor in (
        ("vision_model.embeddings.patch_embedding.weight", "the patch embedding", 3e4),
        (block.format(0), "block 0", 1e5),
        (block.format(1), "block 1", 1e5),
        (block.format(2), "block 2", 1e5),
    ):
        folder = planted(tmp_path / "good", tmp_path / name, {name: lambda t, by=factor: t * by})
        half = vitrail.load(folder, dtype="float16")
        pixels = torch.randn(2, 3, 32, 32)
        with pytest.raises(VitrailError, match=rf"^image 0: {where} .*float16; load .*float32"):
            half.encode_image(pixels)
        assert half.forward(pixels).status.tolist() == [1, 1]
        full = vitrail.load(folder)
        assert full.forward(pixels).status.tolist() == [0, 0]
        assert torch.isfinite(full.encode_image(pixels)).all()


def loud(tmp_path: Path, architecture: str, prefix: str = "") -> tuple[vitrail.Model, Tensor]:
    """A model that overflows fp16 on the second of three images alone, and these images."""
    save(make(architecture), tmp_path / "good")
    name = f"{prefix}embeddings.patch_embeddings.projection.weight"
    folder = planted(tmp_path / "good", tmp_path / "loud", {name: lambda t: t * 100})
    pixels = torch.randn(3, 3, 32, 32)
    pixels[1] *= 1000
    return vitrail.load(folder, dtype="float16"), pixels


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_an_item_that_overflows_costs_no_other(tmp_path: Path, batch_size: int | None) -> None:
    half, pixels = loud(tmp_path, "ViTModel")
    result = half.encode_image(pixels, on_error="skip", batch_size=batch_size)
    assert result.index == (0, 2)
    assert list(result.errors) == [1]
    assert "image 1: the patch embedding" in result.errors[1]
    peer = half.encode_image(pixels[::2])
    assert torch.isfinite(result.embeddings).all()
    assert nn.functional.cosine_similarity(result.embeddings, peer).min() > 0.9999
    with pytest.raises(VitrailError, match="image 1: the patch embedding"):
        half.encode_image(pixels, batch_size=batch_size)


@pytest.mark.parametrize("architecture", ["ViTModel", "Dinov2WithRegistersModel"])
def test_forward_marks_the_items_that_are_not_finite(architecture: str, tmp_path: Path) -> None:
    half, pixels = loud(tmp_path, architecture)
    out = half.forward(pixels, output_hidden_states=True)
    assert out.status is not None
    assert out.last_hidden_state is not None
    assert out.status.tolist() == [0, 1, 0]
    assert torch.isfinite(out.last_hidden_state[::2]).all()


@pytest.mark.parametrize("norm", [False, True])
def test_intermediate_layers_name_the_item_that_is_not_finite(norm: bool, tmp_path: Path) -> None:
    half, pixels = loud(tmp_path, "Dinov2Model")
    with pytest.raises(VitrailError, match="get_intermediate_layers: image 1: the patch embedding"):
        half.get_intermediate_layers(pixels, n=2, norm=norm)
    assert all(p.isfinite().all() for p in half.get_intermediate_layers(pixels[::2], n=2))
    assert [len(p) for p in half.get_intermediate_layers(pixels[:0], n=2)] == [0, 0]


@pytest.mark.parametrize(
    ("architecture", "prefix"),
    [("ViTForImageClassification", "vit."), ("Dinov2ForImageClassification", "dinov2.")],
)
def test_a_head_gives_no_scores_for_what_is_not_finite(
    architecture: str, prefix: str, tmp_path: Path
) -> None:
    half, pixels = loud(tmp_path, architecture, prefix)
    assert half.forward(pixels).status.tolist() == [0, 1, 0]
    assert torch.isfinite(half.classify(pixels[::2]).probs).all()
    with pytest.raises(VitrailError, match="image 1"):
        half.classify(pixels)


def test_a_text_that_overflows_is_named(tmp_path: Path) -> None:
    save(make("CLIPTextModelWithProjection"), tmp_path / "good")
    place = "text_model.embeddings.{}_embedding.weight"

    def raised(row: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor.index_fill(0, torch.tensor([row]), 6e4)

    # each fits fp16; token 7 in the first place does not
    change = {place.format("token"): raised(7), place.format("position"): raised(0)}
    folder = planted(tmp_path / "good", tmp_path / "loud", change)
    half = vitrail.load(folder, dtype="float16")
    with pytest.raises(VitrailError, match=r"^text 1: the .*embedding .*float16; load .*float32"):
        half.encode_text([[1, 2, 59], [7, 59], [3, 59]])
    assert torch.isfinite(half.encode_text([[1, 2, 59], [3, 59]])).all()
    ids = torch.tensor([[1, 2, 59], [7, 59, 59], [3, 59, 7]])
    assert half.forward(input_ids=ids).status.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "name",
    [
        "vision_model.encoder.layers.1.mlp.fc2.weight",
        "text_model.embeddings.token_embedding.weight",
        "visual_projection.weight",
    ],
)
def test_weights_beyond_the_chosen_dtype_are_refused_by_name(name: str, tmp_path: Path) -> None:
    save(make("CLIPModel"), tmp_path / "good")
    folder = planted(tmp_path / "good", tmp_path / "large", {name: lambda t: t * 1e7})
    with pytest.raises(CheckpointError, match=rf"'{name}'.*float16.*float32"):
        vitrail.load(folder, dtype="float16")
    for dtype in ("float32", "bfloat16"):
        vitrail.load(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "values", [[torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]], ids=str
)
def test_weights_that_are_not_finite_are_refused_by_name(
    dtype: torch.dtype, values: list[float], tmp_path: Path
) -> None:
    save(make("CLIPModel"), tmp_path / "good", dtype=dtype)
    for number, name in enumerate(load_file(tmp_path / "good/model.safetensors")):
        if number % 7 and len(values) > 1:
            continue

        def plant(tensor: Tensor) -> Tensor:
            tensor.view(-1)[-len(values) :] = torch.tensor(values).to(tensor.dtype)[
                : tensor.numel()
            ]
            return tensor

        folder = planted(tmp_path / "good", tmp_path / str(number), {name: plant})
        with pytest.raises(CheckpointError, match=rf"model\.safetensors.*'{name}'.*NaN or inf"):
            vitrail.load(folder)
        shutil.rmtree(folder)


def test_a_bad_weight_at_the_end_of_a_large_tensor_is_found(tmp_path: Path) -> None:
    name = "embeddings.token_embedding.weight"
    save(make("CLIPTextModel", vocab_size=400_000), tmp_path / "good")

    def plant(tensor: Tensor) -> Tensor:
        assert tensor.numel() * 4 > 33 << 20
        tensor[-1, -1] = torch.nan
        return tensor

    folder = planted(tmp_path / "good", tmp_path / "bad", {name: plant})
    with pytest.raises(CheckpointError, match=name):
        vitrail.load(folder)


def test_finite_weights_whose_sum_overflows_are_taken(tmp_path: Path) -> None:
    save(make("ViTModel"), tmp_path / "good")
    largest = torch.finfo(torch.float32).max

    def plant(tensor: Tensor) -> Tensor:
        tensor[0, 1:] = largest
        return tensor

    name = "embeddings.position_embeddings"
    folder = planted(tmp_path / "good", tmp_path / "large", {name: plant})
    assert not torch.isfinite(load_file(folder / "model.safetensors")[name].sum())
    vitrail.load(folder)


def test_weights_at_the_edge_of_fp16_load_and_the_result_says_so(tmp_path: Path) -> None:
    save(make("ViTModel"), tmp_path / "good")
    change = {"layernorm.weight": lambda t: torch.full_like(t, 6e-8)}
    small = vitrail.load(planted(tmp_path / "good", tmp_path / "small", change), dtype="float16")
    assert torch.isfinite(small.encode_image(torch.randn(2, 3, 32, 32))).all()
    change = {"encoder.layer.0.output.dense.bias": lambda t: torch.full_like(t, 65504.0)}
    large = vitrail.load(planted(tmp_path / "good", tmp_path / "large", change), dtype="float16")
    with pytest.raises(VitrailError, match=r"image 0: block [01] "):
        large.encode_image(torch.randn(2, 3, 32, 32))


# -- loading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (("fp32", "float", "float32", torch.float32), torch.float32),
        (("fp16", "half", "float16", torch.half), torch.float16),
        (("bf16", "bfloat16", torch.bfloat16), torch.bfloat16),
    ],
    ids=str,
)
def test_a_dtype_goes_by_every_name_that_pytorch_users_know(
    pair: tuple[Path, Any, Any], names: tuple[Any, ...], dtype: torch.dtype
) -> None:
    for name in names:
        assert vitrail.load(pair[0], dtype=name).dtype == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "dtype: got 'float64'"),
        ({"dtype": torch.float64}, r"dtype: got torch\.float64"),
        ({"dtype": "float8"}, "dtype: got 'float8', wanted 'auto' or one of "),
        ({"dtype": None}, "dtype: got None"),
        ({"dtype": torch.int8}, "dtype"),
        ({"device": "tpu"}, "device: got 'tpu'"),
        ({"device": "meta"}, "device: got 'meta'"),
        ({"device": 3.5}, "device: got 3.5, wanted 'auto', 'cpu', 'cuda', or 'cuda:N' for GPU N"),
        ({"device": None}, "device: got None, wanted"),
        ({"device": True}, "device: got True, wanted"),
        ({"device": -1}, "device: got -1, wanted"),
        ({"device": "cuda:0,cuda:1"}, "device: got 'cuda:0,cuda:1', wanted"),
    ],
    ids=str,
)
def test_an_unknown_dtype_or_device_is_refused(
    pair: tuple[Path, Any, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        vitrail.load(pair[0], **options)


def test_a_model_says_what_it_is(pair: tuple[Path, Any, Any], clip: vitrail.Model) -> None:
    count = sum(p.numel() for p in pair[1].parameters())
    assert clip.spec.architecture == "CLIPModel"
    assert clip.spec.parameters == count
    assert clip.dtype == torch.float32
    assert clip.device == torch.device("cpu")
    assert clip.backend == "torch"
    assert Path(clip.source) == pair[0]
    assert repr(clip).startswith("<vitrail.Model CLIPModel from ")
    assert vitrail.load(pair[0], dtype="bfloat16").dtype == torch.bfloat16


def test_a_call_is_forward_and_eval_changes_nothing(clip: vitrail.Model) -> None:
    pixels, ids = torch.randn(2, 3, 32, 32), torch.tensor([[1, 2, 590]])
    called = clip.eval()(pixel_values=pixels, input_ids=ids)
    forward = clip.forward(pixels, ids)
    assert called.logits_per_image is not None
    assert forward.logits_per_image is not None
    assert torch.equal(called.logits_per_image, forward.logits_per_image)
    assert clip.eval() is clip


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        *((name, "device=") for name in ("to", "cuda", "cpu")),
        *((name, "dtype=") for name in ("half", "float", "bfloat16")),
        *((name, "transformers") for name in ("train", "parameters", "state_dict")),
        ("modules", "as_module"),
        ("encode_picture", "there is no such attribute"),
    ],
)
def test_methods_of_torch_modules_say_what_to_do_instead(
    clip: vitrail.Model, method: str, advice: str
) -> None:
    with pytest.raises(AttributeError, match=rf"^Model\.{method}: .*{advice}"):
        getattr(clip, method)
    assert not hasattr(clip, method)


def test_a_backend_goes_by_its_older_argument_too(pair: tuple[Path, Any, Any]) -> None:
    for options in ({"backend": "torch"}, {"backend": "reference"}, {"runner": "reference"}):
        assert vitrail.load(pair[0], **options).backend == "torch"
    with pytest.raises(InputError, match="runner: got 'native' with backend='triton', wanted "):
        vitrail.load(pair[0], runner="native", backend="triton")


def test_the_checkpoint_may_go_once_the_model_is_loaded(
    pair: tuple[Path, Any, Any], clip: vitrail.Model, photos: list[Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(pair[0], tmp_path / "copy")
    model = vitrail.load(folder)
    (folder / "model.safetensors").unlink()
    assert torch.equal(model.encode_image(photos), clip.encode_image(photos))


def test_no_fingerprint_is_given_of_files_that_changed_since_loading(tmp_path: Path) -> None:
    for seed in (0, 1):
        save(make("ViTModel", seed=seed), tmp_path / str(seed))
    model = vitrail.load(tmp_path / "0")
    shutil.copy(tmp_path / "1/model.safetensors", tmp_path / "0/model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*changed"):
        model.fingerprint  # noqa: B018


def test_position_ids_as_older_files_hold_them_change_nothing(
    pair: tuple[Path, Any, Any], clip: vitrail.Model, photos: list[Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(pair[0], tmp_path / "old")
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    tensors["text_model.embeddings.position_ids"] = torch.arange(40)[None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    old = vitrail.load(folder)
    assert torch.equal(old.encode_image(photos), clip.encode_image(photos))
    assert old.fingerprint == clip.fingerprint


def test_hidden_states_come_only_when_asked(clip: vitrail.Model, pair: Any) -> None:
    inputs = arguments("CLIPModel", pair[1].config)
    assert clip.forward(**inputs).vision_model_output.hidden_states is None
    assert_same(clip.forward(**inputs, output_hidden_states=True), outputs(pair[1], inputs))


# -- what a review found ---------------------------------------------------------------------------


def test_a_list_of_planes_is_not_taken_for_the_channels_of_one_image(clip: vitrail.Model) -> None:
    with pytest.raises(InputError, match=r"each \(C, height, width\)"):
        clip.encode_image([np.zeros((32, 32), np.float32)] * 3)


def test_a_temperature_that_overflows_is_refused_at_load(
    pair: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    change = {"logit_scale": lambda t: torch.full_like(t, 100)}
    with pytest.raises(CheckpointError, match=r"'logit_scale': got 100, whose exponential"):
        vitrail.load(planted(pair[0], tmp_path / "hot", change))


def test_pixels_that_are_not_finite_cost_no_other_when_skipped(clip: vitrail.Model) -> None:
    pixels = torch.randn(5, 3, 32, 32)
    wanted = clip.encode_image(pixels)
    broken = pixels.clone()
    broken[1, 0, 0, 0], broken[4, 2, 3, 3] = torch.nan, torch.inf
    found = clip.encode_image(broken, on_error="skip", batch_size=2)
    assert found.index == (0, 2, 3)
    assert sorted(found.errors) == [1, 4]
    near(found.embeddings, wanted[[0, 2, 3]])
    assert clip.encode_image(broken[[1, 4]], on_error="skip").index == ()


def test_a_failure_does_not_wait_for_the_batch_decoded_ahead(
    clip: vitrail.Model, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    assert clip._images is not None
    decode = clip._images._crops

    def slow(items: Any, size: Any) -> Any:
        if Path("missing.jpg") not in items:
            released.wait(30)
        return decode(items, size)

    monkeypatch.setattr(clip._images, "_crops", slow)
    begun = time.monotonic()
    with pytest.raises(ImageError, match=r"missing\.jpg"):
        clip.encode_image([Path("missing.jpg"), *photos], batch_size=2)
    waited = time.monotonic() - begun
    released.set()
    assert waited < 15


def test_batches_follow_the_size_that_images_come_out_in(
    pair: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a crop a processor gives what it was given: much more than the model's own size."""
    folder = tmp_path / "uncropped"
    shutil.copytree(pair[0], folder)
    config = json.loads((folder / "processor_config.json").read_text())
    config["image_processor"] |= {"do_resize": False, "do_center_crop": False}
    (folder / "processor_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("vitrail.model.images.ACTIVATION_BYTES", 2 << 20)
    model = vitrail.load(folder)
    assert model._vision is not None
    sizes: list[int] = []
    embed = model._vision.embeddings

    def counted(pixels: Tensor) -> Any:
        sizes.append(len(pixels))
        return embed(pixels)

    monkeypatch.setattr(model._vision, "embeddings", counted)
    images = [np.full((256, 256, 3), n, np.uint8) for n in range(6)]
    found = model.encode_image(images)
    assert max(sizes) == model._vision.max_batch((256, 256), 2 << 20) < 6
    near(found, torch.cat([model.encode_image(image) for image in images]))


def test_no_images_are_preprocessed_to_none_of_the_processors_size(clip: vitrail.Model) -> None:
    image = np.zeros((50, 70, 3), np.uint8)
    for size in (None, (48, 24)):
        assert (
            clip.preprocess([], size=size).shape[1:] == clip.preprocess(image, size=size).shape[1:]
        )


def test_sixteen_bit_grays_are_scaled_or_clipped(pair: tuple[Path, Any, Any]) -> None:
    gray = Image.fromarray(np.full((40, 40), 1000, np.uint16))
    _, _, processor = pair
    theirs = processor.image_processor([gray], return_tensors="pt").pixel_values
    clipped = vitrail.load(pair[0], sixteen_bit="clip")
    scaled = vitrail.load(pair[0])
    assert torch.equal(clipped.preprocess(gray), theirs)
    assert not torch.equal(scaled.preprocess(gray), theirs)
    assert clipped.fingerprint != scaled.fingerprint
    with pytest.raises(InputError, match="sixteen_bit"):
        vitrail.load(pair[0], sixteen_bit="drop")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "images", [io.BytesIO(b"\x89PNG"), {"a.png": 1}, {"a.png"}], ids=["file", "dict", "set"]
)
def test_what_only_looks_like_a_list_of_images_is_refused(clip: vitrail.Model, images: Any) -> None:
    with pytest.raises(InputError, match=f"images: got {type(images).__name__}"):
        clip.encode_image(images)


def test_bytes_and_mixed_lists_are_no_texts(clip: vitrail.Model) -> None:
    with pytest.raises(InputError, match="texts: got bytes"):
        clip.encode_text(b"cat")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="text 1: got int"):
        clip.encode_text(["cat", 3])  # type: ignore[list-item]


def test_a_label_too_long_can_be_cut(clip: vitrail.Model, photos: list[Path]) -> None:
    labels = ["cat", "dog " * 100]
    with pytest.raises(InputError, match="at most 40"):
        clip.classify(photos[0], labels)
    assert clip.classify(photos[0], labels, overflow="truncate").labels == tuple(labels)
