"""Floats and halves, against numpy. bf16 is the upper half of fp32, rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from emulator.programs import LANES, Program, family, lanewise
from emulator.programs.arithmetic import TYPES


def floats(dtype: Any, seed: int) -> np.ndarray[Any, Any]:
    """Between 1 and 2 and between -2 and -1, so that sums of products are exact in fp64."""
    random = np.random.default_rng(seed)
    values = (1 + random.random(LANES)) * np.where(random.random(LANES) < 0.5, -1, 1)
    return values.astype(np.float16 if dtype == np.float16 else np.float32).astype(dtype)


def _flush(values: Any) -> Any:
    tiny = np.abs(values) < np.float32(1.17549435e-38)
    return np.where(tiny, np.copysign(np.float32(0), values), values).astype(values.dtype)


def _saturate(values: Any) -> Any:
    return np.clip(np.nan_to_num(values, nan=0), 0, 1).astype(values.dtype)


ROUNDED: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "fma": lambda a, b, c: a.astype(np.float64) * b + c,
}


@family(r"(add|sub|mul|fma|div)((?:\.rn|\.full|\.approx)?)(\.ftz|\.sat|)\.(f32|f64)")
def float_arithmetic(opcode: str, name: str, _: str, modifier: str, type_name: str) -> Program:
    dtype = TYPES[type_name]
    operands = [floats(dtype, seed) for seed in range(3 if name == "fma" else 2)]
    if type_name == "f64" and name == "fma":
        operands = [floats(np.float16, seed).astype(dtype) for seed in range(3)]
    if modifier == ".ftz":  # subnormal operands, and a subnormal result
        operands[0][:6] = np.array([1e-39, -1e-39, 1e-38 * 1.5, -1e-40, 2e-38, 1], dtype)
        operands[1][:6] = np.array([1, 1, 0.25, 2, 0.5, 1e-39], dtype)
        operands = [_flush(a) for a in operands] if name == "div" else operands
    if modifier == ".sat":
        operands[0][:4] = np.array([0.25, np.nan, 0.5, 0.125], dtype)
    used = [_flush(a) for a in operands] if modifier == ".ftz" else operands
    with np.errstate(all="ignore"):
        result = ROUNDED[name](*used).astype(dtype)
    result = {".ftz": _flush, ".sat": _saturate, "": lambda x: x}[modifier](result)
    return lanewise(opcode, operands, result)


@family(r"(add|sub|mul|fma)(?:\.rn)?(\.ftz|)\.f32x2")
def float_pairs(opcode: str, name: str, modifier: str) -> Program:
    count = 3 if name == "fma" else 2
    operands = [
        np.stack([floats(np.float32, s), floats(np.float32, s + 7)], 1) for s in range(count)
    ]
    if modifier:
        operands[0][:2] = 1e-39
    used = [_flush(a) for a in operands] if modifier else operands
    result = ROUNDED[name](*used).astype(np.float32)
    packed = [a.reshape(-1).view(np.uint64) for a in operands]
    return lanewise(
        opcode, packed, (_flush(result) if modifier else result).reshape(-1).view(np.uint64)
    )


def _extreme(name: str, nan: bool, values: list[Any]) -> Any:
    function = {
        ("min", False): np.fmin,
        ("max", False): np.fmax,
        ("min", True): np.minimum,
        ("max", True): np.maximum,
    }[name, nan]
    result = function.reduce(np.stack(values))
    return np.where(np.isnan(result), np.array(np.uint32(0x7FFFFFFF)).view(np.float32), result)


@family(r"(min|max)((?:\.ftz)?)((?:\.NaN)?)\.f32(#4|)")
def extremes(opcode: str, name: str, ftz: str, nan: str, three: str) -> Program:
    operands = [floats(np.float32, seed) for seed in range(3 if three else 2)]
    operands[0][:3] = np.array([np.nan, 3, 1e-39])
    operands[1][:3] = np.array([1.5, np.nan, -1.5])
    result = _extreme(name, bool(nan), [_flush(a) if ftz else a for a in operands])
    return lanewise(opcode, operands, result.astype(np.float32))


@family(r"(min|max)\.f64")
def extremes_of_doubles(opcode: str, name: str) -> Program:
    a, b = floats(np.float64, 1), floats(np.float64, 2)
    return lanewise(opcode, [a, b], {"min": np.fmin, "max": np.fmax}[name](a, b))


def _reciprocal_root(values: Any) -> Any:
    return 1 / np.sqrt(values)


UNARY: dict[str, tuple[Callable[[Any], Any], list[float]]] = {
    "abs": (np.abs, [-1.5, 2, -0.0]),
    "neg": (np.negative, [-1.5, 2, 0]),
    "ex2": (np.exp2, [0, 1, -3, 10, 0.5]),
    "lg2": (np.log2, [1, 2, 0.125, 1024, 3]),
    "sin": (np.sin, [0, 0.5, 1]),
    "cos": (np.cos, [0, 0.5, 1]),
    "rsqrt": (_reciprocal_root, [1, 4, 0.25, 3]),
    "rcp": (np.reciprocal, [1, 2, 4, 0.5, 3]),
    "sqrt": (np.sqrt, [1, 4, 2.25, 2]),
    "tanh": (np.tanh, [0, 100, -100, 0.5]),
}


@family(r"(abs|neg|ex2|lg2|sin|cos|rsqrt|rcp|sqrt|tanh)((?:\.approx|\.rn)?)((?:\.ftz)?)\.(f32|f64)")
def float_unary(opcode: str, name: str, _: str, ftz: str, type_name: str) -> Program:
    function, samples = UNARY[name]
    dtype = TYPES[type_name]
    values = np.resize(np.array(samples, dtype), LANES)
    if ftz and name in ("abs", "neg"):
        values[7] = 1e-39
    if ftz and name == "rcp":
        values[7] = -1e-39  # zero by then
    used = _flush(values) if ftz else values
    with np.errstate(all="ignore"):
        exact = function(used.astype(np.float64))
    if type_name == "f64":
        return lanewise(opcode, [values], exact)
    return lanewise(opcode, [values], exact.astype(np.float32), ulps=1, exact=exact)


@family(r"copysign\.f32")
def copy_sign(opcode: str) -> Program:
    a, b = floats(np.float32, 1), floats(np.float32, 2)
    return lanewise(opcode, [a, b], np.copysign(b, a))


@family(r"cvt\.(sat|ftz)\.f32\.f32")
def modify(opcode: str, modifier: str) -> Program:
    a = floats(np.float32, 1)
    a[:4] = [0.25, np.nan if modifier == "sat" else 1e-39, 0.5, -1e-39]
    return lanewise(opcode, [a], {"sat": _saturate, "ftz": _flush}[modifier](a))


def to_bfloat(values: Any) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Rounded to the nearest, ties to even; NaN is 0x7fff."""
    single = np.asarray(values, np.float64).astype(np.float32)
    bits = single.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FFF), rounded)


def from_bfloat(bits: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """fp32 of bf16's bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_half(values: Any) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Rounded once; NaN is 0x7fff."""
    with np.errstate(over="ignore"):
        bits = np.asarray(values, np.float64).astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), bits)


NARROW: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "f16": (to_half, lambda bits: bits.view(np.float16).astype(np.float32)),
    "bf16": (to_bfloat, from_bfloat),
}


def _half_result(name: str, nan: str, relu_: str, operands: list[Any]) -> Any:
    with np.errstate(all="ignore"):
        if name in ("min", "max"):
            return _extreme(name, bool(nan), operands)
        if name in ("abs", "neg", "ex2", "tanh"):
            return UNARY[name][0](operands[0].astype(np.float64))
        result = ROUNDED[name](*(a.astype(np.float64) for a in operands))
    return np.where(result > 0, result, np.where(np.isnan(result), result, 0)) if relu_ else result


@family(
    r"(add|sub|mul|min|max|fma|neg|abs|ex2|tanh)(?:\.rn|\.approx)?(?:\.ftz)?(\.NaN|)(\.relu|)"
    r"\.(f16|bf16)(x2|)"
)
def half_arithmetic(
    opcode: str, name: str, nan: str, relu_: str, type_name: str, pair: str
) -> Program:
    narrow, widen = NARROW[type_name]
    count = {"fma": 3, "neg": 1, "abs": 1, "ex2": 1, "tanh": 1}.get(name, 2)
    shape = (LANES, 2) if pair else (LANES,)
    random = np.random.default_rng(5)
    operands = []
    for index in range(count):
        values = random.integers(-40, 40, shape) / 8
        if name == "ex2":
            values = np.round(values)
        if name == "tanh":
            values = np.sign(values) * 40
        bits = narrow(values)
        if name in ("min", "max"):
            bits.reshape(-1)[index] = 0x7FFF
        operands.append(bits)
    result = _half_result(name, nan, relu_, [widen(bits) for bits in operands])
    out = narrow(result.astype(np.float64))
    if pair:
        packed = [np.ascontiguousarray(a).reshape(-1).view(np.uint32) for a in operands]
        return lanewise(opcode, packed, np.ascontiguousarray(out).reshape(-1).view(np.uint32))
    return lanewise(opcode, operands, out)


@family(r"(add|sub|fma)(?:\.rn)?\.f32\.(f16|bf16)")
def mixed(opcode: str, name: str, type_name: str) -> Program:
    narrow, widen = NARROW[type_name]
    a, b = narrow(floats(np.float32, 1)), narrow(floats(np.float32, 2))
    c = floats(np.float32, 3)
    if name == "fma":
        result = widen(a).astype(np.float64) * widen(b) + c
        return lanewise(opcode, [a, b, c], result.astype(np.float32))
    return lanewise(opcode, [a, c], ROUNDED[name](widen(a), c).astype(np.float32))
