"""Faults that the guard must find: in stored tensors, in packed weights, and in the operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from int8.subject import Subject, Tensors
from vitrail.int8.exact import exact_groups
from vitrail.int8.gptq import round_nearest, row_scales
from vitrail.plan.plan import Step
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.weights.layout import Weights
from vitrail_kernels import OPERATORS
from vitrail_kernels.ops.linear_int8 import OFFSET, group_columns, is_unsigned
from vitrail_kernels.ops.linear_int8_grouped import FLOAT_OF_INTEGER

Arguments = Mapping[str, Tensor]
BLOCK = "vision.blocks.1"
QKV, UP, DOWN = (f"{BLOCK}.{linear}" for linear in ("qkv", "up", "down"))


class Fault(NamedTuple):
    """``tensors`` changes the stored tensors, ``packed`` the packed weights."""

    tensors: Callable[[Subject, Tensors], object] = lambda subject, tensors: None
    packed: Callable[[Subject, Weights], object] = lambda subject, weights: None
    runner: type[TorchRunner] = TorchRunner


# ---- stored tensors


def _scaled(name: str, factor: float, rows: slice = slice(None)) -> Fault:
    return Fault(lambda subject, tensors: tensors[name][rows].mul_(factor))


def _rolled(name: str) -> Fault:
    return Fault(lambda subject, tensors: tensors[name].copy_(tensors[name].roll(1)))


def _doubled_unit(subject: Subject, tensors: Tensors) -> None:
    """The scale of the hidden unit with the largest bias, which is the last to be zero."""
    tensors[f"{UP}.scale"][tensors[f"{UP}.folded_bias"].argmax()] *= 2


def _rescale(tensors: Tensors, name: str, scale: Tensor) -> None:
    """Round the weight ``name`` again, to codes of another ``scale``."""
    weight = tensors[f"{name}.codes"].double() * tensors[f"{name}.scale"].double()[:, None]
    tensors[f"{name}.codes"].copy_(round_nearest(weight, scale))
    tensors[f"{name}.scale"].copy_(scale)


def _per_tensor(subject: Subject, tensors: Tensors) -> None:
    for name in subject.blocks.int8_candidates:
        scale = tensors[f"vision.blocks.{name}.scale"]
        _rescale(tensors, f"vision.blocks.{name}", torch.full_like(scale, float(scale.max())))


def _six_bits(subject: Subject, tensors: Tensors) -> None:
    for layer in range(subject.blocks.layers - 1):
        name = f"vision.blocks.{layer}.up"
        _rescale(tensors, name, tensors[f"{name}.scale"] * 4)


def _truncated(subject: Subject, tensors: Tensors) -> None:
    """Codes cut towards zero, and not rounded."""
    weight = subject.loaded.weights[f"{UP}.weight"].double() / tensors[f"{UP}.smooth"]
    scale = row_scales(weight)
    tensors[f"{UP}.codes"].copy_((weight / scale.double()[:, None]).trunc())
    tensors[f"{UP}.scale"].copy_(scale)


def _swapped_queries(subject: Subject, tensors: Tensors) -> None:
    width = subject.blocks.width
    order = torch.cat([torch.arange(width, 2 * width), torch.arange(width)])
    for name in ("codes", "scale", "folded_bias"):
        tensor = tensors[f"{QKV}.{name}"]
        tensor[: 2 * width] = tensor[order]


def _without_softmax_scale(subject: Subject, tensors: Tensors) -> None:
    width, factor = subject.blocks.width, subject.blocks.head_dim**-0.5 * math.log2(math.e)
    for name in ("scale", "folded_bias"):
        tensors[f"{QKV}.{name}"][:width] /= factor


def _without_beta(subject: Subject, tensors: Tensors) -> None:
    """The bias of the checkpoint, without that which LayerNorm's beta adds to it."""
    read = subject.read(f"{BLOCK}.up.bias")
    tensors[f"{UP}.folded_bias"].copy_(read)


def _other_block(subject: Subject, tensors: Tensors) -> None:
    for name in ("codes", "scale"):
        a, b = (tensors[f"vision.blocks.{layer}.up.{name}"] for layer in (1, 2))
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)


def plain(subject: Subject, tensors: Tensors) -> None:
    """Neither smoothing nor GPTQ: weights rounded to the nearest code."""
    weights = subject.loaded.weights
    for name in subject.blocks.int8_candidates:
        linear = f"vision.blocks.{name}"
        weight = weights[f"{linear}.weight"]
        scale = row_scales(weight)
        tensors[f"{linear}.codes"].copy_(round_nearest(weight, scale))
        tensors[f"{linear}.scale"].copy_(scale)
        if f"{linear}.smooth" in tensors:
            tensors[f"{linear}.smooth"].fill_(1)


# ---- packed weights


def _without_shift(subject: Subject, weights: Weights) -> None:
    weights[f"{DOWN}.shift"].fill_(FLOAT_OF_INTEGER)


def _without_offset(subject: Subject, weights: Weights) -> None:
    """0.17 stays in the hidden layer: nothing takes it off the outputs again."""
    sums = weights[f"{DOWN}.codes"].double().sum(dim=1) * weights[f"{DOWN}.weight_scale"]
    weights[f"{DOWN}.bias"].add_(OFFSET * sums)


# ---- operators


class _Runner(TorchRunner):
    """Calls `norm_quant`, `hidden` or `down` in place of the operators, and the real one if they
    are not defined. ``block``: the only block with the fault; every block if it is None."""

    block: ClassVar[int | None] = None
    replaced: ClassVar[str]

    def run_step(self, step: Step, arguments: Arguments, longest: int) -> None:
        only = "" if self.block is None else f".{self.block}."
        operator = step.op
        if operator == "linear_int8" and "out_scale" in arguments:
            operator = "hidden"
        if operator != self.replaced or only not in step.label:
            super().run_step(step, arguments, longest)
            return
        self.replace(step, arguments, longest)

    def replace(self, step: Step, arguments: Arguments, longest: int) -> None:
        raise NotImplementedError


class _Norm(_Runner):
    replaced = "norm_quant"

    def replace(self, step: Step, arguments: Arguments, longest: int) -> None:
        x, smooth = arguments["x"].double(), arguments["smooth"].double()
        y = layer_norm(x, (x.shape[1],), smooth, eps=dict(step.scalars)["eps"])
        codes, scale = self.codes(y, step)
        arguments["out"].copy_(codes)
        arguments["out_scale"].copy_(scale)

    def codes(self, y: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Codes (M, K) and scales (M,) of the normalized rows (M, K)."""
        raise NotImplementedError


class _SevenBits(_Norm):
    def codes(self, y: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        scale = y.abs().amax(dim=1) / 63
        return (y / scale[:, None]).round(), scale


class _Wrapping(_Norm):
    """The range is a little too small, and codes over 127 become negative."""

    def codes(self, y: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        scale = y.abs().amax(dim=1) / 130
        return ((y / scale[:, None]).round() + 128) % 256 - 128, scale


class _Truncating(_Norm):
    def codes(self, y: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        scale = y.abs().amax(dim=1) / 127
        return (y / scale[:, None]).trunc(), scale


class _Static(_Norm):
    """The scale of the first rows that are seen serves all others."""

    def __init__(self, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(weights, dtype, device)
        self.scales: dict[str, Tensor] = {}

    def codes(self, y: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        scale = self.scales.setdefault(step.label, y.abs().max() / 127).expand(len(y))
        return (y / scale[:, None]).round().clamp(-127, 127), scale


class _Clipped(_Runner):
    """The hidden layer of block 0 is clipped at ``limit`` before it becomes codes."""

    replaced, block = "hidden", 0
    limit: ClassVar[float] = 3.0

    def replace(self, step: Step, arguments: Arguments, longest: int) -> None:
        out = arguments["out"]
        values = torch.empty(out.shape)
        inputs = {arg: tensor for arg, tensor in arguments.items() if arg != "out_scale"}
        OPERATORS["linear_int8"].reference(**{**inputs, "out": values}, **step.resolve(longest))
        scalars = dict(step.scalars)
        gated = bool(scalars.get("gated"))
        codes, scale = exact_groups(
            values.double().clamp(max=self.limit),
            is_unsigned(scalars.get("activation"), gated),
            group_columns(gated),
        )
        out.copy_(codes)
        arguments["out_scale"].copy_(scale)


class _ClippedLower(_Clipped):
    limit = 2.0


class _NextGroup(_Runner):
    """Groups take each other's scales."""

    replaced, block = "linear_int8_grouped", 1

    def replace(self, step: Step, arguments: Arguments, longest: int) -> None:
        rolled = {**arguments, "x_scale": arguments["x_scale"].roll(1, dims=0)}
        super(_Runner, self).run_step(step, rolled, longest)


class _Sixteen(_Runner):
    """Sums of products saturate in 16 bits, as they do in byte products without VNNI."""

    replaced, block = "linear_int8", 1

    def replace(self, step: Step, arguments: Arguments, longest: int) -> None:
        x, weight = (arguments[name].double() for name in ("x", "weight"))
        sums = (x @ weight.t()).clamp(-32768, 32767)
        y = sums * arguments["x_scale"][:, None] * arguments["weight_scale"] + arguments["bias"]
        arguments["out"].copy_(y)


FAULTS: dict[str, Fault] = {
    # those of the measurements that set the thresholds
    "scale 3 % off": _scaled(f"{UP}.scale", 1.03),
    "scale 10 % off": _scaled(f"{UP}.scale", 0.9),
    "scale of down 3 % off": _scaled(f"{DOWN}.scale", 1.03),
    "a row twice as large": _scaled(f"{QKV}.scale", 2, slice(300, 301)),
    "a row of up twice as large": Fault(_doubled_unit),
    "16 rows twice as large": _scaled(f"{DOWN}.scale", 2, slice(16, 32)),
    "next row's scales": _rolled(f"{UP}.scale"),
    "smoothing shifted by one": _rolled(f"{UP}.smooth"),
    "bias missing": _scaled(f"{UP}.folded_bias", 0),
    "weights of 6 bits": Fault(_six_bits),
    "weights per tensor": Fault(_per_tensor),
    "activations of 7 bits": Fault(runner=_SevenBits),
    "codes that wrap": Fault(runner=_Wrapping),
    "static ranges": Fault(runner=_Static),
    "hidden layer clipped at 3": Fault(runner=_Clipped),
    "hidden layer clipped at 2": Fault(runner=_ClippedLower),
    # others
    "smoothing inverted": Fault(lambda s, tensors: tensors[f"{UP}.smooth"].reciprocal_()),
    "smoothing left out": Fault(lambda s, tensors: tensors[f"{UP}.smooth"].fill_(1)),
    "weights cut to codes": Fault(_truncated),
    "rows cut to codes": Fault(runner=_Truncating),
    "queries and keys swapped": Fault(_swapped_queries),
    "softmax scale left out": Fault(_without_softmax_scale),
    "beta left out": Fault(_without_beta),
    "up of another block": Fault(_other_block),
    "shift of down left out": Fault(packed=_without_shift),
    "offset left in": Fault(packed=_without_offset),
    "next group's scales": Fault(runner=_NextGroup),
    "sums of 16 bits": Fault(runner=_Sixteen),
}
