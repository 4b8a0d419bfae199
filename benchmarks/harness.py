"""How a benchmark is run and kept: checked first, timed in turn, recorded with its environment.

A variant is a callable without arguments, a timer a function of it that returns seconds: wall clock
(`host_timer`) or device events (`device_timer`). `measure` times a `Case`; `run_suite` runs many
and keeps the file after each, so that a suite that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environment import ROOT, environment, refuse_dirty, sources

OURS = "vitrail"
UNFINISHED = 3
"""Exit code of a suite whose time was up: the same command goes on with the next case."""

Results = dict[str, Any]
Run = Callable[[], Any]
Timer = Callable[[Run], float]

# -- timing ----------------------------------------------------------------------------------------


def host_timer(
    synchronize: Run | None = None, clock: Callable[[], float] = time.perf_counter
) -> Timer:
    """Wall clock of one run until ``synchronize`` returns: latency, as a caller sees it."""

    def sample(run: Run) -> float:
        start = clock()
        run()
        if synchronize is not None:
            synchronize()
        return clock() - start

    return sample


def device_timer(repeats: int = 1, flush: bool = True) -> Timer:
    """Seconds a run takes by CUDA events around ``repeats`` of them.

    ``flush``: a buffer larger than the L2 cache is overwritten first, so that no run finds its
    inputs there. It takes the GPU longer than the host needs to queue a kernel, whose launch
    therefore stays out of the time.
    """
    import torch

    l2 = torch.cuda.get_device_properties().L2_cache_size
    buffer = torch.empty(max(2 * l2, 256 << 20) if flush else 0, dtype=torch.uint8, device="cuda")

    def sample(run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(4 if flush else 0):
            buffer.zero_()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats

    return sample


def tolerances() -> Any:
    """tests/helpers.py, which holds the only tolerances."""
    if (folder := str(ROOT / "tests")) not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("helpers")


def rotate(runs: Sequence[Run]) -> Run:
    """One variant over several sets of inputs: each call takes the next set."""
    turn = itertools.cycle(runs)
    return lambda: next(turn)()


def interleave(
    variants: Mapping[str, Run], rounds: int = 15, warmup: int = 2, timer: Timer | None = None
) -> dict[str, list[float]]:
    """Seconds of every variant, in turn A B A B ..., so that a drifting machine hits all alike."""
    timer = timer or host_timer()
    for _ in range(warmup):
        for run in variants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            seconds[name].append(timer(run))
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in milliseconds."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "median_ms": round(statistics.median(ordered) * 1e3, 5),
        "p20_ms": round(ordered[round(0.2 * last)] * 1e3, 5),
        "p80_ms": round(ordered[round(0.8 * last)] * 1e3, 5),
        "rounds": len(ordered),
    }


def ratio(seconds: Mapping[str, Sequence[float]], peer: str, ours: str) -> float:
    """How many times faster ``ours`` is: the median over the rounds of the paired ratios."""
    pairs = zip(seconds[peer], seconds[ours], strict=True)
    return round(statistics.median(theirs / mine for theirs, mine in pairs), 3)


# -- cases -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is timed together: ``variants`` by name, `OURS` among them.

    ``check(name, result)`` raises AssertionError where a variant's first result is wrong.
    ``bounds``: variants that do less than the others, timed beside them but no peers. ``flops``,
    ``bytes``, ``items``: what one run of a variant computes, moves, serves, where it is counted.
    """

    variants: Mapping[str, Run]
    check: Callable[[str, Any], None]
    bounds: frozenset[str] = frozenset()
    flops: Mapping[str, int] = field(default_factory=dict)
    bytes: Mapping[str, int] = field(default_factory=dict)
    items: Mapping[str, int] = field(default_factory=dict)


def measure(
    case: Case,
    timer: Timer | None = None,
    rounds: int = 15,
    warmup: int = 2,
    ceilings: Mapping[str, float] | None = None,
) -> Results:
    """Check every variant, then time those that are right, in turn.

    A wrong variant gets "wrong" and why, one that cannot run gets "failed" and why; neither gets a
    time, and where it is ours nothing is timed. ``ratio``: ours over the fastest peer.
    ``ceilings``: "tflops" and "gbs" of the device, measured in the same process.
    """
    runs: dict[str, Run] = {}
    variants: dict[str, Results] = {}
    for name, run in case.variants.items():
        try:
            case.check(name, run())
            runs[name], variants[name] = run, {}
        except AssertionError as error:
            variants[name] = {"wrong": _first_line(error)}
        except Exception as error:  # a backend that refuses these shapes, a compiler, memory
            variants[name] = {"failed": _first_line(error)}
    results: Results = {"variants": variants}
    if OURS in case.variants and OURS not in runs:
        return results
    seconds = interleave(runs, rounds, warmup, timer)
    for name, values in seconds.items():
        variants[name] |= summary(values) | _rates(case, name, values, ceilings or {})
    peers = [name for name in runs if name not in case.bounds and not name.startswith(OURS)]
    if OURS in runs and peers:
        ratios = {peer: ratio(seconds, peer, OURS) for peer in peers}
        results |= {"ratio": min(ratios.values()), "against": min(ratios, key=ratios.__getitem__)}
        results["ratios"] = ratios
    return results


def _first_line(error: Exception) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"


def _rates(
    case: Case, name: str, seconds: Sequence[float], ceilings: Mapping[str, float]
) -> Results:
    median, rates = statistics.median(seconds), {}
    for key, counted, unit in (
        ("tflops", case.flops, 1e12),
        ("gbs", case.bytes, 1e9),
        ("per_second", case.items, 1),
    ):
        if counted.get(name):
            rates[key] = float(f"{counted[name] / median / unit:.4g}")
        if key in rates and ceilings.get(key):
            rates[f"{key}_of_ceiling"] = round(rates[key] / ceilings[key], 3)
    return rates


def faults(results: Results) -> dict[str, str]:
    """Variants of ours that are wrong or failed, and why."""
    return {
        name: f"{kind}: {found[kind]}"
        for name, found in results.get("variants", {}).items()
        for kind in ("wrong", "failed")
        if name.startswith(OURS) and kind in found
    }


# -- files and suites -----------------------------------------------------------------------------


def write(path: Path, results: Mapping[str, Any], device: str = "cpu") -> None:
    """Keep one suite's results beside the environment they were measured in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"schema": 1, "environment": environment(device), "results": results}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


def results_root() -> Path:
    """``benchmarks/results``, or VITRAIL_RESULTS."""
    return Path(os.environ.get("VITRAIL_RESULTS") or ROOT / "benchmarks" / "results")


def results_folder(device: str) -> Path:
    """Where a device's results are: "cpu", or the GPU's name in small letters."""
    import torch

    name = torch.cuda.get_device_properties().name if device == "cuda" else device
    return results_root() / "-".join(name.lower().split())


def arguments(about: str | None, names: Sequence[str], given: Sequence[str] | None) -> Any:
    """What every suite for a GPU is told; stops at an unknown case, and at a dirty tree."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="only cases that begin like this")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal"
    )
    parser.add_argument("--allow-dirty", action="store_true", help="measure an uncommitted tree")
    parser.add_argument("--resume", action="store_true", help="keep the cases the file holds")
    parser.add_argument("--seconds", type=float, help="start no case that would end past these")
    options = parser.parse_args(given)
    options.cases = [name for name in names if name.startswith(tuple(options.cases or ("",)))]
    if not options.cases:
        parser.error(f"no such case; wanted the beginning of one of {', '.join(names)}")
    refuse_dirty(options.allow_dirty)
    return options


def run_suite(
    path: Path,
    cases: Mapping[str, Callable[[], Results]],
    device: str,
    resume: bool = False,
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    **beside: Any,
) -> int:
    """Run ``cases`` into the file ``path``; 0, 1 where one of ours is at fault, or `UNFINISHED`.

    ``resume``: cases that the file already holds, of the same sources and without a fault, are kept
    and not run again. None is started that would end past ``seconds`` if it took as long as the
    longest so far. ``beside`` goes into the file beside the cases.
    """
    results: Results = dict(beside)
    if resume and path.exists():
        record: Results = json.loads(path.read_text())
        if record["environment"].get("sources") == sources():
            results = {k: v for k, v in record["results"].items() if not faults(v)} | beside
    start, longest, broken = clock(), 0.0, False
    for name, run in cases.items():
        if name in results:
            continue
        begun = clock()
        if seconds is not None and begun - start + longest > seconds:
            return UNFINISHED
        try:
            results[name] = run()
        except Exception as error:  # building a case failed: said in its place, the next one runs
            results[name] = {"variants": {OURS: {"failed": _first_line(error)}}}
        for variant, why in faults(results[name]).items():
            broken = True
            print(f"FAULT {name}, {variant}: {why}", file=sys.stderr)
        print(line(name, results[name]), flush=True)
        write(path, results, device)
        _between(device)
        longest = max(longest, clock() - begun)
    return int(broken)


def _between(device: str) -> None:
    """Free what a case held. Raises where the device is lost, since nothing after it would run."""
    if device == "cuda":
        import torch

        gc.collect()
        torch.cuda.synchronize()
        torch.compiler.reset()
        torch.cuda.empty_cache()


def line(name: str, results: Results) -> str:
    """One case in one line: ours (or the best there is), its rate, the ratio to the best peer."""
    timed = {k: v for k, v in results.get("variants", {}).items() if "median_ms" in v}
    rates = ("tflops", "gbs", "per_second")
    if OURS in results.get("variants", {}) or not timed:
        timed = {OURS: timed[OURS]} if OURS in timed else {}
    if not timed:
        return f"{name:44s} {'no time':>12s}"
    best = max(timed, key=lambda k: max(timed[k].get(rate, 0.0) for rate in rates))
    text = f"{name if best == OURS else f'{name}, {best}':44s} {timed[best]['median_ms']:9.3f} ms"
    for rate, unit in zip(rates, ("TFLOP/s", "GB/s", "/s"), strict=True):
        if rate in timed[best]:
            text += f" {timed[best][rate]:9.0f} {unit}"
            break
    if "ratio" in results:
        text += f" {results['ratio']:6.2f}x {results['against']}"
    return text
