"""PyTorch's CUDA: whether it starts, if not why, and its errors as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vitrail.errors import DeviceError, InputError, OutOfMemoryError

NEW_PROCESS = "no call in this process can use the GPU any more: start a new one"
"""What follows from an error that CUDA keeps returning."""


@contextmanager
def device_errors() -> Iterator[None]:
    """What PyTorch raises for a GPU is raised as OutOfMemoryError or DeviceError.

    Kernels run long after they were launched: PyTorch reports a fault of any of them at the next
    copy or synchronisation, whoever asks for that.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(_one_line(error)) from error
    except RuntimeError as error:
        words = str(error).partition("\n")[0]
        # the last is how Triton's launcher reports the driver's errors
        ours = isinstance(error, torch.AcceleratorError)
        if not ours and not words.startswith(("CUDA ", "Triton Error [CUDA]")):
            raise
        capture = "captur" in words  # of a CUDA graph: it fails, and the GPU works
        told = words if capture else f"{words}, of this call's work or of earlier; {NEW_PROCESS}"
        raise DeviceError(told) from error


def why_no_cuda() -> str | None:
    """Why PyTorch computes on no GPU here, as far as PyTorch knows; None if it does, or if there
    may be none. Starts CUDA if PyTorch counts GPUs that it does not call available."""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"PyTorch {torch.__version__} is a CPU build: install one for CUDA "
            "(https://pytorch.org/get-started)"
        )
    if torch.cuda.is_available() or not torch.cuda.device_count():
        return None
    try:
        torch.cuda.current_device()
    except (RuntimeError, AssertionError) as error:
        return f"CUDA does not start: {_one_line(error)}"
    return None


def cuda_capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU, such as (9, 0). Starts CUDA. Raises InputError with PyTorch's words if it does not
    start, as with a driver that is too old for this PyTorch."""
    try:
        return torch.cuda.get_device_capability(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device: got '{device}', but CUDA does not start: {_one_line(error)}"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
