"""Kernels in which faults are planted, small and with every tile that may differ: whole, partial,
the last."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import emulator
from emulated import int8_cases
from emulated.planted import MapEdit, Subject, guarded
from emulator.call import MAP_TYPES, Compiled, compiled, module_of
from vitrail_kernels import OPERATORS
from vitrail_kernels.compile import source_of
from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.device.stats import stats_ref, stats_shape
from vitrail_kernels.launch import Call, Target


def parameter_names(call: Call, arch: int) -> tuple[str, ...]:
    """Names of the parameters in order, as `Subject.names` has them; Triton's own come last."""
    names: list[str] = []
    for name, type_name in source_of(call, arch)[0].signature.items():
        if type_name == "constexpr":
            continue
        names.append(name)
        if type_name.startswith("tensordesc"):
            rank = len(call.arguments[name].shape)
            names += [f"{name}.{i}" for i in range(2 * rank)]
    extra = len(compiled(call, arch).values) - len(names)
    return (*names, *(f"scratch {i}" for i in range(extra)))


def of_operator(
    operator: str,
    arch: int,
    outputs: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    *,
    reference: Mapping[str, Any],
    launch: Mapping[str, Any],
    checked: tuple[str, ...] = ("out",),
) -> Subject:
    """The kernel that ``operator`` launches. ``reference``: its scalars; ``launch``: arguments of
    the kernel alone."""
    target = Target(arch, 1)
    outputs = {name: guarded(tensor) for name, tensor in outputs.items()}
    inputs = {name: guarded(tensor) for name, tensor in inputs.items()}
    calls = OPERATORS[operator].calls(target, **outputs, **inputs, **reference, **launch)
    (call,) = calls

    def compile(map_edit: MapEdit | None) -> Compiled:
        return compiled(call, arch, map_edit=map_edit)

    def compute(convert: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        empty = {name: convert(torch.empty_like(tensor)) for name, tensor in outputs.items()}
        converted = {name: convert(tensor) for name, tensor in inputs.items()}
        OPERATORS[operator].reference(**empty, **converted, **reference)
        return empty

    expected = {}
    if checked:
        wide = compute(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        own = compute(lambda tensor: tensor)
        expected = {name: (wide[name], own[name]) for name in checked}
    name = f"{operator} sm_{arch}"
    return Subject(name, compile, parameter_names(call, arch), outputs, expected)


LARGE = {
    80: KernelConfig(128, 128, 32, 4, 4, ctas=1),
    90: KernelConfig(128, 128, 64, 8, 3, registers=128, ctas=1),
}
"""The tiles of large batches; one block that takes every tile on sm_90."""


@functools.cache
def linear(arch: int) -> Subject:
    """x W^T + b: 100 rows of 320 by 192 columns, two tiles of 128 x 128."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 320, generator=generator).half()
    weight = (torch.randn(192, 320, generator=generator) * 320**-0.5).half()
    bias = torch.randn(192, generator=generator)
    return of_operator(
        "linear",
        arch,
        {"out": torch.empty(100, 192).half()},
        {"x": x, "weight": weight, "bias": bias},
        reference={},
        launch={"config": LARGE[arch]},
    )


@functools.cache
def attention(arch: int, *lengths: int) -> Subject:
    """A head of 64 columns, sequences of ``lengths`` tokens: 197, 84, 104 and 128 by default, of
    each of which the last tile of keys has another width, or all are whole."""
    lengths = lengths or (197, 84, 104, 128)
    tokens = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(tokens, 3 * 64, generator=generator).half()
    qkv[:, :64] *= 64**-0.5  # queries as folded weights make them: no key stands out
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    config = {80: KernelConfig(64, 64, 0, 4, 2, 168), 90: KernelConfig(64, 64, 0, 4, 2, 128)}
    return of_operator(
        "attention",
        arch,
        {"out": torch.empty(tokens, 64).half()},
        {"qkv": qkv, "cu_seqlens": cu_seqlens},
        reference={"heads": 1, "causal": False, "max_seqlen": max(lengths)},
        launch={"config": config[arch]},
    )


@functools.cache
def layernorm(arch: int) -> Subject:
    """13 rows of 768."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(13, 768, generator=generator).half()
    gamma, beta = torch.randn(2, 768, generator=generator)
    return of_operator(
        "layernorm",
        arch,
        {"out": torch.empty(13, 768).half()},
        {"x": x, "gamma": gamma, "beta": beta},
        reference={"eps": 1e-6},
        launch={},
    )


@functools.cache
def gemm_ptx() -> str:
    """gemm.cu as nvcc compiles it, or "" without nvcc."""
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    if not nvcc:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "gemm.ptx")
        options = ("-std=c++17", "-O3", "-arch=sm_90a", "-lineinfo", "-ptx")
        subprocess.run([nvcc, *options, GEMM, "-o", ptx], check=True)
        return ptx.read_text()


GEMM = Path(__file__).with_name("gemm.cu")
GEMM_SHARED = 4 * (128 + 256) * 64 * 2 + 2 * 4 * 8
"""Bytes: four stages, and two mbarriers for each."""


@functools.cache
def gemm() -> Subject:
    """gemm.cu: 200 rows of 384 by 240 columns, one cluster whose tiles are cut at both edges; the
    six steps use two of the four stages twice. Call `gemm_ptx` first, to see whether it is there.
    """
    generator = torch.Generator().manual_seed(0)
    x = guarded(torch.randn(200, 384, generator=generator).half())
    w = guarded((torch.randn(240, 384, generator=generator) * 384**-0.5).half())
    bias, out = (
        guarded(torch.randn(240, generator=generator)),
        guarded(torch.empty(200, 240).half()),
    )
    names = ("x_map", "w_map", "out", "bias", "m", "n", "k")
    tensors = {"x": x, "w": w, "out": out, "bias": bias}

    def compile(map_edit: MapEdit | None) -> Compiled:
        fields = {
            name: {
                "base": tensor.data_ptr(),
                "element_type": MAP_TYPES[tensor.dtype],
                "dims": list(reversed(tensor.shape)),
                "strides": [tensor.stride(0) * tensor.element_size()],
                "box": [64, 128],
                "swizzle": 3,
            }
            for name, tensor in (("x_map", x), ("w_map", w))
        }
        if map_edit is not None:
            fields = {name: map_edit(name, values) for name, values in fields.items()}
        maps = tuple(emulator.tensor_map(**values) for values in fields.values())
        pointers = tuple(struct.pack("<Q", tensor.data_ptr()) for tensor in (out, bias))
        sizes = tuple(struct.pack("<i", size) for size in (*out.shape, x.shape[1]))
        values = (*maps, *pointers, *sizes)
        return Compiled(module_of(gemm_ptx()), values, tensors, (2,), (384,), GEMM_SHARED)

    expected = {}
    reference = torch.nn.functional.linear(x.double(), w.double(), bias.double())
    expected["out"] = reference, torch.nn.functional.linear(x, w, bias.half())
    return Subject("gemm", compile, names, {"out": out}, expected)


@functools.cache
def gathered(arch: int) -> Subject:
    """residual + scale * gelu(norm(x)[rows] W^T + b), and the statistics of its rows: 90 of 150
    rows of 192, 72 columns."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, weight = random(150, 192).half(), (random(72, 192) * 192**-0.5).half()
    x_stats = torch.empty(stats_shape(150, 192))
    stats_ref(x_stats, x)
    inputs = {"x": x, "weight": weight, "bias": random(72), "scale": random(72)}
    inputs |= {"residual": random(90, 72).half(), "x_stats": x_stats}
    inputs["rows"] = torch.randperm(150, generator=generator)[:90].int()
    inputs["row_sums"] = weight.float().sum(dim=1)
    return of_operator(
        "linear",
        arch,
        {"out": torch.empty(90, 72).half(), "stats": torch.empty(stats_shape(90, 72))},
        inputs,
        reference={"norm_eps": 1e-6, "activation": "gelu"},
        launch={"config": KernelConfig(64, 64, 64, 4, 3)},
    )


LARGE_INT8 = {
    80: KernelConfig(128, 128, 64, 8, 4),
    90: KernelConfig(128, 128, 128, 8, 3, registers=128),
}
"""The tiles of large batches; one block that takes every tile on sm_90."""


def of_case(case: int8_cases.Case, arch: int, checked: tuple[str, ...], **launch: Any) -> Subject:
    """The launch of ``case``, whose output is no residual."""
    scalars = dict(case.scalars)
    return of_operator(
        case.op, arch, case.outputs, case.inputs, reference=scalars, launch=launch, checked=checked
    )


@functools.cache
def norm_quant(arch: int) -> Subject:
    """13 rows of 768 as codes."""
    torch.manual_seed(0)
    return of_case(int8_cases.norm_quant(13, 768), arch, ())


@functools.cache
def linear_int8(arch: int) -> Subject:
    """Codes of gelu(x W^T + b): 100 rows of 640 by 256 columns, two tiles of 128 x 128."""
    torch.manual_seed(0)
    case = int8_cases.linear_int8(100, 256, 640, activation="gelu", quantizes=True)
    return of_case(case, arch, (), config=LARGE_INT8[arch])


@functools.cache
def linear_int8_grouped(arch: int) -> Subject:
    """residual + scale * (x W^T + b), and the statistics of its rows: 100 rows of five groups of
    128 by 192 columns, two tiles of 128 x 128."""
    torch.manual_seed(0)
    case = int8_cases.grouped(100, 192, 640, scale=True, in_place=False)
    config = dataclasses.replace(LARGE_INT8[arch], registers=None)
    return of_case(case, arch, ("out",), config=config)
