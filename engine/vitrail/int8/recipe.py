"""The recipe of a quantization, and the linears that stay in 16 bits by a user's wish.

Queries, keys and values are one linear, "qkv". The output projection is never int8: the outliers of
values would cost more there than all else. `BlockSpec.int8_candidates` are the linears that may be.
"""

import fnmatch
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from vitrail.errors import InputError, show
from vitrail.spec import BlockSpec
from vitrail_kernels.ops.linear_int8 import OFFSET, group_columns

Rounding = Literal["gptq", "nearest"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
LAST_BLOCK = "in the last block only the class token needs it"
UP_STAYS = "its up projection stays"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the weights and inputs of the int8 linears become codes.

    ``alpha`` of SmoothQuant: from 0, at which the columns of the weight become equal, to 1, at
    which those of the inputs do. ``rounding`` of the weights. ``offset``, and the ``group`` of
    columns with a scale of their own: those of `linear_int8`, which the kernels are written for.
    """

    alpha: float = 0.7
    rounding: Rounding = "gptq"
    offset: float = OFFSET
    group: int = group_columns(gated=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and 0 <= self.alpha <= 1):
            raise InputError(f"alpha: got {self.alpha!r}, wanted a number from 0 to 1")
        if self.rounding not in ROUNDINGS:
            raise InputError(f"rounding: got {show(self.rounding)}, wanted one of {ROUNDINGS}")
        groups = group_columns(gated=False), group_columns(gated=True)
        if self.offset != OFFSET or self.group not in groups:
            raise InputError(
                f"offset and group: got {self.offset!r} and {self.group!r}, wanted {OFFSET} and "
                f"one of {groups}, which the kernels are written for"
            )


def float_linears(spec: BlockSpec, patterns: Sequence[str] = ()) -> dict[str, str]:
    """The linears among qkv, up and down that stay in 16 bits, each with the reason.

    ``patterns`` are a shell's, such as "0.*" or "*.down"; a down projection stays if its up
    projection does. Raises InputError for a pattern that matches no linear.
    """
    candidates = spec.int8_candidates
    reasons = {f"{spec.layers - 1}.{linear}": LAST_BLOCK for linear in ("up", "down")}
    for pattern in patterns:
        matches = fnmatch.filter([*candidates, *reasons], pattern)
        if not matches:
            raise InputError(
                f"keep-fp16: got {show(pattern)}, which matches no linear, wanted a pattern such "
                f"as '0.*' or '*.down': the linears are {candidates[0]} to {candidates[-1]}"
            )
        for name in matches:
            reasons.setdefault(name, f"--keep-fp16 {pattern}")
    for name in candidates:
        if name.endswith(".down") and name.replace("down", "up") in reasons:
            reasons.setdefault(name, UP_STAYS)
    return reasons


def int8_linears(spec: BlockSpec, stay: Collection[str]) -> tuple[str, ...]:
    """The candidates that are not among ``stay``."""
    return tuple(name for name in spec.int8_candidates if name not in stay)
