"""The tables of the docs from the committed results: `python benchmarks/table.py`.

README.md has the speed table, docs/performance.md the emulator's counts and the facts of sm_90's
machine code, before and after changes of the kernels, the host's time for captions, and int8 on a
CPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from harness import ROOT

README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- speed: written by benchmarks/table.py -->\n", "<!-- /speed -->"
SASS = "<!-- sass: written by benchmarks/table.py -->\n", "<!-- /sass -->"
CAPTIONS = "<!-- captions: written by benchmarks/table.py -->\n", "<!-- /captions -->"
SASS_INT8 = "<!-- sass-int8: written by benchmarks/table.py -->\n", "<!-- /sass-int8 -->"
INT8 = "<!-- int8: written by benchmarks/table.py -->\n", "<!-- /int8 -->"
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
    """Warp instructions, wavefronts and sectors; a single number if nothing changed."""
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


SASS_CASES = (("ViT-B/16", 256), ("ViT-B/16", 1), ("CLIP L/14", 256))
SASS_LAUNCHES = ("patch_embed", "qkv", "attention", "out", "up", "down")
SASS_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "registers": lambda kernel: f"{kernel['registers']}",
    "KiB": lambda kernel: f"{kernel['shared'] / 1024:.0f}",
    "blocks": lambda kernel: f"{kernel['blocks']}",
    "in flight": lambda kernel: f"{kernel['loops'][0]['in_flight']}",
    "ahead": lambda kernel: f"{kernel['loops'][0]['loads_ahead']}",
    "lead": lambda kernel: f"{kernel['loops'][0]['lead']}",
    "iteration": lambda kernel: f"{kernel['loops'][0]['instructions']}",
    "epilogue": lambda kernel: f"{kernel['epilogue']['instructions']}",
    "a value": lambda kernel: f"{kernel['epilogue']['per_value']:.1f}",
    "MOV": lambda kernel: f"{kernel['epilogue'].get('MOV', 0)}",
}
TRITONS = ("3.7", "3.6")


def _kernel(results: dict[str, Any], case: str, label: str) -> dict[str, Any]:
    kernel: dict[str, Any] = results[case][label]
    return _kernel(results, case, kernel["same_as"]) if "same_as" in kernel else kernel


def _joined(values: Sequence[str], between: str) -> str:
    """The values in order, or a single value if all are equal."""
    return values[0] if len(set(values)) == 1 else between.join(values)


def _sass_cells(kernels: Sequence[Sequence[dict[str, Any]]]) -> Iterable[str]:
    """``kernels``: before and after, of each version of Triton."""
    for column in SASS_COLUMNS.values():
        yield _joined(
            [_joined([column(k) for k in versions], " / ") for versions in kernels], " -> "
        )


def render_sass() -> str:
    """The table of the machine code: before and after, under both versions of Triton."""
    files = [f"compiled/{time}-triton-{{}}" for time in ("before", "after")]
    results = [
        [_results(file.format(triton)) for triton in TRITONS]
        for file in files
        if (RESULTS / f"{file.format(TRITONS[0])}.json").exists()
    ]
    lines = [f"| kernel | {' | '.join(SASS_COLUMNS)} |", "|---" * (1 + len(SASS_COLUMNS)) + "|"]
    for model, batch in SASS_CASES:
        for label in SASS_LAUNCHES:
            case = f"{model}, batch {batch}, sm_90"
            cells = _sass_cells([[_kernel(r, case, label) for r in each] for each in results])
            lines.append(f"| {model} x {batch}, {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def render_sass_int8() -> str:
    """The table of the int8 kernels' machine code."""
    results = _results("compiled/int8-triton-3.7")
    columns = {name: SASS_COLUMNS[name] for name in SASS_COLUMNS if name not in ("lead", "MOV")}
    lines = [f"| kernel | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for model, batch in SASS_CASES:
        for label in ("qkv", "up", "down", "down, stats"):
            kernel = _kernel(results, f"{model}, batch {batch}, sm_90", label)
            cells = [column(kernel) for column in columns.values()]
            lines.append(f"| {model} x {batch}, {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def render_captions() -> str:
    """The table of the host's time for captions and labels, in microseconds each."""
    lines = ["| call | before | now | the tokenizers library alone |", "|---|---|---|---|"]
    for case, results in _results("cpu/captions").items():
        if case == "before":  # the commit
            continue
        times = [
            f"{results['variants'][name]['per_caption_us']:.3g}"
            if name in results["variants"]
            else ""
            for name in ("before", "vitrail", "tokenizer")
        ]
        lines.append(f"| {case} | {' | '.join(times)} |")
    return "\n".join(lines) + "\n"


def render_int8() -> str:
    """The table of int8 against fp32 on a CPU."""
    lines = [
        "| image tower | goal | CPU time | wall time | fp32, int8: ms of CPU time |",
        "|---|---|---|---|---|",
    ]
    for case, result in _results("cpu/int8").items():
        if case == "instructions":
            continue
        cpu, wall = result["cpu"], result["wall"]
        times = ", ".join(f"{cpu[name]['median_ms']:.0f}" for name in ("fp32", "int8"))
        ratios = f"{cpu['ratio']:.2f}x | {wall['ratio']:.2f}x"
        tower = case.replace(", 1 threads", ", 1 thread")
        lines.append(f"| {tower} | {result['goal']}x | {ratios} | {times} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the tables between their marks."""
    for file, (start, end), text in (
        (README, (START, END), render()),
        (PERFORMANCE, COUNTERS, render_counters()),
        (PERFORMANCE, SASS, render_sass()),
        (PERFORMANCE, SASS_INT8, render_sass_int8()),
        (PERFORMANCE, CAPTIONS, render_captions()),
        (PERFORMANCE, INT8, render_int8()),
    ):
        head, rest = file.read_text().split(start)
        file.write_text(head + start + text + end + rest.split(end)[1])


if __name__ == "__main__":
    main()
