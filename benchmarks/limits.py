"""Child processes that cannot cost more than their time: SIGINT at the limit, then SIGKILL.

An interrupted Python process still prints its results, as pytest prints its failures. A process
that waits for a kernel that never ends takes SIGKILL, and counts as hung.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

GRACE = 5.0
"""Seconds between SIGINT and SIGKILL."""


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code (negative: a signal), whether its time was up (``late``),
    and whether it took SIGKILL (``hung``)."""

    code: int
    late: bool = False
    hung: bool = False


def run_limited(
    command: Sequence[str],
    seconds: float,
    take: Callable[[str], None],
    grace: float = GRACE,
    env: Mapping[str, str] | None = None,
) -> Ended:
    """Run ``command`` for at most ``seconds``; ``take`` gets each line as soon as it is written.

    stdout and stderr come together. No process of the child's group outlives this call.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a child would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=env,
        process_group=0,
    )
    reader = threading.Thread(target=_read, args=(child, take), daemon=True)
    reader.start()
    late = hung = False
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        late = True
        hung = not _stopped(child, grace)
    finally:
        _stopped(child, grace)
        _signal(child, signal.SIGKILL)  # its own children, which may hold the pipe
        reader.join(grace)
    return Ended(child.returncode if child.returncode is not None else -9, late, hung)


def _read(child: subprocess.Popen[str], take: Callable[[str], None]) -> None:
    assert child.stdout is not None, "the child's output is a pipe"
    for line in child.stdout:
        take(line.rstrip("\n"))


def _stopped(child: subprocess.Popen[str], grace: float) -> bool:
    """End ``child`` if it runs; whether SIGINT was enough."""
    if child.poll() is not None:
        return True
    _signal(child, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        child.wait(grace)
        return True
    _signal(child, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # the driver may take its time over a lost context
        child.wait(grace)
    return False


def _signal(child: subprocess.Popen[str], number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)
