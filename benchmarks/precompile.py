"""Compile what the suites will launch, in parallel, into Triton's cache, and say what it takes.

`python benchmarks/precompile.py`, with ``--arch 90 --sms 132`` for a GPU that is not here. Calls
are made of meta tensors, by the launchers' own code. Exit code 1 where one does not compile.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from problems import problems
from shapes import MODEL_CASES, TEXT, VISION, captions

from vitrail import plans
from vitrail.plan import Plan
from vitrail_kernels import OPERATORS
from vitrail_kernels.compile import Compiled, compile_each, identity
from vitrail_kernels.launch import Call, Target

PROPERTIES = """
import torch
card = torch.cuda.get_device_properties()
print(10 * card.major + card.minor, card.multi_processor_count)
"""


def _target(arch: int | None, sms: int) -> Target:
    if arch is None:  # asked in another process: this one forks, which CUDA does not survive
        said = subprocess.run([sys.executable, "-c", PROPERTIES], capture_output=True, check=True)
        arch, sms = map(int, said.stdout.split())
    return Target(arch, sms)


def plan_calls(
    plan: Plan, lengths: Sequence[int], target: Target, **inputs: torch.Tensor
) -> Iterator[Call]:
    """Every kernel call of ``plan`` in fp16 for sequences of ``lengths`` tokens.

    ``inputs``: those that the plan counts in another shape than they come in, as pixels.
    """
    for launch, tensors, scalars in plan.bind(lengths, "float16", inputs):
        yield from OPERATORS[launch.op].calls(target, **tensors, **scalars)


def every_call(target: Target) -> Iterator[Call]:
    """The kernels suite's calls, then those of the models and latency suites."""
    for build in problems().values():
        problem = build("meta")
        yield from OPERATORS[problem.op].calls(target, **problem.tensors, **problem.scalars)
    for model, batch in (*MODEL_CASES, ("B/32", 1)):
        if model in TEXT:
            yield from plan_calls(plans.text_pooled(TEXT[model]), captions(batch), target)
            continue
        spec = VISION[model]
        lengths = [spec.tokens_at(spec.image)] * batch
        for uint8 in (False, True):
            shape = (*spec.image, spec.channels) if uint8 else (spec.channels, *spec.image)
            dtype = torch.uint8 if uint8 else torch.float32
            pixels = torch.empty((batch, *shape), dtype=dtype, device="meta")
            plan = plans.vision_pooled(spec, uint8=uint8)
            yield from plan_calls(plan, lengths, target, pixels=pixels)


def _line(call: Call, found: Compiled) -> str:
    size = f"{call.config.block_m}x{call.config.block_n}x{call.config.block_k}"
    return (
        f"{found.name:28s} {size:12s} {found.registers:4d} registers {found.spills:4d} spills "
        f"{found.shared:7d} bytes shared"
    )


def main(given: Sequence[str] | None = None) -> int:
    """Compile, a line a kernel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, help="as 90 for sm_90; asked of the GPU by default")
    parser.add_argument("--sms", type=int, default=132, help="multiprocessors, with --arch")
    options = parser.parse_args(given)
    target = _target(options.arch, options.sms)
    calls = list({identity(call): call for call in every_call(target)}.values())
    start, failed = time.monotonic(), 0
    for call, found in zip(calls, compile_each(calls, target.arch), strict=True):
        if isinstance(found, str):  # said, and the others are compiled
            failed += 1
            print(f"FAILED {found}", file=sys.stderr)
        else:
            print(_line(call, found))
    seconds = time.monotonic() - start
    print(f"{len(calls) - failed} of {len(calls)} kernels in {seconds:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
