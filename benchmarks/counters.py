"""Counts the work of a model's kernels by launch: `python benchmarks/counters.py "ViT-B/16"`.

The kernels are compiled for ``--arch`` and run in the emulator of ``tests/emulator``; no GPU is
needed, and no time is measured. For each launch of the pooled plan of a few images (``--images N``)
it prints warp instructions by class, wavefronts of shared memory and sectors of global memory, each
beside the fewest that would do, bytes by tensor maps (TMA), and waits. Then come the worst sites:
source lines that take more wavefronts or sectors than the fewest. Launches that are equal run once;
``times`` says how many the plan has. `docs/emulator.md` says how to read the counters.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, last_change, refuse_dirty
from launches import MODELS, Repeated, launches
from roofline import CARDS
from suite import write

import vitrail_kernels
from vitrail_kernels.launch import Call, Target

sys.path.append(str(ROOT / "tests"))
from emulator import Report, Site
from emulator.call import run_call

ARCHES = [arch for arch in CARDS if not Target(arch, 1).tcgen05]  # which is not emulated
DEFAULT = ("ViT-B/16", "CLIP L/14", "DINOv2-B/14")
WAITS = {
    "barrier": r"(bar|barrier)\.(cta\.)?(sync|red)|barrier\.cluster\.wait",
    "mbarrier": r"mbarrier\.(try|test)_wait",
    "group": r"(cp\.async(\.bulk)?|wgmma)\.wait_(group|all)",
}
"""Instructions that wait, by the event."""

Results = dict[str, Any]

# -- counts ----------------------------------------------------------------------------------------


@dataclass
class Line:
    """The sums of the counts of an opcode's instructions at a source line.

    ``ptx``: the first line of the PTX; ``instructions``: how many there are.
    """

    source: str
    opcode: str
    memory: str
    ptx: int
    instructions: int = 0
    runs: int = 0
    ideal: int = 0
    actual: int = 0
    bytes: int = 0
    waits: int = 0

    def add(self, site: Site) -> None:
        self.ptx = min(self.ptx, site.line)
        self.instructions += 1
        for name in ("runs", "ideal", "actual", "bytes"):
            setattr(self, name, getattr(self, name) + getattr(site, name))
        self.waits += site.runs if _waits_for(site) else 0


@dataclass
class Counts:
    """The counts of a kernel launch. ``lines``: every site, by source line and opcode."""

    kernel: str
    tile: str
    blocks: int
    report: Report
    lines: list[Line] = field(default_factory=list)

    def memory(self, name: str) -> dict[str, int]:
        """Of "shared" the wavefronts, of "global" the sectors: "actual", "ideal", and "bytes"."""
        lines = [line for line in self.lines if line.memory == name]
        return {key: sum(getattr(x, key) for x in lines) for key in ("actual", "ideal", "bytes")}

    def waits(self) -> dict[str, int]:
        """Waits that warps executed, by the event."""
        counts = dict.fromkeys(WAITS, 0)
        for site in self.report.sites:
            if name := _waits_for(site):
                counts[name] += site.runs
        return counts

    def record(self) -> Results:
        """As the result files hold it."""
        report = self.report
        return {
            "kernel": self.kernel,
            "tile": self.tile,
            "blocks": self.blocks,
            "warp_instructions": {k: v for k, v in report.by_class.items() if v},
            "shared_wavefronts": self.memory("shared"),
            "global_sectors": self.memory("global"),
            "tensor_map_bytes": {
                "loaded": report.tensor_load_bytes,
                "stored": report.tensor_store_bytes,
            },
            "waits": self.waits(),
        }


def _waits_for(site: Site) -> str | None:
    return next((name for name, form in WAITS.items() if re.match(form, site.opcode)), None)


def _memory(site: Site) -> str:
    """The memory of a site: "shared", "global" (not by tensor maps), "tensor map" or ""."""
    if site.instruction_class in ("shared", "matrix move"):
        return "shared"
    if "bulk" in site.opcode:
        return "tensor map" if site.bytes else ""
    return "global" if site.ideal else ""


def _source(text: str) -> str:
    """file:line of "file.py:line:column", and of the lines that it was inlined at."""
    return " in ".join(re.findall(r"[^\s:@\[]+:\d+", text)) or "unknown"


def count(call: Call, arch: int) -> Counts:
    """Runs ``call`` as compiled for ``arch`` and counts. Raises `emulator.Fault`."""
    report = run_call(call, arch, track=False, races=False, counters=True, seed=0)
    lines: dict[tuple[str, str], Line] = {}
    for site in report.sites:
        source = _source(site.source)
        empty = Line(source, site.opcode, _memory(site), site.line)
        lines.setdefault((source, site.opcode), empty).add(site)
    config = call.config
    sides = (config.block_m, config.block_n, config.block_k)
    tile = "x".join(str(side) for side in sides if side)
    return Counts(call.kernel.__name__, tile, call.grid.blocks, report, list(lines.values()))


def worst(lines: Sequence[Line], limit: int | None = None) -> list[Line]:
    """Lines that take more than the ideal, by how much more; all of them without ``limit``."""
    over = [line for line in lines if line.actual > line.ideal]
    return sorted(over, key=lambda line: line.ideal - line.actual)[:limit]


# -- output ----------------------------------------------------------------------------------------


def _excess(counts: Mapping[str, int]) -> str:
    times = f" ({counts['actual'] / counts['ideal']:.2f}x)" if counts["ideal"] else ""
    return f"{counts['actual']:,} for {counts['ideal']:,}{times}"


def launch_lines(launch: Repeated, counts: Counts) -> Iterator[str]:
    """The counts of a launch in a few lines."""
    record, report = counts.record(), counts.report
    yield (
        f"{launch.label} x{launch.times}: {counts.kernel} {counts.tile}, {counts.blocks} blocks, "
        f"{report.warp_instructions:,} warp instructions"
    )
    yield "    " + ", ".join(f"{k} {v:,}" for k, v in record["warp_instructions"].items())
    loaded, stored = record["tensor_map_bytes"].values()
    waits = ", ".join(f"{name} {times:,}" for name, times in record["waits"].items() if times)
    yield (
        f"    shared wavefronts {_excess(record['shared_wavefronts'])}; global sectors "
        f"{_excess(record['global_sectors'])}; TMA {loaded:,} bytes in, {stored:,} out; "
        f"waits: {waits or 'none'}"
    )


def line_text(label: str, times: int, line: Line) -> str:
    """The line of a site."""
    unit = "wavefronts" if line.memory == "shared" else "sectors"
    more = f" and {line.instructions - 1} more" if line.instructions > 1 else ""
    return (
        f"{times * (line.actual - line.ideal):12,} {unit} too many: {label} x{times}, "
        f"{line.source}, {line.opcode} at PTX line {line.ptx}{more}, "
        f"{line.actual:,} for {line.ideal:,} ({line.actual / line.ideal:.2f}x)"
    )


def count_model(name: str, arch: int, options: argparse.Namespace) -> Results:
    """Count and print a model on an architecture. Returns the result as the file holds it."""
    spec, side = MODELS[name]
    target = Target(arch, options.sms or CARDS[arch].sms)
    images = f"{options.images} image{'s' * (options.images > 1)}"
    print(f"{name}, {images}, {options.pixels} pixels, sm_{arch}, {target.sms} multiprocessors")
    results, over = [], []
    for launch in launches(spec, side, target, options.images, options.pixels == "uint8"):
        for call in launch.calls:
            counts = count(call, arch)
            print(*launch_lines(launch, counts), sep="\n", flush=True)
            over += [(launch, line) for line in worst(counts.lines)]
            lines = counts.lines if options.sites is None else worst(counts.lines, options.sites)
            record = {"label": launch.label, "op": launch.op, "times": launch.times}
            results.append(record | counts.record() | {"sites": [vars(line) for line in lines]})
    over.sort(key=lambda each: each[0].times * (each[1].ideal - each[1].actual))
    shown = over[: 20 if options.sites is None else options.sites]
    print(f"the worst sites ({len(shown)} of {len(over)}):" if over else "no site over its ideal")
    for launch, line in shown:
        print(line_text(launch.label, launch.times, line))
    return {
        "images": options.images,
        "pixels": options.pixels,
        "sms": target.sms,
        "launches": results,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print, and with ``--json`` write a file as the other suites do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHES, default=[90, 80])
    parser.add_argument("--images", type=int, default=8, help="images or texts at once")
    parser.add_argument("--pixels", choices=("uint8", "float32"), default="uint8")
    parser.add_argument("--sms", type=int, help="multiprocessors, instead of the card's own")
    parser.add_argument("--sites", type=int, help="sites printed, and kept for each launch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all counts, every site")
    parser.add_argument("--allow-dirty", action="store_true", help="write of an uncommitted tree")
    options = parser.parse_args(arguments)
    names = options.models or DEFAULT
    if unknown := sorted(set(names) - MODELS.keys()):
        parser.error(f"no model {', '.join(unknown)}; wanted some of {', '.join(MODELS)}")
    if options.json:
        refuse_dirty(options.allow_dirty)
    torch.manual_seed(0)
    results: Results = {"kernels": last_change(Path(vitrail_kernels.__file__).parent)}
    for name in names:
        for arch in options.arch:
            results[f"{name}, sm_{arch}"] = count_model(name, arch, options)
    if options.json:
        write(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
