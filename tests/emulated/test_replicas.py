"""Replicas on two emulated devices have the bits of one model on one device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vitrail
from emulated.conftest import SMS, why_not
from emulated.device import Device, EmulatedRunner, served_by
from emulated.exports import CHECKPOINTS, SIDE
from vitrail.errors import OutOfMemoryError
from vitrail.runtime import native
from vitrail.weights.layout import Weights

TEXTS = ["a cat", "a photo of a dog", "the sea at night", "cat", "a", "red mat", "old panes", "dog"]
LARGE, BATCHES = 8, (1, 2, 3, 8)


class ShortRunner(EmulatedRunner):
    """Its device has no room for the activations of more than ``most`` sequences."""

    most = LARGE
    refused = 0

    def _outputs(self, cached: Any, inputs: Any, size: Any) -> dict[str, Tensor]:
        if size[0] > self.most:
            self.refused += 1
            raise OutOfMemoryError(f"no room for {size[0]}")
        return super()._outputs(cached, inputs, size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (reason := why_not()) or native.MISSING is not None:
        pytest.skip(f"emulated kernels: {reason or 'vitrail._C is not built'}")
    folder = tmp_path_factory.mktemp("clip")
    CHECKPOINTS["clip"](folder)
    return folder


Load = Callable[..., tuple[Any, list[Device]]]


@pytest.fixture
def load(folder: Path, tmp_path: Path) -> Iterator[Load]:
    """A model or replicas on the devices of a stand-in of their own; without a complaint of it."""
    runners: list[EmulatedRunner] = []
    stand_ins: list[Device] = []

    def load_on(count: int) -> tuple[Any, list[Device]]:
        base = tmp_path / str(count)
        base.mkdir()
        devices = [Device(base, 90, SMS)]
        devices += [Device(base, 90, SMS, beside=devices[0]) for _ in range(count - 1)]
        waiting = list(devices)

        def open_runner(weights: Weights, dtype: torch.dtype, exported: Any) -> EmulatedRunner:
            own = copy.deepcopy(weights)  # in memory of their own, as on another GPU
            runners.append(ShortRunner(waiting.pop(0), own, dtype, exported))
            return runners[-1]

        options: dict[str, Any] = {"dtype": "float16", "backend": "native"}
        with served_by(open_runner, devices[0].target):
            if count == 1:
                loaded: Any = vitrail.load(folder, device="cpu", **options)
            else:
                loaded = vitrail.load_replicas(folder, devices=["cpu"] * count, **options)
        devices[0].driver.record(True)
        stand_ins.append(devices[0])
        return loaded, devices

    yield load_on
    for device in stand_ins:
        assert device.driver.complaint() == ""
    for runner in runners:
        runner.close()


def pictures(count: int) -> list[Any]:
    dice = np.random.default_rng(0)
    return [dice.integers(0, 256, (SIDE + 9, SIDE + 4, 3), dtype=np.uint8) for _ in range(count)]


def test_replicas_on_two_devices_have_the_bits_of_one(load: Load) -> None:
    """For images and texts in batches of 1, 2, 3 and 8; then with one device short of memory, whose
    batches are halved."""
    one, _ = load(1)
    images, texts = one.encode_image(pictures(LARGE)), one.encode_text(TEXTS)
    pair, (first, second) = load(2)
    assert pair.fingerprint == one.fingerprint
    driver = first.driver
    assert second.driver is driver
    short = pair.models[1]._vision.runner
    for most in (LARGE, 1):
        short.most, short.refused = most, 0
        for count in BATCHES:
            driver.reset()
            driver.record(True)
            assert torch.equal(pair.encode_image(pictures(count)), images[:count]), count
            assert torch.equal(pair.encode_text(TEXTS[:count]), texts[:count]), count
            if count > 1:
                assert {launch.device for launch in driver.launched()} == {0, 1}, count
        assert (short.refused > 0) == (most == 1)
    assert driver.launches(0) > 100
    assert driver.launches(1) > 100


def test_a_batch_size_and_labels_change_no_bit(load: Load) -> None:
    one, _ = load(1)
    pair, _ = load(2)
    labels = ["cat", "dog"]
    alone, spread = (
        model.classify([*pictures(5), b"no image"], labels, on_error="skip", batch_size=2)
        for model in (one, pair)
    )
    assert torch.equal(spread.probs, alone.probs)
    assert (spread.index, spread.errors) == (alone.index, alone.errors)
    pixels = one.preprocess(pictures(5))
    assert torch.equal(pair.encode_image(pixels, batch_size=3), one.encode_image(pixels))
