"""Devices that the tests of compiled kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import standin
from emulated.device import Device
from vitrail.runners import native
from vitrail_kernels.launch import MISSING, interpreted

SMS = 2
"""So few multiprocessors that small batches reach every step of the tables of configurations."""


def why_not() -> str | None:
    """Why no kernel can be compiled and emulated in this process, or None."""
    if MISSING is not None:
        return "triton is not installed"
    if interpreted():
        return "Triton's interpreter is on, which compiles nothing"
    if native.MISSING is not None:
        return "vitrail._C is not built"
    return None if standin.compiler() else "there is no C++ compiler"


@pytest.fixture(scope="session", params=[80, 90], ids=lambda arch: f"sm_{arch}")
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Device:
    if (reason := why_not()) is not None:
        pytest.skip(f"emulated kernels: {reason}")
    return Device(tmp_path_factory.mktemp("device"), request.param, SMS)


@pytest.fixture
def device(opened: Device) -> Iterator[Device]:
    """Of sm_80 and of sm_90, without what an earlier test's fault left."""
    opened.driver.reset()
    yield opened
    opened.driver.reset()
