"""Compile with Triton without reading or writing its cache on disk.

Triton trusts the files in its cache. A damaged file fails at every start, and anyone who can write
there can choose the machine code. Kernel binaries that Vitrail keeps elsewhere, with a digest, must
not come from that cache.
"""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vitrail_kernels.fork_lock import fork_lock

_REPLACING = fork_lock()


@contextmanager
def private_cache() -> Iterator[None]:
    """Give this thread a temporary Triton cache, removed at the end. Other threads keep theirs.

    Raises OSError if no temporary folder can be made.
    """
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    with (
        tempfile.TemporaryDirectory(prefix="vitrail-", ignore_cleanup_errors=True) as folder,
        _REPLACING,
    ):
        owner, previous = threading.get_ident(), knobs.cache.manager_class

        class PrivateCache(FileCacheManager):  # type: ignore[misc]
            def __init__(self, key: str) -> None:
                self.key, self.cache_dir = key, os.path.join(folder, key)
                self.lock_path = os.path.join(self.cache_dir, "lock")
                os.makedirs(self.cache_dir, exist_ok=True)

        def manager(key: str, **options: bool) -> Any:
            if threading.get_ident() == owner and not options:
                return PrivateCache(key)
            return (previous or FileCacheManager)(key, **options)

        override = knobs.cache.__dict__.get("manager_class")
        knobs.cache.manager_class = manager
        try:
            yield
        finally:
            del knobs.cache.manager_class
            if override is not None:
                knobs.cache.manager_class = override
