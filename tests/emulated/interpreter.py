"""Runs tests/interpreted on compiled kernels: each launch is compiled for one architecture and
emulated, on the tensors that the test would have handed to Triton's interpreter."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from emulator.call import run_call
from vitrail import runtime as runners
from vitrail_kernels.launch import Call, Target

VARIABLE = "VITRAIL_EMULATED"
"""80 or 90: the architecture, in processes that emulate; unset in others."""

SEED = 1

ARCH = int(os.environ.get(VARIABLE, "0"))


def compile_for(arch: int) -> None:
    """Let every `Target` be of ``arch`` from now on, and run launches on CPU tensors in the
    emulator. For a whole process, before modules of tests make their targets."""

    def initialize(self: Target, arch_: int = 0, sms: int = 0, maps: bool = True) -> None:
        for name, value in (("arch", arch), ("sms", sms), ("maps", maps)):
            object.__setattr__(self, name, value)

    Target.__init__ = initialize  # type: ignore[assignment,method-assign]
    Call.launch = _launch  # type: ignore[method-assign]
    cpu = Target(arch, 3)

    def target_of(tensor: Tensor) -> Target:
        return cpu

    runners.why_not_triton = lambda dtype, device: None
    for name, module in list(sys.modules.items()):
        if name.startswith(("vitrail.", "vitrail_kernels.")):
            for attribute, value in (("target_of", target_of), ("INTERPRETED", cpu)):
                if hasattr(module, attribute):
                    setattr(module, attribute, value)


def _launch(call: Call) -> None:
    if call.grid.blocks:
        # Tests fill their outputs themselves, and some tensors are gigabytes that no page holds.
        run_call(call, ARCH, seed=SEED, track=False)


def why_not(item: pytest.Item) -> str | None:
    """Why a test of the interpreter's does not apply to compiled kernels, or None."""
    marker = item.get_closest_marker("interpreter_only")
    if marker is not None:
        return str(marker.args[0])
    parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    if parameters.get("dtype") is torch.float32:
        return "on a GPU float32 goes through PyTorch, not these kernels"
    return None
