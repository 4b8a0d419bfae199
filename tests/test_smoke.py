"""benchmarks/smoke.py: a step that hangs, is wrong or dies costs its own line and no other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

STEPS = """
import sys, time
for name in sys.argv[sys.argv.index("--step") + 1:]:
    if "hang" in name:
        time.sleep(600)
    if "die" in name:
        sys.exit(5)
    print(f"@ {name:34s} " + ("FAILED CUDA error: lost" if "lost" in name else "right"), flush=True)
"""


@pytest.fixture
def smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, whose steps are those of `STEPS`."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = pytest.importorskip("smoke")
    program = tmp_path / "steps.py"
    program.write_text(STEPS)
    monkeypatch.setattr(module, "__file__", str(program))
    return module


def lines(capfd: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What was printed of each step, by its name."""
    printed = [line[2:] for line in capfd.readouterr().out.splitlines() if line.startswith("@ ")]
    return {line[:34].strip(): line[34:].strip() for line in printed}


def test_every_step_has_its_line(smoke: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert smoke.run_groups([(["a", "b"], 60), (["c"], 60)], "cuda", 200) == 0
    assert lines(capfd) == {"a": "right", "b": "right", "c": "right"}


def test_a_hang_costs_its_limit_alone(smoke: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert smoke.run_groups([(["a", "hang", "b"], 3), (["c"], 60)], "cuda", 200) == 1
    result = lines(capfd)
    assert result.pop("hang").startswith("HANGS or died")
    assert result == {"a": "right", "b": "right", "c": "right"}


def test_after_two_hangs_the_rest_is_left_out(
    smoke: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    groups = [(["hang"], 2), (["die"], 20), (["c"], 60)]
    assert smoke.run_groups(groups, "cuda", 200) == 1
    assert "c" not in lines(capfd)


def test_a_lost_context_is_not_shared(smoke: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """The steps after it run again in processes of their own."""
    assert smoke.run_groups([(["a", "lost", "b"], 60)], "cuda", 200) == 1
    assert lines(capfd)["b"] == "right"


def test_the_rehearsal_on_a_cpu_is_right() -> None:
    command = [sys.executable, "benchmarks/smoke.py", "--device", "cpu", "--step"]
    command += ["bundled reference", "kernel B/16 x 1 qkv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    result = [line for line in done.stdout.splitlines() if line.startswith("@ ")]
    assert len(result) == 2, done.stdout + done.stderr
    assert all(" right" in line for line in result), done.stdout
