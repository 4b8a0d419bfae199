"""Devices that the tests of compiled kernels share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import standin
from emulated.device import Device, EmulatedRunner
from emulated.tiny import Open, Tiny
from emulator.call import run_call
from helpers import HALVES
from runtime.test_runner import HEADS, TEXT, VISION, open_runner
from vitrail.runtime import native
from vitrail_kernels.launch import MISSING, Call, interpreted

SMS = 2
"""So few multiprocessors that small batches reach every step of the tables of configurations."""


QUICK = ((80, torch.bfloat16), (90, torch.float16))
"""The pairs of architecture and dtype in which `make test` runs `THOROUGH`; the others are slow, as
each takes as many kernels to compile as several whole models."""
THOROUGH = ("test_batches.py", "test_models.py", "test_triton_runner.py")
QUICK_INT8 = ((80, "dinov2"), (90, "vit"))
"""The same for `test_int8_models.py`: architecture and family."""


@pytest.hookimpl(tryfirst=True)  # before -m takes items away
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        pair = parameters.get("opened"), parameters.get("dtype")
        if item.path.name in THOROUGH and None not in pair and pair not in QUICK:
            item.add_marker(pytest.mark.slow)
        pair = parameters.get("opened"), parameters.get("family")
        if item.path.name == "test_int8_models.py" and pair not in QUICK_INT8:
            item.add_marker(pytest.mark.slow)


def why_not() -> str | None:
    """Why no kernel can be compiled and emulated in this process, or None."""
    if MISSING is not None:
        return "triton is not installed"
    if interpreted():
        return "Triton's interpreter is on, which compiles nothing"
    return None if standin.compiler() else "there is no C++ compiler"


@pytest.fixture(scope="module")
def emulated_kernels(one_thread: None) -> None:
    """Skips tests if no kernel can be compiled and emulated; their references use one thread."""
    if (reason := why_not()) is not None:
        pytest.skip(f"emulated kernels: {reason}")


@pytest.fixture(scope="session", params=[80, 90], ids=lambda arch: f"sm_{arch}")
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Device:
    reason = why_not() or ("vitrail._C is not built" if native.MISSING is not None else None)
    if reason is not None:
        pytest.skip(f"emulated kernels: {reason}")
    return Device(tmp_path_factory.mktemp("device"), request.param, SMS)


@pytest.fixture
def device(opened: Device) -> Iterator[Device]:
    """Of sm_80 and of sm_90, without what an earlier test's fault left."""
    opened.driver.reset()
    yield opened
    opened.driver.reset()


@pytest.fixture(params=HALVES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture
def tiny(
    device: Device, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Open]:
    monkeypatch.setenv(native.OVERLAP, "1")
    opened: list[EmulatedRunner] = []

    def open_tiny(family: str) -> Tiny:
        vision, text = (None, TEXT) if family == "text" else (VISION[family], None)
        tensors, reference = open_runner(tmp_path, vision, text, HEADS.get(family), dtype)
        opened.append(EmulatedRunner(device, reference.weights, dtype))
        return Tiny(tensors, opened[-1], device, dtype)

    yield open_tiny
    for runner in opened:
        runner.close()


@pytest.fixture
def python_seed(device: Device, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number, the seed of all launches from Python, which run as compiled for ``device``."""
    seed = [0]

    def launch(call: Call) -> None:
        if call.grid.blocks:
            run_call(call, device.arch, seed=seed[0], track=False)

    monkeypatch.setattr(Call, "launch", launch)
    for name, module in list(sys.modules.items()):
        if name.startswith(("vitrail.", "vitrail_kernels.")) and hasattr(module, "target_of"):
            monkeypatch.setattr(module, "target_of", lambda tensor: device.target)
    return seed
