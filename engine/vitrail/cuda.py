"""The reasons why PyTorch's CUDA does not start, and PyTorch's GPU errors as Vitrail's errors."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vitrail.errors import DeviceError, InputError, OutOfMemoryError

NEW_PROCESS = "no later call in this process can use the GPU: start a new one"
"""The advice after an error that CUDA keeps returning."""


def refuse_lost_cuda() -> None:
    """Raise DeviceError in a process that was forked from one that had started CUDA.

    There PyTorch's own error, if any comes, has no advice that fits a loaded model.
    """
    extension = sys.modules.get("vitrail._C")
    by_torch = torch.cuda._is_in_bad_fork()
    if by_torch or (extension is not None and extension.driver_lost()):
        raise DeviceError(
            "this process was forked from one that had started CUDA, and CUDA does not survive a "
            "fork: start processes by 'spawn' or 'forkserver', or load models on a GPU in the "
            "forked processes alone"
        )


@contextmanager
def device_errors() -> Iterator[None]:
    """Raises PyTorch's GPU errors as Vitrail's OutOfMemoryError or DeviceError.

    A kernel may run long after its launch. PyTorch reports the kernel's fault at the next copy or
    synchronization, which may belong to another call.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(_one_line(error)) from error
    except RuntimeError as error:
        message = str(error).partition("\n")[0]
        # Triton's launcher reports the driver's errors as "Triton Error [CUDA]"
        from_cuda = message.startswith(("CUDA ", "Triton Error [CUDA]"))
        if not isinstance(error, torch.AcceleratorError) and not from_cuda:
            raise
        if "captur" not in message:  # if the capture of a CUDA graph fails, the GPU still works
            message = f"{message}, caused by this call or an earlier call; {NEW_PROCESS}"
        raise DeviceError(message) from error


def why_no_cuda() -> str | None:
    """Why PyTorch cannot use a GPU here; None if it can, or if it counts no GPU.

    Starts CUDA if PyTorch counts GPUs but reports that CUDA is not available.
    """
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
    """The compute capability of a GPU, such as (9, 0). Starts CUDA.

    Raises InputError with PyTorch's message if CUDA does not start, for example because the driver
    is too old for this PyTorch.
    """
    try:
        return torch.cuda.get_device_capability(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device: got '{device}', but CUDA does not start: {_one_line(error)}"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
