"""Too little memory on the device: a batch goes through in halves, to the same bits."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import vitrail
from vitrail.demo import demo
from vitrail.errors import DeviceError, OutOfMemoryError
from vitrail.model.model import Model
from vitrail.plan.plan import Plan
from vitrail.runtime import RUNNERS
from vitrail.runtime.torch_runner import TorchRunner

TEXTS = ["a", "red circle", "a blue square", "two green stars on red", "b", "c d", "e f g", "h"]


class Small(TorchRunner):
    """Memory for ``most`` sequences at once."""

    most = 3
    batches: list[int]

    def run(
        self, plan: Plan, inputs: Mapping[str, Tensor], *, batch: int, tokens: int, longest: int
    ) -> dict[str, Tensor]:
        if batch > self.most:
            raise OutOfMemoryError(f"got {batch} sequences, wanted {self.most} or fewer")
        if plan.inputs:  # not the position table
            Small.batches.append(batch)
        return super().run(plan, inputs, batch=batch, tokens=tokens, longest=longest)


@pytest.fixture(autouse=True)
def forgotten() -> None:
    Small.most, Small.batches = 3, []


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Model:
    with monkeypatch.context() as patch:
        patch.setitem(RUNNERS, "torch", Small)
        return vitrail.load(demo.bundled(), device="cpu")


@pytest.fixture(scope="module")
def model() -> Model:
    return vitrail.load(demo.bundled(), device="cpu")


def test_images_have_the_bits_of_batches_that_fit(small: Model, model: Model) -> None:
    images = [torch.randint(256, (60 + i, 64, 3), dtype=torch.uint8) for i in range(8)]
    assert torch.equal(small.encode_image(images), model.encode_image(images, batch_size=2))
    assert Small.batches == [2] * 4


def test_a_bad_image_costs_no_other_when_a_batch_is_split(small: Model) -> None:
    images = torch.randn(8, 3, 64, 64)
    images[5, 0, 0, 0] = float("nan")
    result = small.encode_image(images, on_error="skip")
    assert result.index == (0, 1, 2, 3, 4, 6, 7)
    assert list(result.errors) == [5]


def test_texts_have_the_bits_of_batches_that_fit(small: Model, model: Model) -> None:
    assert torch.equal(small.encode_text(TEXTS), model.encode_text(TEXTS, batch_size=2))
    assert Small.batches == [2] * 4


def test_scores_too(small: Model, model: Model) -> None:
    images = [torch.randint(256, (64, 64, 3), dtype=torch.uint8) for _ in range(4)]
    classified = small.classify(images, labels=TEXTS)
    expected = model.classify(images, labels=TEXTS, batch_size=2)
    torch.testing.assert_close(classified.logits, expected.logits)


def test_an_item_that_does_not_fit_alone_is_an_error(small: Model) -> None:
    Small.most = 0
    with pytest.raises(OutOfMemoryError, match="got 1 sequences"):
        small.encode_image(torch.randn(2, 3, 64, 64))
    with pytest.raises(DeviceError, match="got 1 sequences"):
        small.encode_text(TEXTS)
