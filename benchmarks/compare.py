"""Is the new result slower than the old: `python benchmarks/compare.py OLD NEW`.

OLD and NEW are result files, or folders of them. Ours alone is judged; peers and ceilings show how
alike the two machines' states were. Exit code 1 where a case of ours is slower than the old one by
more than the threshold, is missing, wrong or failed; 2 where the files cannot be compared.
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
    found = {file.stem: json.loads(file.read_text()) for file in files if file.exists()}
    if not found:
        sys.exit(f"{path}: no result files")
    return found if path.is_dir() else {"": next(iter(found.values()))}


def device(found: Mapping[str, Record]) -> str:
    """What the results were measured on."""
    environments = [record["environment"] for record in found.values()]
    return ", ".join(sorted({each.get("gpu") or each["cpu"] for each in environments}))


def leaves(results: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Record]]:
    """Every variant of ours by name, and what has no variants at all; ceilings are neither."""
    for name, found in results.items():
        if not isinstance(found, dict):
            continue
        alone = OURS not in results and path[-1:] != ("variants",)
        if {"median_ms", "wrong", "failed"} & found.keys():
            if alone or name.startswith(OURS):
                parts = [part for part in (*path, name) if part and part not in ("variants", OURS)]
                yield ", ".join(parts), found
        else:
            yield from leaves(found, (*path, name))


def ours(found: Mapping[str, Record], ratios: bool) -> dict[str, float | str]:
    """Milliseconds of every case, or with ``ratios`` its part of the best peer's; or its fault."""
    times: dict[str, float | str] = {}
    parts: dict[str, float | str] = {}
    for suite, record in found.items():
        for name, leaf in leaves(record["results"], (suite,)):
            faults = [f"{kind}: {leaf[kind]}" for kind in ("wrong", "failed") if kind in leaf]
            times[name] = faults[0] if faults else leaf["median_ms"]
        for name, result in record["results"].items():
            if "ratio" in result and {"variants", OURS} & result.keys():
                parts[f"{suite}, {name}" if suite else name] = 1 / result["ratio"]
    if not ratios:
        return times
    return parts | {name: value for name, value in times.items() if isinstance(value, str)}


def verdict(old: float | str | None, new: float | str | None, threshold: float) -> tuple[str, bool]:
    """What became of one case, in words, and whether that is a regression."""
    if isinstance(new, str):
        return new, True
    if new is None:
        return "missing in the new results", True
    if old is None or isinstance(old, str):
        return f"{new:10.4f}  new", False
    change = 100 * (new / old - 1)
    slower = change > threshold
    mark = "  SLOWER" if slower else "  faster" if change < -threshold else ""
    return f"{old:10.4f} -> {new:10.4f} {change:+7.1f} %{mark}", slower


def main(given: Sequence[str] | None = None) -> int:
    """Print a line a case and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path, help="result file, or folder of them")
    parser.add_argument("new", type=Path, help="result file, or folder of them")
    parser.add_argument("--threshold", type=float, default=5.0, help="percent; 5 by default")
    parser.add_argument(
        "--ratios", action="store_true", help="compare with the peers, not by time: other devices"
    )
    options = parser.parse_args(given)
    old, new = records(options.old), records(options.new)
    if device(old) != device(new) and not options.ratios:
        print(f"measured on {device(old)} and on {device(new)}: times say nothing; --ratios do")
        return 2
    before, after = ours(old, options.ratios), ours(new, options.ratios)
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
