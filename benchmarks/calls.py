"""The steps of `benchmarks/gpu.sh`: each has a time limit, and calls share a state.

A step is a process. The state, build/gpu, holds which steps passed, their results and the tuned
table, for the sources as they are. Nothing here opens the GPU.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pack
import report
from environment import ROOT, describe, refuse_dirty, sources
from limits import Ended, run_limited
from smoke import STOPPED
from suite import LOST, UNFINISHED

STATE = ROOT / "build/gpu"
STEP_LIMIT, MARGIN, LEAST = 540, 10, 25
"""Seconds: the limit of a step, the end of a call, and the least with which a step begins."""
ATTEMPTS = 3
"""How often a suite may begin that loses the device in a case."""
GRACE = 20
"""Seconds that an interrupted step has to print its results."""


class Step(NamedTuple):
    """A command, in which {out}, {state} and {seconds} are replaced; ``seconds`` is its share of a
    call with a limit. ``shown``: lines of its output that begin like this are printed, the others
    go to the log alone. ``refusal``: words by which a tool says that it does not work here."""

    command: Sequence[str]
    seconds: int
    shown: str = ""
    environment: Mapping[str, str] = {}
    refusal: str | None = None


def _suite(name: str, seconds: int, *cases: str) -> Step:
    return Step((f"benchmarks/{name}.py", "--resume", "--seconds", "{seconds}", *cases), seconds)


def _tests(*words: str, seconds: int, **environment: str) -> Step:
    command = ("-P", "-m", "pytest", "-m", "gpu", "-q", "-ra", "--tb=short", "-p")
    limit = {"VITRAIL_GPU_TEST_SECONDS": "120"}
    return Step((*command, "no:cacheprovider", *words), seconds, environment=limit | environment)


def _sanitized(tool: str, overlap: str) -> Step:
    """Small models, launched from C++. Without torch's cache every tensor is an allocation of its
    own, whose end the tool knows."""
    words = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable)
    tests = _tests("tests/gpu/test_small.py", seconds=120)
    environment = {"VITRAIL_OVERLAP": overlap, "VITRAIL_GPU_TESTS_RUNNER": "native"}
    environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = (*words, *tests.command)
    return Step(command, 120, environment=environment, refusal="Device not supported")


SMOKE = ("benchmarks/smoke.py", "--seconds", "{seconds}", "--tuned", "{state}/tuned")
PROFILED = ("benchmarks/profiled.py", "{out}", "--seconds", "{seconds}")
NATIVE = "(triton_bits or graph or threads or memory_goes) and not bfloat16 and not DINOv2"
STEPS = {
    "smoke": Step(SMOKE, 260, shown="@ "),
    "record": Step(("-P", "-m", "gpu.record", "{out}/recorded.safetensors"), 45),
    "ncu": Step(PROFILED, 80, refusal="no ncu here"),
    "models": _suite("models", 250),
    "latency": _suite("latency", 120),
    "native": _tests("-x", "tests/gpu/test_native.py", "-k", NATIVE, seconds=150),
    "kernels": _suite("operators", 200),
    "int8": _suite("quantized", 120),
    "host": _suite("host", 60),
    "ceilings": _suite("ceilings", 60),
    "tests": _tests("tests/gpu", "tests/tools/test_tune.py", seconds=500),
    "memcheck": _sanitized("memcheck", "0"),
    "memcheck-overlap": _sanitized("memcheck", "1"),
    "racecheck": _sanitized("racecheck", "0"),
    "racecheck-overlap": _sanitized("racecheck", "1"),
}
SANITIZER = ("memcheck", "memcheck-overlap", "racecheck", "racecheck-overlap")
CALLS = {
    "first": ("smoke", "record", "ncu"),
    "second": ("models", "latency", "native"),
    "sanitizer": SANITIZER,
    **{name: (name,) for name in STEPS},
}
UNTUNED = ("smoke", "record", "ncu")
"""Steps that run before there is a tuned table, or whose results are the heuristics'."""


class Call:
    """A call: its end, its log, how many of its steps hung, and the result of each step."""

    def __init__(self, out: Path, limit: float | None) -> None:
        self.out, self.limit, self.start = out, limit, time.monotonic()
        self.hangs, self.notes = 0, dict[str, str]()
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "gpu.log").open("w")

    def say(self, text: str, shown: bool = True) -> None:
        """A line to the log, and to the terminal if ``shown``."""
        print(text, file=self.log, flush=True)
        if shown:
            print(text, flush=True)

    def share(self, name: str, next_steps: Sequence[str]) -> float:
        """Seconds that a step may take, so that those of ``later`` have theirs."""
        if self.limit is None:
            return STEP_LIMIT
        seconds_left = self.limit - MARGIN - (time.monotonic() - self.start)
        total = STEPS[name].seconds + sum(STEPS[step].seconds for step in next_steps)
        return min(STEP_LIMIT, seconds_left * STEPS[name].seconds / total, seconds_left)

    def run(self, names: Sequence[str]) -> int:
        """Run every step in turn. Returns 1 if a step failed or is not finished."""
        codes = []
        for number, name in enumerate(names):
            passed = STATE / f"{name}.ok"
            next_steps = [
                step for step in names[number + 1 :] if not (STATE / f"{step}.ok").exists()
            ]
            if passed.exists():
                self.notes[name] = f"ok, earlier ({passed.read_text()})"
                continue
            seconds = self.share(name, next_steps)
            if self.hangs >= 2:
                self.notes[name] = "not started: two steps hung"
            elif seconds < LEAST:
                self.notes[name] = "not started: LIMIT is near; call again"
            else:
                codes.append(self.run_step(name, seconds))
                continue
            codes.append(1)
        return int(any(codes))

    def run_step(self, name: str, seconds: float) -> int:
        """Run a step. Returns 0 if it passed or its tool is not installed."""
        self.say(f"\n######## {name} ({seconds:.0f} s)")
        start = time.monotonic()
        for _ in range(ATTEMPTS):
            seconds_left = seconds - (time.monotonic() - start)
            ended, refused = self.attempt(name, seconds_left)
            if ended.code != LOST or seconds_left < LEAST:
                break
        took = f"{time.monotonic() - start:.0f} s"
        keep_results(self.out)
        if refused:
            self.notes[name] = refused
            return 0
        self.hangs += ended.hung + 2 * (name == "smoke" and ended.code == STOPPED)
        self.notes[name] = _became(ended, took)
        if ended.code == 0 and not ended.late:
            (STATE / f"{name}.ok").write_text(took)
            return 0
        return 1

    def attempt(self, name: str, seconds: float) -> tuple[Ended, str | None]:
        """Run the step's process: how it ended, and the line by which its tool refused to work."""
        step, refusals = STEPS[name], list[str]()

        def take(text: str) -> None:
            if step.refusal is not None and step.refusal in text:
                refusals.append(f"NOT RUN: {text}")
            self.say(text, text.startswith(step.shown))

        values = {"out": str(self.out), "state": str(STATE)}
        values["seconds"] = str(max(1, round(seconds - GRACE / 2)))
        command = [word.format(**values) for word in step.command]
        if step.command[0].startswith(("-", "benchmarks/")):
            command.insert(0, sys.executable)
        elif shutil.which(command[0]) is None:
            return Ended(1), f"NOT RUN: no {command[0]} here"
        environment = {**os.environ, "VITRAIL_RESULTS": str(self.out), **step.environment}
        if name not in UNTUNED and any((STATE / "tuned").glob("*.json")):
            environment["VITRAIL_TUNED"] = str(STATE / "tuned")
        ended = run_limited(command, seconds, take, GRACE, environment)
        return ended, refusals[0] if refusals and ended.code != 0 else None


def _became(ended: Ended, took: str) -> str:
    """A step's note."""
    if ended.hung:
        return f"HUNG: killed after {took}"
    if ended.late:
        return f"OUT OF TIME: interrupted after {took}"
    notes = {0: f"ok, {took}", UNFINISHED: f"unfinished after {took}: call again"}
    return notes.get(ended.code, f"FAILED with {ended.code} after {took}")


# -- the state -------------------------------------------------------------------------------------


def open_state(out: Path, fresh: bool) -> None:
    """Forget the state if the sources are others; bring earlier results into ``out``."""
    digest_file, digest = STATE / "sources", sources()
    if fresh or not digest_file.exists() or digest_file.read_text() != digest:
        shutil.rmtree(STATE, ignore_errors=True)
        STATE.mkdir(parents=True)
        digest_file.write_text(digest)
    for result_file in (STATE / "results").glob("*/*.json"):
        target = out / result_file.relative_to(STATE / "results")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(result_file, target)
    for table in (ROOT / pack.FOLDER).glob("sm_*.json"):  # of a call on another machine
        (STATE / "tuned").mkdir(exist_ok=True)
        if not (STATE / "tuned" / table.name).exists():
            shutil.copy(table, STATE / "tuned")


def keep_results(out: Path) -> None:
    """Results and tuned tables to both places: a call's folder may be empty in the next."""
    for result in out.glob("*/*.json"):
        kept = STATE / "results" / result.relative_to(out)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(result, kept)
    for table in (STATE / "tuned").glob("*.json"):
        shutil.copy(table, out)


# -- the command -----------------------------------------------------------------------------------

LOOK = """
import json, sys, torch
sys.path.insert(0, "benchmarks")
from environment import environment
if not torch.cuda.is_available():
    sys.exit("torch finds no CUDA device")
print(json.dumps(environment("cuda"), indent=1))
"""
EXTENSION = "import vitrail._C; print('vitrail._C', vitrail._C.version())"


def prepare(call: Call) -> int:
    """Unpack, look at the device, and build what is missing. Returns 0 if steps can run."""
    for text in pack.unpack():
        call.say(text)
    call.say(f"commit {describe()}")
    ended = run_limited([sys.executable, "-c", LOOK], 90, call.say)
    if ended.code != 0:
        call.say("the device: " + ("no answer in 90 s" if ended.late else "none; nothing is run"))
        return 1
    command = [sys.executable, "-P", "-c", EXTENSION]
    if run_limited(command, 60, call.say).code != 0:
        for name, words in pack.BUILDS.items():
            run_limited([sys.executable, *words], 300, lambda text: call.say(text, False))
            call.say(f"built here: {name}")
        if run_limited(command, 60, call.say).code != 0:
            call.say("vitrail._C does not load; steps that need it say so")
    return 0


def main(words: Sequence[str]) -> int:
    """`pack`, or the steps of the calls that are named; all without a name."""
    if list(words) == ["pack"]:
        return pack.pack()
    unknown = [word for word in words if word not in CALLS]
    if unknown:
        print(f"got {' '.join(unknown)}, wanted pack or some of: {' '.join(CALLS)}")
        return 2
    refuse_dirty(bool(os.environ.get("ALLOW_DIRTY")))
    names = list(dict.fromkeys(step for word in words or STEPS for step in CALLS[word]))
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks/results").absolute()
    limit = os.environ.get("LIMIT")
    os.chdir(ROOT)
    call = Call(out, float(limit) if limit else None)
    open_state(out, bool(os.environ.get("FRESH")))
    code = prepare(call) or call.run(names)
    table = [f"{name:18s} {note}" for name, note in call.notes.items()]
    table += report.render(out)
    (out / "gpu-table.txt").write_text("".join(f"{text.rstrip()}\n" for text in table))
    call.say("\n" + "\n".join(table))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
