"""Plan -> program: a plan as bytes that C++ reads, and the kernel calls whose images it names.

The operators' ``<op>_calls`` say what each launch is, as they do for the Triton runner. Sizes enter
a call in affine ways only: each number is evaluated at several sizes, written as
``sequences * B + tokens * M + longest * T + constant`` and checked. Layout: csrc/plan.hpp, which
reads it; what it means: docs/runtime.md.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitrail._version import __version__
from vitrail.dtypes import dtype_name
from vitrail.errors import VitrailError
from vitrail.plan.plan import Affine, Plan, Step
from vitrail.plan.record import items, string
from vitrail.weights.layout import Weights
from vitrail_kernels import OPERATORS, Call
from vitrail_kernels.compile import CompileError, compile_privately, identity, source_of
from vitrail_kernels.configs import MOST, KernelConfig
from vitrail_kernels.launch import Target
from vitrail_kernels.toolchain import compilers

PLAN_MAGIC, IMAGE_MAGIC = b"vitrail plan 1\n", b"vitrail image 1\n"

INT32, INT64, FLOAT, POINTER, MAP, NULL = range(6)
"""Kinds of kernel parameters, as in csrc/plan.hpp."""

WEIGHTS = -1
MAP_TYPES = {torch.uint8: 0, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
"""CUtensorMapDataType (cuda.h)."""


@dataclass(frozen=True, slots=True)
class Program:
    """A plan for one kind of GPU: ``record`` for C++, and by its key each kernel it launches.

    ``externals`` are the buffers that a call brings, in C++'s order.
    """

    record: bytes
    calls: Mapping[str, Call]
    externals: tuple[str, ...]


def _affine(rows: Affine) -> bytes:
    return struct.pack("<iiiq", *rows)


# -- sizes -----------------------------------------------------------------------------------------


class Sizes:
    """The sizes at which calls are evaluated: all sequences of one length.

    ``length``: of every sequence, for a plan over images of one size; None where it may differ.
    """

    def __init__(self, length: int | None) -> None:
        short, long = (5, 7) if length is None else (length, length)
        self._fixed = length is not None
        batches = (
            [(1, short), (2, short), (1, long), (2, long), (3, 6)]
            if length is None
            else [(1, short), (2, short), (3, short)]
        )
        self.lengths = [[length] * batch for batch, length in batches]

    def affine(self, what: str, values: Sequence[int]) -> Affine:
        """The formula of a number, from its ``values`` at each of `lengths`."""
        if self._fixed:
            step = values[1] - values[0]
            found = Affine(sequences=step, constant=values[0] - step)
        else:
            # at (B, T) and M = B T: differences along B, then along T
            short, long = values[1] - values[0], values[3] - values[2]
            tokens = (long - short) // 2
            longest = (values[2] - values[0]) // 2 - tokens
            sequences = short - 5 * tokens
            found = Affine(
                sequences, tokens, longest, values[0] - sequences - 5 * tokens - 5 * longest
            )
        again = [found.at(len(one), sum(one), one[0]) for one in self.lengths]
        assert again == list(values), f"{what}: got {list(values)}, not affine in the sizes"
        return found


# -- launches --------------------------------------------------------------------------------------


_Template = list["bytes | str"]
"""A launch's record: where a tensor's place goes, the name of the argument that is the tensor."""


class _Lowering:
    """One plan on its way to bytes."""

    def __init__(self, plan: Plan, target: Target, sizes: Sizes, weights: Weights) -> None:
        self.plan, self.target, self.sizes, self.weights = plan, target, sizes, weights
        self.buffers = {buffer.name: number for number, buffer in enumerate(plan.buffers)}
        self.keys: dict[str, int] = {}
        self.calls: dict[str, Call] = {}
        self.templates: dict[tuple[Any, ...], list[_Template]] = {}

    def launches(self, bound: Sequence[Sequence[_Bound]]) -> Iterator[bytes]:
        """The records of all launches; ``bound``: `_bind` at each of the sizes."""
        for launch, *each in zip(self.plan.steps, *bound, strict=True):
            form = launch.op, *each[0].form()
            if form not in self.templates:  # the blocks of a tower are alike but for their places
                self.templates[form] = list(self.kernels(launch, each))
            places = {argument: self.buffer(name) for argument, name in launch.buffers}
            places |= {argument: self.weight(name) for argument, name in launch.weights}
            for number, template in enumerate(self.templates[form]):
                label = launch.label if number == 0 else f"{launch.label}.{number}"
                parts = [part if isinstance(part, bytes) else places[part] for part in template]
                yield string(label) + b"".join(parts)

    def buffer(self, name: str) -> bytes:
        return struct.pack("<iq", self.buffers[name], 0)

    def weight(self, name: str) -> bytes:
        tensor = self.weights[name]
        return struct.pack("<iq", WEIGHTS, tensor.storage_offset() * tensor.element_size())

    def kernels(self, launch: Step, each: Sequence[_Bound]) -> Iterator[_Template]:
        """One plan's launch is one kernel, or several."""
        names = [{id(t): name for name, t in one.arguments.items()} for one in each]
        calls = self.calls_of(launch.op, each)
        for same in calls:
            steps = [(MOST, same)]
            if same[0].ladder is not None:
                assert len(calls) == 1, f"{launch.label}: a ladder among several kernels"
                ladder = same[0].ladder()
                steps = [(top, self.calls_of(launch.op, each, c)[0]) for top, c in ladder]
            rows = self.sizes.affine(f"{launch.label}: rows", [call.rows for call in same])
            template: _Template = [_affine(rows), struct.pack("<I", len(steps))]
            for top, made in steps:
                template += self.variant(launch.label, top, made, names)
            yield template

    def calls_of(
        self, op: str, each: Sequence[_Bound], config: KernelConfig | None = None
    ) -> list[list[Call]]:
        """The kernels of one launch in order, each at all sizes."""
        given = {} if config is None else {"config": config}
        made = [
            OPERATORS[op].calls(self.target, **one.arguments, **one.scalars, **given)
            for one in each
        ]
        return [list(same) for same in zip(*made, strict=True)]

    def variant(
        self, label: str, until: int, calls: Sequence[Call], names: Sequence[Mapping[int, str]]
    ) -> _Template:
        """One kernel of a launch, from the calls at all sizes."""
        first = calls[0]
        (alike, *others) = {identity(call) for call in calls}
        assert not others, f"{label}: got other kernels at other sizes: {alike}, {others}"
        key = image_key(first, self.target.arch)
        self.calls.setdefault(key, first)
        times, rows = (
            self.sizes.affine(f"{label}: grid", [getattr(call.grid, side) for call in calls])
            for side in ("times", "rows")
        )
        limit = 0 if first.grid.limit is None else first.config.ctas
        assert first.grid.limit in (None, limit * self.target.sms), f"{label}: another limit"
        parameters = list(self.parameters(label, calls, names))
        count = sum(5 if len(part) == 3 else 1 for part in parameters)
        head = (
            struct.pack("<qI", until, self.keys.setdefault(key, len(self.keys)))
            + _affine(times)
            + _affine(rows)
            + struct.pack("<III", first.grid.block, limit, count)
        )
        return [head, *(piece for part in parameters for piece in part)]

    def parameters(
        self, label: str, calls: Sequence[Call], names: Sequence[Mapping[int, str]]
    ) -> Iterator[_Template]:
        """Parameters as the compiled kernel takes them, which is as Triton's own launcher does."""
        source, _, _ = source_of(calls[0], self.target.arch)
        for name, kind in source.signature.items():
            if kind == "constexpr":
                continue
            values = [call.arguments[name] for call in calls]
            what = f"{label}: {name}"
            if kind.startswith("tensordesc"):
                yield self.map(what, values, names)
            elif kind.startswith("*"):
                yield [struct.pack("<B", POINTER), _argument(what, values, names)]
            elif kind in ("i32", "i64"):
                formula = self.sizes.affine(what, values)
                yield [struct.pack("<B", INT32 if kind == "i32" else INT64) + _affine(formula)]
            else:
                assert kind == "fp32", f"{what}: got a parameter of type {kind}"
                yield [struct.pack("<Bf", FLOAT, values[0])]
        for _ in range(2):  # scratch memory, which no kernel here has
            yield [struct.pack("<B", NULL)]

    def map(
        self, what: str, values: Sequence[Any], names: Sequence[Mapping[int, str]]
    ) -> _Template:
        """A host tensor descriptor: a tensor map, then shape in 32 and strides in 64 bits."""
        rows = self.sizes.affine(f"{what}: rows", [value.shape[0] for value in values])
        columns, (stride, one) = values[0].shape[1], values[0].strides
        assert one == 1, f"{what}: got strides {values[0].strides}"
        stride_bytes = stride * values[0].base.element_size()
        after = _affine(rows) + struct.pack("<qq", columns, stride_bytes)
        for kind, number in ((INT32, rows), (INT32, columns), (INT64, stride), (INT64, 1)):
            formula = number if isinstance(number, Affine) else Affine(constant=number)
            after += struct.pack("<B", kind) + _affine(formula)
        name = _argument(what, [value.base for value in values], names)
        return [struct.pack("<B", MAP), name, after]


def _argument(what: str, tensors: Sequence[Tensor], names: Sequence[Mapping[int, str]]) -> str:
    """The argument of the operator that a tensor is, at every size."""
    found = {known.get(id(tensor)) for known, tensor in zip(names, tensors, strict=True)}
    (name,) = found
    assert name is not None, f"{what}: got a tensor that is not an argument of the operator"
    return name


@dataclass(frozen=True, slots=True)
class _Bound:
    """One launch at one size: its tensors and scalars by argument."""

    arguments: dict[str, Tensor]
    scalars: dict[str, Any]

    def form(self) -> Iterator[Hashable]:
        """Equal for launches that differ in places alone: what of a place a kernel is compiled
        for, and which arguments are one tensor, stays."""
        seen: dict[int, int] = {}
        for name, t in self.arguments.items():
            same = seen.setdefault(id(t), len(seen))
            yield name, t.shape, t.stride(), t.dtype, t.data_ptr() % 16, same
        yield tuple(self.scalars.items())


def _bind(
    plan: Plan, lengths: Sequence[int], compute: str, weights: Weights, pixels: Tensor | None
) -> list[_Bound]:
    given = {} if pixels is None else {"pixels": pixels.new_empty(len(lengths), *pixels.shape[1:])}
    bound = plan.bind(lengths, compute, given, weights.tensors)
    return [_Bound(arguments, scalars) for _, arguments, scalars in bound]


def _tokens(plan: Plan, pixels: Tensor) -> int:
    """Tokens of one image of ``pixels``."""
    (embed,) = (dict(launch.scalars) for launch in plan.steps if launch.op == "patch_embed")
    sides = pixels.shape[1:3] if pixels.dtype == torch.uint8 else pixels.shape[2:]
    down, across = (side // part for side, part in zip(sides, embed["patch"], strict=True))
    return int(embed["prefix"] + down * across)


def lower(
    plan: Plan, target: Target, dtype: torch.dtype, weights: Weights, pixels: Tensor | None = None
) -> Program:
    """``plan`` for ``target`` with weights where ``weights`` (on any device) has them.

    ``pixels``: a batch as the plan will get it, of any length, for plans over images: their size
    is part of the program. Raises ValueError where a kernel does not take what the plan holds.
    """
    weights = weights.to(torch.device("meta"))
    length = None
    if pixels is not None:
        pixels = torch.empty(pixels.shape, dtype=pixels.dtype, device="meta")
        length = _tokens(plan, pixels)
    sizes = Sizes(length)
    compute = dtype_name(dtype)
    lowering = _Lowering(plan, target, sizes, weights)
    bound = [_bind(plan, one, compute, weights, pixels) for one in sizes.lengths]
    launches = list(lowering.launches(bound))
    externals = tuple(buffer.name for buffer in plan.buffers if buffer.slot is None)
    places = {name: -1 - place for place, name in enumerate(externals)}
    itemsizes = {"compute": dtype.itemsize, "float32": 4, "int32": 4, "uint8": 1}
    buffers = [
        string(buffer.name)
        + _affine(buffer.rows)
        + struct.pack(
            "<qi",
            (buffer.columns or 1) * itemsizes[buffer.dtype],
            places[buffer.name] if buffer.slot is None else buffer.slot,
        )
        for buffer in plan.buffers
    ]
    record = (
        PLAN_MAGIC
        + string(plan.name)
        + struct.pack("<Q", weights.arena.numel())
        + items(buffers)
        + items([string(key) for key in lowering.keys])
        + items(launches)
    )
    return Program(record, lowering.calls, externals)


# -- images ----------------------------------------------------------------------------------------


def image_key(call: Call, arch: int) -> str:
    """SHA-256 of all that a kernel's machine code follows from: its source and what it calls,
    Triton and ptxas, the architecture, the arguments' kinds and the configuration."""
    parts = (call.kernel.cache_key, compilers(arch), arch, identity(call))
    return hashlib.sha256(repr((__version__, *parts)).encode()).hexdigest()


_PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.([bfsu])(\d+) [^\[\],()]*(?:\[(\d+)\])?[,\n)]")


def _check_parameters(call: Call, arch: int, kernel: Any) -> None:
    """Raises VitrailError where the code takes its parameters otherwise than they are packed, which
    another triton may bring about, and an older driver would not notice."""
    sizes = {"i32": [4], "fp32": [4], "tensordesc": [128, 4, 4, 8, 8]}
    kinds = [k.partition("<")[0] for k in kernel.src.signature.values() if k != "constexpr"]
    wanted = [size for kind in kinds for size in sizes.get(kind, [8])] + [8, 8]
    entry = kernel.asm["ptx"].partition(".visible .entry")[2].partition("{")[0]
    got = [int(bits) // 8 * int(n or 1) for _, bits, n in _PARAMETER.findall(entry)]
    if got != wanted:
        raise VitrailError(
            f"{call.kernel.__name__}: got parameters of {got} bytes from triton "
            f"{compilers(arch)[0]}, wanted {wanted}; load with backend='triton'"
        )


def image_record(key: str, call: Call, arch: int) -> bytes:
    """Compile ``call`` into an image for C++, past Triton's cache. Raises VitrailError if it does
    not compile."""
    try:
        return record_of(key, call, arch, compile_privately(call, arch))
    except CompileError as error:
        raise VitrailError(str(error)) from error


def record_of(key: str, call: Call, arch: int, kernel: Any) -> bytes:
    """The image for C++ of a ``kernel`` that Triton has compiled."""
    meta = kernel.metadata
    scratch = meta.global_scratch_size, meta.profile_scratch_size, meta.num_ctas
    assert scratch == (0, 0, 1), f"{meta.name}: got scratch or clusters {scratch}"
    _check_parameters(call, arch, kernel)
    bases = [value.base for value in call.arguments.values() if hasattr(value, "block_shape")]
    boxes = [
        struct.pack(
            "<5I", MAP_TYPES[base.dtype], box["swizzle"], base.element_size(), *box["block_size"]
        )
        for base, box in zip(bases, meta.tensordesc_meta or (), strict=True)
    ]
    return (
        IMAGE_MAGIC
        + string(key)
        + string(meta.name)
        + struct.pack("<III", arch, 32 * meta.num_warps, meta.shared)
        + struct.pack("<B", bool(call.arguments.get("PDL")))
        + items(boxes)
        + string(kernel.asm["cubin"])
    )


def kernel_binary(record: bytes) -> tuple[str, int, int, bytes]:
    """Of an image as `record_of` writes it: the kernel's name, threads of a block, bytes of shared
    memory, and the cubin."""
    at = len(IMAGE_MAGIC)

    def take(layout: str) -> tuple[Any, ...]:
        nonlocal at
        at += struct.calcsize(layout)
        return struct.unpack_from(layout, record, at - struct.calcsize(layout))

    def text() -> bytes:
        (size,) = take("<Q")
        return bytes(take(f"<{size}s")[0])

    text()  # the key
    name = text().decode()
    _, threads, shared, _ = take("<IIIB")
    (boxes,) = take("<I")
    take(f"<{5 * boxes}I")
    return name, threads, shared, text()
