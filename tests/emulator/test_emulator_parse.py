"""The emulator's parser: scopes, labels, literals, and text that is damaged."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest

import emulator
import shared_library
from emulator import Fault, Module
from emulator.programs import Program, bytes_of, complaint, program_of, slots

pytestmark = [
    pytest.mark.skipif(shared_library.compiler() is None, reason="no C++ compiler here"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled"),
]
STORE = "mov.b32 %r99, 0; st.global.v2.b32 [%rd5], {%r9, %r99};"


def gives(body: str, value: int, **fields: str) -> None:
    """Every thread's word is ``value``."""
    expected = bytes_of(slots(np.full(32, value, np.uint32)))
    assert complaint(Program(f"{body} {STORE}", bytes_of(), expected, **fields)) is None


def test_registers_and_labels_in_braces_are_local() -> None:
    """Inline assembly declares names of its own, and uses them twice."""
    scope = """{ .reg .b32 x; .reg .pred done; mov.b32 x, 0;
again: add.s32 x, x, 1; setp.ge.s32 done, x, COUNT; @!done bra again; add.s32 %r9, %r9, x; }"""
    gives("mov.b32 %r9, 0;" + scope.replace("COUNT", "3") + scope.replace("COUNT", "5"), 8)
    with pytest.raises(Fault, match="a label that is not known: 'again'"):
        Module(Program(scope.replace("COUNT", "3") + " bra again;", bytes_of(), bytes_of()).text())


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        ("7", 7),
        ("-1", 0xFFFFFFFF),
        ("0x1F", 31),
        ("017", 15),
        ("0f3F800000", 0x3F800000),
        ("9U", 9),
    ],
)
def test_literals(literal: str, value: int) -> None:
    gives(f"mov.b32 %r9, {literal};", value)


def test_guards_comments_and_statements_over_lines() -> None:
    gives("mov.b32 %r9, 1; setp.eq.u32 %p1, %r1, 99;\n@!%p1\tadd.s32\n%r9,\n %r9, 4; // add 9\n", 5)
    gives("mov.b32 %r9, 1; /* mov.b32 %r9,\n2; */ setp.eq.u32 %p1, %r1, 99; @%p1 trap;", 1)


def test_line_numbers_count_comments() -> None:
    body = "/* one\ntwo */\n// three\nbra NOWHERE;"
    text = Program(body, bytes_of(), bytes_of()).text()
    line = text[: text.index("bra NOWHERE")].count("\n") + 1
    with pytest.raises(Fault, match=rf"'NOWHERE' \[PTX line {line}\]"):
        Module(text)


def test_variables_of_shared_memory_do_not_overlap() -> None:
    """Static ones first, each at its alignment; dynamic memory begins after them."""
    variables = ".shared .align 4 .b8 first[5];\n.shared .align 8 .b8 second[8];"
    body = """mov.b32 %r20, first; mov.b32 %r21, second; and.b32 %r22, %r21, 7;
mov.b32 %r9, %r22; st.shared.b8 [%r20+4], 7; st.shared.b64 [%r21], 0; ld.shared.b8 %h1, [%r20+4];
cvt.u32.u16 %r23, %h1; add.s32 %r9, %r9, %r23; sub.s32 %r24, %r2, %r20; setp.lt.s32 %p1, %r24, 16;
@%p1 trap; sub.s32 %r24, %r2, %r21; setp.lt.s32 %p1, %r24, 8; @%p1 trap; rem.s32 %r24, %r2, 1024;
add.s32 %r9, %r9, %r24;"""
    gives(body, 7, variables=variables)


def test_two_kernels_of_a_module() -> None:
    first = program_of("add.s32")
    assert first is not None
    entry = first.text()
    second = entry[entry.index(".visible") :].replace(".entry k(", ".entry other(")
    module = Module(entry + second.replace("p0", "q0"))
    assert module.parameters("other") == module.parameters("k") == module.parameters()


def test_damaged_text_is_refused_or_runs_to_an_end() -> None:
    """Characters and lines are dropped, doubled and exchanged; no damage ends the process."""
    generator = random.Random(0)
    names = emulator.opcodes()
    outcomes = {"parsed": 0, "refused": 0}
    for name in generator.sample(names, 150):
        program = program_of(name)
        assert program is not None
        lines = program.text().split("\n")
        for _ in range(4):
            damaged = list(lines)
            index = generator.randrange(len(damaged))
            line = damaged[index]
            at = generator.randrange(len(line) + 1)
            damaged[index] = generator.choice(
                [line[:at], line[at:], line[:at] + line[at + 1 :], line + line, line[::-1]]
                + [line.replace(c, d) for c, d in ("{}", "[x", ";:", ",;", "%@", ".#")]
            )
            if generator.random() < 0.2:
                damaged = damaged[: generator.randrange(len(damaged))]
            try:
                Module("\n".join(damaged)).unknown()
                outcomes["parsed"] += 1
            except Fault:
                outcomes["refused"] += 1
    assert outcomes["refused"] > 100
    assert outcomes["parsed"] > 100
