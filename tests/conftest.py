"""What every test runs under: no network, fixed seeds, and a count of what was left out."""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

# Before huggingface_hub is imported, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest

try:
    import hypothesis
except ImportError:  # a machine for the GPU tests, which do without
    hypothesis = None

COUNTED = ("gpu", "interpreted", "slow")
FOUND = "vitrail-found"

if hypothesis is not None:
    hypothesis.settings.register_profile("local", deadline=None)
    hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small cost more to share out than to compute."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A `standin.Standin` of the module's own, as the driver of two multiprocessors."""
    import standin
    from vitrail.runtime import native

    if native.MISSING is not None or not standin.compiler():
        pytest.skip("needs vitrail._C and a C++ compiler")
    return standin.own(tmp_path_factory.mktemp("driver"), 2)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers for a test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)  # before -m takes items away
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = {name: [i for i in items if i.get_closest_marker(name)] for name in COUNTED}
    setattr(config, FOUND, {name: len(found) for name, found in marked.items()})
    if marked["gpu"] and not _cuda():
        for item in marked["gpu"]:
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device here"))
    if os.environ.get("TRITON_INTERPRET") != "1" and not os.environ.get("VITRAIL_EMULATED"):
        for item in marked["interpreted"]:
            item.add_marker(pytest.mark.skip(reason="interpreted: TRITON_INTERPRET is not 1"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under pytest-xdist the workers collect; the process that prints the summary does not."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[FOUND] = getattr(session.config, FOUND, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    found = getattr(node, "workeroutput", {}).get(FOUND)
    if found is not None:
        setattr(node.config, FOUND, found)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """One loud line for the GPU tests, and for the slow ones, that did not run."""
    ran: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            if report.when == "call":
                ran.update(name for name in COUNTED if name in report.keywords)
    why = {
        "gpu": "they need a CUDA device",
        "interpreted": "make test runs them apart, with TRITON_INTERPRET=1",
        "slow": "make test-all runs them",
    }
    for name, found in getattr(config, FOUND, {}).items():
        if found > ran[name]:
            line = f"{name.upper()} TESTS NOT RUN: {found - ran[name]} of {found} ({why[name]})"
            terminalreporter.write_line(line, yellow=True, bold=True)
