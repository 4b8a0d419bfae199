"""What the emulator says of kernels that go wrong by themselves: each fault, and what is right
beside it."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest

import emulator
import shared_library
from emulator import Fault, Launch, Module, Range
from emulator.programs import Program, bytes_of, execute
from emulator.programs.barriers import INIT, WAIT
from emulator.programs.copies import TENSOR_INIT, fields, tensor

pytestmark = [
    pytest.mark.skipif(shared_library.compiler() is None, reason="no C++ compiler here"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled"),
]
SEEDS = range(8)
SHARED = "shl.b32 %r10, %r1, 2; add.s32 %r11, %r10, %r2; "


def fault_of(body: str, *, seed: int = 1, strict: int = 0, **fields_: object) -> str:
    """The message of the fault that a program raises."""
    program = Program(body, bytes_of(np.zeros(64, np.uint64)), bytes_of(np.zeros(64)), **fields_)
    with pytest.raises(Fault) as caught:
        execute(program, seed=seed, strict=strict)
    return str(caught.value)


# -- a message names kernel, opcode, PTX line, source line, block and warp


@pytest.mark.parametrize(
    ("location", "source"),
    [
        (".loc 1 49 21 // linear.py:49:21", ", linear.py:49:21"),
        (".loc 1 49 21\n", ", gemm.cu:49:21"),
        (".loc 1 49 21, function_name $L, inlined_at 1 5 6\n", ", gemm.cu:49:21"),
        ("", ""),
    ],
)
def test_a_message_names_the_lines(location: str, source: str) -> None:
    head = Program("", bytes_of(), bytes_of()).text().removesuffix("\nret;\n}\n")
    text = (
        f'{head}\n{location}\nst.global.b32 [%rd5+8000], %r1;\nret;\n}}\n.file 1 "/a/b/gemm.cu"\n'
    )
    line = text[: text.index("st.global.b32")].count("\n") + 1
    memory = np.zeros(64, np.uint64)
    ranges = [Range(memory.ctypes.data, memory.nbytes, "a tensor")]
    module = Module(text)
    address = memory.ctypes.data.to_bytes(8, "little")
    launch = Launch(module, (5,), (64,), module.pack([address, address, bytes(128)]))
    with pytest.raises(Fault) as caught:
        emulator.run(launch, ranges, seed=0)
    end = rf"\[st.global.b32, PTX line {line}{re.escape(source)}, block 0, warp 0\]"
    assert re.fullmatch(
        rf"k: global memory: write out of bounds, 4 bytes .* {end}", str(caught.value)
    )
    assert caught.value.address == memory.ctypes.data + 8000
    assert caught.value.launch == 0


# -- global memory


def test_accesses_out_of_bounds_name_the_range_and_the_byte() -> None:
    assert "write out of bounds, 4 bytes at 0x" in (
        text := fault_of("st.global.b32 [%rd2+512], %r1;")
    )
    assert "byte 512 of out, which has 512" in text
    assert "read out of bounds, 4 bytes at 0x" in (
        text := fault_of("ld.global.b32 %r9, [%rd1+-4];")
    )
    assert "byte -4 of in" in text
    text = fault_of("mov.b64 %rd9, 64; ld.global.b32 %r9, [%rd9];")
    assert "4 bytes at 0x40 [" in text
    # The last bytes of a range, and the half of an access that lies past it.
    execute(Program("st.global.b32 [%rd2+4], %r1;", bytes_of(), bytes_of(np.zeros(1))))
    assert "out of bounds, 16 bytes" in fault_of(
        "st.global.v4.b32 [%rd2+512], {%r1, %r1, %r1, %r1};"
    )


@pytest.mark.parametrize("space", ["global", "shared"])
def test_misaligned_vectors(space: str) -> None:
    base = "%rd2" if space == "global" else "%r2"
    text = fault_of(f"ld.{space}.v2.b32 {{%r8, %r9}}, [{base}+4];", shared=64)
    assert f"{space} memory: misaligned address" in text
    assert "wanted a multiple of 8" in text


def test_reads_of_what_nobody_wrote_and_outputs_that_nobody_wrote() -> None:
    program = Program(
        "ld.global.b32 %r9, [%rd4]; st.global.b32 [%rd5], %r9;", bytes_of(), bytes_of()
    )
    module = Module(program.text())
    memory = np.zeros(64, np.uint64)
    written = np.zeros(memory.nbytes, np.uint8)
    written[: 32 * 8] = 1
    start = memory.ctypes.data
    launch = Launch(
        module,
        (1,),
        (32,),
        module.pack([start.to_bytes(8, "little"), (start + 256).to_bytes(8, "little"), bytes(128)]),
    )
    item = Range(start, memory.nbytes, "a tensor", written)
    emulator.run(launch, [item])
    assert item.unwritten() == 32 * 4  # half of each thread's 8 bytes
    written[8 * 17 + 3] = 0
    with pytest.raises(Fault, match=r"read of what nobody wrote, byte 139 of a tensor \[ld.global"):
        emulator.run(launch, [item])


# -- shared and local memory


def test_shared_memory_has_bounds_and_is_not_zero() -> None:
    assert "shared memory: out of bounds, 4 bytes at 64, the block has 64" in fault_of(
        "st.shared.b32 [%r2+64], %r1;", shared=64
    )
    assert "out of bounds, 4 bytes at -4" in fault_of("st.shared.b32 [%r2+-4], %r1;", shared=64)
    text = fault_of(SHARED + "ld.shared.b32 %r9, [%r11];", shared=128)
    assert "read of what nobody wrote at byte 0 of shared memory, by warp 0" in text


def test_local_memory_is_each_lanes_own_and_has_bounds() -> None:
    depot = ".local .align 8 .b8 depot[16];"
    message = "local memory: out of bounds, 8 bytes at 16, a lane has 16"
    assert message in fault_of("mov.b64 %rd9, depot; ld.local.b64 %rd8, [%rd9+16];", depot=depot)
    body = """mov.b64 %rd9, depot; cvt.u64.u32 %rd10, %r1; st.local.b64 [%rd9+8], %rd10;
ld.local.b64 %rd11, [%rd9+8]; st.global.b64 [%rd5], %rd11;"""
    lanes = np.arange(32, dtype=np.uint64)
    out, _ = execute(Program(body, bytes_of(), bytes_of(lanes), depot=depot))
    assert (out == bytes_of(lanes)).all()


# -- barriers and deadlocks


def test_divergent_barriers() -> None:
    half = "setp.lt.u32 %p1, %r1, 16; @!%p1 bra L; "
    for barrier in ("bar.sync 0;", "bar.arrive 0, 64;", "barrier.cluster.arrive;"):
        assert "divergent barrier" in fault_of(f"{half}{barrier} L: mov.b32 %r9, 0;")


def test_barriers_with_counts_that_do_not_meet() -> None:
    first = "setp.lt.u32 %p1, %r1, 32; "
    text = fault_of(first + "@%p1 bar.sync 1, 64; @!%p1 bar.sync 1, 96;", threads=64)
    assert re.search("barrier 1 with different counts of threads, (64 and 96|96 and 64)", text)
    text = fault_of("bar.sync 1, 64;", threads=96, seed=0)
    assert re.search("deadlock in block 0: warp [012] at barrier 1 in bar.sync, PTX line", text)
    assert "a barrier of 40 threads, wanted a multiple of 32" in fault_of("bar.sync 1, 40;")
    assert "barrier 16, wanted 0 to 15" in fault_of("bar.sync 16;")


def test_a_deadlock_names_each_waiter() -> None:
    body = f"""add.s32 %r20, %r2, 512; setp.eq.u32 %p2, %r1, 0; @%p2 {INIT.format(count=33)}
bar.sync 0; setp.lt.u32 %p1, %r1, 32; @%p1 mbarrier.arrive.shared::cta.b64 _, [%r20];
@%p1 bar.sync 4, 96; @%p1 bra END;
W: {WAIT} %p3, [%r20], 0; @!%p3 bra W;
END: mov.b32 %r9, 0;"""
    for seed in SEEDS:
        text = fault_of(body, threads=64, shared=1024, seed=seed)
        assert "deadlock in block 0: warp 0 at barrier 4 in bar.sync, PTX line" in text
        assert "warp 1 at mbarrier 512 parity 0 in mbarrier.try_wait" in text


def test_a_loop_without_end_reaches_the_limit() -> None:
    assert "the limit of 20000 warp instructions" in fault_of("L: add.s32 %r9, %r9, 1; bra.uni L;")


# -- lanes


def test_exchanges_between_lanes_that_are_not_there() -> None:
    half = "setp.lt.u32 %p1, %r1, 16; "
    text = fault_of(half + "@%p1 shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;")
    assert "the member mask names lanes that do not execute the instruction" in text
    text = fault_of(half + "@%p1 shfl.sync.bfly.b32 %r9, %r1, 1, 31, 0xFF;")
    assert "a lane executes the instruction that the member mask does not name" in text
    text = fault_of(half + "@%p1 shfl.sync.bfly.b32 %r9, %r1, 16, 31, 0xFFFF;")
    assert "shfl reads a lane that is not a member" in text
    text = fault_of(
        half + "@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r2];", shared=256
    )
    assert "by a part of a warp" in text


# -- mbarriers and copies


def test_mbarriers_that_are_not_there_or_get_too_many_arrivals() -> None:
    arrive = "mbarrier.arrive.shared::cta.b64 _, [%r2];"
    first = "setp.eq.u32 %p1, %r1, 0; "
    init = "@%p1 mbarrier.init.shared::cta.b64 [%r2], 8; "
    assert "no mbarrier is initialized at byte 0" in fault_of(first + arrive, shared=64)
    # 32 arrivals are four phases of 8: the ninth lane's arrival begins the next.
    execute(Program(first + init + arrive, bytes_of(), bytes_of(), shared=64))
    many = first + init + "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r2], 9;"
    assert "more arrivals at an mbarrier than the 8 that it expects" in fault_of(many, shared=64)
    assert "mbarrier.init of an mbarrier that is in use" in fault_of(first + init + init, shared=64)
    assert "wanted a multiple of 8" in fault_of(
        first + "@%p1 mbarrier.init.shared::cta.b64 [%r2+4], 1;", shared=64
    )


LOAD = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"


def tensor_fault(copy: str, *, bytes_: int = 32, seed: int = 1, more: int = 0) -> str:
    body = f"""{TENSOR_INIT} bar.sync 0; mov.b32 %r40, 0;
@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], {bytes_}; {copy}
W: {WAIT} %p3, [%r20], 0; @!%p3 bra W;"""
    inputs = bytes_of(tensor(2), np.zeros(more, np.uint8))
    program = Program(body, inputs, bytes_of(), shared=2048, tensor=("in", fields(2)))
    with pytest.raises(Fault) as caught:
        execute(program, seed=seed)
    return str(caught.value)


def test_tensor_copies_that_are_wrong() -> None:
    good = f"@%p2 {LOAD} [%r2], [%rd9, {{%r40, %r40}}], [%r20];"
    for seed in SEEDS:
        assert "deadlock in block 0: warp 0 at mbarrier 1024" in tensor_fault(
            good, bytes_=64, seed=seed
        )
    short = good.replace("{%r40, %r40}", "{%r40}").replace("2d", "1d")
    assert "1 coordinates, the map has 2 dimensions" in tensor_fault(short)
    assert "wanted a multiple of 128" in tensor_fault(good.replace("[%r2]", "[%r2+16]"))
    not_a_map = good.replace("[%rd9,", "[%rd1,")
    assert "the 128 bytes are no tensor map" in tensor_fault(not_a_map, more=32)
    assert "a tensor map: read out of bounds, 128 bytes" in tensor_fault(not_a_map)
    assert "shared memory: out of bounds, 32 bytes at 2048" in tensor_fault(
        good.replace("[%r2]", "[%r2+2048]")
    )
    assert "no mbarrier is initialized" in tensor_fault(good.replace("[%r20];", "[%r20+8];"))


def test_bulk_copies_of_bytes_are_aligned() -> None:
    copy = "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes"
    for operands in ("[%r2], [%rd1], 24", "[%r2+8], [%rd1], 16", "[%r2], [%rd1+8], 16"):
        text = tensor_fault(f"@%p2 {copy} {operands}, [%r20];")
        assert "cp.async.bulk: " in text
        assert "wanted multiples of 16" in text
    text = tensor_fault(f"@%p2 {copy} [%r2], [%rd1], 4096, [%r20];")
    assert "shared memory: out of bounds, 4096 bytes" in text
    text = tensor_fault(f"@%p2 {copy} [%r2], [%rd1], 112, [%r20];")
    assert "cp.async.bulk: read out of bounds, 16 bytes" in text


def test_copies_that_nobody_waits_for() -> None:
    body = f"""{TENSOR_INIT} bar.sync 0; mov.b32 %r40, 0;
@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 32;
@%p2 {LOAD} [%r2], [%rd9, {{%r40, %r40}}], [%r20];"""
    program = Program(body, bytes_of(tensor(2)), bytes_of(), shared=2048, tensor=("in", fields(2)))
    with pytest.raises(
        Fault, match=r"the block ends while a bulk load for the mbarrier at byte .* under way"
    ):
        execute(program, seed=0)
    store = "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group"
    body = f"""setp.eq.u32 %p2, %r1, 0; mov.b64 %rd9, p2; mov.b32 %r40, 0; st.shared.b32 [%r2], %r1;
mul.wide.u32 %rd8, %r1, 8; cvt.u32.u64 %r8, %rd8; add.s32 %r8, %r8, %r2; st.shared.b64 [%r8], %rd8;
fence.proxy.async; @%p2 {store} [%rd9, {{%r40, %r40}}], [%r2];"""
    program = Program(body, bytes_of(), bytes_of(tensor(2)), shared=2048, tensor=("out", fields(2)))
    with pytest.raises(
        Fault, match=r"a warp ends with a bulk store that was not committed \[cp.async.bulk"
    ):
        execute(program)
