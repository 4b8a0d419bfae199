"""No compiler joins a product and a sum: the machine code fuses what the kernels say, in each tile.

A row's bits then do not depend on the tile that it is in, and so not on the batch.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from roofline import CARDS, SHAPES, steps

from vitrail_kernels.compile import KernelCode, compile_call
from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.launch import Call, Target

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted: nothing is compiled"
)

BATCHES = (1, 2, 8, 256)
"""Of images of 1,370 tokens and of captions: they take every tile of the tables."""
FUSED = re.compile(r"^\s+(?:@!?%\w+ )?fma\.rn(?:\.ftz)?\.f32\b", re.M)


def tiles(model: str, label: str, arch: int, dtype: torch.dtype) -> Iterator[Call]:
    """The call of a model's linear in every tile that some batch takes."""
    calls = {}
    for batch in BATCHES:
        for launch in steps(SHAPES[model], dtype, batch):
            if launch.label == label:
                (call,) = launch.calls(Target(arch, CARDS[arch].sms))
                config = call.config
                calls[config.block_m, config.block_n, config.warps] = call
    assert len(calls) >= 2, f"{model} {label}: only {list(calls)} were compared"
    return iter(calls.values())


def fused(code: KernelCode) -> tuple[int, int]:
    """Fused multiply-adds of the machine code, and of the PTX that ptxas was given."""
    return code.instructions["FFMA"], len(FUSED.findall(code.ptx))


def per_value(call: Call, code: KernelCode) -> dict[str, float]:
    """fp32 instructions for each value that a thread finishes."""
    values = call.config.block_m * call.config.block_n / (32 * call.config.warps)
    return {name: code.instructions[name] / values for name in ("FFMA", "FADD")}


def cases(names: list[tuple[str, str]], *quick: tuple[int, int]) -> list[Any]:
    """Each name for sm_80 and sm_90; slow unless ``quick`` has its number and architecture."""
    return [
        pytest.param(*name, arch, marks=[] if (number, arch) in quick else pytest.mark.slow)
        for number, name in enumerate(names)
        for arch in (80, 90)
    ]


RESIDUAL = [("ViT-B/16", "out"), ("DINOv2-B@518", "out"), ("DINOv2-B@518", "down")]
NORM = [("ViT-B/16", "qkv"), ("ViT-B/16", "up"), ("CLIP-B text", "up")]


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("model", "label", "arch"), cases(RESIDUAL, (0, 80), (2, 90)))
def test_tiles_with_a_residual_have_one_arithmetic(
    model: str, label: str, arch: int, dtype: torch.dtype
) -> None:
    """Scale, residual and statistics: as many fused and plain sums a value in every tile."""
    counts = {}
    for call in tiles(model, label, arch, dtype):
        code = compile_call(call, arch)
        machine, ptx = fused(code)
        assert machine == ptx, f"sm_{arch} {model} {label} {call.config}: FFMA"
        counts[call.config.block_m, call.config.block_n] = per_value(call, code)
    first = next(iter(counts.values()))
    assert first["FADD"] > 1, f"no sums in the code: {counts}"
    assert all(count == first for count in counts.values()), counts


@pytest.mark.parametrize(("model", "label", "arch"), cases(NORM, (0, 80), (1, 90), (2, 90)))
def test_tiles_with_a_norm_fuse_what_they_say(model: str, label: str, arch: int) -> None:
    """LayerNorm, bias and activation: sums a row come on top, so that only the kinds are equal."""
    for call in tiles(model, label, arch, torch.float16):
        machine, ptx = fused(compile_call(call, arch))
        assert machine == ptx > 0, f"sm_{arch} {model} {label} {call.config}"


def test_a_compiler_that_joins_them_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Triton's own default the machine code fuses more than the kernels say."""
    options = KernelConfig.options

    def fusing(config: KernelConfig) -> dict[str, Any]:
        return options(config) | {"enable_fp_fusion": True}

    call = next(tiles("ViT-B/16", "up", 90, torch.float16))
    said = len(FUSED.findall(compile_call(call, 90).ptx))
    monkeypatch.setattr(KernelConfig, "options", fusing)
    joined = dataclasses.replace(call)
    machine, _ = fused(compile_call(joined, 90))
    assert machine > said
