"""Jobs on several devices against one, on a CPU: `python benchmarks/devices.py`.

A job writes a folder of embeddings of JPEG photos. "vitrail" is a worker process for each core, as
`vitrail embed --devices cpu,cpu` starts them; "one worker" is `--devices cpu`, and "one process"
`--device cpu`. Workers load the model before the clock starts. Each has one thread, of PyTorch and
for decoding; so has the single process. Writes results/cpu/devices.json: `ratio` is the rate of all
workers over the better of the two.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
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
from vitrail.demo import demo
from vitrail.image.preprocess import core_count, limit_cores
from vitrail.jobs.embedder import Embedder, ModelEmbedder
from vitrail.jobs.folder import embed_to_folder
from vitrail.jobs.rows import EmbedOptions
from vitrail.jobs.workers import DeviceWorkers

ROUNDS = 9
SIDES = (640, 427)


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


def photos(folder: Path, count: int) -> list[str]:
    """Paths of ``count`` JPEG files: the sample photos, enlarged, again and again."""
    folder.mkdir(exist_ok=True)
    files = []
    for path in sorted((ROOT / "engine/vitrail/assets/photos").iterdir()):
        files.append(str(folder / f"{path.stem}.jpg"))
        Image.open(path).convert("RGB").resize(SIDES).save(files[-1], quality=90)
    return [files[number % len(files)] for number in range(count)]


CASES: dict[str, tuple[Callable[[Path], Path], int, int]] = {
    "the bundled CLIP": (lambda folder: demo.bundled(), 1024, 16),
    "CLIP B/32": (clip_b32, 256, 4),
}
"""The checkpoint, the number of photos, and the batch size."""


def digest(out: Path) -> str:
    hashes = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.is_file():
            hashes.update(path.name.encode() + path.read_bytes())
    return hashes.hexdigest()


def case(name: str, folder: Path) -> Results:
    """All embedders in turn; their folders must be equal."""
    make, count, batch_size = CASES[name]
    sources = photos(folder / "photos", count)
    model = make(folder / "model")
    options = EmbedOptions(part_size=count // 4, batch_size=batch_size)
    outs: Iterator[Path] = (folder / f"out-{number}" for number in range(10**6))

    def job(embedder: Embedder) -> Path:
        out = next(outs)
        embed_to_folder(embedder, sources, out, options)
        return out

    with ExitStack() as stack:
        every = stack.enter_context(DeviceWorkers(model, ["cpu"] * core_count()))
        one = stack.enter_context(DeviceWorkers(model, ["cpu"]))
        limit_cores(1)
        alone = ModelEmbedder(vitrail.load(model, device="cpu"))
        expected = digest(job(alone))

        def check(label: str, out: Path) -> None:
            assert digest(out) == expected, f"{label}: the folder differs"

        variants = {
            OURS: lambda: job(every),
            "one worker": lambda: job(one),
            "one process": lambda: job(alone),
        }
        items = dict.fromkeys(variants, count)
        return measure(Case(variants, check, items=items), rounds=ROUNDS, warmup=1)


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
