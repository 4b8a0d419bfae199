"""Compile the kernels of GPU tests, before them: `python -m gpu.precompile 90 132 MODULE...`

They go into Triton's cache for the Triton runner, and into Vitrail's for the native runner.

A process of its own, because it forks one for every core and CUDA does not survive a fork: the
architecture and its number of multiprocessors are given, nothing here asks the GPU. ``--float16``
in front of the modules leaves out bfloat16.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import torch

from gpu.cases import SHAPES, Work, calls_of, spec_of, vision_work, works
from gpu.common import HALVES
from gpu.models import BUNDLED, SMALL
from helpers import make, save
from vitrail.checkpoint.files import open_checkpoint
from vitrail.plan.kernel_binary import encode_binary, kernel_key
from vitrail.plan.text import text_dense, text_pooled
from vitrail.plan.vision import vision_dense, vision_pooled, vision_scores, vision_table
from vitrail.runtime.kernel_cache import keep
from vitrail.spec import ModelSpec
from vitrail.zoo import read_spec
from vitrail_kernels.compile import compile_kernel, identity
from vitrail_kernels.launch import Call, Target

SECONDS = 200
"""After so long no further kernel is begun."""

Size = tuple[int, int]
FP16 = (torch.float16,)
ALL = (1, 2, 3, 5, 8, 16, 31, 32, 33, 60, 64, 256)
SIDE = (224, 224)


class Served(NamedTuple):
    """A tower, by a checkpoint with its shapes, and the inputs that tests give it."""

    checkpoint: str
    tower: str
    dtypes: tuple[torch.dtype, ...]
    batches: Sequence[int]
    sizes: Sequence[Size] = (SIDE,)


VIT = Served("vit-base-patch16-224", "vision", HALVES, ALL)
CLIP = Served("clip-vit-base-patch32", "vision", FP16, (8, 64))
TEXT = Served("clip-vit-base-patch32", "text", HALVES, ALL)
DINO = Served(
    "dinov2-with-registers-base", "vision", HALVES, (1, 2, 3, 5, 8, 16), (SIDE, (518, 518))
)
OTHERS = (
    Served("clip-vit-large-patch14", "vision", FP16, (8, 32, 64)),
    Served("dinov2-base", "vision", FP16, (8, 16, 64), (SIDE, (518, 518))),
)
MODELS = {
    "test_agreement": (VIT, CLIP, TEXT, DINO, *OTHERS),
    "test_batches": (VIT, TEXT, DINO),
    "test_isolation": (VIT, TEXT),
    "test_concurrency": (VIT, TEXT),
    "test_compiling": (VIT, TEXT),
    "test_loading": (VIT,),
    "test_large": (VIT, TEXT),
    "test_native": (VIT, CLIP._replace(dtypes=HALVES, batches=(1, 8, 64)), TEXT, DINO),
}
SMALL_ONES = (
    *("test_small", "test_isolation", "test_batches"),
    *("test_native", "test_replicas", "test_resize"),
)
"""Modules that use the small models, or the bundled model."""


def served_work(served: Served) -> Iterator[Work]:
    """Pooled and dense plans, at every batch and size."""
    spec = dataclasses.replace(spec_of(served.checkpoint), head=None)
    for batch in served.batches:
        if served.tower == "text":
            assert spec.text is not None, "the checkpoint has a text tower"
            context = spec.text.context
            several = tuple(2 + (29 * i) % (context - 2) for i in range(batch))
            yield Work(text_pooled(spec.text), several, None)
            yield Work(text_dense(spec.text), (context,) * batch, None)
            continue
        assert spec.vision is not None, "the checkpoint has an image tower"
        for size in served.sizes:
            grid = spec.vision.grid_at(size)
            yield Work(vision_table(spec.vision, grid, uint8=False), (1,), None)
            for plan in (
                vision_pooled(spec.vision, uint8=False),
                vision_dense(spec.vision),
            ):
                yield vision_work(spec, plan, batch, size, uint8=False)


def small_work() -> Iterator[Work]:
    """All kernels of the models of two blocks and of the bundled model."""
    with tempfile.TemporaryDirectory() as folder:
        for architecture, config in SMALL.items():
            save(make(architecture, **config), Path(folder) / architecture)
        folders = [*Path(folder).iterdir(), BUNDLED]
        specs = [read_spec(open_checkpoint(path)) for path in folders]
    for spec in specs:
        for batch in (3, 64):
            yield from tower_work(spec, batch)


def tower_work(spec: ModelSpec, batch: int) -> Iterator[Work]:
    """Pooled and dense plans of both towers."""
    if (text := spec.text) is not None:
        yield Work(text_pooled(text), (min(9, text.context),) * batch, None)
        yield Work(text_dense(text), (text.context,) * batch, None)
    if (vision := spec.vision) is not None:
        yield vision_work(spec, vision_dense(vision, spec.head), batch, vision.image, False)
        for uint8 in (False, True):
            yield Work(vision_table(vision, vision.grid, uint8=uint8), (1,), None)
            plan = vision_pooled(vision, uint8=uint8)
            yield vision_work(spec, plan, batch, vision.image, uint8)
            if spec.head is not None:
                plan = vision_scores(vision, spec.head, uint8=uint8)
                yield vision_work(spec, plan, batch, vision.image, uint8)


def needed(
    modules: Iterable[str], target: Target, dtypes: Sequence[torch.dtype] = HALVES
) -> list[Call]:
    """The kernel calls of test modules in these dtypes, calls alike once; the longest to compile
    first."""
    calls: list[Call] = []
    for module in modules:
        if module == "test_kernels":
            for shapes in SHAPES.values():
                for work in works(shapes):
                    for dtype in dtypes:
                        calls += calls_of(work, dtype, target)
        if module in SMALL_ONES:
            for work in small_work():
                for dtype in dtypes:
                    calls += calls_of(work, dtype, target)
        for served in MODELS.get(module, ()):
            for work in served_work(served):
                for dtype in set(served.dtypes) & set(dtypes):
                    calls += calls_of(work, dtype, target)
    different = {identity(call): call for call in calls}.values()
    return sorted(different, key=lambda call: "linear" not in call.kernel.__name__)


_CALLS: list[Call] = []
"""The calls that the worker processes compile; filled before the fork: kernels do not pickle."""


def _compile(position: int, arch: int) -> str | None:
    call = _CALLS[position]
    try:
        key = kernel_key(call, arch)
        keep(key, encode_binary(key, call, arch, compile_kernel(call, arch)))
    except Exception as error:
        return f"{call.kernel.__name__} {call.config}: {type(error).__name__}: {error}"
    return None


def main(arch: int, sms: int, words: Sequence[str]) -> int:
    """Compile, and print failures. Returns 0 always: a test that needs a kernel fails itself."""
    start = time.monotonic()
    modules = [word for word in words if word != "--float16"]
    _CALLS[:] = needed(modules, Target(arch, sms), FP16 if "--float16" in words else HALVES)
    if not _CALLS:
        return 0
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        running = [pool.submit(_compile, i, arch) for i in range(len(_CALLS))]
        done, left = wait(running, SECONDS)
        pool.shutdown(wait=True, cancel_futures=True)
    for task in done:
        if (failure := task.result()) is not None:
            print(f"FAILED to compile {failure}", file=sys.stderr)
    print(f"{len(done)} of {len(running)} kernels in {time.monotonic() - start:.0f} s", flush=True)
    if left:
        print(f"{len(left)} are left to the tests", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
