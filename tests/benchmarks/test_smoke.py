"""benchmarks/smoke.py: a step that hangs, is wrong, dies or loses the device costs its own line."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import standin
from vitrail.tools.bench import Bench
from vitrail_kernels.compile import KernelCode
from vitrail_kernels.configs import KernelConfig, read_table
from vitrail_kernels.launch import Call, Target

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
smoke = importlib.import_module("smoke")

STUB = """
import signal, sys, time
for name in sys.argv[sys.argv.index("--step") + 1:]:
    if "hang" in name:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(600)
    if "slow" in name:
        time.sleep(600)
    if "die" in name:
        sys.exit(5)
    verdict = "FAILED CUDA error" if "lost" in name else "WRONG" if "wrong" in name else "right"
    print(f"@ {name:34s} {verdict}", flush=True)
    if "lost" in name:
        sys.exit(70)
"""
Run = Callable[..., tuple[int, dict[str, str]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Run:
    """Runs groups whose steps are those of a program; gives the exit code, and each step's line."""

    def run_groups(
        groups: Sequence[tuple[Sequence[str], float]], seconds: float = 200, program: str = STUB
    ) -> tuple[int, dict[str, str]]:
        file = tmp_path / "steps.py"
        file.write_text(program)
        monkeypatch.setattr(smoke, "STEPS", file)
        monkeypatch.setattr(smoke, "LEAST", 0.5)
        monkeypatch.setattr(smoke, "GRACE", 0.5)
        code = smoke.Smoke("cpu", tmp_path, seconds).run([smoke.Group(*group) for group in groups])
        printed = capfd.readouterr().out.splitlines()
        lines = [text[2:] for text in printed if text.startswith("@ ")]
        return code, {line[:34].strip(): line[34:].strip() for line in lines}

    return run_groups


def test_every_step_has_its_line(run: Run) -> None:
    assert run([(["a", "b"], 60), (["c"], 60)]) == (0, {"a": "right", "b": "right", "c": "right"})


def test_a_hang_costs_its_limit_alone(run: Run) -> None:
    code, lines = run([(["a", "hang", "b"], 2), (["c"], 60)])
    assert lines.pop("hang").startswith("HANGS: killed at its limit")
    assert (code, lines) == (1, {"a": "right", "b": "right", "c": "right"})


def test_after_two_that_took_all_their_time_the_rest_is_left_out(run: Run) -> None:
    code, lines = run([(["hang"], 1), (["slow"], 1), (["c"], 60), (["d"], 60)])
    assert lines["slow"] == "SLOW: interrupted at its limit"
    assert lines["left out"] == "(two steps hung) c, d"
    assert (code, lines.keys()) == (smoke.STOPPED, {"hang", "slow", "left out"})


def test_a_death_is_no_hang_and_a_wrong_number_no_end(run: Run) -> None:
    code, lines = run([(["die", "wrong", "die again", "die once more", "b"], 60)])
    assert (code, lines.pop("wrong"), lines.pop("b")) == (1, "WRONG", "right")
    assert set(lines.values()) == {"DIED with 5"}


def test_a_lost_device_is_not_shared(run: Run) -> None:
    """The steps after it run in another process, and what was lost is not run again."""
    code, lines = run([(["a", "lost", "b"], 60)])
    assert code == 1
    assert lines == {"a": "right", "lost": "FAILED CUDA error", "b": "right"}


def test_the_end_of_all_time_is_no_hang_of_the_step_that_meets_it(run: Run) -> None:
    code, lines = run([(["a", "slow"], 300), (["c"], 60)], seconds=2)
    assert lines["slow"] == "CUT: the time of all steps is up"
    assert lines["left out"] == "(time is up) c"
    assert code == 1


# -- faults planted in the real steps --------------------------------------------------------------


def planted(text: str) -> str:
    """A program of the real steps, with ``text`` run before them."""
    folders = [str(ROOT / name) for name in ("benchmarks", "tests")]
    return (
        f"import sys\nsys.path[:0] = {folders!r}\nimport smoke, steps\n"
        f"{text}\nsys.exit(smoke.main())\n"
    )


HANGS = """
import signal, time
def hang(name, device):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a call that waits for a kernel
    time.sleep(600)
steps.bundled = hang
"""
WRONG = """
real = steps.checks
def spoiled(problem):
    problem.tensors["out"][5, 7] += 0.1
    return real(problem)
steps.checks = spoiled
"""


@pytest.mark.slow
def test_a_planted_hang_costs_its_own_step(run: Run) -> None:
    code, lines = run([(["bundled reference", "cuda"], 20)], program=planted(HANGS))
    assert code == 1
    assert lines["bundled reference"].startswith("HANGS: killed at its limit")
    assert lines["cuda"].split()[0][0].isdigit(), "torch's version"


@pytest.mark.slow
def test_a_planted_wrong_kernel_is_timed_and_marked(run: Run) -> None:
    code, lines = run([(["kernel B/16 x 1 qkv", "cuda"], 120)], program=planted(WRONG))
    text = lines["kernel B/16 x 1 qkv"]
    assert code == 1
    assert " us " in text
    assert " WRONG " in text
    assert "torch " in text, "PyTorch's time too"
    assert "FAILED" not in lines["cuda"]


ILLEGAL = """
import pathlib, tempfile
import standin
driver = standin.own(pathlib.Path(tempfile.mkdtemp()))
standin.open_context(driver)

def bundled(name, device):
    if name == "illegal":
        driver.fail(1, 700)  # an illegal access, which every later call gives too
    standin.synchronize(driver)
    return "right"

steps.bundled, steps.synchronize = bundled, lambda device: standin.synchronize(driver)
"""


@pytest.mark.slow
@pytest.mark.skipif(standin.compiler() is None, reason="needs a C++ compiler")
def test_a_planted_illegal_access_costs_its_own_step(run: Run) -> None:
    """The stand-in's driver is lost to the process, and not to the next."""
    names = ["bundled before", "bundled illegal", "bundled after"]
    code, lines = run([(names, 120)], program=planted(ILLEGAL))
    assert code == 1
    assert lines["bundled illegal"].startswith("FAILED RuntimeError: CUDA error: 700")
    for name in ("bundled before", "bundled after"):
        assert lines[name].startswith("right")


# -- the steps -------------------------------------------------------------------------------------


def test_every_case_exists() -> None:
    problems, shapes = map(importlib.import_module, ("problems", "shapes"))
    assert set(smoke.CASES) | set(smoke.SWEPT) <= problems.problems().keys()
    assert {name.rpartition(" x ")[0] for name in smoke.MODELS} <= shapes.VISION.keys()
    for device in ("cuda", "cpu"):
        names = [name for group in smoke.groups_of(device) for name in group.names]
        assert len(set(names)) == len(names)
    assert smoke.groups_of("cuda")[0].names == ["cuda"], "the safest comes first"


def test_a_sweep_leaves_its_winner_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`vitrail tune` of one kernel after the other, each of which is kept at once."""
    steps = importlib.import_module("steps")
    fine = KernelCode("fake", 90, 24, 0, 16_000, 4, Counter(HGMMA=4), "", "", "")
    winner = KernelConfig(64, 64, 64, 4, 8, ctas=2)

    class Clock:
        """A GPU that computes nothing; ``winner`` takes half the time."""

        def launch(self, calls: Sequence[Call]) -> None:
            self.config = dataclasses.replace(calls[0].config, reason="")

        def seconds(self, run: Callable[[], None]) -> float:
            run()
            return 1e-6 if self.config == winner else 2e-6

    clock = Clock()
    bench = Bench(
        Target(90, 132),
        torch.device("cpu"),
        lambda calls: [fine for _ in calls],
        clock.launch,
        clock.seconds,
    )
    monkeypatch.setattr(steps, "cuda_bench", lambda: bench)
    monkeypatch.setattr(steps, "provenance", lambda device, command: {"date": "now", "gpu": "card"})
    names = ("B/16 x 1 qkv", "B/16 x 1 out")
    for name in names:
        text = steps.sweep(name, "cuda", tmp_path)
        assert text.startswith("heuristic 2.0 us, 64x64x64, 4 warps, 6 stages")
        assert ": 2.00x, 64x64x64, 4 warps, 8 stages" in text
        assert text.count("2.0 64x") >= 4, "the time of every candidate"
    provenance, table = read_table(tmp_path / "sm_90.json")
    assert len(table) == len(names)
    assert {dataclasses.replace(config, reason="") for config in table.values()} == {winner}
    assert "earlier" not in provenance, "one run"


def test_the_rehearsal_on_a_cpu_is_right() -> None:
    command = [sys.executable, "benchmarks/smoke.py", "--device", "cpu", "--step"]
    command += ["bundled reference", "kernel B/16 x 1 qkv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    result = [line for line in done.stdout.splitlines() if line.startswith("@ ")]
    assert len(result) == 2, done.stdout + done.stderr
    assert all(" right" in line for line in result), done.stdout
