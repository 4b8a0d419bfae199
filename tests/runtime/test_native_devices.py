"""The native runner on two devices of a driver stand-in: each launch is on its runner's device."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import standin
from runtime.test_native import Runner, digest, ids_of, open_native, pytestmark
from runtime.test_runner import CPU, TEXT, VISION, images, read, see
from vitrail.errors import DeviceError, OutOfMemoryError
from vitrail.image.preprocess import decode_crop_tasks
from vitrail.model.crops import pack, resized
from vitrail.plan.text import text_pooled
from vitrail.plan.vision import vision_pooled
from vitrail.runtime.native import NativeRunner
from vitrail.spec import ImageSpec

__all__ = ["pytestmark"]
SMS = 2
STICKY = 719  # CUDA_ERROR_LAUNCH_FAILED


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[standin.Standin]:
    """Two devices of sm_90, and complaints only of what a test has planted."""
    opened = standin.own(tmp_path, SMS)
    assert opened.add_device(9, 0, SMS) == 1
    opened.record(True)
    yield opened
    assert opened.complaint() == ""
    opened.reset()


def open_pair(driver: standin.Standin, folder: Path, family: str) -> list[NativeRunner]:
    first = open_native(driver, folder, family)
    return [first, Runner(first.weights, first.dtype, CPU, str(driver.path), ordinal=1)]


def result(runner: NativeRunner, ids: Sequence[Tensor]) -> int:
    ends = [len(row) - 1 for row in ids]
    return digest(read(runner, text_pooled(TEXT), list(ids), ends)["text.embedding"])


def test_each_runner_launches_on_its_device(driver: standin.Standin, tmp_path: Path) -> None:
    """Kernels, position tables and images of other sizes, in turn on one thread."""
    pair, spec = open_pair(driver, tmp_path, "clip"), VISION["clip"]
    plan = vision_pooled(spec, uint8=True)
    for size in (spec.image, (21, 35)):
        pixels = images(3, size)
        launched = []
        for runner in (pair[1], pair[0]):
            see(runner, spec, plan, pixels)
            launched.append(driver.launched())
            driver.reset()
            driver.record(True)
        assert [{launch.device for launch in one} for one in launched] == [{1}, {0}]
        other, first = ([(one.name, one.grid, one.digest) for one in run] for run in launched)
        assert other == first


@contextmanager
def current(driver: standin.Standin, ordinal: int) -> Iterator[int]:
    """The context of a device, current on this thread as a program beside Vitrail has it."""
    cuda, context = driver.driver, ctypes.c_void_p()
    assert cuda.cuInit(0) == 0
    assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal) == 0
    assert cuda.cuCtxPushCurrent_v2(context) == 0
    yield context.value or 0
    assert cuda.cuCtxPopCurrent_v2(None) == 0
    assert cuda.cuDevicePrimaryCtxRelease_v2(ordinal) == 0


@pytest.mark.parametrize("ordinal", [0, 1])
def test_a_context_that_is_current_is_left_so(
    driver: standin.Standin, tmp_path: Path, ordinal: int
) -> None:
    """While models are opened, kernels loaded and launched, and all is given back."""
    with current(driver, ordinal) as context:
        pair, ids = open_pair(driver, tmp_path, "text"), ids_of([5, 9])
        results = [result(runner, ids) for runner in pair for _ in range(2)]
        assert len(set(results)) == 1
        devices = [launch.device for launch in driver.launched()]
        half = len(devices) // 2
        assert devices == [0] * half + [1] * half
        found = ctypes.c_void_p()
        assert driver.driver.cuCtxGetCurrent(ctypes.byref(found)) == 0
        assert found.value == context
        del pair
        gc.collect()
        assert driver.live(1 - ordinal) == standin.Live(*[0] * 7)
        assert driver.live(ordinal) == standin.Live(*[0] * 6, 1)


def test_threads_on_both_devices_get_what_each_gets_alone(
    driver: standin.Standin, tmp_path: Path
) -> None:
    """From the first call on, in which kernels are loaded."""
    pair = open_pair(driver, tmp_path, "text")
    batches = [ids_of(lengths) for lengths in ([3, 3], [9, 2], [24] * 7, [5, 5, 20])]
    alone = Runner(pair[0].weights, torch.float16, CPU, str(driver.path), ordinal=0)
    expected = [result(alone, ids) for ids in batches]
    of_a_call = driver.launches() // len(batches)
    driver.record(False)
    before = [driver.launches(device) for device in (0, 1)]
    work = [(runner, number) for number in range(len(batches)) for runner in pair] * 12
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda one: result(one[0], batches[one[1]]), work))
    assert results == [expected[number] for _, number in work]
    launches = [driver.launches(device) - before[device] for device in (0, 1)]
    assert launches == [of_a_call * len(work) // 2] * 2


def test_a_lost_device_is_an_error_of_its_runner_alone(
    driver: standin.Standin, tmp_path: Path
) -> None:
    pair, ids = open_pair(driver, tmp_path, "text"), ids_of([5, 9])
    expected = [result(runner, ids) for runner in pair]
    assert expected[0] == expected[1]
    driver.fail_launch(3, STICKY, device=1)
    for _ in range(3):
        with pytest.raises(DeviceError, match="CUDA_ERROR_LAUNCH_FAILED"):
            result(pair[1], ids)
        assert result(pair[0], ids) == expected[0]
    driver.reset()
    driver.fail_launch(2, 2, device=0)
    assert result(pair[1], ids) == expected[1]
    with pytest.raises(OutOfMemoryError, match="qkv: cuLaunchKernelEx"):
        result(pair[0], ids)
    driver.reset()
    assert [result(runner, ids) for runner in pair] == expected


def test_any_call_that_fails_on_one_device_is_its_runners_error(
    driver: standin.Standin, tmp_path: Path
) -> None:
    """While kernels are loaded; the other device has the same bits before, meanwhile and after."""
    pair, ids = open_pair(driver, tmp_path, "text"), ids_of([5, 9])
    weights, library = pair[0].weights, str(driver.path)
    expected = result(pair[0], ids)
    before = driver.calls(1)
    assert result(Runner(weights, torch.float16, CPU, library, ordinal=1), ids) == expected
    calls, kinds = driver.calls(1) - before, set[type[Exception]]()
    assert calls > 50
    for number in range(1, calls, 13):
        fresh = Runner(weights, torch.float16, CPU, library, ordinal=1)
        driver.fail(number, (2, 701)[number % 2], device=1)
        try:
            assert result(fresh, ids) == expected
        except (DeviceError, OutOfMemoryError) as error:
            kinds.add(type(error))
        assert result(pair[0], ids) == expected
        driver.reset()
        assert result(fresh, ids) == expected
    assert kinds == {DeviceError, OutOfMemoryError}


def test_both_resize_on_their_device(driver: standin.Standin, tmp_path: Path) -> None:
    """By the CUDA kernels, if they are built, or by Triton's."""
    pair = open_pair(driver, tmp_path, "clip")
    dice = np.random.default_rng(0)
    pictures: list[Any] = [dice.integers(0, 256, (40, 50, 3), dtype=np.uint8) for _ in range(3)]
    spec = ImageSpec(True, ("shortest", 24), 3, (24, 24), 1 / 255, (0.5,) * 3, (0.5,) * 3)
    tasks = decode_crop_tasks(pictures, spec, 3, stop_bytes=1 << 30)
    devices = []
    for runner in pair:
        assert runner.resizer
        driver.reset()
        driver.record(True)
        resized(pack(tasks, False), runner)
        devices.append({launch.device for launch in driver.launched()})
    assert devices == [{0}, {1}]
