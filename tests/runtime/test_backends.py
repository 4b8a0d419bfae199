"""Which backend computes on a device, and the reasons that users read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime.test_runner import CPU
from vitrail import runtime as runners
from vitrail.errors import InputError

ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("dtype", "capability", "backend", "why"),
    [
        (torch.float16, (9, 0), "native", None),
        (torch.bfloat16, (8, 0), "native", None),
        (torch.float32, (9, 0), "torch", "float32 goes through PyTorch"),
        (torch.float16, (7, 5), "torch", "sm_80 or later, and this is sm_75"),
    ],
)
def test_auto_takes_the_kernels_on_every_gpu_they_serve(
    dtype: torch.dtype,
    capability: tuple[int, int],
    backend: str,
    why: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(runners.native, "MISSING", None)
    assert runners.choose("auto", dtype, GPU) == backend
    assert runners.why_not_native(dtype, GPU) == runners.why_not_triton(dtype, GPU)
    monkeypatch.setattr(runners.native, "MISSING", ImportError("vitrail._C"))
    fallback = "triton" if backend == "native" else backend
    assert runners.choose("auto", dtype, GPU) == fallback
    with pytest.raises(InputError, match="backend: got 'native', but "):
        runners.choose("native", dtype, GPU)
    reason = runners.why_not_triton(dtype, GPU)
    assert (reason is None) == (why is None)
    assert why is None or (reason is not None and why in reason)
    if why is not None:
        with pytest.raises(InputError, match="backend: got 'triton', but"):
            runners.choose("triton", dtype, GPU)
    assert runners.choose("torch", dtype, GPU) == "torch"
    assert runners.choose("reference", dtype, GPU) == "torch", "its former name"


def test_a_cpu_gets_torch_and_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runners.choose("auto", torch.float32, CPU) == "torch"
    with pytest.raises(InputError, match="the kernels need a CUDA device"):
        runners.choose("triton", torch.float32, CPU)
    monkeypatch.setattr(runners, "MISSING", ImportError("triton is not installed"))
    assert runners.choose("auto", torch.float16, GPU) == "torch"
    with pytest.raises(InputError, match="triton is not installed"):
        runners.choose("triton", torch.float16, GPU)


def lines_without(package: str, code: str, folder: Path) -> list[str]:
    """The lines that ``code`` prints in a process that finds no ``package``."""
    blocked = f"""
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *rest, **named: None
    if name == {package!r} or name.startswith({package + "."!r})
    else find_spec(name, *rest, **named)
)
"""
    paths = os.pathsep.join(str(ROOT / name) for name in ("engine", "kernels"))
    run = subprocess.run(
        [sys.executable, "-c", blocked + code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_everything_but_the_kernels_works_without_triton(tmp_path: Path) -> None:
    """Without triton the CPU computes all the same, and a kernel names the missing package."""
    code = f"""
import torch
import vitrail
from vitrail_kernels import OPERATORS

model = vitrail.load({str(ROOT / "engine/vitrail/assets/clip")!r})
print(model.backend, tuple(model.encode_image(torch.zeros(2, 3, 56, 56)).shape))
try:
    OPERATORS["linear"].launch(torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(8, 8))
except RuntimeError as error:
    print(error)
"""
    lines = lines_without("triton", code, tmp_path)
    assert lines == ["torch (2, 128)", "kernels: triton is not installed"]


@pytest.mark.parametrize(
    "package",
    [
        "triton",
        "vitrail._C",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("pyarrow", "transformers")),
    ],
)
def test_every_module_imports_without_an_optional_package(package: str, tmp_path: Path) -> None:
    code = f"""
import importlib
import pkgutil

import vitrail
import vitrail_kernels

for root in (vitrail, vitrail_kernels):
    for module in pkgutil.walk_packages(root.__path__, root.__name__ + "."):
        if module.name not in ({package!r}, "vitrail.cli.__main__"):
            importlib.import_module(module.name)
try:
    importlib.import_module({package!r})
except ImportError:
    print("without it")
"""
    assert lines_without(package, code, tmp_path) == ["without it"]
