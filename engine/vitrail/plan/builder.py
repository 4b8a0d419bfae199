"""Builds plans: each operator has a method that appends a step. `finish` plans the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from vitrail.plan.plan import MAX_SEQLEN, PER_SEQUENCE, Affine, Buffer, Plan, Step
from vitrail.spec import BlockSpec, VisionSpec
from vitrail.weights.layout import PackedTensor
from vitrail_kernels.device.stats import stats_shape

T = TypeVar("T")

CU_SEQLENS = Buffer("cu_seqlens", Affine(sequences=1, constant=1), None, "int32")
"""Input: where each sequence starts among the tokens, and the number of tokens at the end."""
TOKEN_ROWS = Buffer("token_rows", PER_SEQUENCE, None, "int32")
"""Input: the row of the token that is pooled, for each sequence."""
DISTILLATION_ROWS = Buffer("distillation_rows", PER_SEQUENCE, None, "int32")
"""Input: the row of the distillation token, for each sequence."""
KV_LENS = Buffer("kv_lens", PER_SEQUENCE, None, "int32")
"""Input: how many leading tokens of each sequence may be attended to."""


class Builder:
    """Collects the steps of one plan. `vitrail_kernels` documents the operators.

    ``label`` names a step. ``weights`` is the common name of its weights, for example
    "vision.blocks.3.qkv"; it is the label unless given.
    """

    def __init__(self, inputs: Sequence[Buffer] = ()) -> None:
        self._inputs = tuple(buffer.name for buffer in inputs)
        self._buffers = {buffer.name: buffer for buffer in inputs}
        self._steps: list[Step] = []
        self._writers: dict[str, int] = {}

    def position(
        self, label: str, out: Buffer, spec: VisionSpec, *, grid: tuple[int, int], bias: str
    ) -> None:
        weights = {"table": "vision.position", "prefix": "vision.prefix", "bias": bias}
        scalars = {"table_grid": spec.grid, "grid": grid, "antialias": spec.position_antialias}
        self._add("position", label, {"out": out}, weights, scalars)

    def patch_embed(
        self,
        label: str,
        out: Buffer,
        spec: VisionSpec,
        *,
        pixels: Buffer,
        table: Buffer,
        weight: str,
    ) -> None:
        buffers = {"out": out, "pixels": pixels, "table": table}
        scalars = {"patch": spec.patch, "channels": spec.channels, "prefix": spec.prefix}
        self._add("patch_embed", label, buffers, {"weight": weight}, scalars)

    def text_embed(self, label: str, out: Buffer, *, ids: Buffer, positions: Buffer) -> None:
        buffers = {"out": out, "ids": ids, "positions": positions}
        weights = {"token": "text.token", "position": "text.position"}
        self._add("text_embed", label, buffers, weights, {})

    def layernorm(
        self,
        label: str,
        out: Buffer,
        x: Buffer,
        *,
        eps: float,
        rows: Buffer | None = None,
        weights: str | None = None,
    ) -> None:
        name = weights or label
        buffers = {"out": out, "x": x, "rows": rows}
        parameters = {"gamma": f"{name}.weight", "beta": f"{name}.bias"}
        self._add("layernorm", label, buffers, parameters, {"eps": eps})

    def linear(
        self,
        label: str,
        out: Buffer,
        x: Buffer,
        *,
        rows: Buffer | None = None,
        norm_eps: float | None = None,
        activation: str | None = None,
        gated: bool = False,
        residual: Buffer | None = None,
        residual_rows: Buffer | None = None,
        scale: str | None = None,
        weights: str | None = None,
    ) -> None:
        """``norm_eps``: the LayerNorm before the linear is folded into its weights."""
        name = weights or label
        folded = norm_eps is not None
        buffers = {
            "out": out,
            "x": x,
            "rows": rows,
            "x_stats": self._statistics(x) if folded else None,
            "residual": residual,
            "residual_rows": residual_rows,
        }
        parameters = {
            "weight": f"{name}.weight",
            "bias": f"{name}.bias",
            "row_sums": f"{name}.sums" if folded else None,
            "scale": scale,
        }
        scalars = {"norm_eps": norm_eps, "activation": activation, "gated": gated or None}
        self._add("linear", label, buffers, parameters, scalars)

    def attention(
        self,
        label: str,
        out: Buffer,
        qkv: Buffer,
        spec: BlockSpec,
        *,
        equal_lengths: bool,
        kv_lens: Buffer | None = None,
    ) -> None:
        buffers = {"out": out, "qkv": qkv, "cu_seqlens": CU_SEQLENS, "kv_lens": kv_lens}
        scalars = {"heads": spec.heads, "causal": spec.causal, "max_seqlen": MAX_SEQLEN}
        scalars["equal_lengths"] = equal_lengths
        self._add("attention", label, buffers, {}, scalars)

    def attention_one(
        self, label: str, out: Buffer, spec: BlockSpec, *, q: Buffer, kv: Buffer
    ) -> None:
        buffers = {"out": out, "q": q, "kv": kv, "cu_seqlens": CU_SEQLENS}
        scalars = {"heads": spec.heads, "max_seqlen": MAX_SEQLEN}
        self._add("attention_one", label, buffers, {}, scalars)

    def pool(
        self,
        label: str,
        out: Buffer,
        status: Buffer,
        x: Buffer,
        *,
        eps: float,
        rows: Buffer | None = None,
        norm: str | None = None,
        projection: str | None = None,
    ) -> None:
        """Takes the weights of the LayerNorm ``norm``, or of ``projection`` with it folded in."""
        buffers = {"out": out, "status": status, "x": x, "rows": rows}
        parameters = {
            "gamma": norm and f"{norm}.weight",
            "beta": norm and f"{norm}.bias",
            "weight": projection and f"{projection}.folded",
            "bias": projection and f"{projection}.bias",
        }
        self._add("pool", label, buffers, parameters, {"eps": eps})

    def class_mean(self, label: str, out: Buffer, x: Buffer, *, prefix: int) -> None:
        scalars = {"tokens": MAX_SEQLEN, "prefix": prefix}
        self._add("class_mean", label, {"out": out, "x": x}, {}, scalars)

    def _add(
        self,
        op: str,
        label: str,
        buffers: Mapping[str, Buffer | None],
        weights: Mapping[str, str | None],
        scalars: Mapping[str, Any],
    ) -> None:
        """Append a step. Arguments that are None are left out."""
        named = tuple((arg, self._name(buffer)) for arg, buffer in _present(buffers))
        self._writers[dict(named)["out"]] = len(self._steps)
        self._steps.append(Step(op, label, named, _present(weights), _present(scalars)))

    def _name(self, buffer: Buffer) -> str:
        known = self._buffers.setdefault(buffer.name, buffer)
        assert known == buffer, f"{buffer.name}: got {buffer}, and {known} before"
        return buffer.name

    def _statistics(self, stream: Buffer) -> Buffer:
        """The row statistics of ``stream``. The last step that wrote it now writes them too."""
        assert stream.columns is not None, f"{stream.name}: got no columns"
        columns, _ = stats_shape(0, stream.columns)
        name = f"{stream.name}.stats"
        statistics = Buffer(name, stream.rows, columns, "float32", transposed=True)
        writer = self._writers[stream.name]
        step = self._steps[writer]
        if ("stats", name) not in step.buffers:
            buffers = (*step.buffers, ("stats", self._name(statistics)))
            self._steps[writer] = replace(step, buffers=buffers)
        return statistics

    def finish(
        self, name: str, layout: Mapping[str, PackedTensor], outputs: Sequence[Buffer]
    ) -> Plan:
        """The plan. Each intermediate buffer gets a slot of the activation arena.

        Buffers that no step needs at the same time may share a slot.
        """
        external = {*self._inputs, *(buffer.name for buffer in outputs)}
        last_use = {
            buffer: number for number, step in enumerate(self._steps) for _, buffer in step.buffers
        }
        slots: dict[str, int] = {}
        occupied: dict[int, str] = {}
        for number, step in enumerate(self._steps):
            for _, buffer in step.buffers:
                if buffer not in external and buffer not in slots:
                    slot = next(i for i in range(len(occupied) + 1) if i not in occupied)
                    slots[buffer], occupied[slot] = slot, buffer
            occupied = {
                slot: buffer for slot, buffer in occupied.items() if last_use[buffer] > number
            }
        names = dict.fromkeys(weight for step in self._steps for _, weight in step.weights)
        return Plan(
            name,
            tuple(self._steps),
            tuple(replace(b, slot=slots.get(b.name)) for b in self._buffers.values()),
            tuple((weight, layout[weight]) for weight in names),
            self._inputs,
            tuple(buffer.name for buffer in outputs),
        )


def _present(arguments: Mapping[str, T | None]) -> tuple[tuple[str, T], ...]:
    return tuple((arg, value) for arg, value in arguments.items() if value is not None)
