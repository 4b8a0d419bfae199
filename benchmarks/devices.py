"""Jobs on several devices against one, on a CPU: `python benchmarks/devices.py`.

A job writes a folder of embeddings of JPEG photos. "vitrail" is a worker process for each core, as
`vitrail embed --devices cpu,cpu` starts them; "one worker" is `--devices cpu`, and "one process"
`--device cpu`. Workers load the model before the clock starts. Each has one PyTorch thread, and one
thread that decodes the next batch meanwhile; so has the single process. Writes
results/cpu/devices.json: `ratio` is the rate of all workers over the better of the two, and `cores`
how many cores the processes of a variant kept busy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, refuse_dirty
from harness import OURS, Case, Results, faults, measure, tolerances
from PIL import Image
from suite import line, results_folder, write

import vitrail
from vitrail.image.preprocess import core_count, limit_cores
from vitrail.jobs.embedder import Embedder, ModelEmbedder
from vitrail.jobs.folder import embed_to_folder
from vitrail.jobs.rows import EmbedOptions
from vitrail.jobs.workers import DeviceWorkers

ROUNDS = 5


def clip_b32(folder: Path) -> Path:
    """A CLIP B/32 image tower of random weights, which cost the same as trained weights."""
    helpers = tolerances()
    shapes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    shapes |= {"intermediate_size": 3072, "image_size": 224, "patch_size": 32}
    model = helpers.make("CLIPVisionModelWithProjection", **shapes, projection_dim=512)
    helpers.save(model, folder)
    processor = helpers.CLIPImageProcessorPil(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}
    )
    processor.save_pretrained(folder)
    return folder


def photos(folder: Path, count: int, size: tuple[int, int]) -> list[str]:
    """Paths of ``count`` JPEG files: the sample photos in ``size``, again and again."""
    folder.mkdir(exist_ok=True)
    files = []
    for path in sorted((ROOT / "engine/vitrail/assets/photos").iterdir()):
        files.append(str(folder / f"{path.stem}.jpg"))
        Image.open(path).convert("RGB").resize(size).save(files[-1], quality=90)
    return [files[number % len(files)] for number in range(count)]


CASES: dict[str, tuple[Callable[[Path], Path], tuple[int, int], int, int]] = {
    "CLIP B/32, 640 x 427": (clip_b32, (640, 427), 48, 2),
}
"""The checkpoint, the size and the number of the photos, and the batch size."""


def processor_seconds(embedder: Embedder) -> float:
    """CPU time of this process, and of the workers of ``embedder``."""
    seconds = time.process_time()
    for process in getattr(embedder, "_processes", ()):
        fields = Path(f"/proc/{process._process.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def digest(out: Path) -> str:
    hashes = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.is_file():
            hashes.update(path.name.encode() + path.read_bytes())
    return hashes.hexdigest()


def case(name: str, folder: Path) -> Results:
    """All embedders in turn; their folders must be equal."""
    make, size, count, batch_size = CASES[name]
    sources = photos(folder / "photos", count, size)
    model = make(folder / "model")
    options = EmbedOptions(part_size=count // 2, batch_size=batch_size)
    outs: Iterator[Path] = (folder / f"out-{number}" for number in range(10**6))
    cores: dict[str, list[float]] = {}

    def job(label: str, embedder: Embedder) -> Path:
        out, start, busy = next(outs), time.perf_counter(), processor_seconds(embedder)
        embed_to_folder(embedder, sources, out, options)
        busy = processor_seconds(embedder) - busy
        cores.setdefault(label, []).append(busy / (time.perf_counter() - start))
        return out

    with ExitStack() as stack:
        every = stack.enter_context(DeviceWorkers(model, ["cpu"] * core_count()))
        limit_cores(1)  # of decoding, in a worker alone and in this process, as for each of several
        one = stack.enter_context(DeviceWorkers(model, ["cpu"]))
        alone = ModelEmbedder(vitrail.load(model, device="cpu"))
        expected = digest(job("", alone))

        def check(label: str, out: Path) -> None:
            assert digest(out) == expected, f"{label}: the folder differs"

        variants = {
            OURS: lambda: job(OURS, every),
            "one worker": lambda: job("one worker", one),
            "one process": lambda: job("one process", alone),
        }
        items = dict.fromkeys(variants, count)
        results = measure(Case(variants, check, items=items), rounds=ROUNDS, warmup=1)
    for label, variant in results["variants"].items():
        variant["cores"] = round(statistics.median(cores[label]), 2)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write ``devices.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--allow-dirty", action="store_true", help="measure an uncommitted tree")
    options = parser.parse_args(argv)
    refuse_dirty(options.allow_dirty)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = case(name, Path(folder))
        print(line(name, results[name]), flush=True)
        print(f"    {json.dumps(results[name].get('ratios'))}", flush=True)
    if broken := {name: faults(result) for name, result in results.items() if faults(result)}:
        print(f"nothing is written: {broken}", file=sys.stderr)
        return 1
    write(results_folder("cpu") / "devices.json", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
