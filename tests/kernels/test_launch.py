"""Kernel calls as values: what is launched, one at a time, and what is not."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from roofline import CARDS, SHAPES, steps

from vitrail_kernels import OPERATORS, Operator, ops
from vitrail_kernels.configs import KernelConfig, in_force
from vitrail_kernels.launch import (
    Call,
    Grid,
    Target,
    check_tensor,
    fits_descriptor,
    interpreted,
    launch,
    target_of,
)
from vitrail_kernels.ops.attention import attention_calls
from vitrail_kernels.ops.linear import linear_calls
from vitrail_kernels.ops.linear_config import KEY_ROWS, LinearForm, linear_key
from vitrail_kernels.ops.patch_embed import patch_embed_calls

CONFIG = KernelConfig(64, 128, 32, 4, 3, registers=128)


class Kernel:
    """Stands for a Triton kernel: notes how it is launched, and whether two launches overlap."""

    def __init__(self) -> None:
        self.seen: list[tuple[tuple[int, ...], dict[str, Any]]] = []
        self.inside = self.most = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.001)
            self.seen.append((grid, given))
            self.inside -= 1

        return run


def test_a_call_hands_over_its_grid_arguments_and_options() -> None:
    kernel, x = Kernel(), torch.zeros(1)
    launch([Call(kernel, Grid(13, block=2, times=2), {"x": x, "m": 3}, CONFIG)])
    ((grid, arguments),) = kernel.seen
    assert grid == (14,)
    assert arguments.pop("x") is x
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False, "maxnreg": 128}
    assert arguments == {"m": 3, **options}


def test_a_grid_without_blocks_launches_nothing() -> None:
    kernel, empty = Kernel(), (Grid(0), Grid(0, 64, 3), Grid(4, times=0), Grid(0, limit=5))
    launch([Call(kernel, grid, {"x": torch.zeros(1)}, CONFIG) for grid in empty])
    assert kernel.seen == []


def test_the_blocks_of_a_grid() -> None:
    assert Grid(5).blocks == 5
    assert [Grid(rows, 64).blocks for rows in (0, 1, 64, 65, 128, 129)] == [0, 1, 1, 2, 2, 3]
    assert Grid(65, 64, times=3).blocks == 6
    assert [Grid(65, 64, 3, limit).blocks for limit in (5, 6, 7)] == [5, 6, 6]


def test_threads_launch_one_after_the_other() -> None:
    """Triton's first launch of a kernel is not safe beside another of the same."""
    kernel = Kernel()
    calls = [Call(kernel, Grid(1), {"x": torch.zeros(1)}, CONFIG)] * 10
    threads = [threading.Thread(target=launch, args=(calls,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kernel.seen) == 80
    assert kernel.most == 1


@pytest.mark.skipif(interpreted(), reason="interpreted: the CPU is a target there")
def test_a_cpu_is_no_target() -> None:
    with pytest.raises(RuntimeError, match="got a tensor on cpu, wanted CUDA"):
        target_of(torch.zeros(1))
    with pytest.raises(RuntimeError, match="wanted CUDA"):
        OPERATORS["linear"].launch(torch.zeros(1, 8), torch.zeros(1, 8), torch.zeros(8, 8))


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 103, 110, 120])
def test_targets(arch: int) -> None:
    target = Target(arch, 100)
    assert target.tma == (arch >= 90)
    assert target.tcgen05 == (arch in (100, 103, 110))
    assert target.pdl == (arch >= 90 and not interpreted())


def test_tensor_maps_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_TMA", "0")
    assert not Target(90, 132).tma
    assert Target(90, 132).without_tma
    assert not Target(80, 108).without_tma
    monkeypatch.setenv("VITRAIL_TMA", "1")
    assert Target(90, 132).tma
    assert not Target(90, 132).without_tma


def test_the_interpreter_has_no_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, there in (("0", True), ("1", False)):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert Target(90, 132).pdl == there


def test_what_tensor_maps_can_describe() -> None:
    half = {"dtype": torch.float16}
    assert fits_descriptor(torch.zeros(4, 64, **half), torch.zeros(1, 8, **half))
    assert not fits_descriptor(torch.zeros(4, 63, **half)), "rows of 126 bytes"
    assert not fits_descriptor(torch.zeros(4 * 64 + 1, **half)[1:].view(4, 64)), "an odd base"
    assert not fits_descriptor(torch.zeros(64, 64, **half).t()), "columns apart"
    assert not fits_descriptor(torch.zeros(0, 64, **half)), "nothing"


def test_what_is_refused_says_what_was_wanted() -> None:
    x = torch.zeros(4, 8)
    check_tensor("x", None, x, torch.float32, (4, 8))
    check_tensor("x", x, x, torch.float32, (4, 8))
    for bad, told in (
        (x.half(), "x: got torch.float16, wanted torch.float32"),
        (x[:3], r"x: got shape \(3, 8\), wanted \(4, 8\)"),
        (torch.zeros(8, 4).t(), r"x: got strides \(1, 4\)"),
        (x.to("meta"), "x: got a tensor on meta, wanted cpu"),
    ):
        with pytest.raises(ValueError, match=told):
            check_tensor("x", bad, x, torch.float32, (4, 8))


# -- calls of any size -----------------------------------------------------------------------------

HALF = torch.float16
ARCHITECTURES = pytest.mark.parametrize("arch", CARDS)


def target(arch: int) -> Target:
    return Target(arch, CARDS[arch].sms)


def empty(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear_call(gpu: Target, m: int, n: int, k: int, **more: Any) -> Call:
    out = empty(m, n)
    residual = out if more.pop("residual", False) else None
    (call,) = linear_calls(gpu, out, empty(m, k), empty(n, k), residual=residual, **more)
    return call


def attention_call(gpu: Target, longest: int, batch: int, heads: int = 12, **more: Any) -> Call:
    tokens, width = batch * longest, 64 * heads
    arguments = empty(tokens, width), empty(tokens, 3 * width), empty(batch + 1, dtype=torch.int32)
    more = {"causal": False, **more}
    (call,) = attention_calls(gpu, *arguments, heads=heads, max_seqlen=longest, **more)
    return call


def patch_call(gpu: Target, batch: int, patch: int, width: int, dtype: torch.dtype) -> Call:
    rows, columns = batch * (1 + (224 // patch) ** 2), -(-3 * patch**2 // 64) * 64
    uint8 = dtype == torch.uint8
    pixels = empty(*((batch, 224, 224, 3) if uint8 else (batch, 3, 224, 224)), dtype=dtype)
    arguments = empty(rows, width), pixels, empty(width, columns)
    table = empty(rows // batch, width, dtype=torch.float32)
    scalars = {"patch": (patch, patch), "channels": 3, "prefix": 1}
    (call,) = patch_embed_calls(gpu, *arguments, table, **scalars)
    return call


def held(call: Call) -> KernelConfig:
    """What the call's ladder says for the call's rows, once the ladder is one."""
    assert call.ladder is not None, f"no ladder: {call.config}"
    ladder = call.ladder()
    limits = [limit for limit, _ in ladder]
    assert limits == sorted(set(limits))
    assert limits[0] > 0
    assert limits[-1] == 1 << 31
    configs = [config for _, config in ladder]
    assert all(a != b for a, b in itertools.pairwise(configs)), "neighbors are equal"
    return next(config for limit, config in ladder if call.rows <= limit)


def sizes(call: Call) -> list[int]:
    """Numbers of rows at and beside every step of the call's ladder, and others."""
    assert call.ladder is not None, f"no ladder: {call.config}"
    dice = random.Random(0)
    near = {limit + d for limit, _ in call.ladder()[:-1] for d in (-64, -1, 0, 1, 64)}
    near |= {int(2 ** dice.uniform(0, 18)) for _ in range(100)} | {1, 2, 63, 64, 65}
    return sorted(size for size in near if size > 0)


@ARCHITECTURES
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("n", "k"), [(768, 768), (2304, 768), (1024, 4096), (32768, 64), (8, 8)])
def test_the_ladder_of_linear_is_what_its_calls_take(
    n: int, k: int, residual: bool, arch: int
) -> None:
    gpu = target(arch)
    form = LinearForm(pointers=arch < 90, residual=residual)
    keys = {rows: linear_key(HALF, rows, n, k, form) for rows in KEY_ROWS}
    one, two = KernelConfig(64, 256, 64, 4, 3), KernelConfig(128, 64, 64, 8, 2)
    tables = ({}, dict.fromkeys(keys.values(), one), {keys[64]: one, keys[256]: one})
    ladder_lengths = []
    for table in (*tables, {keys[256]: one, keys[1024]: two, keys[1 << 31]: one}):
        with in_force(table):
            first = linear_call(gpu, 1, n, k, residual=residual)
            assert first.ladder is not None
            ladder_lengths.append(len(first.ladder()))
            for m in sizes(first):
                call = linear_call(gpu, m, n, k, residual=residual)
                assert call.rows == m
                assert call.ladder is not None
                assert call.ladder() == first.ladder(), "not of the call's size"
                assert call.config == held(call), f"{m} rows"
    assert ladder_lengths[1] == 1, "equal entries are one"
    if n <= 2304:
        wide = arch == 90 and (k > 2048 or not residual)  # one step more, 256 columns wide
        assert ladder_lengths[0] == 3 + wide if n > 8 else ladder_lengths[0] >= 2
        assert len(set(ladder_lengths)) >= 3


@ARCHITECTURES
@pytest.mark.parametrize("longest", [50, 77, 197, 256, 257, 1370])
def test_the_ladder_of_attention_is_what_its_calls_take(longest: int, arch: int) -> None:
    gpu = target(arch)
    first = attention_call(gpu, longest, 1)
    assert first.ladder is not None
    wide = arch == 90 and -(-longest // 64) % 2 == 0
    assert [config.block_m for _, config in first.ladder()] == [64, 128][: 1 + wide]
    batches = {1, 2, 3, 1000} | {max(1, size // longest) for size in sizes(first)}
    for batch in sorted(batches | {batch + 1 for batch in batches}):
        call = attention_call(gpu, longest, batch)
        assert call.rows == batch * longest
        assert call.config == held(call), f"{batch} x {longest}"
        causal = attention_call(gpu, longest, batch, causal=True)
        assert causal.ladder is not None
        assert causal.ladder() == ((1 << 31, causal.config),)
        assert causal.config.block_m == 64


def test_the_keys_of_attention() -> None:
    """Causal ones hold for every length, so that texts of any length have one kernel."""
    own, other = KernelConfig(128, 64, 0, 8, 3), KernelConfig(64, 64, 0, 4, 4)
    table = {"attention|float16|12x64x197 full": own, "attention|float16|12x64 causal": other}
    with in_force(table):
        for batch in (1, 300):
            assert attention_call(target(90), 197, batch).config == own
            assert attention_call(target(90), 196, batch).config not in (own, other)
            for longest in (7, 64, 77, 197):
                assert attention_call(target(90), longest, batch, causal=True).config == other


@ARCHITECTURES
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize(("patch", "width"), [(16, 768), (14, 1024), (32, 384)])
def test_the_ladder_of_patch_embed_is_what_its_calls_take(
    patch: int, width: int, dtype: torch.dtype, arch: int
) -> None:
    gpu = target(arch)
    first = patch_call(gpu, 1, patch, width, dtype)
    assert first.ladder is not None
    assert len(first.ladder()) == 2
    batches = {max(1, size // first.rows) for size in sizes(first)}
    for batch in sorted(batches | {batch + 1 for batch in batches}):
        call = patch_call(gpu, batch, patch, width, dtype)
        assert call.rows == batch * first.rows == call.arguments["rows"]
        assert call.config == held(call), f"{call.rows} rows"


def test_a_given_configuration_is_used_as_it_is() -> None:
    config = KernelConfig(128, 64, 32, 8, 2, ctas=3)
    for gpu in (target(80), target(90)):
        call = linear_call(gpu, 1, 768, 768, config=config)
        assert call.config is config
        assert [call.arguments[f"BLOCK_{side}"] for side in "MNK"] == [128, 64, 32]
        assert call.grid == Grid(1, 128, 12, limit=3 * 132 if gpu.tma else None)
        call = attention_call(gpu, 197, 1, config=config)
        assert call.config is config
        assert call.grid == Grid(197, 128, 12)


def every_call(batch: int, tokens: int) -> Iterator[Call]:
    """Of every operator but those of an image's size; few rows each, so that tiles stay."""
    gpu = Target(90, 1 << 20)
    text = dataclasses.replace(SHAPES["CLIP-B text"], tokens=tokens)
    for shape in (text, SHAPES["ViT-B/16"]):
        for one in steps(shape, HALF, batch):
            yield from one.calls(gpu)
    x, vectors = empty(batch * tokens, 64), [empty(64, dtype=torch.float32)] * 2
    yield from OPERATORS["layernorm"].calls(gpu, x, x, *vectors, eps=1e-6)
    out = empty(batch, 128)
    yield from OPERATORS["class_mean"].calls(gpu, out, x, tokens=tokens, prefix=1)
    out, status = empty(batch, 64, dtype=torch.float32), empty(batch, dtype=torch.int32)
    yield from OPERATORS["pool"].calls(gpu, out, status, x[:batch], *vectors, eps=1e-6)


def numbers(batch: int, tokens: int) -> list[dict[str, int]]:
    """What a call gives a kernel besides tensors and constants."""
    result = []
    for call in every_call(batch, tokens):
        arguments = {"grid rows": call.grid.rows, "grid times": call.grid.times, "rows": call.rows}
        for parameter in call.kernel.params:
            value = call.arguments[parameter.name]
            if not parameter.is_constexpr and isinstance(value, int):
                assert parameter.do_not_specialize, f"{call.kernel.__name__}: {parameter.name}"
                arguments[f"{call.kernel.__name__} {parameter.name}"] = value
        result.append(arguments)
    return result


@pytest.mark.skipif(interpreted(), reason="interpreted: kernels have no parameters")
def test_every_number_of_a_call_is_affine_in_sequences_and_tokens() -> None:
    """Numbers at three neighboring sizes lie on a line: C++ can fill them in for any size.

    64, 65 and 66 tokens are where one tile becomes two.
    """
    for one, two, three in (
        ((1, 65), (2, 65), (3, 65)),
        ((2, 64), (2, 65), (2, 66)),
        ((2, 128), (2, 129), (2, 130)),
    ):
        for a, b, c in zip(numbers(*one), numbers(*two), numbers(*three), strict=True):
            assert a.keys() == b.keys() == c.keys()
            bent = {
                name: (a[name], b[name], c[name]) for name in a if a[name] + c[name] != 2 * b[name]
            }
            assert bent == {}


def test_only_calls_whose_tiles_follow_the_size_have_a_ladder() -> None:
    for name in ("ViT-B/16", "CLIP-B text"):
        for one in steps(SHAPES[name], HALF):
            for call in one.calls(target(90)):
                has = one.op in ("linear", "patch_embed", "attention")
                assert (call.ladder is not None) == has == (call.rows > 0), one.label


@ARCHITECTURES
def test_a_key_finds_its_configuration_in_a_tuned_table(arch: int) -> None:
    """As `vitrail tune` uses it: a table with the key of a call changes that call."""
    for name in ("ViT-B/16", "CLIP-B text"):
        for step in steps(SHAPES[name], HALF):
            for call in step.calls(target(arch)):
                if not call.key:
                    assert call.kernel.__name__ == "_pool_status_kernel", step.label
                    continue
                assert call.key.startswith(f"{step.op}|float16|")
                tuned = dataclasses.replace(call.config, reason="tuned")
                with in_force({call.key: tuned}):
                    assert tuned in [again.config for again in step.calls(target(arch))]


def test_every_declared_operator_is_listed() -> None:
    modules = [
        importlib.import_module(f"{ops.__name__}.{m.name}") for m in iter_modules(ops.__path__)
    ]
    declared = {id(v): v for m in modules for v in vars(m).values() if isinstance(v, Operator)}
    assert sorted(o.name for o in declared.values()) == sorted(OPERATORS)
    for name, operator in OPERATORS.items():
        assert operator.calls.__module__ == f"vitrail_kernels.ops.{name}"
