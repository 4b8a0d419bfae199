"""Small PTX programs with known answers, at least one for every opcode that the emulator knows.

A module for each family registers functions by a pattern of opcodes; `program_of` calls the
function that matches. A program loads from ``in`` (%rd1), stores to ``out`` (%rd2), and must leave
``expected`` there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import emulator
from emulator import Fault, Launch, Module, Range

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

HEAD = """.version 8.7
.target sm_90a
.address_size 64
{variables}
.extern .shared .align 1024 .b8 smem[];
.visible .entry k(.param .u64 p0, .param .u64 p1, .param .align 64 .b8 p2[128])
{directives}
{{
.reg .pred %p<40>; .reg .b16 %h<40>; .reg .b32 %r<400>; .reg .b64 %rd<80>;
{depot}
ld.param.b64 %rd1, [p0]; ld.param.b64 %rd2, [p1];
mov.u32 %r1, %tid.x; mov.b32 %r2, smem;
mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ntid.x; mad.lo.s32 %r3, %r3, %r4, %r1;
mul.wide.u32 %rd3, %r3, 8; add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
"""
LANES = 32


@dataclass(frozen=True, slots=True)
class Program:
    """One launch. ``body``: PTX, with %r1 the thread, %r2 shared memory, %rd4 and %rd5 the thread's
    8 bytes of ``in`` and ``out``.

    ``expected``: every byte that ``out`` must hold; ``ulps``: how far fp32 values may be off if
    they are no fp32 number by themselves (``exact``: their fp64 values). ``fault``: a part of
    the fault's message, for programs that must fail. ``tensor``: "in" or "out", and the
    other arguments of `emulator.tensor_map`, for a map at p2. ``overlaps``: there are two launches,
    of which the second must begin before the first is complete.
    """

    body: str
    inputs: Bytes
    expected: Bytes
    threads: int = LANES
    grid: int = 1
    shared: int = 0
    directives: str = ""
    depot: str = ""
    variables: str = ""
    tensor: tuple[str, dict[str, Any]] | None = None
    ulps: int = 0
    exact: np.ndarray[Any, np.dtype[np.float64]] | None = None
    fault: str = ""
    overlaps: bool = False

    def text(self) -> str:
        """The whole PTX."""
        head = HEAD.format(directives=self.directives, depot=self.depot, variables=self.variables)
        return f"{head}{self.body}\nret;\n}}\n"


def execute(program: Program, **options: int) -> tuple[Bytes, emulator.Report]:
    """What ``out`` holds afterwards, and the report. Raises `Fault`."""
    out = _aligned(np.full(max(program.expected.size, 8), 0xA5, np.uint8))
    inputs = _aligned(program.inputs if program.inputs.size else np.zeros(8, np.uint8))
    module = Module(program.text())
    addresses = [int(array.ctypes.data).to_bytes(8, "little") for array in (inputs, out)]
    tensor_map = bytes(128)
    if program.tensor is not None:
        base = (inputs if program.tensor[0] == "in" else out).ctypes.data
        tensor_map = emulator.tensor_map(base=base, **program.tensor[1])
    launch = Launch(
        module,
        (program.grid,),
        (program.threads,),
        module.pack([*addresses, tensor_map]),
        program.shared,
    )
    ranges = [
        Range(inputs.ctypes.data, inputs.nbytes, "in"),
        Range(out.ctypes.data, out.nbytes, "out"),
    ]
    chain = [launch, dataclasses.replace(launch, pdl=True)][: 1 + program.overlaps]
    settings: dict[str, Any] = {"limit": 20_000, **options}
    report = emulator.run(chain, ranges, **settings)[-1]
    return out[: program.expected.size], report


def _aligned(values: Bytes) -> Bytes:
    memory = np.zeros(values.size + 128, np.uint8)
    start = -memory.ctypes.data % 128
    memory[start : start + values.size] = values
    return memory[start : start + values.size]


def complaint(program: Program, **options: int) -> str | None:
    """What is wrong with the program's result; None if it is as expected."""
    try:
        out, report = execute(program, **options)
        for seed in range(2, 12 if program.overlaps and not report.overlapped else 2):
            out, report = execute(program, seed=seed)
            if report.overlapped:
                break
    except Fault as fault:
        if program.fault and program.fault in str(fault):
            return None
        return f"fault: {fault}"
    if program.fault:
        return f"no fault, wanted {program.fault!r}"
    if program.overlaps and not report.overlapped:
        return "the second launch never begins before the first is complete"
    if program.ulps:
        return _far(program, out)
    if np.array_equal(out, program.expected):
        return None
    index = int(np.flatnonzero(out != program.expected)[0])
    return f"byte {index}: got {out[index]}, wanted {program.expected[index]}"


def _far(program: Program, out: Bytes) -> str | None:
    assert program.exact is not None, "ulps without exact values"
    got, expected = out.view(np.float32), program.expected.view(np.float32)
    exact = program.exact == expected.astype(np.float64)
    distance = np.abs(got.view(np.int32).astype(np.int64) - expected.view(np.int32))
    distance[np.isnan(got) & np.isnan(expected)] = 0
    wrong = distance > np.where(exact | np.isnan(expected), 0, program.ulps)
    if not wrong.any():
        return None
    index = int(np.flatnonzero(wrong)[0])
    return f"value {index}: got {got[index]}, wanted {expected[index]}"


Make = Callable[..., Program]
_FAMILIES: list[tuple[re.Pattern[str], Make]] = []


def family(pattern: str) -> Callable[[Make], Make]:
    """Registers a function for opcodes that match; it is given the opcode and the groups."""

    def register(make: Make) -> Make:
        _FAMILIES.append((re.compile(pattern), make))
        return make

    return register


def program_of(opcode: str) -> Program | None:
    """The program of an opcode; None if no family has it."""
    from emulator.programs import (  # noqa: F401  (they register themselves)
        arithmetic,
        atomics,
        barriers,
        control,
        conversions,
        copies,
        floats,
        lanes,
        memory,
        products,
    )

    for pattern, make in _FAMILIES:
        if match := pattern.fullmatch(opcode):
            return make(opcode, *match.groups())
    return None


def bytes_of(*arrays: Any) -> Bytes:
    """The arrays' bytes, one after the other."""
    parts = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def slots(values: Any) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Values as the 8 bytes of a thread each, zeros above their own width."""
    array = np.ascontiguousarray(values)
    result = np.zeros(array.size, np.uint64)
    result.view(np.uint8).reshape(-1, 8)[:, : array.itemsize] = array.reshape(-1, 1).view(np.uint8)
    return result


REGISTER = {1: "%h", 2: "%h", 4: "%r", 8: "%rd"}


def lanewise(
    opcode: str,
    operands: Sequence[np.ndarray[Any, Any]],
    result: np.ndarray[Any, Any],
    *,
    suffix: str = "",
    ulps: int = 0,
    exact: np.ndarray[Any, np.dtype[np.float64]] | None = None,
) -> Program:
    """A lane's result from its own operands, whose registers follow from the arrays' dtypes."""
    lines, names = [], []
    for index, array in enumerate(operands):
        size = array.itemsize
        name = f"{REGISTER[size]}{20 + index}"
        lines.append(f"ld.global.b{8 * max(size, 2)} {name}, [%rd4+{index * LANES * 8}];")
        names.append(name)
    target = f"{REGISTER[result.itemsize]}30"
    mnemonic = opcode.split("#")[0]
    lines.append(f"{mnemonic} {target}, {', '.join(names)}{suffix};")
    if result.itemsize < 8:
        lines.append("mov.b64 %rd31, 0; st.global.b64 [%rd5], %rd31;")
    lines.append(f"st.global.b{8 * max(result.itemsize, 2)} [%rd5], {target};")
    inputs = bytes_of(*(slots(array) for array in operands))
    if result.dtype == np.int8:  # registers of 16 bits hold its sign too
        result = result.astype(np.int16)
    expected = bytes_of(slots(result))
    if ulps:
        lines[-2:] = ["st.global.b32 [%rd6], %r30;"]
        lines.insert(0, "mul.wide.u32 %rd7, %r1, 4; add.s64 %rd6, %rd2, %rd7;")
        expected = bytes_of(result)
    return Program("\n".join(lines), inputs, expected, ulps=ulps, exact=exact)
