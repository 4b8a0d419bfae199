"""Kernel configurations are data: a tuned table by architecture, else a heuristic with its reason.

``sm_<arch>.json``, written by ``vitrail tune``, holds ``provenance`` (gpu, driver, versions, date,
command) and ``configs``: "op|dtype|shape" -> the fields of `KernelConfig`. It is read from the
folder that VITRAIL_TUNED names, else from ``tuned/`` here. What it lacks comes from the operator's
own heuristic. Nothing is timed while serving.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TUNED = Path(__file__).parent / "tuned"
VARIABLE = "VITRAIL_TUNED"


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """Tile sides (0 where a kernel has no such side), warps, pipeline stages, and why these.

    ``registers`` limits a thread's registers, so that ``ctas`` blocks fit a multiprocessor;
    ``group_m``: how many tiles down are visited for each tile across, for the L2 cache;
    ``stagger``: nanoseconds that half the blocks of a persistent grid wait once, 0 for none.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    registers: int | None = None
    ctas: int = 1
    group_m: int = 8
    stagger: int = 0
    reason: str = ""

    def options(self) -> dict[str, int]:
        """As Triton's launch takes them. No compiler joins a product and a sum by itself: it would
        in one tile and not in another, and bits follow from it. Kernels say `tl.fma`."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}
        return options if self.registers is None else options | {"maxnreg": self.registers}


Ladder = tuple[tuple[int, KernelConfig], ...]
"""Largest rows and configuration, ascending; the last holds up to `MOST` rows."""

MOST = 1 << 31


def ladder_of(limits: Iterable[int], choose: Callable[[int], KernelConfig]) -> Ladder:
    """``choose`` as a table. ``limits``: every number of rows after which it may change."""
    found: list[tuple[int, KernelConfig]] = []
    for limit in sorted({limit for limit in limits if 0 < limit < MOST} | {MOST}):
        config = choose(limit)
        if found and found[-1][1] == config:
            found.pop()
        found.append((limit, config))
    return tuple(found)


_FORCED: ContextVar[Mapping[str, KernelConfig] | None] = ContextVar("table", default=None)


@contextmanager
def in_force(table: Mapping[str, KernelConfig]) -> Iterator[None]:
    """``table`` takes the place of the tuned one, on this thread."""
    token = _FORCED.set(table)
    try:
        yield
    finally:
        _FORCED.reset(token)


def tuned(arch: int) -> Mapping[str, KernelConfig]:
    """The table of an architecture, empty where there is none; a process reads it once.

    Raises ValueError naming the file, and the key, that cannot be used.
    """
    table = _FORCED.get()
    return _loaded(arch) if table is None else table


@functools.lru_cache(maxsize=16)
def _loaded(arch: int) -> Mapping[str, KernelConfig]:
    name = f"sm_{arch}.json"
    own = os.environ.get(VARIABLE)
    if own and not Path(own).is_dir():
        raise ValueError(f"{VARIABLE}: got {own!r}, wanted a folder with {name}")
    files = [folder / name for folder in ([Path(own)] if own else []) + [TUNED]]
    file = next((file for file in files if file.is_file()), None)
    return {} if file is None else read_table(file)[1]


def read_table(file: Path) -> tuple[dict[str, Any], dict[str, KernelConfig]]:
    """Provenance and configurations. Raises ValueError naming the file, and the key, at fault."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: no tuned table can be read: {error}") from error
    parts = ("provenance", "configs")
    if not isinstance(content, dict) or not all(isinstance(content.get(p), dict) for p in parts):
        raise ValueError(f"{file}: wanted an object with the objects 'provenance' and 'configs'")
    configs = {key: _config(f"{file}: {key}", given) for key, given in content["configs"].items()}
    return content["provenance"], configs


def _config(where: str, given: Any) -> KernelConfig:
    fields = {field.name: field for field in dataclasses.fields(KernelConfig)}
    if not isinstance(given, dict):
        raise ValueError(f"{where}: got {given!r:.80}, wanted an object with {', '.join(fields)}")
    wrong = [name for name, value in given.items() if name not in fields or not _fits(name, value)]
    wrong += [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in given]
    if wrong:
        got = {name: given[name] for name in wrong if name in given}
        raise ValueError(
            f"{where}: got {got!r:.200}, lacking {[name for name in wrong if name not in given]}; "
            f"wanted only {', '.join(fields)}: sides and warps powers of two, whole numbers over 0"
        )
    return KernelConfig(**given)


def _fits(name: str, value: Any) -> bool:
    if name == "reason" or value is None:
        return isinstance(value, str) or name == "registers"
    if type(value) is not int:
        return False
    if name.startswith("block_") or name == "warps":  # Triton takes no others
        return value >= (name == "warps") and value & (value - 1) == 0
    return value > 0 or (value == 0 and name == "stagger")


def write_table(
    file: Path, provenance: Mapping[str, Any], configs: Mapping[str, KernelConfig]
) -> None:
    """What `read_table` reads, whole or not at all; of two writers at once the last stays."""
    rows = {key: dataclasses.asdict(config) for key, config in sorted(configs.items())}
    text = json.dumps({"provenance": provenance, "configs": rows}, indent=1)
    descriptor, partial = tempfile.mkstemp(".partial", f".{file.name}.", file.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as draft:
            draft.write(text + "\n")
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(partial, 0o666 & ~mask)  # mkstemp's are private
        os.replace(partial, file)
    except BaseException:
        os.unlink(partial)
        raise


def config_hash(arch: int) -> str:
    """SHA-256 of the tuned table, reasons left out."""
    rows = {
        key: dataclasses.astuple(dataclasses.replace(config, reason=""))
        for key, config in tuned(arch).items()
    }
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
