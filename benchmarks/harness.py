"""Measures a case: checks it first, times its variants in turn, and marks wrong results.

A variant is a callable without arguments, a timer a function of it that returns seconds: wall clock
(`host_timer`) or device events (`device_timer`). `measure` times a `Case`.
"""

from __future__ import annotations

import importlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from environment import ROOT

OURS = "vitrail"

Results = dict[str, Any]
Run = Callable[[], Any]
Timer = Callable[[Run], float]
Keep = Callable[[Results], None]
"""Takes the results of a case so far."""

# -- timing ----------------------------------------------------------------------------------------


def host_timer(
    synchronize: Run | None = None, clock: Callable[[], float] = time.perf_counter
) -> Timer:
    """The wall time of a run until ``synchronize`` returns: the latency that a caller sees."""

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
    """A variant over several sets of inputs: each call takes the next set."""
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
    end = len(ordered) - 1
    return {
        "median_ms": round(statistics.median(ordered) * 1e3, 5),
        "p20_ms": round(ordered[round(0.2 * end)] * 1e3, 5),
        "p80_ms": round(ordered[round(0.8 * end)] * 1e3, 5),
        "rounds": len(ordered),
    }


def ratio(seconds: Mapping[str, Sequence[float]], peer: str, ours: str) -> float:
    """How many times faster ``ours`` is: the median over the rounds of the paired ratios."""
    pairs = zip(seconds[peer], seconds[ours], strict=True)
    return round(statistics.median(theirs / mine for theirs, mine in pairs), 3)


# -- cases -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Variants that are timed together: ``variants`` by name, `OURS` among them.

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
    enters no ratio; a variant that cannot run gets "failed" with the reason. ``ratio``: ours over
    the fastest peer. ``ceilings``: "tflops" and "gbs" of the device.
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
        return {"wrong": first_line(error)}
    except Exception as error:  # a backend that refuses these shapes, a compiler, memory
        return {"failed": first_line(error)}
    return {}


def _compare(case: Case, results: Results, seconds: Mapping[str, Sequence[float]]) -> None:
    """Add the ratios of the peers in ``seconds``, if they and ours are right."""
    right = [name for name in seconds if "wrong" not in results["variants"][name]]
    peers = [name for name in right if name not in case.bounds and not name.startswith(OURS)]
    if OURS in right and peers:
        ratios = results.setdefault("ratios", {})
        ratios |= {peer: ratio(seconds, peer, OURS) for peer in peers}
        results |= {"ratio": min(ratios.values()), "against": min(ratios, key=ratios.__getitem__)}


def first_line(error: Exception) -> str:
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
