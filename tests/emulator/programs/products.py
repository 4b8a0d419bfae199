"""mma.sync and wgmma of each type and width, against numpy. Values are small, so sums are exact."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from emulator.programs import LANES, Program, bytes_of, family
from emulator.programs.floats import to_bfloat, to_half

Matrix = np.ndarray[Any, np.dtype[np.int64]]
RANGES = {"f16": (-3, 4), "bf16": (-3, 4), "s8": (-128, 128), "u8": (0, 256)}


def matrix(type_name: str, rows: int, columns: int, seed: int) -> Matrix:
    """Integers that the type holds."""
    low, high = RANGES[type_name]
    return np.random.default_rng(seed).integers(low, high, (rows, columns))


def encoded(values: Matrix, type_name: str) -> np.ndarray[Any, Any]:
    """The elements' bits."""
    if type_name == "f16":
        return to_half(values.astype(np.float64))
    if type_name == "bf16":
        return to_bfloat(values)
    return values.astype(np.int8 if type_name == "s8" else np.uint8)


def summed(total: Matrix, sum_type: str, saturates: bool) -> np.ndarray[Any, Any]:
    """The accumulators' bits."""
    if sum_type == "f32":
        return total.astype(np.float32)
    if sum_type == "f16":
        return to_half(total.astype(np.float64))
    if saturates:
        total = np.clip(total, -(2**31), 2**31 - 1)
    return (total & 0xFFFFFFFF).astype(np.uint32)


def fragments_of_a(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """(lane, register) of 16 rows: rows t / 4 and t / 4 + 8, words t % 4 and t % 4 + 4."""
    words = np.ascontiguousarray(bits).view(np.uint32).reshape(2, 8, -1, 4)  # high, row, half, word
    return np.ascontiguousarray(words.transpose(1, 3, 2, 0)).reshape(LANES, -1)


def fragments_of_b(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """(lane, register) of 8 columns, given as rows."""
    words = np.ascontiguousarray(bits).view(np.uint32).reshape(8, -1, 4)
    return np.ascontiguousarray(words.transpose(0, 2, 1)).reshape(LANES, -1)


def fragments_of_c(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """(lane, register) of 16 rows and any columns: pairs of columns, rows, 8 columns more."""
    rows, columns = bits.shape
    pairs = np.ascontiguousarray(bits).reshape(rows // 16, 2, 8, columns // 8, 4, 2)
    lanes = np.ascontiguousarray(pairs.transpose(0, 2, 4, 3, 1, 5))
    return lanes.reshape(rows // 16 * LANES, -1).view(np.uint32)


@family(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col(\.satfinite|)\.(\w+)\.(\w+)\.(\w+)\.\w+")
def mma(
    opcode: str, depth: str, saturates: str, sum_type: str, a_type: str, b_type: str
) -> Program:
    k = int(depth)
    a, b = matrix(a_type, 16, k, 1), matrix(b_type, 8, k, 2)
    c = np.random.default_rng(3).integers(-50, 50, (16, 8))
    if sum_type == "s32":
        c[::2] += 2**31 - 30000  # some sums overflow
        c[1::2] -= 2**31 - 30000
    parts = [
        fragments_of_a(encoded(a, a_type)),
        fragments_of_b(encoded(b, b_type)),
        fragments_of_c(summed(c, sum_type, False)),
    ]
    lists, loads, number = [], [], 20
    for part in parts:
        names = [f"%r{number + i}" for i in range(part.shape[1])]
        for name in names:
            loads.append(f"ld.global.b32 {name}, [%rd10+{4 * (number - 20)}];")
            number += 1
        lists.append("{" + ", ".join(names) + "}")
    results = [f"%r{60 + i}" for i in range(parts[2].shape[1])]
    words = np.concatenate(parts, 1)
    lines = [f"mul.wide.u32 %rd9, %r1, {4 * words.shape[1]}; add.s64 %rd10, %rd1, %rd9;", *loads]
    lines.append(f"{opcode} {{{', '.join(results)}}}, {', '.join(lists)};")
    lines.append(f"mul.wide.u32 %rd9, %r1, {4 * len(results)}; add.s64 %rd10, %rd2, %rd9;")
    lines += [f"st.global.b32 [%rd10+{4 * i}], {name};" for i, name in enumerate(results)]
    expected = fragments_of_c(summed(a @ b.T + c, sum_type, bool(saturates)))
    return Program("\n".join(lines), bytes_of(words), bytes_of(expected))


# -- wgmma

SPAN = {0: 16, 1: 128, 2: 64, 3: 32}
"""Bytes of a row that lie together, by the descriptor's mode."""


def swizzled(address: int, mode: int) -> int:
    """The 16 bytes of an address change places within 8 rows of the span."""
    return address ^ (address >> 7 & {0: 0, 1: 7, 2: 3, 3: 1}[mode]) << 4


def image(rows: np.ndarray[Any, Any], mode: int, start: int) -> tuple[np.ndarray[Any, Any], int]:
    """Shared memory with ``rows`` of 32 bytes, K-major, and the descriptor without its address.

    ``start``: the byte of the span at which the rows begin.
    """
    raw = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), 2, 16)
    span = SPAN[mode]
    group = 8 * span if mode else 256  # without a swizzle both halves of 8 rows, one by one
    memory = np.zeros(len(rows) // 8 * group, np.uint8)
    for row in range(len(rows)):
        for half in range(2):
            at = row // 8 * group + row % 8 * span
            at = at + 128 * half if mode == 0 else swizzled(at + start + 16 * half, mode)
            memory[at : at + 16] = raw[row, half]
    leading = 128 if mode == 0 else 16
    return memory, mode << 62 | (group >> 4) << 32 | (leading >> 4) << 16


def transposed_image(rows: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], int]:
    """MN-major without a swizzle: 8 columns of one k together, 8 k, then the next 8 k."""
    n, k = rows.shape
    blocks = rows.reshape(n // 8, 8, k // 8, 8).transpose(0, 2, 3, 1)  # n / 8, k / 8, k, n
    memory = np.ascontiguousarray(blocks).reshape(-1).view(np.uint8)
    return memory, (128 * (k // 8) >> 4) << 32 | (128 >> 4) << 16


def _fill(total: int) -> str:
    """Copies ``in`` to shared memory, 16 bytes a thread at a time."""
    return f"""shl.b32 %r5, %r1, 4; FILL: setp.ge.u32 %p6, %r5, {total}; @%p6 bra FILLED;
cvt.u64.u32 %rd6, %r5; add.s64 %rd7, %rd1, %rd6; ld.global.v4.b32 {{%r6, %r7, %r8, %r9}}, [%rd7];
add.s32 %r10, %r5, %r2; st.shared.v4.b32 [%r10], {{%r6, %r7, %r8, %r9}};
add.s32 %r5, %r5, 2048; bra FILL; FILLED: fence.proxy.async; bar.sync 0;"""


CONSTANT = {"f32": "cvt.rn.f32.u32 %r11, %r1;", "s32": "add.s32 %r11, %r1, 0x7FFF0000;"}
CONSTANT["f16"] = "cvt.rn.f16.u32 %h1, %r1; mov.b32 %r11, {%h1, %h1};"


def wgmma_program(opcode: str, columns: int, types: tuple[str, str, str]) -> Program:
    """Modes, places of A, scales and transpositions vary with the opcode's name."""
    sum_type, a_type, b_type = types
    integers = a_type in ("s8", "u8")
    variant = zlib.crc32(opcode.encode())
    mode, in_registers = variant % 4, variant >> 2 & 1
    transposes = 0 if integers else variant >> 3 & 1
    accumulates, negative = variant >> 4 & 1 or integers, variant >> 5 & 1 and not integers
    start = (variant >> 6) * 32 % SPAN[mode]
    depth = 32 if integers else 16
    a, b = matrix(a_type, 64, depth, 1), matrix(b_type, columns, depth, 2)
    a_bits, b_bits = encoded(a, a_type), encoded(b, b_type)
    a_image, a_descriptor = image(a_bits, mode, start)
    if transposes:
        b_image, b_descriptor, b_start = *transposed_image(b_bits), 0
    else:
        b_image, b_descriptor = image(b_bits, mode, start)
        b_start = start
    place = -(-a_image.size // 1024) * 1024
    memory = np.zeros(place + -(-b_image.size // 16) * 16, np.uint8)
    memory[: a_image.size], memory[place : place + b_image.size] = a_image, b_image
    fragments = fragments_of_a(a_bits.reshape(4, 16, depth)[0])
    for warp in range(1, 4):
        more = fragments_of_a(a_bits.reshape(4, 16, depth)[warp])
        fragments = np.concatenate([fragments, more])
    count = columns // (4 if sum_type == "f16" else 2)
    names = [f"%r{100 + i}" for i in range(count)]
    operand = "{%r20, %r21, %r22, %r23}" if in_registers else "%rd20"
    numbers = (
        ""
        if integers
        else f", {-1 if negative else 1}, 1{'' if in_registers else ', 0'}, {transposes}"
    )
    lines = [
        _fill(memory.size),
        CONSTANT[sum_type],
        *(f"mov.b32 {name}, %r11;" for name in names),
        "mul.wide.u32 %rd9, %r1, 16; add.s64 %rd9, %rd9, %rd1;",
        f"ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd9+{memory.size}];",
        *(
            _descriptor(f"%rd{20 + i}", d, at)
            for i, (d, at) in enumerate([(a_descriptor, start), (b_descriptor, place + b_start)])
        ),
        f"setp.eq.u32 %p1, {1 if accumulates else 0}, 1;",
        "wgmma.fence.sync.aligned;",
        f"{opcode} {{{', '.join(names)}}}, {operand}, %rd21, %p1{numbers};",
        "wgmma.commit_group.sync.aligned;",
        "wgmma.wait_group.sync.aligned 0;",
        f"mul.wide.u32 %rd9, %r1, {4 * count}; add.s64 %rd10, %rd2, %rd9;",
        *(f"st.global.b32 [%rd10+{4 * i}], {name};" for i, name in enumerate(names)),
    ]
    total = (a @ b.T) * (-1 if negative else 1)
    if accumulates:
        total = total + _thread_of(columns) + (0x7FFF0000 if integers else 0)
    expected = fragments_of_c(summed(total, sum_type, "satfinite" in opcode))
    shared = memory.size
    return Program(
        "\n".join(lines),
        bytes_of(memory, fragments),
        bytes_of(expected),
        threads=128,
        shared=shared,
    )


def _descriptor(name: str, fixed: int, at: int) -> str:
    return (
        f"add.s32 %r12, %r2, {at}; shr.u32 %r12, %r12, 4; cvt.u64.u32 {name}, %r12; "
        f"or.b64 {name}, {name}, 0x{fixed:X};"
    )


def _thread_of(columns: int) -> Matrix:
    """Which thread holds each accumulator."""
    row, column = np.arange(64)[:, None], np.arange(columns)[None]
    return row // 16 * 32 + row % 8 * 4 + column % 8 // 2


@family(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k\d+(?:\.satfinite)?\.(\w+)\.(\w+)\.(\w+)")
def wgmma(opcode: str, columns: str, sum_type: str, a_type: str, b_type: str) -> Program:
    return wgmma_program(opcode, int(columns), (sum_type, a_type, b_type))


@family(r"wgmma\.(fence|commit_group|wait_group)\.sync\.aligned")
def wgmma_order(opcode: str, _: str) -> Program:
    name = "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16"
    return wgmma_program(name, 16, ("f32", "f16", "f16"))
