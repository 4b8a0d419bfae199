"""benchmarks/captions.py: its cases run, its checkouts answer, its table is the committed one."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import shared_library
from vitrail.runtime import native
from vitrail_kernels.launch import MISSING, interpreted

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
captions: Any = importlib.import_module("captions")
table: Any = importlib.import_module("table")


@pytest.mark.slow
@pytest.mark.skipif(shared_library.compiler() is None, reason="no C++ compiler here")
@pytest.mark.skipif(native.MISSING is not None, reason="vitrail._C is not built")
@pytest.mark.skipif(MISSING is not None or interpreted(), reason="nothing is compiled")
def test_every_case_runs() -> None:
    """In a process of its own: the host's work alone, with 300 captions and 40 labels."""
    code = """
import captions
captions.CAPTIONS, captions.LABELS, captions.CALLS = 300, 40, 2
runs = captions._runs()
for name, run in runs.items():
    run()
    print(name)
"""
    path = os.pathsep.join([str(BENCHMARKS), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*captions.CASES, "tokenizer"]


class Fake:
    """In place of another checkout: seconds that are known."""

    def __init__(self, seconds: float) -> None:
        self.asked: list[str] = []
        self._seconds = seconds

    def seconds(self, name: str) -> float:
        self.asked.append(name)
        return self._seconds


def test_a_case_is_a_ratio_of_checkouts_in_turn() -> None:
    name = captions.TOKENIZER
    checkouts = {"vitrail": Fake(0.5), "before": Fake(2.0)}
    results = captions.case(name, checkouts)
    assert results["ratio"] == 4
    assert results["against"] == "before"
    shares = {label: v["per_caption_us"] for label, v in results["variants"].items()}
    assert shares == {"vitrail": 5, "before": 20, "tokenizer": 5}
    assert checkouts["vitrail"].asked.count("tokenizer") == checkouts["before"].asked.count(name)


def test_a_checkout_that_ends_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "host.py").write_text("raise SystemExit(7)")
    (tmp_path / "engine" / "torch.py").write_text("raise SystemExit(7)")
    with pytest.raises(RuntimeError, match="the process ended with 7"):
        captions.Checkout(tmp_path).seconds("a caption a call")


def test_the_documents_have_the_committed_times() -> None:
    start, end = table.CAPTIONS
    assert f"{start}{table.render_captions()}{end}" in table.PERFORMANCE.read_text()
    record = json.loads((table.RESULTS / "cpu/captions.json").read_text())
    assert not record["environment"]["dirty"]
    assert set(record["results"]) == {*captions.CASES, "before"}
