"""Mutated images: only our errors, quickly, in little memory, and nothing after them is touched."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import fuzz_images

ROOT = Path(__file__).parents[2]
FORMATS = {"JPEG", "PNG", "WEBP", "GIF", "BMP"}
SECONDS, PEAK_KIB = 5.0, 1_000_000
EXIF = re.compile("Corrupt EXIF data|Truncated File Read|Tag data larger than file")


def fuzz(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """What became of the cases; a crash or a hang names its case."""
    at = folder / "case"
    command = [
        sys.executable,
        str(ROOT / "tests" / "fuzz_images.py"),
        str(seed),
        str(count),
        str(at),
    ]
    paths = os.pathsep.join(str(ROOT / name) for name in ("engine", "kernels"))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=60 + count / 20
        )
    except subprocess.TimeoutExpired:
        run = None
    number = struct.unpack("<q", at.read_bytes())[0]
    where = f"case({seed}, {number})"
    assert run is not None, f"{where} hangs"
    assert run.returncode == 0, f"{where}: {run.stderr[-2000:]}"
    assert run.stderr == "", f"noise: {run.stderr[-2000:]}"
    facts: dict[str, Any] = json.loads(run.stdout)
    assert facts["slowest"] < SECONDS, f"case({seed}, {facts['slowest_case']})"
    assert facts["peak_kib"] < PEAK_KIB
    # Pillow warns of broken EXIF while it opens a file; whoever cares can filter that.
    assert all(EXIF.match(text) for text in facts["warnings"]), facts["warnings"]
    assert sum(facts["accepted"].values()) + sum(facts["refused"].values()) == count
    return facts


def test_a_case_is_the_same_every_time_and_the_seeds_are_sound() -> None:
    assert fuzz_images.case(1, 5) == fuzz_images.case(1, 5)
    assert len({fuzz_images.case(1, n)[1] for n in range(50)}) > 45
    sound = [data for files in fuzz_images.seeds().values() for data in files]
    found = fuzz_images.preprocess_uint8(sound, fuzz_images.SPEC, 3)
    assert not [one for one in found if isinstance(one, Exception)]


@pytest.mark.machine
def test_five_hundred_mutated_images(tmp_path: Path) -> None:
    facts = fuzz(7, 500, tmp_path)
    assert set(facts["accepted"]) == FORMATS


@pytest.mark.machine
@pytest.mark.slow
def test_twenty_thousand_mutated_images(tmp_path: Path) -> None:
    facts = fuzz(0, 20_000, tmp_path)
    refused = Counter[str]()
    for text, count in facts["refused"].items():
        refused[text.partition(":")[0]] += count
    # Each format both passes and fails often: the mutations reach the decoders.
    assert all(facts["accepted"][kind] > 80 and refused[kind] > 300 for kind in FORMATS)
    assert len(facts["refused"]) > 30
