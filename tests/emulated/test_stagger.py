"""Half the blocks of a persistent `linear` wait once, in a grid of many tiles only."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import shared_library
from emulator.call import run_call
from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.device.stagger import TILES
from vitrail_kernels.launch import Target
from vitrail_kernels.ops.linear import linear_calls
from vitrail_kernels.ops.linear_config import LinearForm, linear_config

pytestmark = pytest.mark.skipif(shared_library.compiler() is None, reason="no C++ compiler here")

ARCH = 90
ONE = Target(ARCH, 1)
"""A card of one multiprocessor, whose two blocks take all tiles."""
WARPS = 4
CONFIG = KernelConfig(64, 64, 64, WARPS, 3, ctas=2, stagger=4000)


def waits(tiles: int, config: KernelConfig) -> tuple[int, torch.Tensor]:
    """How many warps wait while two blocks compute ``tiles``, and the result."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64 * tiles, 64, generator=generator).half()
    weight = torch.randn(64, 64, generator=generator).half()
    out = torch.empty(64 * tiles, 64).half()
    (call,) = linear_calls(ONE, out, x, weight, config=config)
    report = run_call(call, ARCH, [out], counters=True)
    assert report.blocks == 2
    return sum(s.runs for s in report.sites if s.opcode.startswith("nanosleep")), out


def test_the_second_half_of_many_tiles_waits_and_no_bit_follows() -> None:
    slept, out = waits(2 * TILES, CONFIG)
    never, plain = waits(2 * TILES, dataclasses.replace(CONFIG, stagger=0))
    assert (slept, never) == (WARPS, 0)
    assert torch.equal(out, plain)


def test_few_tiles_do_not_wait() -> None:
    assert waits(2 * TILES - 1, CONFIG)[0] == 0


def test_only_blocks_that_share_a_multiprocessor_wait() -> None:
    """And for less than a tile of theirs at any rate a card has."""
    for rows in (64, 1 << 10, 1 << 14, 1 << 17):
        for n, k, form in (
            (2304, 768, LinearForm(norm=True)),
            (3072, 768, LinearForm(norm=True, activation="gelu")),
            (768, 768, LinearForm(residual=True, stats=True)),
            (768, 3072, LinearForm(residual=True, stats=True)),
        ):
            config = linear_config(Target(ARCH, 132), torch.float16, rows, n, k, form)
            turns = config.block_m == config.block_n == 128 and not form.short_epilogue
            assert (config.stagger > 0) == turns, config
            assert config.ctas == 2 or config.stagger == 0
            flops = 2 * config.block_m * config.block_n * k
            assert config.stagger * 1e-9 < 2 * flops / (400e12 / 132)
