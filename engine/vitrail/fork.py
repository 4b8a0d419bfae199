"""Calls and locks in a forked process.

PyTorch's OpenMP threads belong to the thread that started them, and a fork copies the calling
thread alone. In the child this survivor would wait forever for threads of its parent; any other
thread of the child gets OpenMP threads of its own, and computes the same bits. So calls of the
survivor go to a helper thread.

To end the OpenMP threads before each fork (omp_pause_resource_all) would help PyTorch's operators
in the survivor too. But a thread that is ending may hold the lock of MKL's allocator, and a child
that is forked meanwhile waits for that lock forever.

A lock that another thread of the parent holds at the fork would stay locked in the child.
"""

import contextvars
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar, overload

_S = TypeVar("_S")
_R = TypeVar("_R")


def _is_fork() -> bool:
    """Whether Linux has forked this process and it has executed no program since."""
    try:
        with open("/proc/self/stat", "rb") as file:
            flags = int(file.read().rpartition(b")")[2].split()[6])
    except OSError:
        return False
    return bool(flags & 0x40)  # PF_FORKNOEXEC


forked = "torch" in sys.modules and _is_fork()
"""Whether this process is a fork of one that had imported Vitrail or may have used PyTorch."""

survivor = threading.main_thread().ident if forked else None
"""The thread that forked this process, by its ident; None if the process is no such fork."""


def run(function: Callable[[], _R]) -> _R:
    """``function()`` on the helper thread. Only the survivor calls this.

    The function sees the caller's context variables. An exception that a signal's handler raises in
    the caller, such as KeyboardInterrupt, also stops the function.
    """
    global _helper
    if _helper is None:
        _helper = _Helper()
    helper, future = _helper, None
    try:
        future = helper.submit(function)
        return future.result()
    except BaseException:
        if future is None or not future.done():  # raised here by a handler, not by the function
            _helper = None
            helper.interrupt()
        raise
    finally:
        del future  # it holds the exception, whose traceback holds this frame


class _Helper:
    """A thread that computes for the survivor."""

    def __init__(self) -> None:
        # threads of an executor end with the interpreter, and never in the middle of a call
        self._threads = ThreadPoolExecutor(1, "vitrail-fork")
        self._lock, self._working, self._interrupted = threading.Lock(), 0, False

    def submit(self, function: Callable[[], _R]) -> Future[_R]:
        return self._threads.submit(self._work, contextvars.copy_context(), function)

    def _work(self, context: contextvars.Context, function: Callable[[], _R]) -> _R:
        with self._lock:
            if self._interrupted:
                raise KeyboardInterrupt
            self._working = threading.get_ident()
        try:
            return context.run(function)
        finally:
            with self._lock:
                self._working = 0

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in the function as soon as it runs Python again, and end the
        thread. The next call takes another helper."""
        import ctypes

        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._interrupted = True
            if self._working:
                raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
                raise_in(ctypes.c_ulong(self._working), ctypes.py_object(KeyboardInterrupt))


_helper: _Helper | None = None


# -- locks -----------------------------------------------------------------------------------------

WAIT_SECONDS = 1.0
"""The longest that a fork waits for all brief locks."""

_locks: dict[int, tuple[weakref.ref[threading.Lock], bool]] = {}
_taken: dict[int, list[threading.Lock]] = {}
"""By the thread that forks."""


def lock(*, brief: bool = True) -> threading.Lock:
    """A lock that is free in every forked child.

    ``brief``: a fork waits until it is free, so a child also finds its data complete. Its holder
    takes no other brief lock, and is done in milliseconds. A fork does not wait for other locks:
    their holders may compile for minutes, and their data must bear to be found half done.
    """
    created = threading.Lock()
    key = id(created)
    _locks[key] = weakref.ref(created, lambda _: _locks.pop(key, None)), brief
    return created


class CachedProperty(Generic[_S, _R]):
    """As functools.cached_property, whose lock in Python 3.11 is held while a value is computed.

    Threads that ask at once may compute twice; all get the first value.
    """

    def __init__(self, function: Callable[[_S], _R]) -> None:
        self._function, self.__doc__ = function, function.__doc__

    def __set_name__(self, owner: type[_S], name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type[_S]) -> Self: ...

    @overload
    def __get__(self, instance: _S, owner: type[_S]) -> _R: ...

    def __get__(self, instance: _S | None, owner: type[_S]) -> Self | _R:
        if instance is None:
            return self
        value: _R = vars(instance).setdefault(self._name, self._function(instance))
        return value


def _live_locks() -> list[tuple[threading.Lock, bool]]:
    entries = list(_locks.values())  # in one step: other threads add locks
    return [(alive, brief) for reference, brief in entries if (alive := reference()) is not None]


def _take_locks() -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    taken = _taken[threading.get_ident()] = []
    for held, brief in _live_locks():  # two threads that fork take them in the same order
        if brief and held.acquire(timeout=max(0.0, deadline - time.monotonic())):
            taken.append(held)


def _release_locks() -> None:
    for held in _taken.pop(threading.get_ident(), ()):
        held.release()


def _forget() -> None:
    """In a child: a helper of the parent does not exist here, nor do its other threads."""
    global forked, survivor, _helper
    forked, survivor, _helper = True, threading.get_ident(), None
    _taken.clear()
    for held, _ in _live_locks():
        if held.locked():  # by this thread, for the fork, or by a thread that does not exist here
            held.release()


os.register_at_fork(before=_take_locks, after_in_parent=_release_locks, after_in_child=_forget)
