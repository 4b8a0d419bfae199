"""Operators with random inputs at a model's shapes, and PyTorch functions for the same work.

Everything is a function of a device; on "meta" it takes no memory, for compiling alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from ceilings import BACKENDS, dtype_of, with_backend
from harness import Run
from shapes import KERNEL_BATCHES, TEXT, VISION, captions
from torch import Tensor

from vitrail.spec import VisionSpec
from vitrail.weights.layout import PATCH_MULTIPLE
from vitrail_kernels import OPERATORS
from vitrail_kernels.device.stats import stats_ref, stats_shape


@dataclass(frozen=True)
class Problem:
    """An operator with its inputs: ``peers`` do the same, ``cublas`` a part of it.

    ``rows`` brings a peer's result into the shape of ``out``.
    """

    op: str
    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Any]
    peers: Mapping[str, Run]
    lengths: Sequence[int] = ()
    rows: Callable[[Tensor], Tensor] | None = None

    def run(self, function: Callable[..., None]) -> Tensor:
        function(**self.tensors, **self.scalars)
        return self.tensors["out"]

    def reference(self, dtype: torch.dtype | None = None) -> Tensor:
        """The operator's reference, with everything in ``dtype`` or, without, as it is."""
        given = {
            name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            for name, tensor in self.tensors.items()
            if name != "stats"
        }
        given["out"] = torch.empty_like(given["out"])
        OPERATORS[self.op].reference(**given, **self.scalars)
        return given["out"]


# -- inputs and peers ------------------------------------------------------------------------------


def _normal(device: str, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).to(dtype_of(device))


def _unwritten(device: str, *shape: int, wide: bool = False) -> Tensor:
    dtype = torch.float32 if wide else dtype_of(device)
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def _quick_gelu(y: Tensor) -> Tensor:
    return y * torch.sigmoid(1.702 * y)


@functools.cache
def _torch_linear(norm_eps: float | None, activation: str | None) -> Callable[..., Tensor]:
    act = {None: None, "gelu": F.gelu, "quick_gelu": _quick_gelu}[activation]

    def whole(
        x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        if norm_eps is not None:
            x = F.layer_norm(x, (x.shape[1],), eps=norm_eps)
        y = F.linear(x, weight, bias)
        y = y if act is None else act(y)
        y = y if scale is None else y * scale
        return y if residual is None else residual + y

    return whole


def linear(
    device: str,
    m: int,
    n: int,
    k: int,
    *,
    norm_eps: float | None = None,
    activation: str | None = None,
    residual: bool = False,
    scale: bool = False,
) -> Problem:
    """A linear of a block; with ``residual`` it writes the statistics of its result too."""
    t = {
        "out": _unwritten(device, m, n),
        "x": _normal(device, m, k),
        "weight": _normal(device, n, k, scale=k**-0.5),
        "bias": _normal(device, n).float(),
    }
    if norm_eps is not None:
        t["x_stats"] = _unwritten(device, *stats_shape(m, k), wide=True)
        stats_ref(t["x_stats"], t["x"])
        t["row_sums"] = t["weight"].float().sum(1)
    if residual:
        t["residual"] = _normal(device, m, n)
        t["stats"] = _unwritten(device, *stats_shape(m, n), wide=True)
    if scale:
        t["scale"] = _normal(device, n).float()
    bias, half = t["bias"].to(dtype_of(device)), t["scale"].to(dtype_of(device)) if scale else None
    given = (t["x"], t["weight"], bias, half, t.get("residual"))
    whole = _torch_linear(norm_eps, activation)
    peers: dict[str, Run] = {"torch": lambda: whole(*given)}
    if device == "cuda":
        fused = torch.compile(whole, dynamic=False)
        peers["compile"] = lambda: fused(*given)
    peers["cublas"] = lambda: F.linear(*given[:3])
    return Problem("linear", t, {"norm_eps": norm_eps, "activation": activation}, peers)


def _backends(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> dict[str, Run]:
    """Every backend over (B, T, H, E) tensors, laid out as transformers hands them over."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def run() -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=math.log(2))
        return out.transpose(1, 2)

    return {name: with_backend(backend, run) for name, backend in BACKENDS.items()}


def _qkv(device: str, m: int, heads: int, width: int) -> Tensor:
    """(M, 3 C), the scale and log2(e) in the queries as the engine's weights have them."""
    qkv = _normal(device, m, 3 * width)
    qkv[:, :width] *= (width // heads) ** -0.5 / math.log(2)
    return qkv


def _starts(device: str, lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def attention(device: str, batch: int, tokens: int, heads: int, width: int) -> Problem:
    """Full attention of equally long sequences."""
    qkv = _qkv(device, batch * tokens, heads, width)
    split = qkv.view(batch, tokens, 3, heads, width // heads)
    q, k, v = (split[:, :, part].contiguous() for part in range(3))
    lengths = [tokens] * batch
    t = {"out": _unwritten(device, batch * tokens, width), "qkv": qkv}
    t["cu_seqlens"] = _starts(device, lengths)
    scalars = {"heads": heads, "causal": False, "max_seqlen": tokens, "equal_lengths": True}
    return Problem("attention", t, scalars, _backends(q, k, v), lengths)


def text_attention(device: str, lengths: Sequence[int], heads: int, width: int) -> Problem:
    """Causal attention of packed texts; the peers pad to the longest."""
    qkv = _qkv(device, sum(lengths), heads, width)
    longest, batch = max(lengths), len(lengths)
    real = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
    padded = qkv.new_zeros(batch, longest, 3 * width)
    if device != "meta":
        padded[real] = qkv
    split = padded.view(batch, longest, 3, heads, width // heads)
    q, k, v = (split[:, :, part].contiguous() for part in range(3))
    t = {"out": _unwritten(device, sum(lengths), width), "qkv": qkv}
    t["cu_seqlens"] = _starts(device, lengths)
    scalars = {"heads": heads, "causal": True, "max_seqlen": longest}
    peers = _backends(q, k, v, causal=True)
    return Problem("attention", t, scalars, peers, lengths, rows=lambda y: y[real])


def attention_one(device: str, batch: int, tokens: int, heads: int, width: int) -> Problem:
    """A query a sequence."""
    qkv = _qkv(device, batch * tokens, heads, width)
    t = {
        "out": _unwritten(device, batch, width),
        "q": qkv[:batch, :width].contiguous(),
        "kv": qkv[:, width:].contiguous(),
        "cu_seqlens": _starts(device, [tokens] * batch),
    }
    q = t["q"].view(batch, 1, heads, width // heads)
    k, v = (
        part.contiguous()
        for part in t["kv"].view(batch, tokens, 2, heads, width // heads).unbind(2)
    )
    scalars = {"heads": heads, "max_seqlen": tokens}
    return Problem("attention_one", t, scalars, _backends(q, k, v), [tokens] * batch)


def patch_embed(device: str, spec: VisionSpec, batch: int, uint8: bool) -> Problem:
    """Pixels to tokens; the peers convolve, add positions and put the class token in front."""
    (high, wide), (down, across), c = spec.image, spec.patch, spec.blocks.width
    channels, values, tokens = spec.channels, spec.patch_values, spec.tokens_at(spec.image)
    k = -(-values // PATCH_MULTIPLE) * PATCH_MULTIPLE
    weight = _normal(device, c, k, scale=values**-0.5)
    weight[:, values:] = 0
    table = _normal(device, tokens, c)
    if uint8:
        pixels = torch.randint(256, (batch, high, wide, channels), device=device).to(torch.uint8)
        kernel = weight[:, :values].view(c, down, across, channels).permute(0, 3, 1, 2).contiguous()
    else:
        pixels = _normal(device, batch, channels, high, wide).float()
        kernel = weight[:, :values].view(c, channels, down, across).contiguous()
    given = pixels if uint8 else pixels.to(dtype_of(device))

    def peer() -> Tensor:
        x = given.permute(0, 3, 1, 2).to(kernel.dtype) / 256 if uint8 else given
        y = F.conv2d(x, kernel, stride=spec.patch).flatten(2).transpose(1, 2)
        first = table[: spec.prefix].expand(batch, -1, -1)
        return torch.cat([first, y + table[spec.prefix :]], dim=1)

    t = {"out": _unwritten(device, batch * tokens, c), "pixels": pixels, "weight": weight}
    t |= {
        "table": table.float(),
        "stats": _unwritten(device, *stats_shape(batch * tokens, c), wide=True),
    }
    scalars = {"patch": spec.patch, "channels": channels, "prefix": spec.prefix}
    return Problem("patch_embed", t, scalars, {"torch": peer})


def layernorm(device: str, m: int, width: int, eps: float) -> Problem:
    """CLIP's LayerNorm in front of the blocks."""
    t = {"out": _unwritten(device, m, width), "x": _normal(device, m, width)}
    t |= {name: _normal(device, width).float() for name in ("gamma", "beta")}
    t["stats"] = _unwritten(device, *stats_shape(m, width), wide=True)
    gamma, beta = (t[name].to(dtype_of(device)) for name in ("gamma", "beta"))
    peers = {"torch": lambda: F.layer_norm(t["x"], (width,), gamma, beta, eps)}
    return Problem("layernorm", t, {"eps": eps}, peers)


# -- every case ----------------------------------------------------------------------------------


def vision_problems(spec: VisionSpec, batch: int) -> dict[str, Callable[[str], Problem]]:
    """Every operator of an image tower by name, each a function of the device."""
    blocks, tokens = spec.blocks, spec.tokens_at(spec.image)
    m, c, f = batch * tokens, blocks.width, blocks.mlp
    added: dict[str, Any] = {"residual": True, "scale": blocks.layer_scale}
    builders: dict[str, Callable[[str], Problem]] = {
        "patch_embed float": lambda d: patch_embed(d, spec, batch, uint8=False),
        "patch_embed uint8": lambda d: patch_embed(d, spec, batch, uint8=True),
        "qkv": lambda d: linear(d, m, 3 * c, c, norm_eps=blocks.eps),
        "attention": lambda d: attention(d, batch, tokens, blocks.heads, c),
        "out": lambda d: linear(d, m, c, c, **added),
        "up": lambda d: linear(d, m, f, c, norm_eps=blocks.eps, activation=blocks.activation),
        "down": lambda d: linear(d, m, c, f, **added),
        "attention_one": lambda d: attention_one(d, batch, tokens, blocks.heads, c),
    }
    if spec.pre_norm:
        builders["layernorm"] = lambda d: layernorm(d, m, c, blocks.eps)
    return builders


def problems() -> dict[str, Callable[[str], Problem]]:
    """Every case by name, each a function of the device."""
    builders = {}
    for model, batches in KERNEL_BATCHES.items():
        for batch in batches:
            for name, build in vision_problems(VISION[model], batch).items():
                builders[f"{model} x {batch} {name}"] = build
    for model, spec in TEXT.items():
        heads, width = spec.blocks.heads, spec.blocks.width
        for batch in (256, 1):
            name, lengths = f"{model} x {batch} attention", captions(batch)
            builders[name] = functools.partial(
                text_attention, lengths=lengths, heads=heads, width=width
            )
    return builders
