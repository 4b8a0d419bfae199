"""The GPU that tuning runs on: its compiler, its launcher and its clock."""

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from typing import Any

import torch

from vitrail._version import __version__
from vitrail.errors import InputError
from vitrail.runtime import why_not_triton
from vitrail_kernels.compile import SHARED_LIMIT, KernelCode, compile_each
from vitrail_kernels.launch import Call, Target, interpreted, launch, target_of


@dataclass(frozen=True)
class Bench:
    """Compiles and launches calls on a GPU; ``seconds`` times a function that launches there."""

    target: Target
    device: torch.device
    compile: Callable[[Sequence[Call]], Sequence[KernelCode | str]]
    launch: Callable[[Sequence[Call]], None]
    seconds: Callable[[Callable[[], None]], float]


def cuda_bench() -> Bench:
    """The current CUDA device. Raises InputError if Vitrail cannot tune for it."""
    supported = "wanted an NVIDIA GPU that the kernels support: sm_80 or later"
    if not torch.cuda.is_available():
        raise InputError(f"tune: got no CUDA device (PyTorch {torch.__version__}), {supported}")
    if interpreted():
        raise InputError("tune: got TRITON_INTERPRET=1, wanted Triton's compiler")
    device = torch.device("cuda", torch.cuda.current_device())
    reason = why_not_triton(torch.float16, device)
    if reason is not None:
        raise InputError(f"tune: got {torch.cuda.get_device_name()}, {supported}: {reason}")
    target = target_of(torch.empty(0, device=device))
    if target.arch not in SHARED_LIMIT:
        raise InputError(f"tune: got sm_{target.arch}, wanted one of {sorted(SHARED_LIMIT)}")
    compile = partial(compile_each, arch=target.arch)
    return Bench(target, device, compile, launch, _timer(device))


def _timer(device: torch.device) -> Callable[[Callable[[], None]], float]:
    """Times a function in seconds with CUDA events; its inputs are not in the L2 cache.

    The GPU overwrites the cache for longer than the host needs to queue the function's launches, so
    the time excludes their overhead.
    """
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.empty(max(2 * l2, 256 << 20), dtype=torch.uint8, device=device)
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def seconds(run: Callable[[], None]) -> float:
        torch.cuda.synchronize(device)
        for _ in range(4):
            buffer.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return seconds


def provenance(device: torch.device, command: str) -> dict[str, Any]:
    """The GPU, the versions, the date and the command behind a table, for its header."""
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        driver = f"unknown: {error}"
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver,
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "vitrail": __version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
    }
