"""What a piece of work costs: seconds and memory, in ways that other work nearby does not move."""

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
    """Fails where the block takes more of this thread's time, and breaks into it where it hangs.

    Ask for several times what the work takes alone: even a thread's own time doubles on a machine
    whose cores and caches are shared.
    """

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    start = time.thread_time()
    try:
        yield
        took = time.thread_time() - start
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert took < seconds


def fastest(*calls: Callable[[], object], rounds: int = 5) -> list[float]:
    """Seconds of CPU time of the fastest of several calls, for each of ``calls``, made in turn.

    What two of them take compares on any machine, however slow, and however busy: on the clock of
    a wall a long call is interrupted by other work, and the fastest of many short ones is not.
    """
    seconds = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = _cpu_seconds()
            call()
            seconds[i] = min(seconds[i], _cpu_seconds() - start)
    return seconds


def _cpu_seconds() -> float:
    """Of this process and of the children that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def peak_kib() -> int:
    """Most memory this process has had resident at once. Not ``ru_maxrss``: that begins at what
    the process that started this one had."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found, "/proc/self/status has no VmHWM"
    return int(found[1])
