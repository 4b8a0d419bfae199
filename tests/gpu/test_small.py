"""Small models once through every kernel, forward and back, for compute-sanitizer.

`compute-sanitizer python -m pytest tests/gpu/test_small.py`. What is compared with is computed on
the CPU, so that the only kernels it sees are ours and those that move tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import vitrail
import vitrail_kernels
from gpu.common import DEVICE, sync
from gpu.models import BUNDLED, HALF, RUNNER, SERVES, SMALL
from gpu.test_resize import Batch, assert_same_bytes
from helpers import arguments, assert_close, make, save
from vitrail.plan.lowering import NativePlan
from vitrail.runtime.native import NativeRunner
from vitrail_kernels.launch import Call

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

LAUNCHED: set[str] = set()
"""The kernels that the tests of this file have launched so far."""


@pytest.fixture(autouse=True)
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    launch, load = Call.launch, NativeRunner._load

    def note(call: Call) -> None:
        if call.grid.blocks:
            LAUNCHED.add(call.kernel.__name__)
        launch(call)

    def note_loaded(runner: NativeRunner, key: str, program: NativePlan) -> None:
        """C++ is given a kernel for the call that launches it."""
        LAUNCHED.add(program.calls[key].kernel.__name__)
        load(runner, key, program)

    monkeypatch.setattr(Call, "launch", note)
    monkeypatch.setattr(NativeRunner, "_load", note_loaded)
    yield
    sync()


def opened(folder: Path) -> tuple[vitrail.Model, vitrail.Model, vitrail.Model]:
    """In fp16 by our kernels; on the CPU by PyTorch, in fp32 and fp16: R and P."""
    ours = vitrail.load(folder, device=DEVICE, dtype=HALF, backend=RUNNER)
    assert ours.backend == SERVES
    exact, peer = (
        vitrail.load(folder, device="cpu", dtype=dtype, backend="torch")
        for dtype in (torch.float32, HALF)
    )
    return ours, exact, peer


@pytest.mark.parametrize("architecture", SMALL)
def test_a_small_model(architecture: str, tmp_path: Path) -> None:
    """Every field of forward, at its own size and another, the embeddings and class scores."""
    theirs = save(make(architecture, **SMALL[architecture]), tmp_path, dtype=HALF)
    ours, exact, peer = opened(tmp_path)
    for size in (None, (51, 38)):
        given = arguments(architecture, theirs.config, batch=3, size=size)
        fields = [
            model.forward(**given, output_hidden_states=True) for model in (ours, exact, peer)
        ]
        for name in ("last_hidden_state", "pooler_output", "logits", "image_embeds"):
            y, r, p = (getattr(field, name) for field in fields)
            assert (y is None) == (r is None), name
            if y is not None and name == "logits":
                assert_close(y.cpu(), r, p.to(HALF), what="scores", name=name)
            elif y is not None:
                assert_close(y.cpu(), r, p.to(HALF), what="model", name=name)
        y, r, p = (model.encode_image(given["pixel_values"]) for model in (ours, exact, peer))
        assert_close(y, r, p.to(HALF), what="model", name="encode_image")
        if ours.spec.head is not None:
            found = (model.classify(given["pixel_values"]) for model in (ours, exact, peer))
            y, r, p = (one.logits for one in found)
            assert_close(y, r, p.to(HALF), what="scores", name="classify")
        if "input_ids" in given:
            y, r, p = (model.encode_text(given["input_ids"]) for model in (ours, exact, peer))
            assert_close(y, r, p.to(HALF), what="model", name="encode_text")


def test_the_bundled_model_on_bytes_and_strings() -> None:
    ours, exact, peer = opened(BUNDLED)
    images = torch.randint(256, (3, 70, 56, 3), dtype=torch.uint8).numpy()
    words = ["a red star", "a circle on the left", "two"]
    y, r, p = (model.encode_image(list(images)) for model in (ours, exact, peer))
    assert_close(y, r, p.to(HALF), what="model", name="uint8 images")
    y, r, p = (model.encode_text(words) for model in (ours, exact, peer))
    assert_close(y, r, p.to(HALF), what="model", name="strings")


def test_a_small_batch_to_resize() -> None:
    batch = Batch(((30, 41), (9, 70)), ((24, 33), (16, 16)), ((2, 5), (-1, 3)), (20, 24), 3)
    assert_same_bytes(batch, channels=3)


def test_every_kernel_was_launched() -> None:
    """By the tests above; run this file as a whole."""
    every = {
        name
        for path, module in list(sys.modules.items())
        if path.startswith("vitrail_kernels.")
        for name in vars(module)
        if name.startswith("_") and name.endswith("_kernel")
    }
    assert every - LAUNCHED == set()
    assert len(every) >= len(vitrail_kernels.OPERATORS), "the search finds no kernels"
