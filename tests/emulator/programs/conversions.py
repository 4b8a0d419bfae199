"""cvt, against numpy and exact arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np

from emulator.programs import LANES, Program, family, lanewise
from emulator.programs.arithmetic import TYPES, integers, wrapped
from emulator.programs.floats import NARROW, to_half

INTEGER = "([us](?:8|16|32|64))"


def _clamped(values: Any, dtype: Any) -> np.ndarray[Any, Any]:
    info = np.iinfo(dtype)
    return np.array([max(info.min, min(info.max, int(x))) for x in values], dtype)


@family(rf"cvt\.{INTEGER}\.{INTEGER}")
def truncate(opcode: str, result: str, source: str) -> Program:
    a = integers(TYPES[source], 2)
    return lanewise(opcode, [a], wrapped(TYPES[result], lambda x: x, a))


@family(rf"cvt\.sat\.{INTEGER}\.{INTEGER}")
def saturate(opcode: str, result: str, source: str) -> Program:
    a = integers(TYPES[source], 2)
    return lanewise(opcode, [a], _clamped(a, TYPES[result]))


@family(rf"cvt\.r[nz]\.(f32|f64|f16)\.{INTEGER}")
def from_integer(opcode: str, result: str, source: str) -> Program:
    a = integers(TYPES[source], 2)
    if result == "f16":
        a = (np.arange(LANES) * 3 - (40 if source[0] == "s" else 0)).astype(TYPES[source])
        return lanewise(opcode, [a], to_half(a.astype(np.float64)))
    return lanewise(opcode, [a], a.astype(TYPES[result]))


ROUND = {"n": np.round, "z": np.trunc, "m": np.floor, "p": np.ceil}


@family(rf"cvt\.r([nzmp])i(?:\.ftz|\.sat)?\.{INTEGER}\.(f32|f64|f16)")
def to_integer(opcode: str, rounding: str, result: str, source: str) -> Program:
    random = np.random.default_rng(3)
    values = (random.random(LANES) - 0.5) * 300
    values[:6] = [0.5, 1.5, -0.5, -2.5, np.nan, 60000]
    values[6:9] = [-60000, 2.5, 0.75]
    if source != "f16":
        values[9:11] = [1e20, -1e20]
    a = values.astype(TYPES[source])
    rounded = ROUND[rounding](a.astype(np.float64))
    return lanewise(opcode, [a], _clamped(np.nan_to_num(rounded, nan=0), TYPES[result]))


@family(r"cvt\.r([nzmp])i\.f32\.f32")
def round_to_integer(opcode: str, rounding: str) -> Program:
    a = np.linspace(-4, 4, LANES).astype(np.float32)
    return lanewise(opcode, [a], ROUND[rounding](a))


@family(r"cvt\.f64\.f32")
def to_double(opcode: str) -> Program:
    a = np.linspace(-4, 4, LANES).astype(np.float32)
    return lanewise(opcode, [a], a.astype(np.float64))


@family(r"cvt\.rn\.f32\.f64")
def from_double(opcode: str) -> Program:
    a = np.linspace(-4, 4, LANES)
    return lanewise(opcode, [a], a.astype(np.float32))


@family(r"cvt\.f32\.(f16|bf16)")
def widen_half(opcode: str, source: str) -> Program:
    # Subnormal, largest, infinite, NaN, and others.
    bits = np.resize(np.array([1, 0x3FF, 0x400, 0x7BFF, 0x7C00, 0xFC00, 0x3555, 0x8001]), LANES)
    a = bits.astype(np.uint16)
    return lanewise(opcode, [a], NARROW[source][1](a))


def _values(type_name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Ties, subnormals of the narrow type, overflow, infinity and NaN."""
    tiny = 2.0**-25 if type_name == "f16" else 1e-40
    samples = [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, tiny, 3 * tiny, -1.1]
    samples += [65519, 65520, -1e38, np.inf, np.nan, -0.0, 0.1, 3e-6, -3.4e38]
    return np.resize(np.array(samples, np.float32), LANES)


def _to_zero(values: Any, type_name: str) -> Any:
    narrow, widen = NARROW[type_name]
    bits = narrow(values.astype(np.float64))
    with np.errstate(all="ignore"):
        above = np.abs(widen(bits).astype(np.float64)) > np.abs(values.astype(np.float64))
    return np.where(above, bits - 1, bits).astype(np.uint16)


@family(r"cvt\.(rn|rz)(\.relu|)\.(f16|bf16)\.f32")
def narrow(opcode: str, rounding: str, relu: str, result: str) -> Program:
    a = _values(result)
    if rounding == "rz":
        return lanewise(opcode, [a], _to_zero(a, result))
    used = np.where(a < 0, np.float32(0), a) if relu else a
    return lanewise(opcode, [a], NARROW[result][0](used.astype(np.float64)))


@family(r"cvt\.rn(\.relu|)\.(f16|bf16)x2\.f32")
def narrow_pair(opcode: str, relu: str, result: str) -> Program:
    high, low = _values(result), np.roll(_values(result), 3)
    used = [np.where(a < 0, np.float32(0), a) if relu else a for a in (high, low)]
    bits = [NARROW[result][0](a.astype(np.float64)).astype(np.uint32) for a in used]
    return lanewise(opcode, [high, low], bits[0] << 16 | bits[1])
