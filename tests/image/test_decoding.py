"""Modes are converted as transformers does, and no damaged image gets through."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageFile, JpegImagePlugin
from transformers import image_transforms

from gauge import within
from image.samples import CLIP, FORMATS, brief, chunk, encode, photo, png, refusal, rgb, sound
from pixels import cases
from vitrail.errors import ImageError, InputError
from vitrail.image import decoding
from vitrail.image.decoding import decode
from vitrail.image.preprocess import preprocess_uint8
from vitrail.image.sources import Limits

MODES = [mode for mode, _ in cases.MODES if not mode.startswith("I")]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_converted_as_transformers_does(mode: str) -> None:
    image = cases.picture(f"mode {mode}", mode, 23, 17)
    theirs = image_transforms.convert_to_rgb(image, return_numpy=True)
    assert np.array_equal(rgb(image), theirs)
    opaque = "A" not in mode and "+" not in mode
    gray = (image if opaque else Image.fromarray(theirs)).convert("L")
    assert np.array_equal(decode(image, channels=1), np.asarray(gray)[..., None])


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


def test_hidden_colors_under_full_transparency_are_white() -> None:
    hidden = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert (rgb(encode(hidden, "PNG")) == 255).all()


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(file_format: str) -> None:
    frames = [photo(seed=1).convert("P"), photo(seed=2).convert("P").rotate(180)]
    frames = frames if file_format == "GIF" else [frame.convert("RGB") for frame in frames]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(rgb(data), np.asarray(frames[0].convert("RGB")))


def test_sixteen_bit_gray_is_scaled_or_clipped() -> None:
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


def test_the_transparent_value_of_sixteen_bit_gray_is_white() -> None:
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


@pytest.mark.parametrize("percent", [1, 10, 50, 90, 99])
@pytest.mark.parametrize("file_format", [*FORMATS, "JPEG progressive", "PNG interlaced", "BMP RLE"])
def test_a_truncated_file_is_refused(file_format: str, percent: int, tmp_path: Path) -> None:
    data = sound(file_format)
    assert rgb(data).std() > 20
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: len(data) * percent // 100])
    assert refusal(path).startswith(f"{path}: ")


def test_the_files_made_here_are_sound() -> None:
    assert np.array_equal(rgb(sound("PNG interlaced")), np.asarray(photo(200, 150)))
    palette = photo(200, 150).convert("P")
    assert np.array_equal(rgb(sound("BMP RLE")), np.asarray(palette.convert("RGB")))


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


@pytest.mark.machine
def test_a_bomb_in_a_text_chunk_is_refused_at_once() -> None:
    bomb = zlib.compress(bytes(100_000_000), 9)
    profile = chunk(b"iCCP", b"name\0\0" + bomb)
    text = chunk(b"zTXt", b"name\0\0" + bomb)
    with within(0.2):
        for part in (profile, text):
            refusal(png(4, 4, part, chunk(b"IDAT", zlib.compress(bytes(20)))))


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


@pytest.mark.parametrize(
    "options", [{"channels": 0}, {"channels": True}, {"channels": 3, "sixteen_bit": "wrap"}]
)
def test_arguments_that_no_image_could_meet_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="got"):
        decode(photo(), **options)
