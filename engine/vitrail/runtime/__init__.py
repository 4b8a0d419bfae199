"""Backends: each has a `Runner`, and `choose` decides which backend computes."""

import torch

from vitrail.cuda import cuda_capability
from vitrail.errors import InputError
from vitrail.exported.folder import ExportFolder
from vitrail.runtime import native
from vitrail.runtime.native import NativeRunner
from vitrail.runtime.runner import Runner
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.runtime.triton import TritonRunner
from vitrail_kernels.launch import INTERPRETING, MISSING, interpreted
from vitrail_kernels.toolchain import why_no_launcher, why_not_compiled

RUNNERS: dict[str, type[Runner]] = {
    "torch": TorchRunner,
    "triton": TritonRunner,
    "native": NativeRunner,
}
FORMER_NAMES = {"reference": "torch"}
MIN_CAPABILITY = (8, 0)
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
    if capability < MIN_CAPABILITY:
        return f"the kernels need sm_80 or later, and this is sm_{capability[0]}{capability[1]}"
    if interpreted():
        return INTERPRETING
    return why_not_compiled(10 * capability[0] + capability[1])


def why_not_triton(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the backend "triton" cannot compute ``dtype`` on ``device``; None if it can."""
    why = why_not_kernels(dtype, device)
    return why_no_launcher() if why is None and device.type == "cuda" else why


def why_not_native(
    dtype: torch.dtype, device: torch.device, exported: ExportFolder | None = None
) -> str | None:
    """Why the backend "native" cannot compute ``dtype`` on ``device``; None if it can.

    It needs no triton for an architecture that was ``exported``.
    """
    if device.type == "cpu":
        return "the native backend needs a CUDA device"
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
    backend: str, dtype: torch.dtype, device: torch.device, exported: ExportFolder | None = None
) -> str:
    """The name of the backend that computes ``dtype`` on ``device``.

    "auto" takes "torch" on the CPU. On a GPU it takes the first of "native", "triton" and "torch"
    that can compute there. "reference" is the former name of "torch".

    Raises InputError for another name, and if the backend cannot compute there; CheckpointError if
    the reason is that ``exported`` has nothing for this GPU and triton is missing.
    """
    backend = FORMER_NAMES.get(backend, backend)
    if backend not in ("auto", *RUNNERS):
        names = ", ".join(repr(name) for name in RUNNERS)
        raise InputError(f"backend: got {backend!r}, wanted 'auto' or one of {names}")
    reasons = {
        "native": why_not_native(dtype, device, exported),
        "triton": why_not_triton(dtype, device),
        "torch": None,
    }
    if backend == "auto":
        if device.type == "cpu":
            return "torch"
        return next(name for name, why in reasons.items() if why is None)
    why = reasons[backend]
    if why is not None:
        export_lacks_gpu = backend == "native" and device.type == "cuda" and native.MISSING is None
        if export_lacks_gpu and exported is not None and MISSING is not None:
            raise exported.lacks(_arch(device))
        raise InputError(f"backend: got {backend!r}, but {why}")
    return backend
