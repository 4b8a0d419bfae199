"""Guards against the caller's PyTorch modes and against a lost thread pool after a fork."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from vitrail.cuda import device_errors
from vitrail.errors import VitrailError

_first_process: list[int] = []


@contextmanager
def default_modes() -> Iterator[None]:
    """Turns gradients, inference mode and autocast off, for this thread only.

    So results have the same bits in every mode of the caller. PyTorch's GPU errors are raised as
    Vitrail's errors (`device_errors`).
    """
    with ExitStack() as stack:
        stack.enter_context(device_errors())
        if torch.is_inference_mode_enabled():  # leaving the mode costs 20 us, so only if needed
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def refuse_lost_threads() -> None:
    """Raise VitrailError in a process that was forked after Vitrail had computed.

    In such a process PyTorch's CPU operators would wait forever for threads of the parent process.
    """
    process = os.getpid()
    if not _first_process:
        _first_process.append(process)
    if process != _first_process[0] and torch.get_num_threads() > 1:
        raise VitrailError(
            "this process was forked from one that had used Vitrail, and PyTorch's CPU threads do "
            "not survive a fork: call torch.set_num_threads(1) in it first, or start it by 'spawn'"
        )
