"""First contact with a GPU, the safest step first: `python benchmarks/smoke.py`.

Every step runs in a process with a time limit and prints one line as soon as it ends; numbers that
are wrong are timed too, and marked WRONG. A step that hangs costs its limit and not the steps after
it; after two hangs the rest is left out. ``--device cpu`` rehearses the same code on small cases;
``--compile`` puts every kernel that the steps launch into Triton's cache, for an H100 that is not
here.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from operators import _check
from problems import Problem, problems
from shapes import VISION

import vitrail
from vitrail_kernels import OPERATORS
from vitrail_kernels.compile import compile_kernel, identity
from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.launch import Call, Target, launch, target_of
from vitrail_kernels.processes import in_forks

STEPS = {"cuda": 60, "bundled native": 90, "bundled triton": 90}
"""Seconds of the steps that come first."""
CASES = (
    "B/16 x 1 qkv", "B/16 x 1 attention", "B/16 x 1 down", "B/16 x 1 patch_embed uint8",
    "B/16 x 64 qkv", "B/16 x 64 attention", "B/16 x 64 out", "B/16 x 64 up", "B/16 x 64 down",
    "B/16 x 64 patch_embed uint8", "B/16 x 64 patch_embed float", "B/16 x 64 attention_one",
    "L/14 x 64 qkv", "L/14 x 64 attention", "L/14 x 64 up", "L/14 x 64 down",
    "L/14 x 64 patch_embed uint8", "L/14 x 64 layernorm", "H/14 x 64 attention",
    "DINOv2-B@518 x 32 attention", "DINOv2-B@518 x 32 down", "CLIP-B text x 256 attention",
)  # fmt: skip
MODELS = (
    "B/16 x 256", "L/14 x 256", "B/16 x 1", "DINOv2-B@518 x 32", "DINOv2-B@518 x 1",
    "B/32 x 256",
)  # fmt: skip
SWEPT = (
    "B/16 x 64 qkv", "B/16 x 64 out", "B/16 x 64 up", "B/16 x 64 down", "B/16 x 64 attention",
    "L/14 x 64 attention", "L/14 x 64 up", "L/14 x 64 down", "B/16 x 1 qkv", "B/16 x 1 out",
    "B/16 x 1 up", "B/16 x 1 down", "DINOv2-B@518 x 32 attention",
)  # fmt: skip
LARGE = (
    (128, 128, 64, 8, 2, 128, 2), (128, 128, 64, 8, 3, 128, 2), (128, 128, 64, 8, 4, None, 1),
    (128, 256, 64, 8, 3, None, 1), (128, 256, 64, 8, 4, None, 1), (256, 128, 64, 8, 3, None, 1),
    (256, 128, 64, 8, 4, None, 1), (128, 256, 32, 8, 6, None, 1),
)  # fmt: skip
SMALL = (
    (64, 64, 64, 4, 6, None, 2), (64, 64, 64, 4, 6, None, 3), (64, 128, 64, 4, 4, None, 2),
    (64, 64, 128, 4, 4, None, 2), (64, 64, 128, 4, 3, None, 3), (64, 64, 64, 4, 8, None, 2),
)  # fmt: skip
ATTENTION = (
    (128, 64, 0, 8, 2, 128, 1), (128, 64, 0, 8, 3, 128, 1), (128, 64, 0, 8, 4, 128, 1),
    (64, 64, 0, 4, 2, 128, 1), (64, 64, 0, 4, 3, 128, 1), (64, 64, 0, 4, 3, 168, 1),
    (128, 64, 0, 8, 3, None, 1),
)  # fmt: skip
"""What is timed beside the heuristic: block_m, block_n, block_k, warps, stages, registers, ctas."""
TOGETHER = 8
"""Steps that share a process as long as none hangs."""


def seconds_of(run: Callable[[], object], repeats: int) -> float:
    """The median of 5 groups of ``repeats`` runs back to back, a run, by CUDA events."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    for _ in range(3):
        run()
    samples = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3 / repeats)
    return statistics.median(samples)


def cuda(device: str) -> str:
    """Versions, the card, and the rates of a large matrix product and of a large copy."""
    if device == "cpu":
        return torch.__version__
    import triton

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    product = 2 * 8192**3 / seconds_of(lambda: a @ a, 20) / 1e12
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds_of(lambda: target.copy_(source), 5) / 1e9
    query = "--query-gpu=name,driver_version,clocks.sm,power.limit,memory.free"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    card = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    return f"matmul {product:.0f} TFLOP/s, copy {copied:.0f} GB/s; {versions}, {card}"


def bundled(runner: str, device: str) -> str:
    """The bundled model by ``runner``, against fp32 on the CPU, and an image alone by its bits."""
    folder = Path(vitrail.__file__).parent / "assets/clip"
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (33, 56, 56, 3), generator=generator).to(torch.uint8)
    images = list(pixels.numpy())
    texts = ["a red star", "two", "a circle on the left of a square"]
    exact = vitrail.load(folder, device="cpu", dtype="float32", runner="reference")
    dtype, runner = ("float32", "reference") if device == "cpu" else ("float16", runner)
    model = vitrail.load(folder, device=device, dtype=dtype, runner=runner)
    embeddings = model.encode_image(images)
    worst = min(
        float(torch.cosine_similarity(wanted, got.cpu()).min())
        for wanted, got in (
            (exact.encode_image(images), embeddings),
            (exact.encode_text(texts), model.encode_text(texts)),
        )
    )
    alone = torch.cat([model.encode_image([image]) for image in images[:5]])
    differ = int((alone != embeddings[:5]).sum())
    verdict = "right" if worst > 0.9995 and (differ == 0 or device == "cpu") else "WRONG"
    return f"{verdict}: worst cosine {worst:.7f}, {differ} numbers differ alone, {model.runner}"


def kernel(name: str, device: str) -> str:
    """One operator: right or not, its time and rate, and PyTorch's times for the same work."""
    torch.manual_seed(0)
    problem = problems()[name](device)
    operator = OPERATORS[problem.op]
    function = operator.launch if device == "cuda" else operator.reference

    def run() -> torch.Tensor:
        return problem.run(function)

    out, verdict = run(), "right"
    if device == "cuda":
        torch.cuda.synchronize()
    try:
        _check(problem)("vitrail", out)
    except AssertionError as error:
        verdict = f"WRONG {str(error).splitlines()[0][:160]}"
    seconds = seconds_of(run, 20)
    cost = operator.cost(**problem.tensors, **problem.scalars, lengths=problem.lengths)
    text = f"{seconds * 1e6:8.1f} us {cost.flops / seconds / 1e12:6.0f} TFLOP/s"
    text += f" {cost.bytes / seconds / 1e9:6.0f} GB/s {verdict}"
    for peer in ("cublas", "torch", "flash", "cudnn"):
        if peer in problem.peers:
            try:
                with torch.inference_mode():
                    problem.peers[peer]()
                    text += f"; {peer} {seconds_of(problem.peers[peer], 10) * 1e6:.0f}"
            except Exception as error:  # a backend that does not serve this shape
                text += f"; {peer} {type(error).__name__}"
    return text


def configs_of(name: str) -> Iterator[KernelConfig]:
    """The configurations that a sweep of this case times beside the heuristic's."""
    rows = ATTENTION if name.endswith(" attention") else SMALL if " x 1 " in name else LARGE
    for m, n, k, warps, stages, registers, ctas in rows:
        yield KernelConfig(m, n, k, warps, stages, registers, ctas)


def calls_of(name: str, problem: Problem, target: Target) -> Iterator[Sequence[Call]]:
    """The heuristic's calls, then those of every configuration of `configs_of`."""
    operator = OPERATORS[problem.op]
    arguments = {**problem.tensors, **problem.scalars}
    yield operator.calls(target, **arguments)
    for config in configs_of(name):
        yield operator.calls(target, **arguments, config=config)


def launch_once(name: str, device: str) -> str:
    """One launch, for a profiler around this process."""
    torch.manual_seed(0)
    problem = problems()[name](device)
    operator = OPERATORS[problem.op]
    problem.run(operator.launch if device == "cuda" else operator.reference)
    if device == "cuda":
        torch.cuda.synchronize()
    return "launched"


def sweep(name: str, device: str) -> str:
    """Every configuration's time, and whether it gives the heuristic's bits."""
    if device == "cpu":
        return "nothing on a CPU"
    problem = problems()[name](device)
    out, wanted = problem.tensors["out"], None
    times: list[tuple[float, str]] = []
    for calls in calls_of(name, problem, target_of(out)):
        config = calls[0].config
        label = f"{config.block_m}x{config.block_n}x{config.block_k} w{config.warps}"
        label += f" s{config.stages} c{config.ctas} r{config.registers}"
        try:
            launch(calls)
            torch.cuda.synchronize()
            if wanted is None:
                wanted = out.clone()
            elif not torch.equal(out.view(torch.int16), wanted.view(torch.int16)):
                label += " OTHER BITS"
            times.append((seconds_of(lambda calls=calls: launch(calls), 20), label))
        except Exception as error:
            times.append((float("inf"), f"{label} {type(error).__name__}"))
    first = times[0][0]
    rest = "; ".join(f"{seconds * 1e6:.1f} {label}" for seconds, label in sorted(times[1:]))
    return f"heuristic {first * 1e6:.1f} us {times[0][1]}; {rest}"


def towers(name: str, device: str) -> tuple[Callable[[], torch.Tensor], Any, torch.Tensor, int]:
    """Of "B/16 x 1": ours as a function, PyTorch's model, its pixels, and how many images."""
    from models import _ours, _theirs

    short, _, images = name.rpartition(" x ")
    spec, batch = VISION[short], int(images)
    tower = _ours(spec, device)._vision
    raw = torch.randint(256, (batch, *spec.image, spec.channels), device=device).to(torch.uint8)
    dtype = torch.float16 if device == "cuda" else torch.float32
    pixels = ((raw.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5).to(dtype).contiguous()

    def run(images: torch.Tensor = raw) -> torch.Tensor:
        return tower.embed(images)["vision.embedding"]

    alone = run(raw[:1])
    assert bool(torch.isfinite(run()).all()), "not finite"
    if device == "cuda" and not torch.equal(alone, run()[:1]):
        print(f"  {name}: WRONG: an image alone has other bits", flush=True)
    return run, _theirs(spec, device, dtype, "sdpa"), pixels, batch


def model(name: str, device: str) -> str:
    """Images a second of a whole model, from uint8 pixels on the device, and PyTorch's eager."""
    from models import _called, graphed

    run, peer, pixels, batch = towers(name, device)
    seconds = seconds_of(run, 10)
    graph = seconds_of(graphed(run), 10) if device == "cuda" else seconds
    text = f"{batch / seconds:9.0f} images/s ({seconds * 1e3:.3f} ms; as a graph "
    text += f"{graph * 1e3:.3f} ms)"
    print(f"  {name}: {text}", flush=True)
    eager = _called(peer, {"pixel_values": pixels})
    cosine = float(torch.cosine_similarity(eager().float(), run().float()).min())
    return f"{text}; eager {seconds_of(eager, 5) * 1e3:.3f} ms; cosine {cosine:.6f}"


def compiled(name: str, device: str) -> str:
    """A whole model against torch.compile's two modes, in turn."""
    from models import _called

    run, peer, pixels, batch = towers(name, device)
    text = ""
    for mode in ("default", "max-autotune"):
        torch.compiler.reset()
        theirs = _called(torch.compile(peer, mode=mode, dynamic=False), {"pixel_values": pixels})
        start = time.perf_counter()
        for _ in range(3):
            theirs()
        took = time.perf_counter() - start
        pairs = [(seconds_of(run, 5), seconds_of(theirs, 5)) for _ in range(3)]
        ours, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        text += f"; {mode} {batch / other:.0f} images/s, ours {batch / ours:.0f}, {ratio:.3f}x"
        print(f"  {name}{text} (compiled in {took:.0f} s)", flush=True)
    return text.removeprefix("; ")


def compile_all() -> int:
    """Compile what the steps launch, by every core; 1 if a kernel does not compile."""
    target, calls = Target(90, 132), {}
    for name in dict.fromkeys((*SWEPT, *CASES)):
        problem = problems()[name]("meta")
        operator = OPERATORS[problem.op]
        each = operator.calls(target, **problem.tensors, **problem.scalars)
        for some in calls_of(name, problem, target) if name in SWEPT else [each]:
            calls |= {identity(call): call for call in some}
    failed = 0
    for failure in in_forks(lambda call: compile_kernel(call, 90) and None, list(calls.values())):
        if isinstance(failure, str):
            failed += 1
            print(failure.splitlines()[0][:200], file=sys.stderr)
    print(f"{len(calls)} kernels in Triton's cache, {failed} do not compile")
    return int(failed > 0)


def step(name: str, device: str) -> None:
    """One step in this process: its line, or FAILED and the traceback."""
    start = time.perf_counter()
    verb, _, rest = name.partition(" ")
    actions: dict[str, Callable[[], str]] = {
        "cuda": lambda: cuda(device),
        "bundled": lambda: bundled(rest, device),
        "kernel": lambda: kernel(rest, device),
        "launch": lambda: launch_once(rest, device),
        "sweep": lambda: sweep(rest, device),
        "model": lambda: model(rest, device),
        "compiled": lambda: compiled(rest, device),
    }
    try:
        text = actions[verb]()
    except Exception as error:
        text = f"FAILED {type(error).__name__}: {str(error)[:300]}".splitlines()[0]
        traceback.print_exc()
    print(f"@ {name:34s} {text}  [{time.perf_counter() - start:.1f} s]", flush=True)


def groups_of(device: str) -> list[tuple[list[str], float]]:
    """Steps that share a process, and the seconds it may take."""
    if device == "cpu":
        names = ["cuda", "bundled reference", "kernel B/16 x 1 qkv", "model B/32 x 1"]
        return [([name], 240) for name in names]
    groups: list[tuple[list[str], float]] = [([name], limit) for name, limit in STEPS.items()]
    kernels, sweeps = ([f"kernel {c}" for c in CASES], [f"sweep {c}" for c in SWEPT])
    groups += [(kernels[i : i + TOGETHER], 75) for i in range(0, len(kernels), TOGETHER)]
    groups += [([f"model {name}" for name in MODELS[:3]], 90)]
    groups += [(sweeps[i : i + TOGETHER], 75) for i in range(0, len(sweeps), TOGETHER)]
    return [*groups, ([f"model {name}" for name in MODELS[3:]], 90)]


def run_groups(groups: list[tuple[list[str], float]], device: str, seconds: float) -> int:
    """Every group in a process of its own; 1 if a step hangs, fails or is wrong, or is left out."""
    begun, hangs, bad = time.monotonic(), 0, 0
    while groups:
        names, limit = groups.pop(0)
        left = seconds - (time.monotonic() - begun)
        if left < 10 or hangs == 2:
            print(f"@ left out: {names} and {len(groups)} groups more", flush=True)
            return 1
        command = [sys.executable, __file__, "--device", device, "--step", *names]
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            text, _ = child.communicate(timeout=min(limit, left))
        except subprocess.TimeoutExpired:
            child.kill()
            text, _ = child.communicate()
        print(text, end="", flush=True)
        rest = [name for name in names if f"@ {name:34s}" not in text]
        bad += text.count("WRONG") + text.count("FAILED")
        if rest and child.returncode != 0:
            hangs += 1
            print(f"@ {rest[0]:34s} HANGS or died ({child.returncode})", flush=True)
            groups[:0] = [([name], 40) for name in rest[1:]]
        elif "CUDA error" in text and len(names) > 1:  # the context is lost: run the others again
            failed = next(n for n in names if f"@ {n:34s} FAILED" in text)
            groups[:0] = [([name], 40) for name in names[names.index(failed) + 1 :]]
    return int(bool(bad or hangs))


def main() -> int:
    """All steps, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--step", nargs="+", help="these steps, in this process")
    parser.add_argument("--group", nargs="+", help="these steps, in a process of their own")
    parser.add_argument("--seconds", type=float, default=240, help="for all steps")
    parser.add_argument("--compile", action="store_true", help="compile for sm_90, and stop")
    options = parser.parse_args()
    if options.compile:
        return compile_all()
    if options.step:
        for name in options.step:
            step(name, options.device)
        return 0
    groups = [(options.group, options.seconds)] if options.group else groups_of(options.device)
    return run_groups(groups, options.device, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
