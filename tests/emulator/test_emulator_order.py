"""Order: races in shared and in global memory, proxies, clusters."""

from __future__ import annotations

import dataclasses
import os
import re

import numpy as np
import pytest

import shared_library
from emulator import Fault
from emulator.programs import Program, bytes_of, complaint, execute, program_of
from emulator.programs.barriers import CLUSTER, EXCHANGE, INIT, SHOW, WAIT

pytestmark = [
    pytest.mark.skipif(shared_library.compiler() is None, reason="no C++ compiler here"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled"),
]
SEEDS = range(8)


def fault_of(program: Program, seed: int = 1) -> str:
    with pytest.raises(Fault) as caught:
        execute(program, seed=seed)
    return str(caught.value)


# -- shared memory


def exchange(between: str, after: str = "") -> Program:
    body = f"""{EXCHANGE} st.shared.b32 [%r11], %r12; {between}
ld.shared.b32 %r14, [%r13]; {after} {SHOW}"""
    thread = np.arange(64, dtype=np.uint64)
    return Program(body, bytes_of(), bytes_of((thread ^ 32) * 3 + 1), threads=64, shared=2048)


@pytest.mark.parametrize("seed", SEEDS)
def test_reads_without_a_barrier_are_races_in_every_schedule(seed: int) -> None:
    text = fault_of(exchange(""), seed)
    assert re.search(
        r"(read of what nobody wrote|read after write without synchronization) at byte \d+ of "
        r"shared memory, by warp [01]|write after read at byte \d+",
        text,
    )
    assert complaint(exchange("bar.sync 0;"), seed=seed) is None


@pytest.mark.parametrize("seed", SEEDS)
def test_writes_over_what_another_warp_reads_are_races(seed: int) -> None:
    again = "{} st.shared.b32 [%r11], %r1;"
    text = fault_of(exchange("bar.sync 0;", again.format("")), seed)
    assert re.search(
        r"write after read at byte \d+ of shared memory, by warp [01]; last written|"
        r"read after write without synchronization",
        text,
    )
    assert complaint(exchange("bar.sync 0;", again.format("bar.sync 0;")), seed=seed) is None


def test_warps_that_store_equal_values_need_no_order() -> None:
    body = "st.shared.b32 [%r2], {}; bar.sync 0; ld.shared.b32 %r9, [%r2];"
    program = Program(body.format("7"), bytes_of(), bytes_of(), threads=64, shared=64, grid=2)
    _, report = execute(program)
    assert report.same_writes == 2 * 32  # lanes of each block's second warp
    different = Program(body.format("%r4"), bytes_of(), bytes_of(), threads=64, shared=64)
    execute(different)  # the block's size, which is one value too
    warps = "shr.u32 %r4, %r1, 5; " + body.format("%r4")
    text = fault_of(Program(warps, bytes_of(), bytes_of(), threads=64, shared=64))
    assert "write after write at byte 0 of shared memory" in text


def test_halves_of_a_word_are_told_apart() -> None:
    """Two warps write a half of each word, a third reads."""
    body = """shr.u32 %r5, %r1, 5; and.b32 %r6, %r1, 31; shl.b32 %r10, %r6, 2;
add.s32 %r10, %r10, %r2;
shl.b32 %r7, %r5, 1; add.s32 %r11, %r10, %r7; setp.lt.u32 %p1, %r5, 2; cvt.u16.u32 %h1, %r5;
@%p1 st.shared.b16 [%r11{0}], %h1; bar.sync 0; @!%p1 ld.shared.b32 %r12, [%r10];"""
    good = Program(body.replace("{0}", ""), bytes_of(), bytes_of(), threads=96, shared=256)
    for seed in SEEDS:
        assert complaint(good, seed=seed) is None
    body = body.replace("shl.b32 %r7, %r5, 1;", "mov.b32 %r7, 0;").replace("{0}", "")
    assert "write after write" in fault_of(
        Program(body, bytes_of(), bytes_of(), threads=96, shared=256)
    )


def test_asynchronous_copies_are_waited_for_and_made_visible() -> None:
    copy = """shl.b32 %r10, %r1, 4; add.s32 %r11, %r10, %r2; cvt.u64.u32 %rd9, %r10;
add.s64 %rd10, %rd1, %rd9; cp.async.cg.shared.global [%r11], [%rd10], 16; cp.async.commit_group;
cp.async.cg.shared.global [%r11+512], [%rd10], 16; cp.async.commit_group;
cp.async.wait_group {}; bar.sync 0; ld.shared.b32 %r12, [%r11+512];"""
    inputs = bytes_of(np.zeros(512, np.uint8))
    execute(Program(copy.format(0), inputs, bytes_of(), shared=2048))
    text = fault_of(Program(copy.format(1), inputs, bytes_of(), shared=2048))
    assert "read after write without synchronization" in text
    assert "last written by cp.async of warp 0" in text


def test_stores_need_a_proxy_fence_before_bulk_copies_and_products() -> None:
    for opcode, fence in (
        ("cp.async.bulk.commit_group", "fence.proxy.async.shared::cta;"),
        ("wgmma.fence.sync.aligned", "fence.proxy.async;"),
    ):
        program = program_of(opcode)
        assert program is not None
        assert complaint(program) is None
        body = program.body.replace(fence, "")
        assert body != program.body
        bad = Program(
            body,
            program.inputs,
            program.expected,
            threads=program.threads,
            shared=program.shared,
            tensor=program.tensor,
        )
        assert "read by the asynchronous proxy without fence.proxy.async" in fault_of(bad)


def test_a_bulk_copy_over_stored_bytes_needs_a_proxy_fence() -> None:
    program = program_of("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes")
    assert program is not None
    store = "shl.b32 %r12, %r1, 2; add.s32 %r12, %r12, %r2; st.shared.b32 [%r12], %r1;"
    for fence in ("fence.proxy.async.shared::cta;", ""):
        body = program.body.replace("bar.sync 0;", f"{store} {fence} bar.sync 0;", 1)
        assert body != program.body
        over = dataclasses.replace(program, body=body)
        if fence:
            assert complaint(over) is None
        else:
            assert "written by the asynchronous proxy without fence.proxy.async" in fault_of(over)


def test_mbarriers_order_what_comes_before_their_arrivals() -> None:
    program = program_of("mbarrier.try_wait.parity.shared::cta.b64")
    assert program is not None
    late = program.body.replace(
        "st.shared.b32 [%r11], %r12; mbarrier.arrive.shared::cta.b64 _, [%r20];",
        "mbarrier.arrive.shared::cta.b64 _, [%r20]; st.shared.b32 [%r11], %r12;",
    )
    assert late != program.body
    for seed in SEEDS:
        text = fault_of(Program(late, bytes_of(), bytes_of(), threads=64, shared=1024), seed)
        assert re.search("without synchronization|write after read|what nobody wrote", text)
    early = program.body.replace("bar.sync 0; setp.lt", "setp.lt", 1)
    texts = {
        fault_of(Program(early, bytes_of(), bytes_of(), threads=64, shared=1024), seed).split("[")[
            0
        ]
        for seed in SEEDS
    }
    assert any("initialization by warp 0 is not ordered before" in text for text in texts)


def test_an_mbarrier_that_is_initialized_again_forgets_nothing() -> None:
    """Clocks of loads go on: a second mbarrier at the same place does not hide a race."""
    load = "cp.async.bulk.tensor.1d.shared::cta.global.mbarrier::complete_tx::bytes"
    round_ = f"""@%p2 {INIT.format(count=1)} bar.sync 0;
@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 128;
@%p2 {load} [%r2], [%rd9, {{%r30}}], [%r20]; WAIT bar.sync 0;
ld.shared.b32 %r14, [%r11]; bar.sync 0; @%p2 mbarrier.inval.shared::cta.b64 [%r20];"""
    start = f"""{EXCHANGE} setp.eq.u32 %p2, %r1, 0; add.s32 %r20, %r2, 512; mov.b64 %rd9, p2;
mov.b32 %r30, 0;"""

    def program(second: str) -> Program:
        first = f"A: {WAIT} %p3, [%r20], 0; @!%p3 bra A;"
        body = start + round_.replace("WAIT", first) + round_.replace("WAIT", second)
        fields = {"element_type": 2, "dims": [32], "strides": [], "box": [32], "swizzle": 0}
        return Program(
            body, bytes_of(np.zeros(128, np.uint8)), bytes_of(), shared=1024, tensor=("in", fields)
        )

    for seed in SEEDS:
        assert complaint(program(f"B: {WAIT} %p3, [%r20], 0; @!%p3 bra B;"), seed=seed) is None
        text = fault_of(program(""), seed)
        assert "read after write without synchronization" in text
        assert "last written by a bulk load" in text


def test_blocks_of_a_cluster_wait_for_each_other() -> None:
    program = program_of("barrier.cluster.wait")
    assert program is not None
    meet = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait;"
    first = program.body.replace(meet, "", 1)
    assert re.search(
        "what nobody wrote|without synchronization",
        fault_of(Program(first, bytes_of(), bytes_of(), grid=2, shared=128, directives=CLUSTER)),
    )
    head, _, tail = program.body.rpartition(meet)
    last = Program(
        head + tail, bytes_of(), program.expected, grid=2, shared=128, directives=CLUSTER
    )
    for seed in SEEDS:
        assert re.search("shared::cluster: block [01] has ended", fault_of(last, seed))


# -- global memory


def blocks_program(body: str, words: int) -> Program:
    return Program(body, bytes_of(), bytes_of(np.zeros(words, np.uint32)), grid=2)


def test_blocks_race_through_global_memory() -> None:
    mine = "mul.wide.u32 %rd9, %r3, 4; add.s64 %rd9, %rd9, %rd2;"
    other = "xor.b32 %r9, %r3, 32; mul.wide.u32 %rd10, %r9, 4; add.s64 %rd10, %rd10, %rd2;"
    write = "st.global.b32 [%rd9], %r3;"
    execute(blocks_program(mine + write, 64))
    text = fault_of(blocks_program(mine + other + write + "ld.global.b32 %r10, [%rd10];", 64))
    assert "write of bytes that another block reads in the same launch, in no order" in text
    second = (
        "setp.lt.u32 %p1, %r3, 32; @%p1 bra END; ld.global.b32 %r10, [%rd10]; END: mov.b32 %r9, 0;"
    )
    text = fault_of(blocks_program(mine + other + write + second, 64))
    assert "global memory: read of bytes that another block writes in the same launch" in text
    text = fault_of(blocks_program("st.global.b32 [%rd2], %r3;", 64))
    assert "write of bytes that another block writes in the same launch" in text
    execute(blocks_program("st.global.b32 [%rd2], 7;", 64))  # equal values
    # Neighbors within a word are no race, the same bytes are.
    bytes_ = "cvt.u64.u32 %rd9, %r3; add.s64 %rd9, %rd9, %rd2; cvt.u16.u32 %h1, %r3;"
    half = "shr.u32 %r5, %r3, 5; and.b32 %r6, %r3, 31; mad.lo.s32 %r5, %r6, 2, %r5;"
    place = "cvt.u64.u32 %rd9, %r5; add.s64 %rd9, %rd9, %rd2; cvt.u16.u32 %h1, %r3;"
    execute(blocks_program(bytes_ + "st.global.b8 [%rd9], %h1;", 64))
    execute(blocks_program(half + place + "st.global.b8 [%rd9], %h1;", 64))
    same = half.replace("%r6, 2, %r5", "%r6, 2, 0") + place
    assert "another block writes" in fault_of(
        blocks_program(same + "st.global.b8 [%rd9], %h1;", 64)
    )


def test_atomics_are_no_race_but_plain_accesses_beside_them_are() -> None:
    add = "red.global.add.u32 [%rd2], 1;"
    program = blocks_program(add, 1)
    out, _ = execute(program)
    assert out.view(np.uint32)[0] == (0xA5A5A5A5 + 64) % 2**32
    text = fault_of(blocks_program(add + "ld.global.b32 %r9, [%rd2];", 1))
    assert "read of bytes that another block changes by atomics" in text
    strong = blocks_program(add + "ld.relaxed.gpu.global.b32 %r9, [%rd2];", 1)
    execute(strong)


@pytest.mark.parametrize("missing", ["release", "acquire", ""])
def test_a_flag_orders_blocks_if_it_releases_and_acquires(missing: str) -> None:
    release = "st.relaxed" if missing == "release" else "st.release"
    acquire = "ld.relaxed" if missing == "acquire" else "ld.acquire"
    body = f"""setp.ne.u32 %p1, %r1, 0; @%p1 bra END;
mov.u32 %r10, %ctaid.x; setp.ne.u32 %p2, %r10, 0; @%p2 bra W;
st.global.b32 [%rd2], 7; {release}.gpu.global.b32 [%rd2+4], 1; bra END;
W: {acquire}.gpu.global.b32 %r11, [%rd2+4]; setp.ne.u32 %p3, %r11, 1; @%p3 bra W;
ld.global.b32 %r12, [%rd2]; st.global.b32 [%rd2+8], %r12; END: mov.b32 %r12, 0;"""
    program = blocks_program(body, 3)
    if missing:
        assert "read of bytes that another block writes" in fault_of(program)
    else:
        out, _ = execute(program)
        assert list(out.view(np.uint32)) == [7, 1, 7]


def test_blocks_that_wait_for_later_blocks_need_to_be_resident() -> None:
    body = """setp.ne.u32 %p1, %r1, 0; @%p1 bra END; mov.u32 %r10, %ctaid.x;
setp.ne.u32 %p2, %r10, 0; @%p2 bra SECOND;
W: ld.acquire.gpu.global.b32 %r11, [%rd2]; setp.ne.u32 %p3, %r11, 1; @%p3 bra W; bra END;
SECOND: st.release.gpu.global.b32 [%rd2], 1; END: mov.b32 %r12, 0;"""
    program = blocks_program(body, 1)
    assert "the limit of" in fault_of(program)
    execute(program, resident=2, seed=2)
