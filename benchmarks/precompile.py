"""Compile the kernels of the GPU calls, in parallel, into Triton's cache and Vitrail's.

`python benchmarks/precompile.py --arch 90 --sms 132` does so for a GPU that is not here: calls are
made of meta tensors, by the launchers' own code. ``--launchers``: Triton's own launchers too, each
a run of a C compiler. Exit code 1 if a kernel does not compile.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import quantized
import torch
from problems import problems
from shapes import MODEL_CASES, TEXT, VISION, captions
from smoke import CASES, SWEPT
from steps import sweep_calls

from gpu import precompile as gpu_tests
from gpu import record
from vitrail.plan.kernel_binary import encode_binary, kernel_key
from vitrail.plan.plan import Plan
from vitrail.plan.text import text_pooled
from vitrail.plan.vision import vision_pooled, vision_table
from vitrail.runtime.kernel_cache import keep
from vitrail_kernels import OPERATORS
from vitrail_kernels.compile import compile_kernel, identity
from vitrail_kernels.launch import Call, Target
from vitrail_kernels.processes import in_forks

TESTS = ("test_native", "test_small")
"""Modules of tests/gpu whose kernels are compiled too."""


def plan_calls(
    plan: Plan, lengths: Sequence[int], target: Target, **inputs: torch.Tensor
) -> Iterator[Call]:
    """Every kernel call of ``plan`` in fp16 for sequences of ``lengths`` tokens.

    ``inputs``: those that the plan counts in another shape than they come in, as pixels.
    """
    for launch, tensors, scalars in plan.bind(lengths, "float16", inputs):
        yield from OPERATORS[launch.op].calls(target, **tensors, **scalars)


def smoke_calls(target: Target) -> Iterator[Call]:
    """The kernels of `smoke.py`, and the candidates of those that it sweeps."""
    for name in CASES:
        problem = problems()[name]("meta")
        yield from OPERATORS[problem.op].calls(target, **problem.tensors, **problem.scalars)
    for name in SWEPT:
        for calls in sweep_calls(name, target):
            yield from calls


def kernel_calls(target: Target) -> Iterator[Call]:
    """The kernels suite."""
    for build in problems().values():
        problem = build("meta")
        yield from OPERATORS[problem.op].calls(target, **problem.tensors, **problem.scalars)


def model_calls(target: Target) -> Iterator[Call]:
    """The models and latency suites, and the models of `smoke.py`."""
    for model, batch in (*MODEL_CASES, ("B/32", 1), ("DINOv2-B@518", 1)):
        if model in TEXT:
            yield from plan_calls(text_pooled(TEXT[model]), captions(batch), target)
            continue
        spec = VISION[model]
        lengths = [spec.tokens_at(spec.image)] * batch
        for uint8 in (False, True):
            shape = (*spec.image, spec.channels) if uint8 else (spec.channels, *spec.image)
            dtype = torch.uint8 if uint8 else torch.float32
            pixels = torch.empty((batch, *shape), dtype=dtype, device="meta")
            plan = vision_pooled(spec, uint8=uint8)
            yield from plan_calls(plan, lengths, target, pixels=pixels)
            table = vision_table(spec, spec.grid, uint8=uint8)
            yield from plan_calls(table, [1], target)


def int8_calls(target: Target) -> Iterator[Call]:
    """The int8 towers of the quantized suite; its other groups compile when they are measured."""
    for model in quantized.MODELS:
        blocks = VISION[model].blocks
        blocks = dataclasses.replace(blocks, int8=blocks.int8_candidates)
        spec = dataclasses.replace(VISION[model], blocks=blocks)
        for batch in (*quantized.BATCHES, 1):
            lengths = [spec.tokens_at(spec.image)] * batch
            shape = (batch, *spec.image, spec.channels)
            pixels = torch.empty(shape, dtype=torch.uint8, device="meta")
            yield from plan_calls(vision_pooled(spec, uint8=True), lengths, target, pixels=pixels)


def test_calls(target: Target) -> Iterator[Call]:
    """The recorded launches, and `TESTS` in fp16; the bundled model is among theirs."""
    yield from record.needed(target)
    yield from gpu_tests.needed(TESTS, target, (torch.float16,))


SUITES: Mapping[str, Callable[[Target], Iterator[Call]]] = {
    "smoke": smoke_calls,
    "models": model_calls,
    "tests": test_calls,
    "kernels": kernel_calls,
    "int8": int8_calls,
}

# -- launchers -------------------------------------------------------------------------------------


def stub_driver(folder: Path) -> None:
    """An empty libcuda.so.1 in ``folder``, for the linker: launchers are not run here."""
    (folder / "empty.c").write_text("")
    library = folder / "libcuda.so.1"
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-shared", "-o", str(library), f"-Wl,-soname,{library.name}"]
    subprocess.run([*command, str(folder / "empty.c")], check=True)


@contextmanager
def launchers_for_elsewhere() -> Iterator[None]:
    """Inside it Triton compiles launchers without a driver: the linker sees an empty one, and what
    is compiled is kept but not loaded."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stub_driver(Path(folder))
        stack.enter_context(mock.patch.dict(os.environ, {"TRITON_LIBCUDA_PATH": folder}))
        load = "triton.runtime.build._load_module_from_path"
        stack.enter_context(mock.patch(load))
        yield


def compile_for_both(call: Call, arch: int) -> Any:
    """The kernel, for the Triton runner's cache and the native one's: Triton's own."""
    kernel = compile_kernel(call, arch)
    key = kernel_key(call, arch)
    keep(key, encode_binary(key, call, arch, kernel))
    return kernel


def compile_with_launcher(call: Call, arch: int) -> None:
    """`compile_for_both`, and Triton's launcher for the signature."""
    kernel = compile_for_both(call, arch)
    from triton.backends.nvidia import driver

    if hasattr(
        driver, "make_launcher"
    ):  # until 3.6; later versions have one launcher for all signatures
        driver.CudaLauncher(kernel.src, kernel.metadata)


def compile_suites(
    names: Sequence[str], target: Target, work: Callable[[Call, int], object]
) -> int:
    """``work`` of the calls of these suites, each once. Returns 1 if a call does not compile."""
    start, failed = time.monotonic(), 0
    each = (call for name in names for call in SUITES[name](target))
    calls = list({identity(call): call for call in each}.values())
    for failure in in_forks(lambda call: work(call, target.arch) and None, calls):
        if isinstance(failure, str):  # told, and the others are compiled
            failed += 1
            print(f"FAILED {failure.splitlines()[0][:300]}", flush=True)
    seconds = time.monotonic() - start
    print(f"{len(calls) - failed} of {len(calls)} kernels in {seconds:.0f} s", flush=True)
    return int(failed > 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile; print a line for each failure and a last line for all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all")
    parser.add_argument("--arch", type=int, default=90, help="as 90 for sm_90")
    parser.add_argument("--sms", type=int, default=132, help="multiprocessors")
    parser.add_argument("--launchers", action="store_true", help="Triton's launchers too")
    options = parser.parse_args(argv)
    if unknown := set(options.suites) - SUITES.keys():
        parser.error(f"got {', '.join(sorted(unknown))}, wanted some of {', '.join(SUITES)}")
    target = Target(options.arch, options.sms)
    names = options.suites or tuple(SUITES)
    if not options.launchers:
        return compile_suites(names, target, compile_for_both)
    with launchers_for_elsewhere():
        from triton.backends.nvidia.driver import CudaUtils

        CudaUtils()  # the binding of the driver: the first thing that Triton compiles in a process
        return compile_suites(names, target, compile_with_launcher)


if __name__ == "__main__":
    sys.exit(main())
