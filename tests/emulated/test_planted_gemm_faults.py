"""Faults planted in a product that is written by hand: warps of two kinds, clusters, multicast."""

from __future__ import annotations

import re

import pytest

from emulated.planted import Planted, add, caught, edit, exchange, names_place, of_map
from emulated.subjects import gemm, gemm_ptx

SEEDS = range(8)
"""Each of them notices each of these faults, but for the barrier at the end: 0, 1, 3, 5 and 7 of
them do, in which one block runs ahead of the other."""


@pytest.fixture(scope="module", autouse=True)
def compiled_by_nvcc(emulated_kernels: None) -> None:
    if not gemm_ptx():
        pytest.skip("gemm.cu is not compiled: no nvcc in CUDA_HOME or PATH")


def ptx(pattern: str, replacement: str = "", *indexes: int, **options: bool) -> Planted:
    return Planted(ptx=edit(pattern, replacement, *indexes), options=options)


WAIT = r"again: mbarrier\.try_wait[^\n]*\n@!p bra\.uni again;"
PARITY = r"(again: mbarrier\.try_wait\.parity\.shared::cta\.b64 p, \[%r\d+\], )(%r\d+);"
INVERTED = r".reg .b32 other; xor.b32 other, \2, 1;\n\g<1>other;"
CLUSTER_BARRIER = (
    r"barrier\.cluster\.arrive\.release\.aligned;\nbarrier\.cluster\.wait\.acquire\.aligned;"
)
INIT = r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\]), (%r\d+);"
MAPA = r"(mapa\.shared::cluster\.u32 far, (%r\d+)), %r\d+;"
MASK = r"(multicast::cluster [^;]*), %rs\d+;"
EXPECT = r"(expect_tx[^;]*), %r\d+;"
ALL_EMPTY, ALL_FULL = (1, 3, 5, 7), (0, 2, 4, 6)

RACE = "(read|write) after (read|write)"
DEADLOCK = "deadlock in block 0: block 0 of the cluster, warp 0 at mbarrier 196640 parity 0"
UNWRITTEN = "bytes of out .* stay unwritten"
NUMBERS = "wrong: .* largest error"

FAULTS = {
    "the producer does not wait": (ptx(WAIT, "", 1), "more arrivals at an mbarrier than the 1"),
    "consumers do not wait": (ptx(WAIT, "", 0), "read of what nobody wrote .* by wgmma"),
    "the producer waits for the other parity": (ptx(PARITY, INVERTED, 1), DEADLOCK),
    "consumers wait for the other parity": (
        ptx(PARITY, INVERTED, 0),
        "read of what nobody wrote .* by wgmma",
    ),
    "no barrier of the cluster at the start": (
        ptx(CLUSTER_BARRIER, "", 0),
        "its initialization by warp 0 is not ordered before|no mbarrier is initialized",
    ),
    "no wait at the cluster's barrier": (
        ptx(r"barrier\.cluster\.wait\.acquire\.aligned;", "", 0),
        "barrier.cluster.arrive twice without a wait",
    ),
    "no barrier of the cluster at the end": (
        ptx(CLUSTER_BARRIER, "", 1),
        "shared::cluster: block . has ended",
    ),
    "no barrier of the block at the start": (
        ptx(r"bar(rier)?\.sync \t0;", "", 0),
        "harmless: that of the cluster follows",
    ),
    "stages are empty after 2 of 4 arrivals": (
        ptx(INIT, r"\1, 2;", *ALL_EMPTY),
        "deadlock|more arr",
    ),
    "stages are empty after 8 arrivals": (ptx(INIT, r"\1, 8;", *ALL_EMPTY), DEADLOCK),
    "stages are full after 2 arrivals": (ptx(INIT, r"\1, 2;", *ALL_FULL), DEADLOCK),
    "stages are released before products end": (
        ptx(r"wgmma\.wait_group\.sync\.aligned 0;", "wgmma.wait_group.sync.aligned 1;"),
        RACE,
    ),
    "products are not waited for": (ptx(r"wgmma\.wait_group\.sync\.aligned 0;"), RACE),
    "products are not committed": (ptx(r"wgmma\.commit_group\.sync\.aligned;"), RACE),
    "no fence before products": (
        ptx(r"wgmma\.fence\.sync\.aligned;", strict=True),
        "wgmma before any wgmma.fence",
    ),
    "consumers release their own block": (ptx(MAPA, r"mov.b32 far, \2;"), f"{RACE}|deadlock"),
    "consumers release the first block": (ptx(MAPA, r"\1, 0;"), DEADLOCK),
    "consumers release a third block": (ptx(MAPA, r"\1, 2;"), "mapa: block 2, the cluster has 2"),
    "consumers release nobody": (
        ptx(r"mbarrier\.arrive\.release\.cluster\.shared::cluster\.b64 _, \[far\];"),
        DEADLOCK,
    ),
    "multicast to one block": (ptx(MASK, r"\1, 1;"), DEADLOCK),
    "multicast to three blocks": (ptx(MASK, r"\1, 7;"), "the mask 7 names blocks that are not in"),
    "multicast to none": (ptx(MASK, r"\1, 0;"), "the mask 0 names blocks that are not in"),
    "each block is the first": (ptx(r"(mov\.u32 %r\d+, )%cluster_ctarank;", r"\g<1>0;"), RACE),
    "half the bytes expected": (ptx(EXPECT, r"\1, 24576;"), DEADLOCK),
    "the other block's bytes not expected": (
        ptx(EXPECT, r"\1, 32768;"),
        "a phase ends, too few bytes are expected",
    ),
    "setmaxnreg of 41": (
        ptx(r"(setmaxnreg\.dec\.sync\.aligned\.u32) 40;", r"\1 41;"),
        "setmaxnreg: 41 registers, wanted a multiple of 8 from 24 to 256",
    ),
    "initialization not fenced": (
        ptx(r"fence\.mbarrier_init\.release\.cluster;"),
        "harmless: not modeled, mbarriers need an order alone; Triton has no such fence either",
    ),
    "a box of 64 rows": (Planted(maps=of_map("w_map", box=[64, 64])), DEADLOCK),
    "a box of 32 columns": (Planted(maps=of_map("x_map", box=[32, 128])), DEADLOCK),
    "swizzle of 64": (Planted(maps=of_map("w_map", swizzle=2)), NUMBERS),
    "maps exchanged": (Planted(values=exchange("x_map", "w_map")), NUMBERS),
    "out and bias exchanged": (
        Planted(values=exchange("out", "bias")),
        "read of what nobody wrote, byte .* of out",
    ),
    "half a cluster": (Planted(launch={"grid": (1,)}), "a grid of 1 blocks, wanted a multiple of"),
    "a cluster too many": (Planted(launch={"grid": (4,)}), "harmless: its rows are all masked"),
    "16 bytes of shared memory short": (
        Planted(launch={"shared": lambda size: size - 16}),
        "shared memory: out of bounds, 8 bytes at 196656, the block has 196656",
    ),
    "m a row long": (Planted(values=add("m", 1)), "write out of bounds, .* byte 96000 of out"),
    "m a row short": (Planted(values=add("m", -1)), f"480 {UNWRITTEN}"),
    "n two columns long": (Planted(values=add("n", 2)), "read out of bounds, .* byte 960 of bias"),
    "k a step long": (Planted(values=add("k", 64)), "harmless: the loads past it give zeros"),
    "k a step short": (Planted(values=add("k", -64)), NUMBERS),
}


@pytest.mark.parametrize(("planted", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_in_a_cluster_is_noticed(planted: Planted, message: str) -> None:
    if message.startswith("harmless: "):
        assert not caught(gemm(), planted, SEEDS)
    else:
        sentence = caught(gemm(), planted, SEEDS)
        assert names_place(sentence), sentence
        assert re.search(message, sentence), sentence
