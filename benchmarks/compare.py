"""Is the new result slower than the old: `python benchmarks/compare.py OLD NEW`.

OLD and NEW are result files, or folders of them. Ours alone is judged; peers and ceilings show how
alike the two machines' states were. Exit code 1 if a case of Vitrail is slower than the old case by
more than the threshold, is missing, wrong or failed; 2 if the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import OURS

Record = dict[str, Any]


def records(path: Path) -> dict[str, Record]:
    """The result files at ``path``, a file or a folder, by suite."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    by_suite = {file.stem: json.loads(file.read_text()) for file in files if file.exists()}
    if not by_suite:
        sys.exit(f"{path}: no result files")
    return by_suite if path.is_dir() else {"": next(iter(by_suite.values()))}


def device(by_suite: Mapping[str, Record]) -> str:
    """The devices of the results."""
    environments = [record["environment"] for record in by_suite.values()]
    return ", ".join(
        sorted({environment.get("gpu") or environment["cpu"] for environment in environments})
    )


def leaves(results: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Record]]:
    """Vitrail's variants by name, and results without variants; ceilings are neither."""
    for name, value in results.items():
        if not isinstance(value, dict):
            continue
        alone = OURS not in results and path[-1:] != ("variants",)
        if {"median_ms", "wrong", "failed"} & value.keys():
            if alone or name.startswith(OURS):
                labels = [
                    label for label in (*path, name) if label and label not in ("variants", OURS)
                ]
                yield ", ".join(labels), value
        else:
            yield from leaves(value, (*path, name))


def ours(by_suite: Mapping[str, Record], ratios: bool) -> dict[str, float | str]:
    """Milliseconds of every case, or with ``ratios`` its part of the best peer's; or its fault."""
    times: dict[str, float | str] = {}
    shares: dict[str, float | str] = {}
    for suite, record in by_suite.items():
        for name, leaf in leaves(record["results"], (suite,)):
            faults = [f"{fault}: {leaf[fault]}" for fault in ("wrong", "failed") if fault in leaf]
            times[name] = faults[0] if faults else leaf["median_ms"]
        for name, result in record["results"].items():
            if "ratio" in result and {"variants", OURS} & result.keys():
                shares[f"{suite}, {name}" if suite else name] = 1 / result["ratio"]
    if not ratios:
        return times
    return shares | {name: value for name, value in times.items() if isinstance(value, str)}


def verdict(
    before: float | str | None, after: float | str | None, threshold: float
) -> tuple[str, bool]:
    """The change of a case in words, and whether it is a regression."""
    if isinstance(after, str):
        return after, True
    if after is None:
        return "missing in the new results", True
    if before is None or isinstance(before, str):
        return f"{after:10.4f}  new", False
    change = 100 * (after / before - 1)
    slower = change > threshold
    mark = "  SLOWER" if slower else "  faster" if change < -threshold else ""
    return f"{before:10.4f} -> {after:10.4f} {change:+7.1f} %{mark}", slower


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line a case and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path, help="result file, or folder of them")
    parser.add_argument("new", type=Path, help="result file, or folder of them")
    parser.add_argument("--threshold", type=float, default=5.0, help="percent; 5 by default")
    parser.add_argument(
        "--ratios", action="store_true", help="compare with the peers, not by time: other devices"
    )
    options = parser.parse_args(argv)
    old_records, new_records = records(options.old), records(options.new)
    if device(old_records) != device(new_records) and not options.ratios:
        devices = f"{device(old_records)} and on {device(new_records)}"
        print(f"measured on {devices}: times say nothing; --ratios do")
        return 2
    before, after = ours(old_records, options.ratios), ours(new_records, options.ratios)
    if not before:
        print(f"{options.old}: nothing of ours was measured")
        return 2
    regressions = 0
    for name in before | after:
        text, worse = verdict(before.get(name), after.get(name), options.threshold)
        regressions += worse
        print(f"{name:52s} {text}")
    print(
        f"{regressions} of {len(before | after)}: slower by more than {options.threshold:g} %, "
        f"missing or wrong ({'of the best peer' if options.ratios else 'milliseconds'})"
    )
    return int(regressions > 0)


if __name__ == "__main__":
    sys.exit(main())
