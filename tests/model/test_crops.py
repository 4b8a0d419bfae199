"""Images that the model's own device resizes: the bytes and the errors of those the host does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vitrail
from helpers import assert_close, clip_folder
from image.samples import CASES, CLIP, encode, photo, spec_of
from pixels import cases
from vitrail.errors import ImageError, InputError, OutOfMemoryError, VitrailError
from vitrail.image import preprocess
from vitrail.image.preprocess import CropTask, decode_crop_tasks, preprocess_uint8
from vitrail.model import images as encoder
from vitrail.model.crops import CropBatch, DeviceCrops, device_batch, host_batch, pack
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.spec import ImageSpec

BUNDLED = Path(vitrail.__file__).with_name("assets") / "clip"
ENOUGH = 1 << 40


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    images = vitrail.load(BUNDLED, resize="device")._images
    assert images is not None
    found = images._resizer
    assert isinstance(found, TorchRunner)
    return found


def each(batch: CropBatch) -> list[Any]:
    """Crops and errors by member."""
    found: dict[int, Any] = dict(batch.errors)
    for crops in batch.groups:
        pixels = crops[:]
        assert pixels.shape[1:3] == crops.size
        found |= dict(zip(crops.members, pixels.numpy(), strict=True))
    return [found[member] for member in range(batch.taken)]


def device(
    runner: TorchRunner,
    given: Sequence[Any],
    spec: ImageSpec,
    channels: int = 3,
    **options: Any,
) -> list[Any]:
    framed = decode_crop_tasks(given, spec, channels, stop_bytes=ENOUGH, **options)
    return each(device_batch(framed, runner, ENOUGH))


def differing(ours: Sequence[Any], theirs: Sequence[Any]) -> list[int]:
    """Which are not the same crop, or not the same error."""
    assert len(ours) == len(theirs)
    return [
        number
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True))
        if type(one) is not type(other)
        or (isinstance(one, Exception) and str(one) != str(other))
        or (isinstance(one, np.ndarray) and not np.array_equal(one, other))
    ]


# -- the bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", sorted({case.id.partition("/")[0] for case in CASES}))
def test_crops_have_the_bytes_of_the_host(group: str, runner: TorchRunner) -> None:
    """Every case whose pixels are pinned, all of a processor in one batch."""
    batches: dict[Any, list[cases.Case]] = {}
    for case in CASES:
        if case.id.partition("/")[0] == group:
            key = (case.steps, case.channels, case.sixteen_bit)
            batches.setdefault(key, []).append(case)
    for (steps, channels, sixteen_bit), many in batches.items():
        given, spec = [case.make() for case in many], spec_of(steps)
        wanted = preprocess_uint8(given, spec, channels, sixteen_bit=sixteen_bit)
        found = device(runner, given, spec, channels, sixteen_bit=sixteen_bit)
        assert [many[number].id for number in differing(found, wanted)] == []


def kinds(folder: Path) -> list[Any]:
    """Images of every kind that is taken, and of several that are not."""
    path = folder / "photo.png"
    path.write_bytes(encode(photo(90, 70, seed=5), "PNG"))
    turned = Image.Exif()
    turned[0x0112] = 6
    gray = np.asarray(photo(33, 44))[..., :1]
    return [
        photo(80, 60),
        b"<html>",
        path,
        encode(photo(61, 35), "JPEG", exif=turned),
        folder / "missing.png",
        cases.picture("palette", "P+alphas", 45, 34),
        encode(cases.picture("wide", "I;16", 45, 34), "PNG"),
        cases.picture("cmyk", "CMYK", 45, 34),
        gray,
        gray[..., 0],
        np.asarray(photo(33, 44))[::-1, ::2],
        torch.from_numpy(np.asarray(photo(20, 30)).copy()),
        encode(photo(40, 30), "JPEG")[:500],
        7,
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        Image.new("F", (5, 5)),
        photo(7, 900),
        photo(900, 7),
    ]


SPECS = {
    "CLIP": CLIP,
    "padded": replace(CLIP, resize=("shortest", 20), crop=(33, 36)),
    "exact": replace(CLIP, resize=("exact", 31, 47), crop=None, resample=0),
    "of many sizes": replace(CLIP, resize=("shortest", 24), crop=None, resample=1),
    "not resized": replace(CLIP, resize=None, crop=(40, 50)),
    "as they are": replace(CLIP, resize=None, crop=None),
}


@pytest.mark.parametrize("name", SPECS)
def test_every_kind_of_image_and_of_failure_is_as_on_the_host(
    name: str, runner: TorchRunner, tmp_path: Path
) -> None:
    given = kinds(tmp_path)
    sizes = (None,) if name == "as they are" else (None, (30, 41))
    for size in sizes:
        wanted = preprocess_uint8(given, SPECS[name], 3, size=size)
        found = device(runner, given, SPECS[name], size=size)
        assert differing(found, wanted) == []
        assert differing(each(host_batch(wanted)), wanted) == []
        assert sum(isinstance(one, VitrailError) for one in found) == 7


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_arrays_of_other_channels_are_as_on_the_host(channels: int, runner: TorchRunner) -> None:
    given = [cases.noise(f"{n}", 30 + n, 50 - n, channels) for n in range(3)]
    spec = replace(CLIP, mean=None, std=None)
    assert (
        differing(device(runner, given, spec, channels), preprocess_uint8(given, spec, channels))
        == []
    )


def test_a_resize_over_the_limit_is_refused_alike(runner: TorchRunner) -> None:
    given, spec = [photo(), Image.new("RGB", (20_000, 1))], replace(CLIP, crop=None)
    wanted = preprocess_uint8(given, spec, 3)
    assert "over the limit" in str(wanted[1])
    assert differing(device(runner, given, spec), wanted) == []


def test_what_goes_down_first_is_left_to_the_host() -> None:
    """As Pillow 12 does with an image over 100 times taller than wide; nothing else is."""
    tall, other = cases.picture("tall", "RGB", 2, 1200), cases.picture("other", "RGB", 2, 200)
    spec = replace(CLIP, resize=("exact", 20, 30), crop=None)
    framed = decode_crop_tasks([tall, other], spec, 3, stop_bytes=ENOUGH)
    shapes = [one.pixels.shape for one in framed if isinstance(one, CropTask)]
    assert shapes == [(20, 30, 3), (200, 2, 3)]


# -- limits ----------------------------------------------------------------------------------------


def crop_tasks(count: int, spec: ImageSpec = CLIP) -> list[CropTask]:
    found = decode_crop_tasks([photo(40 + n, 50) for n in range(count)], spec, 3, stop_bytes=ENOUGH)
    return [one for one in found if isinstance(one, CropTask)]


def test_what_is_resized_at_once_holds_no_more_than_it_may(runner: TorchRunner) -> None:
    framed = crop_tasks(9)
    whole = sum(one.device_bytes for one in framed)
    for most in (1, whole // 4, whole // 2, whole):
        batch = device_batch(framed, runner, most)
        assert sorted(m for crops in batch.groups for m in crops.members) == list(range(9))
        for crops in batch.groups:
            together = sum(framed[member].device_bytes for member in crops.members)
            assert together <= most or len(crops.members) == 1
        assert len(batch.groups) == {1: 9, whole: 1}.get(most, len(batch.groups))
    assert len(device_batch(framed, runner, whole - 1).groups) == 2


def test_the_bytes_held_are_those_that_a_device_needs() -> None:
    """Of what is copied and of what is made there, but for the tables and what rounds up."""
    for one in crop_tasks(3):
        packed = pack([one], pinned=False)
        lines, stride = packed.tables.middle
        crop = one.rows.out * one.columns.out * 3
        needed = packed.tables.pixels + lines * stride + crop
        assert needed - 16 * stride <= one.device_bytes <= needed + 8 * stride


def test_a_batch_becomes_one_buffer_that_holds_all() -> None:
    framed = crop_tasks(4)
    packed = pack(framed, pinned=False)
    sections = packed.sections
    assert all(section.start % 16 == 0 for section in sections)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(sections))
    pixels = np.concatenate([one.pixels.ravel() for one in framed])
    assert np.array_equal(packed.buffer[sections[0]].numpy(), pixels)
    memory = packed.buffer.numpy()
    for one, view in zip(framed, packed.tasks, strict=True):
        assert np.shares_memory(view.pixels, memory)
        assert np.array_equal(view.pixels, one.pixels)


def test_decoding_stops_once_there_are_enough_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "core_count", lambda: 2)
    given = [photo(60, 50, seed=n) for n in range(20)]
    opened: list[object] = []
    open_image = preprocess.open_image

    def counted(image: Any, *rest: Any) -> Any:
        opened.append(image)
        return open_image(image, *rest)

    monkeypatch.setattr(preprocess, "open_image", counted)
    one = crop_tasks(1)[0].device_bytes
    for enough in (1, 3 * one, ENOUGH):
        opened.clear()
        found = decode_crop_tasks(given, CLIP, 3, stop_bytes=enough)
        assert len(found) == len(opened)
        fewest = min(20, max(1, enough // one - 1))
        assert fewest <= len(found) <= min(20, enough // one + 3)
        wanted = preprocess_uint8(given[: len(found)], CLIP, 3)
        assert [f.pixels.shape[1] for f in found if isinstance(f, CropTask)] == [60] * len(wanted)


class Small(TorchRunner):
    """A device with too little memory for more than ``most`` images."""

    most, tried = 2, list[int]()

    def resize(self, out: Tensor, *others: Tensor) -> None:  # type: ignore[override]
        self.tried.append(len(out))
        if len(out) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        super().resize(out, *others)  # type: ignore[call-arg]


def test_without_memory_for_all_halves_are_resized_to_the_same_bytes(
    runner: TorchRunner,
) -> None:
    small = Small(runner.weights, runner.dtype, runner.device)
    framed = crop_tasks(7)
    (crops,), (wanted,) = (device_batch(framed, r, ENOUGH).groups for r in (small, runner))
    assert torch.equal(crops[:], wanted[:])
    assert torch.equal(crops[2:5], wanted[2:5])
    assert small.tried == [7, 3, 1, 2, 4, 2, 2], "each was resized once"
    small.most = 0
    with pytest.raises(OutOfMemoryError, match="resize on cpu: CUDA out of memory"):
        DeviceCrops([(0, framed[0])], small)[:]


# -- the model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    clip_folder(path)
    return path


def test_embeddings_and_errors_are_those_of_the_host(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, there = vitrail.load(folder), vitrail.load(folder, resize="device")
    assert (host.resize, there.resize) == ("host", "device, by PyTorch")
    assert host.fingerprint == there.fingerprint
    given = kinds(tmp_path) * 3
    for batch_size, limit in (
        (None, encoder.DECODED_BYTES),
        (5, encoder.DECODED_BYTES),
        (1, 60_000),
    ):
        monkeypatch.setattr(encoder, "DECODED_BYTES", limit)
        options: dict[str, Any] = {"batch_size": batch_size, "on_error": "skip"}
        wanted, found = (m.encode_image(given, **options) for m in (host, there))
        assert (found.index, found.errors) == (wanted.index, wanted.errors)
        assert torch.equal(found.embeddings, wanted.embeddings)
        assert len(found.errors) == 21
    assert torch.equal(there.preprocess(given[:1]), host.preprocess(given[:1]))
    messages = []
    for one in (host, there):
        with pytest.raises(ImageError) as caught:
            one.encode_image(given)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith("image 1: ")


def test_classes_and_sizes_are_those_of_the_host(folder: Path) -> None:
    host, there = vitrail.load(folder), vitrail.load(folder, resize="device")
    given, options = [photo(70 + n, 50 + n) for n in range(5)], {"size": (40, 64)}
    wanted, found = (m.classify(given, ["cat", "dog"], **options) for m in (host, there))
    assert torch.equal(found.logits, wanted.logits)
    refused = {"size": (1, 1)}
    for one in (host, there):
        with pytest.raises(ImageError, match="image 0: got 1x1 pixels after preprocessing"):
            one.encode_image(given, **refused)
    assert there.encode_image([]).shape == host.encode_image([]).shape


def test_a_limit_on_bytes_splits_a_call_into_batches(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = vitrail.load(folder, resize="device")
    monkeypatch.setattr(preprocess, "core_count", lambda: 1)
    tower, seen = there._vision, list[Tensor]()
    assert tower is not None
    embed = tower.embeddings

    def kept(pixels: Tensor) -> dict[str, Tensor]:
        seen.append(pixels)
        return embed(pixels)

    monkeypatch.setattr(tower, "embeddings", kept)
    given = [photo(60, 50, seed=n) for n in range(9)]
    wanted = there.encode_image(given)
    (together,) = seen
    seen.clear()
    monkeypatch.setattr(encoder, "DECODED_BYTES", 40_000)
    assert_close(there.encode_image(given), wanted, what="model")
    assert len(seen) > 2
    assert torch.equal(torch.cat(seen), together)


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, lambda: torch.device("meta")], ids=["inference", "meta"]
)
def test_a_callers_mode_of_pytorch_changes_nothing(folder: Path, mode: Any) -> None:
    """For batches made in the calling thread and in another."""
    there = vitrail.load(folder, resize="device")
    given = [photo(60 + n, 50) for n in range(4)]
    wanted = there.encode_image(given, batch_size=2)
    with mode():
        found = there.encode_image(given, batch_size=2)
    assert torch.equal(found, wanted)
    assert not found.is_inference()


def test_another_place_to_resize_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="resize: got 'gpu', wanted 'host' or 'device'"):
        vitrail.load(folder, resize="gpu")  # type: ignore[arg-type]
