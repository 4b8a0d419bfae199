"""Vitrail's kernels at the shapes of real models against PyTorch's best, in the same run.

`python benchmarks/operators.py`, or with the beginning of some cases' names; writes kernels.json.
Peers do the same work: eager PyTorch, torch.compile of it, every backend of attention. "cublas" is
the matrix product with its bias alone, a bound and no peer. Two sets of inputs take turns.

(A module called ``kernels`` here would be taken for Hugging Face's package by transformers.)
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from ceilings import ceilings, timer_of
from harness import OURS, Case, Keep, Results, measure, rotate, tolerances
from problems import Problem, problems
from suite import arguments, results_folder, run_suite
from torch import Tensor

from vitrail_kernels import OPERATORS
from vitrail_kernels.device.stats import stats_ref

SAMPLE = 2048
"""Rows of a peer's result that are compared; ours is compared whole."""


def checks(problem: Problem) -> Callable[[str, Tensor], None]:
    """Ours whole, by the rule for kernels; a peer by rows, by the rule for models."""
    rules, own, wide = tolerances(), problem.tensors["out"].dtype, torch.float64

    @functools.cache
    def expected(strict: bool) -> tuple[Tensor, Tensor | None]:
        with rules.reference_numbers():
            reference = problem.reference(wide)
        with rules.reference_numbers() if strict else nullcontext():
            return reference, None if own == torch.float32 else problem.reference()

    def check(name: str, result: Tensor) -> None:
        reference, peer = expected(name == OURS)
        if name == OURS:
            rules.assert_close(result, reference, peer)
            if "stats" in problem.tensors:
                rows = torch.empty_like(problem.tensors["stats"], dtype=torch.float64)
                stats_ref(rows, result.double())
                rules.assert_close(problem.tensors["stats"], rows)
            return
        result = problem.rows(result) if problem.rows else result
        result = result.reshape(reference.shape)
        if name == "cublas":
            t = problem.tensors
            reference = F.linear(t["x"].to(wide), t["weight"].to(wide), t["bias"].to(wide))
        some = torch.linspace(0, len(reference) - 1, SAMPLE, device=result.device).long().unique()
        few = None if peer is None else peer[some]
        rules.assert_close(result[some], reference[some], few, what="model", name=name)

    return check


def case_of(build: Callable[[str], Problem], device: str) -> Case:
    """A problem with two sets of inputs as a case."""
    problems_by_seed = []
    for seed in range(2):
        torch.manual_seed(seed)
        problems_by_seed.append(build(device))
    problem = problems_by_seed[0]
    operator = OPERATORS[problem.op]
    ours = operator.launch if device == "cuda" else operator.reference
    variants = {OURS: rotate([functools.partial(p.run, ours) for p in problems_by_seed])}
    variants |= {name: rotate([p.peers[name] for p in problems_by_seed]) for name in problem.peers}
    cost = operator.cost(**problem.tensors, **problem.scalars, lengths=problem.lengths)
    counted = dict.fromkeys(variants, cost.flops), dict.fromkeys(variants, cost.bytes)
    late = [name for name in variants if name == "compile"]
    return Case(variants, checks(problem), frozenset({"cublas"}), late, *counted)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write ``kernels.json``."""
    cases = problems()
    options = arguments(__doc__, list(cases), argv)
    bounds, limits = ceilings(options.device)
    timer, rounds = timer_of(options.device), 40 if options.device == "cuda" else 3

    def run(name: str, keep: Keep) -> Results:
        return measure(case_of(cases[name], options.device), timer, rounds, 3, limits, keep)

    cases = {name: functools.partial(run, name) for name in options.cases}
    path = results_folder(options.device) / "kernels.json"
    return run_suite(path, cases, options.device, options.resume, options.seconds, ceilings=bounds)


if __name__ == "__main__":
    sys.exit(main())
