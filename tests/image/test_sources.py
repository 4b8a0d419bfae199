"""Paths, pipes, arrays and tensors: which are images."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gauge import within
from image.samples import CLIP, crop_pixels, encode, photo, refusal, rgb
from pixels import cases
from vitrail.errors import InputError
from vitrail.image.decoding import decode
from vitrail.image.preprocess import preprocess_uint8


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


@pytest.mark.machine
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
    gray = cases.noise("gray", 9, 8)
    for given in (gray, gray[..., None], torch.from_numpy(gray.copy())):
        assert np.array_equal(rgb(given), np.repeat(gray[..., None], 3, 2))
        assert np.array_equal(decode(given, channels=1), gray[..., None])


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
