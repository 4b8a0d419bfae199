"""First contact with a GPU, the safest step first: `python benchmarks/smoke.py`.

Steps (`steps.py`) run in processes with a time limit, some together. Each prints a line as soon
as it ends; numbers that are wrong are timed too, and marked WRONG. A step that hangs, dies or loses
the device costs its own line; the steps after it run in a new process. After two that took all of
their time the rest is left out. ``--device cpu`` rehearses the same code on small cases.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from limits import Ended, run_limited
from suite import LOST

CASES = (
    "B/16 x 256 qkv", "B/16 x 256 attention", "B/16 x 256 out", "B/16 x 256 up",
    "B/16 x 256 down", "B/16 x 256 patch_embed uint8", "B/16 x 256 attention_one",
    "B/16 x 1 qkv", "B/16 x 1 attention", "B/16 x 1 down", "B/16 x 1 patch_embed uint8",
    "L/14 x 256 qkv", "L/14 x 256 attention", "L/14 x 256 up", "L/14 x 256 down",
    "L/14 x 256 patch_embed uint8", "L/14 x 256 layernorm", "H/14 x 64 attention",
    "DINOv2-B@518 x 32 attention", "DINOv2-B@518 x 32 down", "CLIP-B text x 256 attention",
)  # fmt: skip
"""Kernels that are checked and timed; those of the first model come first."""
MODELS = (
    "B/16 x 256", "L/14 x 256", "B/16 x 1", "DINOv2-B@518 x 32", "DINOv2-B@518 x 1",
    "B/32 x 256",
)  # fmt: skip
SWEPT = (
    "B/16 x 256 qkv", "B/16 x 256 out", "B/16 x 256 up", "B/16 x 256 down",
    "B/16 x 256 attention", "L/14 x 256 attention", "L/14 x 256 up", "L/14 x 256 down",
    "L/14 x 256 qkv", "L/14 x 256 out", "B/16 x 1 qkv", "B/16 x 1 out", "B/16 x 1 up",
    "B/16 x 1 down", "DINOv2-B@518 x 32 attention",
)  # fmt: skip
"""Kernels whose candidates are timed, for the tuned table."""
STEPS = Path(__file__)
FIRST, TOGETHER = 7, 8
"""Kernels in the first group, and in each of the others."""
STOPPED = 5
"""Exit code if two steps took all of their time, and the rest was left out."""
LEAST, GRACE = 10, 5
"""Seconds under which no process is begun, and from SIGINT to SIGKILL."""


class Group(NamedTuple):
    """Steps that share a process as long as none hangs, and the seconds they may take."""

    names: Sequence[str]
    seconds: float


def groups_of(device: str) -> list[Group]:
    """Every step: the device, whole small models, the headline, other kernels, candidates."""
    if device == "cpu":
        names = ["cuda", "bundled reference", "kernel B/16 x 1 qkv", "model B/32 x 1"]
        return [Group([name], 240) for name in names]
    kernels, sweeps = ([f"kernel {c}" for c in CASES], [f"sweep {c}" for c in SWEPT])
    models = [f"model {name}" for name in MODELS]
    first = [Group(["cuda"], 60), Group(["bundled native"], 90), Group(["bundled triton"], 90)]
    first += [Group(kernels[:FIRST], 90), Group(models[:3], 100)]
    return [
        *first,
        *(Group(kernels[i : i + TOGETHER], 75) for i in range(FIRST, len(kernels), TOGETHER)),
        *(Group(sweeps[i : i + TOGETHER], 75) for i in range(0, len(sweeps), TOGETHER)),
        Group(models[3:], 90),
    ]


def line(name: str, text: str) -> str:
    """A step's line."""
    return f"@ {name:34s} {text}"


class Smoke:
    """Runs groups of steps, and remembers how many hung and how many are wrong or failed."""

    def __init__(self, device: str, folder: Path, seconds: float) -> None:
        self.device, self.folder = device, folder
        self.end = time.monotonic() + seconds
        self.hangs = self.faults = 0

    def run(self, groups: Sequence[Group]) -> int:
        """0, 1 if a step hangs, fails, is wrong or is left out, `STOPPED` after two hangs."""
        waiting = list(groups)
        while waiting:
            seconds_left = self.end - time.monotonic()
            if seconds_left < LEAST or self.hangs == 2:
                names = [name for group in waiting for name in group.names]
                reason = "two steps hung" if self.hangs == 2 else "time is up"
                print(line("left out", f"({reason}) {', '.join(names)}"), flush=True)
                return STOPPED if self.hangs == 2 else 1
            group = waiting.pop(0)
            remaining = self.run_group(group, seconds_left)
            if remaining:
                waiting.insert(0, Group(remaining, group.seconds))
        return int(bool(self.faults or self.hangs))

    def run_group(self, group: Group, seconds_left: float) -> Sequence[str]:
        """Run a group in a process; the steps that it did not come to."""
        printed: list[str] = []

        def take(text: str) -> None:
            print(text, flush=True)
            if text.startswith("@ "):
                printed.append(text)

        command = [sys.executable, str(STEPS), "--device", self.device]
        command += ["--tuned", str(self.folder), "--step", *group.names]
        ended = run_limited(command, min(group.seconds, seconds_left), take, GRACE)
        self.faults += sum("WRONG" in text or "FAILED" in text for text in printed)
        remaining = [n for n in group.names if not any(t.startswith(line(n, "")) for t in printed)]
        if not remaining or ended.code == LOST:
            return remaining
        print(line(remaining[0], self.verdict(ended, group.seconds <= seconds_left)), flush=True)
        return remaining[1:]

    def verdict(self, ended: Ended, full_time: bool) -> str:
        """Why a step has no line of its own; ``whole``: it had all of its group's time."""
        self.faults += 1
        if not ended.late:
            return f"DIED with {ended.code}"
        if not full_time:
            return "CUT: the time of all steps is up"
        self.hangs += 1
        if not ended.hung:
            return "SLOW: interrupted at its limit"
        return "HANGS: killed at its limit; VITRAIL_TMA=0 goes on without tensor maps"


def step(name: str, device: str, folder: Path) -> None:
    """Run a step in this process: print its line, or FAILED and the traceback. Ends the process
    with `LOST` if no later step could use the device."""
    from steps import run_step, synchronize

    start = time.perf_counter()
    try:
        text = run_step(name, device, folder)
    except Exception as error:
        text = f"FAILED {type(error).__name__}: {str(error)[:300]}".splitlines()[0]
        traceback.print_exc()
    print(f"{line(name, text)}  [{time.perf_counter() - start:.1f} s]", flush=True)
    try:
        synchronize(device)
    except Exception as error:
        print(f"  {name}: the device is lost to this process: {error}", flush=True)
        sys.exit(LOST)


def main() -> int:
    """All steps, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--step", nargs="+", help="these steps, in this process")
    parser.add_argument("--group", nargs="+", help="these steps, in a process of their own")
    parser.add_argument("--seconds", type=float, default=300, help="for all steps")
    parser.add_argument("--tuned", type=Path, default=Path("tuned"), help="folder for the winners")
    options = parser.parse_args()
    if options.step:
        for name in options.step:
            step(name, options.device, options.tuned)
        return 0
    groups = [Group(options.group, options.seconds)] if options.group else groups_of(options.device)
    return Smoke(options.device, options.tuned, options.seconds).run(groups)


if __name__ == "__main__":
    sys.exit(main())
