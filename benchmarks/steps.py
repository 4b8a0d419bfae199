"""The steps of a first contact with a GPU: each gives a line of text (`smoke.py` runs them).

"cuda" and "bundled RUNNER" come first; then "kernel CASE", "model CASE", "sweep CASE" and, for a
profiler around the process, "launch CASE". A CASE is a name of `problems.py`, or a model and batch.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from operators import checks
from problems import problems
from shapes import VISION

import vitrail
from vitrail.tools import tune, workload
from vitrail.tools.bench import cuda_bench, provenance
from vitrail_kernels import OPERATORS
from vitrail_kernels.candidates import candidates
from vitrail_kernels.launch import Call, Target

COSINE = 0.9995
"""A whole model against fp32 or PyTorch's fp16: less is WRONG."""


def seconds_of(run: Callable[[], object], repeats: int) -> float:
    """Seconds of a run: the median of 5 groups of ``repeats`` back to back, by CUDA events."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    for _ in range(3):
        run()
    samples = []
    for _ in range(5):
        start_event, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        samples.append(start_event.elapsed_time(end) / 1e3 / repeats)
    return statistics.median(samples)


def synchronize(device: str) -> None:
    """Wait for the device. Raises the error of the work that lost the context."""
    if device == "cuda":
        torch.cuda.synchronize()


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
    card = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    return f"matmul {product:.0f} TFLOP/s, copy {copied:.0f} GB/s; {versions}, {card}"


def bundled(runner: str, device: str) -> str:
    """The bundled model by ``runner``, against fp32 on the CPU, and an image alone by its bits."""
    folder = Path(vitrail.__file__).parent / "assets/clip"
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (33, 56, 56, 3), generator=generator).to(torch.uint8)
    images = list(pixels.numpy())
    texts = ["a red star", "two", "a circle on the left of a square"]
    exact = vitrail.load(folder, device="cpu", dtype="float32", backend="torch")
    dtype, runner = ("float32", "torch") if device == "cpu" else ("float16", runner)
    model = vitrail.load(folder, device=device, dtype=dtype, backend=runner)
    embeddings = model.encode_image(images)
    worst = min(
        float(torch.cosine_similarity(reference, result.cpu()).min())
        for reference, result in (
            (exact.encode_image(images), embeddings),
            (exact.encode_text(texts), model.encode_text(texts)),
        )
    )
    alone = torch.cat([model.encode_image([image]) for image in images[:5]])
    differ = int((alone != embeddings[:5]).sum())
    verdict = "right" if worst > COSINE and (differ == 0 or device == "cpu") else "WRONG"
    return f"{verdict}: worst cosine {worst:.7f}, {differ} numbers differ alone, {model.backend}"


def kernel(name: str, device: str) -> str:
    """An operator: its time and rate, right or WRONG, and PyTorch's times for the same work."""
    torch.manual_seed(0)
    problem = problems()[name](device)
    operator = OPERATORS[problem.op]
    function = operator.launch if device == "cuda" else operator.reference

    def run() -> torch.Tensor:
        return problem.run(function)

    out, verdict = run(), "right"
    synchronize(device)
    try:
        checks(problem)("vitrail", out)
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


def launch_once(name: str, device: str) -> str:
    """A launch, for a profiler around this process."""
    torch.manual_seed(0)
    problem = problems()[name](device)
    operator = OPERATORS[problem.op]
    problem.run(operator.launch if device == "cuda" else operator.reference)
    synchronize(device)
    return "launched"


def tuning_problem(name: str) -> workload.Problem:
    """A case as `vitrail tune` takes it, on meta tensors."""
    problem = problems()[name]("meta")
    return workload.Problem(problem.op, problem.tensors, problem.scalars, tuple(problem.lengths))


def sweep_calls(name: str, target: Target) -> Iterator[Sequence[Call]]:
    """The heuristic's calls, then those of every candidate: `sweep` launches no others."""
    problem = tuning_problem(name)
    operator, arguments = OPERATORS[problem.op], {**problem.tensors, **problem.scalars}
    own = operator.calls(target, **arguments)
    yield own
    for config in candidates(problem.op, own[0].config, target.arch):
        yield operator.calls(target, **arguments, config=config)


def sweep(name: str, device: str, folder: Path) -> str:
    """`vitrail tune` of a case; the winner goes into the table of ``folder`` at once."""
    if device == "cpu":
        return "nothing to time on a CPU"
    bench = cuda_bench()
    (result,) = tune.tune([tuning_problem(name)], bench, stages=(candidates,))
    origin = provenance(bench.device, "benchmarks/gpu.sh first")
    origin["date"] = datetime.now(UTC).strftime(
        "%Y-%m-%d"
    )  # a run has a single date, however many steps
    tune.save(folder / f"sm_{bench.target.arch}.json", [result], origin)
    times = sorted((seconds, tune.brief(config)) for config, seconds in result.seconds.items())
    rest = "; ".join(f"{seconds * 1e6:.1f} {config}" for seconds, config in times)
    own = result.seconds.get(result.heuristic, 0.0) * 1e6
    refused = "".join(f"; OTHER BITS: {tune.brief(config)}" for config in result.rejected)
    return f"heuristic {own:.1f} us, {tune.brief(result.heuristic)}; {result}; us: {rest}{refused}"


@dataclass(frozen=True)
class Towers:
    """A model and a batch: ``embed`` takes ours uint8 pixels ``raw``, PyTorch's ``peer`` takes
    ``pixels``, which are the same preprocessed."""

    embed: Callable[[torch.Tensor], torch.Tensor]
    raw: torch.Tensor
    peer: Any
    pixels: torch.Tensor


def towers(name: str, device: str) -> Towers:
    """Both sides of "B/16 x 1"."""
    from models import _ours, _theirs

    short, _, images = name.rpartition(" x ")
    spec, batch = VISION[short], int(images)
    tower = _ours(spec, device)._vision
    assert tower is not None, "the checkpoint has an image tower"
    raw = torch.randint(256, (batch, *spec.image, spec.channels), device=device).to(torch.uint8)
    dtype = torch.float16 if device == "cuda" else torch.float32
    pixels = ((raw.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5).to(dtype).contiguous()

    def embed(images: torch.Tensor) -> torch.Tensor:
        return tower.embeddings(images)["vision.embedding"]

    return Towers(embed, raw, _theirs(spec, device, dtype, "sdpa"), pixels)


def model(name: str, device: str) -> str:
    """Images a second of a whole model, from uint8 pixels on the device, and PyTorch's eager."""
    from models import _called, graphed

    both = towers(name, device)
    run = functools.partial(both.embed, both.raw)
    faults = [] if bool(torch.isfinite(run()).all()) else ["not finite"]
    seconds = seconds_of(run, 10)
    text = f"{len(both.raw) / seconds:9.0f} images/s ({seconds * 1e3:.3f} ms"
    print(f"  {name}: {text})", flush=True)
    if device == "cuda":
        text += f"; as a graph {seconds_of(graphed(run), 10) * 1e3:.3f} ms"
        if not torch.equal(both.embed(both.raw[:1]), run()[:1]):
            faults.append("an image alone has other bits")
    eager = _called(both.peer, {"pixel_values": both.pixels})
    cosine = float(torch.cosine_similarity(eager().float(), run().float()).min())
    if cosine < COSINE:
        faults.append("far from eager")
    wrong = f" WRONG: {', '.join(faults)}" if faults else ""
    return f"{text}); eager {seconds_of(eager, 5) * 1e3:.3f} ms; cosine {cosine:.6f}{wrong}"


def run_step(name: str, device: str, folder: Path) -> str:
    """The line of the step ``name``; tuned tables go into ``folder``. Raises the step's error."""
    verb, _, rest = name.partition(" ")
    if verb == "cuda":
        return cuda(device)
    if verb == "sweep":
        return sweep(rest, device, folder)
    actions = {"bundled": bundled, "kernel": kernel, "launch": launch_once, "model": model}
    return actions[verb](rest, device)
