"""The emulator of PTX: every opcode gives known answers, and none can be wrong without notice."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest

import emulator
import shared_library
from emulator import Fault, Module
from emulator.programs import Program, bytes_of, complaint, execute, program_of
from emulator.programs.copies import TENSOR_INIT, TENSOR_WAIT

pytestmark = [
    pytest.mark.skipif(shared_library.compiler() is None, reason="no C++ compiler here"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled"),
]
SEEDS = range(6)


def _programs() -> dict[str, Program]:
    programs = {name: program_of(name) for name in emulator.opcodes()}
    missing = [name for name, program in programs.items() if program is None]
    assert not missing, f"opcodes without a program: {missing}"
    return {name: program for name, program in programs.items() if program is not None}


def test_every_opcode_gives_known_answers() -> None:
    wrong = {
        (name, seed): message
        for name, program in _programs().items()
        for seed in (0, 1)
        if (message := complaint(program, seed=seed))
    }
    assert not wrong


@pytest.mark.parametrize("mode", [1, 2], ids=["does_nothing", "wrong_bit"])
def test_no_opcode_can_be_wrong_without_notice(mode: int) -> None:
    """The table is enumerated, so a handler that no program would miss fails here."""
    unnoticed, mutations = [], 0
    for name, program in _programs().items():
        with emulator.broken(name, mode) as exists:
            mutations += exists
            if exists and complaint(program) is None:
                unnoticed.append(name)
    assert not unnoticed
    assert mutations > (1600 if mode == 1 else 1100)


def test_a_mutation_ends_with_its_block() -> None:
    program = program_of("add.s32")
    assert program is not None
    with emulator.broken("add.s32", 1):
        assert complaint(program) is not None
    assert complaint(program) is None


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
def test_tensor_copies_swizzle_as_wgmma_reads(swizzle: int) -> None:
    """Rows of 128 bytes and fewer, by CUtensorMapSwizzle: chunks of 16 bytes change places by bits
    7 to 9 of the address."""
    row = {0: 128, 1: 32, 2: 64, 3: 128}[swizzle]
    values = np.arange(8 * row // 2, dtype=np.uint16).reshape(8, row // 2)
    expected = np.zeros(8 * row, np.uint8)
    bits = {0: 0, 1: 1, 2: 3, 3: 7}[swizzle]
    for at in range(0, 8 * row, 16):
        place = at ^ (at >> 7 & bits) << 4
        expected[place : place + 16] = bytes_of(values)[at : at + 16]
    load = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
    body = f"""{TENSOR_INIT} bar.sync 0; mov.b32 %r40, 0;
@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], {8 * row};
@%p2 {load} [%r2], [%rd9, {{%r40, %r40}}], [%r20]; {TENSOR_WAIT}
shl.b32 %r30, %r1, 4; add.s32 %r31, %r30, %r2; setp.lt.u32 %p5, %r30, {8 * row};
L: cvt.u64.u32 %rd10, %r30; add.s64 %rd10, %rd10, %rd2;
@%p5 ld.shared.v4.b32 {{%r50, %r51, %r52, %r53}}, [%r31];
@%p5 st.global.v4.b32 [%rd10], {{%r50, %r51, %r52, %r53}};
add.s32 %r30, %r30, 512; add.s32 %r31, %r31, 512; setp.lt.u32 %p5, %r30, {8 * row};
setp.lt.u32 %p6, %r30, {8 * row + 512}; @%p6 bra L;"""
    fields = {
        "element_type": 6,
        "dims": [row // 2, 8],
        "strides": [row],
        "box": [row // 2, 8],
        "swizzle": swizzle,
    }
    program = Program(
        body, bytes_of(values), expected, shared=2048, tensor=("in", fields), threads=32
    )
    for seed in SEEDS:
        assert complaint(program, seed=seed) is None


# -- what is not known is refused


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("add.s32 %r9, %r1;", "add.s32: too few operands"),
        ("add.s32 %r9, %r1, %r1, %r1;", "add.s32: an operand that is not known"),
        ("add.s32 %rd9, %r1, %r1;", "operand %rd9 is of another size"),
        ("setp.eq.u32 %r9, %r1, 0;", "operand %r9 is of another size"),
        ("add.s32 %r9, %r1, nobody;", "an operand that is not known: 'nobody'"),
        ("mov.u32 %r9, %pm0;", "a register that is not known: %pm0"),
        ("bra NOWHERE;", "a label that is not known: 'NOWHERE'"),
        ("ld.global.v2.b32 %r9, [%rd1];", "ld.global.v2.b32: 1 registers, wanted 2"),
        ("ld.param.b64 %rd9, [p9];", "a parameter that is not known: 'p9'"),
        ("ld.param.b64 %rd9, [p0+4];", "a load past the end of parameter p0"),
        ("mbarrier.arrive.shared::cta.b64 %rd9, [%r2];", "wanted _: %rd9"),
        ("ld.global.b32 %r9, [%r1];", "an address of 32 bits, wanted 64"),
        (".maxnreg 3;", "a directive that is not known to the emulator: .maxnreg"),
    ],
)
def test_operands_that_no_handler_takes_are_refused(statement: str, message: str) -> None:
    with pytest.raises(Fault, match="PTX line") as caught:
        Module(Program(statement, bytes_of(), bytes_of()).text())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "statement",
    [
        "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r2], 32;",
        "tex.2d.v4.f32.f32 {%r5, %r6, %r7, %r8}, [%rd1, {%r1, %r1}];",
        "ld.global.L2::cache_hint.b32 %r9, [%rd4], %rd9;",
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r2], %r1, [%r2];",
    ],
)
def test_opcodes_that_are_not_known_say_so_when_they_run(statement: str) -> None:
    opcode = statement.split()[0]
    program = Program(statement, bytes_of(), bytes_of())
    assert Module(program.text()).unknown() == [opcode]
    with pytest.raises(Fault) as caught:
        execute(program)
    line = program.text().split(statement)[0].count("\n") + 1
    message = f"k: {opcode} is not known to the emulator [{opcode}, PTX line {line}, block 0"
    assert message in str(caught.value)
    skipped = "setp.eq.u32 %p1, %r1, 99; @%p1 " + statement
    execute(replace(program, body=skipped))  # is not executed


def test_text_that_is_no_ptx_is_refused() -> None:
    for text, message in (
        ("", "PTX without a .entry"),
        (".visible .entry k()", "k: a kernel without a body"),
        (".visible .entry k() { ret;", "k: the body does not end"),
    ):
        with pytest.raises(Fault) as caught:
            Module(text)
        assert message.removeprefix("k: ") in str(caught.value)


def test_launches_that_do_not_fit_the_kernel_are_refused() -> None:
    program = Program("mov.b32 %r9, 0;", bytes_of(), bytes_of(), directives=".reqntid 64")
    with pytest.raises(Fault, match="a block of 32 x 1 x 1 threads, the kernel requires 64"):
        execute(program)
    cluster = ".explicitcluster .reqnctapercluster 2"
    with pytest.raises(Fault, match="a grid of 3 blocks, wanted a multiple of the cluster's 2"):
        execute(replace(program, directives=cluster, grid=3))
    module = Module(program.text())
    with pytest.raises(ValueError, match="got 1 values, wanted 3 parameters"):
        module.pack([bytes(8)])
    with pytest.raises(ValueError, match="parameter 1: got 4 bytes, wanted 8"):
        module.pack([bytes(8), bytes(4), bytes(128)])
    with pytest.raises(ValueError, match="no kernel other in the module"):
        module.parameters("other")


def test_parameters_lie_at_multiples_of_their_alignment() -> None:
    text = """.version 8.7
.target sm_80
.visible .entry k(.param .u8 a, .param .u64 .ptr .global .align 16 b, .param .align 64 .b8 c[128],
 .param .b32 d) { ret; }"""
    assert Module(text).parameters() == [(0, 1), (8, 8), (64, 128), (192, 4)]


def test_variables_of_a_module_and_special_registers() -> None:
    values = ", ".join(str(3 * i) for i in range(32))
    program = Program(
        """mov.u64 %rd9, table; mul.wide.u32 %rd10, %r1, 4; add.s64 %rd9, %rd9, %rd10;
ld.const.b32 %r9, [%rd9]; mov.u32 %r10, %laneid; mov.u32 %r11, %lanemask_lt; popc.b32 %r11, %r11;
mad.lo.s32 %r9, %r10, 100, %r9; mov.b32 %r12, 0; sub.s32 %r10, %r10, %r11; add.s32 %r9, %r9, %r10;
st.global.v2.b32 [%rd5], {%r9, %r12};""",
        bytes_of(),
        bytes_of((np.arange(32) * 103).astype(np.uint64)),
        variables=f".const .align 4 .b32 table[32] = {{{values}}};",
    )
    assert complaint(program) is None
