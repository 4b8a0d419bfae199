"""Calls that give the same plain numbers whatever PyTorch mode the caller is in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from vitrail.cuda import device_errors
from vitrail.errors import VitrailError

_first_process: list[int] = []


@contextmanager
def plain() -> Iterator[None]:
    """No gradients, no inference tensors, no autocast. Thread-local: nobody else is touched.

    What PyTorch raises for a GPU comes out as `device_errors` has it.
    """
    with ExitStack() as stack:
        stack.enter_context(device_errors())
        if torch.is_inference_mode_enabled():  # leaving it costs 20 us a forward: not for nothing
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def refuse_lost_threads() -> None:
    """Raise VitrailError in a process forked from one in which Vitrail has computed already.

    PyTorch's CPU operators would wait there for ever, for threads that are not theirs.
    """
    here = os.getpid()
    if not _first_process:
        _first_process.append(here)
    if here != _first_process[0] and torch.get_num_threads() > 1:
        raise VitrailError(
            "this process was forked from one that had used Vitrail, and PyTorch's CPU threads do "
            "not survive a fork: call torch.set_num_threads(1) in it first, or start it by 'spawn'"
        )
