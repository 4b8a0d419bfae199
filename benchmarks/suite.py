"""How suites for a GPU are run and kept: results are written as they are measured, and resumed."""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from environment import ROOT, environment, refuse_dirty
from harness import OURS, Keep, Results, faults, first_line

UNFINISHED = 3
"""Exit code of a suite whose time was up: the same command goes on with the next case."""
LOST = 70
"""Exit code of a process whose device is lost, after which nothing in it would run."""

LEAST = 45.0
"""The least seconds with which a case begins: the time until its first results."""


def write(path: Path, results: Mapping[str, Any], device: str = "cpu") -> None:
    """Write a suite's results with the environment in which they were measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"schema": 1, "environment": environment(device), "results": results}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


def results_root() -> Path:
    """``benchmarks/results``, or VITRAIL_RESULTS."""
    return Path(os.environ.get("VITRAIL_RESULTS") or ROOT / "benchmarks" / "results")


def results_folder(device: str) -> Path:
    """The folder of a device's results: "cpu", or the GPU's name in small letters."""
    import torch

    name = torch.cuda.get_device_properties().name if device == "cuda" else device
    return results_root() / "-".join(name.lower().split())


def arguments(about: str | None, names: Sequence[str], given: Sequence[str] | None) -> Any:
    """The arguments of a suite for a GPU. Exits for an unknown case, and for a dirty tree."""
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
    """Run ``cases`` into the file ``path``. Returns 0, 1 for a fault, `UNFINISHED`, `LOST`.

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
        except Exception as error:  # a case that cannot be built is reported; the next case runs
            results[name] = {"variants": {OURS: {"failed": first_line(error)}}}
        for variant, why in faults(results[name]).items():
            broken = True
            print(f"FAULT {name}, {variant}: {why}", flush=True)
        print(line(name, results[name]), flush=True)
        write(path, results, device)
        try:
            _free(device)
        except Exception as error:
            print(f"LOST after {name}: {first_line(error)}", flush=True)
            return LOST
    return int(broken)


def _earlier(path: Path, device: str) -> tuple[Results, list[str]]:
    """The cases in ``path`` of the same sources and tuned table: complete cases without a
    fault, and the names of cases with a fault."""
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
    """Free the memory of a case. Raises if the device is lost."""
    if device == "cuda":
        import torch

        gc.collect()
        torch.cuda.synchronize()
        torch.compiler.reset()
        torch.cuda.empty_cache()


def line(name: str, results: Results) -> str:
    """A case in a line: Vitrail's time (or the best), its rate, the ratio to the best peer."""
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
