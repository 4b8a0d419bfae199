"""Plans as bytes for C++: formulas of sizes, keys of kernels, and refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.test_runner import TEXT, VISION, images, open_runner
from vitrail.errors import VitrailError
from vitrail.plan import kernel_binary
from vitrail.plan.kernel_binary import KERNEL_MAGIC, compile_binary, decode_binary, kernel_key
from vitrail.plan.lowering import NativePlan, SizeProbes, lower
from vitrail.plan.plan import Affine
from vitrail.plan.text import text_pooled
from vitrail.plan.vision import vision_pooled
from vitrail_kernels import Call
from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.launch import MISSING, Target, interpreted

NUMBERS = st.integers(-3000, 3000)
needs_triton = pytest.mark.skipif(
    MISSING is not None or interpreted(), reason="lowering: needs triton's compiler"
)


def values_at(probes: SizeProbes, formula: Affine) -> list[int]:
    return [formula.at(len(probe), sum(probe), probe[0]) for probe in probes.lengths]


@given(st.builds(Affine, NUMBERS, NUMBERS, NUMBERS, NUMBERS))
def test_a_formula_is_found_from_its_values(formula: Affine) -> None:
    probes = SizeProbes(None)
    assert probes.affine("x", values_at(probes, formula)) == formula


@given(st.builds(Affine, NUMBERS, NUMBERS, NUMBERS, NUMBERS), st.integers(1, 300))
def test_for_images_of_one_size_it_holds_at_every_batch(formula: Affine, length: int) -> None:
    probes = SizeProbes(length)
    solved = probes.affine("x", values_at(probes, formula))
    for batch in (1, 2, 7, 1000):
        size = (batch, batch * length, length)
        assert solved.at(*size) == formula.at(*size)


@pytest.mark.parametrize("length", [None, 11])
def test_a_number_that_is_not_affine_is_refused(length: int | None) -> None:
    probes = SizeProbes(length)
    for values in (
        [len(probe) ** 2 for probe in probes.lengths],
        [-(-len(probe) // 2) for probe in probes.lengths],
    ):
        with pytest.raises(AssertionError, match=r"^grid: got .* not affine"):
            probes.affine("grid", values)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> NativePlan:
    _, runner = open_runner(tmp_path_factory.mktemp("text"), None, TEXT, None, torch.float16)
    return lower(text_pooled(TEXT), Target(90, 132), torch.float16, runner.weights)


@needs_triton
def test_a_key_is_of_all_that_machine_code_follows_from(text: NativePlan) -> None:
    assert len(text.calls) == len(set(text.calls))
    for key, call in text.calls.items():
        assert kernel_key(call, 90) == key
        others = {
            kernel_key(call, 100),
            kernel_key(dataclasses.replace(call, config=_warps(call.config, 8)), 90),
            kernel_key(dataclasses.replace(call, config=_warps(call.config, 1)), 90),
        }
        assert len(others - {key}) >= 2


def _warps(config: KernelConfig, warps: int) -> KernelConfig:
    return dataclasses.replace(config, warps=warps)


@needs_triton
def test_lowering_gives_the_same_bytes_every_time(tmp_path: Path) -> None:
    spec = VISION["clip"]
    _, runner = open_runner(tmp_path, spec, None, None, torch.float16)
    plan = vision_pooled(spec, uint8=True)
    for target in (Target(90, 132), Target(80, 108)):
        first, second = (
            lower(plan, target, torch.float16, runner.weights, images(batch, spec.image))
            for batch in (1, 5)
        )
        assert first.record == second.record
        assert list(first.calls) == list(second.calls)


@needs_triton
def test_code_that_takes_other_parameters_is_refused(
    text: NativePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a triton would make it that hands over descriptors in another way."""
    compiled = kernel_binary.compile_privately

    def other(call: Call, arch: int) -> SimpleNamespace:
        kernel = compiled(call, arch)
        ptx = kernel.asm["ptx"].replace(".param .align 64", ".param .u64 extra,\n.param .align 64")
        asm = {**kernel.asm, "ptx": ptx}
        return SimpleNamespace(src=kernel.src, metadata=kernel.metadata, asm=asm)

    key, call = next((k, c) for k, c in text.calls.items() if "map" in str(c.arguments.keys()))
    record = compile_binary(key, call, 90)
    assert record.startswith(KERNEL_MAGIC)
    assert decode_binary(record).cubin[:4] == b"\x7fELF"
    monkeypatch.setattr(kernel_binary, "compile_privately", other)
    with pytest.raises(VitrailError, match=r"got parameters of \[8, .*, wanted \[128, 4, 4, 8, 8"):
        compile_binary(key, call, 90)
