"""int8 against our own fp16, in the same run: the products of a block, and whole image towers.

`python benchmarks/quantized.py`, or with the beginning of some cases' names; writes int8.json. In
int8 "vitrail" quantizes the rows of the stream, where fp16 normalizes them, and multiplies;
"vitrail product" and "vitrail codes" are its two launches. down sums groups of 128 columns;
"vitrail groups of 256" and "vitrail rows" (one scale a row, and no residual) tell the price of
groups. Codes and weights are random: they cost as much as those of a trained model.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ceilings import ceilings, dtype_of, timer_of
from harness import OURS, Case, Keep, Results, Run, device_timer, host_timer, measure, tolerances
from problems import linear
from safetensors.torch import save_file
from shapes import VISION
from suite import arguments, results_folder, run_suite
from torch import Tensor

from vitrail.checkpoint.header import read_header
from vitrail.checkpoint.tensors import Source
from vitrail.plan.vision import vision_pooled
from vitrail.runtime import RUNNERS
from vitrail.runtime.towers import VisionTower
from vitrail.spec import ModelSpec, VisionSpec
from vitrail.weights.folding import load_weights
from vitrail_kernels import OPERATORS
from vitrail_kernels.ops.linear_int8 import group_columns
from vitrail_kernels.ops.linear_int8_grouped import FLOAT_OF_INTEGER

MODELS = ("B/16", "L/14")
BATCHES = (256, 64)
SAMPLE = 2048
"""Rows of a result that are compared with the reference."""
PEER = "float16"


# -- products --------------------------------------------------------------------------------------


def _codes(device: str, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)


def _scales(device: str, *shape: int, size: float = 0.01) -> Tensor:
    return (torch.rand(shape, device=device) + 0.5) * size


def _weights(device: str, n: int, k: int) -> dict[str, Tensor]:
    scale = _scales(device, n, size=0.02 * k**-0.5)
    bias = torch.randn(n, device=device)
    return {"weight": _codes(device, n, k), "weight_scale": scale, "bias": bias}


def _run(device: str, op: str, tensors: Mapping[str, Tensor], **scalars: Any) -> Run:
    operator = OPERATORS[op]
    function = operator.launch if device == "cuda" else operator.reference

    def run() -> Mapping[str, Tensor]:
        function(**tensors, **scalars)
        return tensors

    return run


def _check(op: str, tensors: Mapping[str, Tensor], **scalars: Any) -> None:
    """Compare the first rows of what was written with the reference: codes by the rule for codes,
    values by the rule for kernels."""
    rules, given = tolerances(), {}
    for name, tensor in tensors.items():
        if name in ("x_scale", "out_scale") and tensor.dim() == 2:
            given[name] = tensor[:, :SAMPLE].contiguous()
        elif name in ("out", "x", "x_scale", "out_scale", "residual"):
            given[name] = tensor[:SAMPLE]
        else:
            given[name] = tensor
    fresh = {name: torch.empty_like(given[name]) for name in ("out", "out_scale") if name in given}
    OPERATORS[op].reference(**given | fresh, **scalars)
    out, expected = given["out"], fresh["out"]
    if out.dtype == torch.int8:
        rules.assert_codes(out, expected, name=op)
        return
    exact = torch.empty_like(expected, dtype=torch.float64)
    OPERATORS[op].reference(**given | {"out": exact}, **scalars)
    rules.assert_close(out, exact, None if out.dtype == torch.float32 else expected, name=op)


def product_case(
    device: str, m: int, n: int, k: int, activation: str | None = None, codes: bool = False
) -> Case:
    """qkv, or up with ``codes``: quantizing rows and a product, against a linear with a norm."""
    x, x_scale = _codes(device, m, k), _scales(device, m)
    stream = torch.randn(m, k, device=device).to(dtype_of(device))
    smooth = torch.rand(k, device=device) + 0.5
    quantized = {"out": x, "out_scale": x_scale, "x": stream, "smooth": smooth}
    dtype = torch.int8 if codes else dtype_of(device)
    tensors = {"out": torch.empty(m, n, dtype=dtype, device=device), "x": x, "x_scale": x_scale}
    tensors |= _weights(device, n, k)
    if codes:
        tensors["out_scale"] = torch.empty(n // group_columns(False), m, device=device)
    quantize = _run(device, "norm_quant", quantized, eps=1e-6)
    multiply = _run(device, "linear_int8", tensors, activation=activation)

    def both() -> None:
        quantize()
        multiply()

    peer = linear(device, m, n, k, norm_eps=1e-6, activation=activation)
    fp16 = OPERATORS["linear"].launch if device == "cuda" else OPERATORS["linear"].reference
    variants: dict[str, Run] = {
        OURS: both,
        f"{OURS} product": multiply,
        f"{OURS} codes": quantize,
        PEER: functools.partial(peer.run, fp16),
    }

    def check(name: str, result: object) -> None:
        if name in (OURS, f"{OURS} codes"):
            _check("norm_quant", quantized, eps=1e-6)
        if name in (OURS, f"{OURS} product"):
            _check("linear_int8", tensors, activation=activation)

    flops = dict.fromkeys((OURS, f"{OURS} product", PEER), 2 * m * n * k)
    moved = OPERATORS["linear_int8"].cost(**tensors).bytes
    reading = OPERATORS["norm_quant"].cost(**quantized).bytes
    fp16_bytes = OPERATORS["linear"].cost(**peer.tensors).bytes
    sizes = {OURS: moved + reading, f"{OURS} product": moved, f"{OURS} codes": reading}
    return Case(variants, check, flops=flops, bytes=sizes | {PEER: fp16_bytes})


def down_case(device: str, m: int, n: int, k: int, layer_scale: bool = False) -> Case:
    """down with groups of 128 and 256 columns and with a scale for each row, against fp16."""
    variants: dict[str, Run] = {}
    checks: dict[str, Callable[[], None]] = {}
    sizes: dict[str, int] = {}
    residual = torch.randn(m, n, device=device).to(dtype_of(device))
    x, weights = _codes(device, m, k), _weights(device, n, k)
    scale = {"scale": torch.randn(n, device=device)} if layer_scale else {}
    for name, group in ((OURS, 128), (f"{OURS} groups of 256", 256)):
        sums = weights["weight"].float().view(n, -1, group).sum(dim=2).t()
        tensors = {
            "out": torch.empty_like(residual),
            "x": x,
            "x_scale": _scales(device, k // group, m),
            "shift": (FLOAT_OF_INTEGER - 128 * sums).contiguous(),
            "residual": residual,
            **weights,
            **scale,
        }
        variants[name] = _run(device, "linear_int8_grouped", tensors, group=group)
        checks[name] = functools.partial(_check, "linear_int8_grouped", tensors, group=group)
        sizes[name] = OPERATORS["linear_int8_grouped"].cost(**tensors).bytes
    name = f"{OURS} rows"
    tensors = {"out": torch.empty_like(residual), "x": x, "x_scale": _scales(device, m), **weights}
    variants[name] = _run(device, "linear_int8", tensors)
    checks[name] = functools.partial(_check, "linear_int8", tensors)
    sizes[name] = OPERATORS["linear_int8"].cost(**tensors).bytes
    peer = linear(device, m, n, k, residual=True, scale=layer_scale)
    fp16 = OPERATORS["linear"].launch if device == "cuda" else OPERATORS["linear"].reference
    variants[PEER] = functools.partial(peer.run, fp16)
    sizes[PEER] = OPERATORS["linear"].cost(**peer.tensors).bytes

    def check(name: str, result: object) -> None:
        if name in checks:
            checks[name]()

    flops = dict.fromkeys(variants, 2 * m * n * k)
    return Case(variants, check, flops=flops, bytes=sizes)


# -- towers ----------------------------------------------------------------------------------------


def random_tower(spec: VisionSpec, device: str) -> VisionTower:
    """A tower with random weights, served by the runner that serves a model."""
    model = ModelSpec("benchmark", "benchmark", vision=spec)
    dice = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in model.tensor_shapes().items():
        columns = shape[1] if len(shape) > 1 else 100
        if name.endswith(".codes"):
            tensors[name] = torch.randint(-127, 128, shape, dtype=torch.int8, generator=dice)
        elif name.endswith(".scale") and f"{name.removesuffix('scale')}codes" in tensors:
            inputs = tensors[f"{name.removesuffix('scale')}codes"].shape[1]
            tensors[name] = (torch.rand(shape, generator=dice) + 0.5) * inputs**-0.5 / 73
        else:
            offset = name.endswith(".smooth") or ("norm" in name and name.endswith("weight"))
            tensors[name] = torch.randn(shape, generator=dice) * columns**-0.5 + offset
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(tensors, path)
        sources = {name: Source(entry) for name, entry in read_header(path).items()}
        channels = torch.ones(spec.channels, dtype=torch.float64)
        dtype = torch.float16 if device == "cuda" else torch.float32
        weights = load_weights(model, sources, dtype, (channels / 64, -2 * channels))
    name = "native" if device == "cuda" else "torch"
    return VisionTower(spec, None, RUNNERS[name](weights, dtype, torch.device(device)))


def tower_case(device: str, spec: VisionSpec, batch: int) -> Case:
    """Images on the device to embeddings, in int8 and in fp16."""
    vision = ModelSpec("benchmark", "benchmark", vision=spec)
    int8 = vision.with_int8(spec.blocks.int8_candidates).vision
    assert int8 is not None, "the spec has an image tower"
    torch.manual_seed(1)
    shape = (batch, *spec.image, spec.channels)
    pixels = torch.randint(256, shape, device=device).to(torch.uint8)
    towers = {OURS: random_tower(int8, device), PEER: random_tower(spec, device)}

    def embed(tower: VisionTower) -> Tensor:
        return tower.embeddings(pixels)["vision.embedding"]

    def check(name: str, result: Tensor) -> None:
        """Finite, and the first image alone has the bits that it has among the others."""
        assert result.isfinite().all(), f"{name}: not finite"
        alone = towers[name].embeddings(pixels[:1])["vision.embedding"]
        if device == "cuda":  # on a CPU fp32 products depend on their number of rows
            assert torch.equal(alone, result[:1]), f"{name}: other bits alone"

    lengths = [spec.tokens_at(spec.image)] * batch
    flops = vision_pooled(spec, uint8=True).flops(lengths)
    variants = {name: functools.partial(embed, tower) for name, tower in towers.items()}
    counted, items = dict.fromkeys(variants, flops), dict.fromkeys(variants, batch)
    return Case(variants, check, flops=counted, items=items)


# -- the suite -------------------------------------------------------------------------------------


def cases(device: str) -> dict[str, Callable[[], Case]]:
    """Every case by name, the price of down's groups first."""
    products: dict[str, Callable[[], Case]] = {}
    for batch in BATCHES:
        for model in MODELS:
            spec = VISION[model]
            blocks, m = spec.blocks, batch * spec.tokens_at(spec.image)
            c, f, scaled = blocks.width, blocks.mlp, blocks.layer_scale
            builds = {
                "down": functools.partial(down_case, device, m, c, f, scaled),
                "up": functools.partial(product_case, device, m, f, c, blocks.activation, True),
                "qkv": functools.partial(product_case, device, m, 3 * c, c),
                "tower": functools.partial(tower_case, device, spec, batch),
            }
            products |= {f"{model} x {batch} {name}": build for name, build in builds.items()}
    return products


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write ``int8.json``."""
    options = arguments(__doc__, list(cases("meta")), argv)
    bounds, limits = ceilings(options.device)

    def run(name: str, keep: Keep) -> Results:
        if name.endswith("tower"):  # back to back, as a stream of batches comes
            cuda = options.device == "cuda"
            timer = device_timer(10, flush=False) if cuda else host_timer()
        else:
            timer = timer_of(options.device)
        rounds = 20 if options.device == "cuda" else 3
        return measure(cases(options.device)[name](), timer, rounds, 3, limits, keep)

    builds = {name: functools.partial(run, name) for name in options.cases}
    path = results_folder(options.device) / "int8.json"
    return run_suite(path, builds, options.device, options.resume, options.seconds, ceilings=bounds)


if __name__ == "__main__":
    sys.exit(main())
