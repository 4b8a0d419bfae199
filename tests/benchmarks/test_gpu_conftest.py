"""tests/gpu/conftest.py: a lost device ends the session, and a test that hangs its process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import standin

ROOT = Path(__file__).parents[2]

LOST = """
import torch, standin
from pathlib import Path

driver = standin.own(Path(__file__).parent)
standin.open_context(driver)
torch.cuda.synchronize = lambda: standin.synchronize(driver)
torch.cuda.empty_cache = lambda: None

def test_before():
    pass

def test_illegal():
    driver.fail(1, 700)  # an illegal access, which every later call gives too
    standin.synchronize(driver)

def test_after():
    pass
"""
HANGS = """
import time, torch
torch.cuda.synchronize = torch.cuda.empty_cache = lambda: None

def test_before():
    pass

def test_hangs():
    time.sleep(600)
"""


def session(folder: Path, tests: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """pytest on a file of ``tests``, under the conftest of the GPU tests."""
    (folder / "test_planted.py").write_text(tests)
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--tb=short", "-p", "gpu.conftest"]
    environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [*command, f"--rootdir={folder}", "test_planted.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(standin.compiler() is None, reason="needs a C++ compiler")
def test_an_illegal_access_ends_the_session_with_its_reason(tmp_path: Path) -> None:
    done = session(tmp_path, LOST)
    assert done.returncode != 0
    assert "the device is lost to this process: CUDA error: 700" in done.stdout
    assert "test_illegal" in done.stdout, "the failure is told"
    assert "1 failed, 1 passed" in done.stdout, "nothing ran after it"


def test_a_hang_ends_the_process_with_its_place(tmp_path: Path) -> None:
    done = session(tmp_path, HANGS, VITRAIL_GPU_TEST_SECONDS="3")
    assert done.returncode == 1
    assert "test_planted.py::test_hangs" in done.stderr
    assert "in test_hangs" in done.stderr
