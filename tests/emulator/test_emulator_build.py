"""The emulator's C++ on its own: no warnings, no need of this machine's instructions, and other
architectures than the two that most tests run."""

from __future__ import annotations

import ctypes
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import emulator
import shared_library
from emulator import binding
from emulator.call import run_call
from emulator.programs import complaint, program_of
from vitrail_kernels.launch import Call, Target
from vitrail_kernels.ops import attention, linear

pytestmark = [
    pytest.mark.skipif(shared_library.compiler() is None, reason="no C++ compiler here"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled"),
]
WARNINGS = ("-fsyntax-only", "-Wall", "-Wextra", "-Wconversion", "-Werror")


@pytest.mark.slow
def test_compiles_without_a_warning() -> None:
    def compile(unit: Path) -> str:
        command = [shared_library.compiler() or "c++", *binding.FLAGS, *WARNINGS, str(unit)]
        return subprocess.run(command, capture_output=True, text=True).stderr

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        messages = list(pool.map(compile, sorted(binding.FOLDER.glob("*.cpp"))))
    assert "".join(messages) == ""


@pytest.mark.slow
def test_any_machine_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled without instructions of this machine alone: every program, to the bit."""
    path = binding.build(native=False)
    assert path != binding.build()
    loaded = binding.declared(ctypes.CDLL(str(path)))
    monkeypatch.setattr(emulator, "library", lambda: loaded)
    monkeypatch.setattr(binding, "library", lambda: loaded)
    for name in emulator.opcodes():
        program = program_of(name)
        assert program is not None
        assert complaint(program) is None, name


def linear_call(arch: int) -> tuple[Call, torch.Tensor, torch.Tensor]:
    x, weight = torch.randn(130, 192).half(), (torch.randn(128, 192) / 14).half()
    out = torch.empty(130, 128).half()
    (call, *_) = linear.linear_calls(Target(arch, 4), out, x, weight, None, activation="gelu")
    return call, out, torch.nn.functional.gelu(x.double() @ weight.double().T)


def attention_call(arch: int) -> tuple[Call, torch.Tensor, torch.Tensor]:
    qkv, offsets = torch.randn(2 * 53, 3 * 128).half(), torch.tensor([0, 53, 106]).int()
    out = torch.empty(2 * 53, 128).half()
    form: dict[str, Any] = {"heads": 2, "causal": True, "max_seqlen": 53}
    (call, *_) = attention.attention_calls(Target(arch, 4), out, qkv, offsets, **form)
    expected = torch.empty(out.shape, dtype=torch.double)
    attention.attention_ref(expected, qkv.double(), offsets, **form)
    return call, out, expected


@pytest.mark.slow
@pytest.mark.parametrize("arch", [86, 89, 120])
@pytest.mark.parametrize("make", [linear_call, attention_call], ids=["linear", "attention"])
def test_kernels_of_other_architectures(make: Any, arch: int) -> None:
    """sm_89 and sm_120 too: mma.sync with tensor maps, pairs of fp32, extremes of three."""
    torch.manual_seed(0)
    call, out, expected = make(arch)
    run_call(call, arch, [out])
    exact = expected.half()  # the best that fp16 can do
    error = (exact.double() - expected).abs().max()
    assert (out.double() - expected).abs().max() <= 4 * error


@pytest.mark.slow
def test_kernels_of_datacenter_blackwell_are_refused() -> None:
    call, out, _ = linear_call(100)
    with pytest.raises(
        emulator.Fault, match=r"tcgen05\.\S+ is not known to the emulator \[tcgen05"
    ):
        run_call(call, 100, [out])
