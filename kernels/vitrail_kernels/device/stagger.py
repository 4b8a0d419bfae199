"""Two blocks of a multiprocessor take turns: one multiplies while the other finishes its tile.

Persistent blocks that begin together stay together: both need the tensor cores, then both leave
them idle. The hardware places a first block on every multiprocessor before it adds a second block
to any. So the second half of the grid waits once, for about half a tile.
"""

from __future__ import annotations

from vitrail_kernels.launch import jit, tl

TILES = 16
"""A block waits only if it takes at least this many tiles. Half a tile is then 3 % of its time."""


@jit()
def take_turns(tiles: int, NANOSECONDS: tl.constexpr, TILES: tl.constexpr = TILES) -> None:
    """Let the second half of a persistent grid over ``tiles`` wait (0 nanoseconds: not at all)."""
    if NANOSECONDS > 0:
        blocks = tl.num_programs(0)
        if (2 * tl.program_id(0) >= blocks) & (tiles >= TILES * blocks):
            tl.inline_asm_elementwise(
                "nanosleep.u32 $1; mov.u32 $0, $1;",
                "=r,r",
                [tl.cast(NANOSECONDS, tl.uint32)],
                dtype=tl.uint32,
                is_pure=False,
                pack=1,
            )
