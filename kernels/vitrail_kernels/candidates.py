"""Configurations that `vitrail tune` times beside the heuristic's: about a dozen per operator.

The fields are block_m, block_n, block_k, warps, stages, registers and ctas. Candidates vary only
settings that cannot change a result: a warpgroup keeps 64 rows of a tile, a warp at least 16, and K
is added in order. A candidate that spills is dropped after compiling, so a new line here costs a
second of compiling and cannot make a result wrong.
"""

from collections.abc import Iterator
from dataclasses import replace

from vitrail_kernels.compile import SHARED_TOTAL
from vitrail_kernels.configs import KernelConfig

FAMILIES = {80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma_tma"}
"""The candidates of an architecture, named by its product instruction. sm_120 has tensor maps
besides mma."""

LARGE: dict[str, tuple[KernelConfig, ...]] = {
    "wgmma": (
        KernelConfig(128, 128, 64, 8, 3, 128, 2),
        KernelConfig(128, 128, 64, 8, 3, 128, 2, stagger=6000),
        KernelConfig(128, 128, 64, 8, 3, 128, 2, stagger=12000), KernelConfig(128, 128, 64, 8, 4),
        KernelConfig(128, 256, 64, 8, 3), KernelConfig(128, 256, 64, 8, 4),
        KernelConfig(128, 256, 32, 8, 6), KernelConfig(256, 128, 64, 8, 3),
        KernelConfig(256, 128, 64, 8, 4),
    ),
    "tcgen05": (
        KernelConfig(128, 128, 64, 8, 2, 128, 2), KernelConfig(128, 128, 64, 8, 3, 128, 2),
        KernelConfig(128, 128, 64, 8, 4), KernelConfig(128, 256, 64, 8, 3),
        KernelConfig(128, 64, 64, 8, 3, 128, 2), KernelConfig(128, 128, 32, 8, 4, 128, 2),
    ),
    "mma": (
        KernelConfig(128, 128, 32, 4, 3, ctas=2), KernelConfig(128, 128, 32, 4, 4, ctas=2),
        KernelConfig(128, 128, 32, 8, 4, 128, 2), KernelConfig(128, 128, 64, 8, 3),
        KernelConfig(128, 64, 32, 4, 3, 168, 3), KernelConfig(64, 128, 32, 4, 3, 168, 3),
        KernelConfig(128, 64, 64, 4, 3, ctas=2), KernelConfig(64, 128, 64, 4, 3, ctas=2),
    ),
    "mma_tma": (
        KernelConfig(128, 64, 64, 4, 2, ctas=2), KernelConfig(128, 64, 32, 4, 4, ctas=2),
        KernelConfig(128, 128, 32, 8, 3, 128, 2), KernelConfig(64, 128, 64, 4, 2, ctas=2),
        KernelConfig(128, 128, 64, 8, 3), KernelConfig(64, 64, 64, 4, 3, ctas=2),
    ),
}  # fmt: skip
"""`linear` if there are enough 128 x 128 tiles for every multiprocessor."""

SMALL: dict[str, tuple[KernelConfig, ...]] = {
    "wgmma": (
        KernelConfig(64, 64, 64, 4, 4, ctas=2), KernelConfig(64, 64, 64, 4, 6, ctas=2),
        KernelConfig(64, 64, 64, 4, 8, ctas=2), KernelConfig(64, 64, 64, 4, 4, 168, 3),
        KernelConfig(64, 64, 128, 4, 3, ctas=2), KernelConfig(64, 64, 128, 4, 2, 168, 3),
        KernelConfig(64, 128, 64, 4, 4, ctas=2), KernelConfig(64, 128, 64, 4, 3, ctas=2),
        KernelConfig(128, 64, 64, 8, 4, 128, 2),
    ),
    "tcgen05": (
        KernelConfig(64, 64, 64, 4, 2, ctas=2), KernelConfig(64, 64, 64, 4, 4, ctas=2),
        KernelConfig(64, 128, 64, 4, 2, ctas=2), KernelConfig(64, 128, 64, 4, 4),
        KernelConfig(128, 64, 64, 8, 3, 128, 2),
    ),
    "mma": (
        KernelConfig(64, 64, 32, 4, 4, 168, 3), KernelConfig(64, 64, 64, 4, 3, 168, 3),
        KernelConfig(64, 64, 64, 4, 4, ctas=2), KernelConfig(64, 128, 32, 4, 4, ctas=2),
        KernelConfig(64, 128, 64, 4, 3, ctas=2), KernelConfig(128, 64, 32, 4, 4, ctas=2),
    ),
    "mma_tma": (
        KernelConfig(64, 64, 64, 4, 3, ctas=2), KernelConfig(64, 64, 64, 4, 2, 168, 3),
        KernelConfig(64, 128, 64, 4, 2, ctas=2), KernelConfig(64, 64, 32, 4, 4, 168, 3),
        KernelConfig(128, 64, 64, 4, 2, ctas=2),
    ),
}  # fmt: skip
"""`linear` with fewer rows."""

INT8_FAMILIES = {80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "mma_tma", 120: "mma_tma"}
"""As `FAMILIES`, for products of int8. On sm_100 Triton makes them without tensor memory."""

INT8_LARGE: dict[str, tuple[KernelConfig, ...]] = {
    "wgmma": (
        KernelConfig(128, 128, 128, 8, 3, 128, 2), KernelConfig(128, 128, 128, 8, 3, ctas=2),
        KernelConfig(128, 128, 128, 8, 3, 128, 2, stagger=4000),
        KernelConfig(128, 256, 128, 8, 3), KernelConfig(128, 128, 128, 8, 3),
        KernelConfig(128, 128, 128, 8, 5), KernelConfig(64, 128, 128, 4, 3, 168, 3),
        KernelConfig(64, 128, 128, 4, 2, 168, 3), KernelConfig(128, 64, 128, 8, 3, 128, 2),
        KernelConfig(128, 128, 64, 8, 6),
    ),
    "mma": (
        KernelConfig(128, 128, 64, 4, 3, ctas=2), KernelConfig(128, 128, 64, 8, 4, 128, 2),
        KernelConfig(128, 128, 128, 8, 3), KernelConfig(128, 64, 64, 4, 3, ctas=2),
        KernelConfig(128, 64, 128, 4, 3, ctas=2), KernelConfig(64, 128, 64, 4, 3, 168, 3),
        KernelConfig(64, 128, 128, 4, 3, ctas=2), KernelConfig(64, 128, 64, 4, 4, ctas=2),
    ),
    "mma_tma": (
        KernelConfig(128, 128, 64, 4, 3, ctas=2), KernelConfig(128, 128, 128, 8, 2, 128, 2),
        KernelConfig(128, 128, 128, 8, 2), KernelConfig(128, 64, 128, 4, 2, ctas=2),
        KernelConfig(128, 64, 64, 4, 3, ctas=2), KernelConfig(64, 128, 128, 4, 2, 168, 3),
        KernelConfig(64, 128, 64, 4, 3, 168, 3), KernelConfig(64, 128, 128, 4, 2, ctas=2),
    ),
}  # fmt: skip
"""The int8 products with many rows. Integer sums are exact in any order; these tiles keep 64 rows
and whole chunks of statistics all the same."""

INT8_SMALL: dict[str, tuple[KernelConfig, ...]] = {
    "wgmma": (
        KernelConfig(64, 64, 128, 4, 4, ctas=2), KernelConfig(64, 64, 128, 4, 6, ctas=2),
        KernelConfig(64, 64, 128, 4, 3, 168, 3), KernelConfig(64, 64, 64, 4, 6, ctas=2),
        KernelConfig(64, 128, 128, 4, 3, ctas=2), KernelConfig(64, 128, 128, 4, 4, ctas=2),
        KernelConfig(64, 128, 128, 4, 2, 168, 3), KernelConfig(128, 128, 128, 8, 3, 128, 2),
    ),
    "mma": (
        KernelConfig(64, 64, 64, 4, 4, 168, 3), KernelConfig(64, 64, 128, 4, 3, 168, 3),
        KernelConfig(64, 64, 64, 4, 3, ctas=2), KernelConfig(64, 128, 64, 4, 4, ctas=2),
        KernelConfig(64, 128, 128, 4, 3, ctas=2), KernelConfig(128, 64, 64, 4, 3, ctas=2),
    ),
    "mma_tma": (
        KernelConfig(64, 64, 64, 4, 4, 168, 3), KernelConfig(64, 64, 128, 4, 2, 168, 3),
        KernelConfig(64, 64, 64, 4, 3, ctas=2), KernelConfig(64, 128, 64, 4, 3, ctas=2),
        KernelConfig(64, 128, 128, 4, 2, ctas=2), KernelConfig(128, 64, 128, 4, 2, ctas=2),
    ),
}  # fmt: skip
"""The int8 products with fewer rows."""

ATTENTION: tuple[KernelConfig, ...] = (
    KernelConfig(128, 0, 0, 8, 2, 128), KernelConfig(128, 0, 0, 8, 3, 128),
    KernelConfig(128, 0, 0, 8, 4, 128), KernelConfig(128, 0, 0, 8, 3),
    KernelConfig(64, 0, 0, 4, 2, 128), KernelConfig(64, 0, 0, 4, 3, 128),
    KernelConfig(64, 0, 0, 4, 3, 168), KernelConfig(64, 0, 0, 4, 2),
    KernelConfig(64, 0, 0, 4, 4, 168),
)  # fmt: skip
"""block_n, the keys of a tile, stays the heuristic's: it fixes the order of a softmax's sums."""

PATCH_EMBED: tuple[KernelConfig, ...] = (
    KernelConfig(128, 128, 32, 8, 3, 128, 2), KernelConfig(128, 128, 32, 8, 4, 128, 2),
    KernelConfig(128, 128, 64, 8, 3, 128, 2), KernelConfig(128, 128, 64, 8, 2, 128, 2),
    KernelConfig(128, 128, 64, 8, 3), KernelConfig(64, 128, 32, 4, 3, 168, 3),
    KernelConfig(64, 128, 32, 4, 4, 168, 3), KernelConfig(64, 128, 64, 4, 3, 168, 3),
    KernelConfig(64, 128, 64, 4, 3, ctas=2), KernelConfig(64, 64, 32, 4, 3, 168, 3),
    KernelConfig(64, 64, 64, 4, 3, 168, 3), KernelConfig(128, 64, 32, 8, 3, 128, 2),
)  # fmt: skip


INT8 = ("linear_int8", "linear_int8_grouped")
"""The operators whose operands are int8."""


def _listed(op: str, base: KernelConfig, arch: int) -> tuple[KernelConfig, ...]:
    if op == "linear":
        return (SMALL if base.block_m <= 64 else LARGE)[FAMILIES[arch]]
    if op in INT8:
        return (INT8_SMALL if base.block_m <= 64 else INT8_LARGE)[INT8_FAMILIES[arch]]
    return {"attention": ATTENTION, "patch_embed": PATCH_EMBED}.get(op, ())


def candidates(op: str, base: KernelConfig, arch: int) -> Iterator[KernelConfig]:
    """The candidates for ``op`` on ``arch`` (90 for sm_90) whose buffers fit a multiprocessor.

    ``base`` is the heuristic's choice. It is not among them, and they visit tiles in its order.
    """
    for listed in _listed(op, base, arch):
        config = replace(listed, block_n=listed.block_n or base.block_n, group_m=base.group_m)
        size = 1 if op in INT8 else 2
        step = size * (config.block_m + config.block_n) * config.block_k  # bytes
        fits = (config.stages - 1) * step * config.ctas <= SHARED_TOTAL[arch]
        if fits and config != replace(base, reason=""):
            yield config
