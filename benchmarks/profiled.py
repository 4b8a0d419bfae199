"""ncu's counters of the kernels that a ViT-B/16 spends its time in: `python profiled.py FOLDER`.

Writes ncu-details.csv and ncu-source.csv.gz.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from limits import run_limited

LAUNCHED = tuple(
    f"launch B/16 x {case}"
    for case in ("256 qkv", "256 attention", "256 out", "256 up", "256 down",
                 "256 patch_embed uint8", "256 attention_one", "1 down")
)  # fmt: skip
SECTIONS = (
    "SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "WarpStateStats",
    "SchedulerStats", "Occupancy", "LaunchStats", "SourceCounters",
)  # fmt: skip
KERNELS = "regex:^_(linear|attention|patch|layernorm|pool)"
PROFILING, EXPORT = 0.6, 0.2
"""Parts of the time: for the profiled process, and for each of two exports."""


def export(report: Path, page: Sequence[str], seconds: float) -> bytes:
    """A page of ncu's report, as csv. Raises subprocess.CalledProcessError or TimeoutExpired."""
    command = ["ncu", "--import", str(report), "--csv", "--page", *page]
    return subprocess.run(command, capture_output=True, check=True, timeout=seconds).stdout


def main(argv: Sequence[str] | None = None) -> int:
    """Profile, then export the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=60, help="for all of it")
    options = parser.parse_args(argv)
    if shutil.which("ncu") is None:
        print("no ncu here")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.ncu-rep"
        command = ["ncu", "--clock-control", "none", "-f", "-o", str(report.with_suffix(""))]
        command += [word for section in SECTIONS for word in ("--section", section)]
        command += ["-k", KERNELS, sys.executable, str(Path(__file__).with_name("smoke.py"))]
        ended = run_limited([*command, "--step", *LAUNCHED], PROFILING * options.seconds, print)
        if not report.exists():
            print(f"FAILED: ncu ended with {ended.code} and wrote no report")
            return 1
        seconds = EXPORT * options.seconds
        details = export(report, ["details"], seconds)
        (options.folder / "ncu-details.csv").write_bytes(details)
        source = export(report, ["source", "--print-source", "sass"], seconds)
        (options.folder / "ncu-source.csv.gz").write_bytes(gzip.compress(source))
    return int(ended.code != 0)


if __name__ == "__main__":
    sys.exit(main())
