"""Settings of every test: no network, fixed seeds; and a count of the tests that did not run."""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before huggingface_hub is imported, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest

try:
    import hypothesis
except ImportError:  # the GPU tests, which do not use it, may run without it
    hypothesis = None

CLIP = Path(__file__).parents[1] / "engine/vitrail/assets/clip"
NOT_RUN = {
    "gpu": "they need a CUDA device",
    "interpreted": "make test runs them apart, with TRITON_INTERPRET=1",
    "machine": "make test runs them alone, after the others",
    "slow": "make test-all runs them",
}
"""The counted marks, and why their tests may not have run."""
COUNTS = "vitrail-counts"
"""Where a `pytest.Config` and the output of a worker keep the number of collected tests by mark."""

if hypothesis is not None:
    hypothesis.settings.register_profile("local", deadline=None)
    hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One torch thread: splitting tensors this small costs more than computing them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The driver stand-in (`standin.Standin`) for this module, with two multiprocessors."""
    import standin
    from vitrail.runtime import native

    if native.MISSING is not None or not standin.compiler():
        pytest.skip("needs vitrail._C and a C++ compiler")
    return standin.own(tmp_path_factory.mktemp("driver"), 2)


@pytest.fixture(scope="session")
def int8_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled CLIP as `vitrail quantize` writes it. Tests change copies of this folder."""
    from vitrail.tools.quantize import quantize_model

    folder = tmp_path_factory.mktemp("int8") / "clip"
    quantize_model(CLIP, folder, device="cpu")
    return folder


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports whose kernels are names alone: enough for what runs on a CPU."""
    from vitrail.tools import export

    monkeypatch.setattr(export, "kernel_record", lambda key, call, arch: f"{key} {arch}".encode())


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Random numbers that do not depend on the tests before."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)  # before -m removes items
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = {mark: [i for i in items if i.get_closest_marker(mark)] for mark in NOT_RUN}
    setattr(config, COUNTS, {mark: len(tests) for mark, tests in marked.items()})
    if marked["gpu"] and not _cuda():
        for item in marked["gpu"]:
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device"))
    if os.environ.get("TRITON_INTERPRET") != "1" and not os.environ.get("VITRAIL_EMULATED"):
        for item in marked["interpreted"]:
            item.add_marker(pytest.mark.skip(reason="interpreted: TRITON_INTERPRET is not 1"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Pass the counts to the process that prints the summary: with pytest-xdist workers collect."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[COUNTS] = getattr(session.config, COUNTS, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    counts = getattr(node, "workeroutput", {}).get(COUNTS)
    if counts is not None:
        setattr(node.config, COUNTS, counts)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """One loud line for each counted mark with tests that did not run."""
    ran: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            if report.when == "call":
                ran.update(mark for mark in NOT_RUN if mark in report.keywords)
    for mark, count in getattr(config, COUNTS, {}).items():
        if count > ran[mark]:
            missing = f"{count - ran[mark]} of {count} ({NOT_RUN[mark]})"
            terminalreporter.write_line(
                f"{mark.upper()} TESTS NOT RUN: {missing}", yellow=True, bold=True
            )
