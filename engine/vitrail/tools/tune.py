"""`vitrail tune`: times kernel configurations on the GPU at hand, for the shapes of a checkpoint.

Tuning tries the short lists of `vitrail_kernels.candidates`: tiles, warps, pipeline stages,
registers, blocks of a multiprocessor; then the order of tiles. Candidates that fail to compile,
spill or do not fit are dropped first. A candidate whose output differs from the heuristic's in any
bit is rejected. Of the rest, one must be at least 2 % faster than the heuristic to win. Nothing is
timed while serving.
"""

from __future__ import annotations

import os
import statistics
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail._version import __version__
from vitrail.errors import InputError, VitrailError
from vitrail.runtime import why_not_triton
from vitrail.tools.workload import Problem, fill
from vitrail_kernels.candidates import candidates
from vitrail_kernels.compile import SHARED_LIMIT, KernelCode, compile_each, identity, order_of_sums
from vitrail_kernels.configs import KernelConfig, read_table, write_table
from vitrail_kernels.launch import Call, Target, interpreted, launch, target_of

FASTER = 1.02
"""How many times as fast as the heuristic a configuration must be."""
ROUNDS = 15
ENOUGH = 1 << 16
"""Outputs compared bit by bit: another order of sums shows in one of hundreds or thousands."""
OTHER_BITS = "give other bits"

# -- what is tried ---------------------------------------------------------------------------------

Stage = Callable[[str, KernelConfig, int], Iterable[KernelConfig]]
"""Configurations to time beside a key's best so far: of an operator, that best, an architecture."""


def orders(op: str, base: KernelConfig, arch: int) -> list[KernelConfig]:
    """``base`` with its tiles visited in another order, which only `linear` can."""
    groups = (4, 8, 16, 32) if op == "linear" else ()
    return [replace(base, group_m=group) for group in groups if group != base.group_m]


# -- how it is judged ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What judges: a compiler, a GPU, and a clock that gives the seconds of a run on it."""

    target: Target
    device: torch.device
    compile: Callable[[Sequence[Call]], Sequence[KernelCode | str]]
    launch: Callable[[Sequence[Call]], None]
    seconds: Callable[[Callable[[], None]], float]


@dataclass
class Finding:
    """The result for one key: ``config`` is None if the heuristic, ``old``, stays.

    ``seconds``: what every timed configuration took, summed over ``problems``.
    """

    key: str
    problems: list[Problem]
    old: KernelConfig
    config: KernelConfig | None = None
    gain: float = 1.0
    timed: int = 0
    seconds: dict[KernelConfig, float] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    refused: list[KernelConfig] = field(default_factory=list)

    def __str__(self) -> str:
        tried = [f"{self.timed} timed", *(f"{n} {why}" for why, n in self.dropped.items())]
        won = (
            "heuristic stays" if self.config is None else f"{self.gain:.2f}x, {brief(self.config)}"
        )
        return f"{self.key}: {won} ({', '.join(tried)})"


def brief(config: KernelConfig) -> str:
    """A configuration in a few words."""
    sides = "x".join(str(n) for n in (config.block_m, config.block_n, config.block_k) if n)
    limit = "" if config.registers is None else f", {config.registers} registers"
    turns = f", staggered {config.stagger} ns" if config.stagger else ""
    return (
        f"{sides}, {config.warps} warps, {config.stages} stages{limit}, {config.ctas} an SM, "
        f"groups of {config.group_m}{turns}"
    )


def tune(
    problems: Sequence[Problem],
    bench: Bench,
    say: Callable[[str], None] = lambda _: None,
    keep: Callable[[Finding], None] = lambda _: None,
    stages: Sequence[Stage] = (candidates, orders),
) -> list[Finding]:
    """Tile and pipeline first; then the order of tiles, where the first result is timed again.

    ``say`` gets a line of progress. ``keep`` gets each finding as soon as it is judged, and again
    after the second round, so that a run that is cut short leaves a table. Raises InputError if a
    problem does not fit the GPU's memory, VitrailError if the heuristic's own kernel does not
    compile.
    """
    findings: dict[str, Finding] = {}
    for problem in sorted(problems, key=lambda one: -one.tensors["out"].numel()):
        for call in problem.calls(bench.target, {}):
            new = Finding(call.key, [], call.config)
            findings.setdefault(new.key, new).problems.append(problem)
    for stage in stages:
        fitting = _fitting(bench, findings, stage, say)
        for number, (key, one) in enumerate(findings.items(), 1):
            again = [] if one.config is None else [one.config]
            configs = again + [config for config in fitting[key] if config not in again]
            if configs:
                try:
                    _race(bench, one, configs)
                except torch.OutOfMemoryError as error:
                    raise InputError(f"batch: too large for the GPU's memory at {key}") from error
                say(f"{number} of {len(findings)}: {one}")
                keep(one)
    return list(findings.values())


def _fitting(
    bench: Bench,
    findings: Mapping[str, Finding],
    stage: Stage,
    say: Callable[[str], None],
) -> dict[str, list[KernelConfig]]:
    """Those that compile to a kernel of their own, within the registers and shared memory."""
    tried: list[tuple[str, KernelConfig | None, list[Call]]] = []
    for key, one in findings.items():
        configs = stage(one.problems[0].op, one.config or one.old, bench.target.arch)
        seen = set()
        for config in (None, *configs):
            table = {} if config is None else {key: config}
            calls = [call for p in one.problems for call in p.calls(bench.target, table)]
            code = tuple((identity(call), call.grid.blocks) for call in calls)
            if code not in seen:
                tried.append((key, config, calls))
            seen.add(code)
    say(f"compiling {len(tried)} configurations for {len(findings)} keys")
    compiled = iter(bench.compile([call for *_, calls in tried for call in calls]))
    fitting: dict[str, list[KernelConfig]] = {key: [] for key in findings}
    own: list[KernelCode] = []
    for key, config, calls in tried:
        codes = [next(compiled) for _ in calls]
        if config is None:
            own = [code for code in codes if isinstance(code, KernelCode)]
            for text in (code for code in codes if isinstance(code, str)):
                raise VitrailError(f"tune: {key}: the heuristic's kernel does not compile: {text}")
            continue
        why = next(filter(None, map(_unfit, calls, codes, own)), None)
        if why is None:
            fitting[key].append(config)
        else:
            findings[key].dropped[why] += 1
    return fitting


def _unfit(call: Call, code: KernelCode | str, own: KernelCode) -> str | None:
    """Why ``code`` does not run in the place of ``own``, the heuristic's."""
    if isinstance(code, str):
        return "do not compile"
    if code.spills or code.stack:
        return "spill"
    if code.shared > SHARED_LIMIT[code.arch]:
        return "take too much shared memory"
    if code.blocks < call.config.ctas:
        return "leave no room for as many blocks"
    family = code.tensor_core.keys() == own.tensor_core.keys()
    same = family and order_of_sums(code) == order_of_sums(own)
    return None if same else "add in another order"


def _race(bench: Bench, one: Finding, configs: Sequence[KernelConfig]) -> None:
    """Refuse configurations with other bits, time the rest beside the heuristic, keep the best."""
    out: dict[KernelConfig, str] = {}
    times: dict[KernelConfig | None, list[float]] = {None: [], **{c: [] for c in configs}}
    for problem in one.problems:
        for seed in range(-(-ENOUGH // problem.tensors["out"].numel())):
            tensors = fill(problem, bench.device, seed)
            runs = {
                config: problem.calls(bench.target, {one.key: config} if config else {}, tensors)
                for config in times
                if config not in out
            }
            out |= _wrong(bench, tensors, runs)
        samples: dict[KernelConfig | None, list[float]] = {c: [] for c in runs if c not in out}
        for _ in range(ROUNDS):  # in turn, so that a drifting clock hits all alike
            for config, seconds in samples.items():
                seconds.append(bench.seconds(partial(bench.launch, runs[config])))
        for config, seconds in samples.items():
            times[config].append(problem.times * statistics.median(seconds))
    one.dropped.update(out.values())
    one.refused += [config for config, why in out.items() if why == OTHER_BITS]
    raced = {c: seconds for c, seconds in times.items() if c is not None and c not in out}
    one.timed += len(raced)
    one.seconds |= {one.old: sum(times[None]), **{c: sum(each) for c, each in raced.items()}}
    one.config, one.gain = fastest(times[None], raced)


def _wrong(
    bench: Bench, tensors: Mapping[str, Tensor], runs: Mapping[KernelConfig | None, Sequence[Call]]
) -> dict[KernelConfig, str]:
    """Which of ``runs`` do not run, or differ in a bit from the first, the heuristic's."""
    start = {name: tensors[name].clone() for name in ("out", "stats") if name in tensors}
    wanted: dict[str, Tensor] = {}
    wrong: dict[KernelConfig, str] = {}
    for config, calls in runs.items():
        for name, values in start.items():
            tensors[name].copy_(values)
        try:
            bench.launch(calls)
        except Exception as error:  # resources that only a launch finds lacking
            if config is None:
                raise
            wrong[config] = f"do not run ({type(error).__name__})"
            continue
        if config is None:
            wanted = {name: tensors[name].clone() for name in start}
        elif not all(_same(tensors[name], values) for name, values in wanted.items()):
            wrong[config] = OTHER_BITS
    return wrong


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def fastest(
    old: Sequence[float], others: Mapping[KernelConfig, Sequence[float]]
) -> tuple[KernelConfig | None, float]:
    """The quickest over all problems and its gain, or (None, 1) where the heuristic stays.

    ``old`` and each of ``others``: seconds by problem. One that is slower by 2 % at some problem
    does not count: a key serves every batch.
    """
    fair = {
        config: sum(old) / sum(seconds)
        for config, seconds in others.items()
        if all(new <= FASTER * was for new, was in zip(seconds, old, strict=True))
    }
    best = max(fair, key=fair.__getitem__, default=None)
    return (None, 1.0) if best is None or fair[best] < FASTER else (best, fair[best])


# -- the GPU, and the file -------------------------------------------------------------------------


def cuda_bench() -> Bench:
    """The current CUDA device. Raises InputError where it cannot be tuned for."""
    wanted = "wanted an NVIDIA GPU that the kernels serve: sm_80 or later"
    if not torch.cuda.is_available():
        raise InputError(f"tune: got no CUDA device (PyTorch {torch.__version__}), {wanted}")
    if interpreted():
        raise InputError("tune: got TRITON_INTERPRET=1, wanted Triton's compiler")
    device = torch.device("cuda", torch.cuda.current_device())
    why = why_not_triton(torch.float16, device)
    if why is not None:
        raise InputError(f"tune: got {torch.cuda.get_device_name()}, {wanted}: {why}")
    target = target_of(torch.empty(0, device=device))
    if target.arch not in SHARED_LIMIT:
        raise InputError(f"tune: got sm_{target.arch}, wanted one of {sorted(SHARED_LIMIT)}")
    compile = partial(compile_each, arch=target.arch)
    return Bench(target, device, compile, launch, _timer(device))


def _timer(device: torch.device) -> Callable[[Callable[[], None]], float]:
    """Seconds of a run by CUDA events, with nothing of its inputs in the L2 cache.

    Overwriting that takes the GPU longer than the host needs to queue the run, whose launch
    therefore stays out of the time.
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
    """Where the numbers come from."""
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


def existing(file: Path) -> tuple[dict[str, Any], dict[str, KernelConfig]]:
    """Provenance and table of ``file``, empty where there is none.

    Raises InputError where it is damaged, or cannot be written: to be asked before tuning.
    """
    if file.suffix != ".json":
        raise InputError(f"out: got {str(file)!r}, wanted a .json file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK):
            raise PermissionError(f"{file.parent}: cannot be written to")
        return read_table(file) if file.exists() else ({}, {})
    except (OSError, ValueError) as error:
        raise InputError(f"out: {error}") from error


def save(file: Path, findings: Sequence[Finding], origin: Mapping[str, Any]) -> None:
    """Write the winners into the table ``file``, replacing its entries for these keys.

    A file of the same ``origin`` is the same run going on; another's is kept under "earlier".
    """
    earlier, table = existing(file)
    older = earlier.pop("earlier", [])
    table = {key: config for key, config in table.items() if key not in {f.key for f in findings}}
    for one in findings:
        if one.config is not None:
            reason = f"{one.gain:.2f} times as fast as {brief(one.old)}"
            table[one.key] = replace(one.config, reason=reason)
    before = [*older, earlier] if earlier and earlier != origin else older
    write_table(file, {**origin, "earlier": before} if before else origin, table)
