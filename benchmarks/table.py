"""The README's speed table from the committed results: `python benchmarks/table.py`."""

from __future__ import annotations

import json
from typing import Any

from harness import ROOT

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
START, END = "<!-- speed: written by benchmarks/table.py -->\n", "<!-- /speed -->"


def _results(suite: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((RESULTS / f"{suite}.json").read_text())["results"]
    return results


def render() -> str:
    """The table, in Markdown."""
    lines = ["| work | against transformers |", "|---|---|"]
    names = {
        "text": "CLIP B/32 text, batch 64, captions of {}",
        "vision": "ViT-B/16 class token, {}",
        "pixels": "photo to pixels, CLIP's processor, {}",
    }
    for suite, name in names.items():
        for case, result in _results(suite).items():
            lines.append(f"| {name.format(case)} | {result['ratio']:.2f}x |")
    loading = _results("loading")
    first = loading["CLIP B/32 load to first embedding"]["median_ms"] / 1e3
    growth = loading["CLIP L/14 resident growth"]["ratio"]
    lines.append(f"| CLIP B/32, load to first embedding | {first:.2f} s |")
    lines.append(f"| CLIP L/14, memory taken by loading, over its weights | {growth:.2f}x |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table between its marks."""
    head, rest = README.read_text().split(START)
    README.write_text(head + START + render() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
