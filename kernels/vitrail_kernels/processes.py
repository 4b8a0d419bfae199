"""Work on kernel calls in a process for every core.

Processes are forked: that takes no time, and they see whatever the caller sees. A process that has
started CUDA does not fork, since the driver's threads, and what they hold, do not come along. It
starts a new one, once, which imports torch and triton and forks in its stead.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.launch import Call, Grid, descriptor

_R = TypeVar("_R")


def in_processes(work: Callable[[Call], _R], calls: Sequence[Call]) -> Iterator[_R | str]:
    """``work`` of each call in order, by a process for every core; or in words why it failed.

    If CUDA has been started ``work`` and its results are sent to another process: a function of a
    module, or a partial one, and the tensors of its call are meta tensors. Raises BrokenProcessPool
    if a process is killed.
    """
    if torch.cuda.is_initialized() and sys.executable:  # type: ignore[no-untyped-call]
        return _in_helper(work, calls)
    return in_forks(work, calls)


def in_forks(work: Callable[[Call], _R], calls: Sequence[Call]) -> Iterator[_R | str]:
    """`in_processes`, forked from this process, which has not started CUDA."""
    _PENDING[:] = [(work, call) for call in calls]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        try:
            yield from pool.map(_work_pending, range(len(calls)))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_PENDING: list[tuple[Callable[[Call], Any], Call]] = []
"""What the processes do, by place; filled before they fork: kernels do not pickle."""


def _work_pending(place: int) -> Any:
    work, call = _PENDING[place]
    try:
        return work(call)
    except Exception as error:  # said by whoever asked; Triton's own errors do not pickle
        return f"{call.kernel.__name__}: {type(error).__name__}: {error}"


# -- the helper ------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """A tensor without its numbers, as far as a kernel is compiled for it. ``block``: of a
    descriptor over it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool
    block: tuple[int, int] | None

    def tensor(self) -> Any:
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        numbers = torch.empty(last + 2, dtype=self.dtype, device="meta")
        tensor = numbers.as_strided(self.shape, self.stride, 0 if self.aligned else 1)
        return tensor if self.block is None else descriptor(tensor, *self.block)


def _layout(value: Any) -> Any:
    if isinstance(value, Tensor):
        aligned = value.data_ptr() % 16 == 0
        return _Layout(tuple(value.shape), value.stride(), value.dtype, aligned, None)
    if hasattr(value, "block_shape"):
        return _layout(value.base)._replace(block=tuple(value.block_shape))
    return value


@dataclass(frozen=True, slots=True)
class _Portable:
    """A `Call` that can be sent to another process."""

    module: str
    name: str
    grid: Grid
    arguments: dict[str, Any]
    config: KernelConfig

    def call(self) -> Call:
        kernel = getattr(importlib.import_module(self.module), self.name)
        arguments = {
            name: value.tensor() if isinstance(value, _Layout) else value
            for name, value in self.arguments.items()
        }
        return Call(kernel, self.grid, arguments, self.config)


def _portable(call: Call) -> _Portable:
    arguments = {name: _layout(value) for name, value in call.arguments.items()}
    kernel = call.kernel.fn
    return _Portable(kernel.__module__, kernel.__name__, call.grid, arguments, call.config)


class _Helper:
    """A process that has never seen CUDA. It goes with this one."""

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self.connection, theirs = multiprocessing.Pipe()
        code = f"from vitrail_kernels.processes import serve; serve({theirs.fileno()})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**self.environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


_helpers: list[_Helper] = []
_ASKING = threading.Lock()


def _close_helper() -> None:
    while _helpers:
        _helpers.pop().close()


atexit.register(_close_helper)


def _in_helper(work: Callable[[Call], _R], calls: Sequence[Call]) -> Iterator[_R | str]:
    with _ASKING:
        if not _helpers or _helpers[0].environment != os.environ:
            _close_helper()
            _helpers.append(_Helper())
        connection, whole = _helpers[0].connection, False
        try:
            connection.send((work, [_portable(call) for call in calls]))
            for _ in calls:
                good, result = connection.recv()
                if not good:
                    raise BrokenProcessPool(result)
                yield result
            whole = True
        except (EOFError, OSError) as error:
            raise BrokenProcessPool("the process that compiles was killed") from error
        finally:
            if not whole:  # results that nobody takes are in it
                _close_helper()


def serve(number: int) -> None:
    """What the helper does until the other end of the connection ``number`` is closed."""
    connection = Connection(number)
    while True:
        try:
            work, portable = connection.recv()
        except EOFError:
            return
        try:
            for result in in_forks(work, [each.call() for each in portable]):
                connection.send((True, result))
        except BrokenProcessPool as error:
            connection.send((False, str(error)))
