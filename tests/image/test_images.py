"""Bytes to pixels: the bits are transformers' under Pillow 12, and no bad image gets through."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageFile, ImageOps, JpegImagePlugin
from transformers import image_transforms

from gauge import within
from pixels import cases
from pixels.theirs import processor
from vitrail.errors import ImageError, InputError
from vitrail.image import decoding, threads
from vitrail.image.decoding import decode
from vitrail.image.filters import nearest_source, rows_reached
from vitrail.image.geometry import crop_axis, geometry, spec_at
from vitrail.image.normalize import linear_scale, normalize
from vitrail.image.orientation import read_orientation
from vitrail.image.preprocess import crop_pixels, preprocess_float, preprocess_uint8
from vitrail.image.resize import _window_pass, resize_window
from vitrail.image.sources import Limits
from vitrail.spec import ImageSpec

GOLDENS: dict[str, str] = json.loads(
    Path(__file__).parents[1].joinpath("pixels").joinpath("goldens.json").read_text()
)["cases"]
CASES = cases.all_cases()
PILLOW = int(PIL.__version__.partition(".")[0])
CLIP = ImageSpec(True, ("shortest", 224), 3, (224, 224), 1 / 255, cases.CLIP_MEAN, cases.CLIP_STD)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")


def spec_of(steps: cases.Steps) -> ImageSpec:
    return ImageSpec(
        True, steps.resize, steps.resample, steps.crop, steps.rescale, steps.mean, steps.std
    )


def photo(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """Smooth colours with a little noise: compresses like a photo, and has no symmetry."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9 + k) * 60 + np.cos(y / (5 + k)) * 50 + 128 for k in range(3)]
    noise = np.random.default_rng(seed).integers(-9, 10, (height, width, 3))
    return Image.fromarray((np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def brief(value: object) -> str | None:
    """A test's name for bytes: the last few, which tell these apart."""
    return value[-8:].hex() if isinstance(value, bytes) else None


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG header of any size, for 8-bit grey, and the given chunks."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def rgb(image: Any, **options: Any) -> np.ndarray[Any, Any]:
    return decode(image, channels=3, **options)


def refusal(image: Any, kind: type[Exception] = ImageError, **options: Any) -> str:
    """The message ``image`` is refused with; one line, with no address in it."""
    with pytest.raises(kind) as caught:
        rgb(image, **options)
    text = str(caught.value)
    assert "0x" not in text
    assert "\n" not in text
    assert "object at" not in text
    return text


# ---- the bits


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


STRONG = [(211, 1009, 224, 40), (101, 503, 96, 32), (40, 700, 40, 32), (300, 3000, 200, 20)]


def test_one_call_of_pillow_13_would_give_other_bits() -> None:
    differs = []
    for width, height, w, h in STRONG:
        image = cases.picture("strong", "RGB", width, height)
        once = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC))
        rows, columns = crop_axis(height, h, None), crop_axis(width, w, None)
        twice = np.asarray(resize_window(image, rows, columns, 3))
        differs.append(not np.array_equal(once, twice))
    assert any(differs) if PILLOW >= 13 else not any(differs)


def two_passes(image: Image.Image, width: int, height: int, resample: int) -> Image.Image:
    """Whole passes of the installed Pillow, in the order of Pillow 12."""
    code = Image.Resampling(resample)
    if image.height > 100 * image.width and height < image.height:
        return image.resize((image.width, height), code).resize((width, height), code)
    return image.resize((width, image.height), code).resize((width, height), code)


@pytest.mark.parametrize("resample", range(6))
def test_the_window_of_a_resize_is_cut_from_the_whole(resample: int) -> None:
    draw = random.Random(resample)
    narrow = 0
    for number in range(400):
        width, height, w, h = (int(2 ** draw.uniform(0, 8.5)) for _ in range(4))
        crop = int(2 ** draw.uniform(0, 6)), int(2 ** draw.uniform(0, 6))
        image = cases.picture(f"{resample} {number}", "RGB" if number % 2 else "L", width, height)
        rows, columns = crop_axis(height, h, min(crop[0], h)), crop_axis(width, w, min(crop[1], w))
        narrow += rows.narrow or columns.narrow
        box = columns.start, rows.start, columns.stop, rows.stop
        whole = two_passes(image, w, h, resample).crop(box)
        window = resize_window(image, rows, columns, resample)
        assert window.tobytes() == whole.tobytes(), (image.size, (w, h), box)
        if PILLOW < 13:
            once = image.resize((w, h), Image.Resampling(resample)).crop(box)
            assert window.tobytes() == once.tobytes(), (image.size, (w, h), box)
    assert narrow > 50


@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize("source", [1, 2, 30_000])
def test_the_window_of_a_million_pixels_is_cut_from_the_whole(resample: int, source: int) -> None:
    image = cases.picture(f"long {resample} {source}", "L", source, 1)
    axis = crop_axis(source, 1_000_003, 224)
    code = Image.Resampling(resample)
    whole = np.asarray(image.resize((axis.full, 1), code))[0, axis.start : axis.stop]
    assert np.array_equal(_window_pass(np.asarray(image)[0], axis, 0, resample), whole)


@pytest.mark.parametrize("resample", range(6))
def test_a_window_of_many_lines_is_cut_from_the_whole(resample: int) -> None:
    """Enough pixels for one unit in the last of 22 bits of one weight to show."""
    code = Image.Resampling(resample)
    for source, full, crop in ((262, 372, 34), (278, 220, 50), (97, 1000, 60)):
        image = cases.picture(f"lines {resample}", "L", 2000, source)
        axis = crop_axis(source, full, crop)
        whole = np.asarray(image.resize((2000, full), code))[axis.start : axis.stop]
        assert np.array_equal(_window_pass(np.asarray(image), axis, 0, resample), whole)


def test_rows_that_reach_the_crop_hold_every_row_used() -> None:
    for source, full, crop in [(480, 298, 224), (1000, 224, 10), (7, 900, 3), (500, 256, 224)]:
        axis = crop_axis(source, full, crop)
        top, bottom = rows_reached(axis, 0)
        used = nearest_source(axis)
        assert top <= used.min()
        assert used.max() < bottom
        for resample in range(1, 6):
            image = cases.picture("reach", "L", 1, source)
            changed = np.array(image)
            top, bottom = rows_reached(axis, resample)
            changed[:top] ^= 255
            changed[bottom:] ^= 255
            two = [
                np.asarray(i.resize((1, full), Image.Resampling(resample)))[axis.start : axis.stop]
                for i in (image, Image.fromarray(changed))
            ]
            assert np.array_equal(*two)


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


@pytest.mark.parametrize(
    "bad", [np.zeros((3, 4, 3)), np.zeros((3, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_pixels_to_crop_must_be_uint8_hwc(bad: np.ndarray[Any, Any]) -> None:
    with pytest.raises(InputError, match="wanted uint8"):
        crop_pixels(bad, CLIP)


# ---- another output size


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


# ---- normalize


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


# ---- what an image may be


MODES = [mode for mode, _ in cases.MODES if not mode.startswith("I")]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_converted_as_transformers_does(mode: str) -> None:
    image = cases.picture(f"mode {mode}", mode, 23, 17)
    theirs = image_transforms.convert_to_rgb(image, return_numpy=True)
    assert np.array_equal(rgb(image), theirs)
    opaque = "A" not in mode and "+" not in mode
    grey = (image if opaque else Image.fromarray(theirs)).convert("L")
    assert np.array_equal(decode(image, channels=1), np.asarray(grey)[..., None])


@pytest.mark.parametrize("transform", [0, 2], ids=["CMYK", "YCCK"])
def test_a_jpeg_of_four_inks_is_converted_as_transformers_does(transform: int) -> None:
    data = bytearray(encode(cases.picture("inks", "CMYK", 40, 30), "JPEG"))
    data[data.index(b"Adobe") + 11] = transform
    opened = Image.open(io.BytesIO(data))
    assert np.array_equal(
        rgb(bytes(data)), image_transforms.convert_to_rgb(opened, return_numpy=True)
    )


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_encoded_images_are_decoded_as_pillow_does(file_format: str, mode: str) -> None:
    image = photo().convert(mode)
    image = image.convert("RGB") if mode == "P" and file_format in ("JPEG", "WEBP") else image
    data = encode(image, file_format)
    with Image.open(io.BytesIO(data)) as opened:
        theirs = image_transforms.convert_to_rgb(opened, return_numpy=True)
    for given in (data, bytearray(data), memoryview(data), data + b"trailing garbage" * 9):
        assert np.array_equal(rgb(given), theirs)
    assert theirs.std() > 20


def test_hidden_colours_under_full_transparency_are_white() -> None:
    hidden = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert (rgb(encode(hidden, "PNG")) == 255).all()


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(file_format: str) -> None:
    frames = [photo(seed=1).convert("P"), photo(seed=2).convert("P").rotate(180)]
    frames = frames if file_format == "GIF" else [frame.convert("RGB") for frame in frames]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(rgb(data), np.asarray(frames[0].convert("RGB")))


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encode(photo(), "PNG"))
    for given in (path, str(path)):
        assert np.array_equal(rgb(given), np.asarray(photo()))


def test_sixteen_bit_grey_is_scaled_or_clipped() -> None:
    values = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    scaled = np.round(values * (255 / 65_535)).astype(np.uint8)
    clipped = np.asarray(Image.fromarray(values).convert("L"))
    assert clipped.max() == 255
    big = Image.frombytes("I;16B", (256, 256), values.astype(">u2").tobytes())
    wide = Image.fromarray(values.astype(np.int32))
    for image in (Image.fromarray(values), big, wide, encode(Image.fromarray(values), "PNG")):
        for channels in (1, 3):
            found = decode(image, channels=channels)
            assert np.array_equal(found, np.repeat(scaled[..., None], channels, 2))
            found = decode(image, channels=channels, sixteen_bit="clip")
            assert np.array_equal(found, np.repeat(clipped[..., None], channels, 2))


def test_the_transparent_value_of_sixteen_bit_grey_is_white() -> None:
    image = Image.fromarray(np.array([[0, 100, 300, 40_000]], np.uint16))
    data = encode(image, "PNG", transparency=300)
    assert rgb(data)[0, :, 0].tolist() == [0, 0, 255, 156]
    theirs = image_transforms.convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True)
    assert np.array_equal(rgb(data, sixteen_bit="clip"), theirs)


def test_pixels_of_no_known_scale_are_refused() -> None:
    assert "mode F" in refusal(Image.new("F", (4, 4)))
    assert "beyond 0..65535" in refusal(Image.fromarray(np.full((2, 2), 65_536, np.int32)))
    assert "beyond 0..65535" in refusal(Image.fromarray(np.full((2, 2), -1, np.int32)))
    assert (
        rgb(Image.fromarray(np.full((2, 2), 65_536, np.int32)), sixteen_bit="clip") == 255
    ).all()
    assert "damaged, or of a kind that Pillow does not read" in refusal(Image.new("La", (2, 2)))


# ---- EXIF


TURNED: dict[int, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


def exif(value: int, order: str = "<", kind: int = 3, count: int = 1) -> bytes:
    """An EXIF block whose one directory holds a decoy entry and then the orientation."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    code = {1: "B3x", 3: "H2x", 4: "I"}[kind]
    entries = struct.pack(order + "HHII", 0x0100, 4, 1, 6)
    entries += struct.pack(order + "HHI" + code, 0x0112, kind, count, value)
    return b"Exif\0\0" + head + struct.pack(order + "H", 2) + entries + bytes(4)


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_the_exif_orientation_is_applied_to_files_and_not_to_pil_images(
    orientation: int, file_format: str
) -> None:
    for order in "<>":
        options = {"lossless": True} if file_format == "WEBP" else {}
        data = encode(photo(), file_format, exif=exif(orientation, order), **options)
        flat = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(rgb(data), TURNED[orientation](flat))
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert np.array_equal(rgb(data), np.asarray(upright.convert("RGB")))
        assert np.array_equal(rgb(Image.open(io.BytesIO(data))), flat)


@pytest.mark.parametrize(
    "block",
    [
        exif(99),
        exif(0),
        exif(9),
        exif(6, count=3),
        exif(6, count=0),
        exif(6, kind=1),
        exif(6)[:20],
        exif(6)[:-12],
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0garbage, not TIFF",
        b"",
    ],
    ids=brief,
)
def test_an_orientation_that_is_none_counts_as_upright(block: bytes) -> None:
    data = encode(photo(), "PNG", exif=block)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(rgb(data), np.asarray(photo()))


def test_the_orientation_is_read_where_pillow_reads_it() -> None:
    flat = np.asarray(photo())
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    text = "\nexif\n      42\n" + exif(8, ">").hex()
    pnginfo = PIL.PngImagePlugin.PngInfo()
    pnginfo.add_text("Raw profile type exif", text, zip=True)
    assert read_orientation({"xmp": xmp}) == 6
    assert read_orientation({"XML:com.adobe.xmp": xmp.decode()}) == 6
    assert read_orientation({"xmp": xmp, "exif": exif(3)}) == 3
    assert read_orientation({"exif": exif(8, kind=4)}) == 8
    assert read_orientation({"exif": exif(8, kind=3, count=2)}) == 8
    assert read_orientation({"Raw profile type exif": "no\nhex\nat\nall"}) == 1
    assert np.array_equal(rgb(encode(photo(), "PNG", pnginfo=pnginfo)), TURNED[8](flat))
    data = encode(photo(), "WEBP", lossless=True, xmp=xmp)
    assert np.array_equal(rgb(data), TURNED[6](flat))


# ---- what an image may not be


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "looks like HTML"),
        (b"  <html><body>404", "looks like HTML"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "looks like SVG"),
        (b"<?xml version='1.0'?>\n<svg/>", "looks like SVG"),
        (b"%PDF-1.7", "looks like PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "looks like EPS"),
        (b"\xc5\xd0\xd3\xc6" + bytes(40), "looks like EPS"),
        (b"8BPS\0\1", "looks like PSD"),
        (b"SIMPLE  =                    T", "looks like FITS"),
        (b"\0\0\0\x1cftypavif", "looks like AVIF"),
        (b"\0\0\0\x1cftypheic", "looks like HEIC"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"\xca\xfe\xba\xbe", "starts with the bytes ca fe ba be"),
        (b"\xff\xd8", "starts with the bytes ff d8"),
        (encode(photo(), "TIFF"), "looks like TIFF"),
        (encode(Image.new("F", (3, 3)), "TIFF"), "looks like TIFF"),
        (encode(photo(), "EPS"), "looks like EPS"),
        (encode(photo(), "JPEG2000"), "looks like JPEG 2000"),
        (encode(photo(), "PPM"), "starts with the bytes 50 36"),
    ],
    ids=brief,
)
def test_other_content_is_refused_by_its_first_bytes(
    data: bytes, hint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(decoding, "_PLUGINS", {})
    text = refusal(data)
    assert hint in text
    assert f"image of {len(data)} bytes" in text
    assert not data or "not a JPEG, PNG, WEBP, BMP or GIF" in text
    path = tmp_path / "a picture.jpg"
    path.write_bytes(data)
    assert refusal(path).startswith(f"{path}: ")


def bmp(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


def jpeg_header(width: int, height: int) -> bytes:
    frame = struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0"
    scan = b"\1\1\0\0\x3f\0"
    return (
        b"\xff\xd8\xff\xc0" + struct.pack(">H", 2 + len(frame)) + frame + b"\xff\xda\0\x08" + scan
    )


def webp_header(kind: bytes, width: int, height: int) -> bytes:
    if kind == b"VP8X":
        body = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == b"VP8L":
        body = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14)
    else:
        body = bytes(3) + b"\x9d\x01\x2a" + struct.pack("<HH", width, height)
    return b"RIFF" + bytes(4) + b"WEBP" + kind + struct.pack("<I", len(body)) + body + bytes(9)


def gif_header(width: int, height: int, across: int = 1, down: int = 1) -> bytes:
    comment = b"\x21\xfe\x03abc\0"
    frame = b"," + struct.pack("<HHHHB", 0, 0, across, down, 0)
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + comment + frame


HUGE = {
    "png 900 MP": png(30_000, 30_000),
    "png 169 MP": png(13_000, 13_000),
    "png over our cap": png(8_000, 6_251),
    "png side": png(70_000, 1),
    "bmp": bmp(30_000, 30_000),
    "bmp top down": bmp(30_000, -30_000),
    "jpeg": jpeg_header(30_000, 30_000),
    "webp VP8X": webp_header(b"VP8X", 30_000, 30_000),
    "webp VP8L": webp_header(b"VP8L", 16_000, 16_000),
    "webp VP8 ": webp_header(b"VP8 ", 16_000, 16_000),
    "gif canvas": gif_header(30_000, 30_000),
    "gif frame": gif_header(1, 1, 30_000, 30_000),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_size_over_the_limit_is_refused_from_the_header(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_PLUGINS", {})
    with within(0.1):
        text = refusal(HUGE[name])
    assert "wanted at most 65535 a side and 50000000 in all" in text


def test_pillows_own_limit_neither_warns_nor_moves() -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in HUGE.values():
            refusal(data)
        data = encode(Image.new("L", (11_000, 9_000)), "PNG")
        assert decode(data, channels=1, limits=Limits(max_pixels=10**8)).shape == (9_000, 11_000, 1)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_the_limits_hold_for_every_kind_of_image(tmp_path: Path) -> None:
    limits = Limits(max_pixels=3_000, max_bytes=10_000)
    wide = photo(64, 48)
    for given in (wide, np.asarray(wide), encode(wide, "GIF"), encode(photo(63, 48), "PNG")):
        assert "wanted at most" in refusal(given, limits=limits)
    assert rgb(photo(60, 50), limits=limits).shape == (50, 60, 3)
    path = tmp_path / "long.png"
    path.write_bytes(encode(photo(5, 5), "PNG") + bytes(10_000))
    assert "bytes, wanted at most 10000" in refusal(path, limits=limits)
    assert "long.png" in refusal(path, limits=limits)
    assert "bytes, wanted at most 10000" in refusal(path.read_bytes(), limits=limits)


@pytest.mark.parametrize(
    "data",
    [png(0, 5), png(5, 0), bmp(0, 5), bmp(-5, 5), jpeg_header(5, 0), gif_header(0, 0, 0, 0)],
    ids=("png width", "png height", "bmp", "bmp minus", "jpeg", "gif"),
)
def test_an_image_without_pixels_is_refused(data: bytes) -> None:
    assert "wanted at least 1 x 1" in refusal(data)


def test_one_pixel_is_an_image() -> None:
    for file_format in FORMATS:
        (found,) = preprocess_uint8(
            [encode(Image.new("RGB", (1, 1), (9, 9, 9)), file_format)], CLIP, 3
        )
        assert isinstance(found, np.ndarray)
        assert found.shape == (224, 224, 3)
        assert (found == found[0, 0, 0]).all()


# ---- damage


@pytest.mark.parametrize("percent", [1, 10, 50, 90, 99])
@pytest.mark.parametrize("file_format", [*FORMATS, "JPEG progressive", "PNG interlaced", "BMP RLE"])
def test_a_truncated_file_is_refused(file_format: str, percent: int, tmp_path: Path) -> None:
    data = sound(file_format)
    assert rgb(data).std() > 20
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: len(data) * percent // 100])
    assert refusal(path).startswith(f"{path}: ")


def sound(name: str) -> bytes:
    """An undamaged 200 x 150 image."""
    image, file_format = photo(200, 150), name.partition(" ")[0]
    if name == "BMP RLE":
        return rle_bmp(image.convert("P"))
    if name == "PNG interlaced":
        return interlaced_png(image)
    return encode(image, file_format, **({"progressive": True} if "prog" in name else {}))


def rle_bmp(image: Image.Image) -> bytes:
    """8-bit run lengths of one pixel each, rows from the bottom."""
    rows = np.asarray(image)[::-1]
    body = (
        b"".join(b"".join(bytes((1, v)) for v in row) + b"\0\0" for row in rows.tolist()) + b"\0\1"
    )
    palette = np.zeros((256, 4), np.uint8)
    found = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    palette[: len(found), :3] = found[:, ::-1]
    info = struct.pack("<IiiHHIIiiII", 40, *image.size, 1, 8, 1, len(body), 0, 0, 256, 0)
    head = b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078)
    return head + info + palette.tobytes() + body


def interlaced_png(image: Image.Image) -> bytes:
    """Adam7, filter 0."""
    pixels, lines = np.asarray(image), b""
    for y, x, down, across in (
        (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
        (1, 0, 2, 1),
    ):  # fmt: skip
        lines += b"".join(b"\0" + row.tobytes() for row in pixels[y::down, x::across])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *image.size, 8, 2, 0, 0, 1))
    data = chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


def test_the_files_made_here_are_sound() -> None:
    assert np.array_equal(rgb(sound("PNG interlaced")), np.asarray(photo(200, 150)))
    palette = photo(200, 150).convert("P")
    assert np.array_equal(rgb(sound("BMP RLE")), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("part", [b"IHDR", b"IDAT", b"IEND"])
def test_a_png_chunk_with_a_bad_crc_is_refused(part: bytes) -> None:
    data = bytearray(encode(photo(), "PNG"))
    start = data.index(part)
    (length,) = struct.unpack_from(">I", data, start - 4)
    data[start + 4 + length] ^= 1
    assert "does not meet its CRC" in refusal(bytes(data))


@pytest.mark.parametrize("kept", [0, 2, 300, 2000])
def test_a_png_with_sound_chunks_and_a_pixel_stream_that_stops_is_refused(kept: int) -> None:
    lines = b"".join(b"\0" + row.tobytes() for row in cases.noise("stream", 48, 64))
    stream = zlib.compress(lines, 0)[:kept]
    assert "truncated" in refusal(png(64, 48, chunk(b"IDAT", stream)))
    refusal(png(64, 48))


def test_a_png_whose_deflate_stream_is_broken_is_refused() -> None:
    lines = bytearray(zlib.compress(b"".join(bytes([0, *range(64)]) for _ in range(48)), 0))
    lines[7 + 65 * 20 + 9] ^= 255
    lines[2] = 7
    refusal(png(64, 48, chunk(b"IDAT", bytes(lines))))


def broken_jpeg() -> bytes:
    """A progressive JPEG whose second scan names a Huffman table that does not exist."""
    data = bytearray(encode(photo(200, 150), "JPEG", progressive=True))
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    data[second + 6] = 0x33
    return bytes(data)


def test_a_broken_scan_is_refused() -> None:
    refusal(broken_jpeg())


def test_a_failed_image_is_never_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[int] = []
    decoders: Any = Image._getdecoder  # type: ignore[attr-defined]

    def counted(*arguments: Any) -> Any:
        loads.append(1)
        return decoders(*arguments)

    broken, cut = broken_jpeg(), sound("JPEG")[:3000]
    monkeypatch.setattr(Image, "_getdecoder", counted)
    refusal(broken)
    assert len(loads) == 1
    refusal(cut)
    assert len(loads) == 2


@pytest.mark.parametrize(
    "data", [broken_jpeg(), sound("PNG")[:20_000], sound("JPEG")[:3000]], ids=brief
)
def test_a_pil_image_that_failed_stays_refused(data: bytes) -> None:
    source = io.BytesIO(data)
    image = Image.open(source)
    first = refusal(image)
    assert first.startswith("PIL image: ")
    refusal(image)
    with pytest.raises(ValueError, match="closed image"):
        image.convert("RGB")
    assert source.getvalue() == data


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow fills missing pixels with gray, as some libraries ask for the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)


SWITCHED = "not decoded, because PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set"


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("file_format", [*FORMATS, "JPEG progressive", "PNG interlaced", "BMP RLE"])
def test_no_file_is_decoded_while_pillow_makes_up_missing_pixels(
    file_format: str, tmp_path: Path
) -> None:
    data = sound(file_format)
    assert refusal(data).startswith(f"image of {len(data)} bytes: {SWITCHED}")
    path = tmp_path / "cut.jpg"
    for percent in (1, 50, 99):
        path.write_bytes(data[: len(data) * percent // 100])
        assert refusal(path).startswith(f"{path}: ")


@pytest.mark.usefixtures("lenient")
def test_decoded_pixels_are_taken_while_pillow_makes_up_missing_ones() -> None:
    image, array = photo(), np.asarray(photo())
    assert np.array_equal(rgb(image), array)
    errors = preprocess_uint8([array, sound("JPEG"), torch.from_numpy(array.copy())], CLIP, 3)
    assert [isinstance(result, ImageError) for result in errors] == [False, True, False]
    loaded = Image.open(io.BytesIO(sound("PNG")))
    loaded.load()
    assert np.array_equal(rgb(loaded), np.asarray(photo(200, 150)))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP", "TIFF"])
def test_a_pil_image_waits_unharmed_for_pillow_to_be_strict(
    file_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(photo(200, 150), file_format)
    image = Image.open(io.BytesIO(data))
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        assert refusal(image).startswith(f"PIL image: {SWITCHED}")
        refusal(image)
    assert np.array_equal(rgb(image), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_switch_that_comes_on_during_a_load_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(image: ImageFile.ImageFile) -> Any:
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        return ImageFile.ImageFile.load(image)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", load)
    cut = sound("JPEG")[:3000]
    for image in (cut, Image.open(io.BytesIO(cut))):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
        assert SWITCHED in refusal(image)


def test_the_file_of_a_pil_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(sound("PNG")[:20_000])
    with Image.open(path) as image:
        assert refusal(image).startswith(f"PIL image {path}: ")


def test_a_bomb_in_a_text_chunk_is_refused_at_once() -> None:
    bomb = zlib.compress(bytes(100_000_000), 9)
    profile = chunk(b"iCCP", b"name\0\0" + bomb)
    text = chunk(b"zTXt", b"name\0\0" + bomb)
    with within(0.2):
        for part in (profile, text):
            refusal(png(4, 4, part, chunk(b"IDAT", zlib.compress(bytes(20)))))


def test_junk_between_the_segments_of_a_jpeg_is_stepped_over() -> None:
    data = encode(photo(), "JPEG")
    table = data.index(b"\xff\xdb")
    padded = data[:table] + bytes(7) + b"\xff\0\xff\xff\xff" + data[table:]
    assert np.array_equal(rgb(padded), rgb(data))


def test_a_jpeg_of_countless_scans_is_refused() -> None:
    data = encode(photo(), "JPEG", progressive=True)
    start = data.index(b"\xff\xda")
    scan = data[start : data.index(b"\xff\xda", start + 2)]
    scan = scan[: scan.rindex(b"\xff\xc4")] if b"\xff\xc4" in scan else scan
    many = data[:start] + scan * 200 + data[start:]
    assert "more than 100 scans" in refusal(many)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff\xd8" + b"\xff\xe0\0\x02" * 5_000, "JPEG header"),
        (b"\xff\xd8" + b"\xff" * 5_000_000, "JPEG header"),
        (
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", png(4, 4)[16:29]) + chunk(b"tEXt", b"") * 140_000,
            "chunks",
        ),
        (gif_header(4, 4)[:19] + b"\x21\xfe\0" * 70_000, "no frame"),
        (gif_header(4, 4)[:19] + b";", "no frame"),
        (gif_header(4, 4)[:19], "cut short"),
        (b"RIFF\0\0\0\0WEBPVP8 " + bytes(30), "WEBP header"),
        (b"BM\0\0", "cut short"),
        (png(4, 4)[:14], "PNG header"),
    ],
    ids=brief,
)
def test_endless_and_missing_structure_is_refused_at_once(data: bytes, reason: str) -> None:
    with within(1):
        assert reason in refusal(data)


@pytest.mark.parametrize(
    "error",
    [
        OSError("unrecognized data stream contents"),
        OSError("image file is truncated (0x7f bytes not processed)"),
        ValueError("<_io.BytesIO object at 0x7f0000000000>"),
        SyntaxError("broken PNG file"),
        struct.error("unpack requires"),
        RecursionError(),
        MemoryError(),
        EOFError(),
        KeyError(0x7F),
        IndexError(),
        TypeError(),
        ZeroDivisionError(),
        zlib.error("Error -3"),
        PIL.UnidentifiedImageError("<_io.BytesIO object at 0x7f0000000000>"),
        Image.DecompressionBombError("0x7f"),
        Image.DecompressionBombWarning("0x7f"),
        UserWarning("Corrupt EXIF data"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_pillow_raises_becomes_an_image_error(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(_: Any) -> Any:
        raise error

    path = tmp_path / "photo.png"
    path.write_bytes(encode(photo(), "PNG"))
    monkeypatch.setitem(decoding._PLUGINS, "PNG", fails)
    assert refusal(path).startswith(f"{path}: ")
    (kept,) = preprocess_uint8([path], CLIP, 3)
    assert isinstance(kept, ImageError)
    assert (kept.__traceback__, kept.__context__, kept.__cause__) == (None, None, None)


def attempt(data: bytes, limits: Limits) -> np.ndarray[Any, Any] | ImageError:
    try:
        return decode(data, channels=3, limits=limits)
    except ImageError as error:
        return error


@pytest.mark.parametrize("file_format", FORMATS)
def test_random_damage_gives_pixels_or_an_image_error(file_format: str) -> None:
    draw = random.Random(file_format)
    data = encode(photo(40, 30), file_format)
    refused = 0
    for _ in range(150):
        mutated = bytearray(data)
        for _ in range(draw.choice((1, 3, 30))):
            mutated[draw.randrange(len(data))] = draw.randrange(256)
        del mutated[draw.choice((len(data), draw.randrange(len(data)))) :]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = attempt(bytes(mutated), Limits(max_pixels=10**6))
        assert isinstance(found, np.ndarray | ImageError)
        assert "0x" not in str(found)
        refused += isinstance(found, ImageError)
    assert refused > 20


# ---- files


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing.png"
    assert refusal(missing) == f"{missing}: no such file"
    assert "no such file" in refusal("https://example.org/cat.png")
    assert refusal(tmp_path) == f"{tmp_path}: is a folder, wanted a regular file"
    assert "a pipe, socket or device" in refusal("/dev/null")
    assert "cannot be read" in refusal("nul\0byte")
    assert "no such file" in refusal(os.fsdecode(b"not \xff utf-8"))


def test_files_are_closed_whatever_they_hold(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(encode(photo(), "PNG"))
    bad.write_bytes(b"<html>")
    open_before = set(os.listdir("/proc/self/fd"))
    preprocess_uint8([good, bad, tmp_path, tmp_path / "missing", "/dev/null"] * 4, CLIP, 3)
    assert len(os.listdir("/proc/self/fd")) <= len(open_before)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    with within(1):
        text = refusal(pipe)
    assert text == f"{pipe}: is a pipe, socket or device, wanted a regular file"


def test_a_file_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    path = tmp_path / "secret.png"
    assert refusal(path) == f"{path}: cannot be read: Permission denied"


# ---- arrays


def layouts(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """The same pixels in every memory layout."""
    padded = np.zeros((array.shape[0] + 2, array.shape[1] * 2, 5), np.uint8)
    padded[1:-1, ::2, 1:4] = array
    return {
        "contiguous": array,
        "fortran": np.asfortranarray(array),
        "strided": padded[1:-1, ::2, 1:4],
        "negative strides": np.ascontiguousarray(array[::-1, ::-1, ::-1])[::-1, ::-1, ::-1],
        "channels first in memory": np.ascontiguousarray(np.moveaxis(array, -1, 0)).transpose(
            1, 2, 0
        ),
        "misaligned": np.frombuffer(b"x" + array.tobytes(), np.uint8, offset=1).reshape(
            array.shape
        ),
        "tensor": torch.from_numpy(array.copy()),
        "permuted tensor": torch.from_numpy(np.moveaxis(array, -1, 0).copy()).permute(1, 2, 0),
        "expanded tensor": torch.from_numpy(array.copy())[None].expand(4, -1, -1, -1)[3],
    }


def test_an_array_of_any_layout_gives_the_same_pixels() -> None:
    array = cases.noise("layouts", 31, 22, 3)
    expected = crop_pixels(array, CLIP)
    for name, given in layouts(array).items():
        found = rgb(given)
        assert np.array_equal(found, array), name
        assert found.flags.c_contiguous, name
        (crop,) = preprocess_uint8([given], CLIP, 3)
        assert np.array_equal(crop, expected), name


def test_one_channel_is_repeated_for_rgb() -> None:
    grey = cases.noise("grey", 9, 8)
    for given in (grey, grey[..., None], torch.from_numpy(grey.copy())):
        assert np.array_equal(rgb(given), np.repeat(grey[..., None], 3, 2))
        assert np.array_equal(decode(given, channels=1), grey[..., None])


def test_four_channels_come_from_arrays_only() -> None:
    array = cases.noise("four", 9, 8, 4)
    assert np.array_equal(decode(array, channels=4), array)
    with pytest.raises(InputError, match="takes 4 channels"):
        decode(photo(), channels=4)


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (np.zeros((3, 9, 8), np.uint8), "looks like channels first"),
        (np.zeros((1, 9, 8), np.uint8), "looks like channels first"),
        (np.zeros((9, 8, 4), np.uint8), "uint8 (9, 8, 4)"),
        (np.zeros((9, 8, 2), np.uint8), "uint8 (9, 8, 2)"),
        (np.zeros((9, 8, 0), np.uint8), "uint8 (9, 8, 0)"),
        (np.zeros((2, 9, 8, 3), np.uint8), "uint8 (2, 9, 8, 3)"),
        (np.zeros(9, np.uint8), "uint8 (9,)"),
        (np.zeros((9, 8, 3), np.float32), "float32"),
        (np.zeros((9, 8, 3), np.int64), "int64"),
        (np.zeros((9, 8, 3), np.int8), "int8"),
        (np.zeros((9, 8, 3), bool), "bool"),
        (np.zeros((9, 8, 3), object), "object"),
        (torch.zeros(9, 8, 3), "torch.float32 on cpu"),
        (torch.zeros(3, 9, 8, dtype=torch.uint8), "looks like channels first"),
        (torch.zeros(9, 8, 3, dtype=torch.uint8, device="meta"), "on meta"),
        (torch.zeros(9, 8, 3, dtype=torch.uint8).to_sparse(), "without plain memory"),
    ],
)
def test_an_array_that_is_no_image_is_refused(given: Any, got: str) -> None:
    text = refusal(given, InputError)
    assert got in text
    assert "wanted uint8 (height, width, 3) on the CPU" in text


def test_an_array_without_pixels_is_refused() -> None:
    for shape in ((0, 8, 3), (9, 0, 3), (0, 0)):
        assert "wanted at least 1 x 1" in refusal(np.zeros(shape, np.uint8))
    assert "wanted at least 1 x 1" in refusal(Image.new("RGB", (0, 4)))


@pytest.mark.parametrize("given", [None, 7, 3.5, [photo()], {"image": 1}, io.BytesIO(b"")])
def test_what_is_no_image_at_all_is_refused(given: Any) -> None:
    assert "wanted a path, bytes, a PIL image, an object with read_bytes(), or" in refusal(
        given, InputError
    )


@pytest.mark.parametrize(
    "options", [{"channels": 0}, {"channels": True}, {"channels": 3, "sixteen_bit": "wrap"}]
)
def test_arguments_that_no_image_could_meet_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="got"):
        decode(photo(), **options)


# ---- batches


@pytest.mark.parametrize("cores", [1, 5])
def test_a_batch_keeps_its_order_and_its_bad_images_to_themselves(
    cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "core_count", lambda: cores)
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
    monkeypatch.setattr(threads, "core_count", lambda: 8)

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
        patch.setattr(threads, "core_count", lambda: 1)
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
