"""Predicates, selections, moves, vectors, and what lanes tell each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from emulator.programs import LANES, REGISTER, Program, bytes_of, family, lanewise, slots
from emulator.programs.arithmetic import TYPES, integers
from emulator.programs.floats import floats

COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
LOGIC: dict[str, Callable[[Any, Any], Any]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}
ODD = np.arange(LANES) % 2 == 1


def _compared(name: str, a: Any, b: Any) -> Any:
    if a.dtype.kind != "f":
        return COMPARE[name](a, b)
    nan = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        return nan if name == "nan" else ~nan
    if name[-1] == "u" and name != "u":
        return COMPARE[name[:-1]](a, b) | nan
    return COMPARE[name](a, b) & ~nan


def _shown(name: str) -> list[str]:
    """Stores predicates p1 and p2 of a lane as 0 or 1."""
    return [
        "selp.b32 %r30, 1, 0, %p1;",
        "selp.b32 %r31, 1, 0, %p2;" if name != "one" else "mov.b32 %r31, 0;",
        "st.global.v2.b32 [%rd5], {%r30, %r31};",
    ]


@family(
    r"setp\.(eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan)(\.and|\.or|\.xor|)"
    r"(?:\.ftz)?\.([usbf]\d+)"
)
def compare(opcode: str, name: str, logic: str, type_name: str) -> Program:
    dtype = TYPES[type_name]
    if type_name[0] == "f":
        a, b = floats(dtype, 1), floats(dtype, 2)
        a[:3], b[:3] = [np.nan, 1, np.nan], [1, np.nan, np.nan]
    else:
        a, b = integers(dtype, 1), integers(dtype, 4)
    b[10:16] = a[10:16]
    size = np.dtype(dtype).itemsize
    registers = [f"{REGISTER[size]}{20 + i}" for i in range(2)]
    lines = [f"ld.global.b{8 * size} {r}, [%rd4+{256 * i}];" for i, r in enumerate(registers)]
    lines += ["and.b32 %r9, %r1, 1;", "setp.eq.u32 %p3, %r9, 1;"]
    lines.append(f"{opcode} %p1|%p2, {', '.join(registers)}{', %p3' if logic else ''};")
    first = _compared(name, a, b)
    both = np.stack([first, ~first], 1)
    if logic:
        both = LOGIC[logic[1:]](both, ODD[:, None])
    body = "\n".join(lines + _shown("two"))
    return Program(body, bytes_of(slots(a), slots(b)), bytes_of(both.astype(np.uint32)))


SOME = np.arange(LANES) % 3 == 0
PREDICATES = [
    "and.b32 %r9, %r1, 1;",
    "setp.eq.u32 %p3, %r9, 1;",
    "rem.u32 %r9, %r1, 3;",
    "setp.eq.u32 %p4, %r9, 0;",
]


@family(r"(and|or|xor|not|mov)\.pred")
def predicate_logic(opcode: str, name: str) -> Program:
    operands = "%p3" if name in ("not", "mov") else "%p3, %p4"
    result = {"not": ~ODD, "mov": ODD}.get(name)
    if result is None:
        result = LOGIC[name](ODD, SOME)
    lines = [*PREDICATES, f"{opcode} %p1, {operands};", *_shown("one")]
    return Program("\n".join(lines), bytes_of(), bytes_of(slots(result.astype(np.uint32))))


@family(r"selp\.([usbf]\d+)")
def select(opcode: str, type_name: str) -> Program:
    dtype = np.dtype(f"u{int(type_name[1:]) // 8}")
    a, b = integers(dtype, 1), integers(dtype, 4)
    program = lanewise(opcode, [a, b], np.where(SOME, a, b), suffix=", %p4")
    return Program("\n".join(PREDICATES) + program.body, program.inputs, program.expected)


@family(r"mov\.([usbf]\d+)")
def move(opcode: str, type_name: str) -> Program:
    a = integers(np.dtype(f"u{int(type_name[1:]) // 8}"), 2)
    return lanewise(opcode, [a], a)


@family(r"cvta(\.to|)\.(\w+)\.u64")
def convert_address(opcode: str, to: str, space: str) -> Program:
    """Of shared and local memory the generic address works; of others it is the address."""
    a = integers(np.uint64, 2) & np.uint64((1 << 47) - 1)
    if space not in ("shared", "local"):
        return lanewise(opcode, [a], a)
    small = np.arange(LANES, dtype=np.uint64) * np.uint64(8)
    depot = ".local .align 8 .b8 depot[256];" if space == "local" else ""
    back = "cvta.to" if not to else "cvta"
    first = f"{opcode} %rd10, %rd9;" if not to else f"{back}.{space}.u64 %rd10, %rd9;"
    lines = [
        "mul.wide.u32 %rd8, %r1, 8;",
        "mov.u64 %rd9, " + ("smem;" if space == "shared" else "depot;"),
        "add.s64 %rd9, %rd9, %rd8;",
        first,
        "add.s64 %rd11, %rd8, 5;",
        "st.b64 [%rd10], %rd11;",
        f"{opcode if to else back + '.' + space + '.u64'} %rd12, %rd10;",
        f"ld.{space}.b64 %rd13, [%rd12];",
        "sub.s64 %rd14, %rd12, %rd9;",
        "add.s64 %rd13, %rd13, %rd14;",
        "st.global.b64 [%rd5], %rd13;",
    ]
    return Program(
        "\n".join(lines), bytes_of(), bytes_of(small + np.uint64(5)), shared=256, depot=depot
    )


@family(r"(pack|unpack)\.b(32|64)")
def vectors(opcode: str, name: str, bits: str) -> Program:
    size = int(bits) // 8
    a = integers(np.dtype(f"u{size}"), 2)
    whole, part = ("%r20", "%h") if bits == "32" else ("%rd20", "%r")
    first, second = (f"{part}21", f"{part}22")
    swapped = a.view(np.dtype(f"u{size // 2}")).reshape(LANES, 2)[:, ::-1]
    lines = [
        f"ld.global.b{bits} {whole}, [%rd4];",
        "mov.b64 %rd31, 0; st.global.b64 [%rd5], %rd31;",
        f"mov.b{bits} {{{first}, {second}}}, {whole};",
        f"mov.b{bits} {whole}, {{{second}, {first}}};",
        f"st.global.b{bits} [%rd5], {whole};",
    ]
    expected = slots(np.ascontiguousarray(swapped).reshape(-1).view(a.dtype))
    return Program("\n".join(lines), bytes_of(slots(a)), bytes_of(expected))


# -- exchanges


@family(r"shfl\.sync\.(bfly|idx|up|down)\.b32")
def shuffle(opcode: str, mode: str) -> Program:
    lane = np.arange(LANES)
    width = 16
    distance = {"bfly": 5, "idx": 3, "up": 2, "down": 3}[mode]
    start = lane // width * width
    source = {
        "bfly": lane ^ distance,
        "idx": start + distance,
        "up": lane - distance,
        "down": lane + distance,
    }[mode]
    valid = (source >= start) & (source < start + width)
    source = np.where(valid, source, lane)
    clamp = ((32 - width) << 8) | (0 if mode == "up" else 31)
    lines = [
        "mad.lo.s32 %r20, %r1, 7, 3;",
        f"{opcode} %r21|%p1, %r20, {distance}, {clamp}, -1;",
        "selp.b32 %r22, 1, 0, %p1;",
        "st.global.v2.b32 [%rd5], {%r21, %r22};",
    ]
    expected = np.stack([source * 7 + 3, valid], 1).astype(np.uint32)
    return Program("\n".join(lines), bytes_of(), bytes_of(expected))


REDUCE: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@family(r"redux\.sync\.(add|min|max|and|or|xor)\.([usb]32)")
def reduce(opcode: str, name: str, type_name: str) -> Program:
    a = integers(TYPES[type_name], 3)[::-1].copy()
    a[:4] = 5
    if name == "and":
        a |= np.uint32(0xF0F00001)
    # The lower half alone, so that members count.
    value = REDUCE[name].reduce(a[:16], dtype=a.dtype)
    lines = [
        "setp.lt.u32 %p1, %r1, 16;",
        "mov.b32 %r21, 9;",
        "ld.global.b32 %r20, [%rd4];",
        f"@%p1 {opcode} %r21, %r20, 0xFFFF;",
        "mov.b32 %r22, 0; st.global.v2.b32 [%rd5], {%r21, %r22};",
    ]
    result = np.where(np.arange(LANES) < 16, value, a.dtype.type(9)).astype(a.dtype)
    return Program("\n".join(lines), bytes_of(slots(a)), bytes_of(slots(result)))


@family(r"elect\.sync")
def elect(opcode: str) -> Program:
    lines = [
        "setp.gt.u32 %p2, %r1, 3; mov.b32 %r21, 77;",
        "setp.eq.u32 %p1, %r1, 99;",
        f"@%p2 {opcode} %r21|%p1, 0xFFFFFFF0;",
        "selp.b32 %r22, 1, 0, %p1; st.global.v2.b32 [%rd5], {%r21, %r22};",
    ]
    lane = np.arange(LANES)
    expected = np.stack([np.where(lane > 3, 4, 77), lane == 4], 1).astype(np.uint32)
    return Program("\n".join(lines), bytes_of(), bytes_of(expected))


@family(r"vote\.sync\.(all|any|uni)\.pred")
def vote(opcode: str, mode: str) -> Program:
    """Of all, of some, and of none."""
    lines = ["setp.ge.s32 %p11, %r1, 0;", "setp.eq.u32 %p12, %r1, 5;", "setp.lt.s32 %p13, %r1, 0;"]
    for i in (1, 2, 3):
        # The opposite of each right answer comes first.
        lines.append(
            f"setp.{'lt' if i == 1 or (i, mode) == (2, 'any') else 'ge'}.s32 %p{i}, %r1, 0;"
        )
        lines.append(f"{opcode} %p{i}, %p1{i}, -1;")
        lines.append(f"selp.b32 %r2{i}, {1 << i}, 0, %p{i};")
    lines += ["add.s32 %r21, %r21, %r22; add.s32 %r21, %r21, %r23;"]
    lines += ["mov.b32 %r22, 0; st.global.v2.b32 [%rd5], {%r21, %r22};"]
    answer = {"all": 2, "any": 2 + 4, "uni": 2 + 8}[mode]
    return Program("\n".join(lines), bytes_of(), bytes_of(slots(np.full(LANES, answer, np.uint32))))


@family(r"(vote\.sync\.ballot\.b32|activemask\.b32|match\.any\.sync\.b32)")
def masks(opcode: str, _: str) -> Program:
    lane = np.arange(LANES)
    if opcode.startswith("vote"):
        call, value = f"{opcode} %r21, %p4, -1;", np.full(LANES, np.sum(SOME << lane))
    elif opcode.startswith("activemask"):
        call, value = f"@%p4 {opcode} %r21;", np.where(SOME, np.sum(SOME << lane), 7)
    else:
        call = f"rem.u32 %r20, %r1, 3; {opcode} %r21, %r20, -1;"
        value = np.array([np.sum((lane % 3 == i % 3) << lane) for i in lane])
    lines = [*PREDICATES, "mov.b32 %r21, 7; mov.b32 %r22, 0;", call]
    lines.append("st.global.v2.b32 [%rd5], {%r21, %r22};")
    return Program("\n".join(lines), bytes_of(), bytes_of(slots(value.astype(np.uint32))))
