"""A model's memory limit: the bytes that calls allocate, measured, stay under it; `trim`."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers import ViTImageProcessorPil

import standin
import vitrail
from helpers import make, save
from runtime.test_native import open_native
from runtime.test_native import pytestmark as needs_native
from runtime.test_runner import HEADS, TEXT, VISION, images
from vitrail.demo import demo
from vitrail.errors import InputError, OutOfMemoryError
from vitrail.model import crops
from vitrail.model.batches import ResultRows
from vitrail.model.model import Model
from vitrail.model.texts import TextEncoder
from vitrail.plan.text import text_pooled
from vitrail.runtime.memory import ARENAS
from vitrail.runtime.towers import TextTower, VisionTower
from vitrail.runtime.workspace import LiveBytes, workspace_bytes
from vitrail.text.tokens import TokenIds

LIMITS = (1, 3, 20)
"""How many items the limit holds."""
WORDS = ("red", "blue", "green", "circle", "square", "star", "two", "on", "a", "small")


@pytest.fixture(scope="module")
def model() -> Model:
    return vitrail.load(demo.bundled(), device="cpu")


def limited(limit: int | str | None, **options: Any) -> Model:
    return vitrail.load(demo.bundled(), device="cpu", memory_limit=limit, **options)


def limited_unchecked(limit: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Model:
    """Whether the limit holds an item of every kind is not asked."""
    with monkeypatch.context() as patch:
        patch.setattr("vitrail.model.capacity.Capacity.check", lambda *_: None)
        return limited(limit, **options)


def least_limit(refusal: InputError) -> int:
    """The bytes that the refusal of a limit wants."""
    return int(str(refusal).split("wanted ")[1].split(" or")[0].replace(",", ""))


def needed(model: Model, items: int, what: str) -> int:
    """The bytes for a call of ``items`` items."""
    if what == "texts":
        assert model._text is not None
        plan = text_pooled(model._text.spec)
        return model._text._footprint.text_call(plan, model._text.spec.context).nbytes(items)
    tower, size = model._vision, (56, 56)
    assert tower is not None
    uint8 = what == "uint8"
    return tower.call(tower.pooled_plan(uint8), size, 3 * 56 * 56 * (1 if uint8 else 4)).nbytes(
        items
    )


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose tensors are not counted."""

    def call(*arguments: Any, **options: Any) -> Any:
        with _disable_current_modes():
            return function(*arguments, **options)

    return call


@contextmanager
def device_bytes(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveBytes]:
    """Counts what this thread allocates on the model's device, which is not the host's "cpu": a
    tensor of the host is copied to it, and back. What is made on the host is not counted."""
    with monkeypatch.context() as patch:
        patch.setattr(model._runner, "device", torch.device("cpu", 0))
        patch.setattr(Tensor, "cpu", on_host(Tensor.clone))
        patch.setattr(ResultRows, "stacked", on_host(ResultRows.stacked))
        patch.setattr(TextEncoder, "empty", on_host(TextEncoder.empty))
        patch.setattr(crops, "pack", on_host(crops.pack))
        patch.setattr("vitrail.model.images.check_pixels", lambda *_, **__: {})
        with LiveBytes("cpu") as live:
            yield live


def test_live_bytes_are_counted() -> None:
    with LiveBytes("cpu") as live:
        first = torch.empty(100)
        second = first + 1
        view = second[:3]
        assert (live.now, live.peak) == (800, 800)
        del first
        assert (live.now, live.peak) == (400, 800)
        del second
        assert live.now == 400
        del view
        assert live.now == 0
        with pytest.raises(AssertionError):
            assert torch.empty(10).nbytes > live.peak


@pytest.mark.parametrize("items", LIMITS)
@pytest.mark.parametrize("what", ["uint8", "float"])
@pytest.mark.parametrize("resize", ["host", "device"])
def test_images_stay_under_the_limit(
    model: Model, monkeypatch: pytest.MonkeyPatch, items: int, what: str, resize: str
) -> None:
    count = 40
    pixels: Any = [np.full((50 + i, 80, 3), i, np.uint8) for i in range(count)]
    if what == "float":
        pixels = torch.randn(count, 3, 56, 56)
    limit = needed(model, items, what)
    if what == "uint8" and resize == "device":
        limit += crops.one_crop_bytes((56, 56), 3, type(model._runner))
    cut = limited_unchecked(limit, monkeypatch, resize=resize)
    with device_bytes(cut, monkeypatch) as live:
        rows = cut.encode_image(pixels)
        assert live.now == cut.held_bytes
    assert live.peak <= limit
    assert live.peak > limit / 2
    if resize == "host":
        assert torch.equal(rows, model.encode_image(pixels, batch_size=items))
    torch.testing.assert_close(rows, model.encode_image(pixels), rtol=1e-4, atol=1e-4)
    assert cut.trim() >= cut._runner._position_tables.held_bytes() == 0
    assert cut.held_bytes == 0
    if resize == "host":  # there the batches depend on how fast images are decoded
        assert torch.equal(rows, cut.encode_image(pixels))


@pytest.mark.parametrize("items", LIMITS)
def test_texts_stay_under_the_limit(
    model: Model, monkeypatch: pytest.MonkeyPatch, items: int
) -> None:
    dice = np.random.default_rng(0)
    texts = [" ".join(dice.choice(WORDS, dice.integers(1, 9))) for _ in range(200)]
    limit = needed(model, items, "texts")
    cut = limited_unchecked(limit, monkeypatch)
    with device_bytes(cut, monkeypatch) as live:
        rows = cut.encode_text(texts)
        assert live.now == cut.held_bytes == 0
    assert live.peak <= limit
    assert live.peak > limit / 4
    torch.testing.assert_close(rows, model.encode_text(texts), rtol=1e-4, atol=1e-4)


def test_4096_images_stay_under_the_limit(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the user names a batch size."""
    pixels = torch.randint(256, (4096, 56, 56, 3), dtype=torch.uint8)
    cut = limited("32M")
    assert cut._vision is not None
    with device_bytes(cut, monkeypatch) as live:
        rows = cut.encode_image(pixels.numpy(), batch_size=4096)
    assert (24 << 20) < live.peak <= (32 << 20)
    most = cut._runner.budget.most(
        4096, cut._vision.call(cut._vision.pooled_plan(True), (56, 56), 3 * 56 * 56)
    )
    assert most < 400
    for first in (0, 4096 // most * most):  # the first batch and the last, which is smaller
        part = slice(first, first + most)
        assert torch.equal(rows[part], model.encode_image(pixels[part].numpy(), batch_size=most))


def test_classify_stays_under_the_limit(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = [np.full((60, 60, 3), i, np.uint8) for i in range(30)]
    cut = limited("1M")
    with device_bytes(cut, monkeypatch) as live:
        probs = cut.classify(pixels, labels=list(WORDS)).probs
    assert live.peak <= 1 << 20
    torch.testing.assert_close(
        probs, model.classify(pixels, labels=list(WORDS)).probs, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("hidden", [False, True])
def test_outputs_of_forward_alone_do_not_count(
    model: Model, monkeypatch: pytest.MonkeyPatch, hidden: bool
) -> None:
    pixels, ids = torch.randn(64, 3, 56, 56), torch.randint(1, 600, (64, 24))
    ids[:, 9] = model.spec.text.eos if model.spec.text and model.spec.text.eos else 5
    cut = limited("2M")
    whole = model.forward(pixels, ids, output_hidden_states=hidden)
    with device_bytes(cut, monkeypatch) as live:
        output = cut.forward(pixels, ids, output_hidden_states=hidden)
        kept = live.now - cut.held_bytes
    # the parts of an output and the joined output live together
    assert live.peak <= (2 << 20) + 2 * kept
    assert output.status is not None
    assert whole.status is not None
    assert torch.equal(output.status, whole.status)
    for name in ("image_embeds", "text_embeds", "logits_per_text"):
        torch.testing.assert_close(
            getattr(output, name), getattr(whole, name), rtol=1e-4, atol=1e-4
        )
    for ours, theirs in (
        (output.vision_model_output, whole.vision_model_output),
        (output.text_model_output, whole.text_model_output),
    ):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(
            ours.last_hidden_state, theirs.last_hidden_state, rtol=1e-4, atol=1e-3
        )
        assert (ours.hidden_states is not None) == hidden
        for mine, its in zip(ours.hidden_states or (), theirs.hidden_states or (), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-3)


def test_layers_and_modules_run_in_parts(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, ids = torch.randn(50, 3, 56, 56), torch.randint(1, 600, (50, 24))
    cut = limited("1M")
    calls: list[int] = []
    run = cut._runner.run

    def counting(plan: Any, inputs: Any, *, batch: int, tokens: int, longest: int) -> Any:
        calls.append(batch)
        return run(plan, inputs, batch=batch, tokens=tokens, longest=longest)

    monkeypatch.setattr(cut._runner, "run", counting)
    for ours, theirs in (
        (cut.get_intermediate_layers(pixels, 2)[1], model.get_intermediate_layers(pixels, 2)[1]),
        (cut.as_module()(pixels), model.as_module()(pixels)),
        (cut.as_module("text")(ids), model.as_module("text")(ids)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert max(calls) < 50
    assert sum(calls) >= 150


def test_an_image_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block is looked for once the batch has given its memory back."""
    pixels = torch.randn(20, 3, 56, 56)
    pixels[13, 1] = float("nan")
    for module in ("images", "arguments"):
        monkeypatch.setattr(f"vitrail.model.{module}.check_pixels", lambda *_, **__: {})
    cut = limited("400K")
    result = cut.encode_image(pixels, on_error="skip")
    assert list(result.errors) == [13]
    assert "not finite" in result.errors[13]
    with pytest.raises(vitrail.VitrailError, match=r"image 13: .*not finite"):
        cut.get_intermediate_layers(pixels)


def test_a_limit_for_less_than_an_item_is_refused(model: Model) -> None:
    with pytest.raises(
        InputError, match=r"memory_limit: got 1,000 bytes, wanted (.*) or more"
    ) as e:
        limited(1000)
    least = least_limit(e.value)
    with pytest.raises(InputError, match="an image of 56x56 pixels needs them beyond the weights"):
        limited(least - 1)
    cut = limited(least)
    pixels = torch.randn(3, 3, 56, 56)
    torch.testing.assert_close(
        cut.encode_image(pixels), model.encode_image(pixels), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(OutOfMemoryError, match=f"memory_limit: got {least:,} bytes, and an image "):
        cut.encode_image(torch.randn(1, 3, 560, 560))
    with pytest.raises(OutOfMemoryError, match=r"560x560 pixels needs .* beyond the weights"):
        cut.encode_image([np.zeros((10, 10, 3), np.uint8)], size=(560, 560))
    assert torch.equal(cut.encode_image(pixels[:1]), model.encode_image(pixels[:1]))


@pytest.mark.parametrize("resize", ["host", "device"])
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("ViTForImageClassification", "bfloat16"),
        ("DeiTForImageClassificationWithTeacher", "float32"),
        ("Dinov2ForImageClassification", "float32"),
        ("Dinov2WithRegistersModel", "bfloat16"),
    ],
)
def test_every_call_fits_the_least_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, dtype: str, resize: Any
) -> None:
    """Photos of many sizes, floats, class scores, all hidden states."""
    save(make(architecture), tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    options: dict[str, Any] = {"device": "cpu", "dtype": dtype, "resize": resize}
    with pytest.raises(InputError) as refused:
        vitrail.load(tmp_path, memory_limit=1, **options)
    limit = least_limit(refused.value)
    cut, whole = (vitrail.load(tmp_path, memory_limit=n, **options) for n in (limit, None))
    dice = np.random.default_rng(0)
    shapes = dice.integers(20, 900, (12, 2))
    photos = [dice.integers(0, 256, (*map(int, shape), 3), np.uint8) for shape in shapes]
    pixels = torch.randn(9, 3, 32, 32)
    calls = [lambda model: model.encode_image(photos), lambda model: model.encode_image(pixels)]
    if cut.spec.head is not None:
        calls.append(lambda model: model.classify(photos).logits)
    for call in calls:
        with device_bytes(cut, monkeypatch) as live:
            ours = call(cut)
        assert limit / 3 < live.peak <= limit
        wide = 1e-3 if dtype == "float32" else 0.1
        torch.testing.assert_close(ours, call(whole), rtol=wide, atol=wide)
    with device_bytes(cut, monkeypatch) as live:
        output = cut.forward(pixels, output_hidden_states=True)
        kept = live.now - cut.held_bytes
    assert output.hidden_states is not None
    assert live.peak <= limit + 2 * kept


def test_an_image_too_large_to_resize_there_is_resized_on_the_host() -> None:
    photos = [np.random.default_rng(i).integers(0, 256, s, np.uint8) for i, s in enumerate(SHAPES)]
    cut = limited("1M", resize="device")
    exact = vitrail.load(demo.bundled(), device="cpu", resize="device")
    for photo in photos:
        assert torch.equal(cut.encode_image(photo), exact.encode_image(photo))


SHAPES = ((2000, 1500, 3), (60, 70, 3), (900, 1200, 3))


def test_threads_share_the_limit() -> None:
    cut, seen = limited("1M"), list[int]()
    budget = cut._runner.budget
    run = cut._runner.run

    def watching(*arguments: Any, **options: Any) -> Any:
        seen.append(budget.held)
        return run(*arguments, **options)

    cut._runner.run = watching  # type: ignore[method-assign]
    pixels = torch.randn(6, 12, 3, 56, 56)
    alone = [cut.encode_image(batch) for batch in pixels]
    barrier = threading.Barrier(6)

    def work(number: int) -> Tensor:
        barrier.wait(timeout=60)
        return cut.encode_image(pixels[number])

    with ThreadPoolExecutor(6) as threads:
        running = [threads.submit(work, number) for number in range(6)]
        for number, thread in enumerate(running):
            assert torch.equal(thread.result(timeout=60), alone[number])
    assert max(seen) <= 1 << 20
    assert budget.held == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_workspace_is_what_pytorch_allocates(dtype: torch.dtype) -> None:
    """Measured within each step, for images, texts of one length, and texts of several."""
    served = vitrail.load(demo.bundled(), device="cpu", dtype=dtype)
    assert served._vision is not None
    assert served._text is not None
    runner, peaks = served._runner, list[int]()
    step = runner.run_step

    def counting(*arguments: Any) -> None:
        with LiveBytes("cpu") as live:
            step(*arguments)
        peaks.append(live.peak)

    runner.run_step = counting  # type: ignore[method-assign]
    for batch in (1, 2, 7):
        for uint8 in (True, False):
            plan = served._vision.pooled_plan(uint8)
            pixels = torch.zeros(batch, 56, 56, 3, dtype=torch.uint8)
            peaks.clear()
            served._vision.embeddings(pixels if uint8 else torch.zeros(batch, 3, 56, 56))
            longest = served._vision.spec.tokens_at((56, 56))
            assert max(peaks) <= workspace_bytes(plan, batch, longest, dtype) <= 4 * max(peaks)
        for lengths in ([24] * batch, [24 - i for i in range(batch)]):
            texts = TokenIds.of([[5] * length for length in lengths])
            peaks.clear()
            served._text.embeddings(texts)
            plan = text_pooled(served._text.spec)
            assert max(peaks) <= workspace_bytes(plan, batch, 24, dtype)


@needs_native
@pytest.mark.parametrize("family", [*VISION, "text"])
@pytest.mark.parametrize("items", [1, 3, 17, 100])
def test_the_native_backend_rounds_up_within_the_limit(
    tmp_path: Path, libcuda: standin.Standin, family: str, items: int
) -> None:
    runner = open_native(libcuda, tmp_path, family)
    dice = np.random.default_rng(items)
    if family in VISION:
        spec, head = VISION[family], HEADS.get(family)
        tower = VisionTower(spec, head, runner)
        for scores in (False, True)[: 1 + (head is not None)]:
            plan, pixels = tower.pooled_plan(True, scores), images(3 * items + 1, spec.image)
            run = tower.scores if scores else tower.embeddings

            def compute(part: slice, run: Any = run, pixels: Tensor = pixels) -> None:
                run(pixels[part])

            compute(slice(0, 1))  # lowers the plan
            call = tower.call(plan, spec.image, pixels[0].numel())
            runner.trim()
            runner.budget.limit = call.nbytes(items)
            assert runner.budget.most(1000, call) >= items
            with LiveBytes("cpu") as live:
                tower.in_parts(lambda plan=plan: plan, pixels, compute)
            assert runner.budget.limit / 3 < live.peak <= runner.budget.limit
            runner.budget.limit = None
    else:
        texts = TextTower(TEXT, runner)
        ids = TokenIds.of([[1] * int(n) for n in dice.integers(1, TEXT.context + 1, 4 * items)])
        texts.embeddings(ids.take(np.array([0])))
        call = texts._footprint.text_call(text_pooled(TEXT), TEXT.context)
        runner.budget.limit = call.nbytes(items)
        with LiveBytes("cpu") as live:
            for batch in texts.batches(ids.lengths, 1000, 1 << 30):
                with texts.hold(ids.lengths[batch]):
                    texts.embeddings(ids.take(batch))
        assert runner.budget.limit / 4 < live.peak <= runner.budget.limit


# -- what waits for the next call ------------------------------------------------------------------


def test_trim_gives_back_what_waits(model: Model) -> None:
    ARENAS.trim()
    pixels = torch.randn(4, 3, 56, 56)
    rows = model.encode_image(pixels)
    tables = model._runner._position_tables.held_bytes()
    assert model._vision is not None
    plan = model._vision.pooled_plan(uint8=False)
    arena = plan.arena_bytes(4, 4 * model._vision.spec.tokens_at((56, 56)))
    assert tables > 0
    assert model.held_bytes == tables + arena
    assert model.trim() == tables + arena
    assert model.held_bytes == 0
    assert model.trim() == 0
    assert torch.equal(model.encode_image(pixels), rows)


def test_models_share_idle_arenas_and_a_dropped_one_leaves_none() -> None:
    ARENAS.trim()
    pixels = torch.randn(4, 3, 56, 56)
    one, two = limited(None), limited(None)
    one.encode_image(pixels)
    (arena,) = (arena for arena, _ in ARENAS._idle)
    two.encode_image(pixels)
    assert [idle.data_ptr() for idle, _ in ARENAS._idle] == [arena.data_ptr()]
    assert one._runner._position_tables.held_bytes() == one.held_bytes
    assert two.held_bytes > arena.numel()
    del one
    assert len(ARENAS._idle) == 1
    nbytes = arena.numel()
    del arena
    assert ARENAS.held_bytes(two._runner._owner) == nbytes
    gc.disable()
    try:
        del two
        assert ARENAS._idle == []
    finally:
        gc.enable()


def test_a_model_with_a_limit_leaves_no_arena() -> None:
    ARENAS.trim()
    cut = limited("2M")
    cut.encode_image(torch.randn(4, 3, 56, 56))
    assert ARENAS._idle == []
    assert cut.held_bytes == cut._runner._position_tables.held_bytes()


def test_the_limit_goes_with_the_load_arguments() -> None:
    cut = limited("2M")
    assert cut.memory_limit == 2 << 20
    assert cut.load_arguments is not None
    assert cut.load_arguments.memory_limit == 2 << 20
    again = vitrail.model.loading.load_again(cut.load_arguments)
    assert again.memory_limit == 2 << 20
    assert again.fingerprint == cut.fingerprint
    assert limited(None).memory_limit is None
    replicas = vitrail.load_replicas(demo.bundled(), devices=["cpu", "cpu"], memory_limit="2M")
    assert [one.memory_limit for one in replicas.models] == [2 << 20] * 2
