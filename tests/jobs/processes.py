"""Forks of the test's process, each with a guard of 60 seconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

GUARD = 60  # seconds


@contextmanager
def forks(*jobs: Callable[[], object]) -> Iterator[list[BaseProcess]]:
    """Runs each job in a fork; at the end kills those that still run."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=job) for job in jobs]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join(GUARD)


def finish(process: BaseProcess) -> int:
    """The exit code, negative for a signal. Fails if the process hangs."""
    process.join(GUARD)
    assert process.exitcode is not None, f"a process hung for {GUARD} seconds"
    return process.exitcode


def run_at_once(*jobs: Callable[[], object]) -> None:
    """Runs the jobs in forks at the same time. Fails unless all end with exit code 0."""
    with forks(*jobs) as processes:
        assert [finish(process) for process in processes] == [0] * len(jobs)
