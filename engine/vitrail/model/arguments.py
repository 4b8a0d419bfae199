"""Check the options that several calls share: devices, dtypes, batch sizes, error policies."""

from __future__ import annotations

from typing import Literal

import torch

from vitrail.cuda import cuda_capability, why_no_cuda
from vitrail.dtypes import parse_dtype
from vitrail.errors import InputError

Size = tuple[int, int]
"""(height, width) in pixels."""
OnError = Literal["raise", "skip"]
Resize = Literal["host", "device"]


def check_device(device: str | torch.device, name: str = "device") -> torch.device:
    """The torch device that the argument ``name`` asks for.

    "auto" is CUDA if there is a GPU, else the CPU. Raises InputError for another kind of device,
    and for a GPU that PyTorch does not find.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refusal = InputError(f"{name}: got {device!r}, wanted 'auto', 'cpu' or 'cuda'")
    try:
        checked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise refusal from error
    if checked.type not in ("cpu", "cuda"):
        raise refusal
    if checked.type == "cuda":
        count = torch.cuda.device_count()
        if (checked.index or 0) >= count:
            reason = why_no_cuda() or f"PyTorch finds {count} CUDA devices"
            raise InputError(f"{name}: got {device!r}, but {reason}")
        cuda_capability(checked)
    return checked


def check_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in; "auto" is float32 on the CPU and float16 on CUDA."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    return parse_dtype(dtype, auto=True)


def check_options(batch_size: int | None, size: Size | None, on_error: OnError) -> None:
    """Raise InputError for a batch size, an image size or an error policy of another form."""
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise InputError(f"batch_size: got {batch_size!r}, wanted None or a number over 0")
    if size is not None and (
        not isinstance(size, tuple | list)
        or len(size) != 2
        or any(not isinstance(side, int) or side < 1 for side in size)
    ):
        raise InputError(f"size: got {size!r}, wanted (height, width) in pixels")
    if on_error not in ("raise", "skip"):
        raise InputError(f"on_error: got {on_error!r}, wanted 'raise' or 'skip'")


def check_data(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor without numbers (meta, fake) and a tensor that is not dense (sparse)."""
    if tensor.device.type == "meta" or getattr(tensor, "fake_mode", None) is not None:
        raise InputError(f"{name}: got a tensor without data, wanted one with numbers")
    if tensor.layout != torch.strided:
        raise InputError(f"{name}: got the layout {tensor.layout}, wanted a dense tensor")
