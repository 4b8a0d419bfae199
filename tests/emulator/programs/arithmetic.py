"""Integers, bits, floats and halves, against numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from emulator.programs import LANES, Program, family, lanewise

TYPES: dict[str, Any] = {
    "u8": np.uint8,
    "s8": np.int8,
    "u16": np.uint16,
    "s16": np.int16,
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "s64": np.int64,
    "b16": np.uint16,
    "b32": np.uint32,
    "b64": np.uint64,
    "f32": np.float32,
    "f64": np.float64,
    "f16": np.float16,
}
WIDE: dict[str, Any] = {"s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64}


def integers(dtype: Any, seed: int) -> np.ndarray[Any, Any]:
    """32 values, the ends of the range and small ones among them."""
    info = np.iinfo(dtype)
    random = np.random.default_rng(seed)
    values = random.integers(info.min, info.max, LANES, dtype=dtype, endpoint=True)
    edges = [0, 1, 2, 3, info.max, info.min, info.max - 1, 7]
    values[: len(edges)] = np.array(edges, dtype)
    return np.roll(values, seed)


def wrapped(dtype: Any, function: Callable[..., int], *arrays: Any) -> np.ndarray[Any, Any]:
    """``function`` of Python's integers, its low bits."""
    bits = 8 * np.dtype(dtype).itemsize
    values = [function(*(int(x) for x in lane)) for lane in zip(*arrays, strict=True)]
    unsigned = np.array([value & ((1 << bits) - 1) for value in values], dtype=f"u{bits // 8}")
    return unsigned.view(dtype)


def _quotient(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _remainder(a: int, b: int) -> int:
    return a if b == 0 else a - b * _quotient(a, b)


BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "div": _quotient,
    "rem": _remainder,
    "min": min,
    "max": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
}


@family(r"(add|sub|mul\.lo|div|rem|min|max|and|or|xor)\.([usb](?:16|32|64))")
def binary(opcode: str, name: str, type_name: str) -> Program:
    dtype = TYPES[type_name]
    a, b = integers(dtype, 1), integers(dtype, 4)
    return lanewise(opcode, [a, b], wrapped(dtype, BINARY[name], a, b))


@family(r"(min|max)\.relu\.s32")
def relu(opcode: str, name: str) -> Program:
    a, b = integers(np.int32, 1), integers(np.int32, 4)
    return lanewise(
        opcode, [a, b], wrapped(np.int32, lambda x, y: max(BINARY[name](x, y), 0), a, b)
    )


@family(r"(neg|abs|not)\.([sb]\d+)")
def unary(opcode: str, name: str, type_name: str) -> Program:
    dtype = TYPES[type_name]
    a = integers(dtype, 2)
    function = {"neg": lambda x: -x, "abs": abs, "not": lambda x: ~x}[name]
    return lanewise(opcode, [a], wrapped(dtype, function, a))


@family(r"mad\.lo\.([us]\d+)")
def multiply_add(opcode: str, type_name: str) -> Program:
    dtype = TYPES[type_name]
    a, b, c = (integers(dtype, seed) for seed in (1, 3, 5))
    return lanewise(opcode, [a, b, c], wrapped(dtype, lambda x, y, z: x * y + z, a, b, c))


@family(r"(mul|mad)\.wide\.([us]\d+)")
def multiply_wide(opcode: str, name: str, type_name: str) -> Program:
    dtype, wide = TYPES[type_name], WIDE[type_name]
    a, b, c = integers(dtype, 1), integers(dtype, 3), integers(wide, 5)
    if name == "mul":
        return lanewise(opcode, [a, b], wrapped(wide, lambda x, y: x * y, a, b))
    return lanewise(opcode, [a, b, c], wrapped(wide, lambda x, y, z: x * y + z, a, b, c))


@family(r"mul\.hi\.([us](\d+))")
def multiply_high(opcode: str, type_name: str, bits: str) -> Program:
    dtype = TYPES[type_name]
    a, b = integers(dtype, 1), integers(dtype, 3)
    return lanewise(opcode, [a, b], wrapped(dtype, lambda x, y: x * y >> int(bits), a, b))


@family(r"dp4a\.([us])32\.([us])32")
def dot_of_bytes(opcode: str, first: str, second: str) -> Program:
    a, b, c = integers(np.uint32, 1), integers(np.uint32, 3), integers(np.int32, 5)
    kinds = {"u": np.uint8, "s": np.int8}
    x = a.view(kinds[first]).reshape(LANES, 4).astype(np.int64)
    y = b.view(kinds[second]).reshape(LANES, 4).astype(np.int64)
    result = ((x * y).sum(1) + c).astype(np.uint64).astype(np.uint32).view(np.int32)
    return lanewise(opcode, [a, b, c], result)


@family(r"sh([lr])\.([usb](\d+))")
def shift(opcode: str, direction: str, type_name: str, bits: str) -> Program:
    dtype, width = TYPES[type_name], int(bits)
    a = integers(dtype, 2)
    b = (np.arange(LANES) * 5 % (width + 9)).astype(np.uint32)

    def shifted(x: int, y: int) -> int:
        return (x << y if y < width else 0) if direction == "l" else x >> y

    return lanewise(opcode, [a, b], wrapped(dtype, shifted, a, b))


@family(r"shf\.([lr])\.(wrap|clamp)\.b32")
def funnel_shift(opcode: str, direction: str, mode: str) -> Program:
    a, b = integers(np.uint32, 1), integers(np.uint32, 3)
    c = (np.arange(LANES) * 7 % 45).astype(np.uint32)

    def shifted(x: int, y: int, z: int) -> int:
        distance = z & 31 if mode == "wrap" else min(z, 32)
        both = y << 32 | x
        return both << distance >> 32 if direction == "l" else both >> distance

    return lanewise(opcode, [a, b, c], wrapped(np.uint32, shifted, a, b, c))


@family(r"bfe\.([us](\d+))")
def extract(opcode: str, type_name: str, bits: str) -> Program:
    dtype, width = TYPES[type_name], int(bits)
    a = integers(dtype, 2)
    b = (np.arange(LANES) * 5 % (width + 3)).astype(np.uint32)
    c = (np.arange(LANES) * 3 % (width + 3)).astype(np.uint32)

    def extracted(x: int, start: int, length: int) -> int:
        value = x >> start & ((1 << length) - 1)
        sign = x >> max(min(start + length - 1, width - 1), 0) & 1
        if type_name[0] == "s" and length and sign:
            value |= -1 << length
        return value

    return lanewise(opcode, [a, b, c], wrapped(dtype, extracted, a, b, c))


@family(r"bfi\.(b(\d+))")
def insert(opcode: str, type_name: str, bits: str) -> Program:
    dtype, width = TYPES[type_name], int(bits)
    a, b = integers(dtype, 2), integers(dtype, 3)
    c = (np.arange(LANES) * 5 % (width + 3)).astype(np.uint32)
    d = (np.arange(LANES) * 3 % (width + 3)).astype(np.uint32)

    def inserted(x: int, y: int, start: int, length: int) -> int:
        mask = ((1 << length) - 1) << start if start < width else 0
        return (y & ~mask) | (x << start & mask)

    return lanewise(opcode, [a, b, c, d], wrapped(dtype, inserted, a, b, c, d))


@family(r"(popc|clz|brev)\.b32")
def count_bits(opcode: str, name: str) -> Program:
    a = integers(np.uint32, 2)
    functions: dict[str, Callable[[int], int]] = {
        "popc": int.bit_count,
        "clz": lambda x: 32 - x.bit_length(),
        "brev": lambda x: int(f"{x:032b}"[::-1], 2),
    }
    return lanewise(opcode, [a], wrapped(np.uint32, functions[name], a))


@family(r"prmt\.b32")
def permute(opcode: str) -> Program:
    a, b, c = (integers(np.uint32, seed) for seed in (1, 3, 5))

    def permuted(x: int, y: int, selector: int) -> int:
        both, result = y << 32 | x, 0
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = both >> 8 * (nibble & 7) & 255
            if nibble & 8:
                byte = 255 * (byte >> 7)
            result |= byte << 8 * i
        return result

    return lanewise(opcode, [a, b, c], wrapped(np.uint32, permuted, a, b, c))


@family(r"lop3\.b32")
def look_up(opcode: str) -> Program:
    a, b, c = (integers(np.uint32, seed) for seed in (1, 3, 5))
    return lanewise(opcode, [a, b, c], (a & b) ^ c, suffix=", 0x6A")
