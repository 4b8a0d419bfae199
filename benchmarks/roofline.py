"""The machine code of a model's kernels and a roofline: `python benchmarks/roofline.py`

For every launch of a model the report has registers, spills, shared memory, blocks per
multiprocessor, tensor-core, TMA and LDGSTS instructions, FLOPs and bytes. The roofline is an
estimate: a launch takes the longer of two times, its FLOPs at the card's dense 16-bit peak (twice
that peak for int8) and its bytes at the card's bandwidth. No GPU is needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from main_loops import ASYNC_COPY, TMA_LOAD, TMA_STORE
from torch import Tensor

from vitrail_kernels import OPERATORS
from vitrail_kernels.candidates import INT8
from vitrail_kernels.compile import KernelCode, compile_all
from vitrail_kernels.configs import dtype_name
from vitrail_kernels.cost import Cost
from vitrail_kernels.device.stats import stats_shape
from vitrail_kernels.launch import Call, Target
from vitrail_kernels.ops.linear_int8 import group_columns


class Card(NamedTuple):
    """A GPU: its multiprocessors, dense fp16 FLOP/s with fp32 sums, and bytes/s of memory."""

    name: str
    sms: int
    flops: float
    bandwidth: float


CARDS = {
    80: Card("A100 80GB", 108, 312e12, 2.04e12),
    86: Card("A10", 72, 125e12, 0.60e12),
    89: Card("L40S", 142, 362e12, 0.86e12),
    90: Card("H200", 132, 989e12, 4.80e12),
    100: Card("B200", 148, 2250e12, 8.00e12),
    120: Card("RTX PRO 6000", 188, 503e12, 1.79e12),
}
"""A card of each architecture, with the figures of NVIDIA's data sheets."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A tower: sequences of ``tokens``, patches of ``patch`` pixels a side (0: text), and
    ``embedding`` values per output."""

    width: int
    heads: int
    mlp: int
    layers: int
    tokens: int
    activation: str
    patch: int
    side: int
    embedding: int
    batch: int
    causal: bool = False
    layer_scale: bool = False
    gated: bool = False


SHAPES = {
    "ViT-B/16": Shape(768, 12, 3072, 12, 197, "gelu", 16, 224, 768, 256),
    "CLIP B/32": Shape(768, 12, 3072, 12, 50, "quick_gelu", 32, 224, 512, 256),
    "CLIP L/14": Shape(1024, 16, 4096, 24, 257, "quick_gelu", 14, 224, 768, 256),
    "CLIP H/14": Shape(1280, 16, 5120, 32, 257, "gelu", 14, 224, 1024, 128),
    "DINOv2-B@518": Shape(768, 12, 3072, 12, 1370, "gelu", 14, 518, 768, 32, layer_scale=True),
    "DINOv2-g": Shape(1536, 24, 8192, 40, 257, "silu", 14, 224, 1536, 64, False, True, True),
    "CLIP-B text": Shape(512, 8, 2048, 12, 16, "quick_gelu", 0, 0, 512, 256, causal=True),
}
"""Published models, each with the batch of its report."""


@dataclass(frozen=True, slots=True)
class Step:
    """An operator call of a model, with meta tensors; a forward makes it ``times`` times."""

    label: str
    op: str
    tensors: dict[str, Tensor]
    scalars: dict[str, Any]
    times: int
    lengths: tuple[int, ...]

    def calls(self, target: Target) -> list[Call]:
        return OPERATORS[self.op].calls(target, **self.tensors, **self.scalars)

    def cost(self) -> Cost:
        return OPERATORS[self.op].cost(**self.tensors, **self.scalars, lengths=self.lengths)


def steps(shape: Shape, dtype: torch.dtype, batch: int | None = None) -> Iterator[Step]:
    """The pooled forward of a tower; equal steps come once.

    With int8 the products that may be in int8 are, and the rest is fp16. Text is never in int8.
    """
    int8, b = dtype == torch.int8, batch or shape.batch
    if int8:
        assert not shape.causal, "text is never in int8"
        dtype = torch.float16
    m, c, f = b * shape.tokens, shape.width, shape.mlp
    up = 2 * f if shape.gated else f

    def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def fp32(*size: int) -> Tensor:
        return empty(*size, dtype=torch.float32)

    def int32(*size: int) -> Tensor:
        return empty(*size, dtype=torch.int32)

    def step(label: str, op: str, times: int, tensors: dict[str, Tensor], **scalars: Any) -> Step:
        return Step(label, op, tensors, scalars, times, (shape.tokens,) * b)

    def linear(label: str, times: int, rows: int, n: int, k: int, **options: Any) -> Step:
        """``options``: norm, residual, gathered rows of either, and the operator's own scalars."""
        tensors = {"out": empty(rows, n // 2 if options.get("gated") else n), "x": empty(rows, k)}
        tensors |= {"weight": empty(n, k), "bias": fp32(n)}
        if options.pop("norm", False):
            tensors |= {"x_stats": fp32(*stats_shape(rows, k)), "row_sums": fp32(n)}
            options["norm_eps"] = 1e-6
        if options.pop("gathered", False):
            if "norm_eps" in options:
                tensors |= {"x": empty(m, k), "x_stats": stats, "rows": int32(rows)}
            else:
                tensors |= {"residual": empty(m, n), "residual_rows": int32(rows)}
        if options.pop("residual", False):
            tensors |= {"residual": tensors.get("residual", tensors["out"])}
            if options.pop("stats", True):
                tensors |= {"stats": fp32(*stats_shape(rows, n))}
            if shape.layer_scale:
                tensors["scale"] = fp32(n)
        return step(label, "linear", times, tensors, **options)

    def codes(label: str, times: int) -> tuple[Step, dict[str, Tensor]]:
        """The step that quantizes the stream, and its outputs as a product's inputs."""
        x, x_scale = empty(m, c, dtype=torch.int8), fp32(m)
        tensors = {"out": x, "out_scale": x_scale, "x": empty(m, c), "smooth": fp32(c)}
        made = step(f"{label} codes", "norm_quant", times, tensors, eps=1e-6)
        return made, {"x": x, "x_scale": x_scale}

    def weights(n: int, k: int) -> dict[str, Tensor]:
        tensors = {"weight": empty(n, k, dtype=torch.int8), "weight_scale": fp32(n)}
        return tensors | {"bias": fp32(n)}

    def product(label: str, times: int, n: int) -> Iterator[Step]:
        """A linear of the normalized stream in int8."""
        quantized, inputs = codes(label, times)
        yield quantized
        yield step(label, "linear_int8", times, {"out": empty(m, n)} | inputs | weights(n, c))

    def mlp(times: int) -> Iterator[Step]:
        """up and down in int8. Only the last block reads the stream's statistics."""
        group = group_columns(shape.gated)
        hidden = {"x": empty(m, f, dtype=torch.int8), "x_scale": fp32(f // group, m)}
        quantized, inputs = codes("up", times)
        yield quantized
        tensors = {"out": hidden["x"], "out_scale": hidden["x_scale"]} | inputs | weights(up, c)
        activation = {"activation": shape.activation, "gated": shape.gated}
        yield step("up", "linear_int8", times, tensors, **activation)
        out = empty(m, c)
        tensors = {"out": out, "residual": out, "shift": fp32(f // group, c)} | hidden
        tensors |= weights(c, f) | ({"scale": fp32(c)} if shape.layer_scale else {})
        yield step("down", "linear_int8_grouped", times - 1, tensors, group=group)
        tensors = tensors | {"stats": stats}
        yield step("down, stats", "linear_int8_grouped", 1, tensors, group=group)

    stats, lengths = fp32(*stats_shape(m, c)), int32(b + 1)
    if shape.patch:
        padded = -(-3 * shape.patch**2 // 64) * 64
        pixels = empty(b, shape.side, shape.side, 3, dtype=torch.uint8)
        tensors = {"out": empty(m, c), "pixels": pixels, "weight": empty(c, padded)}
        tensors |= {"table": fp32(shape.tokens, c)} | ({} if int8 else {"stats": stats})
        prefix = shape.tokens - (shape.side // shape.patch) ** 2
        patch = (shape.patch, shape.patch)
        yield step("patch_embed", "patch_embed", 1, tensors, patch=patch, channels=3, prefix=prefix)
    else:
        ids = int32(m)
        tensors = {"out": empty(m, c), "ids": ids, "positions": ids, "stats": stats}
        tensors |= {"token": empty(49408, c), "position": fp32(77, c)}
        yield step("text_embed", "text_embed", 1, tensors)
    n = shape.layers - 1
    act = {"activation": shape.activation, "gated": shape.gated, "norm": True}
    if int8:
        yield from product("qkv", n, 3 * c)
    else:
        yield linear("qkv", n, m, 3 * c, c, norm=True)
    tensors = {"out": empty(m, c), "qkv": empty(m, 3 * c), "cu_seqlens": lengths}
    scalars = {"heads": shape.heads, "causal": shape.causal, "max_seqlen": shape.tokens}
    scalars["equal_lengths"] = not shape.causal
    yield step("attention", "attention", n, tensors, **scalars)
    yield linear("out", n, m, c, c, residual=True, stats=not int8)
    if int8:
        yield from mlp(n)
        yield from product("last kv", 1, 2 * c)
    else:
        yield linear("up", n, m, up, c, **act)
        yield linear("down", n, m, c, f, residual=True)
        yield linear("last kv", 1, m, 2 * c, c, norm=True)
    yield linear("last q", 1, b, c, c, norm=True, gathered=True)
    tensors = {"out": empty(b, c), "q": empty(b, c), "kv": empty(m, 2 * c), "cu_seqlens": lengths}
    scalars = {"heads": shape.heads, "max_seqlen": shape.tokens}
    yield step("last attention", "attention_one", 1, tensors, **scalars)
    yield linear("last out", 1, b, c, c, residual=True, gathered=True)
    yield linear("last up", 1, b, up, c, **act)
    yield linear("last down", 1, b, c, f, residual=True)
    tensors = {"out": fp32(b, shape.embedding), "status": int32(b), "x": empty(b, c)}
    tensors |= {"weight": empty(shape.embedding, c), "bias": fp32(shape.embedding)}
    yield step("pool", "pool", 1, tensors, eps=1e-6)


def table(name: str, arch: int, dtype: torch.dtype, batch: int | None = None) -> Iterator[str]:
    """The report of a model on an architecture, line by line."""
    card, shape = CARDS[arch], SHAPES[name]
    target = Target(arch, card.sms)
    model_steps = list(steps(shape, dtype, batch))
    calls = [step.calls(target) for step in model_steps]
    codes = iter(compile_all([call for step_calls in calls for call in step_calls], arch))
    yield f"{name}, batch {batch or shape.batch}, {dtype_name(dtype)}, sm_{arch} ({card.name})"
    yield (
        "launch             x   tile          regs spills  shared blocks  tensor core  TMA LDGSTS"
        "       MFLOP        MB   best us (estimate)"
    )
    seconds = flops = 0.0
    for step, step_calls in zip(model_steps, calls, strict=True):
        cost = step.cost()
        rate = (2 if step.op in INT8 else 1) * card.flops
        best = max(cost.flops / rate, cost.bytes / card.bandwidth)
        seconds, flops = seconds + step.times * best, flops + step.times * cost.flops
        label, cells = step.label, f"{cost.flops / 1e6:12.1f} {cost.bytes / 1e6:9.2f}"
        cells += f" {best * 1e6:10.1f}"
        for call in step_calls:
            yield f"{label:15s} {step.times:4d}   {_code(call, next(codes))} {cells}".rstrip()
            label = cells = ""
    images = (batch or shape.batch) / seconds
    peak = (2 if dtype == torch.int8 else 1) * card.flops
    yield (
        f"estimate: {seconds * 1e3:.3f} ms at best, {images:,.0f} a second, "
        f"{flops / seconds / 1e12:.0f} TFLOP/s of {peak / 1e12:.0f}; not a measurement"
    )


def _code(call: Call, code: KernelCode) -> str:
    config = call.config
    sides = (config.block_m, config.block_n, config.block_k)
    tile = "x".join(str(side) for side in sides if side) or "-"
    products = " ".join(f"{count} {opcode}" for opcode, count in code.tensor_core.items()) or "-"
    maps = code.instructions[TMA_LOAD] + code.instructions[TMA_STORE]
    return (
        f"{tile:12s} {code.registers:5d} {code.spills:6d} {code.shared:7d} {code.blocks:6d} "
        f"{products:>12s} {maps:4d} {code.instructions[ASYNC_COPY]:6d}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", choices=CARDS, default=[90, 80])
    parser.add_argument("--model", nargs="*", choices=SHAPES, default=["ViT-B/16", "CLIP L/14"])
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "int8"), default="float16")
    parser.add_argument("--batch", type=int, help="instead of the model's own")
    options = parser.parse_args(arguments)
    for name in options.model:
        for arch in options.arch:
            print(*table(name, arch, getattr(torch, options.dtype), options.batch), "", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
