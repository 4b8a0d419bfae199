"""Launches of the int8 operators on small tensors: operands, what the reference makes of them, and
what compiled kernels do."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from emulator.call import run_call
from vitrail_kernels import OPERATORS
from vitrail_kernels.configs import KernelConfig, in_force
from vitrail_kernels.device.stats import stats_shape
from vitrail_kernels.launch import Call, Target
from vitrail_kernels.ops.linear_int8 import group_columns, is_unsigned
from vitrail_kernels.ops.linear_int8_grouped import FLOAT_OF_INTEGER

SMS = 1
"""So few multiprocessors that a block of a persistent kernel takes several tiles."""
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Operands of one launch. ``outputs`` hold nothing; ``in_place``: out is the residual."""

    op: str
    inputs: Tensors
    outputs: Tensors
    scalars: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    in_place: bool = False

    @property
    def rows(self) -> int:
        return self.outputs["out"].shape[0]

    def part(self, first: int, last: int) -> Case:
        """The launch of rows ``first`` to ``last`` of the output alone."""

        def cut(name: str, tensor: Tensor) -> Tensor:
            gathered = {"x": "rows", "residual": "residual_rows"}.get(name)
            if gathered in self.inputs or name not in BY_ROW:
                return tensor
            return tensor[..., first:last].clone() if name in LAST else tensor[first:last].clone()

        inputs, outputs = (
            {name: cut(name, tensor) for name, tensor in tensors.items()}
            for tensors in (self.inputs, self.outputs)
        )
        return dataclasses.replace(self, inputs=inputs, outputs=outputs)

    def _bound(self) -> tuple[Tensors, Tensors]:
        """Copies of the outputs, and all arguments with them."""
        outputs = {name: torch.empty_like(tensor) for name, tensor in self.outputs.items()}
        arguments = outputs | self.inputs
        if self.in_place:
            outputs["out"].copy_(self.inputs["residual"])
            arguments["residual"] = outputs["out"]
        return outputs, arguments

    def reference(self) -> Tensors:
        """The outputs in PyTorch."""
        outputs, arguments = self._bound()
        OPERATORS[self.op].reference(**arguments, **self.scalars)
        return outputs

    def calls(
        self, target: Target, config: KernelConfig | None = None
    ) -> tuple[Tensors, list[Call]]:
        """The outputs, and the launches that write them."""
        outputs, arguments = self._bound()
        make = OPERATORS[self.op].calls
        calls = make(target, **arguments, **self.scalars)
        if config is not None:
            with in_force({call.key: config for call in calls}):
                calls = make(target, **arguments, **self.scalars)
            for call in calls:  # an operator narrows a tile that its groups do not fill
                sides = {"block_n": call.config.block_n, "block_k": call.config.block_k}
                assert call.config == dataclasses.replace(config, **sides), "another configuration"
        return outputs, calls

    def run(
        self, arch: int, config: KernelConfig | None = None, *, sms: int = SMS, **options: Any
    ) -> Tensors:
        """The outputs of compiled kernels. Raises `emulator.Fault`."""
        outputs, calls = self.calls(Target(arch, sms), config)
        empty = [] if self.in_place else list(outputs.values())
        for call in calls:
            run_call(call, arch, empty, **options)
        return outputs


LAST = ("x_scale", "out_scale", "stats")
"""Tensors of which the last dimension counts rows; of others the first."""
BY_ROW = (*LAST, "out", "x", "residual", "rows", "residual_rows")


def codes(*shape: int, low: int = -127) -> Tensor:
    """Codes as those of normal numbers are, some of them the largest that there are."""
    return (torch.randn(shape) * 40).round().clamp(low, 127).to(torch.int8)


def uniform(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.empty(shape).uniform_(0.5, 1.5) * scale


def norm_quant(rows: int, width: int, *, gathers: bool = False) -> Case:
    x = torch.randn(rows, width)
    x[:, 3] *= 30
    x += torch.randn(rows, 1) * 3
    x[rows // 2] = 0
    inputs = {"x": x.half(), "smooth": uniform(width)}
    if gathers:
        inputs["rows"] = torch.randperm(rows)[: rows // 2].int()
    count = len(inputs.get("rows", x))
    outputs = {"out": torch.empty(count, width, dtype=torch.int8), "out_scale": torch.empty(count)}
    return Case("norm_quant", inputs, outputs, {"eps": 1e-6})


def linear_int8(
    rows: int,
    columns: int,
    depth: int,
    *,
    activation: str | None = None,
    gated: bool = False,
    quantizes: bool = False,
) -> Case:
    """``columns`` of the output."""
    n = 2 * columns if gated else columns
    inputs = {
        "x": codes(rows, depth),
        "x_scale": uniform(rows, scale=1 / 40),
        "weight": codes(n, depth),
        "weight_scale": uniform(n, scale=depth**-0.5 / 40),
        "bias": torch.randn(n),
    }
    outputs = {"out": torch.empty(rows, columns, dtype=torch.int8 if quantizes else torch.half)}
    if quantizes:
        outputs["out_scale"] = torch.empty(columns // group_columns(gated), rows)
    return Case("linear_int8", inputs, outputs, {"activation": activation, "gated": gated})


def shift_of(weight: Tensor, group: int, unsigned: bool) -> Tensor:
    """(K / group, N), as the loader makes it."""
    sums = weight.long().view(weight.shape[0], -1, group).sum(2).t()
    return (FLOAT_OF_INTEGER - 128 * unsigned * sums).float().contiguous()


def grouped(
    rows: int,
    columns: int,
    depth: int,
    *,
    activation: str = "gelu",
    gated: bool = False,
    scale: bool = False,
    stats: bool = True,
    in_place: bool = True,
    gathers: bool = False,
) -> Case:
    """As the MLP of that activation has it."""
    group, unsigned = group_columns(gated), is_unsigned(activation, gated)
    weight = codes(columns, depth)
    inputs = {
        "x": codes(rows, depth, low=-128),
        "x_scale": uniform(depth // group, rows, scale=1 / 40),
        "weight": weight,
        "weight_scale": uniform(columns, scale=depth**-0.5 / 40),
        "shift": shift_of(weight, group, unsigned),
        "bias": torch.randn(columns),
        "residual": torch.randn(2 * rows if gathers else rows, columns).half(),
    }
    if scale:
        inputs["scale"] = uniform(columns)
    if gathers:
        inputs["residual_rows"] = torch.randperm(2 * rows)[:rows].int()
    outputs = {"out": torch.empty(rows, columns).half()}
    if stats:
        outputs["stats"] = torch.empty(stats_shape(rows, columns))
    return Case("linear_int8_grouped", inputs, outputs, {"group": group}, in_place)


def of_form(make: Callable[..., Case], *sizes: int, **has: Any) -> Callable[[int], Case]:
    """Makes the case of some number of rows."""
    return lambda rows: make(rows, *sizes, **has)


_up = functools.partial(of_form, linear_int8, quantizes=True)
_down = functools.partial(of_form, grouped)
FORMS: dict[str, Callable[[int], Case]] = {
    "norm_quant": of_form(norm_quant, 192),
    "qkv": of_form(linear_int8, 144, 192),
    "up": _up(256, 192, activation="gelu"),
    "gated up": _up(128, 192, activation="silu", gated=True),
    "down": _down(192, 256, scale=True),
    "gated down": _down(192, 256, activation="silu", gated=True),
    "norm_quant 48": of_form(norm_quant, 48),
    "norm_quant 1024": of_form(norm_quant, 1024),
    "norm_quant 1280": of_form(norm_quant, 1280),
    "norm_quant of some rows": of_form(norm_quant, 192, gathers=True),
    "qkv of 48": of_form(linear_int8, 144, 48),
    "wide qkv": of_form(linear_int8, 576, 192),
    "quick_gelu": _up(128, 64, activation="quick_gelu"),
    "gelu_tanh": _up(128, 64, activation="gelu_tanh"),
    "relu": _up(128, 64, activation="relu"),
    "silu": _up(128, 64, activation="silu"),
    "gated gelu": _up(128, 64, activation="gelu", gated=True),
    "wide up": _up(512, 192, activation="gelu"),
    "down without layer scale": _down(192, 512),
    "down of signs": _down(48, 128, activation="silu"),
    "down of 48": _down(48, 128),
    "down beside its residual": _down(192, 256, in_place=False),
    "down of some rows": _down(192, 256, in_place=False, gathers=True, stats=False),
}
"""By name; the first six are those of a block, and of a gated block."""
BLOCK = tuple(FORMS)[:6]


def forms(quick: Sequence[str] = BLOCK, *, without: str = "nothing") -> list[Any]:
    """Parameters of a test: the names of all `FORMS`, slow but for ``quick``."""
    names = (name for name in FORMS if not name.startswith(without))
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in names]
