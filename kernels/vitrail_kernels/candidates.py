"""Configurations that `vitrail tune` times beside the heuristic's: a dozen an operator, by hand.

Each row gives block_m, block_n, block_k, warps, stages, registers and ctas of a `KernelConfig`.
Rows vary only settings that cannot change a result: a warpgroup has 64 rows of a tile, a warp 16 at
least, and K is added in order. Rows that spill are dropped when they are compiled, so a row here
costs a second of compiling and no correctness.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vitrail_kernels.compile import SHARED_TOTAL
from vitrail_kernels.configs import KernelConfig

Row = tuple[int, int, int, int, int, int | None, int]

FAMILIES = {80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma_tma"}
"""Architectures that share rows, by the instruction that multiplies; sm_120 has tensor maps too."""

LARGE: dict[str, tuple[Row, ...]] = {
    "wgmma": (
        (128, 128, 64, 8, 2, 128, 2), (128, 128, 64, 8, 3, 128, 2), (128, 128, 64, 8, 4, None, 1),
        (128, 256, 64, 8, 3, None, 1), (128, 256, 64, 8, 4, None, 1), (128, 256, 32, 8, 6, None, 1),
        (256, 128, 64, 8, 3, None, 1), (256, 128, 64, 8, 4, None, 1),
    ),
    "tcgen05": (
        (128, 128, 64, 8, 2, 128, 2), (128, 128, 64, 8, 3, 128, 2), (128, 128, 64, 8, 4, None, 1),
        (128, 256, 64, 8, 3, None, 1), (128, 64, 64, 8, 3, 128, 2), (128, 128, 32, 8, 4, 128, 2),
    ),
    "mma": (
        (128, 128, 32, 4, 3, None, 2), (128, 128, 32, 4, 4, None, 2), (128, 128, 32, 8, 4, 128, 2),
        (128, 128, 64, 8, 3, None, 1), (128, 64, 32, 4, 3, 168, 3), (64, 128, 32, 4, 3, 168, 3),
        (128, 64, 64, 4, 3, None, 2), (64, 128, 64, 4, 3, None, 2),
    ),
    "mma_tma": (
        (128, 64, 64, 4, 2, None, 2), (128, 64, 32, 4, 4, None, 2), (128, 128, 32, 8, 3, 128, 2),
        (64, 128, 64, 4, 2, None, 2), (128, 128, 64, 8, 3, None, 1), (64, 64, 64, 4, 3, None, 2),
    ),
}  # fmt: skip
"""`linear` where 128 x 128 tiles are enough for every multiprocessor."""

SMALL: dict[str, tuple[Row, ...]] = {
    "wgmma": (
        (64, 64, 64, 4, 4, None, 2), (64, 64, 64, 4, 6, None, 2), (64, 64, 64, 4, 8, None, 2),
        (64, 64, 64, 4, 4, 168, 3), (64, 64, 128, 4, 3, None, 2), (64, 64, 128, 4, 2, 168, 3),
        (64, 128, 64, 4, 4, None, 2), (64, 128, 64, 4, 3, None, 2), (128, 64, 64, 8, 4, 128, 2),
    ),
    "tcgen05": (
        (64, 64, 64, 4, 2, None, 2), (64, 64, 64, 4, 4, None, 2), (64, 128, 64, 4, 2, None, 2),
        (64, 128, 64, 4, 4, None, 1), (128, 64, 64, 8, 3, 128, 2),
    ),
    "mma": (
        (64, 64, 32, 4, 4, 168, 3), (64, 64, 64, 4, 3, 168, 3), (64, 64, 64, 4, 4, None, 2),
        (64, 128, 32, 4, 4, None, 2), (64, 128, 64, 4, 3, None, 2), (128, 64, 32, 4, 4, None, 2),
    ),
    "mma_tma": (
        (64, 64, 64, 4, 3, None, 2), (64, 64, 64, 4, 2, 168, 3), (64, 128, 64, 4, 2, None, 2),
        (64, 64, 32, 4, 4, 168, 3), (128, 64, 64, 4, 2, None, 2),
    ),
}  # fmt: skip
"""`linear` of fewer rows."""

ATTENTION: tuple[Row, ...] = (
    (128, 0, 0, 8, 2, 128, 1), (128, 0, 0, 8, 3, 128, 1), (128, 0, 0, 8, 4, 128, 1),
    (128, 0, 0, 8, 3, None, 1), (64, 0, 0, 4, 2, 128, 1), (64, 0, 0, 4, 3, 128, 1),
    (64, 0, 0, 4, 3, 168, 1), (64, 0, 0, 4, 2, None, 1), (64, 0, 0, 4, 4, 168, 1),
)  # fmt: skip
"""block_n, the keys a tile, is the heuristic's: the order of a softmax's sums follows from it."""

PATCH_EMBED: tuple[Row, ...] = (
    (128, 128, 32, 8, 3, 128, 2), (128, 128, 32, 8, 4, 128, 2), (128, 128, 64, 8, 3, 128, 2),
    (128, 128, 64, 8, 2, 128, 2), (128, 128, 64, 8, 3, None, 1), (64, 128, 32, 4, 3, 168, 3),
    (64, 128, 32, 4, 4, 168, 3), (64, 128, 64, 4, 3, 168, 3), (64, 128, 64, 4, 3, None, 2),
    (64, 64, 32, 4, 3, 168, 3), (64, 64, 64, 4, 3, 168, 3), (128, 64, 32, 8, 3, 128, 2),
)  # fmt: skip


def _rows(op: str, base: KernelConfig, arch: int) -> tuple[Row, ...]:
    if op == "linear":
        return (SMALL if base.block_m <= 64 else LARGE)[FAMILIES[arch]]
    return {"attention": ATTENTION, "patch_embed": PATCH_EMBED}.get(op, ())


def candidates(op: str, base: KernelConfig, arch: int) -> Iterator[KernelConfig]:
    """The rows for ``op`` on ``arch`` (90 for sm_90) whose buffers fit a multiprocessor.

    ``base`` is the heuristic's choice, and not among them. Tiles are visited in its order.
    """
    for m, n, k, warps, stages, registers, ctas in _rows(op, base, arch):
        columns = n or base.block_n
        config = KernelConfig(m, columns, k, warps, stages, registers, ctas, base.group_m)
        shared = 2 * (stages - 1) * (m + columns) * k * ctas  # bytes, at least
        if config != replace(base, reason="") and shared <= SHARED_TOTAL[arch]:
            yield config
