"""Addresses, fragments, descriptors and counts that are wrong in the PTX of real kernels: the
emulator or the numbers say so, or nothing goes wrong for a reason that is given."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from emulated.planted import Planted, Replace, Subject, check_fault, edit
from emulated.subjects import attention, linear

pytestmark = pytest.mark.usefixtures("emulated_kernels")

SEEDS = range(3)
"""Each of them notices each of these faults."""

READ = "global memory: read out of bounds"
NUMBERS = "wrong: .* (largest error|not finite)"
RACE = "(read|write) after (read|write)"
UNWRITTEN = "bytes of out.* stay unwritten"
MISALIGNED = "misaligned address"
DEADLOCK = "deadlock in block 0: warp 0 at mbarrier"
NO_MBARRIER = "no mbarrier is initialized at byte"

Faults = dict[str, tuple[Planted, str]]
"""By name: a fault, and a pattern of its symptom; or after "harmless: " why there is none."""


def first(pattern: str, replacement: str | Replace = "", index: int = 0) -> Planted:
    """The first match replaced, or that of ``index``."""
    return Planted(ptx=edit(pattern, replacement, index))


def each(pattern: str, replacement: str) -> Planted:
    """Every match replaced."""
    return Planted(ptx=edit(pattern, replacement))


NOTHING = "{ .reg .b32 nothing; mov.b32 nothing, 0; }"
"""For an instruction that is removed after a guard, or on whose line another stands."""

LDMATRIX = r"(ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16 [^\[]*\[%r\d+)\]"
COPY = r"(cp\.async\.cg[^;]*), 0x10, (%r\d+);"
COPY_TARGET = r"(cp\.async\.cg\.shared\.global \[ %r\d+ \+ )0"
A_OF_MMA = r"(mma\.sync[^{]*\{[^}]*\}, \{ )(%r\d+), (%r\d+)"
B_OF_MMA = r"(mma\.sync[^{]*\{[^}]*\}, \{[^}]*\}, \{ )(%r\d+), (%r\d+)"
C_OF_MMA = r"(mma\.sync[^{]*(?:\{[^}]*\}, ){3}\{ )(%r\d+), (%r\d+)"
STORE = r"(st\.shared\.v4\.b32 \[ %r\d+ \+ )0"
STORE_OUT = r"(st\.global\.v4\.b32 \[ %rd\d+ \+ )0"
BARRIER = r"bar\.sync \t0;"
WHO = ".reg .u32 who; .reg .pred some; mov.u32 who, %tid.x; setp.lt.u32 some, who, {};"

LINEAR_80: Faults = {
    "ldmatrix 16 bytes on": (first(LDMATRIX, r"\1+16]"), NUMBERS),
    "ldmatrix 8 bytes on": (first(LDMATRIX, r"\1+8]"), MISALIGNED),
    "ldmatrix past the end": (first(LDMATRIX, r"\1+65536]"), "shared memory: out of bounds"),
    "ldmatrix transposes": (first(r"(ldmatrix\S*\.x4)(\.shared)", r"\1.trans\2"), NUMBERS),
    "ld.shared 16 bytes on": (first(r"(ld\.shared[^;]*\[%r\d+)\]", r"\1+16]"), f"{RACE}|{NUMBERS}"),
    "cp.async of 8 bytes": (first(COPY, r"\1, 8, \2;"), "cp.async reads 16 bytes and writes 8"),
    "cp.async reads 8 of 16": (first(COPY, r"\1, 0x10, 8;"), NUMBERS),
    "cp.async reads none": (first(COPY, r"\1, 0x10, 0;"), NUMBERS),
    "cp.async reads 32": (first(COPY, r"\1, 0x10, 32;"), "cp.async reads 32 bytes and writes 16"),
    "cp.async 16 bytes on": (first(r"(cp\.async\.cg[^;]*\[ %rd\d+ \+ )0", r"\g<1>16"), NUMBERS),
    "cp.async into the next stage": (first(COPY_TARGET, r"\g<1>8192"), RACE),
    "cp.async 4 bytes on": (first(COPY_TARGET, r"\g<1>4"), MISALIGNED),
    "elements of A exchanged": (first(A_OF_MMA, r"\1\3, \2"), NUMBERS),
    "elements of B exchanged": (first(B_OF_MMA, r"\1\3, \2"), NUMBERS),
    "sums exchanged": (first(C_OF_MMA, r"\1\3, \2"), NUMBERS),
    "halves of a pair exchanged": (
        first(r"(cvt\.rn\.f16x2\.f32 \t%r\d+), (%r\d+), (%r\d+);", r"\1, \3, \2;"),
        NUMBERS,
    ),
    "st.shared 4 bytes on": (first(STORE, r"\g<1>4"), MISALIGNED),
    "st.shared 16 bytes on": (first(STORE, r"\g<1>16"), RACE),
    "st.global 4 bytes on": (first(STORE_OUT, r"\g<1>4"), MISALIGNED),
    "st.global 16 bytes on": (
        first(STORE_OUT, r"\g<1>16"),
        "write of bytes that another block writes in the same launch, in no order",
    ),
    "st.global left out": (first(r"@%p\d+ st\.global[^;]*;"), UNWRITTEN),
    "each block takes the first tile": (
        each(r"(mov\.u32 \t%r\d+), %ctaid\.x;", r"\1, 0;"),
        UNWRITTEN,
    ),
    "blocks along y": (each(r"%ctaid\.x", "%ctaid.y"), UNWRITTEN),
    "lane for thread": (each(r"%tid\.x", "%laneid"), RACE),
    "threads counted from 1": (
        each(r"mov\.u32 \t(%r\d+), %tid\.x;", r"mov.u32 \1, %tid.x; add.s32 \1, \1, 1;"),
        NUMBERS,
    ),
    "steps of twice the depth": (each(r"(add\.s32 \t(%r\d+), \2, )32;", r"\g<1>64;"), NUMBERS),
    "barrier of 64 threads": (first(BARRIER, "bar.sync 0, 64;", 2), RACE),
    "barrier of 100 threads": (first(BARRIER, "bar.sync 0, 100;", 2), "wanted a multiple of 32"),
    "barrier of 256 threads": (
        first(BARRIER, "bar.sync 0, 256;", 2),
        "deadlock in block 0: warp 0 at barrier 0 .*; warp 3 at barrier 0",
    ),
    "barrier of 128 threads": (
        first(BARRIER, "bar.sync 0, 128;", 2),
        "harmless: the block has 128",
    ),
    "barrier 1": (first(BARRIER, "bar.sync 1;", 2), "harmless: all meet at it, and it is free"),
    "barrier 16": (first(BARRIER, "bar.sync 16;", 2), "barrier 16, wanted 0 to 15"),
    "bar.arrive": (first(BARRIER, "bar.arrive 0, 128;", 2), RACE),
    "barrier of some lanes": (
        first(BARRIER, WHO.format(7).replace("%tid.x", "%laneid") + " @some bar.sync 0;", 2),
        "divergent barrier",
    ),
    "barrier of one warp": (first(BARRIER, WHO.format(32) + " @some bar.sync 0;", 2), RACE),
}

SHUFFLE = r"shfl\.sync\.bfly\.b32 \t(%r\d+), (%r\d+), 2, 31, -1;"
OTHER = r"mov\.b32 \t(%r\d+), 0;(?=[^$]{0,400}?mov\.u32 %r\d+, \1;)"
KEYS = r"selp\.f32 \t(%r\d+), (%r\d+), 0fFF800000, %p\d+;"
LOAD = r"(ld\.global\.v4\.b32 [^;]*\[ %rd\d+ \+ )0"
ATTENTION_80: Faults = {
    "mask of scores dropped": (each(KEYS, r"mov.b32 \1, \2;"), NUMBERS),
    "other is NaN": (each(OTHER, r"mov.b32 \1, 0x7fff7fff;"), NUMBERS),
    "shfl from 4 lanes away": (
        first(SHUFFLE, r"shfl.sync.bfly.b32 \1, \2, 4, 31, -1;"),
        NUMBERS,
    ),
    "shfl left out": (first(SHUFFLE, r"mov.b32 \1, \2;"), NUMBERS),
    "shfl of half a warp": (
        first(SHUFFLE, r"shfl.sync.bfly.b32 \1, \2, 2, 31, 65535;"),
        "a lane executes the instruction that the member mask does not name",
    ),
    "ldmatrix does not transpose": (first(r"(ldmatrix\S*\.x4)\.trans", r"\1"), NUMBERS),
    "the least score for the largest": (first(r"max\.f32", "min.f32"), "other bits: .* of out"),
    "ld.global 2 bytes on": (first(LOAD, r"\g<1>2"), MISALIGNED),
    "ld.global 8 bytes on": (first(LOAD, r"\g<1>8"), MISALIGNED),
}

DESCRIPTOR = 1 << 62 | 1024 >> 4 << 32
"""Swizzle of 128 bytes, 1024 bytes from 8 rows to the next; the address comes in at run time."""


def descriptor(difference: int) -> Planted:
    """Descriptors of the first product with other bits."""
    return each(f"{DESCRIPTOR};", f"{(DESCRIPTOR + difference) % (1 << 64)};")


PRODUCT = r"(wgmma\.mma_async[^;]*), 1, 1, 0, 0;"
INIT = r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+)\], 1;"
BULK_LOAD = r"(cp\.async\.bulk\.tensor\.2d\.shared\S* \[%r\d+)\]"
COORDINATES = r"(cp\.async\.bulk\.tensor\.2d\.{}[^{{]*)\{{(%r\d+), (%r\d+)\}}"
LINEAR_90: Faults = {
    "descriptor: swizzle of 64": (descriptor(1 << 62), NUMBERS),
    "descriptor: no swizzle": (descriptor(-1 << 62), NUMBERS),
    "descriptor: half the stride": (descriptor(-32 << 32), NUMBERS),
    "descriptor: twice the stride": (descriptor(64 << 32), RACE),
    "descriptor: another leading offset": (
        descriptor(64 << 16),
        "harmless: K-major rows of one swizzle do not use it",
    ),
    "descriptor: 16 bytes on": (descriptor(1), NUMBERS),
    "descriptor: past the end": (descriptor(0x2000), "shared memory: out of bounds"),
    "descriptor: a base offset": (descriptor(1 << 49), "a base offset is not known"),
    "the first step of K twice": (each(f"{DESCRIPTOR + 2};", f"{DESCRIPTOR};"), NUMBERS),
    "B transposed": (first(PRODUCT, r"\1, 1, 1, 0, 1;"), NUMBERS),
    "A transposed": (first(PRODUCT, r"\1, 1, 1, 1, 0;"), NUMBERS),
    "A negated": (first(PRODUCT, r"\1, -1, 1, 0, 0;"), NUMBERS),
    "A scaled by 2": (first(PRODUCT, r"\1, 2, 1, 0, 0;"), "a scale is neither 1 nor -1"),
    "A and B exchanged": (
        first(r"(wgmma\.mma_async[^;]*\}), (%rd\d+), (%rd\d+),", r"\1, \3, \2,"),
        RACE,
    ),
    "bf16 for fp16": (first(r"f32\.f16\.f16", "f32.bf16.bf16"), NUMBERS),
    "products that do not add": (first(r"mov\.pred \t(%p\d+), -1;", r"mov.pred \1, 0;"), NUMBERS),
    "one A for both warpgroups": (
        each(r"and\.b32 \t(%r\d+), %r\d+, 512;", r"mov.b32 \1, 0;"),
        NUMBERS,
    ),
    "an mbarrier of two arrivals": (first(INIT, r"\1], 2;"), DEADLOCK),
    "an mbarrier not initialized": (first(r"@%p\d+ mbarrier\.init[^;]*;", NOTHING), NO_MBARRIER),
    "an mbarrier initialized twice": (first(INIT, r"\g<0> \g<0>"), "an mbarrier that is in use"),
    "an mbarrier 4 bytes on": (first(INIT, r"\1+4], 1;"), MISALIGNED),
    "an mbarrier invalidated early": (
        first(
            r"\twgmma\.fence\.sync\.aligned;",
            WHO.format(1) + r" @some mbarrier.inval.shared::cta.b64 [global_smem+114688];\g<0>",
        ),
        f"{NO_MBARRIER}|deadlock|while a bulk load",
    ),
    "every thread expects": (
        first(r"@%p\d+ (mbarrier\.arrive\.expect_tx)", r"\1"),
        f"more arrivals at an mbarrier than the 1|its initialization by|{NO_MBARRIER}",
    ),
    "every thread loads": (first(r"@%p\d+ (cp\.async\.bulk\.tensor)", r"\1"), RACE),
    "every lane elected": (
        first(r"elect\.sync \t(%r\d+)\|(%p\d+), -1;", r"mov.b32 \1, 0; setp.eq.s32 \2, \1, 0;", 3),
        RACE,
    ),
    "elect of one lane": (first(r"(elect\.sync [^;]*), -1;", r"\1, 1;", 3), "member mask"),
    "a load left out": (
        first(r"@%p\d+ cp\.async\.bulk\.tensor\.2d\.shared[^;]*;", NOTHING),
        DEADLOCK,
    ),
    "a load for the next mbarrier": (
        first(r"(cp\.async\.bulk\.tensor\.2d\.shared[^;]*, \[%r\d+)\];", r"\1+8];"),
        "a phase ends, too few bytes are expected|deadlock",
    ),
    "a load 64 bytes on": (first(BULK_LOAD, r"\1+64]"), MISALIGNED),
    "a load 1024 bytes on": (first(BULK_LOAD, r"\1+1024]"), RACE),
    "a load's coordinates exchanged": (
        first(COORDINATES.format("shared"), r"\1{\3, \2}", 4),
        NUMBERS,
    ),
    "a store's coordinates exchanged": (
        first(COORDINATES.format("global"), r"\1{\3, \2}"),
        UNWRITTEN,
    ),
    "a store left out": (
        first(r"@%p\d+ cp\.async\.bulk\.tensor\.2d\.global[^;]*;", NOTHING),
        UNWRITTEN,
    ),
    "a store 1024 bytes on": (
        first(r"(cp\.async\.bulk\.tensor\.2d\.global[^;]*\], \[%r\d+)\]", r"\1+1024]"),
        "shared memory: out of bounds",
    ),
    "stmatrix 16 bytes on": (
        first(r"(stmatrix[^\[]*\[%r\d+)\]", r"\1+16]"),
        "read of what nobody wrote at byte .* by a bulk store|write over the mbarrier at byte",
    ),
    "stmatrix 8 bytes on": (first(r"(stmatrix[^\[]*\[%r\d+)\]", r"\1+8]"), MISALIGNED),
    "elements of stmatrix exchanged": (
        first(r"(stmatrix[^{]*\{)(%r\d+), (%r\d+)", r"\1\3, \2"),
        NUMBERS,
    ),
    "the loop over tiles skips one": (
        each(r"(mov\.u32 \t%r\d+), %nctaid\.x;", r"\1, 2;"),
        UNWRITTEN,
    ),
    "the loop over tiles begins at 1": (
        each(r"(mov\.u32 \t%r\d+), %ctaid\.x;", r"\1, 1;"),
        UNWRITTEN,
    ),
    "barriers of different counts": (
        first(BARRIER, "bar.sync 0, 128;", 8),
        "warps meet at barrier 0 with different counts of threads",
    ),
    "wgmma of one warp": (
        first(r"\twgmma\.commit_group", WHO.format(32) + r" @some wgmma.commit_group"),
        "at wgmma.wait_group, for the other warps of its warpgroup",
    ),
    "polls instead of waits": (
        each(r"mbarrier\.try_wait", "mbarrier.test_wait"),
        "harmless: the loop asks again",
    ),
}

NO_INVAL = first(r"@%p\d+ mbarrier\.inval[^;]*;", NOTHING)
LINEAR_90["an mbarrier not invalidated"] = (NO_INVAL, "harmless: nothing takes its place")
ATTENTION_90: Faults = {
    "an mbarrier not invalidated": (NO_INVAL, "write over the mbarrier at byte 0, which was not"),
    "mask of scores dropped": (each(KEYS, r"mov.b32 \1, \2;"), NUMBERS),
    "other is NaN": (each(OTHER, r"mov.b32 \1, 0x7fff7fff;"), NUMBERS),
    "st.shared 16 bytes on": (first(STORE, r"\g<1>16"), RACE),
}

CASES = [
    pytest.param(make, arch, planted, message, id=f"{make.__name__} sm_{arch} {label}")
    for make, arch, faults in (
        (linear, 80, LINEAR_80),
        (attention, 80, ATTENTION_80),
        (linear, 90, LINEAR_90),
        (attention, 90, ATTENTION_90),
    )
    for label, (planted, message) in faults.items()
]


@pytest.mark.parametrize(("make", "arch", "planted", "message"), CASES)
def test_a_wrong_instruction_is_noticed(
    make: Callable[[int], Subject], arch: int, planted: Planted, message: str
) -> None:
    check_fault(make, arch, planted, message, SEEDS)
