"""Measures seconds and memory in ways that other work on the machine changes little."""

from __future__ import annotations

import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

HANG_SECONDS = 60.0


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block takes more CPU time of this thread, and interrupt it if it hangs.

    Allow several times what the block takes on an idle machine: on shared cores and caches even a
    thread's CPU time doubles.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    start = time.thread_time()
    try:
        yield
        elapsed = time.thread_time() - start
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert elapsed < seconds


def fastest(*calls: Callable[[], object], rounds: int = 5) -> list[float]:
    """The least CPU time of each of ``calls`` over ``rounds``, in seconds; the calls take turns.

    The ratio of two such times holds on slow and on busy machines: wall time counts interruptions,
    CPU time does not.
    """
    seconds = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = _cpu_seconds()
            call()
            seconds[i] = min(seconds[i], _cpu_seconds() - start)
    return seconds


def _cpu_seconds() -> float:
    """CPU time of this process and of the children that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def peak_kib() -> int:
    """The peak resident memory of this process in KiB.

    Not ``ru_maxrss``: that starts at the peak of the parent process.
    """
    match = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert match, "/proc/self/status has no VmHWM"
    return int(match[1])
