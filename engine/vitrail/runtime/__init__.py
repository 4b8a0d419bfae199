"""Execute plans: one runner a way of doing so, and which of them serves."""

from __future__ import annotations

import torch

from vitrail.cuda import cuda_capability
from vitrail.errors import InputError
from vitrail.exported.folder import Exported
from vitrail.runtime import native
from vitrail.runtime.native import NativeRunner
from vitrail.runtime.runner import Runner
from vitrail.runtime.torch_runner import ReferenceRunner
from vitrail.runtime.triton import TritonRunner
from vitrail_kernels.launch import INTERPRETING, MISSING, interpreted
from vitrail_kernels.toolchain import why_no_launcher, why_not_compiled

RUNNERS: dict[str, type[Runner]] = {
    "reference": ReferenceRunner,
    "triton": TritonRunner,
    "native": NativeRunner,
}
ARCHITECTURE = (8, 0)
"""The oldest CUDA capability that the kernels are compiled for."""


def why_not_kernels(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why no kernel can be compiled for ``dtype`` on ``device``; None if they can.

    Raises InputError if CUDA does not start.
    """
    if MISSING is not None:
        return str(MISSING)
    if device.type == "cpu":
        return None if interpreted() else "the kernels need a CUDA device"
    if torch.version.hip is not None:
        return f"the kernels need an NVIDIA GPU, and this PyTorch is for ROCm {torch.version.hip}"
    if dtype == torch.float32:
        return "float32 goes through PyTorch"
    capability = cuda_capability(device)
    if capability < ARCHITECTURE:
        return f"the kernels need sm_80 or later, and this is sm_{capability[0]}{capability[1]}"
    if interpreted():
        return INTERPRETING
    return why_not_compiled(10 * capability[0] + capability[1])


def why_not_triton(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the Triton runner cannot serve ``dtype`` on ``device``; None if it can."""
    why = why_not_kernels(dtype, device)
    return why_no_launcher() if why is None and device.type == "cuda" else why


def why_not_native(
    dtype: torch.dtype, device: torch.device, exported: Exported | None = None
) -> str | None:
    """Why the native runner cannot serve ``dtype`` on ``device``; None if it can, which takes no
    triton for an architecture that was ``exported``."""
    if device.type == "cpu":
        return "the native runner needs a CUDA device"
    if native.MISSING is not None:
        return str(native.MISSING)
    if (
        exported is not None
        and dtype == exported.dtype
        and torch.version.hip is None
        and _arch(device) in exported.builds
    ):
        return None
    return why_not_kernels(dtype, device)


def _arch(device: torch.device) -> int:
    major, minor = cuda_capability(device)
    return 10 * major + minor


def choose(
    wanted: str, dtype: torch.dtype, device: torch.device, exported: Exported | None = None
) -> str:
    """The runner for "auto" or by name: auto is the first of native, Triton and reference that
    serves, and on the CPU the reference.

    Raises InputError for another name, and where the one asked for cannot serve; CheckpointError
    where that is because ``exported`` has nothing for this GPU, and triton is missing.
    """
    if wanted not in ("auto", *RUNNERS):
        names = ", ".join(repr(name) for name in RUNNERS)
        raise InputError(f"runner: got {wanted!r}, wanted 'auto' or one of {names}")
    reasons = {
        "native": why_not_native(dtype, device, exported),
        "triton": why_not_triton(dtype, device),
        "reference": None,
    }
    if wanted == "auto":
        if device.type == "cpu":
            return "reference"
        return next(name for name, why in reasons.items() if why is None)
    why = reasons[wanted]
    if why is not None:
        reached = wanted == "native" and device.type == "cuda" and native.MISSING is None
        if reached and exported is not None and MISSING is not None:
            raise exported.lacks(_arch(device))
        raise InputError(f"runner: got {wanted!r}, but {why}")
    return wanted
