"""``vitrail tune``: times kernel configurations on this GPU for the shapes of a checkpoint.

Tuning tries the short lists of `vitrail_kernels.candidates`: tiles, warps, pipeline stages,
registers, blocks per multiprocessor; then the order of tiles. Candidates that fail to compile,
spill or do not fit are dropped first. A candidate whose output differs from the heuristic's in any
bit is rejected. The fastest of the rest wins if it is at least 2 % faster than the heuristic.
Inference never times kernels.
"""

import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.errors import InputError, VitrailError
from vitrail.tools.bench import Bench
from vitrail.tools.workload import Problem, fill
from vitrail_kernels.candidates import INT8, candidates
from vitrail_kernels.compile import SHARED_LIMIT, KernelCode, identity, order_of_sums
from vitrail_kernels.configs import KernelConfig, read_table, write_table
from vitrail_kernels.launch import Call

MIN_GAIN = 1.02
"""A configuration must be this many times as fast as the heuristic."""
ROUNDS = 15
MIN_OUTPUTS = 1 << 16
"""The least number of outputs that are compared bit by bit: another order of sums changes one
output in hundreds or thousands."""
OTHER_BITS = "give other bits"

# -- stages ----------------------------------------------------------------------------------------

Stage = Callable[[str, KernelConfig, int], Iterable[KernelConfig]]
"""(operator, best configuration so far, architecture) -> configurations to time beside the best."""


def orders(op: str, base: KernelConfig, arch: int) -> list[KernelConfig]:
    """``base`` with its tiles visited in another order; only linears have several orders."""
    groups = (4, 8, 16, 32) if op == "linear" or op in INT8 else ()
    return [replace(base, group_m=group) for group in groups if group != base.group_m]


# -- timing and results ----------------------------------------------------------------------------


@dataclass
class TuningResult:
    """The result for one key: ``config`` is None if the heuristic's configuration stays.

    ``gain`` is how many times as fast ``config`` is. ``seconds`` holds the time of each timed
    configuration, summed over ``problems``. ``dropped`` counts configurations by reason;
    ``rejected`` lists those that gave other bits.
    """

    key: str
    problems: list[Problem]
    heuristic: KernelConfig
    config: KernelConfig | None = None
    gain: float = 1.0
    timed: int = 0
    seconds: dict[KernelConfig, float] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    rejected: list[KernelConfig] = field(default_factory=list)

    def __str__(self) -> str:
        counts = [f"{self.timed} timed", *(f"{n} {why}" for why, n in self.dropped.items())]
        winner = (
            "heuristic stays" if self.config is None else f"{self.gain:.2f}x, {brief(self.config)}"
        )
        return f"{self.key}: {winner} ({', '.join(counts)})"


def brief(config: KernelConfig) -> str:
    """A configuration in a few words."""
    sides = "x".join(str(n) for n in (config.block_m, config.block_n, config.block_k) if n)
    limit = "" if config.registers is None else f", {config.registers} registers"
    stagger = f", staggered {config.stagger} ns" if config.stagger else ""
    return (
        f"{sides}, {config.warps} warps, {config.stages} stages{limit}, {config.ctas} per SM, "
        f"groups of {config.group_m}{stagger}"
    )


def tune(
    problems: Sequence[Problem],
    bench: Bench,
    say: Callable[[str], None] = lambda _: None,
    keep: Callable[[TuningResult], None] = lambda _: None,
    stages: Sequence[Stage] = (candidates, orders),
) -> list[TuningResult]:
    """Tunes tiles and pipelines in a first stage, then the order of tiles in a second stage.

    The second stage times the winner of the first stage again. ``say`` gets a line of progress.
    ``keep`` gets each result as soon as it is known, and again after the second stage, so that an
    interrupted run leaves a table. Raises InputError if a problem does not fit the GPU's memory,
    VitrailError if the heuristic's own kernel does not compile.
    """
    results: dict[str, TuningResult] = {}
    for problem in sorted(problems, key=lambda problem: -problem.tensors["out"].numel()):
        for call in problem.calls(bench.target, {}):
            result = TuningResult(call.key, [], call.config)
            results.setdefault(call.key, result).problems.append(problem)
    for stage in stages:
        fitting = _fitting(bench, results, stage, say)
        for number, (key, result) in enumerate(results.items(), 1):
            winner = [] if result.config is None else [result.config]
            configs = winner + [config for config in fitting[key] if config not in winner]
            if configs:
                try:
                    _race(bench, result, configs)
                except torch.OutOfMemoryError as error:
                    raise InputError(f"batch: too large for the GPU's memory at {key}") from error
                say(f"{number} of {len(results)}: {result}")
                keep(result)
    return list(results.values())


def _fitting(
    bench: Bench, results: Mapping[str, TuningResult], stage: Stage, say: Callable[[str], None]
) -> dict[str, list[KernelConfig]]:
    """For each key, the stage's configurations that give a new kernel which passes `_unfit`."""
    attempts: list[tuple[str, KernelConfig | None, list[Call]]] = []
    for key, result in results.items():
        base = result.config or result.heuristic
        configs = stage(result.problems[0].op, base, bench.target.arch)
        kernels = set()
        for config in (None, *configs):
            table = {} if config is None else {key: config}
            calls = [call for p in result.problems for call in p.calls(bench.target, table)]
            kernel = tuple((identity(call), call.grid.blocks) for call in calls)
            if kernel not in kernels:
                attempts.append((key, config, calls))
            kernels.add(kernel)
    say(f"compiling {len(attempts)} configurations for {len(results)} keys")
    compiled = iter(bench.compile([call for *_, calls in attempts for call in calls]))
    fitting: dict[str, list[KernelConfig]] = {key: [] for key in results}
    heuristic: list[KernelCode] = []
    for key, config, calls in attempts:
        codes = [next(compiled) for _ in calls]
        if config is None:
            heuristic = [code for code in codes if isinstance(code, KernelCode)]
            for text in (code for code in codes if isinstance(code, str)):
                raise VitrailError(f"tune: {key}: the heuristic's kernel does not compile: {text}")
            continue
        reason = next(filter(None, map(_unfit, calls, codes, heuristic)), None)
        if reason is None:
            fitting[key].append(config)
        else:
            results[key].dropped[reason] += 1
    return fitting


def _unfit(call: Call, code: KernelCode | str, heuristic: KernelCode) -> str | None:
    """Why ``code`` cannot replace the heuristic's kernel; None if it can."""
    if isinstance(code, str):
        return "do not compile"
    if code.spills or code.stack:
        return "spill"
    if code.shared > SHARED_LIMIT[code.arch]:
        return "take too much shared memory"
    if code.blocks < call.config.ctas:
        return "leave no room for as many blocks"
    same_products = code.tensor_core.keys() == heuristic.tensor_core.keys()
    same_sums = same_products and order_of_sums(code) == order_of_sums(heuristic)
    return None if same_sums else "add in another order"


def _race(bench: Bench, result: TuningResult, configs: Sequence[KernelConfig]) -> None:
    """Rejects configurations with other bits, times the rest and the heuristic, sets the winner."""
    dropped: dict[KernelConfig, str] = {}
    times: dict[KernelConfig | None, list[float]] = {None: [], **{c: [] for c in configs}}
    for problem in result.problems:
        for seed in range(-(-MIN_OUTPUTS // problem.tensors["out"].numel())):
            tensors = fill(problem, bench.device, seed)
            runs = {
                config: problem.calls(bench.target, {result.key: config} if config else {}, tensors)
                for config in times
                if config not in dropped
            }
            dropped |= _faults(bench, tensors, runs)
        samples: dict[KernelConfig | None, list[float]] = {c: [] for c in runs if c not in dropped}
        for _ in range(ROUNDS):  # in turn, so that a drifting clock affects all alike
            for config, seconds in samples.items():
                seconds.append(bench.seconds(partial(bench.launch, runs[config])))
        for config, seconds in samples.items():
            times[config].append(problem.times * statistics.median(seconds))
    result.dropped.update(dropped.values())
    result.rejected += [config for config, why in dropped.items() if why == OTHER_BITS]
    raced = {c: seconds for c, seconds in times.items() if c is not None and c not in dropped}
    result.timed += len(raced)
    result.seconds |= {result.heuristic: sum(times[None])}
    result.seconds |= {config: sum(seconds) for config, seconds in raced.items()}
    result.config, result.gain = fastest(times[None], raced)


def _faults(
    bench: Bench, tensors: Mapping[str, Tensor], runs: Mapping[KernelConfig | None, Sequence[Call]]
) -> dict[KernelConfig, str]:
    """The configurations of ``runs`` that fail, or differ in a bit from the heuristic's (None)."""
    written = ("out", "out_scale", "stats")
    start = {name: tensors[name].clone() for name in written if name in tensors}
    expected: dict[str, Tensor] = {}
    faults: dict[KernelConfig, str] = {}
    for config, calls in runs.items():
        for name, values in start.items():
            tensors[name].copy_(values)
        try:
            bench.launch(calls)
        except Exception as error:  # for example, a resource that only the launch finds missing
            if config is None:
                raise
            faults[config] = f"do not run ({type(error).__name__})"
            continue
        if config is None:
            expected = {name: tensors[name].clone() for name in start}
        elif not all(_equal_bits(tensors[name], values) for name, values in expected.items()):
            faults[config] = OTHER_BITS
    return faults


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def fastest(
    heuristic: Sequence[float], others: Mapping[KernelConfig, Sequence[float]]
) -> tuple[KernelConfig | None, float]:
    """The fastest configuration over all problems and its gain; (None, 1) if the heuristic stays.

    ``heuristic`` and each of ``others`` hold seconds by problem. A configuration that is 2 % slower
    at any problem is out, because its key serves every batch size.
    """
    gains = {
        config: sum(heuristic) / sum(seconds)
        for config, seconds in others.items()
        if all(time <= MIN_GAIN * base for time, base in zip(seconds, heuristic, strict=True))
    }
    best = max(gains, key=gains.__getitem__, default=None)
    return (None, 1.0) if best is None or gains[best] < MIN_GAIN else (best, gains[best])


# -- the table -------------------------------------------------------------------------------------


def open_table(file: Path) -> tuple[dict[str, Any], dict[str, KernelConfig]]:
    """Provenance and configurations of ``file``; both are empty if there is no such file.

    Raises InputError if the file is damaged or cannot be written. Call it before tuning.
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


def save(file: Path, results: Sequence[TuningResult], origin: Mapping[str, Any]) -> None:
    """Writes the winners into the table ``file``, in place of its entries for their keys.

    A file with the same ``origin`` belongs to this run. The origin of another run goes to the list
    "earlier".
    """
    former, table = open_table(file)
    earlier = former.pop("earlier", [])
    for result in results:
        table.pop(result.key, None)
        if result.config is not None:
            reason = f"{result.gain:.2f} times as fast as {brief(result.heuristic)}"
            table[result.key] = replace(result.config, reason=reason)
    if former and former != origin:
        earlier = [*earlier, former]
    write_table(file, {**origin, "earlier": earlier} if earlier else origin, table)
