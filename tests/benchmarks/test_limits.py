"""benchmarks/limits.py: a child costs its time, says what it knows, and leaves nothing behind."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
limits = importlib.import_module("limits")

SECONDS = 3.0
"""A limit that a shell begins within, whoever else runs."""


def shell(text: str, seconds: float = 60.0, take: Callable[[str], None] | None = None) -> Any:
    """How it ended, and the lines."""
    lines: list[str] = []
    ended = limits.run_limited(["sh", "-c", text], seconds, take or lines.append, grace=2.0)
    return ended, lines


def test_lines_come_as_they_are_written(tmp_path: Path) -> None:
    """The child goes on once its first line was taken."""
    gate = tmp_path / "gate"
    ended, _ = shell(
        f"echo first; while [ ! -e {gate} ]; do sleep 0.05; done", take=lambda _: gate.touch()
    )
    assert ended == limits.Ended(0)


def test_both_streams_and_the_exit_code() -> None:
    ended, lines = shell("echo out; echo err >&2; exit 7")
    assert (ended, lines) == (limits.Ended(7), ["out", "err"])


def test_an_interrupted_child_says_what_it_knows() -> None:
    ended, lines = shell(
        "trap 'echo known; exit 9' INT; echo begun; while :; do sleep 0.1; done", SECONDS
    )
    assert (ended, lines) == (limits.Ended(9, late=True), ["begun", "known"])


def test_a_child_that_takes_no_notice_is_killed_and_counts_as_hung() -> None:
    ended, lines = shell("trap '' INT; echo begun; while :; do sleep 0.1; done", SECONDS)
    assert (ended, lines) == (limits.Ended(-signal.SIGKILL, late=True, hung=True), ["begun"])


def alive(process: str) -> bool:
    """Whether it runs; one that ended, and that nobody here may wait for, does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_its_own_children_go_with_it() -> None:
    """One that keeps the pipe open costs no time either."""
    _, (line,) = shell("sleep 600 & echo $!")
    for _ in range(100):
        if not alive(line):
            return
        time.sleep(0.05)
    pytest.fail(f"process {line} outlives its parent")


def test_a_caller_that_ignores_sigint_has_children_that_do_not(tmp_path: Path) -> None:
    """As under a shell that began it in the background."""
    program = tmp_path / "caller.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); from limits import run_limited\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        f"print(run_limited(sleep, {SECONDS}, print, grace=10.0).hung)\n"
    )
    command = ["sh", "-c", f'trap "" INT; exec {sys.executable} {program}']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["False"], done.stdout + done.stderr
