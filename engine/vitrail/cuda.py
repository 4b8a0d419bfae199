"""PyTorch's CUDA: whether it starts, and if not, why and what helps."""

from __future__ import annotations

import torch

from vitrail.errors import InputError


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
