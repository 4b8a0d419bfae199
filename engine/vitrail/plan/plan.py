"""A plan: a flat tuple of operator calls over named buffers, and its cost.

A plan is a value. It holds no graph, no tensor and no size: the rows of a buffer are affine in the
number of sequences B and of tokens M, so one plan serves every batch and every length.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vitrail.weights.layout import PackedTensor
from vitrail_kernels import OPERATORS

MAX_SEQLEN = "max_seqlen"
"""A scalar with this value stands for the length of the longest sequence of the call."""


ITEM_BYTES = {"float32": 4, "int32": 4, "int8": 1, "uint8": 1}
"""Bytes of a number, for the buffer dtypes that are the same in every model."""


class Affine(NamedTuple):
    """``sequences * B + tokens * M + longest * T + constant``, T the length of the longest."""

    sequences: int = 0
    tokens: int = 0
    longest: int = 0
    constant: int = 0

    def at(self, batch: int, tokens: int, longest: int) -> int:
        variable = self.sequences * batch + self.tokens * tokens + self.longest * longest
        return variable + self.constant


PER_SEQUENCE = Affine(sequences=1)
PER_TOKEN = Affine(tokens=1)


@dataclass(frozen=True, slots=True)
class Buffer:
    """(rows, columns) numbers, or (rows,) if ``columns`` is None.

    ``dtype``: "compute" (the model's), "float32", "int32", "int8" or "uint8". ``slot``: the
    buffer's slot in the activation arena; None for inputs and outputs, which lie outside it.
    ``transposed``: the numbers are stored as (columns, rows), as row statistics are.
    """

    name: str
    rows: Affine
    columns: int | None
    dtype: str = "compute"
    slot: int | None = None
    transposed: bool = False

    def shape(self, batch: int, tokens: int, longest: int = 0) -> tuple[int, ...]:
        rows = self.rows.at(batch, tokens, longest)
        if self.columns is None:
            return (rows,)
        return (self.columns, rows) if self.transposed else (rows, self.columns)


@dataclass(frozen=True, slots=True)
class Step:
    """An operator call. ``buffers`` and ``weights``: (argument, name) pairs."""

    op: str
    label: str
    buffers: tuple[tuple[str, str], ...]
    weights: tuple[tuple[str, str], ...]
    scalars: tuple[tuple[str, Any], ...]

    def resolve(self, longest: int) -> dict[str, Any]:
        """The scalars for a call whose longest sequence has ``longest`` tokens."""
        return {name: longest if value == MAX_SEQLEN else value for name, value in self.scalars}


class StepCost(NamedTuple):
    """The cost of a step: FLOPs of its matrix products, bytes read and written once."""

    label: str
    op: str
    shapes: str
    flops: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in order and the buffers they use.

    The caller provides the ``inputs`` and receives the ``outputs``, of which ``token_outputs`` have
    a row for each token.
    """

    name: str
    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    weights: tuple[tuple[str, PackedTensor], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    token_outputs: tuple[str, ...]

    def slot_bytes(self, batch: int, tokens: int, compute_bytes: int) -> list[int]:
        """Bytes of every slot of the arena, each rounded up to 256."""
        sizes: dict[int, int] = {}
        for buffer in self.buffers:
            if buffer.slot is not None:
                itemsize = ITEM_BYTES.get(buffer.dtype, compute_bytes)
                nbytes = math.prod(buffer.shape(batch, tokens)) * itemsize
                size = -(-nbytes // 256) * 256
                sizes[buffer.slot] = max(sizes.get(buffer.slot, 0), size)
        return [sizes[slot] for slot in sorted(sizes)]

    def arena_bytes(self, batch: int, tokens: int, compute_bytes: int = 4) -> int:
        """Bytes of activations that a call needs besides its inputs and outputs."""
        return sum(self.slot_bytes(batch, tokens, compute_bytes))

    def dump(self, lengths: Sequence[int], compute: str = "float32") -> str:
        """Cost and shapes of every step for sequences of ``lengths`` tokens, a line each, and the
        totals. ``compute``: the model's dtype by name."""
        costs = self.count(lengths, compute)
        flops, traffic = sum(cost.flops for cost in costs), sum(cost.bytes for cost in costs)
        lines = [f"{self.name}: {len(lengths)} sequences, {sum(lengths)} tokens, {compute}"]
        lines += [
            f"{number:4d} {cost.flops / 1e6:12.3f} MFLOP {cost.bytes / 1e6:10.3f} MB  "
            f"{cost.op:13s} {cost.label:24s} {cost.shapes}"
            for number, cost in enumerate(costs)
        ]
        lines.append(
            f"total {flops / 1e6:11.3f} MFLOP {traffic / 1e6:10.3f} MB  {len(costs)} steps"
        )
        return "\n".join(lines)

    def flops(self, lengths: Sequence[int]) -> int:
        """FLOPs of all matrix products for sequences of ``lengths`` tokens."""
        return sum(cost.flops for cost in self.count(lengths))

    def bind(
        self,
        lengths: Sequence[int],
        compute: str = "float32",
        inputs: Mapping[str, torch.Tensor] | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> Iterator[tuple[Step, dict[str, torch.Tensor], dict[str, Any]]]:
        """Every step with its tensors and scalars by argument, for sequences of ``lengths`` tokens.

        The tensors are on the meta device, one for each buffer and weight. ``inputs`` replaces
        buffers, for example by pixels in their own shape; ``weights`` replaces all weights.
        """
        dtypes = {name: getattr(torch, name) for name in ITEM_BYTES}
        dtypes["compute"] = getattr(torch, compute)
        batch, tokens, longest = len(lengths), sum(lengths), max(lengths, default=0)

        def meta(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
            return torch.empty(shape, dtype=dtypes[dtype], device="meta")

        tensors = {b.name: meta(b.shape(batch, tokens, longest), b.dtype) for b in self.buffers}
        tensors |= inputs or {}
        packed = weights or {name: meta(w.shape, w.dtype) for name, w in self.weights}
        for step in self.steps:
            arguments = {arg: tensors[name] for arg, name in step.buffers}
            arguments |= {arg: packed[name] for arg, name in step.weights}
            yield step, arguments, step.resolve(longest)

    def count(self, lengths: Sequence[int], compute: str = "float32") -> list[StepCost]:
        """The cost of every step. It is computed from shapes: no kernel runs."""
        costs = []
        for step, arguments, scalars in self.bind(lengths, compute):
            cost = OPERATORS[step.op].cost(**arguments, **scalars, lengths=lengths)
            shapes = [f"{arg}{tuple(t.shape)}".replace(" ", "") for arg, t in arguments.items()]
            costs.append(StepCost(step.label, step.op, " ".join(shapes), cost.flops, cost.bytes))
        return costs
