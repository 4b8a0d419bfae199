"""Builds plans: each operator has a method that appends a step. `finish` plans the memory."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from vitrail.plan.plan import MAX_SEQLEN, PER_SEQUENCE, PER_TOKEN, Affine, Buffer, Plan, Step
from vitrail.spec import BlockSpec, VisionSpec
from vitrail.weights.layout import PackedTensor
from vitrail_kernels.device.stats import stats_shape
from vitrail_kernels.ops.linear_int8 import group_columns

T = TypeVar("T")

CU_SEQLENS = Buffer("cu_seqlens", Affine(sequences=1, constant=1), None, "int32")
"""Input: the first token of each sequence, then the number of tokens."""
TOKEN_ROWS = Buffer("token_rows", PER_SEQUENCE, None, "int32")
"""Input: the row of each sequence's pooled token."""
DISTILLATION_ROWS = Buffer("distillation_rows", PER_SEQUENCE, None, "int32")
"""Input: the row of each sequence's distillation token."""
KV_LENS = Buffer("kv_lens", PER_SEQUENCE, None, "int32")
"""Input: how many leading tokens of each sequence may be attended to."""


class QuantizedRows(NamedTuple):
    """Rows of int8 ``codes``, with a ``scale`` for each row, or for each row and group."""

    codes: Buffer
    scale: Buffer


class Builder:
    """Collects the steps of a plan. `vitrail_kernels.ops` documents the operators.

    ``name``: of a step within the tower, for example "blocks.3.qkv". ``weights``: the full name
    that the weights of a step share, which is the step's unless given.
    """

    def __init__(self, tower: str, spec: BlockSpec, inputs: Sequence[Buffer] = ()) -> None:
        self.tower, self.spec = tower, spec
        self._inputs = tuple(buffer.name for buffer in inputs)
        self._buffers = {buffer.name: buffer for buffer in inputs}
        self._steps: list[Step] = []
        self._writers: dict[str, int] = {}

    def per_token(self, name: str, columns: int | None = None, dtype: str = "compute") -> Buffer:
        """A buffer with a row for each token, as wide as the residual stream unless given."""
        return Buffer(f"{self.tower}.{name}", PER_TOKEN, columns or self.spec.width, dtype)

    def group_scales(self, name: str, columns: int) -> Buffer:
        """A scale for each token and each group of ``columns`` columns of an int8 hidden layer."""
        groups = columns // group_columns(self.spec.gated)
        return Buffer(f"{self.tower}.{name}", PER_TOKEN, groups, "float32", transposed=True)

    def per_sequence(self, name: str, columns: int | None = None, dtype: str = "compute") -> Buffer:
        """As `per_token`, with a row for each sequence."""
        return Buffer(f"{self.tower}.{name}", PER_SEQUENCE, columns or self.spec.width, dtype)

    def position(self, out: Buffer, spec: VisionSpec, grid: tuple[int, int], bias: str) -> None:
        weights = {"table": "vision.position", "prefix": "vision.prefix", "bias": bias}
        scalars = {"table_grid": spec.grid, "grid": grid, "antialias": spec.position_antialias}
        self._add("position", "position", {"out": out}, weights, scalars)

    def patch_embed(
        self, out: Buffer, spec: VisionSpec, pixels: Buffer, table: Buffer, weight: str
    ) -> None:
        buffers = {"out": out, "pixels": pixels, "table": table}
        scalars = {"patch": spec.patch, "channels": spec.channels, "prefix": spec.prefix}
        self._add("patch_embed", "patch_embed", buffers, {"weight": weight}, scalars)

    def text_embed(self, out: Buffer, ids: Buffer, positions: Buffer) -> None:
        buffers = {"out": out, "ids": ids, "positions": positions}
        weights = {"token": "text.token", "position": "text.position"}
        self._add("text_embed", "embed", buffers, weights, {})

    def layernorm(
        self, name: str, out: Buffer, x: Buffer, rows: Buffer | None = None, weights: str = ""
    ) -> None:
        weights = weights or f"{self.tower}.{name}"
        buffers = {"out": out, "x": x, "rows": rows}
        parameters = {"gamma": f"{weights}.weight", "beta": f"{weights}.bias"}
        self._add("layernorm", name, buffers, parameters, {"eps": self.spec.eps})

    def linear(
        self,
        name: str,
        out: Buffer,
        x: Buffer,
        *,
        rows: Buffer | None = None,
        norm: bool = False,
        activation: str | None = None,
        gated: bool = False,
        residual: Buffer | None = None,
        residual_rows: Buffer | None = None,
        scale: str | None = None,
        weights: str = "",
    ) -> None:
        """``norm``: the weights contain those of the LayerNorm of ``x``."""
        weights = weights or f"{self.tower}.{name}"
        buffers = {
            "out": out,
            "x": x,
            "rows": rows,
            "x_stats": self._statistics(x) if norm else None,
            "residual": residual,
            "residual_rows": residual_rows,
        }
        parameters = {
            "weight": f"{weights}.weight",
            "bias": f"{weights}.bias",
            "row_sums": f"{weights}.sums" if norm else None,
            "scale": scale,
        }
        eps = self.spec.eps if norm else None
        scalars = {"norm_eps": eps, "activation": activation, "gated": gated or None}
        self._add("linear", name, buffers, parameters, scalars)

    def norm_quant(self, name: str, x: Buffer, weights: str = "") -> QuantizedRows:
        """Quantize the normalized rows of ``x`` for the int8 linear ``weights``."""
        weights = weights or f"{self.tower}.{name}"
        columns = x.columns or self.spec.width
        codes = Buffer(f"{self.tower}.{name}.codes", x.rows, columns, "int8")
        scale = Buffer(f"{self.tower}.{name}.scales", x.rows, None, "float32")
        buffers = {"out": codes, "out_scale": scale, "x": x}
        parameters = {"smooth": f"{weights}.smooth"}
        self._add("norm_quant", f"{name}.norm_quant", buffers, parameters, {"eps": self.spec.eps})
        return QuantizedRows(codes, scale)

    def linear_int8(
        self,
        name: str,
        out: Buffer,
        x: QuantizedRows,
        *,
        out_scale: Buffer | None = None,
        activation: str | None = None,
        gated: bool = False,
    ) -> None:
        """With ``out_scale``, ``out`` receives codes of int8."""
        weights = f"{self.tower}.{name}"
        buffers = {"out": out, "x": x.codes, "x_scale": x.scale, "out_scale": out_scale}
        scalars = {"activation": activation, "gated": gated or None}
        self._add("linear_int8", name, buffers, _int8_weights(weights), scalars)

    def linear_int8_grouped(
        self, name: str, out: Buffer, x: QuantizedRows, *, residual: Buffer, scale: str | None
    ) -> None:
        weights = f"{self.tower}.{name}"
        buffers = {"out": out, "x": x.codes, "x_scale": x.scale, "residual": residual}
        parameters = _int8_weights(weights) | {"shift": f"{weights}.shift", "scale": scale}
        scalars = {"group": group_columns(self.spec.gated)}
        self._add("linear_int8_grouped", name, buffers, parameters, scalars)

    def attention(self, name: str, out: Buffer, qkv: Buffer, kv_lens: Buffer | None = None) -> None:
        buffers = {"out": out, "qkv": qkv, "cu_seqlens": CU_SEQLENS, "kv_lens": kv_lens}
        scalars = {"heads": self.spec.heads, "causal": self.spec.causal, "max_seqlen": MAX_SEQLEN}
        scalars["equal_lengths"] = self.tower == "vision"
        self._add("attention", name, buffers, {}, scalars)

    def attention_one(self, name: str, out: Buffer, q: Buffer, kv: Buffer) -> None:
        buffers = {"out": out, "q": q, "kv": kv, "cu_seqlens": CU_SEQLENS}
        scalars = {"heads": self.spec.heads, "max_seqlen": MAX_SEQLEN}
        self._add("attention_one", name, buffers, {}, scalars)

    def pool(
        self, out: Buffer, status: Buffer, x: Buffer, rows: Buffer | None, projected: bool
    ) -> None:
        weights = {"gamma": f"{self.tower}.norm.weight", "beta": f"{self.tower}.norm.bias"}
        if projected:  # the LayerNorm is folded in
            name = f"{self.tower}.projection"
            weights = {"weight": f"{name}.folded", "bias": f"{name}.bias"}
        buffers = {"out": out, "status": status, "x": x, "rows": rows}
        self._add("pool", "pool", buffers, weights, {"eps": self.spec.eps})

    def class_mean(self, name: str, out: Buffer, x: Buffer, prefix: int) -> None:
        scalars = {"tokens": MAX_SEQLEN, "prefix": prefix}
        self._add("class_mean", name, {"out": out, "x": x}, {}, scalars)

    def _add(
        self,
        op: str,
        name: str,
        buffers: Mapping[str, Buffer | None],
        weights: Mapping[str, str | None],
        scalars: Mapping[str, Any],
    ) -> None:
        """Append a step. Arguments that are None are left out."""
        named = tuple((arg, self._register(buffer)) for arg, buffer in _present(buffers))
        self._writers[dict(named)["out"]] = len(self._steps)
        label = f"{self.tower}.{name}"
        self._steps.append(Step(op, label, named, _present(weights), _present(scalars)))

    def _register(self, buffer: Buffer) -> str:
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
            buffers = (*step.buffers, ("stats", self._register(statistics)))
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
            f"{self.tower}.{name}",
            tuple(self._steps),
            tuple(replace(b, slot=slots.get(b.name)) for b in self._buffers.values()),
            tuple((weight, layout[weight]) for weight in names),
            self._inputs,
            tuple(buffer.name for buffer in outputs),
            tuple(buffer.name for buffer in outputs if buffer.rows == PER_TOKEN),
        )


def _int8_weights(name: str) -> dict[str, str | None]:
    """The weights by argument that every int8 linear has."""
    arguments = {"weight": "codes", "weight_scale": "weight_scale", "bias": "bias"}
    return {argument: f"{name}.{tensor}" for argument, tensor in arguments.items()}


def _present(arguments: Mapping[str, T | None]) -> tuple[tuple[str, T], ...]:
    return tuple((arg, value) for arg, value in arguments.items() if value is not None)
