"""The host's time for captions and labels: `python benchmarks/captions.py --before FOLDER`.

A CLIP B/32 text tower in fp16 with the bundled tokenizer and the native runner, over a driver that
does nothing (tests/standin): only the host's work is timed, in CPU time of a thread.
"vitrail" is this checkout, "before" the checkout in FOLDER, with its extension built in place; each
runs in a process of its own, in turn. "tokenizer" is the part of the tokenizers library alone.
Writes results/cpu/captions.json: `per_caption_us` is a caption's share of the median.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from environment import ROOT, last_change, refuse_dirty
from harness import OURS, Case, Results, Run, faults, measure
from suite import line, results_folder, write

CAPTIONS, LABELS, CALLS = 100_000, 1_000, 200
"""Captions of a call, labels of a call, and calls of a sample if a single call is too short."""
ROUNDS = 7
WORDS = ("photo", "of", "the", "red", "blue", "green", "yellow", "circle", "square", "star", "left")
CASES = {
    f"{CAPTIONS:,} captions": CAPTIONS,
    f"{CAPTIONS:,} captions as ids": CAPTIONS,
    f"{LABELS:,} new labels": LABELS,
    f"{LABELS:,} known labels": LABELS,
    "a caption a call": 1,
}
TOKENIZER = f"{CAPTIONS:,} captions"
"""The case that is timed beside the tokenizers library alone."""

# -- a checkout, in a process of its own -----------------------------------------------------------


def _captions(count: int) -> list[str]:
    """4 to 14 words, which are as many tokens."""
    dice = random.Random(0)
    return [" ".join(dice.choices(WORDS, k=dice.randint(4, 14))) for _ in range(count)]


def _model() -> Any:
    """The bundled model with a text tower as large as CLIP B/32's, of zeros."""
    import host
    import torch
    from torch import Tensor

    from vitrail.demo import demo
    from vitrail.model import loading, texts
    from vitrail.model.model import Model
    from vitrail.spec import VisionSpec
    from vitrail.weights.layout import Weights

    class Idle(host.IdleNative):
        """The stand-in computes nothing, so that outputs must be numbers from the start."""

        identity = "idle"

        def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            if dtype == torch.uint8:
                return super()._empty(shape, dtype)
            return torch.zeros(shape, dtype=dtype)

        def position_table(
            self, spec: VisionSpec, grid: tuple[int, int], pixel_format: str
        ) -> Tensor:
            return torch.zeros(1 + grid[0] * grid[1], spec.blocks.width)

    texts.CPU_TEXT_BYTES = texts.ACTIVATION_BYTES  # batches of a GPU
    loaded = loading.read_model(demo.bundled(), torch.float16)
    spec = loaded.spec
    blocks = dataclasses.replace(spec.text.blocks, width=512, layers=12, heads=8, mlp=2048)
    text = dataclasses.replace(spec.text, blocks=blocks, context=77, vocab=49408, projection=512)
    vision = dataclasses.replace(spec.vision, projection=512)
    spec = dataclasses.replace(spec, text=text, vision=vision)
    zeros = host.weights_of(spec, "cpu")
    weights = Weights(zeros.tensors, zeros.arena, logit_scale=100.0)
    driver = host.standin()
    runner = Idle(weights, torch.float16, torch.device("cpu"), str(driver.path))
    return Model(loaded.checkpoint, spec, loaded.hash_weights, runner)


def _runs() -> dict[str, Callable[[], Any]]:
    """The cases, and the tokenizer alone."""
    import torch

    from vitrail.model.texts import LabelCache

    torch.set_num_threads(1)
    model, captions = _model(), _captions(CAPTIONS)
    ids = model.tokenize(captions)
    pixels = torch.zeros(1, 3, *model.spec.vision.image)
    labels = [f"a {word} {number}" for number in range(LABELS // 10) for word in WORDS[:10]]
    backend = model._texts.tokenizer()._backend

    def classify(forget: bool) -> Any:
        if forget:
            model._labels = LabelCache(model._texts)
        return model.classify(pixels, labels)

    def tokenizer() -> None:
        for start in range(0, CAPTIONS, 4096):
            for encoding in backend.encode_batch_fast(captions[start : start + 4096]):
                encoding.ids  # noqa: B018  builds the list

    calls: list[Callable[[], Any]] = [
        lambda: model.encode_text(captions),
        lambda: model.encode_text(ids),
        lambda: classify(True),
        lambda: classify(False),
        lambda: [model.encode_text(caption) for caption in captions[:CALLS]],
    ]
    return dict(zip(CASES, calls, strict=True)) | {"tokenizer": tokenizer}


def serve() -> None:
    """Run the case that each line of the input names, and print its seconds of CPU time.

    All checkouts share a core, because other work may slow one core more than another.
    """
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    runs = _runs()
    for name in map(str.strip, sys.stdin):
        start = time.thread_time()
        runs[name]()
        print(time.thread_time() - start, flush=True)


class Checkout:
    """A process that serves the cases of the checkout in ``folder``."""

    def __init__(self, folder: Path) -> None:
        path = os.pathsep.join(str(folder / name) for name in ("engine", "kernels"))
        environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"OMP_NUM_THREADS": "1"},
        )

    def seconds(self, name: str) -> float:
        assert self._process.stdin is not None, "it is a pipe"
        assert self._process.stdout is not None, "it is a pipe"
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{name}: the process ended with {self._process.wait()}")
        return float(answer)

    def close(self) -> None:
        self._process.communicate()


# -- the suite -------------------------------------------------------------------------------------


def case(name: str, checkouts: dict[str, Checkout]) -> Results:
    """A case of all checkouts, in turn."""
    variants: dict[str, Run] = {
        label: functools.partial(checkout.seconds, name) for label, checkout in checkouts.items()
    }
    if name == TOKENIZER:
        variants["tokenizer"] = functools.partial(checkouts[OURS].seconds, "tokenizer")

    def check(label: str, seconds: float) -> None:
        assert seconds > 0, f"{label}: got {seconds} seconds"

    results = measure(
        Case(variants, check, frozenset({"tokenizer"})), lambda run: run(), ROUNDS, warmup=1
    )
    count = CALLS if CASES[name] == 1 else CASES[name]
    for variant in results["variants"].values():
        if "median_ms" in variant:
            variant["per_caption_us"] = round(variant["median_ms"] * 1e3 / count, 3)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write ``captions.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="a checkout to compare with")
    parser.add_argument("--allow-dirty", action="store_true", help="measure an uncommitted tree")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        serve()
        return 0
    if unknown := sorted(set(options.cases) - CASES.keys()):
        parser.error(f"no case {', '.join(unknown)}; wanted some of {', '.join(CASES)}")
    refuse_dirty(options.allow_dirty)
    checkouts = {OURS: Checkout(ROOT)}
    if options.before:
        checkouts["before"] = Checkout(options.before)
    results: Results = {}
    for name in options.cases or CASES:
        results[name] = case(name, checkouts)
        print(line(name, results[name]), flush=True)
        for label, variant in results[name]["variants"].items():
            print(f"    {label:10s} {variant.get('per_caption_us', variant)} us a caption")
    for checkout in checkouts.values():
        checkout.close()
    if broken := {name: faults(result) for name, result in results.items() if faults(result)}:
        print(f"nothing is written: {broken}", file=sys.stderr)
        return 1
    if options.before:
        results["before"] = last_change(options.before)
    write(results_folder("cpu") / "captions.json", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
