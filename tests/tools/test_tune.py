"""`vitrail tune`: what may vary, who wins, and the table that comes of it; no GPU is needed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import vitrail.runtime.triton as triton_runner
from vitrail.cli import app
from vitrail.errors import InputError, VitrailError
from vitrail.plan.text import text_pooled
from vitrail.plan.vision import vision_pooled, vision_scores
from vitrail.spec import BlockSpec, HeadSpec, ImageSpec, TextSpec, VisionSpec
from vitrail.tools import bench, tune
from vitrail.tools.bench import Bench
from vitrail.tools.tune import TuningResult, fastest, orders, save
from vitrail.tools.workload import Problem, fill, problems
from vitrail_kernels import OPERATORS, configs
from vitrail_kernels.candidates import INT8, candidates
from vitrail_kernels.compile import (
    REGISTERS,
    SHARED_TOTAL,
    KernelCode,
    compile_call,
    compile_each,
    identity,
    order_of_sums,
)
from vitrail_kernels.configs import KernelConfig, config_hash, in_force, read_table, tuned
from vitrail_kernels.device.stats import mean_rstd_ref
from vitrail_kernels.launch import Call, Target, jit, tl
from vitrail_kernels.ops.linear_config import LinearForm, linear_config, linear_key

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted: nothing is compiled"
)

ROOT = Path(__file__).parents[2]
CLIP = ROOT / "engine/vitrail/assets/clip"
HOPPER = Target(90, 132)
CPU = torch.device("cpu")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
HALF = torch.float16

BLOCKS = BlockSpec(64, 3, 2, 128, "gelu", 1e-6)
VISION = VisionSpec(BLOCKS, (32, 32), (8, 8))
TEXT = TextSpec(dataclasses.replace(BLOCKS, causal=True), vocab=99, context=12, eos=98)
LABELS = HeadSpec(("a", "b", "c"), "class")


RESIDUAL = LinearForm(residual=True, stats=True)


def model(**parts: Any) -> Any:
    """What `problems` looks at of a ModelSpec."""
    return SimpleNamespace(**{"vision": None, "text": None, "image": None, "head": None, **parts})


def linear(m: int = 256, n: int = 128, k: int = 64, times: int = 1) -> Problem:
    """A residual linear as a block's last: in place, with statistics."""
    half = {"dtype": HALF, "device": "meta"}
    out, x = torch.empty(m, n, **half), torch.empty(m, k, **half)
    stats = torch.empty(2 * -(-n // 64), m, device="meta")
    tensors = {"out": out, "x": x, "residual": out, "stats": stats}
    tensors["weight"] = torch.empty(n, k, **half)
    return Problem("linear", tensors, {}, (m,), times)


def key_of(problem: Problem) -> str:
    (m, n), k = problem.tensors["out"].shape, problem.tensors["x"].shape[1]
    return linear_key(HALF, m, n, k, RESIDUAL)


# -- what may vary ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", ["linear", *INT8, "attention", "patch_embed"])
@pytest.mark.parametrize("block_m", [64, 128])
def test_a_candidate_keeps_what_decides_bits(op: str, arch: int, block_m: int) -> None:
    base = KernelConfig(block_m, 32, 0 if op == "attention" else 64, 4, 2, group_m=4)
    configs = list(candidates(op, base, arch))
    assert 5 <= len(set(configs)) == len(configs) <= 12, (
        "a dozen, each of which costs a compilation"
    )
    for config in configs:
        assert config.block_m >= 64, "HGMMA takes 64 rows"
        assert config.block_m // config.warps >= 16, "a row is summed by one warp"
        assert config.block_m * config.block_n // (32 * config.warps) <= 128, "sums of a thread"
        assert config.group_m == base.group_m
        if op == "attention":
            assert (config.block_n, config.block_k) == (32, 0), "the tile of keys stays"
        else:
            assert config.block_k in (32, 64, 128)
        threads = 32 * config.warps * config.ctas
        assert config.registers is None or config.registers * threads <= REGISTERS
        step = (1 if op in INT8 else 2) * (config.block_m + config.block_n) * config.block_k
        assert (config.stages - 1) * step * config.ctas <= SHARED_TOTAL[arch], config
    for config in orders(op, base, arch):
        assert config != base
        assert dataclasses.replace(config, group_m=4) == base


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("m", [64, 100_000])
@pytest.mark.parametrize("form", [LinearForm(), LinearForm(residual=True)], ids=str)
def test_the_heuristics_own_choice_is_no_candidate(arch: int, m: int, form: LinearForm) -> None:
    """It is timed anyway; as a row it would be timed twice."""
    with in_force({}):
        heuristic = linear_config(Target(arch, 100), HALF, m, 4096, 1024, form)
    configs = list(candidates("linear", heuristic, arch))
    assert plain(heuristic) not in configs
    assert min(config.block_m for config in configs) <= heuristic.block_m


def test_a_whole_model_takes_a_hundred_kernels_to_tune() -> None:
    """ViT-B/16 at batch 256: a minute on 16 cores, where every combination took 900 kernels."""
    blocks = BlockSpec(768, 12, 12, 3072, "gelu", 1e-12)
    spec = model(vision=VisionSpec(blocks, (224, 224), (16, 16)))
    compiled: set[Any] = set()

    class Counting(FakeGPU):
        def compile(self, calls: Sequence[Call]) -> list[KernelCode | str]:
            compiled.update(map(identity, calls))
            return super().compile(calls)

    gpu = Counting(quick())
    for problem in problems(spec, [256], "float16"):
        (call,) = problem.calls(HOPPER, {})
        key = call.key
        for stage in (candidates, orders):
            result = TuningResult(key, [problem], call.config)
            tune._fitting(gpu.bench, {key: result}, stage, lambda _: None)
    assert 60 < len(compiled) < 160


def test_problems_are_the_plans_own_calls_equal_ones_once() -> None:
    calls = problems(model(vision=VISION, head=LABELS, text=TEXT), [1, 6], "bfloat16")
    counts: Counter[str] = Counter()
    for problem in calls:
        counts[problem.op] += problem.times
    expected: Counter[str] = Counter()
    for uint8 in (False, True):
        for plan in (
            vision_pooled(VISION, uint8=uint8),
            vision_scores(VISION, LABELS, uint8=uint8),
        ):
            expected.update(step.op for step in plan.steps)
    expected.update(step.op for step in text_pooled(TEXT).steps)
    assert counts == {op: 2 * expected[op] for op in ("linear", "attention", "patch_embed")}
    assert len(calls) < counts.total() / 2, "layers are alike"
    widths = {p.tensors["out"].shape[1] for p in calls}
    assert len(LABELS.labels) in widths, "the head is served"
    assert {p.tensors["weight"].dtype for p in calls if p.op == "linear"} == {torch.bfloat16}
    texts = {p.lengths for p in calls if p.op == "attention" and p.scalars["causal"]}
    assert texts == {(12,), (2, 4, 6, 8, 10, 12)}


@pytest.mark.parametrize(
    ("crop", "resize", "size", "tokens"),
    [
        ((24, 16), ("shortest", 32), None, 1 + 3 * 2),
        (None, ("exact", 16, 16), None, 1 + 4),
        (None, ("shortest", 48), None, 1 + 16),
        ((24, 16), ("shortest", 32), (64, 8), 1 + 8),
    ],
)
def test_images_are_of_the_size_that_is_served(
    crop: tuple[int, int] | None, resize: Any, size: tuple[int, int] | None, tokens: int
) -> None:
    image = ImageSpec(True, resize, 3, crop, 1 / 255, None, None)
    calls = problems(model(vision=VISION, image=image), [2], "float16", size)
    assert {p.lengths for p in calls} == {(tokens, tokens)}


@pytest.mark.parametrize("gated", [False, True])
def test_int8_products_are_tuned_on_values_that_they_take(gated: bool) -> None:
    """Codes and scales that give finite values, and shifts that belong to the weight."""
    activation = "silu" if gated else "gelu"
    blocks = BlockSpec(64, 3, 2, 128, activation, 1e-6, gated=gated)
    blocks = dataclasses.replace(blocks, int8=blocks.int8_candidates)
    vision = VisionSpec(blocks, (32, 32), (16, 16))
    every = [p for p in problems(model(vision=vision), [1, 3], "float16") if p.op in INT8]
    assert {p.op for p in every} == {*INT8}
    for problem in every:
        tensors = fill(problem, CPU, 0)
        OPERATORS[problem.op].reference(**tensors, **problem.scalars)
        results = [tensors["out"], tensors.get("out_scale", tensors["x_scale"])]
        assert all(result.isfinite().all() for result in results)
        assert len(tensors["out"].unique()) > 100
        assert tensors["out"].float().abs().max() < 1000
        (call,) = problem.calls(HOPPER, {})
        assert call.key.startswith(f"{problem.op}|")
        table = {call.key: dataclasses.replace(call.config, stages=2)}
        (tuned_call,) = problem.calls(HOPPER, table)
        assert tuned_call.config == table[call.key]


def test_random_values_are_what_the_operators_take() -> None:
    """Every problem runs on its reference; statistics and sums belong to the values."""
    index_arguments = set()
    for problem in problems(model(vision=VISION, head=LABELS, text=TEXT), [1, 3], "float16"):
        tensors = fill(problem, CPU, 0)
        repeated, reseeded = fill(problem, CPU, 0), fill(problem, CPU, 1)
        name_of_input = next(iter(set(tensors) & {"x", "qkv", "pixels"}))
        assert torch.equal(tensors[name_of_input], repeated[name_of_input])
        assert not torch.equal(tensors[name_of_input], reseeded[name_of_input])
        if "x_stats" in tensors:
            x = tensors["x"].float()
            mean, rstd = mean_rstd_ref(tensors["x_stats"], x.shape[1], 1e-6)
            ours = (x - mean[:, None]) * rstd[:, None]
            torch.testing.assert_close(ours, F.layer_norm(x, x.shape[1:], eps=1e-6))
            torch.testing.assert_close(tensors["row_sums"], tensors["weight"].float().sum(1))
        if "residual" in tensors and "residual_rows" not in tensors:
            in_place = problem.tensors["residual"] is problem.tensors["out"]
            assert in_place == (tensors["residual"] is tensors["out"])
        index_arguments |= {name for name, t in problem.tensors.items() if t.dtype == torch.int32}
        out = tensors["out"].clone()
        OPERATORS[problem.op].reference(**tensors, **problem.scalars)
        assert tensors["out"].isfinite().all()
        assert not torch.equal(tensors["out"], out)
    assert index_arguments == {"cu_seqlens", "rows", "residual_rows"}


# -- who wins --------------------------------------------------------------------------------------


class FakeGPU:
    """Computes the same for every configuration, and takes as long as ``cost`` says.

    ``codes``: what a configuration compiles to, where it is not fine; ``spoil``: changes the
    outputs of one.
    """

    def __init__(
        self,
        cost: Callable[[KernelConfig, int], float],
        codes: Mapping[KernelConfig, Any] | None = None,
        spoil: Callable[[KernelConfig, torch.Tensor, torch.Tensor], None] = lambda *_: None,
    ) -> None:
        self.cost, self.codes, self.spoil = cost, codes or {}, spoil
        self.order: list[KernelConfig] = []
        self.bench = Bench(HOPPER, CPU, self.compile, self.launch, self.seconds)

    def compile(self, calls: Sequence[Call]) -> list[KernelCode | str]:
        fine = KernelCode("fake", 90, 24, 0, 16_000, 8, Counter(HGMMA=4), "", "", "")
        changes = [self.codes.get(call.config, {}) for call in calls]
        return [
            change if isinstance(change, str) else dataclasses.replace(fine, **change)
            for change in changes
        ]

    def launch(self, calls: Sequence[Call]) -> None:
        for call in calls:
            self.last = call
            out, stats = call.arguments["out_ptr"], call.arguments.get("stats_ptr")
            if "x_map" not in call.arguments:
                out.fill_(1)
                continue
            x, weight = call.arguments["x_map"].base, call.arguments["weight_map"].base
            out += x @ weight.t()
            stats.copy_(out.float().mean(1).expand_as(stats))
            self.spoil(call.config, out, stats)

    def seconds(self, run: Callable[[], None]) -> float:
        run()
        self.order.append(self.last.config)
        return self.cost(self.last.config, self.last.arguments.get("m", 0))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "MIN_OUTPUTS", 1)
    monkeypatch.setattr(tune, "ROUNDS", 3)


def plain(config: KernelConfig) -> KernelConfig:
    return dataclasses.replace(config, reason="")


ORDER = "add in another order"
WINNER = KernelConfig(64, 128, 64, 4, 4, ctas=2)
DENSE = KernelConfig(64, 64, 64, 4, 4, registers=168, ctas=3)
SECOND = KernelConfig(64, 64, 64, 4, 8, ctas=2)


def quick(*ranked: KernelConfig) -> Callable[[KernelConfig, int], float]:
    """1 ms for all but ``ranked``: the first of them takes half of that, each next a tenth more."""
    return lambda config, _: 0.5 + 0.1 * ranked.index(config) if config in ranked else 1.0


def only(problem: Problem, gpu: FakeGPU) -> TuningResult:
    (result,) = tune.tune([problem], gpu.bench)
    return result


def test_the_fastest_is_chosen_and_the_heuristic_is_timed_beside_it() -> None:
    gpu = FakeGPU(quick(WINNER, SECOND))
    result = only(linear(), gpu)
    assert (result.key, result.config) == (key_of(linear()), WINNER)
    assert result.gain == pytest.approx(2)
    assert result.rejected == []
    assert "2.00x, 64x128x64" in str(result)
    heuristic = result.heuristic
    assert heuristic.reason
    rounds = gpu.order.count(heuristic)
    assert rounds == 2 * tune.ROUNDS
    # in turn: between two of the heuristic's samples every other one has its own
    first, second = [i for i, config in enumerate(gpu.order) if config == heuristic][:2]
    assert len(set(gpu.order[first:second])) == second - first >= 5


def test_the_order_of_tiles_is_tried_last_on_the_best_tile() -> None:
    better = dataclasses.replace(WINNER, group_m=16)
    result = only(linear(), FakeGPU(lambda c, _: {WINNER: 0.5, better: 0.4}.get(c, 1.0)))
    assert result.config == better
    assert result.gain == pytest.approx(2.5)


@pytest.mark.parametrize("op", ["linear", "attention"])
def test_a_first_place_by_noise_is_timed_again(op: str) -> None:
    problem, lucky = {
        "linear": (linear(), WINNER),
        "attention": (attended(), KernelConfig(64, 64, 0, 4, 3, 168)),
    }[op]
    times: Counter[KernelConfig] = Counter()

    def cost(config: KernelConfig, _: int) -> float:
        times[config] += 1
        return 0.5 if config == lucky and times[config] <= tune.ROUNDS else 1.0

    result = only(problem, FakeGPU(cost))
    assert times[lucky] == 2 * tune.ROUNDS
    assert result.config is None


@pytest.mark.parametrize(("gain", "wins"), [(1.019, False), (1.021, True)])
def test_the_heuristic_stays_unless_another_is_two_percent_faster(gain: float, wins: bool) -> None:
    result = only(linear(), FakeGPU(lambda c, _: 1 / gain if plain(c) == WINNER else 1.0))
    assert result.config == (WINNER if wins else None)
    assert result.gain == (pytest.approx(gain) if wins else 1.0)
    assert ("heuristic stays" in str(result)) != wins


def test_a_key_that_serves_several_sizes_is_judged_on_all() -> None:
    """More of the time decides, and no size may get slower by 2 %."""
    sizes = [linear(m=70, times=10), linear(m=256, times=2)]
    assert key_of(sizes[0]) == key_of(sizes[1])
    small, large = WINNER, SECOND
    cost = {(small, 70): 0.8, (small, 256): 1.01, (large, 70): 0.99, (large, 256): 0.5}
    gpu = FakeGPU(lambda config, m: cost.get((config, m), 1.0))
    (result,) = tune.tune(sizes, gpu.bench)
    assert result.config == small
    assert result.gain == pytest.approx(12 / (10 * 0.8 + 2 * 1.01))
    cost[small, 256] = 1.03
    (result,) = tune.tune(sizes, gpu.bench)
    assert result.config == large


def test_fastest_with_nothing_to_choose_from() -> None:
    assert fastest([1.0, 2.0], {}) == (None, 1.0)


@pytest.mark.parametrize("where", ["out", "stats"])
def test_a_candidate_with_another_bit_is_refused(where: str) -> None:
    def spoil(config: KernelConfig, out: torch.Tensor, stats: torch.Tensor) -> None:
        if config == WINNER:
            spoilt = {"out": out.view(torch.int16), "stats": stats.view(torch.int32)}[where]
            spoilt[-1, -1] ^= 1

    result = only(linear(), FakeGPU(quick(WINNER, SECOND), spoil=spoil))
    assert result.config == SECOND
    assert result.rejected == [WINNER]
    assert result.dropped == {"give other bits": 1}
    assert "1 give other bits" in str(result)


def test_few_outputs_are_compared_over_many_random_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """One output in a thousand that differs is found where a call has 256."""
    monkeypatch.setattr(tune, "MIN_OUTPUTS", 20_000)
    launches: Counter[KernelConfig] = Counter()

    def spoil(config: KernelConfig, out: torch.Tensor, _: torch.Tensor) -> None:
        launches[config] += 1
        if config == WINNER and launches[config] == 40:
            out.view(torch.int16)[0, 0] ^= 1

    result = only(linear(m=4, n=64), FakeGPU(quick(WINNER), spoil=spoil))
    assert result.rejected == [WINNER]
    assert result.config is None


def test_the_same_nan_is_the_same_bits() -> None:
    def spoil(_: KernelConfig, out: torch.Tensor, stats: torch.Tensor) -> None:
        out[0, 0] = stats[0, 0] = float("nan")

    assert only(linear(), FakeGPU(quick(WINNER), spoil=spoil)).config == WINNER


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("_linear_tma_kernel: CompilationError: no", "do not compile"),
        ({"instructions": Counter(HGMMA=4, STL=1)}, "spill"),
        ({"stack": 8}, "spill"),
        ({"shared": 232_449}, "take too much shared memory"),
        ({"registers": 208}, "leave no room for as many blocks"),
        ({"instructions": Counter(HMMA=4)}, ORDER),
        ({"ttgir": "#mma = #ttg.nvidia_mma<{versionMajor = 2, instrShape = [16, 8]}>"}, ORDER),
    ],
)
def test_what_is_no_fit_is_never_run(code: Any, why: str) -> None:
    def never(config: KernelConfig, *_: torch.Tensor) -> None:
        assert config != DENSE

    result = only(linear(), FakeGPU(quick(DENSE, SECOND), {DENSE: code}, never))
    assert result.config == SECOND
    assert result.dropped == {why: 1}
    assert f"1 {why}" in str(result)


def test_what_does_not_launch_is_dropped() -> None:
    def fail(config: KernelConfig, *_: torch.Tensor) -> None:
        if config == WINNER:
            raise RuntimeError("out of resource")

    result = only(linear(), FakeGPU(quick(WINNER, SECOND), spoil=fail))
    assert result.config == SECOND
    assert result.dropped == {"do not run (RuntimeError)": 1}
    assert result.rejected == []


def test_a_heuristic_that_does_not_compile_or_run_is_an_error() -> None:
    old = only(linear(), FakeGPU(quick())).heuristic
    with pytest.raises(VitrailError, match=r"linear.*does not compile: no ptxas"):
        only(linear(), FakeGPU(quick(), {old: "no ptxas"}))

    def fail(config: KernelConfig, *_: torch.Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        only(linear(), FakeGPU(quick(), spoil=fail))


def test_too_large_a_batch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tune, "fill", full)
    with pytest.raises(InputError, match=r"batch: too large .* linear\|float16\|256x"):
        only(linear(), FakeGPU(quick()))


def attended() -> Problem:
    half = {"dtype": HALF, "device": "meta"}
    tensors = {"out": torch.empty(256, 128, **half), "qkv": torch.empty(256, 384, **half)}
    tensors["cu_seqlens"] = torch.empty(2, dtype=torch.int32, device="meta")
    return Problem(
        "attention", tensors, {"heads": 2, "causal": False, "max_seqlen": 256}, lengths=(256,)
    )


def test_equal_machine_code_is_timed_once() -> None:
    """A kernel that takes no notice of ``ctas`` is the same for any, registers apart."""
    problem = attended()
    (heuristic,) = problem.calls(HOPPER, {})
    results = {heuristic.key: TuningResult(heuristic.key, [problem], heuristic.config)}
    deeper = dataclasses.replace(heuristic.config, stages=heuristic.config.stages + 1)

    def repeated(*_: object) -> list[KernelConfig]:
        return [
            dataclasses.replace(each, ctas=n) for each in (heuristic.config, deeper) for n in (1, 2)
        ]

    (fitting,) = tune._fitting(FakeGPU(quick()).bench, results, repeated, lambda _: None).values()
    assert fitting == [dataclasses.replace(deeper, ctas=1)]


def test_every_operator_that_varies_is_found_by_its_key() -> None:
    found = problems(model(vision=VISION, head=LABELS, text=TEXT), [2], "float16")
    for problem in found:
        (call,) = problem.calls(HOPPER, {})
        deeper = dataclasses.replace(call.config, stages=7)
        (changed,) = problem.calls(HOPPER, {call.key: deeper})
        assert changed.config == deeper


# -- the table -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's own folder of tuned tables, in force; and nothing remembered before or after."""
    monkeypatch.setenv("VITRAIL_TUNED", str(tmp_path))
    configs._loaded.cache_clear()
    yield tmp_path
    configs._loaded.cache_clear()


ORIGIN = {"gpu": "a card", "driver": "1.2", "command": "vitrail tune x"}


def test_what_is_saved_is_what_a_launch_takes(folder: Path) -> None:
    problem = linear()
    before, reasoned = config_hash(90), linear_config(HOPPER, HALF, 256, 128, 64, RESIDUAL)
    configs._loaded.cache_clear()
    save(folder / "sm_90.json", tune.tune([problem], FakeGPU(quick(WINNER)).bench), ORIGIN)
    provenance, table = read_table(folder / "sm_90.json")
    assert provenance == ORIGIN
    found = linear_config(HOPPER, HALF, 256, 128, 64, RESIDUAL)
    assert found == table[key_of(problem)]
    assert plain(found) == WINNER
    assert found.reason == f"2.00 times as fast as {tune.brief(reasoned)}"
    (call,) = problem.calls(HOPPER, tuned(90))
    assert (call.config, call.arguments["BLOCK_N"]) == (found, 128)
    assert config_hash(90) != before
    assert linear_config(Target(80, 108), HALF, 256, 128, 64, RESIDUAL).block_n != 256


def test_the_hash_is_of_what_is_launched_and_not_of_words() -> None:
    hashes = []
    for config in (WINNER, dataclasses.replace(WINNER, reason="why"), SECOND):
        with in_force({"key": config}):
            hashes.append(config_hash(90))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_table_grows_and_says_where_its_older_part_comes_from(folder: Path) -> None:
    file = folder / "new" / "sm_90.json"
    small, large = linear(m=64), linear(m=256)
    save(file, tune.tune([small, large], FakeGPU(quick(WINNER)).bench), ORIGIN)
    second_run = {**ORIGIN, "gpu": "another card"}
    save(file, tune.tune([small], FakeGPU(quick(SECOND)).bench), second_run)
    provenance, table = read_table(file)
    assert provenance == {**second_run, "earlier": [ORIGIN]}
    assert plain(table[key_of(small)]) == SECOND
    assert plain(table[key_of(large)]) == WINNER
    save(file, tune.tune([large], FakeGPU(quick()).bench), ORIGIN)
    provenance, table = read_table(file)
    assert table.keys() == {key_of(small)}, "the heuristic is back"
    assert provenance["earlier"] == [ORIGIN, second_run]
    assert [path.name for path in file.parent.iterdir()] == ["sm_90.json"]


def test_another_thread_keeps_the_table_it_serves_with() -> None:
    tables: list[Mapping[str, KernelConfig]] = []
    with in_force({"key": WINNER}):
        thread = threading.Thread(target=lambda: tables.append(tuned(90)))
        thread.start()
        thread.join()
        assert tuned(90) == {"key": WINNER}
    assert "key" not in tables[0]
    assert "key" not in tuned(90)


def test_the_shipped_table_serves_where_the_users_folder_has_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shipped = tmp_path_factory.mktemp("shipped")
    monkeypatch.setattr(configs, "TUNED", shipped)
    configs.write_table(shipped / "sm_90.json", ORIGIN, {"key": SECOND})
    configs.write_table(folder / "sm_80.json", ORIGIN, {"key": WINNER})
    assert (tuned(90), tuned(80), tuned(86)) == ({"key": SECOND}, {"key": WINNER}, {})


GOOD = {"block_m": 64, "block_n": 64, "block_k": 64, "warps": 4, "stages": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no tuned table can be read"),
        ("\xff", "no tuned table can be read"),
        ("[]", "'provenance' and 'configs'"),
        ('{"configs": {}}', "'provenance' and 'configs'"),
        ({"a key": [1]}, "a key: got [1], wanted an object"),
        ({"a key": {**GOOD, "warp": 4}}, "a key: got {'warp': 4}"),
        ({"a key": {"block_m": 64}}, "lacking ['block_n', 'block_k', 'warps', 'stages']"),
        ({"a key": {**GOOD, "block_n": 96}}, "a key: got {'block_n': 96}"),
        ({"a key": {**GOOD, "block_m": -64}}, "a key: got {'block_m': -64}"),
        ({"a key": {**GOOD, "warps": 0}}, "a key: got {'warps': 0}"),
        ({"a key": {**GOOD, "stages": "3"}}, "a key: got {'stages': '3'}"),
        ({"a key": {**GOOD, "stages": True}}, "a key: got {'stages': True}"),
        ({"a key": {**GOOD, "ctas": None}}, "a key: got {'ctas': None}"),
        ({"a key": {**GOOD, "registers": 0}}, "a key: got {'registers': 0}"),
        ({"good": GOOD, "a key": {**GOOD, "reason": 5}}, "a key: got {'reason': 5}"),
    ],
)
def test_a_malformed_table_is_named_when_the_model_is_loaded(
    text: Any, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "sm_90.json"
    content = text if isinstance(text, str) else json.dumps({"provenance": {}, "configs": text})
    file.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=re.escape(str(file))) as error:
        tuned(90)
    assert message in str(error.value)
    runner: Any = SimpleNamespace(target=HOPPER)
    identity: Any = triton_runner.TritonRunner.identity
    with pytest.raises(InputError, match=re.escape(str(file))):
        identity.fget(runner)


def test_a_folder_that_is_not_there_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_TUNED", str(folder / "nowhere"))
    with pytest.raises(ValueError, match=r"VITRAIL_TUNED: got '.*nowhere', wanted a folder with"):
        tuned(90)


def test_every_shipped_table_can_be_read() -> None:
    for file in configs.TUNED.glob("*.json"):
        provenance, _ = read_table(file)
        assert {"gpu", "driver", "torch", "triton", "vitrail", "date", "command"} <= set(provenance)


# -- the compiler ----------------------------------------------------------------------------------


@jit()
def _broken_kernel(x_ptr: tl.tensor) -> None:
    tl.store(x_ptr, no_such_name)  # type: ignore[name-defined]  # noqa: F821


def test_what_does_not_compile_is_said_in_its_place() -> None:
    x = torch.empty(128, 64, dtype=HALF, device="meta")
    broken = Call(_broken_kernel, (1,), {"x_ptr": x}, KernelConfig(0, 0, 0, 4, 1))
    (fine,) = linear(m=64, n=64).calls(HOPPER, {})
    codes = compile_each([broken, fine, broken], 90)
    assert isinstance(codes[1], KernelCode)
    assert codes[1] == compile_call(fine, 90)
    for text in (codes[0], codes[2]):
        assert isinstance(text, str)
        assert text.startswith("_broken_kernel: ")
        assert "no_such_name" in text


BLOCKED = """
#blocked = #ttg.blocked<{sizePerThread = [1, 1, 8], threadsPerWarp = [4, 1, 8], warpsPerCTA = [8, 1, 1], order = [2, 1, 0]}>
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 64, 16]}>
#other = #ttg.linear<{register = [[0, 1], [64, 0]], lane = [[1, 0], [0, 2]], warp = [[16, 0]], block = []}>
    %1 = "tt.reduce"(%0) <{axis = 2 : i32}> ({
    ^bb0(%a: f32, %b: f32):
      %c = arith.addf %a, %b : f32
      tt.reduce.return %c : f32
    }) : (tensor<128x1x64xf32, #blocked>) -> tensor<128x1xf32, #ttg.slice<{dim = 2}>>
    %2 = "tt.reduce"(%1) <{axis = 1 : i32}> ({
    }) : (tensor<128x16xf32, #mma>) -> tensor<128xf32, #ttg.slice<{dim = 1}>>
    %3 = "tt.reduce"(%1) <{axis = 1 : i32}> ({
    }) : (tensor<128x4xf32, #other>) -> tensor<128xf32, #ttg.slice<{dim = 1}>>
"""  # noqa: E501


def read(ttgir: str) -> frozenset[tuple[str, ...]]:
    return order_of_sums(KernelCode("fake", 90, 24, 0, 0, 8, Counter(), ttgir, "", ""))


def test_the_order_of_sums_is_read_from_tritons_code() -> None:
    assert read(BLOCKED) == {
        ("product", "3", "16"),
        ("reduction", "64", "blocked", "8", "8", "1"),
        ("reduction", "16", "nvidia_mma", "1"),
        ("reduction", "4", "linear", "1", "2", "", ""),
    }


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("warpsPerCTA = [8, 1, 1]", "warpsPerCTA = [4, 1, 1]", True),
        ("tensor<128x1x64", "tensor<64x2x64", True),
        ("instrShape = [16, 64, 16]", "instrShape = [16, 128, 16]", True),
        ("register = [[0, 1], [64, 0]]", "register = [[0, 1]]", True),
        ("sizePerThread = [1, 1, 8]", "sizePerThread = [1, 1, 16]", False),
        ("warpsPerCTA = [8, 1]", "warpsPerCTA = [4, 2]", False),
        ("instrShape = [16, 64, 16]", "instrShape = [16, 64, 8]", False),
        ("versionMajor = 3", "versionMajor = 2", False),
        ("lane = [[1, 0], [0, 2]]", "lane = [[1, 0]]", False),
        ("128x4xf32", "128x8xf32", False),
        ("#ttg.linear", "#ttg.unheard_of", False),
    ],
)
def test_rows_and_their_warps_make_no_other_order(old: str, new: str, same: bool) -> None:
    assert old in BLOCKED
    assert (read(BLOCKED.replace(old, new)) == read(BLOCKED)) == same


@pytest.mark.slow
@pytest.mark.parametrize("target", [HOPPER, Target(80, 108)], ids=str)
@pytest.mark.parametrize("op", ["linear", "attention"])
def test_candidates_add_in_one_order_in_compiled_code(op: str, target: Target) -> None:
    """Those that compile without the heuristic's help."""
    problem = linear(256, 256, 128) if op == "linear" else attended()
    (heuristic,) = problem.calls(target, {})
    configs = list(candidates(op, heuristic.config, target.arch))
    calls = [heuristic, *(problem.calls(target, {heuristic.key: config})[0] for config in configs)]
    codes = [code for code in compile_each(calls, target.arch) if isinstance(code, KernelCode)]
    assert len(codes) >= 6
    assert len({order_of_sums(code) for code in codes}) == 1
    assert any(step == "reduction" for step, *_ in order_of_sums(codes[0]))


@pytest.mark.slow
def test_a_tile_that_adds_in_another_order_is_told_apart() -> None:
    """16 rows are another instruction on sm_90."""
    problem = linear(256, 256, 128)
    (heuristic,) = problem.calls(HOPPER, {})
    (small_tile,) = problem.calls(HOPPER, {key_of(problem): KernelConfig(16, 64, 64, 4, 3)})
    code, own_code = compile_call(small_tile, 90), compile_call(heuristic, 90)
    assert tune._unfit(heuristic, own_code, own_code) is None
    assert tune._unfit(small_tile, code, own_code) == ORDER


# -- the command -----------------------------------------------------------------------------------


def run(*args: object, **env: str) -> Any:
    arguments = [str(arg) for arg in args]
    return CliRunner().invoke(app, ["tune", *arguments], env=env, prog_name="vitrail")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, folder: Path) -> FakeGPU:
    """A GPU for the command, of which the linears with 3 x 64 columns can be made faster."""

    class Linears(FakeGPU):
        def launch(self, calls: Sequence[Call]) -> None:
            (self.last,) = calls

        def seconds(self, run: Callable[[], None]) -> float:
            run()
            wide = self.last.arguments.get("N") == 384
            return 0.5 if plain(self.last.config) == WINNER and wide else 1.0

    fake = Linears(quick())
    monkeypatch.setattr(bench, "cuda_bench", lambda: fake.bench)
    monkeypatch.setattr(bench, "provenance", lambda _, command: {**ORIGIN, "command": command})
    return fake


def test_the_command_writes_a_table_and_says_how_to_use_it(gpu: FakeGPU, folder: Path) -> None:
    result = run(CLIP, "--batch", 2, "--batch", 40)
    assert result.exit_code == 0, result.stderr
    provenance, table = read_table(folder / "sm_90.json")
    assert provenance["command"] == "vitrail tune clip --batch=2 --batch=40 --dtype=float16"
    assert table
    for key, config in table.items():
        assert re.fullmatch(r"linear\|float16\|\d+x384x(96|128) norm.*", key)
        assert plain(config) == WINNER
    lines = result.stdout.splitlines()
    assert sum("2.00x" in line for line in lines) == len(table)
    assert sum("heuristic stays" in line for line in lines) == len(lines) - len(table) > 0
    assert f"{len(table)} of {len(lines)} keys faster" in result.stderr
    assert f"VITRAIL_TUNED={folder}" in result.stderr


def test_the_table_names_a_model_by_its_folder_from_wherever_it_is_tuned(
    gpu: FakeGPU, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CLIP)
    assert run(".", "--batch", 40).exit_code == 0
    provenance, _ = read_table(folder / "sm_90.json")
    assert provenance["command"] == "vitrail tune clip --batch=40 --dtype=float16"


def test_a_run_that_is_cut_short_leaves_its_table(
    gpu: FakeGPU, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_save, kept = tune.save, list[TuningResult]()

    def interrupted(file: Path, results: list[TuningResult], origin: Any) -> None:
        real_save(file, results, origin)
        kept.extend(result for result in results if result.config)
        if len(kept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(tune, "save", interrupted)
    assert run(CLIP, "--batch", 40).exit_code != 0
    provenance, table = read_table(folder / "sm_90.json")
    assert table.keys() == {result.key for result in kept}
    assert "earlier" not in provenance, "one run, however often it writes"


def test_the_command_writes_where_it_is_told(gpu: FakeGPU, folder: Path) -> None:
    result = run(CLIP, "--out", folder / "a" / "b.json", "--batch", 2)
    assert result.exit_code == 0, result.stderr
    assert read_table(folder / "a" / "b.json")[1]
    assert "under the name sm_90.json" in result.stderr


@pytest.mark.parametrize(
    ("out", "message"),
    [("table.npy", "wanted a .json file"), ("bad.json", "bad.json: no tuned table can be read")],
)
def test_a_place_that_cannot_be_written_to_costs_no_tuning(
    out: str, message: str, gpu: FakeGPU, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "bad.json").write_text("no table")
    monkeypatch.setattr(tune, "tune", lambda *_: pytest.fail("tuned for nothing"))
    result = run(CLIP, "--out", folder / out)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_the_error_names_what_is_wanted() -> None:
    result = run(CLIP)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(
        r"vitrail: error: tune: got no CUDA device .*, wanted an NVIDIA GPU .*sm_80 or later\n",
        result.stderr,
    )


def test_wrong_usage() -> None:
    for args, message in (
        ([], "VITRAIL_MODEL"),
        ([CLIP, "--dtype", "float32"], "wanted float16 or bfloat16"),
        ([CLIP, "--batch", "0"], "--batch"),
        ([CLIP, "--size", "big"], "got 'big', wanted HxW"),
    ):
        result = run(*args)
        assert result.exit_code == 2
        assert message in result.stderr


def test_help_says_what_it_does_and_names_the_variables() -> None:
    text = " ".join(run("--help").stdout.split())
    assert "Time kernel configurations on this GPU for a checkpoint." in text
    assert "VITRAIL_TUNED=<folder of the table>" in text
    for variable in ("MODEL", "DTYPE"):
        assert f"VITRAIL_{variable}" in text


# -- a GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_real_gpu_tunes_a_small_model(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A dozen tiles a key, of which none may give other bits; the table then serves."""
    monkeypatch.setattr(tune, "MIN_OUTPUTS", 1 << 16)
    gpu = bench.cuda_bench()
    calls = problems(model(vision=VISION, text=TEXT), [2, 64], "float16")
    results = tune.tune(calls, gpu)
    assert all(result.timed for result in results)
    assert [config for result in results for config in result.rejected] == []
    file = folder / f"sm_{gpu.target.arch}.json"
    save(file, results, bench.provenance(gpu.device, "vitrail tune"))
    provenance, table = read_table(file)
    assert torch.cuda.get_device_name() == provenance["gpu"]
    assert re.match(r"\d+\.", provenance["driver"])
    assert table == tuned(gpu.target.arch)
