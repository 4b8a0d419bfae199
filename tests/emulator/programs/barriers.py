"""Barriers, mbarriers, clusters: without any of them some read is not ordered."""

from __future__ import annotations

import numpy as np

from emulator.programs import LANES, Program, bytes_of, family, slots

WARPS = 2
EXCHANGE = """shl.b32 %r10, %r1, 2; add.s32 %r11, %r10, %r2; mad.lo.s32 %r12, %r1, 3, 1;
xor.b32 %r13, %r10, 128; add.s32 %r13, %r13, %r2;"""
SHOW = "mov.b32 %r99, 0; st.global.v2.b32 [%rd5], {%r14, %r99};"


def _exchanged(threads: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Each thread holds what the thread of the other warp wrote."""
    thread = np.arange(threads, dtype=np.uint32)
    return slots((thread ^ 32) * 3 + 1)


@family(r"(bar\.sync|barrier(?:\.cta)?\.sync(?:\.aligned)?)(#2|)")
def barrier(opcode: str, name: str, counted: str) -> Program:
    operands = "1, 64" if counted else "2"
    body = f"""{EXCHANGE} st.shared.b32 [%r11], %r12; {name} {operands};
ld.shared.b32 %r14, [%r13]; {SHOW}"""
    expected = bytes_of(_exchanged(64))
    return Program(body, bytes_of(), expected, threads=64, shared=256)


@family(r"(bar|barrier(?:\.cta)?)\.arrive(?:\.aligned)?")
def arrive(opcode: str, _: str) -> Program:
    """The first warp arrives, the second waits and reads."""
    body = f"""{EXCHANGE} mov.b32 %r14, 0; setp.lt.u32 %p1, %r1, 32; @!%p1 bra SECOND;
st.shared.b32 [%r11], %r12; {opcode} 3, 64; bra END;
SECOND: bar.sync 3, 64; ld.shared.b32 %r14, [%r13];
END: {SHOW}"""
    expected = _exchanged(64)
    expected[:LANES] = 0
    return Program(body, bytes_of(), bytes_of(expected), threads=64, shared=256)


@family(r"bar\.warp\.sync")
def warp_barrier(opcode: str) -> Program:
    body = "setp.lt.u32 %p1, %r1, 16; @%p1 bar.warp.sync 0xFFFFFFFF;"
    return Program(body, bytes_of(), bytes_of(), fault="bar.warp.sync names lanes that do not")


CLUSTER = ".explicitcluster .reqnctapercluster 2"


def cluster_exchange(arrive_name: str, wait_name: str) -> Program:
    """Each of two blocks reads what the other wrote."""
    meet = f"{arrive_name}; {wait_name};"
    body = f"""shl.b32 %r10, %r1, 2; add.s32 %r11, %r10, %r2; mad.lo.s32 %r12, %r3, 3, 1;
st.shared.b32 [%r11], %r12; mov.u32 %r15, %cluster_ctarank; xor.b32 %r15, %r15, 1; {meet}
mapa.shared::cluster.u32 %r16, %r11, %r15; ld.shared::cluster.b32 %r14, [%r16]; {meet} {SHOW}"""
    expected = bytes_of(_exchanged(64))
    return Program(body, bytes_of(), expected, grid=2, shared=128, directives=CLUSTER)


@family(r"barrier\.cluster\.arrive(?:\.release|\.relaxed)?(?:\.aligned)?")
def cluster_arrive(opcode: str) -> Program:
    return cluster_exchange(opcode, "barrier.cluster.wait.acquire.aligned")


@family(r"barrier\.cluster\.wait(?:\.acquire)?(?:\.aligned)?")
def cluster_wait(opcode: str) -> Program:
    return cluster_exchange("barrier.cluster.arrive.release.aligned", opcode)


@family(r"mapa\.shared::cluster\.u32")
def map_address(opcode: str) -> Program:
    return cluster_exchange("barrier.cluster.arrive", "barrier.cluster.wait")


# -- mbarriers

INIT = "mbarrier.init.shared::cta.b64 [%r20], {count};"
WAIT = "mbarrier.try_wait.parity.shared::cta.b64"


def handed_over(init: str, signal: str, wait: str, count: int, after: str = "") -> Program:
    """The first warp writes and signals the mbarrier, the second waits for it and reads."""
    body = f"""{EXCHANGE} mov.b32 %r14, 0; add.s32 %r20, %r2, 512; setp.eq.u32 %p2, %r1, 0;
@%p2 {init.format(count=count)}
bar.sync 0; setp.lt.u32 %p1, %r1, 32; @!%p1 bra SECOND;
st.shared.b32 [%r11], %r12; {signal} bra END;
SECOND: {wait} %p3, [%r20], 0; @!%p3 bra SECOND;
ld.shared.b32 %r14, [%r13];
END: bar.sync 0; {after} {SHOW}"""
    expected = _exchanged(64)
    expected[:LANES] = 0
    return Program(body, bytes_of(), bytes_of(expected), threads=64, shared=1024)


@family(r"mbarrier\.init\.shared(?:::cta)?\.b64")
def initialize(opcode: str) -> Program:
    signal = "mbarrier.arrive.shared::cta.b64 _, [%r20];"
    return handed_over(f"{opcode} [%r20], {{count}};", signal, WAIT, 32)


@family(r"mbarrier\.inval\.shared(?:::cta)?\.b64")
def invalidate(opcode: str) -> Program:
    """An mbarrier may be initialized again once it was invalidated."""
    signal = "mbarrier.arrive.shared::cta.b64 _, [%r20];"
    after = f"@%p2 {opcode} [%r20]; @%p2 {INIT.format(count=4)}"
    return handed_over(INIT, signal, WAIT, 32, after)


@family(r"mbarrier\.(try|test)_wait\.parity(?:\.acquire\.\w+)?\.shared(?:::cta)?\.b64")
def wait_for_parity(opcode: str, _: str) -> Program:
    return handed_over(INIT, "mbarrier.arrive.shared::cta.b64 _, [%r20];", opcode, 32)


@family(r"mbarrier\.arrive(\.release\.\w+)?\.shared(::cta|::cluster|)\.b64(#3|)")
def arrive_at(opcode: str, _: str, space: str, counted: str) -> Program:
    name = opcode.split("#")[0]
    target = "%r21" if space == "::cluster" else "%r20"
    signal = f"mapa.shared::cluster.u32 %r21, %r20, 0; {name} _, [{target}]"
    return handed_over(INIT, signal + (", 2;" if counted else ";"), WAIT, 64 if counted else 32)


@family(r"mbarrier\.arrive\.expect_tx(\.release\.\w+)?\.shared(::cta|::cluster|)\.b64")
def arrive_expecting(opcode: str, _: str, space: str) -> Program:
    """Of 32 arrivals one expects bytes, which a copy brings."""
    target = "%r21" if space == "::cluster" else "%r20"
    return _with_bytes(
        f"mapa.shared::cluster.u32 %r21, %r20, 0; @%p2 {opcode} _, [{target}], 128;"
        "@!%p2 mbarrier.arrive.shared::cta.b64 _, [%r20];"
    )


@family(r"mbarrier\.expect_tx\.relaxed\.cta\.shared(?:::cta)?\.b64")
def expect_bytes(opcode: str) -> Program:
    return _with_bytes(f"@%p2 {opcode} [%r20], 128; mbarrier.arrive.shared::cta.b64 _, [%r20];")


def _with_bytes(signal: str) -> Program:
    """`handed_over`, and the second warp reads what a bulk copy brought instead."""
    copy = "cp.async.bulk.tensor.1d.shared::cta.global.mbarrier::complete_tx::bytes"
    program = handed_over(
        INIT,
        f"{signal} mov.b64 %rd9, p2; mov.b32 %r30, 0;\n"
        f"@%p2 {copy} [%r22], [%rd9, {{%r30}}], [%r20];",
        WAIT,
        32,
    )
    body = program.body.replace("bar.sync 0;", "add.s32 %r22, %r2, 128; bar.sync 0;", 1)
    body = body.replace("ld.shared.b32 %r14, [%r13];", "ld.shared.b32 %r14, [%r11];")
    values = np.arange(LANES, dtype=np.uint32) + 1000
    expected = np.zeros(64, np.uint64)
    expected[LANES:] = values
    fields = {"element_type": 2, "dims": [32], "strides": [], "box": [32], "swizzle": 0}
    return Program(
        body,
        bytes_of(values),
        bytes_of(expected),
        threads=64,
        shared=1024,
        tensor=("in", fields),
    )
