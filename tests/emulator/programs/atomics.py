"""atom and red in each space, and fences that order blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from emulator.programs import LANES, REGISTER, Program, bytes_of, family, slots
from emulator.programs.arithmetic import TYPES
from emulator.programs.floats import from_bfloat, to_bfloat

UPDATE: dict[str, Callable[[Any, Any, Any], Any]] = {
    "add": lambda old, b, c: old + b,
    "min": lambda old, b, c: min(old, b),
    "max": lambda old, b, c: max(old, b),
    "and": lambda old, b, c: old & b,
    "or": lambda old, b, c: old | b,
    "xor": lambda old, b, c: old ^ b,
    "inc": lambda old, b, c: 0 if old >= b else old + 1,
    "dec": lambda old, b, c: b if old == 0 or old > b else old - 1,
    "exch": lambda old, b, c: b,
    "cas": lambda old, b, c: c if old == b else old,
}


def _halves(type_name: str, old: int, value: int) -> int:
    """Both halves of a word, added."""
    pairs = [np.array([x & 0xFFFF, x >> 16], np.uint16) for x in (old, value)]
    if type_name == "f16x2":
        bits = (pairs[0].view(np.float16) + pairs[1].view(np.float16)).view(np.uint16)
    else:
        bits = to_bfloat(from_bfloat(pairs[0]).astype(np.float64) + from_bfloat(pairs[1]))
    return int(bits[0]) | int(bits[1]) << 16


def _operands(name: str, type_name: str, dtype: Any) -> tuple[Any, Any, Any]:
    """The 4 words at first, and b and c of each lane."""
    lane = np.arange(LANES)
    if type_name == "f16x2":
        values = np.stack([lane / 4, -lane / 8], 1).astype(np.float16)
        return np.array([0x3C004000] * 4, np.uint32), values.reshape(-1).view(np.uint32), lane
    if type_name == "bf16x2":
        values = to_bfloat(np.stack([lane / 4, -lane / 8], 1)).reshape(-1).view(np.uint32)
        return np.array([0x3F804000] * 4, np.uint32), values, lane
    b = {
        "add": lane * 3 - (20 if type_name[0] in "sf" else 0),
        "min": 60 - lane * 5 % 47,
        "max": lane * 5 % 47,
        "and": ~(1 << lane % 16),
        "or": 1 << lane % 16,
        "xor": lane * 77,
        "inc": np.full(LANES, 5),
        "dec": np.full(LANES, 5),
        "exch": lane * 11,
        "cas": lane // 4 + (lane % 4 == 3),
    }[name]
    start = np.array([0, 3, 60, 9] if name != "cas" else [0, 0, 1, 2])
    return start.astype(dtype), b.astype(dtype), (lane // 4 + 1).astype(dtype)


@family(
    r"(atom|red)\.(global|shared|generic)\.(add|min|max|and|or|xor|inc|dec|exch|cas)"
    r"(?:\.noftz)?\.(\w+)"
)
def atomic(opcode: str, form: str, space: str, name: str, type_name: str) -> Program:
    """Lanes change 4 words in order; each lane's result is the value before it."""
    paired = type_name.endswith("x2")
    dtype = np.dtype(np.uint32) if paired else np.dtype(TYPES[type_name])
    start, b, c = _operands(name, type_name, dtype)
    words, old = start.copy(), np.zeros(LANES, dtype)
    for lane in range(LANES):
        at = lane % 4
        old[lane] = words[at]
        values = (int(x) if dtype.kind != "f" else x for x in (words[at], b[lane], c[lane]))
        if paired:
            words[at] = _halves(type_name, int(words[at]), int(b[lane]))
        else:
            words[at] = UPDATE[name](*values)
    size, register = dtype.itemsize, REGISTER[dtype.itemsize]
    mnemonic = opcode.replace(".generic", "")
    address = {
        "global": "add.s64 %rd10, %rd2, %rd9; add.s64 %rd10, %rd10, 256;",
        "shared": "cvt.u32.u64 %r10, %rd9; add.s32 %r10, %r10, %r2; cvt.u64.u32 %rd10, %r10;",
    }
    address["generic"] = address["shared"] + "cvta.shared.u64 %rd10, %rd10;"
    kept = "global" if space == "global" else "shared"
    inside = "cvta.to.shared.u64 %rd11, %rd10;" if space == "generic" else "mov.b64 %rd11, %rd10;"
    result = f"{register}31, " if form == "atom" else ""
    third = f", {register}33" if name == "cas" else ""
    body = f"""and.b32 %r9, %r1, 3; mul.wide.u32 %rd9, %r9, 8; {address[space]} {inside}
setp.lt.u32 %p1, %r1, 4; mov.b64 %rd31, 0; mov.b32 %r31, 0;
@%p1 ld.global.b{8 * size} {register}30, [%rd4]; @%p1 st.{kept}.b{8 * size} [%rd11], {register}30;
bar.sync 0; ld.global.b{8 * size} {register}32, [%rd4+256];
ld.global.b{8 * size} {register}33, [%rd4+512];
{mnemonic} {result}[%rd10], {register}32{third};
mov.b64 %rd40, 0; st.global.b64 [%rd5], %rd40;
st.global.b{8 * size} [%rd5], {register}31; bar.sync 0;
@%p1 ld.{kept}.b{8 * size} {register}30, [%rd11]; @%p1 mul.wide.u32 %rd12, %r1, {size};
@%p1 add.s64 %rd12, %rd12, %rd2; @%p1 st.global.b{8 * size} [%rd12+512], {register}30;"""
    first = np.zeros(LANES, dtype)
    first[:4] = start
    inputs = bytes_of(slots(first), slots(b.astype(dtype)), slots(c.astype(dtype)))
    results = slots(old if form == "atom" else np.zeros(LANES, dtype))
    middle = np.full(256, 0xA5, np.uint8)
    if space == "global":
        for i in range(4):
            middle[8 * i : 8 * i + size] = words[i : i + 1].view(np.uint8)
    return Program(body, inputs, bytes_of(results, middle, words), shared=64)


@family(r"(membar|fence\.acq_rel|fence\.sc)\.(gl|gpu|sys)")
def fence(opcode: str, _: str, __: str) -> Program:
    """The second block reads what the first wrote, once a flag says so."""
    body = f"""setp.ne.u32 %p1, %r1, 0; @%p1 bra END;
mov.u32 %r10, %ctaid.x; setp.ne.u32 %p2, %r10, 0; @%p2 bra SECOND;
st.global.b32 [%rd2], 7; {opcode}; atom.global.exch.b32 %r11, [%rd2+4], 1; bra END;
SECOND: atom.global.add.u32 %r11, [%rd2+4], 1; {opcode}; ld.global.b32 %r12, [%rd2];
add.s32 %r12, %r12, %r11; st.global.b32 [%rd2+8], %r12;
END: mov.b32 %r12, 0;"""
    return Program(body, bytes_of(), bytes_of(np.array([7, 2, 8], np.uint32)), grid=2)
