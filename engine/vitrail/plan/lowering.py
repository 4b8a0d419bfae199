"""Lowers a plan to bytes that C++ reads, and the kernel calls whose binaries it names.

``<op>_calls`` describe each kernel launch, as they do for the Triton runner. Every number of a
launch is affine in the sizes of a call: lowering evaluates the number at a few sizes, writes it as
``sequences * B + tokens * M + longest * T + constant`` (`Affine`) and checks the formula.
csrc/plan.hpp has the layout of the bytes, docs/runtime.md explains it.
"""

import struct
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitrail.dtypes import dtype_name
from vitrail.plan.kernel_binary import kernel_key
from vitrail.plan.plan import ITEM_BYTES, Affine, Plan, Step
from vitrail.plan.record import items, magic, string
from vitrail.weights.layout import Weights
from vitrail_kernels import OPERATORS, Call
from vitrail_kernels.compile import identity, source_of
from vitrail_kernels.configs import MOST, KernelConfig
from vitrail_kernels.launch import Target

INT32, INT64, FLOAT, POINTER, MAP, NULL = range(6)
"""Types of kernel arguments, as in csrc/plan.hpp."""

WEIGHTS = -1
"""The buffer number that stands for the packed weights."""


@dataclass(frozen=True, slots=True)
class NativePlan:
    """A plan that is lowered for one `Target`.

    ``record``: the bytes for C++. ``calls``: every kernel that the plan launches, by key.
    ``externals``: names of the buffers that the caller brings, in C++'s order.
    """

    record: bytes
    calls: Mapping[str, Call]
    externals: tuple[str, ...]


# -- sizes -----------------------------------------------------------------------------------------

SHORT, LONG = 5, 7
"""Tokens of a sequence at the probes, if sequences vary in length."""


class SizeProbes:
    """The sizes at which every number of a launch is evaluated, to find its formula.

    ``length``: tokens of every sequence, for a plan over images of one size; None if lengths vary.
    ``lengths``: the lengths of the sequences of each probe, which are equal.
    """

    def __init__(self, length: int | None) -> None:
        self.length = length
        probes = [(1, SHORT), (2, SHORT), (1, LONG), (2, LONG), (3, (SHORT + LONG) // 2)]
        if length is not None:
            probes = [(1, length), (2, length), (3, length)]
        self.lengths = [[tokens] * batch for batch, tokens in probes]

    def affine(self, name: str, values: Sequence[int]) -> Affine:
        """The formula of a number, from its value at each probe. The last probe is a check.

        Raises AssertionError, with ``name``, for a number that is not affine in the sizes.
        """
        if self.length is not None:
            one_sequence, two_sequences, _ = values
            formula = Affine(
                two_sequences - one_sequence, constant=2 * one_sequence - two_sequences
            )
        else:
            # With B sequences of T tokens, a number is
            # B * (sequences + tokens * T) + (longest * T + constant): two lines in T.
            one_short, two_short, one_long, two_long, _ = values
            per_sequence_short, per_sequence_long = two_short - one_short, two_long - one_long
            tokens, sequences = _line(per_sequence_short, per_sequence_long)
            longest, constant = _line(one_short - per_sequence_short, one_long - per_sequence_long)
            formula = Affine(sequences, tokens, longest, constant)
        expected = [formula.at(len(probe), sum(probe), probe[0]) for probe in self.lengths]
        assert expected == list(values), f"{name}: got {list(values)}, not affine in the sizes"
        return formula


def _line(at_short: int, at_long: int) -> tuple[int, int]:
    """Slope and intercept of the line with these values at SHORT and LONG."""
    slope = (at_long - at_short) // (LONG - SHORT)
    return slope, at_short - slope * SHORT


# -- launches --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _BoundStep:
    """A step at one probe: its tensors and scalars by argument."""

    tensors: dict[str, Tensor]
    scalars: dict[str, Any]

    def cache_key(self) -> Iterator[Hashable]:
        """The parts of a key that is equal for two steps that differ only in addresses.

        Alignment and aliasing of the arguments are part of the key.
        """
        numbers: dict[int, int] = {}
        for name, t in self.tensors.items():
            number = numbers.setdefault(id(t), len(numbers))
            yield name, t.shape, t.stride(), t.dtype, t.data_ptr() % 16, number
        yield tuple(self.scalars.items())

    def name_of(self, tensor: Tensor) -> str | None:
        """The name of the argument that is ``tensor``; None if no argument is."""
        return next((name for name, t in self.tensors.items() if t is tensor), None)


_Template = list["bytes | str"]
"""The record of a launch. A string stands for the address of the argument of that name."""


class _LaunchWriter:
    """Writes the launches of one plan."""

    def __init__(self, plan: Plan, target: Target, probes: SizeProbes, weights: Weights) -> None:
        self.plan, self.target, self.probes, self.weights = plan, target, probes, weights
        self.buffers = {buffer.name: number for number, buffer in enumerate(plan.buffers)}
        self.keys: dict[str, int] = {}
        self.calls: dict[str, Call] = {}
        self.templates: dict[tuple[Any, ...], list[_Template]] = {}

    def launches(self, bound: Sequence[Sequence[_BoundStep]]) -> Iterator[bytes]:
        """The records of all launches. ``bound``: for each probe, all steps."""
        for step, *at_probes in zip(self.plan.steps, *bound, strict=True):
            cache_key = step.op, *at_probes[0].cache_key()
            if cache_key not in self.templates:  # the blocks of a tower differ only in addresses
                self.templates[cache_key] = list(self.kernels(step, at_probes))
            addresses = {argument: self.buffer(name) for argument, name in step.buffers}
            addresses |= {argument: self.weight(name) for argument, name in step.weights}
            for number, template in enumerate(self.templates[cache_key]):
                label = step.label if number == 0 else f"{step.label}.{number}"
                pieces = [addresses[x] if isinstance(x, str) else x for x in template]
                yield string(label) + b"".join(pieces)

    def buffer(self, name: str) -> bytes:
        return struct.pack("<iq", self.buffers[name], 0)

    def weight(self, name: str) -> bytes:
        tensor = self.weights[name]
        return struct.pack("<iq", WEIGHTS, tensor.storage_offset() * tensor.element_size())

    def kernels(self, step: Step, bound: Sequence[_BoundStep]) -> Iterator[_Template]:
        """The templates of a step's kernels; a step has one or more."""
        kernels = self.kernel_calls(step.op, bound)
        for calls in kernels:
            variants = [(MOST, calls)]
            if calls[0].ladder is not None:
                assert len(kernels) == 1, f"{step.label}: a ladder among several kernels"
                variants = [
                    (max_rows, self.kernel_calls(step.op, bound, config)[0])
                    for max_rows, config in calls[0].ladder()
                ]
            rows = self.probes.affine(f"{step.label}: rows", [call.rows for call in calls])
            template: _Template = [_affine(rows), struct.pack("<I", len(variants))]
            for max_rows, variant in variants:
                template += self.variant(step.label, max_rows, variant, bound)
            yield template

    def kernel_calls(
        self, op: str, bound: Sequence[_BoundStep], config: KernelConfig | None = None
    ) -> list[list[Call]]:
        """For each kernel of a step, in order, its calls at all probes."""
        options = {} if config is None else {"config": config}
        by_probe = [
            OPERATORS[op].calls(self.target, **step.tensors, **step.scalars, **options)
            for step in bound
        ]
        return [list(calls) for calls in zip(*by_probe, strict=True)]

    def variant(
        self, label: str, max_rows: int, calls: Sequence[Call], bound: Sequence[_BoundStep]
    ) -> _Template:
        """The template of a kernel in one configuration, from its calls at all probes."""
        call = calls[0]
        identities = {identity(c) for c in calls}
        assert len(identities) == 1, f"{label}: got other kernels at other sizes: {identities}"
        key = kernel_key(call, self.target.arch)
        self.calls.setdefault(key, call)
        times, rows = (
            self.probes.affine(f"{label}: grid", [getattr(c.grid, name) for c in calls])
            for name in ("times", "rows")
        )
        limit = 0 if call.grid.limit is None else call.config.ctas
        known = call.grid.limit in (None, limit * self.target.sms)
        assert known, f"{label}: got a limit of {call.grid.limit} blocks, wanted ctas for each SM"
        arguments = list(self.arguments(label, calls, bound))
        head = (
            struct.pack("<qI", max_rows, self.keys.setdefault(key, len(self.keys)))
            + _affine(times)
            + _affine(rows)
            + struct.pack("<III", call.grid.block, limit, len(arguments))
        )
        return [head, *(piece for argument in arguments for piece in argument)]

    def arguments(
        self, label: str, calls: Sequence[Call], bound: Sequence[_BoundStep]
    ) -> Iterator[_Template]:
        """The arguments that the compiled kernel takes, in the order of Triton's own launcher."""
        source, _, _ = source_of(calls[0], self.target.arch)
        for name, type_name in source.signature.items():
            if type_name == "constexpr":
                continue
            values = [call.arguments[name] for call in calls]
            argument = f"{label}: {name}"
            if type_name.startswith("tensordesc"):
                yield from self.tensor_map(argument, values, bound)
            elif type_name.startswith("*"):
                yield [struct.pack("<B", POINTER), _argument_name(argument, values, bound)]
            elif type_name in ("i32", "i64"):
                formula = self.probes.affine(argument, values)
                yield [_integer(INT32 if type_name == "i32" else INT64, formula)]
            else:
                assert type_name == "fp32", f"{argument}: got a parameter of type {type_name}"
                yield [struct.pack("<Bf", FLOAT, values[0])]
        for _ in range(2):  # two pointers to scratch memory, which these kernels do not use
            yield [struct.pack("<B", NULL)]

    def tensor_map(
        self, argument: str, values: Sequence[Any], bound: Sequence[_BoundStep]
    ) -> Iterator[_Template]:
        """A host tensor descriptor: a tensor map, two int32 of its shape, two int64 strides."""
        rows = self.probes.affine(f"{argument}: rows", [value.shape[0] for value in values])
        columns, (stride, unit) = values[0].shape[1], values[0].strides
        assert unit == 1, f"{argument}: got strides {values[0].strides}"
        stride_bytes = stride * values[0].base.element_size()
        name = _argument_name(argument, [value.base for value in values], bound)
        extent = _affine(rows) + struct.pack("<qq", columns, stride_bytes)
        yield [struct.pack("<B", MAP), name, extent]
        yield [_integer(INT32, rows)]
        yield [_integer(INT32, Affine(constant=columns))]
        yield [_integer(INT64, Affine(constant=stride))]
        yield [_integer(INT64, Affine(constant=unit))]


def _affine(formula: Affine) -> bytes:
    return struct.pack("<iiiq", *formula)


def _integer(type_number: int, formula: Affine) -> bytes:
    return struct.pack("<B", type_number) + _affine(formula)


def _argument_name(argument: str, tensors: Sequence[Tensor], bound: Sequence[_BoundStep]) -> str:
    """The name of the operator's argument that a kernel gets; it is the same at every probe."""
    (name,) = {step.name_of(tensor) for step, tensor in zip(bound, tensors, strict=True)}
    assert name is not None, f"{argument}: got a tensor that is not an argument of the operator"
    return name


# -- plans -----------------------------------------------------------------------------------------


def lower(
    plan: Plan, target: Target, dtype: torch.dtype, weights: Weights, pixels: Tensor | None = None
) -> NativePlan:
    """Lower ``plan`` for ``target``.

    ``weights``: on any device; only their offsets in the arena count. ``pixels``: for plans over
    images, a batch in the shape and dtype of the calls; the batch size does not matter, the image
    size becomes part of the native plan. Raises ValueError if a kernel does not take the plan's
    arguments.
    """
    weights = weights.to(torch.device("meta"))
    length = None if pixels is None else _tokens(plan, pixels)
    probes = SizeProbes(length)
    writer = _LaunchWriter(plan, target, probes, weights)
    bound = [_bind(plan, lengths, dtype, weights, pixels) for lengths in probes.lengths]
    launches = list(writer.launches(bound))
    externals = tuple(buffer.name for buffer in plan.buffers if buffer.slot is None)
    record = (
        magic("plan")
        + string(plan.name)
        + struct.pack("<Q", weights.arena.numel())
        + items(list(_buffers(plan, dtype, externals)))
        + items([string(key) for key in writer.keys])
        + items(launches)
    )
    return NativePlan(record, writer.calls, externals)


def _bind(
    plan: Plan, lengths: Sequence[int], dtype: torch.dtype, weights: Weights, pixels: Tensor | None
) -> list[_BoundStep]:
    """All steps at one probe, on the meta device."""
    inputs = {}
    if pixels is not None:
        shape = len(lengths), *pixels.shape[1:]
        inputs["pixels"] = torch.empty(shape, dtype=pixels.dtype, device="meta")
    bound = plan.bind(lengths, dtype_name(dtype), inputs, weights.tensors)
    return [_BoundStep(tensors, scalars) for _, tensors, scalars in bound]


def _tokens(plan: Plan, pixels: Tensor) -> int:
    """The number of tokens of one image of ``pixels``."""
    (embed,) = (dict(step.scalars) for step in plan.steps if step.op == "patch_embed")
    sides = pixels.shape[1:3] if pixels.dtype == torch.uint8 else pixels.shape[2:]
    rows, columns = (side // patch for side, patch in zip(sides, embed["patch"], strict=True))
    return int(embed["prefix"] + rows * columns)


def _buffers(plan: Plan, dtype: torch.dtype, externals: Sequence[str]) -> Iterator[bytes]:
    for buffer in plan.buffers:
        slot = -1 - externals.index(buffer.name) if buffer.slot is None else buffer.slot
        row_bytes = (buffer.columns or 1) * ITEM_BYTES.get(buffer.dtype, dtype.itemsize)
        yield string(buffer.name) + _affine(buffer.rows) + struct.pack("<qi", row_bytes, slot)
