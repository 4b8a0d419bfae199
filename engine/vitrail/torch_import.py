"""Imports a module of Vitrail right after torch, whenever torch is imported: never before it.

A saved program holds operators by name, and torch.export.load and torch.jit.load find those that
are registered. ``import vitrail`` alone must not import torch, so the module that registers them
waits for it.
"""

import importlib
import sys
import threading
import warnings
from typing import Any

TORCH = "torch"


def import_after_torch(module: str) -> None:
    """Import ``module`` now if torch is imported, else when it is. Without torch, do nothing."""
    if sys.modules.get(TORCH) is not None:
        _follow(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(module))


def _follow(module: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:  # an import of torch must not fail because of Vitrail
        warnings.warn(
            f"{module} could not be imported after torch: {error}; saved programs with Vitrail's "
            "operators do not load before it is",
            stacklevel=2,
        )


class _Finder:
    """Lets the other finders find torch, and stays first on sys.meta_path until it is imported."""

    def __init__(self, module: str) -> None:
        self.module, self._searching = module, threading.local()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        # a finder of another tool may ask every finder, as this one does
        if name != TORCH or getattr(self._searching, "now", False):
            return None
        self._searching.now = True
        try:
            for finder in list(sys.meta_path):
                find = getattr(finder, "find_spec", None)
                spec = None if finder is self or find is None else find(name, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader, self)
                    return spec
            return None
        finally:
            self._searching.now = False


class _Loader:
    """The loader of torch, which it hands the module to; then `_Finder.module` is imported."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:  # else another thread has followed
            sys.meta_path.remove(self._finder)
        _follow(self._finder.module)
