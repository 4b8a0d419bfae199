"""Kernel configurations are data: a tuned table by architecture, else a heuristic with its reason.

``tuned/sm_<arch>.json``, written by ``vitrail tune``, holds ``provenance`` (gpu, triton, commit,
date, command) and ``configs``: "op|dtype|shape" -> the fields of `KernelConfig`. What it lacks
comes from the operator's own heuristic. Nothing is timed while serving.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TUNED = Path(__file__).parent / "tuned"


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """Tile sides (0 where a kernel has no such side), warps, pipeline stages, and why these.

    ``registers`` limits a thread's registers, so that ``ctas`` blocks fit a multiprocessor;
    ``group_m``: how many tiles down are visited for each tile across, for the L2 cache.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    registers: int | None = None
    ctas: int = 1
    group_m: int = 8
    reason: str = ""

    def options(self) -> dict[str, int]:
        """As Triton's launch takes them."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


@functools.lru_cache(maxsize=16)
def tuned(arch: int) -> Mapping[str, KernelConfig]:
    """The table of an architecture, empty where none is shipped."""
    file = TUNED / f"sm_{arch}.json"
    if not file.is_file():
        return {}
    entries: dict[str, Any] = json.loads(file.read_text())["configs"]
    return {key: KernelConfig(**fields) for key, fields in entries.items()}


def config_hash(arch: int) -> str:
    """SHA-256 of the tuned table: part of a model's fingerprint."""
    rows = {key: dataclasses.astuple(config) for key, config in tuned(arch).items()}
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
