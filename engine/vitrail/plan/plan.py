"""What a plan is: a flat tuple of steps over named buffers, and what it costs.

A plan is a value. It holds no graph, no tensor and no size: buffers are affine in the number of
sequences B and tokens M, so one plan serves every batch and every length. Buffers that live at the
same time get different slots of one arena. `plans` builds the plans of the towers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from vitrail.weights.layout import PackedTensor
from vitrail_kernels import OPERATORS
from vitrail_kernels.device.stats import stats_shape

MAX_SEQLEN = "max_seqlen"
"""A scalar with this value stands for the longest sequence of the call."""


class Affine(NamedTuple):
    """Rows of a buffer: ``sequences * B + tokens * M + longest * T + constant``, T the longest."""

    sequences: int = 0
    tokens: int = 0
    longest: int = 0
    constant: int = 0

    def at(self, batch: int, tokens: int, longest: int) -> int:
        return (
            self.sequences * batch + self.tokens * tokens + self.longest * longest + self.constant
        )


@dataclass(frozen=True, slots=True)
class Buffer:
    """(rows, columns) numbers, or (rows,) where ``columns`` is None.

    ``dtype``: "compute" (the model's), "float32", "int32" or "uint8". ``slot``: the slot of the
    activation arena it lives in; None for what the caller brings or takes away. ``transposed``:
    (columns, rows) numbers, as row statistics are kept.
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
    """One operator call: its arguments by name, as buffers, as packed weights, as scalars."""

    op: str
    label: str
    buffers: tuple[tuple[str, str], ...]
    weights: tuple[tuple[str, str], ...]
    scalars: tuple[tuple[str, Any], ...]

    def resolve(self, longest: int) -> dict[str, Any]:
        """The scalars for a call whose longest sequence has ``longest`` tokens."""
        return {name: longest if value == MAX_SEQLEN else value for name, value in self.scalars}


class StepCost(NamedTuple):
    """What one step costs: FLOPs of its matrix products, bytes read and written once."""

    label: str
    op: str
    shapes: str
    flops: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in order, the buffers they use, and which of these the caller brings and takes."""

    name: str
    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    weights: tuple[tuple[str, PackedTensor], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def slot_bytes(self, batch: int, tokens: int, compute_bytes: int) -> list[int]:
        """Bytes of every slot of the arena, each rounded up to 256."""
        sizes: dict[int, int] = {}
        for buffer in self.buffers:
            if buffer.slot is not None:
                item = compute_bytes if buffer.dtype == "compute" else 4
                nbytes = math.prod(buffer.shape(batch, tokens)) * item
                size = -(-nbytes // 256) * 256
                sizes[buffer.slot] = max(sizes.get(buffer.slot, 0), size)
        return [sizes[slot] for slot in sorted(sizes)]

    def arena_bytes(self, batch: int, tokens: int, compute_bytes: int = 4) -> int:
        """Bytes of activations one call needs, inputs and outputs left out."""
        return sum(self.slot_bytes(batch, tokens, compute_bytes))

    def dump(self, lengths: Sequence[int], compute: str = "float32") -> str:
        """For sequences of ``lengths`` tokens a line per step: cost and shapes; then totals."""
        rows = self.count(lengths, compute)
        flops, traffic = sum(row.flops for row in rows), sum(row.bytes for row in rows)
        lines = [f"{self.name}: {len(lengths)} sequences, {sum(lengths)} tokens, {compute}"]
        lines += [
            f"{number:4d} {row.flops / 1e6:12.3f} MFLOP {row.bytes / 1e6:10.3f} MB  "
            f"{row.op:13s} {row.label:24s} {row.shapes}"
            for number, row in enumerate(rows)
        ]
        lines.append(f"total {flops / 1e6:11.3f} MFLOP {traffic / 1e6:10.3f} MB  {len(rows)} steps")
        return "\n".join(lines)

    def flops(self, lengths: Sequence[int]) -> int:
        """FLOPs of all matrix products for sequences of ``lengths`` tokens."""
        return sum(row.flops for row in self.count(lengths))

    def bind(
        self,
        lengths: Sequence[int],
        compute: str = "float32",
        inputs: Mapping[str, torch.Tensor] | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> Iterator[tuple[Step, dict[str, torch.Tensor], dict[str, Any]]]:
        """Every step with its tensors and scalars by argument, for sequences of ``lengths``.

        Meta tensors; one buffer is one tensor. ``inputs`` stand for buffers that come in another
        shape than they are counted in, as pixels do; ``weights`` for new ones of the same shapes.
        """
        kinds = {name: getattr(torch, name) for name in ("float32", "int32", "uint8")}
        kinds["compute"] = getattr(torch, compute)
        batch, tokens, longest = len(lengths), sum(lengths), max(lengths, default=0)

        def meta(shape: tuple[int, ...], kind: str) -> torch.Tensor:
            return torch.empty(shape, dtype=kinds[kind], device="meta")

        tensors = {b.name: meta(b.shape(batch, tokens, longest), b.dtype) for b in self.buffers}
        tensors |= inputs or {}
        packed = weights or {
            name: meta(weight.shape, weight.dtype) for name, weight in self.weights
        }
        for step in self.steps:
            arguments = {arg: tensors[name] for arg, name in step.buffers}
            arguments |= {arg: packed[name] for arg, name in step.weights}
            yield step, arguments, step.resolve(longest)

    def count(self, lengths: Sequence[int], compute: str = "float32") -> list[StepCost]:
        """The cost of every step, from shapes alone: no kernel runs, no memory is taken."""
        rows = []
        for step, arguments, scalars in self.bind(lengths, compute):
            cost = OPERATORS[step.op].cost(**arguments, **scalars, lengths=lengths)
            shapes = " ".join(
                f"{arg}{tuple(t.shape)}".replace(" ", "") for arg, t in arguments.items()
            )
            rows.append(StepCost(step.label, step.op, shapes, cost.flops, cost.bytes))
        return rows


class Builder:
    """Collects steps; `finish` gives every intermediate buffer a slot by its lifetime."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.buffers: dict[str, Buffer] = {}
        self.buffer("cu_seqlens", Affine(sequences=1, constant=1), None, "int32")
        self.buffer("token_rows", Affine(sequences=1), None, "int32")

    def buffer(self, name: str, rows: Affine, columns: int | None, dtype: str = "compute") -> str:
        self.buffers[name] = Buffer(name, rows, columns, dtype)
        return name

    def stats(self, stream: str) -> str:
        """The buffer of a stream's row statistics, made where it is first asked for."""
        name, of = f"{stream}.stats", self.buffers[stream]
        assert of.columns is not None, f"{stream} has no rows of numbers"
        columns, _ = stats_shape(0, of.columns)
        self.buffers[name] = Buffer(name, of.rows, columns, "float32", transposed=True)
        return name

    def launch(
        self,
        op: str,
        label: str,
        buffers: dict[str, str | None],
        weights: dict[str, str | None] | None = None,
        **scalars: Any,
    ) -> None:
        used = tuple((arg, name) for arg, name in buffers.items() if name is not None)
        packed = tuple((arg, name) for arg, name in (weights or {}).items() if name is not None)
        self.steps.append(Step(op, label, used, packed, tuple(scalars.items())))

    def _drop_unread(self, inputs: Sequence[str]) -> None:
        """Row statistics that nothing reads before they are written again are not written, and
        buffers that no step uses go, unless they are among the ``inputs`` of every such plan."""
        read: set[str] = set()
        for number, step in reversed(list(enumerate(self.steps))):
            buffers = dict(step.buffers)
            written = buffers.get("stats")
            if written is not None and written not in read:
                del buffers["stats"]
                self.steps[number] = replace(step, buffers=tuple(buffers.items()))
            read.discard(written or "")
            if "x_stats" in buffers:
                read.add(buffers["x_stats"])
        used = {name for step in self.steps for _, name in step.buffers}
        self.buffers = {
            name: b for name, b in self.buffers.items() if name in used or name in inputs
        }

    def finish(
        self,
        name: str,
        layout: Mapping[str, PackedTensor],
        inputs: Sequence[str],
        outputs: Sequence[str],
    ) -> Plan:
        self._drop_unread(inputs)
        last_use = {
            buffer: number for number, step in enumerate(self.steps) for _, buffer in step.buffers
        }
        slots: dict[str, int] = {}
        busy: dict[int, str] = {}
        for number, step in enumerate(self.steps):
            for _, buffer in step.buffers:
                if buffer in inputs or buffer in outputs or buffer in slots:
                    continue
                slot = next(i for i in range(len(busy) + 1) if i not in busy)
                slots[buffer], busy[slot] = slot, buffer
            busy = {slot: buffer for slot, buffer in busy.items() if last_use[buffer] > number}
        placed = [replace(b, slot=slots.get(b.name)) for b in self.buffers.values()]
        names = dict.fromkeys(name for step in self.steps for _, name in step.weights)
        weights = tuple((name, layout[name]) for name in names)
        return Plan(name, tuple(self.steps), tuple(placed), weights, tuple(inputs), tuple(outputs))
