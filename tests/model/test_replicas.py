"""`Replicas` against one model: the same bits, errors and order, wherever items are computed."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vitrail
from forked import run_program
from helpers import make, save
from vitrail.demo.demo import bundled
from vitrail.errors import (
    CheckpointError,
    DeviceError,
    ImageError,
    InputError,
    OutOfMemoryError,
    VitrailError,
)
from vitrail.model import loading
from vitrail.model.spreading import SpreadTexts, Turns, even_step
from vitrail.runtime.towers import TextTower, VisionTower

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [f"{'a red circle ' * (number % 4)}number {number}" for number in range(53)]


@pytest.fixture(scope="module")
def model() -> vitrail.Model:
    return vitrail.load(bundled())


@pytest.fixture(scope="module")
def pair() -> vitrail.Replicas:
    return vitrail.load_replicas(bundled(), devices=["cpu", "cpu"])


@pytest.fixture(scope="module")
def three() -> vitrail.Replicas:
    return vitrail.load_replicas(bundled(), devices=["cpu"] * 3)


def pictures(count: int) -> list[Any]:
    """Arrays of several sizes."""
    dice = np.random.default_rng(count)
    sides = ((40, 50), (33, 64), (70, 34))
    return [dice.integers(0, 256, (*sides[n % 3], 3), dtype=np.uint8) for n in range(count)]


def broken(count: int, step: int = 17) -> list[Any]:
    """Every ``step``-th of the pictures is no image."""
    images = pictures(count)
    images[step - 1 :: step] = [b"no image"] * len(images[step - 1 :: step])
    return images


def outcome(call: Callable[[], Any]) -> tuple[type[BaseException], str]:
    with pytest.raises(VitrailError) as caught:
        call()
    return caught.type, str(caught.value)


# -- the bits of one model -------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 200])
def test_images_have_the_bits_of_one_model(
    model: vitrail.Model, pair: vitrail.Replicas, count: int
) -> None:
    images = broken(count)
    for batch_size in (None, 16):
        alone = model.encode_image(images, on_error="skip", batch_size=batch_size)
        spread = pair.encode_image(images, on_error="skip", batch_size=batch_size)
        assert torch.equal(spread.embeddings, alone.embeddings)
        assert (spread.index, spread.errors) == (alone.index, alone.errors)
        assert len(spread.errors) == count // 17


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 8])
def test_pixels_have_the_bits_of_one_model(
    model: vitrail.Model, three: vitrail.Replicas, batch_size: int | None
) -> None:
    pixels = model.preprocess(pictures(29))
    assert torch.equal(three.preprocess(pictures(29)), pixels)
    options: dict[str, Any] = {"batch_size": batch_size, "normalize": True}
    expected = model.encode_image(pixels, **options)
    assert torch.equal(three.encode_image(pixels, **options), expected)
    pixels[[4, 5, 20], 0, 3] = torch.nan
    alone = model.encode_image(pixels, on_error="skip", **options)
    spread = three.encode_image(pixels, on_error="skip", **options)
    assert torch.equal(spread.embeddings, alone.embeddings)
    assert (spread.index, spread.errors) == (alone.index, alone.errors)
    assert len(spread.index) == 26
    for one in (model, three):
        with pytest.raises(InputError, match="item 4 holds NaN"):
            one.encode_image(pixels, **options)
        with pytest.raises(InputError, match="size: got"):
            one.encode_image(pixels[:4], size=(64, 64))
        assert one.encode_image(pixels[:0]).shape == expected[:0].shape


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 8])
def test_texts_have_the_bits_of_one_model(
    model: vitrail.Model, three: vitrail.Replicas, batch_size: int | None
) -> None:
    assert torch.equal(three.tokenize(TEXTS), model.tokenize(TEXTS))
    for texts in (TEXTS, TEXTS[:1], [], model.tokenize(TEXTS[:9])):
        for normalize in (False, True):
            alone = model.encode_text(texts, batch_size=batch_size, normalize=normalize)
            spread = three.encode_text(texts, batch_size=batch_size, normalize=normalize)
            assert torch.equal(spread, alone)


def test_batches_within_a_budget_have_the_bits_of_one_model(
    model: vitrail.Model, three: vitrail.Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a batch size, and with budgets that make several batches."""
    monkeypatch.setattr("vitrail.model.texts.CPU_TEXT_BYTES", 1 << 18)
    monkeypatch.setattr("vitrail.model.images.ACTIVATION_BYTES", 1 << 20)
    seen = batches_seen(monkeypatch)
    assert torch.equal(three.encode_text(TEXTS), model.encode_text(TEXTS))
    assert torch.equal(three.encode_image(pictures(40)), model.encode_image(pictures(40)))
    assert len(seen) >= 3 * 2 * 2
    half = len(seen) // 2
    assert sorted(count for _, count in seen[:half]) != [1] * half


def test_class_scores_are_those_of_one_model(
    model: vitrail.Model, pair: vitrail.Replicas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Any] = []
    encode = SpreadTexts.encode

    def counted(self: SpreadTexts, texts: Any, **options: Any) -> Tensor:
        encoded.append(texts)
        return encode(self, texts, **options)

    monkeypatch.setattr(SpreadTexts, "encode", counted)
    labels, options = ["cat", "dog", "sea"], {"batch_size": 5, "on_error": "skip"}
    for _ in range(2):
        alone = model.classify(broken(40), labels, **options)  # type: ignore[arg-type]
        spread = pair.classify(broken(40), labels, **options)  # type: ignore[arg-type]
        assert torch.equal(spread.probs, alone.probs)
        assert torch.equal(spread.logits, alone.logits)
        assert (spread.index, spread.errors) == (alone.index, alone.errors)
    assert len(encoded) == 1
    save(make("ViTForImageClassification"), tmp_path)
    pixels = torch.randn(11, 3, 32, 32)
    alone = vitrail.load(tmp_path).classify(pixels, batch_size=2)
    spread = vitrail.load_replicas(tmp_path, devices=["cpu", "cpu"]).classify(pixels, batch_size=2)
    assert torch.equal(spread.probs, alone.probs)
    assert spread.labels == alone.labels


def test_images_of_several_sizes_have_the_bits_of_one_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Resized on the device, in parts of a window when the decoded images are too many bytes."""
    folder = bundled()
    monkeypatch.setattr("vitrail.image.preprocess.core_count", lambda: 1)
    monkeypatch.setattr("vitrail.model.images.DECODED_BYTES", 40_000)
    alone = vitrail.load(folder, resize="device")
    spread = vitrail.load_replicas(folder, devices=["cpu", "cpu"], resize="device")
    assert spread.models[0].resize == alone.resize
    images = pictures(50)
    for batch_size in (None, 7):
        expected = alone.encode_image(images, batch_size=batch_size)
        assert torch.equal(spread.encode_image(images, batch_size=batch_size), expected)


# -- who computes what -----------------------------------------------------------------------------


def batches_seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """The tower and the items of every batch that is computed from now on."""
    seen: list[tuple[Any, int]] = []
    for tower in (VisionTower, TextTower):

        def embeddings(self: Any, items: Any, embed: Any = tower.embeddings) -> Any:
            seen.append((self, len(items)))
            return embed(self, items)

        monkeypatch.setattr(tower, "embeddings", embeddings)
    return seen


def test_every_replica_takes_part(three: vitrail.Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = batches_seen(monkeypatch)
    three.encode_image(pictures(30), batch_size=4)
    assert {tower for tower, _ in seen} == {model._vision for model in three.models}
    seen.clear()
    three.encode_text(TEXTS, batch_size=4)
    assert {tower for tower, _ in seen} == {model._text for model in three.models}


def test_a_slow_replica_takes_fewer_windows(
    pair: vitrail.Replicas, model: vitrail.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = batches_seen(monkeypatch)
    slow, done = pair.models[0]._vision, threading.Event()
    embed = VisionTower.embeddings

    def embeddings(self: VisionTower, pixels: Tensor) -> Any:
        if self is slow:
            done.wait(60)
        outputs = embed(self, pixels)
        if sum(tower is not slow for tower, _ in seen) == 13:
            done.set()
        return outputs

    expected = model.encode_image(pictures(60), batch_size=4)
    seen.clear()
    monkeypatch.setattr(VisionTower, "embeddings", embeddings)
    assert torch.equal(pair.encode_image(pictures(60), batch_size=4), expected)
    assert done.is_set()
    # the batch in hand, and the one decoded ahead
    assert sum(tower is slow for tower, _ in seen) == 2


def test_single_items_from_many_threads_go_to_every_replica(
    pair: vitrail.Replicas, model: vitrail.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(24)
    expected = [model.encode_image(image) for image in images]
    seen = batches_seen(monkeypatch)
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(pair.encode_image, images))
    assert all(torch.equal(row, wanted) for row, wanted in zip(rows, expected, strict=True))
    for one in pair.models:
        assert sum(tower is one._vision for tower, _ in seen) >= 6


def test_any_number_of_threads_may_call_at_once(
    pair: vitrail.Replicas, model: vitrail.Model
) -> None:
    batches = [pictures(count) for count in (1, 5, 12, 30)]
    expected = [model.encode_image(images, batch_size=4) for images in batches]
    with ThreadPoolExecutor(8) as pool:
        results = list(
            pool.map(lambda images: pair.encode_image(images, batch_size=4), batches * 6)
        )
    for result, wanted in zip(results, expected * 6, strict=True):
        assert torch.equal(result, wanted)


def test_replicas_compute_with_the_threads_of_pytorch_that_their_caller_has(
    pair: vitrail.Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU their number is one of the things that bits depend on."""
    see, counts = VisionTower.embeddings, list[int]()

    def counted(self: VisionTower, pixels: Tensor) -> Any:
        counts.append(torch.get_num_threads())
        return see(self, pixels)

    monkeypatch.setattr(VisionTower, "embeddings", counted)
    with ThreadPoolExecutor(1) as pool:  # a number for itself, and for threads to come
        pool.submit(torch.set_num_threads, 3).result()
    assert torch.get_num_threads() == 1
    pair.encode_image(pictures(20), batch_size=4)
    assert counts == [1] * 5


@pytest.mark.parametrize(
    ("count", "most", "replicas"), [(0, 4, 2), (1, 64, 2), (64, 64, 2), (130, 64, 2), (200, 7, 3)]
)
def test_windows_are_even_and_keep_every_replica_busy(count: int, most: int, replicas: int) -> None:
    step = even_step(count, most, replicas)
    windows = [min(step, count - start) for start in range(0, count, max(step, 1))]
    assert sum(windows) == count
    assert all(window <= min(most, -(-count // replicas)) for window in windows)
    if count >= replicas:
        by_replica = [sum(windows[number::replicas]) for number in range(replicas)]
        assert max(by_replica) - min(by_replica) <= step


def test_turns_hand_out_every_window_once_and_each_threads_first() -> None:
    turns, taken = Turns(range(7), 3), [list[tuple[int, int]]() for _ in range(3)]
    iterators: list[Iterator[int]] = [turns.of(thread, taken[thread]) for thread in range(3)]
    assert [next(iterators[0]) for _ in range(3)] == [0, 3, 4]
    assert next(iterators[2]) == 2
    turns.stop()
    assert list(iterators[1]) == [1]
    assert [[number for number, _ in own] for own in taken] == [[0, 3, 4], [1], [2]]


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_the_first_error_is_that_of_one_model(
    model: vitrail.Model, three: vitrail.Replicas, batch_size: int | None
) -> None:
    for first in (3, 9, 31):
        images = pictures(40)
        images[first] = images[first + 1] = images[38] = b"no image"
        alone = outcome(lambda: model.encode_image(images, batch_size=batch_size))  # noqa: B023
        spread = outcome(lambda: three.encode_image(images, batch_size=batch_size))  # noqa: B023
        assert spread == alone
        assert alone[0] is ImageError
        assert alone[1].startswith(f"image {first}: ")
    too_long = [*TEXTS, "word " * 99]
    assert outcome(lambda: three.encode_text(too_long)) == outcome(
        lambda: model.encode_text(too_long)
    )


def test_the_first_embedding_that_is_not_finite_is_named(
    model: vitrail.Model, three: vitrail.Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """White pictures, and the texts of one length, overflow."""
    see, read = VisionTower.embeddings, TextTower.embeddings

    def overflow(self: VisionTower, pixels: Tensor) -> Any:
        outputs = see(self, pixels)
        white = pixels.flatten(1).double().mean(1) > 250
        outputs["vision.embedding"][white] = torch.inf
        return outputs

    def overflow_text(self: TextTower, texts: Any) -> Any:
        outputs = read(self, texts)
        outputs["text.status"][torch.from_numpy(texts.lengths == length)] = 1
        return outputs

    monkeypatch.setattr(VisionTower, "embeddings", overflow)
    monkeypatch.setattr(TextTower, "embeddings", overflow_text)
    images = pictures(30)
    images[11] = images[12] = images[26] = np.full((40, 40, 3), 255, np.uint8)
    alone, spread = (
        outcome(lambda: one.encode_image(images, batch_size=3))  # noqa: B023
        for one in (model, three)
    )
    assert spread == alone
    assert alone[1].startswith("image 11: ")
    skipped = three.encode_image(images, batch_size=3, on_error="skip")
    assert skipped.errors == model.encode_image(images, batch_size=3, on_error="skip").errors
    assert sorted(skipped.errors) == [11, 12, 26]
    texts = ["dog"] * 9 + ["a red dog"] * 9 + ["a red dog and a red cat"] * 9
    length = model._texts.tokens("a red dog", "error").lengths[0]
    alone, spread = (
        outcome(lambda: one.encode_text(texts, batch_size=2))  # noqa: B023
        for one in (model, three)
    )
    assert spread == alone
    assert alone[1].startswith("text 9: ")


@pytest.mark.parametrize("error_class", [DeviceError, OutOfMemoryError])
def test_an_error_of_a_device_names_the_replica(
    pair: vitrail.Replicas, monkeypatch: pytest.MonkeyPatch, error_class: type[DeviceError]
) -> None:
    """The replica's other calls, and those of the others, go on."""
    lost, see, read = pair.models[1], VisionTower.embeddings, TextTower.embeddings

    def fail(self: VisionTower, pixels: Tensor) -> Any:
        if self is lost._vision:
            raise error_class("the kernel failed")
        return see(self, pixels)

    def fail_text(self: TextTower, texts: Any) -> Any:
        if self is lost._text:
            raise error_class("the kernel failed")
        return read(self, texts)

    with monkeypatch.context() as patched:
        patched.setattr(VisionTower, "embeddings", fail)
        patched.setattr(TextTower, "embeddings", fail_text)
        for on_error in ("raise", "skip"):
            with pytest.raises(error_class, match=r"^replica 1 on cpu: the kernel failed$"):
                pair.encode_image(pictures(20), batch_size=2, on_error=on_error)
        with pytest.raises(error_class, match=r"^replica 1 on cpu: the kernel failed$"):
            pair.encode_text(TEXTS, batch_size=2)
        images = pictures(20)
        images[0] = b"no image"  # comes before the first window of replica 1
        with pytest.raises(ImageError, match=r"^image 0: "):
            pair.encode_image(images, batch_size=2)
    assert len(pair.encode_image(pictures(20), batch_size=2)) == 20


# -- loading ---------------------------------------------------------------------------------------


def test_the_checkpoint_is_read_once_and_cpu_replicas_share_it(
    model: vitrail.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Any] = []
    read = loading.read_model
    monkeypatch.setattr(
        loading, "read_model", lambda *args, **options: reads.append(args) or read(*args, **options)
    )
    replicas = vitrail.load_replicas(bundled(), devices=["cpu", torch.device("cpu"), "cpu"])
    assert len(reads) == 1
    arenas = {one._vision.runner.weights.arena.data_ptr() for one in replicas.models if one._vision}
    assert len(arenas) == 1
    assert (len(replicas), replicas.devices) == (3, (torch.device("cpu"),) * 3)
    assert {one.fingerprint for one in replicas.models} == {model.fingerprint}
    assert (replicas.fingerprint, replicas.spec) == (model.fingerprint, model.spec)
    assert isinstance(replicas, vitrail.Replicas)
    assert repr(replicas) == (
        f"<vitrail.Replicas CLIPModel from {str(bundled())!r}: 1.1 M parameters, float32 on "
        "cpu, cpu, cpu, torch backend>"
    )
    options = {"dtype": "bfloat16", "devices": ["cpu"]}
    half = vitrail.load_replicas(bundled(), **options)  # type: ignore[arg-type]
    alone = vitrail.load(bundled(), dtype="bfloat16", device="cpu")
    assert (half.dtype, half.precision, half.backend) == (torch.bfloat16, "bfloat16", "torch")
    assert torch.equal(half.encode_image(pictures(3)), alone.encode_image(pictures(3)))


@pytest.mark.parametrize("devices", ["cpu", [], torch.device("cpu"), ["cpu", "tpu"], ["cuda:77"]])
def test_devices_are_a_list_of_devices(devices: Any) -> None:
    with pytest.raises(InputError, match=r"^devices: got"):
        vitrail.load_replicas(bundled(), devices=devices)


def test_without_devices_there_is_a_replica_for_each_gpu_or_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not torch.cuda.is_available():
        assert vitrail.load_replicas(bundled()).devices == (torch.device("cpu"),)
    seen: list[Any] = []

    def check_device(device: str, name: str) -> torch.device:
        seen.append(device)
        return torch.device("cuda" if device == "auto" else "cpu")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(loading, "check_device", check_device)
    assert len(vitrail.load_replicas(bundled())) == 3
    assert seen == ["auto", "cuda:0", "cuda:1", "cuda:2"]


def test_devices_that_would_give_other_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Naming both and what differs, before any weight is read."""
    monkeypatch.setattr(loading, "read_model", None)
    monkeypatch.setattr(loading, "check_device", lambda device, name: torch.device(device))
    mixed: Any = {"devices": ["cpu", "cuda:0"]}
    with pytest.raises(InputError, match="got cpu with the dtype float32, and cuda:0 with float16"):
        vitrail.load_replicas(bundled(), **mixed)
    monkeypatch.setattr(
        loading,
        "choose",
        lambda backend, dtype, device, exported: "native" if device.type == "cuda" else "torch",
    )
    with pytest.raises(InputError, match="cpu with the backend torch, and cuda:0 with native"):
        vitrail.load_replicas(bundled(), dtype="float16", **mixed)
    monkeypatch.setattr(loading, "cuda_capability", lambda device: ((9, 0), (8, 0))[device.index])
    with pytest.raises(InputError, match="cuda:0 with the hardware sm_90, and cuda:1 with sm_80"):
        vitrail.load_replicas(bundled(), devices=["cuda:0", "cuda:1"])


def test_replicas_hold_memory_within_a_limit_and_give_it_back() -> None:
    replicas = vitrail.load_replicas(bundled(), devices=["cpu", "cpu"])
    images = pictures(40)
    expected = replicas.encode_image(images, batch_size=10)
    assert replicas.held_bytes == sum(one.held_bytes for one in replicas.models) > 0
    assert replicas.trim() > 0
    assert replicas.held_bytes == 0
    assert torch.equal(replicas.encode_image(images, batch_size=10), expected)
    limited = vitrail.load_replicas(bundled(), devices=["cpu", "cpu"], memory_limit="2M")
    alone = vitrail.load(bundled(), memory_limit="2M")
    assert limited.memory_limit == alone.memory_limit == 2 << 20
    assert {one.memory_limit for one in limited.models} == {2 << 20}
    for batch_size in (None, 40):
        computed = limited.encode_image(images, batch_size=batch_size)
        assert torch.equal(computed, alone.encode_image(images, batch_size=batch_size))


# -- other processes -------------------------------------------------------------------------------

FORKED = """
pixels = np.random.default_rng(5).integers(0, 256, (24, 64, 48, 3), np.uint8)
replicas = vitrail.load_replicas(bundled(), devices=["cpu", "cpu"])


def encoded():
    images = replicas.encode_image(pixels, batch_size=4)
    texts = replicas.encode_text([f"a photo of {n} things" for n in range(40)], batch_size=3)
    return images.numpy().tobytes() + texts.numpy().tobytes()


unused = in_fork(encoded)
wanted = encoded()
pair, replicas = replicas, vitrail.load(bundled(), device="cpu")
same(wanted, encoded(), "one model")
replicas = pair
same(unused, wanted, "forked before the first call")
same(in_fork(encoded), wanted, "forked after a call")
print("done")
"""


@pytest.mark.slow
def test_a_forked_child_has_the_bits_of_its_parent(tmp_path: Path) -> None:
    assert run_program(FORKED, tmp_path) == "done\n"


def test_replicas_pickle_as_the_arguments_that_load_them(three: vitrail.Replicas) -> None:
    data = pickle.dumps(three)
    assert len(data) < 10_000
    again = pickle.loads(data)
    assert (again.fingerprint, again.devices) == (three.fingerprint, three.devices)
    images = pictures(7)
    expected = three.encode_image(images, batch_size=2)
    assert torch.equal(again.encode_image(images, batch_size=2), expected)
    assert copy.deepcopy(three) is three
    assert copy.copy(three) is three
    other = pickle.dumps(three).replace(three.fingerprint.encode(), b"0" * 64)
    with pytest.raises(CheckpointError, match=f"fingerprint {three.fingerprint}, wanted 0000"):
        pickle.loads(other)
