"""A lock for modules: free in a forked process, whatever other threads of its parent were doing."""

import os
import threading


def fork_lock() -> threading.Lock:
    """A new lock. In a forked process it is free, even if a thread of the parent holds it: that
    thread, which may be compiling, does not exist there."""
    lock = threading.Lock()

    def free() -> None:
        if lock.locked():
            lock.release()

    os.register_at_fork(after_in_child=free)
    return lock
