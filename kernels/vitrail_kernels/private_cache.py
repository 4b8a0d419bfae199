"""Compile with Triton as if its cache on disk were empty, and leave nothing in it.

Triton trusts the files of its cache as they are: a damaged file fails at every start, and whoever
can write there chooses the machine code. Kernel binaries that are kept elsewhere, with a digest,
are therefore compiled past it.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_REPLACING = threading.Lock()


@contextmanager
def private_cache() -> Iterator[None]:
    """The Triton cache of this thread is a temporary folder, removed at the end. Other threads keep
    theirs. Raises OSError if there is no temporary folder."""
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    with (
        tempfile.TemporaryDirectory(prefix="vitrail-", ignore_cleanup_errors=True) as folder,
        _REPLACING,
    ):
        owner, previous = threading.get_ident(), knobs.cache.manager_class

        class Private(FileCacheManager):  # type: ignore[misc]
            def __init__(self, key: str) -> None:
                self.key, self.cache_dir = key, os.path.join(folder, key)
                self.lock_path = os.path.join(self.cache_dir, "lock")
                os.makedirs(self.cache_dir, exist_ok=True)

        def manager(key: str, **options: bool) -> Any:
            if threading.get_ident() == owner and not options:
                return Private(key)
            return (previous or FileCacheManager)(key, **options)

        own = knobs.cache.__dict__.get("manager_class")
        knobs.cache.manager_class = manager
        try:
            yield
        finally:
            del knobs.cache.manager_class
            if own is not None:
                knobs.cache.manager_class = own
