"""Execute plans: one runner a way of doing so, and which of them serves."""

from __future__ import annotations

import torch

from vitrail.errors import InputError
from vitrail.runners.reference import ReferenceRunner
from vitrail.runners.runner import Runner
from vitrail.runners.triton import TritonRunner
from vitrail_kernels.launch import MISSING, interpreted

RUNNERS: dict[str, type[Runner]] = {"reference": ReferenceRunner, "triton": TritonRunner}
ARCHITECTURE = (8, 0)
"""The oldest CUDA capability that the kernels are compiled for."""


def why_not_triton(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the Triton runner cannot serve ``dtype`` on ``device``; None where it can."""
    if MISSING is not None:
        return "triton is not installed"
    if device.type == "cpu":
        return None if interpreted() else "the kernels need a CUDA device"
    if dtype == torch.float32:
        return "float32 goes through PyTorch"
    capability = torch.cuda.get_device_capability(device)
    if capability < ARCHITECTURE:
        return f"the kernels need sm_80 or later, and this is sm_{capability[0]}{capability[1]}"
    return None


def choose(wanted: str, dtype: torch.dtype, device: torch.device) -> str:
    """The runner for "auto", "triton" or "reference": auto is Triton on every GPU it serves.

    Raises InputError for another name, and where Triton is asked for and cannot serve.
    """
    if wanted not in ("auto", *RUNNERS):
        raise InputError(f"runner: got {wanted!r}, wanted 'auto', 'triton' or 'reference'")
    why = why_not_triton(dtype, device)
    if wanted == "triton" and why is not None:
        raise InputError(f"runner: got 'triton', but {why}")
    if wanted == "auto":
        return "triton" if why is None and device.type == "cuda" else "reference"
    return wanted
