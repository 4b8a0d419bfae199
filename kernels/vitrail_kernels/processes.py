"""Work on kernel calls with one process per core.

The processes are forked, which takes no time and lets them see the caller's memory. A process that
has started CUDA cannot fork, because the driver's threads and their locks do not survive a fork.
Such a process starts a helper process once. The helper imports torch and triton, and forks instead.
"""

import atexit
import importlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.fork_lock import fork_lock
from vitrail_kernels.launch import Call, Grid, descriptor

_R = TypeVar("_R")


def in_processes(work: Callable[[Call], _R], calls: Sequence[Call]) -> Iterator[_R | str]:
    """The result of ``work`` for each call, in order; an error message if ``work`` failed.

    If this process has started CUDA, ``work`` is sent to the helper, and its results are sent back.
    ``work`` must then be a function of a module, or a partial of such a function, and gets calls
    whose tensors are meta tensors. Raises BrokenProcessPool if a process is killed.
    """
    if torch.cuda.is_initialized() and sys.executable:  # type: ignore[no-untyped-call]
        return _in_helper(work, calls)
    return in_forks(work, calls)


def in_forks(work: Callable[[Call], _R], calls: Sequence[Call]) -> Iterator[_R | str]:
    """As `in_processes`, but always forks this process, which must not have started CUDA."""
    _PENDING[:] = [(work, call) for call in calls]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        try:
            yield from pool.map(_work_pending, range(len(calls)))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_PENDING: list[tuple[Callable[[Call], Any], Call]] = []
"""The tasks of the forked processes, by number. They are set before forking, because kernels cannot
be pickled."""


def _work_pending(number: int) -> Any:
    work, call = _PENDING[number]
    try:
        return work(call)
    except Exception as error:  # returned as text, because Triton's errors cannot be pickled
        return f"{call.kernel.__name__}: {type(error).__name__}: {error}"


# -- the helper ------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """The facts of a tensor that a kernel is compiled for. ``block`` is the tile of a descriptor
    over the tensor; None for the tensor itself."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool
    block: tuple[int, int] | None

    def tensor(self) -> Any:
        extent = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        storage = torch.empty(extent + 2, dtype=self.dtype, device="meta")
        tensor = storage.as_strided(self.shape, self.stride, 0 if self.aligned else 1)
        return tensor if self.block is None else descriptor(tensor, *self.block)


def _layout(value: Any) -> Any:
    if isinstance(value, Tensor):
        aligned = value.data_ptr() % 16 == 0
        return _Layout(tuple(value.shape), value.stride(), value.dtype, aligned, None)
    if hasattr(value, "block_shape"):
        return _layout(value.base)._replace(block=tuple(value.block_shape))
    return value


@dataclass(frozen=True, slots=True)
class _PortableCall:
    """A `Call` that can be pickled."""

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


def _portable(call: Call) -> _PortableCall:
    arguments = {name: _layout(value) for name, value in call.arguments.items()}
    kernel = call.kernel.fn
    return _PortableCall(kernel.__module__, kernel.__name__, call.grid, arguments, call.config)


class _Helper:
    """A process without CUDA, which ends when this process ends."""

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self.connection, remote = multiprocessing.Pipe()
        code = f"from vitrail_kernels.processes import serve; serve({remote.fileno()})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**self.environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            pass_fds=[remote.fileno()],
            stdin=subprocess.DEVNULL,
        )
        remote.close()

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


_helpers: list[_Helper] = []
_ASKING = fork_lock()


def _close_helper() -> None:
    while _helpers:
        _helpers.pop().close()


atexit.register(_close_helper)


def _forget_helper() -> None:
    """In a forked process: the helper is the parent's, to ask and to end."""
    _helpers.clear()


os.register_at_fork(after_in_child=_forget_helper)


def _in_helper(work: Callable[[Call], _R], calls: Sequence[Call]) -> Iterator[_R | str]:
    with _ASKING:
        if not _helpers or _helpers[0].environment != os.environ:
            _close_helper()
            _helpers.append(_Helper())
        connection, complete = _helpers[0].connection, False
        try:
            connection.send((work, [_portable(call) for call in calls]))
            for _ in calls:
                succeeded, result = connection.recv()
                if not succeeded:
                    raise BrokenProcessPool(result)
                yield result
            complete = True
        except (EOFError, OSError) as error:
            raise BrokenProcessPool("the process that compiles was killed") from error
        finally:
            if not complete:  # the connection still holds results that nobody reads
                _close_helper()


def serve(file_number: int) -> None:
    """Run the helper process until the other end of the connection is closed."""
    connection = Connection(file_number)
    while True:
        try:
            work, portable_calls = connection.recv()
        except EOFError:
            return
        try:
            for result in in_forks(work, [portable.call() for portable in portable_calls]):
                connection.send((True, result))
        except BrokenProcessPool as error:
            connection.send((False, str(error)))
