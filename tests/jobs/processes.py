"""Forks of the test's process and other programs, with a guard of 60 seconds."""

from __future__ import annotations

import multiprocessing
import subprocess
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


def outputs_of(*processes: subprocess.Popen[str], timeout: float = GUARD) -> list[tuple[str, str]]:
    """What each has written to stdout and stderr, once all have ended. Kills them if one hangs."""
    try:
        return [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
