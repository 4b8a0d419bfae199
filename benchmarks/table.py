"""The tables of the docs from the committed results: `python benchmarks/table.py`.

README.md has the speed table, docs/performance.md the emulator's counts before and after.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from harness import ROOT

README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- speed: written by benchmarks/table.py -->\n", "<!-- /speed -->"
COUNTERS = "<!-- counters: written by benchmarks/table.py -->\n", "<!-- /counters -->"

Launches = list[dict[str, Any]]


def _results(name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())["results"]
    return results


def render() -> str:
    """The speed table, in Markdown."""
    lines = ["| work | against transformers |", "|---|---|"]
    names = {
        "text": "CLIP B/32 text, batch 64, captions of {}",
        "vision": "ViT-B/16 class token, {}",
        "pixels": "photo to pixels, CLIP's processor, {}",
    }
    for suite, name in names.items():
        for case, result in _results(f"cpu/{suite}").items():
            lines.append(f"| {name.format(case)} | {result['ratio']:.2f}x |")
    loading = _results("cpu/loading")
    first = loading["CLIP B/32 load to first embedding"]["median_ms"] / 1e3
    growth = loading["CLIP L/14 resident growth"]["ratio"]
    lines.append(f"| CLIP B/32, load to first embedding | {first:.2f} s |")
    lines.append(f"| CLIP L/14, memory taken by loading, over its weights | {growth:.2f}x |")
    return "\n".join(lines) + "\n"


def _over(launches: Launches, memory: str) -> str:
    """Wavefronts or sectors of the launches, and how many times the ideal that is."""
    actual, ideal = (
        sum(launch["times"] * launch[memory][key] for launch in launches)
        for key in ("actual", "ideal")
    )
    return f"{_count(actual)} ({actual / ideal:.2f}x)" if ideal else "0"


def _count(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def _instructions(launches: Launches) -> str:
    return _count(sum(x["times"] * sum(x["warp_instructions"].values()) for x in launches))


def _cells(before: Launches, after: Launches) -> Iterable[str]:
    """Warp instructions, wavefronts and sectors; one number where nothing changed."""
    for count in (
        _instructions,
        lambda launches: _over(launches, "shared_wavefronts"),
        lambda launches: _over(launches, "global_sectors"),
    ):
        old, new = count(before), count(after)
        yield old if old == new else f"{old} -> {new}"


def render_counters() -> str:
    """The table of the emulator's counts, whole forwards and operators that changed."""
    before, after = _results("emulated/before"), _results("emulated/after")
    lines = [
        "| model, architecture | warp instructions | shared wavefronts | global sectors |",
        "|---|---|---|---|",
    ]
    for op in (None, "patch_embed", "attention_one"):
        for case in (name for name in after if name != "kernels"):
            every = [
                [launch for launch in results[case]["launches"] if op in (None, launch["op"])]
                for results in (before, after)
            ]
            label = f"{case}, {'whole forward' if op is None else f'`{op}`'}"
            lines.append(f"| {label} | {' | '.join(_cells(*every))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the tables between their marks."""
    for file, (start, end), text in (
        (README, (START, END), render()),
        (PERFORMANCE, COUNTERS, render_counters()),
    ):
        head, rest = file.read_text().split(start)
        file.write_text(head + start + text + end + rest.split(end)[1])


if __name__ == "__main__":
    main()
