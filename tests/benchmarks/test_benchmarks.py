"""Benchmarks: nothing wrong is timed, nothing slower passes, every result says where it is from."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import re
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
from vitrail.plan.vision import vision_dense, vision_pooled
from vitrail.runtime import native
from vitrail.spec import BlockSpec, TextSpec, VisionSpec
from vitrail.zoo import read_spec
from vitrail_kernels.launch import MISSING, Target, interpreted

ROOT = Path(__file__).parents[2]
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
    suite,
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
        "suite",
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


def test_latency_includes_the_synchronization() -> None:
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


def test_a_wrong_result_is_timed_and_marked_and_enters_no_ratio() -> None:
    def check(name: str, result: Any) -> None:
        assert name not in wrong, "off by 0.3"

    def broken() -> None:
        raise RuntimeError("no such backend\nmore")

    wrong = {"spoiled"}
    variants = {name: Clock().work(1.0) for name in ("vitrail", "spoiled", "peer")}
    variants["absent"] = broken
    results = harness.measure(harness.Case(variants, check), lambda run: 1.0, rounds=2)
    spoiled = results["variants"]["spoiled"]
    assert spoiled["wrong"] == "AssertionError: off by 0.3"
    assert spoiled["median_ms"] == 1000
    assert results["variants"]["absent"] == {"failed": "RuntimeError: no such backend"}
    assert results["ratios"] == {"peer": 1.0}
    assert not harness.faults(results), "a peer's fault is not ours"

    wrong = {"vitrail"}
    results = harness.measure(harness.Case(variants, check), lambda run: 1.0, rounds=2)
    assert all("median_ms" in results["variants"][name] for name in ("vitrail", "peer"))
    assert "ratio" not in results
    assert harness.faults(results) == {"vitrail": "wrong: AssertionError: off by 0.3"}
    assert "WRONG" in suite.line("qkv", results)


def test_ours_and_eager_have_their_times_before_a_compiler_begins() -> None:
    """And each result is kept as soon as it is there."""
    order: list[str] = []
    kept: list[Any] = []
    variants = {
        name: functools.partial(order.append, name) for name in ("vitrail", "compile", "eager")
    }
    case = harness.Case(variants, _right, late=("compile",))
    whole = harness.measure(
        case, harness.host_timer(), 2, 1, keep=lambda results: kept.append(json.dumps(results))
    )
    assert "compile" not in order[: order.index("compile")]
    first = order[: order.index("compile")]
    assert (first.count("vitrail"), first.count("eager")) == (4, 4), "one check, one, two timed"
    early, late = map(json.loads, kept)
    assert early["variants"].keys() == {"vitrail", "eager"}
    assert early["ratios"].keys() == {"eager"}
    assert late == json.loads(json.dumps(whole))
    assert whole["ratios"].keys() == {"eager", "compile"}
    assert whole["variants"]["vitrail"] == early["variants"]["vitrail"], "one time of ours"


@pytest.mark.parametrize("fails", ["vitrail", "compile"])
def test_a_failure_costs_no_more_compilers(fails: str) -> None:
    timed: list[Any] = []

    def broken() -> None:
        raise RuntimeError("no")

    variants = {name: Clock().work(1.0) for name in ("vitrail", "eager", "compile", "autotune")}
    variants[fails] = broken
    case = harness.Case(variants, _right, late=("compile", "autotune"))
    results = harness.measure(case, lambda run: timed.append(run) or 1.0, rounds=1)
    assert results["variants"][fails] == {"failed": "RuntimeError: no"}
    if fails == "vitrail":
        assert results["variants"].keys() == {"vitrail", "eager"}
    else:
        assert results["ratios"].keys() == {"eager", "autotune"}
        assert timed.count(variants["vitrail"]) == 2, "not beside nothing"


PLANTED: dict[str, Callable[[Any], Any]] = {
    "one number": lambda t: t["out"][17, 5].add_(3e-4 * t["out"].abs().max()),
    "an unwritten row": lambda t: t["out"][39].fill_(float("nan")),
    "statistics": lambda t: t["stats"][0, 3].add_(0.01),
    "nothing": lambda t: None,
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_in_a_kernel_is_caught(planted: str) -> None:
    built: list[Any] = []

    def build(device: str) -> Any:
        built.append(problems.linear(device, 40, 96, 64, norm_eps=1e-5, residual=True))
        return built[-1]

    case = operators.case_of(build, "cpu")
    whole = case.variants["vitrail"]

    def ours() -> torch.Tensor:
        out: torch.Tensor = whole()
        for problem in built:
            PLANTED[planted](problem.tensors)
        return out

    variants = {**case.variants, "vitrail": ours}
    changed = dataclasses.replace(case, variants=variants)
    results = harness.measure(changed, lambda run: 1.0, rounds=1)
    assert "median_ms" in results["variants"]["vitrail"]
    if planted == "nothing":
        assert not harness.faults(results)
        assert results["ratios"].keys() == {"torch"}, "the product alone is a bound, not a peer"
    else:
        assert "wrong" in results["variants"]["vitrail"], results
        assert "ratios" not in results


def test_a_wrong_peer_of_a_kernel_gets_no_ratio() -> None:
    case = operators.case_of(lambda device: problems.attention(device, 2, 9, 2, 64), "cpu")
    right = case.variants["math"]
    swapped = {**case.variants, "math": lambda: right().flip(0)}
    results = harness.measure(dataclasses.replace(case, variants=swapped), rounds=1)
    assert "wrong" in results["variants"]["math"]
    assert "math" not in results["ratios"]
    assert "flash" in results["ratios"]


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
            assert len(launched) == len(forward.plan.steps)
    nothing = dict.fromkeys(case.variants, lambda: None)
    with pytest.raises(AssertionError, match="vitrail: got 0 launches"):
        forward.check(nothing)
    found = harness.measure(forward.case(2), host.sample(2, time.thread_time), rounds=2)
    assert all("median_ms" in variant for variant in found["variants"].values()), found


def test_a_warm_call_allocates_nothing_in_cpp(forward: Any) -> None:
    found = sys.modules["host"].counts(forward, (1, 40))
    assert found.keys() == {"batch 1", "batch 40"}
    for counted in found.values():
        assert counted["first"] > len(forward.plan.steps), "the program counts nothing"
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
    suite.write(path, {"qkv": case, "out": case, "ceilings": {"matmul": ceiling}} | other)
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
    monkeypatch.setattr(suite, "environment", lambda device: found | {"gpu": "another"})
    same = _result(tmp_path / "same", 0.5, peer=1.5e-3)
    slower = _result(tmp_path / "slower", 0.5, peer=1.35e-3)
    assert _compare(old, same) == 2
    assert _compare(old, same, "--ratios") == 0
    assert _compare(old, slower, "--ratios") == 1


def test_committed_results_are_not_slower_than_themselves() -> None:
    results = ROOT / "benchmarks" / "results" / "cpu"
    cases = compare.ours(compare.records(results), ratios=False)
    assert len(cases) == 47
    assert all(isinstance(value, float) for value in cases.values())
    assert _compare(results, results) == 0


# -- where a result is from ------------------------------------------------------------------------


def test_a_record_says_what_its_numbers_depend_on() -> None:
    found = environment.environment()
    assert found.keys() >= {"gpu", "driver", "torch", "triton", "commit", "dirty", "command"}
    unknown = {name for name, value in found.items() if value is None}
    card = {"gpu", "gpu_arch", "gpu_memory", "gpu_sms", "driver", "clocks", "tuned"}
    assert card <= unknown <= card | {"cuda"}
    assert re.match(r"\d+\.\d+", found["ptxas"])
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
            suite.arguments("about", ["case"], ["--device", "cpu"])
        environment.refuse_dirty(allowed=True)
        assert suite.arguments("about", ["case"], ["--allow-dirty"]).cases == ["case"]
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


def test_a_copy_without_git_is_of_the_commit_that_was_packed(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(tree / ".git")
    monkeypatch.delenv("VITRAIL_COMMIT", raising=False)
    assert environment.revision() == ("unknown", True)
    environment.refuse_dirty(allowed=False)
    packed = tree / environment.PACKED
    packed.parent.mkdir(parents=True)
    for text, revision in (
        ("0123abcd", ("0123abcd", False)),
        ("0123abcd-dirty", ("0123abcd", True)),
    ):
        packed.write_text(f"{text} {environment.sources()}\n")
        assert environment.revision() == revision
        assert environment.describe() == text
        environment.refuse_dirty(allowed=False)
    packed.write_text(f"0123abcd {environment.sources()}\n")
    (tree / "kernels" / "a.py").write_text("a = 2\n")
    assert environment.revision() == ("0123abcd", True), "changed since"
    monkeypatch.setenv("VITRAIL_COMMIT", "4567-dirty")
    assert environment.revision() == ("4567", True)


def test_sources_are_the_code_and_nothing_else(tree: Path) -> None:
    first = environment.sources()
    (tree / "benchmarks" / "results").mkdir(parents=True)
    (tree / "benchmarks" / "results" / "a.json").write_text("{}")
    for built in ("binaries/resize.json", "tuned/sm_90.json"):
        file = tree / "kernels/vitrail_kernels" / built
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    assert environment.sources() == first, "what calls build and measure is none of it"
    (tree / "kernels" / "a.py").write_text("a = 2\n")
    assert environment.sources() != first


# -- suites ----------------------------------------------------------------------------------------


def _suite(path: Path, cases: dict[str, Any], **options: Any) -> int:
    code: int = suite.run_suite(path, cases, "cpu", **options)
    return code


def test_a_suite_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, clock, ran = tmp_path / "kernels.json", Clock(), []

    def case(name: str, fault: str | None = None) -> Callable[[Any], Any]:
        def run(keep: Any) -> Any:
            ran.append(name)
            clock.now += 40.0
            ours = {"wrong": fault} if fault else {"median_ms": 1.0}
            return {"variants": {"vitrail": ours}}

        return run

    def broken(keep: Any) -> Any:
        raise ValueError("cannot be built")

    found = environment.environment() | {"sources": "here"}
    monkeypatch.setattr(suite, "environment", lambda device: found)
    cases = {"a": case("a"), "b": case("b", "off"), "c": case("c"), "d": broken}
    options = {"resume": True, "clock": clock}
    assert _suite(path, cases, seconds=100.0, **options) == suite.UNFINISHED
    assert ran == ["a", "b"], "a third one would not have had its first times"
    assert json.loads(path.read_text())["results"].keys() == {"a", "b"}
    assert _suite(path, cases, ceilings={"matmul": {}}, **options) == 1
    assert ran == ["a", "b", "c", "b"], "what was wrong is run again, and last"
    results = json.loads(path.read_text())["results"]
    assert results.keys() == {"a", "b", "c", "d", "ceilings"}
    assert results["d"]["variants"]["vitrail"] == {"failed": "ValueError: cannot be built"}

    cases |= {"b": case("b"), "d": case("d")}
    assert _suite(path, cases, **options) == 0
    assert ran[4:] == ["b", "d"]
    for number, name in enumerate(("sources", "tuned"), 7):
        found[name] = "changed"
        assert _suite(path, {"a": case("a")}, **options) == 0
        assert ran[6:] == ["a"] * (number - 6), "results of other sources or tables are not kept"
        assert json.loads(path.read_text())["results"].keys() == {"a"}


def test_a_case_that_is_cut_in_half_leaves_its_half(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    half = {"variants": {"vitrail": {"median_ms": 1.0}}}

    def cut(keep: Any) -> Any:
        keep(half)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _suite(path, {"a": lambda keep: half, "b": cut})
    results = json.loads(path.read_text())["results"]
    assert results == {"a": half, "b": {**half, "unfinished": True}}
    assert _suite(path, {"a": cut, "b": lambda keep: half}, resume=True) == 0
    assert json.loads(path.read_text())["results"] == {"a": half, "b": half}


def test_a_lost_device_ends_the_suite_and_comes_last_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lost, ran = tmp_path / "models.json", {"a"}, list[str]()

    def case(name: str) -> Callable[[Any], Any]:
        def run(keep: Any) -> Any:
            ran.append(name)
            if name in lost:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return {"variants": {"vitrail": {"median_ms": 1.0}}}

        return run

    def free(device: str) -> None:
        if ran[-1] in lost:
            raise RuntimeError("CUDA error")

    monkeypatch.setattr(suite, "_free", free)
    cases = {name: case(name) for name in "abc"}
    assert _suite(path, cases, resume=True) == suite.LOST
    assert _suite(path, cases, resume=True) == suite.LOST
    assert ran == ["a", "b", "c", "a"], "it costs its own case"
    lost.clear()
    assert _suite(path, cases, resume=True) == 0


def test_a_suite_without_resume_measures_anew(tmp_path: Path) -> None:
    path, ran = tmp_path / "kernels.json", []
    cases = {"a": lambda keep: ran.append("a") or {"variants": {"vitrail": {"median_ms": 1.0}}}}
    assert [_suite(path, cases), _suite(path, cases)] == [0, 0]
    assert ran == ["a", "a"]


def test_an_unknown_case_is_refused() -> None:
    with pytest.raises(SystemExit):
        suite.arguments("about", ["B/16 x 64 qkv"], ["--allow-dirty", "C/16"])


def test_the_report_shows_rates_ratios_and_faults(tmp_path: Path) -> None:
    (tmp_path / "card").mkdir()
    ours = {"median_ms": 0.25, "tflops": 600.0, "tflops_of_ceiling": 0.8, "per_second": 256000.0}
    right = {
        "variants": {"vitrail": ours, "cublas": {"median_ms": 0.2}, "torch": {"wrong": "off"}},
        "ratio": 1.5,
        "against": "compile",
        "ratios": {"eager": 2.0, "compile": 1.5},
    }
    wrong = {"variants": {"vitrail": {"wrong": "off by 0.3", "median_ms": 0.2}}}
    found = environment.environment() | {"gpu": "Card", "dirty": True}
    for name in ("kernels", "models"):
        record = {"environment": found, "results": {"B/16 qkv": right, "B/16 out": wrong}}
        (tmp_path / "card" / f"{name}.json").write_text(json.dumps(record))
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
    for name in ("host", "latency"):
        results = {"batch 1": {"variants": times, "goal_ms": 0.45}, "batch 8": bad}
        record = {"environment": found, "results": results}
        (tmp_path / "card" / f"{name}.json").write_text(json.dumps(record))
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
    dense = vision_dense(spec)
    buffers = {buffer.name: buffer for buffer in dense.buffers}
    weights = dict(dense.weights)
    found = problems.vision_problems(spec, 2)
    tokens = spec.tokens_at(spec.image)
    for part in ("qkv", "attention", "out", "up", "down"):
        launch = next(x for x in dense.steps if x.label == f"vision.blocks.0.{part}")
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


def test_the_headline_is_measured_first() -> None:
    assert shapes.MODEL_CASES[0] == ("B/16", 256) == models.AUTOTUNED[0]
    assert next(iter(problems.problems())).startswith("B/16 x 256 ")
    spec = shapes.VISION["B/16"]
    assert models._modes(spec, 256, "cuda") == ("default", "max-autotune")
    assert models._modes(spec, 64, "cuda") == ("default",), "max-autotune takes minutes"


def test_ceilings_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings, ran = sys.modules["ceilings"], list[str]()

    def measured(name: str, device: str, keep: Any) -> Any:
        ran.append(name)
        rate = {"matmul": "tflops", "copy": "gbs"}[name]
        return {"variants": {"8192": {"median_ms": 1.0, rate: 2.0}}}

    monkeypatch.setattr(ceilings, "_measured", measured)
    for _ in range(2):
        bounds, best = ceilings.ceilings("cpu", tmp_path)
        assert bounds.keys() == {"matmul", "copy"}
        assert best == {"tflops": 2.0, "gbs": 2.0}
    assert ran == ["matmul", "copy"]


def test_what_a_model_launches_is_compiled_ahead() -> None:
    wide = dataclasses.replace(BLOCKS, width=128)
    target = Target(90, 132)

    def identities(blocks: BlockSpec, batch: int) -> set[Any]:
        spec = dataclasses.replace(TOWERS["CLIP"], blocks=blocks)
        plan = vision_pooled(spec, uint8=True)
        pixels = torch.empty((batch, 28, 28, 3), dtype=torch.uint8, device="meta")
        calls = list(precompile.plan_calls(plan, [5] * batch, target, pixels=pixels))
        assert len(calls) >= len(plan.steps)
        return {precompile.identity(call) for call in calls}

    assert identities(BLOCKS, 2) == identities(BLOCKS, 3), "the batch makes no other kernel"
    shared = identities(BLOCKS, 2) & identities(wide, 2)
    assert not {name for name, *_ in shared if "linear" in name}, "the width does"
