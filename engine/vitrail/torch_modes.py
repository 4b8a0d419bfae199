"""Public calls: guards against the caller's PyTorch modes and against what a fork loses."""

import functools
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch

from vitrail import fork
from vitrail.cuda import device_errors, refuse_lost_cuda

_P = ParamSpec("_P")
_R = TypeVar("_R")


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


def public_call(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A decorator of what users call: `default_modes`, and in a forked process `fork.run`.

    If the first argument is on a GPU, as a model may be, the call raises DeviceError in a process
    that was forked from one that had started CUDA, and otherwise stays in the calling thread, with
    its streams. The helper thread of `fork.run` has the caller's number of CPU threads.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not fork.forked or _may_stay(args):
            with default_modes():
                return function(*args, **kwargs)
        enter, read = _caller_state(), [_read(value) for value in args]
        read_by_name = {name: _read(value) for name, value in kwargs.items()}

        def work() -> _R:
            with enter(), default_modes():
                return function(*read, **read_by_name)

        return fork.run(work)

    return call


def _may_stay(arguments: tuple[object, ...]) -> bool:
    """Whether a forked process computes in the calling thread."""
    _renew_thread_pool()
    subject = arguments[0] if arguments else None
    devices = getattr(subject, "devices", (getattr(subject, "device", None),))
    on_gpu = any(isinstance(device, torch.device) and device.type == "cuda" for device in devices)
    if on_gpu:
        refuse_lost_cuda()
    return on_gpu or fork.survivor != threading.get_ident()


def _renew_thread_pool() -> None:
    """PyTorch renews a thread pool of its own (caffe2's) when a fork first uses it. Threads that
    meet there fail with "Invalid thread pool!", so the first call of a process goes alone."""
    global _renewed_by
    if _renewed_by != os.getpid():
        with _RENEWING:
            torch.set_num_threads(torch.get_num_threads())
            _renewed_by = os.getpid()


_renewed_by = 0
_RENEWING = fork.lock()


def _read(argument: Any) -> Any:
    """A list of what an iterator gives: it may belong to this thread, as a database cursor does."""
    is_iterator = isinstance(argument, Iterator) and not isinstance(argument, io.IOBase)
    return list(argument) if is_iterator else argument


def _caller_state() -> Callable[[], AbstractContextManager[object]]:
    """A function that another thread calls to compute as this thread does."""
    threads, device = torch.get_num_threads(), None
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        device = torch.cuda.current_device()  # where a model is loaded by device="cuda"

    def enter() -> AbstractContextManager[object]:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return nullcontext() if device is None else torch.cuda.device(device)

    return enter
