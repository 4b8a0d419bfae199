"""Names of the floating-point dtypes: torch's, the safetensors code, and users' short forms.

Imports torch only inside its functions, so that a module which needs names takes no torch.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from vitrail.errors import InputError

if TYPE_CHECKING:
    import torch

SAFETENSORS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Safetensors code -> name, for every dtype that weights can be stored in."""
NAMES = tuple(SAFETENSORS.values())
HALVES = ("float16", "bfloat16")
"""The dtypes of 16 bits: those that exported folders hold and that tuning measures."""
ALIASES = {
    **dict.fromkeys(("fp32", "float"), "float32"),
    **dict.fromkeys(("fp16", "half"), "float16"),
    "bf16": "bfloat16",
}


def dtype_name(dtype: torch.dtype) -> str:
    """The name without torch's prefix, for example "float16"."""
    return str(dtype).removeprefix("torch.")


def named_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name, for example "float32" or "uint8", or of a safetensors code."""
    import torch

    dtype: torch.dtype = getattr(torch, SAFETENSORS.get(name, name))
    return dtype


def parse_dtype(
    value: str | torch.dtype, choices: Collection[str] = NAMES, *, auto: bool = False
) -> torch.dtype:
    """The dtype that a user names, such as "fp16", "half", "float16" or ``torch.float16``.

    Raises InputError unless it is among ``choices``. With ``auto`` the message says that the
    caller also accepts "auto".
    """
    dtypes = {name: named_dtype(name) for name in choices}
    dtype = dtypes.get(ALIASES.get(value, value)) if isinstance(value, str) else value
    if dtype is None or dtype not in dtypes.values():
        or_auto = "'auto' or " if auto else ""
        raise InputError(f"dtype: got {value!r}, wanted {or_auto}one of {tuple(choices)}")
    return dtype
