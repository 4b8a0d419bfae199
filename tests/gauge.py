"""What a piece of work costs: seconds and memory, in ways that other work nearby does not move."""

from __future__ import annotations

import re
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
    """Seconds of the fastest of several calls, for each of ``calls``, made in turn.

    What two of them take compares on any machine, however slow.
    """
    seconds = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            seconds[i] = min(seconds[i], time.perf_counter() - start)
    return seconds


def peak_kib() -> int:
    """Most memory this process has had resident at once. Not ``ru_maxrss``: that begins at what
    the process that started this one had."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found, "/proc/self/status has no VmHWM"
    return int(found[1])
