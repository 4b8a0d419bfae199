"""A short table of the measurements on a GPU: `python benchmarks/report.py [FOLDER]`.

Reads every result below FOLDER (``benchmarks/results``, or VITRAIL_RESULTS) but the CPU's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness import OURS
from suite import results_root

Record = Mapping[str, Any]
UNITS = {"tflops": "TFLOP/s", "gbs": "GB/s", "per_second": "/s"}


def _rate(variant: Record, *names: str) -> str:
    """The rate, of those named, that is the nearest to its ceiling, and how near."""
    measured = [name for name in names if name in variant]
    if not measured:
        return ""
    name = max(measured, key=lambda rate: variant.get(f"{rate}_of_ceiling", 0))
    share = variant.get(f"{name}_of_ceiling")
    return f"{variant[name]:8.4g} {UNITS[name]}{f' {share:4.0%}' if share else ''}"


def _faults(variants: Record) -> str:
    """The faults of Vitrail's variants, and the peers that are wrong and have no time."""
    texts = []
    for name, variant in variants.items():
        fault = next((fault for fault in ("wrong", "failed") if fault in variant), None)
        if fault and name.startswith(OURS):
            texts.append(f"{name} {fault.upper()}: {variant[fault]}")
        elif fault == "wrong":
            texts.append(f"{name} wrong")
    return "; ".join(texts)


def _timed(results: Record) -> Iterator[tuple[str, Record, Record, str]]:
    """Name, result, Vitrail's time and faults of every case."""
    for name, result in results.items():
        if name != "ceilings":
            variants = result.get("variants", {})
            yield name, result, variants.get(OURS, {}), _faults(variants)


def kernel_lines(results: Record) -> Iterator[str]:
    """A line a kernel: time, rate and its part of the ceiling, against cuBLAS and the best peer."""
    yield f"{'kernel':34s} {'ms':>8s}  {'rate, of ceiling':22s} {'cublas':6s} best peer"
    for name, result, ours, faults in _timed(results):
        if "median_ms" not in ours:
            yield f"{name:34s} {faults}"
            continue
        time = ours["median_ms"]
        bound = result["variants"].get("cublas", {}).get("median_ms")
        alone = f"{bound / time:.2f}x" if bound else ""
        best = f"{result['ratio']:.2f}x {result['against']}" if "ratio" in result else "no peer"
        rate = _rate(ours, "tflops", "gbs")
        yield f"{name:34s} {time:8.4f}  {rate:22s} {alone:6s} {best} {faults}"


def model_lines(results: Record) -> Iterator[str]:
    """A line a model: time, items a second, and how many times faster than each peer."""
    yield f"{'model':24s} {'ms':>8s} {'items':>11s} {'matmul':>6s}  times faster than"
    for name, result, ours, faults in _timed(results):
        if "median_ms" not in ours:
            yield f"{name:24s} {faults}"
            continue
        matmul_share = ours.get("tflops_of_ceiling")
        texts = [f"{peer} {x:.2f}x" for peer, x in result.get("ratios", {}).items()]
        texts += [
            f"{variant.removeprefix(OURS).strip()}: {figures['median_ms']:.3f} ms"
            for variant, figures in result["variants"].items()
            if (variant == "graph" or variant.startswith(f"{OURS} ")) and "median_ms" in figures
        ]
        items, share = _rate(ours, "per_second"), f"{matmul_share:.0%}" if matmul_share else ""
        texts += [faults] * bool(faults)
        yield f"{name:24s} {ours['median_ms']:8.3f} {items:>11s} {share:>6s}  {', '.join(texts)}"


def ceiling_lines(results: Record) -> Iterator[str]:
    """The fastest of each ceiling."""
    for name, result in results.items():
        timed = {k: v for k, v in result.get("variants", {}).items() if "median_ms" in v}
        if timed:
            best = max(timed, key=lambda k: timed[k].get("tflops") or timed[k].get("gbs") or 0)
            yield f"ceiling, {name}: {_rate(timed[best], 'tflops', 'gbs').strip()} ({best})"


def host_lines(results: Record) -> Iterator[str]:
    """A line a batch: microseconds of the host, of every variant."""
    yield f"{'host time of a forward':26s} microseconds"
    for name, result in results.items():
        yield f"{name:26s} {_each(result, 1e3, '.1f')}"


def latency_lines(results: Record) -> Iterator[str]:
    """A line a case: milliseconds of every variant, and the goal."""
    yield f"{'latency, one item':26s} milliseconds"
    for name, result in results.items():
        goal = f"  (goal {result['goal_ms']:g})" if "goal_ms" in result else ""
        yield f"{name:26s} {_each(result, 1, '.3f')}{goal}"


def _each(result: Record, scale: float, form: str) -> str:
    """Every variant's median, and the faults."""
    variants = result.get("variants", {})
    texts = [
        f"{name} {format(scale * figures['median_ms'], form)}"
        for name, figures in variants.items()
        if "median_ms" in figures
    ]
    return ", ".join([*texts, *filter(None, [_faults(variants)])])


LINES = {
    "ceilings": ceiling_lines,
    "host": host_lines,
    "latency": latency_lines,
    "kernels": kernel_lines,
    "models": model_lines,
    "int8": model_lines,
}


def render(root: Path) -> Iterator[str]:
    """Every device's results, suite by suite."""
    for folder in sorted(path for path in root.glob("*/") if path.name != "cpu"):
        printed_heading = ""
        for suite, lines in LINES.items():
            file = folder / f"{suite}.json"
            if not file.exists():
                continue
            record = json.loads(file.read_text())
            machine = record["environment"]
            heading = (
                f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}, triton "
                f"{machine['triton']}, commit {machine['commit'][:12]}{' dirty' * machine['dirty']}"
            )
            if heading != printed_heading:
                printed_heading = heading
                yield printed_heading
            yield from lines(record["results"])


def main() -> None:
    """Print the results."""
    for text in render(Path(sys.argv[1]) if len(sys.argv) > 1 else results_root()):
        print(text.rstrip())


if __name__ == "__main__":
    main()
