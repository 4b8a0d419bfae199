"""The best rates of this device: matrix products, copies, attention.

`python benchmarks/ceilings.py` writes ceilings.json. Random data, fp16, PyTorch's own operators.
The other suites give every rate as a part of the first two, which are measured once for a file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Case, Keep, Results, Run, Timer, device_timer, host_timer, measure, tolerances
from suite import arguments, results_folder, run_suite
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HEAD_DIM = 64
BACKENDS = {
    name.lower().removesuffix("_attention"): backend
    for name, backend in SDPBackend.__members__.items()
    if name not in ("ERROR", "OVERRIDEABLE")
}
"""Every backend of `scaled_dot_product_attention`, by its short name."""


def dtype_of(device: str) -> torch.dtype:
    """Kernels are measured in fp16; the rehearsal on a CPU is in fp32."""
    return torch.float32 if device == "cpu" else torch.float16


def random(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype_of(device))


def with_backend(backend: SDPBackend, run: Run) -> Run:
    """``run`` with that backend. Raises RuntimeError if it does not support the shapes."""

    def inside() -> Tensor:
        with sdpa_kernel([backend]):
            result: Tensor = run()
        return result

    return inside


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.t()


def matmul(device: str) -> Case:
    """Square products."""
    sizes = (4096, 8192, 16384) if device == "cuda" else (256, 384)
    pairs = {f"{n}": (random(device, n, n), random(device, n, n)) for n in sizes}

    def check(name: str, result: Tensor) -> None:
        a, b = pairs[name]
        few, rules = a[:64], tolerances()
        with rules.reference_numbers():
            reference = few.double() @ b.double().t()
        peer = few @ b.t() if device == "cuda" else None
        rules.assert_close(result[:64], reference, peer, what="model")

    variants = {name: partial(_product, a, b) for name, (a, b) in pairs.items()}
    return Case(variants, check, flops={name: 2 * int(name) ** 3 for name in pairs})


def copy(device: str) -> Case:
    """From device memory to device memory: bytes read and bytes written."""
    elements = (1 << 30) if device == "cuda" else (1 << 20)
    source = torch.randn(elements, device=device)
    target = torch.full_like(source, float("nan"))

    def check(name: str, result: Tensor) -> None:
        assert torch.equal(result, source), "the copy differs"

    name = f"{elements * 4 >> 20} MiB"
    return Case({name: lambda: target.copy_(source)}, check, bytes={name: 8 * elements})


def attention(device: str) -> Case:
    """Head dimension 64, full, by every backend; as many tokens in all whatever the length."""
    lengths, tokens = ((512, 2048, 8192), 65536) if device == "cuda" else ((64,), 256)
    heads = 16 if device == "cuda" else 2
    inputs = {n: [random(device, tokens // n, heads, n, HEAD_DIM) for _ in "qkv"] for n in lengths}
    variants: dict[str, Run] = {}
    flops: dict[str, int] = {}
    for n, (q, k, v) in inputs.items():
        for name, backend in BACKENDS.items():
            if name == "math" and n > 2048:  # its scores alone would take tens of gigabytes
                continue
            run = partial(F.scaled_dot_product_attention, q, k, v)
            variants[f"{name} {n}"] = with_backend(backend, run)
            flops[f"{name} {n}"] = 4 * heads * tokens * n * HEAD_DIM

    def check(name: str, result: Tensor) -> None:
        q, k, v = (x[:1, :2] for x in inputs[int(name.split()[1])])
        with sdpa_kernel([SDPBackend.MATH]):
            reference = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
            peer = F.scaled_dot_product_attention(q, k, v)
        rows, expected, half = (x.flatten(0, 2) for x in (result[:1, :2], reference, peer))
        half_peer = half if device == "cuda" else None
        tolerances().assert_close(rows, expected, half_peer, what="model")

    return Case(variants, check, flops=flops)


CASES: dict[str, Callable[[str], Case]] = {"matmul": matmul, "copy": copy, "attention": attention}
BOUNDS = ("matmul", "copy")


def timer_of(device: str) -> Timer:
    return device_timer() if device == "cuda" else host_timer()


def _measured(name: str, device: str, keep: Keep = lambda _: None) -> Results:
    return measure(CASES[name](device), timer_of(device), rounds=11, keep=keep)


def best(results: Results, rate: str) -> float:
    """The largest ``rate`` of any variant, or 0."""
    return max((variant.get(rate, 0.0) for variant in results["variants"].values()), default=0.0)


def ceilings(device: str, folder: Path | None = None) -> tuple[Results, dict[str, float]]:
    """Rates that bound a kernel, and of them the best: "tflops" of a matmul, "gbs" of a copy.

    They are taken from ``ceilings.json`` in ``folder`` (`results_folder`) if it holds them of the
    same sources, else measured now and written there: once a call, not once a suite.
    """
    path = (folder or results_folder(device)) / "ceilings.json"
    run_suite(path, {name: partial(_measured, name, device) for name in BOUNDS}, device, True)
    kept = json.loads(path.read_text())["results"]
    bounds = {name: kept[name] for name in BOUNDS}
    return bounds, {"tflops": best(bounds["matmul"], "tflops"), "gbs": best(bounds["copy"], "gbs")}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write ``ceilings.json``."""
    options = arguments(__doc__, list(CASES), argv)
    cases = {name: partial(_measured, name, options.device) for name in options.cases}
    path = results_folder(options.device) / "ceilings.json"
    return run_suite(path, cases, options.device, options.resume, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
