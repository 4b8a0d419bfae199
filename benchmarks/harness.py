"""How a benchmark is run and kept: checked first, timed in turn, recorded with its environment.

A variant is a callable without arguments, a timer a function of it that returns seconds: wall clock
(`host_timer`) or device events (`device_timer`). `measure` times a `Case`; `run_suite` runs many
and writes the file whenever a variant has its time, so that a suite that was cut off keeps what it
had and goes on where it stopped.
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

from environment import ROOT, environment, refuse_dirty

OURS = "vitrail"
UNFINISHED = 3
"""Exit code of a suite whose time was up: the same command goes on with the next case."""
LOST = 70
"""Exit code of a process whose device is lost, after which nothing in it would run."""

LEAST = 45.0
"""Seconds under which no case is begun: what one takes to have its first times."""

Results = dict[str, Any]
Run = Callable[[], Any]
Timer = Callable[[Run], float]
Keep = Callable[[Results], None]
"""Takes the results of a case so far."""

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

    ``check(name, result)`` raises AssertionError if a variant's first result is wrong.
    ``bounds``: variants that do less than the others, timed beside them but no peers. ``late``:
    variants whose first run takes minutes (a compiler's); each is timed beside `OURS` once all
    others have their times. ``flops``, ``bytes``, ``items``: the work of one run, if it is counted.
    """

    variants: Mapping[str, Run]
    check: Callable[[str, Any], None]
    bounds: frozenset[str] = frozenset()
    late: Sequence[str] = ()
    flops: Mapping[str, int] = field(default_factory=dict)
    bytes: Mapping[str, int] = field(default_factory=dict)
    items: Mapping[str, int] = field(default_factory=dict)


def measure(
    case: Case,
    timer: Timer | None = None,
    rounds: int = 15,
    warmup: int = 2,
    ceilings: Mapping[str, float] | None = None,
    keep: Keep = lambda _: None,
) -> Results:
    """Check every variant, then time it, in turn with those of its group.

    The first group is all but ``case.late``; of those each is a group with `OURS`. ``keep`` gets
    the results after each group. A wrong variant is timed, marked "wrong" with the reason, and
    enters no ratio; one that cannot run gets "failed" with the reason. ``ratio``: ours over the
    fastest peer. ``ceilings``: "tflops" and "gbs" of the device.
    """
    variants: dict[str, Results] = {}
    results: Results = {"variants": variants}
    groups = [[name for name in case.variants if name not in case.late]]
    for group in [*groups, *([OURS, name] for name in case.late)]:
        if group != groups[0] and "failed" in variants.get(OURS, {}):
            break  # nothing to compare a compiler's minutes with
        for name in group:
            if name not in variants:
                variants[name] = _checked(case, name)
        runs = {name: case.variants[name] for name in group if "failed" not in variants[name]}
        if all("median_ms" in variants[name] for name in runs):
            continue
        seconds = interleave(runs, rounds, warmup, timer)
        for name, values in seconds.items():
            if "median_ms" not in variants[name]:
                variants[name] |= summary(values) | _rates(case, name, values, ceilings or {})
        _compare(case, results, seconds)
        keep(results)
    return results


def _checked(case: Case, name: str) -> Results:
    """Run a variant once: nothing, or "wrong" or "failed" with the reason."""
    try:
        case.check(name, case.variants[name]())
    except AssertionError as error:
        return {"wrong": _first_line(error)}
    except Exception as error:  # a backend that refuses these shapes, a compiler, memory
        return {"failed": _first_line(error)}
    return {}


def _compare(case: Case, results: Results, seconds: Mapping[str, Sequence[float]]) -> None:
    """Add the ratios of the peers in ``seconds``, if they and ours are right."""
    right = [name for name in seconds if "wrong" not in results["variants"][name]]
    peers = [name for name in right if name not in case.bounds and not name.startswith(OURS)]
    if OURS in right and peers:
        ratios = results.setdefault("ratios", {})
        ratios |= {peer: ratio(seconds, peer, OURS) for peer in peers}
        results |= {"ratio": min(ratios.values()), "against": min(ratios, key=ratios.__getitem__)}


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
        name: f"{fault}: {variant[fault]}"
        for name, variant in results.get("variants", {}).items()
        for fault in ("wrong", "failed")
        if name.startswith(OURS) and fault in variant
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
    parser.add_argument("--seconds", type=float, help="begin no case near their end")
    options = parser.parse_args(given)
    options.cases = [name for name in names if name.startswith(tuple(options.cases or ("",)))]
    if not options.cases:
        parser.error(f"no such case; wanted the beginning of one of {', '.join(names)}")
    refuse_dirty(options.allow_dirty)
    return options


def run_suite(
    path: Path,
    cases: Mapping[str, Callable[[Keep], Results]],
    device: str,
    resume: bool = False,
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    **beside: Any,
) -> int:
    """Run ``cases`` into the file ``path``; 0, 1 if one of ours is at fault, `UNFINISHED`, `LOST`.

    A case gets a function that writes its results so far, marked "unfinished". ``resume``: whole
    cases that the file already holds, of the same sources and without a fault, are kept and not run
    again; those with a fault come last. None is begun with less than `LEAST` of ``seconds`` left.
    ``beside`` goes into the file beside the cases.
    """
    earlier, faulty = _earlier(path, device) if resume else ({}, [])
    results: Results = earlier | beside
    start, broken = clock(), False
    for name, run in sorted(cases.items(), key=lambda case: case[0] in faulty):
        if name in results:
            continue
        if seconds is not None and seconds - (clock() - start) < LEAST:
            return UNFINISHED

        def keep(partial: Results, name: str = name) -> None:
            print(f"  {line(name, partial)}", flush=True)
            write(path, {**results, name: {**partial, "unfinished": True}}, device)

        try:
            results[name] = run(keep)
        except Exception as error:  # building a case failed: said in its place, the next one runs
            results[name] = {"variants": {OURS: {"failed": _first_line(error)}}}
        for variant, why in faults(results[name]).items():
            broken = True
            print(f"FAULT {name}, {variant}: {why}", flush=True)
        print(line(name, results[name]), flush=True)
        write(path, results, device)
        try:
            _free(device)
        except Exception as error:
            print(f"LOST after {name}: {_first_line(error)}", flush=True)
            return LOST
    return int(broken)


def _earlier(path: Path, device: str) -> tuple[Results, list[str]]:
    """Of the cases that ``path`` holds of the same sources and tuned table: whole ones without a
    fault, and the names of those with one."""
    if not path.exists():
        return {}, []
    record: Results = json.loads(path.read_text())
    now, before = environment(device), record["environment"]
    if any(before.get(name) != now.get(name) for name in ("sources", "tuned")):
        return {}, []
    whole = {k: v for k, v in record["results"].items() if not v.get("unfinished")}
    faulty = [name for name, result in whole.items() if faults(result)]
    return {name: result for name, result in whole.items() if name not in faulty}, faulty


def _free(device: str) -> None:
    """Free what a case held. Raises if the device is lost."""
    if device == "cuda":
        import torch

        gc.collect()
        torch.cuda.synchronize()
        torch.compiler.reset()
        torch.cuda.empty_cache()


def line(name: str, results: Results) -> str:
    """One case in one line: ours (or the best there is), its rate, the ratio to the best peer."""
    variants = results.get("variants", {})
    timed = {k: v for k, v in variants.items() if "median_ms" in v}
    rates = ("tflops", "gbs", "per_second")
    if OURS in variants or not timed:
        timed = {OURS: timed[OURS]} if OURS in timed else {}
    if not timed:
        return f"{name:44s} {'no time':>12s}"
    best = max(timed, key=lambda k: max(timed[k].get(rate, 0.0) for rate in rates))
    text = f"{name if best == OURS else f'{name}, {best}':44s} {timed[best]['median_ms']:9.3f} ms"
    for rate, unit in zip(rates, ("TFLOP/s", "GB/s", "/s"), strict=True):
        if rate in timed[best]:
            text += f" {timed[best][rate]:9.0f} {unit}"
            break
    if "wrong" in timed[best]:
        text += " WRONG"
    if "ratio" in results:
        text += f" {results['ratio']:6.2f}x {results['against']}"
    return text
