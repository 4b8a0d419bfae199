"""Calls in a forked process, on a thread whose CPU threads are alive.

PyTorch's OpenMP threads belong to the thread that started them, and a fork copies the calling
thread alone. In the child this survivor would wait forever for threads of its parent; any other
thread of the child gets OpenMP threads of its own, and computes the same bits. So calls of the
survivor go to a helper thread.
"""

import contextvars
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_R = TypeVar("_R")

survivor: int | None = None
"""The thread that forked this process, by its ident; None if the process is no fork."""


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


def _forget() -> None:
    """In a child: its thread is the survivor, and a helper of the parent does not exist here."""
    global survivor, _helper
    survivor, _helper = threading.get_ident(), None


os.register_at_fork(after_in_child=_forget)
