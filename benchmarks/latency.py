"""The latency of an item, and of a process's first item: `python benchmarks/latency.py`.

Writes latency.json. fp16, wall clock until the GPU is done. Peers are PyTorch's: eager, and
compiled with reduce-overhead, which is a CUDA graph for this shape. "vitrail overlap" has
VITRAIL_OVERLAP=1; "graph" is Vitrail in a caller's own CUDA graph. "load" is a fresh process with
its kernels in Triton's cache, from after the imports to the first embedding, the GPU's start
included.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import transformers
from harness import OURS, Case, Keep, Results, Run, host_timer, measure, summary
from models import _called, _ids, _numbers, _ours, checkpoint, graphed
from shapes import TEXT, VISION, captions
from suite import arguments, results_folder, run_suite
from torch import Tensor

import vitrail
from vitrail.runtime.native import OVERLAP
from vitrail.spec import TextSpec, VisionSpec
from vitrail.text.tokens import TokenIds

GOALS = {"B/16": 0.45, "load": 1000.0}
"""Milliseconds; the bar for B/16 is 0.28."""
OVERLAPPED = f"{OURS} overlap"
LATE = ("reduce-overhead",)
"""Timed once ours and eager are."""
PROCESSES, SECONDS = 3, 60


@contextmanager
def overlapping(on: bool) -> Iterator[None]:
    """Runners that are made inside overlap their launches, or do not."""
    before = os.environ.pop(OVERLAP, None)
    os.environ[OVERLAP] = str(int(on))
    try:
        yield
    finally:
        del os.environ[OVERLAP]
        if before is not None:
            os.environ[OVERLAP] = before


def _variants(
    spec: VisionSpec | TextSpec, device: str, run: Callable[..., Tensor]
) -> dict[str, Run]:
    """``run`` of our model, in turn and overlapped; and the first in a graph."""
    variants: dict[str, Run] = {}
    for name, on in ((OURS, False), (OVERLAPPED, True)):
        with overlapping(on):
            variants[name] = functools.partial(run, _ours(spec, device))
    return variants


def _peers(theirs: torch.nn.Module, inputs: dict[str, Tensor], device: str) -> dict[str, Run]:
    peers = {"eager": _called(theirs, inputs)}
    if device == "cuda":
        compiled = torch.compile(theirs, mode="reduce-overhead", dynamic=False)
        peers["reduce-overhead"] = _called(compiled, inputs)
    return peers


def image_case(spec: VisionSpec, device: str) -> Case:
    """From an image's pixels on the device to its embedding."""
    torch.manual_seed(1)
    pixels = torch.randn(1, spec.channels, *spec.image, device=device)
    theirs, check = _numbers(spec, {"pixel_values": pixels}, device)

    def run(model: vitrail.Model) -> Tensor:
        assert model._vision is not None, "the checkpoint has an image tower"
        return model._vision.embeddings(pixels)["vision.embedding"]

    variants = _variants(spec, device, run)
    if device == "cuda":
        variants["graph"] = graphed(variants[OURS])
    given = pixels.half() if device == "cuda" else pixels
    variants |= _peers(theirs, {"pixel_values": given}, device)
    return Case(variants, check, frozenset({"graph"}), LATE if device == "cuda" else ())


def text_case(spec: TextSpec, device: str) -> Case:
    """From a caption's ids on the host to its embedding; the peers' ids are on the device."""
    ids = _ids(spec, captions(1))
    rows = torch.tensor(ids, device=device)
    theirs, check = _numbers(spec, {"input_ids": rows}, device)

    def run(model: vitrail.Model) -> Tensor:
        assert model._text is not None, "the checkpoint has a text tower"
        return model._text.embeddings(TokenIds.of(ids))["text.embedding"]

    variants = _variants(spec, device, run) | _peers(theirs, {"input_ids": rows}, device)
    return Case(variants, check, late=LATE if device == "cuda" else ())


FIRST = """
import json, sys, time
import torch, PIL.Image, vitrail.model
start = time.perf_counter()
if sys.argv[2] == "cuda":
    torch.zeros(1, device="cuda")
begun = time.perf_counter()
model = vitrail.load(sys.argv[1], device=sys.argv[2])
model.encode_image(PIL.Image.new("RGB", (640, 480)))
print(json.dumps([time.perf_counter() - start, begun - start, model.backend]))
"""


def load(spec: VisionSpec, device: str) -> Results:
    """Seconds to the first embedding, by processes of their own; the first fills the caches."""
    command = [sys.executable, "-c", FIRST, checkpoint(spec).name, device]
    totals, gpu_starts = [], []
    for number in range(1 + PROCESSES):
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        seconds, start, runner = json.loads(done.stdout.splitlines()[-1])
        if device == "cuda" and runner != "native":
            raise RuntimeError(f"got the {runner} runner, wanted the native one")
        if number:
            totals.append(seconds)
            gpu_starts.append(start)
    gpu_start = {"gpu_start_ms": summary(gpu_starts)["median_ms"]}
    return {"variants": {OURS: {**summary(totals), **gpu_start}}}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write ``latency.json``."""
    builds: dict[str, Callable[[str], Case]] = {
        "B/16": functools.partial(image_case, VISION["B/16"]),
        "B/32": functools.partial(image_case, VISION["B/32"]),
        "CLIP-B text": functools.partial(text_case, TEXT["CLIP-B text"]),
    }
    options = arguments(__doc__, ["B/16", "load", "B/32", "CLIP-B text"], argv)
    transformers.logging.disable_progress_bar()
    cuda = options.device == "cuda"

    def run(name: str, keep: Keep) -> Results:
        if name == "load":
            results = load(VISION["B/16"], options.device)
        else:
            timer = host_timer(torch.cuda.synchronize) if cuda else host_timer()
            case = builds[name](options.device)
            results = measure(case, timer, 200 if cuda else 3, 10, keep=keep)
        return results | ({"goal_ms": GOALS[name]} if name in GOALS else {})

    cases = {name: functools.partial(run, name) for name in options.cases}
    path = results_folder(options.device) / "latency.json"
    return run_suite(path, cases, options.device, options.resume, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
