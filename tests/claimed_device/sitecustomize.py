"""With this folder in PYTHONPATH, torch.cuda of every Python process claims an H100.

It rehearses scripts for a GPU as far as a machine without one lets them: a tensor on the device is
still an error of torch's, which says so.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace

CARD = SimpleNamespace(
    name="NVIDIA H100 claimed",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
)


def claim(torch: ModuleType) -> None:
    """Let ``torch.cuda`` speak of `CARD`; nothing waits for it."""
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda *_: CARD
    torch.cuda.get_device_name = lambda *_: CARD.name
    torch.cuda.get_device_capability = lambda *_: (CARD.major, CARD.minor)
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.empty_cache = lambda: None


class _Claiming(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads torch, then makes it claim."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch":
            return None
        self.real = importlib.machinery.PathFinder.find_spec(name, path)
        if self.real is None or self.real.loader is None:
            return None
        spec = importlib.machinery.ModuleSpec(name, self, origin=self.real.origin)
        spec.submodule_search_locations = self.real.submodule_search_locations
        spec.has_location = True
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        assert self.real is not None, "found above"
        assert self.real.loader is not None, "found above"
        self.real.loader.exec_module(module)
        claim(module)


sys.meta_path.insert(0, _Claiming())
