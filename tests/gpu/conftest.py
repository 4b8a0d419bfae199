"""Fixtures of the GPU tests: kernels compiled ahead by all cores, and the models.

A test that loses the device ends the session, because no later test could run. A test that takes
longer than VITRAIL_GPU_TEST_SECONDS, if that is set, ends the process with the stacks of its
threads.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gpu.common import DRY
from gpu.models import Zoo

if DRY:  # NumPy's products depend on the position of a row in a tile
    from interpreted.conftest import ordered_dot  # noqa: F401


TERMINAL = pytest.StashKey[int]()
"""A descriptor of the real stderr, which no test captures."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TERMINAL] = os.dup(2)


def limit(config: pytest.Config) -> None:
    """Start the limit of VITRAIL_GPU_TEST_SECONDS. No Python signal reaches a thread that waits for
    a kernel that never ends."""
    seconds = float(os.environ.get("VITRAIL_GPU_TEST_SECONDS", "0"))
    if seconds > 0:
        faulthandler.dump_traceback_later(seconds, exit=True, file=config.stash[TERMINAL])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    limit(item.config)
    if "VITRAIL_GPU_TEST_SECONDS" in os.environ:
        os.write(item.config.stash[TERMINAL], f"{item.nodeid}\n".encode())
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In a dry run there is no GPU, and these tests run all the same."""
    if DRY:
        for item in items:
            if item.get_closest_marker("gpu"):
                marks = item.own_markers
                marks[:] = [m for m in marks if "no CUDA device" not in m.kwargs.get("reason", "")]


@pytest.fixture(scope="session")
def kernels(request: pytest.FixtureRequest) -> None:
    """Compile the kernels of the chosen modules into Triton's cache, with a process for every core.

    Compiled at their first launches, in turn, they would take many times as long. A failure here
    is only printed: it fails again in the test that needs the kernel.
    """
    if DRY:
        return
    faulthandler.cancel_dump_traceback_later()  # that process has a limit of its own
    modules = sorted({item.path.stem for item in request.session.items})
    every_dtype = any("bfloat16" in item.nodeid for item in request.session.items)
    card = torch.cuda.get_device_properties()
    target = [f"{card.major}{card.minor}", str(card.multi_processor_count)]
    target += [] if every_dtype else ["--float16"]
    # not the root, in whose kernels/ transformers would see a package
    paths = [path for path in sys.path if path not in ("", str(request.config.rootpath))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-P", "-m", "gpu.precompile", *target, *modules]
    subprocess.run(command, env=environment, check=False)
    limit(request.config)


@pytest.fixture(scope="session")
def zoo(kernels: None, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """All kernels, with empty caches during the test."""
    from triton.runtime.jit import JITFunction

    by_id = {
        id(value): value
        for path, module in list(sys.modules.items())
        if path.startswith("vitrail_kernels.")
        for value in vars(module).values()
        if isinstance(value, JITFunction)
    }
    torch.cuda.synchronize()
    for kernel in by_id.values():
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    yield list(by_id.values())
    torch.cuda.synchronize()


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Free the memory that a test leaves, if the GPU still answers."""
    yield
    if DRY:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"the device is lost to this process: {error}")
    torch.cuda.empty_cache()
