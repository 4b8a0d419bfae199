"""The configuration of the int8 products: the tuned table's, else a heuristic with its reason.

Sums of integers are exact in any order, so that here every tile gives the same sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vitrail_kernels.configs import KernelConfig, Ladder, config_key, ladder_of, tuned
from vitrail_kernels.launch import Target, cdiv
from vitrail_kernels.ops.linear_config import KEY_ROWS


@dataclass(frozen=True, slots=True)
class Int8Form:
    """The features of `linear_int8` and `linear_int8_grouped` that change the kernel, besides
    dtype and sizes.

    ``pointers``: the kernel without tensor maps. ``group``: how many columns of the input share a
    scale, in `linear_int8_grouped`. ``codes``: the output is int8. The string is part of a tuned
    table's keys.
    """

    pointers: bool = False
    gated: bool = False
    activation: str | None = None
    codes: bool = False
    group: int | None = None
    scale: bool = False
    residual: bool = False
    stats: bool = False

    def __str__(self) -> str:
        words = [name for name in ("pointers", "gated") if getattr(self, name)]
        words += [] if self.activation is None else [self.activation]
        words += [] if self.group is None else [f"by {self.group}"]
        words += [name for name in ("scale", "residual", "stats") if getattr(self, name)]
        return " ".join(words)

    @property
    def operator(self) -> str:
        return "linear_int8" if self.group is None else "linear_int8_grouped"


def linear_int8_key(dtype: torch.dtype, m: int, n: int, k: int, form: Int8Form) -> str:
    """The tuned table's key for the product of (m, k) and (n, k) into ``dtype``."""
    rows = next(rows for rows in KEY_ROWS if m <= rows)
    return config_key(form.operator, dtype, f"{rows}x{n}x{k} {form}".rstrip())


def linear_int8_config(
    target: Target, dtype: torch.dtype, m: int, n: int, k: int, form: Int8Form
) -> KernelConfig:
    """The configuration for the product of (m, k) and (n, k) into ``dtype``."""
    config = tuned(target.arch).get(linear_int8_key(dtype, m, n, k, form))
    if config is not None:
        return config
    if cdiv(m, 128) * cdiv(n, 128) >= target.sms:
        return _large(target, k, form)
    return _small(target, m, n, form)


def linear_int8_ladder(
    target: Target, dtype: torch.dtype, n: int, k: int, form: Int8Form
) -> Ladder:
    """`linear_int8_config` for every m."""
    # up to these numbers of rows, some multiprocessor has no tile
    few = (block_m * ((target.sms - 1) // cdiv(n, 128)) for block_m in (64, 128))
    return ladder_of((*KEY_ROWS, *few), lambda m: linear_int8_config(target, dtype, m, n, k, form))


def _small(target: Target, m: int, n: int, form: Int8Form) -> KernelConfig:
    narrow = cdiv(m, 64) * cdiv(n, 128) < target.sms and not form.codes
    wide, deep = 64 if narrow else 128, min(128, form.group or 128)
    reason = "few rows: smaller tiles, so that every SM has one"
    if target.arch == 90 and target.tma:
        reason += "; nothing hides the latency of loads but loads"
        return KernelConfig(64, wide, deep, 4, 4, ctas=2, reason=reason)
    # a step of 64 as wide as the residual's tile would give the residual's loads the layout of
    # codes, 16 a thread, with which each takes two halves of lines
    deep = 64 if form.group is None else deep
    return KernelConfig(64, wide, deep, 4, 3, reason=reason)


def _large(target: Target, k: int, form: Int8Form) -> KernelConfig:
    if form.group is not None:
        return _grouped(target, form.group)
    if not target.tma:
        reason = "four steps of K in flight, two blocks an SM"
        return KernelConfig(128, 128, 64, 4, 4, ctas=2, reason=reason)
    if target.arch >= 100 and form.codes:
        reason = "three blocks overlap epilogues; 128 rows spill"
        return KernelConfig(64, 128, 128, 4, 2, 168, 3, reason=reason)
    if target.arch >= 120:
        reason = "two blocks in 99 KiB of shared memory"
        return KernelConfig(128, 128, 64, 4, 3, ctas=2, reason=reason)
    stagger = 0
    if target.arch == 90 and (form.activation or form.gated):
        # half a tile, as for `linear`: as many bytes a step, half as many steps
        stagger = round((cdiv(k, 128) * 910 + 3000) / 2 / 1.7)
    registers = None if form.gated else 128  # a gated tile takes 128, but spills with that limit
    reason = "two blocks an SM overlap epilogues"
    return KernelConfig(128, 128, 128, 8, 3, registers, 2, stagger=stagger, reason=reason)


def _grouped(target: Target, group: int) -> KernelConfig:
    reason = "the sums of groups take as many registers as products"
    deep = min(128, group)
    if target.arch == 90:  # also without tensor maps
        stages = 4 if group <= 128 else 3
        reason += ": one block, and as many steps of K in flight as fit"
        return KernelConfig(128, 128, deep, 8, stages, reason=reason)
    # these products keep tiles of x and W in registers as well
    stages = 3 if group <= 128 and target.arch < 120 else 2
    reason += ": half as wide"
    return KernelConfig(128, 64, deep, 4, stages, ctas=2 if group <= 128 else 1, reason=reason)
