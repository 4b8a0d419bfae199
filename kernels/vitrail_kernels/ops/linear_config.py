"""The configurations of `linear`: the tuned table's, else a heuristic with its reason."""

from dataclasses import dataclass
from typing import Any

import torch

from vitrail_kernels.configs import KernelConfig, Ladder, config_key, dtype_name, ladder_of, tuned
from vitrail_kernels.launch import Target, cdiv

KEY_ROWS = (64, 256, 1024, 4096, 16384, 65536, 1 << 31)
"""A key holds for up to this many rows, and for more rows than the number before."""

LONG_K = 2048
"""The smallest K whose steps outweigh a tile's epilogue."""


@dataclass(frozen=True, slots=True)
class LinearForm:
    """The features of a `linear` that change its kernel, besides dtype and sizes.

    ``pointers``: the kernel without tensor maps. ``out_dtype``: the dtype of the output, if it is
    not the input's. The string is part of a tuned table's keys, for example "norm gelu".
    """

    pointers: bool = False
    norm: bool = False
    gated: bool = False
    activation: str | None = None
    scale: bool = False
    residual: bool = False
    stats: bool = False
    out_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        words = [name for name in ("pointers", "norm", "gated") if getattr(self, name)]
        words += [] if self.activation is None else [self.activation]
        words += [name for name in ("scale", "residual", "stats") if getattr(self, name)]
        if self.out_dtype is not None:
            words.append(f"to {dtype_name(self.out_dtype)}")
        return " ".join(words)

    @property
    def short_epilogue(self) -> bool:
        """Whether the epilogue only adds a bias, applies the norm or writes statistics."""
        return not (self.gated or self.activation or self.scale or self.residual or self.out_dtype)


def tile_constants(target: Target, config: KernelConfig, n: int, k: int) -> dict[str, Any]:
    """The constants of a kernel of (m, k) times (n, k) that describe its tiles, by name.

    A tile of 128 columns or more is finished in two parts, one after the other, which takes fewer
    registers.
    """
    return {
        "N": n,
        "K": k,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "PARTS": 2 if config.block_n >= 128 else 1,
        "PDL": target.pdl,
    }


def linear_key(dtype: torch.dtype, m: int, n: int, k: int, form: LinearForm) -> str:
    """The tuned table's key for the product of (m, k) and (n, k)."""
    rows = next(rows for rows in KEY_ROWS if m <= rows)
    return config_key("linear", dtype, f"{rows}x{n}x{k} {form}".rstrip())


def linear_config(
    target: Target, dtype: torch.dtype, m: int, n: int, k: int, form: LinearForm
) -> KernelConfig:
    """The configuration for the product of (m, k) and (n, k).

    All configurations of an architecture and dtype give the same bits: they use the same MMA family
    (64 rows or more make it HGMMA on sm_90), add K in the same order and use the same chunks for
    statistics.
    """
    config = tuned(target.arch).get(linear_key(dtype, m, n, k, form))
    if config is not None:
        return config
    if dtype == torch.float32:
        return KernelConfig(64, 64, 32, 4, 2, reason="fp32: for the interpreter alone")
    if cdiv(m, 128) * cdiv(n, 128) >= target.sms:
        return _large(target, m, n, k, form)
    return _small(target, m, n)


def linear_ladder(target: Target, dtype: torch.dtype, n: int, k: int, form: LinearForm) -> Ladder:
    """`linear_config` for every m."""
    # up to these numbers of rows, some multiprocessor has no tile, or no second wide tile
    few = (block_m * ((target.sms - 1) // cdiv(n, 128)) for block_m in (64, 128))
    heuristic = (*few, 128 * ((2 * target.sms - 1) // cdiv(n, 256)))
    return ladder_of((*KEY_ROWS, *heuristic), lambda m: linear_config(target, dtype, m, n, k, form))


def _small(target: Target, m: int, n: int) -> KernelConfig:
    wide = 64 if cdiv(m, 64) * cdiv(n, 128) < target.sms else 128
    reason = "few rows: smaller tiles, so that every SM has one"
    if target.arch == 90:
        stages = 6 if wide == 64 else 4
        reason += "; nothing hides the latency of loads but loads: 96 KiB in flight, two blocks"
        return KernelConfig(64, wide, 64, 4, stages, ctas=2, reason=reason)
    stages = 2 if target.tcgen05 else 3  # on tcgen05 a third stage makes ptxas spill a gated tile
    return KernelConfig(64, wide, 64, 4, stages, reason=reason)


def _large(target: Target, m: int, n: int, k: int, form: LinearForm) -> KernelConfig:
    if not target.tma:
        reason = "four steps of K in flight, two blocks an SM"
        return KernelConfig(128, 128, 32, 4, 4, ctas=2, reason=reason)
    if target.arch >= 120:
        reason = "99 KiB of shared memory; wider, wide rows spill"
        return KernelConfig(128, 64, 64, 4, 2, ctas=2, reason=reason)
    if target.tcgen05 and form.residual:
        return KernelConfig(128, 128, 64, 8, 3, reason="128 registers spill beside a column scale")
    wide = cdiv(m, 128) * cdiv(n, 256) >= 2 * target.sms and not form.gated
    if target.arch == 90 and wide and (k >= LONG_K or form.short_epilogue):
        reason = "a quarter less traffic from L2, which bounds 128 x 128, for an epilogue that"
        reason += " nothing hides but the next tile's loads"
        return KernelConfig(128, 256, 64, 8, 4, reason=reason)
    stagger = 0
    if target.arch == 90 and not form.short_epilogue:  # else the tiles are too few for turns
        # half a tile: 32 KiB a step at 36 bytes a clock, an epilogue of 3,000 clocks, of 1.7 GHz
        stagger = round((cdiv(k, 64) * 910 + 3000) / 2 / 1.7)
    # a gated tile on tcgen05 takes 74 registers, but spills with a limit of 128
    registers = None if target.tcgen05 and form.gated else 128
    reason = "two blocks an SM overlap epilogues"
    return KernelConfig(128, 128, 64, 8, 3, registers, 2, stagger=stagger, reason=reason)
