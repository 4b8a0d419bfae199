"""What the kernels compile to and what a model could take: `python -m vitrail_kernels.report`

For every launch of a model: registers, spills, shared memory, blocks that fit a multiprocessor,
tensor-core, TMA and LDGSTS instructions, FLOPs and bytes; then the roofline, an estimate: each
launch takes the longer of its FLOPs at the card's dense 16-bit peak and its bytes at the card's
bandwidth. No GPU is needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail_kernels import OPERATORS
from vitrail_kernels.compile import Compiled, compile_all
from vitrail_kernels.cost import Cost
from vitrail_kernels.device.stats import stats_shape
from vitrail_kernels.launch import Call, Target
from vitrail_kernels.sass import ASYNC_COPY, TMA_LOAD, TMA_STORE


class Card(NamedTuple):
    """A GPU of an architecture: multiprocessors, dense fp16 FLOP/s with fp32 sums, bytes/s."""

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
"""By architecture, as NVIDIA's data sheets have them."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A tower: ``tokens`` a sequence, ``patch`` pixels a side (0: text), ``embedding`` numbers."""

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
"""Published models, with the batch they are reported for."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One operator call of a model, made of meta tensors, and how often a forward makes it."""

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


def launches(shape: Shape, dtype: torch.dtype, batch: int | None = None) -> Iterator[Launch]:
    """The pooled forward of a tower, equal launches once."""
    b = batch or shape.batch
    m, c, f = b * shape.tokens, shape.width, shape.mlp
    up = 2 * f if shape.gated else f

    def empty(*size: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=kind, device="meta")

    def wide(*size: int) -> Tensor:
        return empty(*size, kind=torch.float32)

    def launch(label: str, op: str, times: int, given: dict[str, Tensor], **scalars: Any) -> Launch:
        return Launch(label, op, given, scalars, times, (shape.tokens,) * b)

    def linear(label: str, times: int, rows: int, n: int, k: int, **more: Any) -> Launch:
        """``more``: norm, residual, gathered rows of either, and the operator's own scalars."""
        given = {"out": empty(rows, n // 2 if more.get("gated") else n), "x": empty(rows, k)}
        given |= {"weight": empty(n, k), "bias": wide(n)}
        if more.pop("norm", False):
            given |= {"x_stats": wide(*stats_shape(rows, k)), "row_sums": wide(n)}
            more["norm_eps"] = 1e-6
        if more.pop("gathered", False):
            whole = empty(m, k if "norm_eps" in more else n)
            picked = "rows" if "norm_eps" in more else "residual_rows"
            given |= {"x": whole, "x_stats": stats} if picked == "rows" else {"residual": whole}
            given[picked] = empty(rows, kind=torch.int32)
        if more.pop("residual", False):
            given |= {"residual": given.get("residual", given["out"])}
            given |= {"stats": wide(*stats_shape(rows, n))}
            if shape.layer_scale:
                given["scale"] = wide(n)
        return launch(label, "linear", times, given, **more)

    stats, lengths = wide(*stats_shape(m, c)), empty(b + 1, kind=torch.int32)
    if shape.patch:
        padded = -(-3 * shape.patch**2 // 64) * 64
        pixels = empty(b, shape.side, shape.side, 3, kind=torch.uint8)
        given = {"out": empty(m, c), "pixels": pixels, "weight": empty(c, padded)}
        given |= {"table": wide(shape.tokens, c), "stats": stats}
        prefix = shape.tokens - (shape.side // shape.patch) ** 2
        patch = (shape.patch, shape.patch)
        yield launch("patch_embed", "patch_embed", 1, given, patch=patch, channels=3, prefix=prefix)
    else:
        ids = empty(m, kind=torch.int32)
        given = {"out": empty(m, c), "ids": ids, "positions": ids, "stats": stats}
        given |= {"token": empty(49408, c), "position": wide(77, c)}
        yield launch("text_embed", "text_embed", 1, given)
    n = shape.layers - 1
    act = {"activation": shape.activation, "gated": shape.gated, "norm": True}
    yield linear("qkv", n, m, 3 * c, c, norm=True)
    given = {"out": empty(m, c), "qkv": empty(m, 3 * c), "cu_seqlens": lengths}
    scalars = {"heads": shape.heads, "causal": shape.causal, "max_seqlen": shape.tokens}
    scalars["equal_lengths"] = not shape.causal
    yield launch("attention", "attention", n, given, **scalars)
    yield linear("out", n, m, c, c, residual=True)
    yield linear("up", n, m, up, c, **act)
    yield linear("down", n, m, c, f, residual=True)
    yield linear("last kv", 1, m, 2 * c, c, norm=True)
    yield linear("last q", 1, b, c, c, norm=True, gathered=True)
    given = {"out": empty(b, c), "q": empty(b, c), "kv": empty(m, 2 * c), "cu_seqlens": lengths}
    scalars = {"heads": shape.heads, "max_seqlen": shape.tokens}
    yield launch("last attention", "attention_one", 1, given, **scalars)
    yield linear("last out", 1, b, c, c, residual=True, gathered=True)
    yield linear("last up", 1, b, up, c, **act)
    yield linear("last down", 1, b, c, f, residual=True)
    given = {"out": wide(b, shape.embedding), "status": empty(b, kind=torch.int32)}
    given |= {"x": empty(b, c), "weight": empty(shape.embedding, c), "bias": wide(shape.embedding)}
    yield launch("pool", "pool", 1, given, eps=1e-6)


def table(name: str, arch: int, dtype: torch.dtype, batch: int | None = None) -> Iterator[str]:
    """The report of one model on one architecture, line by line."""
    card, shape = CARDS[arch], SHAPES[name]
    target = Target(arch, card.sms)
    every = list(launches(shape, dtype, batch))
    calls = [launch.calls(target) for launch in every]
    compiled = iter(compile_all([call for some in calls for call in some], arch))
    kind = str(dtype).removeprefix("torch.")
    yield f"{name}, batch {batch or shape.batch}, {kind}, sm_{arch} ({card.name})"
    yield (
        "launch             x   tile          regs spills  shared blocks  tensor core  TMA LDGSTS"
        "       MFLOP        MB   best us (estimate)"
    )
    seconds = flops = 0.0
    for launch, some in zip(every, calls, strict=True):
        cost = OPERATORS[launch.op].cost(**launch.tensors, **launch.scalars, lengths=launch.lengths)
        best = max(cost.flops / card.flops, cost.bytes / card.bandwidth)
        seconds, flops = seconds + launch.times * best, flops + launch.times * cost.flops
        for number, call in enumerate(some):
            code = _code(call, next(compiled))
            cells = f"{cost.flops / 1e6:12.1f} {cost.bytes / 1e6:9.2f} {best * 1e6:10.1f}"
            label = launch.label if number == 0 else ""
            yield f"{label:15s} {launch.times:4d}   {code} {cells if number == 0 else ''}".rstrip()
    images = (batch or shape.batch) / seconds
    yield (
        f"estimate: {seconds * 1e3:.3f} ms at best, {images:,.0f} a second, "
        f"{flops / seconds / 1e12:.0f} TFLOP/s of {card.flops / 1e12:.0f}; not a measurement"
    )


def _code(call: Call, found: Compiled) -> str:
    config = call.config
    sides = (config.block_m, config.block_n, config.block_k)
    tile = "x".join(str(side) for side in sides if side) or "-"
    used = " ".join(f"{count} {opcode}" for opcode, count in found.tensor_core.items()) or "-"
    maps = found.instructions[TMA_LOAD] + found.instructions[TMA_STORE]
    return (
        f"{tile:12s} {found.registers:5d} {found.spills:6d} {found.shared:7d} {found.blocks:6d} "
        f"{used:>12s} {maps:4d} {found.instructions[ASYNC_COPY]:6d}"
    )


def main(given: Sequence[str] | None = None) -> int:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="vitrail_kernels.report", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", choices=CARDS, default=[90, 80])
    parser.add_argument("--model", nargs="*", choices=SHAPES, default=["ViT-B/16", "CLIP L/14"])
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--batch", type=int, help="instead of the model's own")
    options = parser.parse_args(given)
    for name in options.model:
        for arch in options.arch:
            print(*table(name, arch, getattr(torch, options.dtype), options.batch), "", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
