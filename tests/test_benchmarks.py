"""Benchmarks: nothing wrong is timed, nothing slower passes, every result says where it is from."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import checkpoints
import standin
from vitrail import plans
from vitrail.runners import native
from vitrail.spec import BlockSpec, TextSpec, VisionSpec
from vitrail.zoo import read_spec
from vitrail_kernels.launch import MISSING, Target, interpreted

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
(
    harness,
    compare,
    environment,
    shapes,
    problems,
    operators,
    models,
    precompile,
    report,
    latency,
) = map(
    importlib.import_module,
    (
        "harness",
        "compare",
        "environment",
        "shapes",
        "problems",
        "operators",
        "models",
        "precompile",
        "report",
        "latency",
    ),
)

BLOCKS = BlockSpec(64, 2, 2, 128, activation="quick_gelu", eps=1e-5)
TOWERS = {
    "CLIP": VisionSpec(
        BLOCKS, (28, 28), (14, 14), patch_bias=False, pre_norm=True, norm="pooled", projection=24
    ),
    "ViT": VisionSpec(dataclasses.replace(BLOCKS, activation="gelu"), (28, 28), (14, 14)),
    "DINOv2": VisionSpec(dataclasses.replace(BLOCKS, layer_scale=True), (28, 28), (14, 14)),
}
CAPTIONS = TextSpec(
    dataclasses.replace(BLOCKS, causal=True), vocab=100, context=40, eos=99, projection=24
)


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> Callable[[], str]:
        """A variant that takes that long."""

        def run() -> str:
            self.now += seconds
            return "done"

        return run


def _right(name: str, result: Any) -> None:
    pass


# -- timing ----------------------------------------------------------------------------------------


def test_a_summary_is_median_and_percentiles_in_milliseconds() -> None:
    found = harness.summary(
        [0.011, 0.001, 0.005, 0.002, 0.009, 0.003, 0.010, 0.004, 0.006, 0.008, 0.007]
    )
    assert found == {"median_ms": 6.0, "p20_ms": 3.0, "p80_ms": 9.0, "rounds": 11}
    assert harness.summary([12.34e-6])["median_ms"] == 0.01234, "microseconds survive"


def test_a_ratio_is_paired_by_round() -> None:
    assert harness.ratio({"a": [1.0, 8.0, 9.0], "b": [1.0, 2.0, 9.0]}, "a", "b") == 1.0
    assert harness.ratio({"a": [2.0, 20.0, 6.0], "b": [1.0, 10.0, 3.0]}, "a", "b") == 2.0


def test_variants_are_timed_in_turn_after_warming_up() -> None:
    order: list[str] = []
    variants = {name: functools.partial(order.append, name) for name in "abc"}
    harness.interleave(variants, rounds=2, warmup=1)
    assert order == ["a", "b", "c"] * 3

    clock = Clock()
    variants = {"slow": clock.work(3.0), "fast": clock.work(1.0)}
    seconds = harness.interleave(variants, rounds=4, timer=harness.host_timer(clock=clock))
    assert seconds == {"slow": [3.0] * 4, "fast": [1.0] * 4}


def test_latency_includes_the_synchronisation() -> None:
    clock = Clock()
    timer = harness.host_timer(synchronize=clock.work(2.0), clock=clock)
    assert timer(clock.work(0.5)) == 2.5


def test_inputs_take_turns() -> None:
    run = harness.rotate([lambda: 0, lambda: 1, lambda: 2])
    assert [run() for _ in range(5)] == [0, 1, 2, 0, 1]


@pytest.mark.gpu
def test_device_time_is_the_devices() -> None:
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    for flush in (False, True):
        timer = harness.device_timer(flush=flush)
        once = sorted(timer(lambda: target.copy_(source)) for _ in range(5))[2]
        assert 1e11 < 2 * source.nbytes / once < 1e14, "bytes a second of a copy"
        both = sorted(timer(lambda: target.copy_(source).copy_(source)) for _ in range(5))[2]
        assert 1.7 < both / once < 2.3


# -- wrong results ---------------------------------------------------------------------------------


def test_a_wrong_result_gets_no_time() -> None:
    clock, timed = Clock(), []

    def timer(run: Callable[[], Any]) -> float:
        timed.append(run)
        return 1.0

    def check(name: str, result: Any) -> None:
        assert name != "wrong", "off by 0.3"

    def broken() -> None:
        raise RuntimeError("no such backend\nmore")

    right, wrong = clock.work(1.0), clock.work(1.0)
    variants = {"vitrail": right, "wrong": wrong, "absent": broken, "peer": clock.work(1.0)}
    found = harness.measure(harness.Case(variants, check), timer, rounds=2)
    assert found["variants"]["wrong"] == {"wrong": "AssertionError: off by 0.3"}
    assert found["variants"]["absent"] == {"failed": "RuntimeError: no such backend"}
    assert found["ratios"] == {"peer": 1.0}
    assert wrong not in timed
    assert timed.count(right) == 2
    assert not harness.faults(found), "a peer's fault is not ours"

    ours = {"vitrail": wrong, "peer": right}
    timed.clear()
    found = harness.measure(harness.Case(ours, lambda *_: check("wrong", 0)), timer)
    assert not timed, "where ours is wrong nothing is timed"
    assert harness.faults(found) == {"vitrail": "wrong: AssertionError: off by 0.3"}


PLANTED: dict[str, Callable[[Any], Any]] = {
    "one number": lambda t: t["out"][17, 5].add_(3e-4 * t["out"].abs().max()),
    "an unwritten row": lambda t: t["out"][39].fill_(float("nan")),
    "statistics": lambda t: t["stats"][0, 3].add_(0.01),
    "nothing": lambda t: None,
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_in_a_kernel_is_caught_before_timing(planted: str) -> None:
    built: list[Any] = []

    def build(device: str) -> Any:
        built.append(problems.linear(device, 40, 96, 64, norm_eps=1e-5, residual=True))
        return built[-1]

    case = operators.case_of(build, "cpu")
    whole, timed = case.variants["vitrail"], []

    def ours() -> torch.Tensor:
        out: torch.Tensor = whole()
        for problem in built:
            PLANTED[planted](problem.tensors)
        return out

    def timer(run: Callable[[], Any]) -> float:
        timed.append(run)
        return 1.0

    variants = {**case.variants, "vitrail": ours}
    found = harness.measure(dataclasses.replace(case, variants=variants), timer, rounds=1)
    if planted == "nothing":
        assert not harness.faults(found)
        assert len(timed) == 3
        assert found["ratios"].keys() == {"torch"}, "the product alone is a bound, not a peer"
    else:
        assert "wrong" in found["variants"]["vitrail"], found
        assert not timed


def test_a_wrong_peer_of_a_kernel_gets_no_time() -> None:
    case = operators.case_of(lambda device: problems.attention(device, 2, 9, 2, 64), "cpu")
    right = case.variants["math"]
    swapped = {**case.variants, "math": lambda: right().flip(0)}
    found = harness.measure(dataclasses.replace(case, variants=swapped), rounds=1)["variants"]
    assert "wrong" in found["math"]
    assert "median_ms" in found["flash"]


@pytest.mark.parametrize("family", TOWERS)
def test_kernels_and_models_agree_with_their_peers(family: str) -> None:
    spec = TOWERS[family]
    text = {"text": lambda device: problems.text_attention(device, [3, 9, 5], 2, 64)}
    for name, build in (problems.vision_problems(spec, 3) | text).items():
        case = operators.case_of(build, "cpu")
        found = harness.measure(case, rounds=1, ceilings={"tflops": 0.1, "gbs": 10.0})
        assert not harness.faults(found), (name, found)
        assert not any("wrong" in variant for variant in found["variants"].values()), (name, found)
        assert found["ratio"] == min(found["ratios"].values())
        rates = {"gbs", "gbs_of_ceiling"} | ({"tflops"} if name != "layernorm" else set())
        assert rates <= found["variants"]["vitrail"].keys(), name

    case = models.vision_case(spec, 3, "cpu")
    assert case.variants.keys() == {"vitrail", "vitrail uint8", "eager"}
    assert case.flops["vitrail"] < case.flops["eager"], "ours is pooled, theirs is not"
    found = harness.measure(case, rounds=1)
    assert all("median_ms" in variant for variant in found["variants"].values()), found
    assert found["ratios"].keys() == {"eager"}
    with pytest.raises(AssertionError):
        case.check("eager", case.variants["eager"]().flip(0))


def test_captions_agree_with_padded_peers() -> None:
    case = models.text_case(CAPTIONS, 6, "cpu")
    assert case.variants.keys() == {"vitrail", "eager at 40", "eager at 30"}
    found = harness.measure(case, rounds=1)
    assert all("median_ms" in variant for variant in found["variants"].values()), found
    assert case.flops["vitrail"] < case.flops["eager at 30"] < case.flops["eager at 40"]
    with pytest.raises(AssertionError):
        case.check("vitrail", case.variants["vitrail"]().roll(1, 0))


# -- host time and latency -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forward() -> Iterator[Any]:
    """A small ViT on the stand-in; Triton's driver is put back afterwards."""
    if not native_can_run():
        pytest.skip("needs triton's compiler, vitrail._C and a C++ compiler")
    host = importlib.import_module("host")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.triton_driver, "_active", None)
        yield host.Forward(TOWERS["ViT"], "cpu")


def native_can_run() -> bool:
    ready = MISSING is None and native.MISSING is None and not interpreted()
    return ready and standin.compiler() is not None


def test_host_time_is_of_the_same_launches(forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both runners get as far as the launcher with the same grids in the same order."""
    host, grids = sys.modules["host"], list[Any]()
    monkeypatch.setattr(host.NoLauncher, "__call__", lambda _, *given: grids.append(given[:3]))
    for batch in (2, 40):
        case = forward.case(batch)
        assert case.variants.keys() == {"vitrail", "vitrail C++", "triton"}
        grids.clear()
        case.variants["triton"]()
        for name in ("vitrail", "vitrail C++"):
            forward.driver.record(True)
            case.variants[name]()
            launched = [launch.grid for launch in forward.driver.launched()]
            forward.driver.record(False)
            forward.driver.reset()
            assert launched == grids
            assert len(launched) == len(forward.plan.launches)
    nothing = dict.fromkeys(case.variants, lambda: None)
    with pytest.raises(AssertionError, match="vitrail: got 0 launches"):
        forward.check(nothing)
    found = harness.measure(forward.case(2), host.sample(2, time.thread_time), rounds=2)
    assert all("median_ms" in variant for variant in found["variants"].values()), found


def test_a_warm_call_allocates_nothing_in_cpp(forward: Any) -> None:
    found = sys.modules["host"].counts(forward, (1, 40))
    assert found.keys() == {"batch 1", "batch 40"}
    for counted in found.values():
        assert counted["first"] > len(forward.plan.launches), "the program counts nothing"
        assert counted["later"] == 0
        assert 0 < counted["us"] < 1000


def test_host_samples_are_means_of_warm_calls() -> None:
    host, clock = importlib.import_module("host"), Clock()
    order: list[str] = []
    work = clock.work(0.5)
    timer = host.sample(4, clock, lambda: order.append("before"))
    assert timer(lambda: (order.append("run"), work())) == 0.5
    assert order == ["run", "before", *["run"] * 4]


def test_latency_agrees_with_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_OVERLAP", "kept")
    for case in (latency.image_case(TOWERS["CLIP"], "cpu"), latency.text_case(CAPTIONS, "cpu")):
        assert case.variants.keys() == {"vitrail", "vitrail overlap", "eager"}
        found = harness.measure(case, rounds=1)
        assert all("median_ms" in variant for variant in found["variants"].values()), found
        with pytest.raises(AssertionError):
            case.check("vitrail", case.variants["vitrail"]().roll(1, 1))
    assert os.environ["VITRAIL_OVERLAP"] == "kept"
    with latency.overlapping(True):
        assert os.environ["VITRAIL_OVERLAP"] == "1"


def test_a_first_embedding_is_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "PROCESSES", 1)
    found = latency.load(TOWERS["ViT"], "cpu")["variants"]["vitrail"]
    assert found["rounds"] == 1
    assert 0 <= found["gpu_start_ms"] < found["median_ms"]
    monkeypatch.setattr(latency, "FIRST", "raise SystemExit('no such device')")
    with pytest.raises(RuntimeError, match="no such device"):
        latency.load(TOWERS["ViT"], "cpu")


# -- slower results --------------------------------------------------------------------------------


def _result(folder: Path, milliseconds: float, name: str = "kernels", **other: Any) -> Path:
    """A file as a suite writes it: ours takes that long, the peer 3 ms, and both waver by 2 %."""
    clock = Clock()

    def wavering(seconds: float) -> Callable[[], None]:
        turns = harness.rotate([clock.work(seconds * (1 + w)) for w in (-0.02, 0.0, 0.02)])
        return lambda: turns()

    variants = {"vitrail": wavering(milliseconds / 1e3), "peer": wavering(other.pop("peer", 3e-3))}
    timer = harness.host_timer(clock=clock)
    case = harness.measure(harness.Case(variants, _right), timer, rounds=9)
    ceiling = {"variants": {"8192": {"median_ms": other.pop("ceiling", 1.0)}}}
    path = folder / f"{name}.json"
    harness.write(path, {"qkv": case, "out": case, "ceilings": {"matmul": ceiling}} | other)
    return path


def _compare(*words: Any) -> int:
    code: int = compare.main([str(word) for word in words])
    return code


def test_a_planted_slowdown_of_a_tenth_is_caught(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = _result(tmp_path / "old", 1.0)
    assert _compare(old, _result(tmp_path / "slow", 1.1)) == 1
    assert "+10.0 %  SLOWER" in capsys.readouterr().out
    assert _compare(tmp_path / "old", tmp_path / "slow") == 1, "folders too"
    assert _compare(old, tmp_path / "slow" / "kernels.json", "--threshold", 11) == 0
    assert _compare(old, old) == 0
    assert _compare(old, _result(tmp_path / "within", 1.04)) == 0
    assert _compare(old, _result(tmp_path / "fast", 0.8)) == 0
    assert "faster" in capsys.readouterr().out


def test_peers_and_ceilings_may_be_slower(tmp_path: Path) -> None:
    old = _result(tmp_path / "old", 1.0)
    assert _compare(old, _result(tmp_path / "new", 1.0, peer=9e-3, ceiling=9.0)) == 0


@pytest.mark.parametrize("kind", ["wrong", "failed"])
def test_what_is_missing_or_wrong_is_not_passed_over(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = _result(tmp_path / "old", 1.0)
    bad = {"variants": {"vitrail": {kind: "off by 0.3"}, "peer": {}}}
    assert _compare(old, _result(tmp_path / "bad", 1.0, qkv=bad)) == 1
    assert f"{kind}: off by 0.3" in capsys.readouterr().out
    assert _compare(old, _result(tmp_path / "new", 1.0, qkv={"variants": {}})) == 1
    assert "missing" in capsys.readouterr().out
    more = _result(tmp_path / "more", 1.0, up={"variants": {"vitrail": {"median_ms": 1.0}}})
    assert _compare(old, more) == 0
    _result(tmp_path / "old", 1.0, name="models")
    assert _compare(tmp_path / "old", tmp_path / "more") == 1, "a whole suite is missing"


def test_other_devices_are_compared_by_their_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = _result(tmp_path / "old", 1.0)
    found = environment.environment()
    monkeypatch.setattr(harness, "environment", lambda device: found | {"gpu": "another"})
    same = _result(tmp_path / "same", 0.5, peer=1.5e-3)
    slower = _result(tmp_path / "slower", 0.5, peer=1.35e-3)
    assert _compare(old, same) == 2
    assert _compare(old, same, "--ratios") == 0
    assert _compare(old, slower, "--ratios") == 1


def test_committed_results_are_not_slower_than_themselves() -> None:
    results = ROOT / "benchmarks" / "results" / "cpu"
    cases = compare.ours(compare.records(results), ratios=False)
    assert len(cases) == 17
    assert all(isinstance(value, float) for value in cases.values())
    assert _compare(results, results) == 0


# -- where a result is from ------------------------------------------------------------------------


def test_a_record_says_what_its_numbers_depend_on() -> None:
    found = environment.environment()
    assert found.keys() >= {"gpu", "driver", "torch", "triton", "commit", "dirty", "command"}
    unknown = {name for name, value in found.items() if value is None}
    assert {"gpu", "gpu_arch", "gpu_memory", "gpu_sms", "driver", "clocks"} <= unknown
    assert unknown <= {"gpu", "gpu_arch", "gpu_memory", "gpu_sms", "driver", "clocks", "cuda"}
    assert found["torch"] == torch.__version__
    assert found["transformers"] == transformers.__version__
    assert found["date"].endswith("UTC")
    assert len(found["sources"]) == 64


def _git(folder: Path, *words: str) -> None:
    named = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *named, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clean repository in place of the project's."""
    folder = tmp_path / "tree"
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "a.py").write_text("a = 1\n")
    _git(folder, "init", "-q")
    _git(folder, "add", ".")
    _git(folder, "commit", "-qm", "one")
    monkeypatch.setattr(environment, "ROOT", folder)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    return folder


def test_a_dirty_tree_is_refused_unless_told(tree: Path) -> None:
    commit, dirty = environment.revision()
    assert (len(commit), dirty) == (40, False)
    environment.refuse_dirty(allowed=False)
    results = tree / "benchmarks" / "results" / "cpu"
    results.mkdir(parents=True)
    (results / "a.json").write_text("{}")
    (tree / "notes.txt").write_text("untracked, and no code")
    assert environment.revision() == (commit, False), "results are no change"
    for change in (tree / "kernels" / "a.py", tree / "kernels" / "new.py"):
        change.write_text("a = 2\n")
        assert environment.revision() == (commit, True)
        with pytest.raises(SystemExit, match="uncommitted changes"):
            environment.refuse_dirty(allowed=False)
        with pytest.raises(SystemExit, match="uncommitted changes"):
            harness.arguments("about", ["case"], ["--device", "cpu"])
        environment.refuse_dirty(allowed=True)
        assert harness.arguments("about", ["case"], ["--allow-dirty"]).cases == ["case"]
        _git(tree, "add", ".")
        _git(tree, "commit", "-qm", "two")
        commit = environment.revision()[0]


def test_a_folder_is_of_the_commit_that_changed_it_last(tree: Path) -> None:
    commit, _ = environment.revision()
    (tree / "notes.txt").write_text("no kernel")
    _git(tree, "add", ".")
    _git(tree, "commit", "-qm", "two")
    assert environment.revision()[0] != commit
    assert environment.last_change(tree / "kernels") == commit
    (tree / "kernels" / "new.py").write_text("a = 2\n")
    assert environment.last_change(tree / "kernels") == f"{commit}-dirty"
    shutil.rmtree(tree / ".git")
    assert environment.last_change(tree / "kernels") == "unknown"


def test_a_copy_without_git_is_dirty_unless_its_commit_is_told(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(tree / ".git")
    assert environment.revision() == ("unknown", True)
    monkeypatch.setenv("VITRAIL_COMMIT", "0123abcd")
    assert environment.revision() == ("0123abcd", False)
    monkeypatch.setenv("VITRAIL_COMMIT", "0123abcd-dirty")
    assert environment.revision() == ("0123abcd", True)


def test_sources_are_the_code_and_nothing_else(tree: Path) -> None:
    first = environment.sources()
    (tree / "benchmarks" / "results").mkdir(parents=True)
    (tree / "benchmarks" / "results" / "a.json").write_text("{}")
    assert environment.sources() == first
    (tree / "kernels" / "a.py").write_text("a = 2\n")
    assert environment.sources() != first


# -- suites ----------------------------------------------------------------------------------------


def _suite(path: Path, cases: dict[str, Any], **options: Any) -> int:
    code: int = harness.run_suite(path, cases, "cpu", **options)
    return code


def test_a_suite_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, clock, ran = tmp_path / "kernels.json", Clock(), []

    def case(name: str, fault: str | None = None) -> Callable[[], Any]:
        def run() -> Any:
            ran.append(name)
            clock.now += 10.0
            ours = {"wrong": fault} if fault else {"median_ms": 1.0}
            return {"variants": {"vitrail": ours}}

        return run

    def broken() -> Any:
        raise ValueError("cannot be built")

    monkeypatch.setattr(harness, "sources", lambda: "here")
    found = environment.environment() | {"sources": "here"}
    monkeypatch.setattr(harness, "environment", lambda device: found)
    cases = {"a": case("a"), "b": case("b", "off"), "c": case("c"), "d": broken}
    options = {"resume": True, "clock": clock}
    assert _suite(path, cases, seconds=25.0, **options) == harness.UNFINISHED
    assert ran == ["a", "b"], "a third one would not have ended in time"
    assert json.loads(path.read_text())["results"].keys() == {"a", "b"}
    assert _suite(path, cases, ceilings={"matmul": {}}, **options) == 1
    assert ran == ["a", "b", "b", "c"], "what was wrong is run again, what was right is not"
    results = json.loads(path.read_text())["results"]
    assert results.keys() == {"a", "b", "c", "d", "ceilings"}
    assert results["d"]["variants"]["vitrail"] == {"failed": "ValueError: cannot be built"}

    cases |= {"b": case("b"), "d": case("d")}
    assert _suite(path, cases, **options) == 0
    assert ran[4:] == ["b", "d"]
    monkeypatch.setattr(harness, "sources", lambda: "changed")
    assert _suite(path, {"a": case("a")}, **options) == 0
    assert ran[6:] == ["a"], "results of other sources are not kept"
    assert json.loads(path.read_text())["results"].keys() == {"a"}


def test_a_suite_without_resume_measures_anew(tmp_path: Path) -> None:
    path, ran = tmp_path / "kernels.json", []
    cases = {"a": lambda: ran.append("a") or {"variants": {"vitrail": {"median_ms": 1.0}}}}
    assert [_suite(path, cases), _suite(path, cases)] == [0, 0]
    assert ran == ["a", "a"]


def test_an_unknown_case_is_refused() -> None:
    with pytest.raises(SystemExit):
        harness.arguments("about", ["B/16 x 64 qkv"], ["--allow-dirty", "C/16"])


def test_the_report_shows_rates_ratios_and_faults(tmp_path: Path) -> None:
    (tmp_path / "card").mkdir()
    ours = {"median_ms": 0.25, "tflops": 600.0, "tflops_of_ceiling": 0.8, "per_second": 256000.0}
    right = {
        "variants": {"vitrail": ours, "cublas": {"median_ms": 0.2}, "torch": {"wrong": "off"}},
        "ratio": 1.5,
        "against": "compile",
        "ratios": {"eager": 2.0, "compile": 1.5},
    }
    wrong = {"variants": {"vitrail": {"wrong": "off by 0.3"}}}
    found = environment.environment() | {"gpu": "Card", "dirty": True}
    for suite in ("kernels", "models"):
        record = {"environment": found, "results": {"B/16 qkv": right, "B/16 out": wrong}}
        (tmp_path / "card" / f"{suite}.json").write_text(json.dumps(record))
    lines = list(report.render(tmp_path))
    assert lines[0].startswith("Card, driver None, torch ")
    assert lines[0].endswith(" dirty")
    kernel = next(line for line in lines if line.startswith("B/16 qkv"))
    assert "0.2500" in kernel
    assert "600 TFLOP/s 80% 0.80x 1.50x compile torch wrong" in " ".join(kernel.split())
    assert sum("vitrail WRONG: off by 0.3" in line for line in lines) == 2
    assert any("eager 2.00x, compile 1.50x" in line for line in lines)

    times = {"vitrail": {"median_ms": 0.0512}, "triton": {"median_ms": 7.5}}
    bad = {"variants": {"vitrail": {"wrong": "off by 0.3"}}}
    for suite in ("host", "latency"):
        results = {"batch 1": {"variants": times, "goal_ms": 0.45}, "batch 8": bad}
        record = {"environment": found, "results": results}
        (tmp_path / "card" / f"{suite}.json").write_text(json.dumps(record))
    lines = [" ".join(line.split()) for line in report.render(tmp_path)]
    assert "batch 1 vitrail 51.2, triton 7500.0" in lines
    assert "batch 1 vitrail 0.051, triton 7.500 (goal 0.45)" in lines
    assert lines.count("batch 8 vitrail WRONG: off by 0.3") == 2


# -- shapes ----------------------------------------------------------------------------------------

PUBLISHED = {
    "B/32": ("clip-vit-base-patch32", 50),
    "B/16": ("vit-base-patch16-224", 197),
    "L/14": ("clip-vit-large-patch14", 257),
    "H/14": ("clip-vit-h-14-laion2b", 257),
    "DINOv2-B@518": ("dinov2-base", 1370),
}


@pytest.mark.parametrize("name", shapes.VISION)
def test_shapes_are_those_of_the_published_models(name: str) -> None:
    checkpoint, tokens = PUBLISHED[name]
    spec = shapes.VISION[name]
    assert spec == read_spec(checkpoints.load(checkpoint)).vision
    assert spec.tokens_at(spec.image) == tokens
    # and what transformers builds of the shapes is the same model again
    kind, config, options = models.architecture(spec)
    with torch.device("meta"):
        built = kind(config, **options)
    tensors = {key: ("F32", tuple(value.shape)) for key, value in built.state_dict().items()}
    told = {**config.to_dict(), "architectures": [kind.__name__]}
    assert read_spec(checkpoints.fake(told, tensors)).vision == spec


def test_shapes_are_the_defaults_of_transformers() -> None:
    for name, default in {
        "B/16": transformers.ViTConfig(),
        "B/32": transformers.CLIPVisionConfig(),
    }.items():
        _, config, _ = models.architecture(shapes.VISION[name])
        assert config.to_dict() == default.to_dict()
    text = transformers.CLIPTextConfig(pad_token_id=shapes.EOS)
    assert models.architecture(shapes.TEXT["CLIP-B text"])[1].to_dict() == text.to_dict()


@pytest.mark.parametrize("name", shapes.VISION)
def test_kernels_are_measured_at_the_shapes_of_the_plan(name: str) -> None:
    spec = shapes.VISION[name]
    dense = plans.vision_dense(spec)
    buffers = {buffer.name: buffer for buffer in dense.buffers}
    weights = dict(dense.weights)
    found = problems.vision_problems(spec, 2)
    tokens = spec.tokens_at(spec.image)
    for part in ("qkv", "attention", "out", "up", "down"):
        launch = next(x for x in dense.launches if x.label == f"vision.blocks.0.{part}")
        problem = found[part]("meta")
        assert problem.op == launch.op
        given = {name: buffers[x].shape(2, 2 * tokens, tokens) for name, x in launch.buffers}
        given |= {name: tuple(weights[x].shape) for name, x in launch.weights}
        measured = {name: tuple(tensor.shape) for name, tensor in problem.tensors.items()}
        assert {**measured, **given} == measured, part
        assert measured.keys() - given.keys() <= {"stats", "x_stats", "row_sums"}, part
        scalars = [dict(launch.scalars), dict(problem.scalars)]
        own, theirs = ({k: v for k, v in x.items() if v and k != "max_seqlen"} for x in scalars)
        assert own == theirs, part


def test_every_named_case_can_be_built() -> None:
    for name, build in problems.problems().items():
        assert build("meta").tensors["out"].is_meta, name
    assert {model for model, _ in shapes.MODEL_CASES} <= shapes.VISION.keys() | shapes.TEXT.keys()
    assert min(shapes.CAPTIONS) == 5
    assert max(shapes.CAPTIONS) == 40


def test_what_a_model_launches_is_compiled_ahead() -> None:
    wide = dataclasses.replace(BLOCKS, width=128)
    target = Target(90, 132)

    def identities(blocks: BlockSpec, batch: int) -> set[Any]:
        spec = dataclasses.replace(TOWERS["CLIP"], blocks=blocks)
        plan = plans.vision_pooled(spec, uint8=True)
        pixels = torch.empty((batch, 28, 28, 3), dtype=torch.uint8, device="meta")
        calls = list(precompile.plan_calls(plan, [5] * batch, target, pixels=pixels))
        assert len(calls) >= len(plan.launches)
        return {precompile.identity(call) for call in calls}

    assert identities(BLOCKS, 2) == identities(BLOCKS, 3), "the batch makes no other kernel"
    shared = identities(BLOCKS, 2) & identities(wide, 2)
    assert not {name for name, *_ in shared if "linear" in name}, "the width does"


# -- gpu.sh ----------------------------------------------------------------------------------------

STUB = """#!/usr/bin/env bash
echo "$*" | head -n 1 >>"$STUB_LOG"
case "$*" in
*report.py*) cat "${@: -1}"; echo 'the table' ;;
*torch.cuda.is_available*) exit "${STUB_ENV:-0}" ;;
*operators.py*) echo 'kernels ran'; mkdir -p "$VITRAIL_RESULTS/card"
    echo '{}' >"$VITRAIL_RESULTS/card/kernels.json"; exit "${STUB_KERNELS:-0}" ;;
*ceilings.py*) sleep "${STUB_SLEEP:-0}" ;;
*models.py*) exit "${STUB_MODELS:-0}" ;;
esac
"""


SETTINGS = {"ALLOW_DIRTY", "FRESH", "LIMIT", "PYTHON", "STAGES", "STAGE_LIMIT", "VITRAIL_RESULTS"}


class Stage:
    """A copy of gpu.sh in a tree of its own, with a python3 that only notes what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.out = folder, folder / "log", folder / "out"
        for name in ("engine", "kernels", "csrc", "benchmarks", "tests", "bin"):
            (folder / name).mkdir()
        for name in ("setup.py", "pyproject.toml", "engine/a.py"):
            (folder / name).write_text("")
        shutil.copy(ROOT / "benchmarks" / "gpu.sh", folder / "benchmarks")
        refused = "#!/bin/sh\necho 'Error: Device not supported'\nexit 1\n"
        for name, text in (("python3", STUB), ("compute-sanitizer", refused)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def __call__(self, **settings: str) -> tuple[int, list[str], str]:
        """Exit code, what python3 was asked, and the output."""
        self.log.write_text("")
        done = subprocess.run(
            ["bash", "benchmarks/gpu.sh"],
            cwd=self.folder,
            env={
                **{name: value for name, value in os.environ.items() if name not in SETTINGS},
                "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
                "STUB_LOG": str(self.log),
                "OUT": str(self.out),
                **settings,
            },
            capture_output=True,
            text=True,
        )
        return done.returncode, self.log.read_text().splitlines(), done.stdout + done.stderr


@pytest.fixture
def gpu(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_gpu_stages_run_in_order_once(gpu: Stage) -> None:
    subprocess.run(["bash", "-n", ROOT / "benchmarks" / "gpu.sh"], check=True)
    code, asked, said = gpu()
    assert code == 0, said
    tests = "-P -m pytest -m gpu -q -ra --durations=5"
    wanted = "-c|setup.py build_ext --inplace|setup.py build_cuda_images --editable-mode|"
    wanted += "-P -c import vitrail._C|benchmarks/precompile.py|"
    wanted += f"{tests} tests/gpu/test_native.py|benchmarks/latency.py --resume|"
    wanted += "benchmarks/models.py --resume|benchmarks/host.py --resume|"
    wanted += f"{tests} --ignore=tests/gpu/test_native.py tests/gpu|"
    wanted += "benchmarks/operators.py --resume --seconds 480|benchmarks/ceilings.py --resume|"
    wanted += "benchmarks/report.py"
    for line, start in zip(asked, wanted.split("|"), strict=True):
        assert line.startswith(start)
    assert said.rstrip().endswith("the table"), "the table comes last"
    assert "sanitizer    NOT RUN: compute-sanitizer does not support this device" in said
    assert (gpu.out / "card" / "kernels.json").exists()
    assert "kernels ran" in (gpu.out / "gpu.log").read_text()
    assert (gpu.out / "gpu-table.txt").read_text() in said

    code, asked, said = gpu()
    assert (code, len(asked)) == (0, 1), "only the table again"
    assert "kernels      ok, earlier" in said
    (gpu.folder / "engine" / "a.py").write_text("changed = True")
    assert len(gpu(ALLOW_DIRTY="1")[1]) == 13, "other files, nothing is known of them"
    assert len(gpu(FRESH="1")[1]) == 13


def test_a_failed_stage_is_told_and_the_others_run(gpu: Stage) -> None:
    code, asked, said = gpu(STUB_KERNELS="1", STUB_MODELS="3", ALLOW_DIRTY="1")
    assert code == 1
    assert len(asked) == 13
    assert all(line.endswith("--allow-dirty") for line in asked if "--resume" in line)
    assert "kernels      FAILED with 1" in said
    assert "models       unfinished" in said
    code, asked, said = gpu(STAGES="kernels models")  # in the order that is asked for
    assert code == 0
    assert [line.split()[0] for line in asked] == [
        "benchmarks/operators.py",
        "benchmarks/models.py",
        "benchmarks/report.py",
    ]


def test_the_sanitizer_looks_at_overlapped_launches_too(gpu: Stage) -> None:
    """Each tool, with and without; what passed is not run again."""
    noted = f"""#!/bin/sh
echo "$2 $VITRAIL_OVERLAP $VITRAIL_GPU_TESTS_RUNNER" >>"{gpu.log}"
case "$2 $VITRAIL_OVERLAP" in "racecheck 1") exit "${{STUB_RACE:-0}}" ;; esac
"""
    (gpu.folder / "bin" / "compute-sanitizer").write_text(noted)
    code, asked, said = gpu(STAGES="sanitizer", STUB_RACE="9")
    assert (code, "sanitizer    FAILED with 1" in said) == (1, True)
    tools = ("memcheck", "racecheck")
    assert asked[:4] == [f"{tool} {overlap} native" for tool in tools for overlap in "01"]
    code, asked, said = gpu(STAGES="sanitizer")
    assert (code, asked[0], len(asked)) == (0, "racecheck 1 native", 2)


def test_a_stage_that_hangs_is_ended(gpu: Stage) -> None:
    code, asked, said = gpu(STAGES="ceilings kernels", STAGE_LIMIT="1", STUB_SLEEP="60")
    assert code == 1
    assert "ceilings     TIMED OUT" in said
    assert "kernels      ok" in said
    assert len(asked) == 3


def test_stages_share_what_is_left_of_the_limit(gpu: Stage) -> None:
    code, asked, said = gpu(LIMIT="415", STAGES="env native latency models")
    assert code == 0, said
    seconds = [int(line.rpartition(" ")[2]) for line in asked if "--seconds" in line]
    # Of 400 seconds the last has all that the others did not take, the one before a third of it.
    assert seconds == [pytest.approx(400 * 3 / 9 - 60, abs=10), pytest.approx(340, abs=20)]
    assert "models       ok" in said


def test_nothing_starts_without_a_gpu_or_time(gpu: Stage) -> None:
    code, asked, said = gpu(STUB_ENV="1")
    assert code == 1
    assert len(asked) == 2, "the look at the GPU, and the table"
    assert said.count("not started: env failed") == 10
    code, asked, said = gpu(LIMIT="80")
    assert (code, len(asked)) == (1, 1)
    assert "not started: LIMIT is near" in said
    code, asked, said = gpu(STAGES="kernel")
    assert (code, asked) == (2, [])
