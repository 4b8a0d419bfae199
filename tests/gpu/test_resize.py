"""The resize operator on a GPU: the bytes of its reference, which are Pillow's (N13)."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

import vitrail
from gpu.common import DEVICE, DRY, Guarded, same_bits
from gpu.models import BUNDLED, HALF, RUNNER
from vitrail.model import images as encoder
from vitrail_kernels import OPERATORS
from vitrail_kernels.ops.resize_tables import resize_tables

pytestmark = pytest.mark.gpu

Size = tuple[int, int]


class Batch(NamedTuple):
    """Images of ``sizes`` resized to ``targets``; the ``window`` from ``corners`` is kept."""

    sizes: tuple[Size, ...]
    targets: tuple[Size, ...]
    corners: tuple[Size, ...]
    window: Size
    resample: int


def assert_same_bytes(batch: Batch, channels: int) -> None:
    """Of noise, and of noise of 0 and 255 alone, which leaves the range on both sides."""
    tables = resize_tables(
        batch.sizes,
        batch.targets,
        batch.corners,
        window=batch.window,
        resample=batch.resample,
        channels=channels,
    )
    noise = torch.randint(256, (tables.pixels,), dtype=torch.uint8)
    for pixels in (noise, torch.where(noise < 128, 0, 255).to(torch.uint8)):
        shape = (len(batch.sizes), *batch.window, channels)
        wanted, between = torch.empty(shape, dtype=torch.uint8), torch.empty(tables.middle)
        inputs = (pixels, tables.images, tables.groups, tables.taps)
        OPERATORS["resize"].reference(wanted, between.to(torch.uint8), *inputs)
        out, middle = Guarded(shape, torch.uint8), Guarded(tables.middle, torch.uint8)
        on_device = (tensor.to(DEVICE) for tensor in inputs)
        OPERATORS["resize"].launch(out.out, middle.out, *on_device)
        middle.done()
        found = out.done().cpu()
        wrong = (found != wanted).flatten(1).any(dim=1).nonzero().flatten().tolist()
        assert same_bits(found, wanted), f"images {wrong} of {batch}"


SIZES = ((480, 640), (224, 224), (37, 51), (1200, 801), (90, 900), (300, 7), (1, 1))


def shortest(size: Size, edge: int) -> Size:
    """``size`` with its shortest edge resized to ``edge``."""
    height, width = size
    least = min(size)
    return height * edge // least, width * edge // least


@pytest.mark.parametrize("channels", [3] if DRY else [1, 3, 4])
@pytest.mark.parametrize("resample", [3] if DRY else range(6))
def test_resized_and_cropped_bytes_are_the_references(resample: int, channels: int) -> None:
    """The center, and windows that reach past the image."""
    edge, side = (12, 10) if DRY else (256, 224)
    sizes = tuple((h // 16 + 1, w // 16 + 1) for h, w in SIZES) if DRY else SIZES
    targets = tuple(shortest(size, edge) for size in sizes)
    center = tuple(((h - side) // 2, (w - side) // 2) for h, w in targets)
    past = tuple((-20, w - side // 2) for _, w in targets)
    for corners in (center, past):
        assert_same_bytes(Batch(sizes, targets, corners, (side, side), resample), channels)


@pytest.mark.usefixtures("kernels", *(["ordered_dot"] if DRY else []))
@pytest.mark.parametrize("runner", [RUNNER] if DRY else ["native", "triton"])
def test_a_model_that_resizes_here_gives_the_bits_of_the_host(
    runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a batch at once, and a few at a time."""
    sizes = ((70, 90), (64, 64), (9, 1200)) if DRY else SIZES
    images = [torch.randint(256, (*size, 3), dtype=torch.uint8) for size in sizes]
    host, there = (
        vitrail.load(BUNDLED, device=DEVICE, dtype=HALF, backend=runner, resize=place)
        for place in ("host", "device")
    )
    assert there.resize.startswith("device, by ")
    wanted = host.encode_image(images)
    for limit in (encoder.DECODED_BYTES, 1):
        monkeypatch.setattr(encoder, "DECODED_BYTES", limit)
        assert same_bits(there.encode_image(images, batch_size=None if DRY else 3), wanted)


def test_another_filter_gives_other_bytes() -> None:
    """The comparison can fail."""
    shape = (1, 10, 10, 3)
    pixels = torch.randint(256, (20 * 20 * 3,), dtype=torch.uint8)
    results = []
    for resample in (2, 3):
        tables = resize_tables(
            [(20, 20)], [(10, 10)], [(0, 0)], window=(10, 10), resample=resample, channels=3
        )
        out = torch.empty(shape, dtype=torch.uint8, device=DEVICE)
        middle = torch.empty(tables.middle, dtype=torch.uint8, device=DEVICE)
        inputs = (pixels, tables.images, tables.groups, tables.taps)
        OPERATORS["resize"].launch(out, middle, *(tensor.to(DEVICE) for tensor in inputs))
        results.append(out)
    assert not same_bits(*results)
