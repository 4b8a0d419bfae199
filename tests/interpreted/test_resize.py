"""The resize kernels in Triton's interpreter, bit for bit against Pillow."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.test_resize_operator import Batch, Run, content, differing, pillow, reference, resized
from vitrail_kernels.configs import KernelConfig, in_force
from vitrail_kernels.launch import Target, launch
from vitrail_kernels.ops.resize import RESIZE, resize_calls
from vitrail_kernels.ops.resize_tables import ResizeTables, resize_tables

pytestmark = pytest.mark.interpreted

TARGETS = (Target(90, 3), Target(80, 3))


def on(target: Target) -> Run:
    def run(out: Tensor, middle: Tensor, pixels: Tensor, tables: ResizeTables) -> None:
        launch(resize_calls(target, out, middle, pixels, *tables[:3]))

    return run


def photo(height: int, width: int, channels: int = 3) -> Tensor:
    return torch.from_numpy(content(random.Random(f"{height} {width}"), height, width, channels))


CASES = {  # size, target, corner, window
    "a pixel": ((1, 1), (1, 1), (0, 0), (1, 1)),
    "a pixel enlarged": ((1, 1), (9, 70), (1, 2), (7, 66)),
    "a line": ((1, 30_000), (3, 6_000), (0, 2_990), (3, 45)),
    "a column": ((30_000, 1), (6_000, 3), (2_990, 0), (19, 3)),
    "smaller": ((37, 51), (16, 22), (0, 3), (16, 16)),
    "larger": ((16, 9), (33, 45), (4, 0), (29, 44)),
    "one axis keeps its size": ((18, 41), (18, 30), (1, 2), (17, 26)),
    "the other keeps its size": ((41, 18), (30, 18), (2, 1), (26, 17)),
    "padded on every side": ((20, 30), (10, 12), (-3, -5), (17, 20)),
    "a window beside the image": ((20, 30), (10, 12), (10, 3), (5, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_has_the_bits_of_pillow(name: str) -> None:
    """Two filters each: tables hold nothing of filters but their weights."""
    size, target, corner, window = CASES[name]
    number = list(CASES).index(name)
    for resample in (number % 6, (number + 3) % 6):
        channels = (3, 1, 4)[(number + resample) % 3]
        batch = Batch([photo(*size, channels).numpy()], [target], [corner], window, resample)
        assert differing(batch, on(TARGETS[resample // 3]), pillow(batch)) == []


def mixed(resample: int = 3, channels: int = 3) -> Batch:
    """One and two groups of 16 lines, whole or not, and more numbers than a tile is wide."""
    sizes = [(15, 20), (16, 33), (1, 1), (49, 9), (33, 40)]
    targets = [(20, 50), (16, 48), (18, 50), (40, 70), (19, 46)]
    corners = [(2, 1), (-1, 0), (1, 3), (20, 20), (4, -1)]
    images = [photo(*size, channels).numpy() for size in sizes]
    return Batch(images, targets, corners, (11, 46), resample)


@pytest.mark.parametrize(
    ("target", "channels"), [(TARGETS[0], 1), (TARGETS[1], 3), (TARGETS[0], 4)], ids=str
)
def test_images_of_mixed_sizes_in_one_buffer(target: Target, channels: int) -> None:
    batch = mixed(1, channels)
    assert differing(batch, on(target), pillow(batch)) == []


def test_the_lines_between_are_those_of_the_reference() -> None:
    batch = mixed()
    kept = {}

    def keeping(name: str, run: Run) -> Run:
        def both(out: Tensor, middle: Tensor, pixels: Tensor, tables: ResizeTables) -> None:
            run(out, middle, pixels, tables)
            kept[name] = middle.clone()

        return both

    ours = resized(batch, keeping("ours", on(TARGETS[0])))
    assert torch.equal(ours, resized(batch, keeping("theirs", reference)))
    assert torch.equal(kept["ours"], kept["theirs"])


def test_no_image_sees_another() -> None:
    batch = mixed()
    clean = resized(batch, on(TARGETS[0]))
    for number in (2, 4):
        images, targets, corners = ([part[number]] for part in batch[:3])
        alone = batch._replace(images=images, targets=targets, corners=corners)
        assert torch.equal(resized(alone, on(TARGETS[0]))[0], clean[number])
    for image in (batch.images[1], batch.images[3]):
        image ^= 255
    now = resized(batch, on(TARGETS[0]))
    changed = (now != clean).flatten(1).any(1)
    assert changed.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("kernel", ["across", "down"])
@pytest.mark.parametrize("sides", [(16, 64), (4, 512)], ids=str)
def test_every_tile_gives_the_same_bits(kernel: str, sides: tuple[int, int]) -> None:
    batch = mixed()
    config = KernelConfig(*sides, 0, 4, 1)
    with in_force({f"resize|uint8|{kernel} 3": config}):
        assert differing(batch, on(TARGETS[0]), pillow(batch)) == []


def test_pixels_past_two_billion_bytes() -> None:
    """The second image lies 2^32 bytes on, in memory of which a few pages are ever touched."""
    batch = Batch([photo(7, 9).numpy()], [(5, 6)], [(0, 0)], (5, 6), 3)
    tables, far = batch.tables(), (1 << 32) + 12_345
    pixels = torch.empty(far + tables.pixels, dtype=torch.uint8)
    pixels[far:] = batch.pixels()
    tables.images[0, 0] += far
    out, middle = torch.empty(1, 5, 6, 3).byte(), torch.empty(tables.middle).byte()
    RESIZE.launch(out, middle, pixels, *tables[:3])
    assert torch.equal(out, pillow(batch))


def test_a_middle_past_two_billion_bytes() -> None:
    """An image's lines between the passes may begin there."""
    batch = Batch([photo(7, 9).numpy()], [(5, 6)], [(0, 0)], (5, 6), 3)
    tables = batch.tables()
    lines, stride = tables.middle
    near, out = torch.empty(tables.middle).byte(), torch.empty(1, 5, 6, 3).byte()
    reference(out, near, batch.pixels(), tables)
    groups = 2**31 // near.numel() + 2
    far = torch.empty(groups * lines, stride, dtype=torch.uint8)
    far[-lines:] = near
    tables.images[0, 3] = groups - 1
    owners = torch.zeros(groups, dtype=torch.int32)
    calls = resize_calls(
        TARGETS[0], out.zero_(), far, batch.pixels(), tables.images, owners, tables.taps
    )
    launch(calls[1:])
    assert torch.equal(out, pillow(batch))


# -- the call --------------------------------------------------------------------------------------


def test_the_operator_is_its_calls() -> None:
    batch = mixed()

    def run(out: Tensor, middle: Tensor, pixels: Tensor, tables: ResizeTables) -> None:
        RESIZE.launch(out, middle, pixels, *tables[:3])

    assert differing(batch, run, pillow(batch)) == []


def test_no_images_launch_nothing() -> None:
    tables = resize_tables([], [], [], window=(4, 5), resample=3, channels=3)
    empty = torch.empty(0, dtype=torch.uint8)
    RESIZE.launch(empty.view(0, 4, 5, 3), empty.view(0, 16), empty, *tables[:3])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "out",
            lambda t: t[0],
            r"resize: out: got shape \(11, 46, 3\), wanted \(B, h, w, channels",
        ),
        ("out", lambda t: t[:, :0], "of less than 2\\^31 numbers an image"),
        ("out", lambda t: t.int(), "resize: out: got torch.int32, wanted torch.uint8"),
        ("out", lambda t: t[:, :, :44], "resize: out: got strides"),
        ("out", lambda t: t[:4], r"resize: images: got shape \(5, 8\), wanted \(4, 8\)"),
        ("middle", lambda t: t[1:], "resize: middle: got shape"),
        ("middle", lambda t: t[:, :138], r"resize: middle: got shape \(\d+, 138\), wanted"),
        ("pixels", lambda t: t[None], "resize: pixels: got shape"),
        ("pixels", lambda t: t[::2], "resize: pixels: got strides"),
        ("pixels", lambda t: t.to("meta"), "resize: pixels: got a tensor on meta, wanted cpu"),
        ("images", lambda t: t.int(), "resize: images: got torch.int32, wanted torch.int64"),
        ("groups", lambda t: t.long(), "resize: groups: got torch.int64, wanted torch.int32"),
        ("taps", lambda t: t.view(1, -1), "resize: taps: got shape"),
    ],
)
def test_what_it_refuses(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    batch = mixed()
    tables = batch.tables()
    arguments = {
        "out": torch.empty(5, 11, 46, 3).byte(),
        "middle": torch.empty(tables.middle).byte(),
        "pixels": batch.pixels(),
        "images": tables.images,
        "groups": tables.groups,
        "taps": tables.taps,
    }
    resize_calls(TARGETS[0], **arguments)
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        resize_calls(TARGETS[0], **arguments)
