"""How a benchmark is run and kept: interleaved variants, medians, the machine, the command."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def interleave(
    variants: Mapping[str, Callable[[], object]], rounds: int = 15, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every variant, in turn A B A B ..., so that a drifting machine hits all alike."""
    for _ in range(warmup):
        for run in variants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in milliseconds."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "median_ms": round(statistics.median(ordered) * 1e3, 3),
        "p20_ms": round(ordered[round(0.2 * last)] * 1e3, 3),
        "p80_ms": round(ordered[round(0.8 * last)] * 1e3, 3),
        "rounds": len(ordered),
    }


def ratio(seconds: Mapping[str, list[float]], peer: str, ours: str) -> float:
    """How many times faster ``ours`` is: the median over the rounds of the paired ratios."""
    pairs = zip(seconds[peer], seconds[ours], strict=True)
    return round(statistics.median(theirs / mine for theirs, mine in pairs), 3)


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def environment() -> dict[str, Any]:
    """What the numbers depend on: machine, versions, commit, date, command."""
    import numpy
    import PIL
    import torch
    import transformers

    model = platform.processor() or "unknown"
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "transformers": transformers.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", *sys.argv]),
    }


def refuse_dirty(allowed: bool) -> None:
    """Stop where the numbers would belong to no commit."""
    if not allowed and environment()["dirty"]:
        sys.exit("the tree has uncommitted changes; commit them, or give --allow-dirty")


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Keep one suite's results beside the environment they were measured in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"schema": 1, "environment": environment(), "results": results}
    path.write_text(json.dumps(record, indent=1) + "\n")
