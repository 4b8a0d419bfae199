"""Kernel configurations, from an architecture's tuned table or from the operator's heuristic.

``vitrail tune`` writes the table ``sm_<arch>.json``. It holds ``provenance`` (gpu, driver,
versions, date, command) and ``configs``: "op|dtype|shape" -> the fields of `KernelConfig`. The
table is read from the folder that VITRAIL_TUNED names, or else from ``tuned/`` beside this file. If
a key is missing, the operator's own heuristic decides. Inference never times kernels.
"""

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

import torch

TUNED = Path(__file__).parent / "tuned"
VARIABLE = "VITRAIL_TUNED"


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """The sides of a tile (0 if the kernel has no such side), warps, pipeline stages and reason.

    ``registers`` limits the registers of a thread, so that ``ctas`` blocks fit a multiprocessor.
    A kernel visits ``group_m`` tiles down, then the same rows of the next tile across; this helps
    the L2 cache. Half the blocks of a persistent grid wait ``stagger`` nanoseconds once (0: no
    wait).
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
        """The keyword arguments of a Triton launch.

        The compiler must not fuse a product and a sum: it would fuse in one tile and not in
        another, and the bits would differ. Kernels call `tl.fma` instead.
        """
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}
        return options if self.registers is None else options | {"maxnreg": self.registers}


Ladder = tuple[tuple[int, KernelConfig], ...]
"""Pairs (rows, configuration), ascending: a call takes the first pair that has at least its rows.
The last pair has `MOST` rows."""

MOST = 1 << 31


def ladder_of(limits: Iterable[int], choose: Callable[[int], KernelConfig]) -> Ladder:
    """The ladder of ``choose(rows)``, which must change only after the numbers in ``limits``."""
    ladder: list[tuple[int, KernelConfig]] = []
    for limit in sorted({limit for limit in limits if 0 < limit < MOST} | {MOST}):
        config = choose(limit)
        if ladder and ladder[-1][1] == config:
            ladder.pop()
        ladder.append((limit, config))
    return tuple(ladder)


def dtype_name(dtype: torch.dtype) -> str:
    """The name without torch's prefix, for example "float16"."""
    return str(dtype).removeprefix("torch.")


def config_key(op: str, dtype: torch.dtype, shape: str) -> str:
    """The key of a configuration in a tuned table, such as "layernorm|float16|768"."""
    return f"{op}|{dtype_name(dtype)}|{shape}"


_FORCED: ContextVar[Mapping[str, KernelConfig] | None] = ContextVar("table", default=None)


@contextmanager
def in_force(table: Mapping[str, KernelConfig]) -> Iterator[None]:
    """Use ``table`` instead of the tuned table, on this thread."""
    token = _FORCED.set(table)
    try:
        yield
    finally:
        _FORCED.reset(token)


def tuned(arch: int) -> Mapping[str, KernelConfig]:
    """The table of an architecture; empty if there is no file. A process reads the file once.

    Raises ValueError with the file, and the key, that cannot be used.
    """
    table = _FORCED.get()
    return _loaded(arch) if table is None else table


@functools.lru_cache(maxsize=16)
def _loaded(arch: int) -> Mapping[str, KernelConfig]:
    name = f"sm_{arch}.json"
    user_folder = os.environ.get(VARIABLE)
    if user_folder and not Path(user_folder).is_dir():
        raise ValueError(f"{VARIABLE}: got {user_folder!r}, wanted a folder with {name}")
    files = [folder / name for folder in ([Path(user_folder)] if user_folder else []) + [TUNED]]
    file = next((file for file in files if file.is_file()), None)
    return {} if file is None else read_table(file)[1]


def read_table(file: Path) -> tuple[dict[str, Any], dict[str, KernelConfig]]:
    """Provenance and configurations. Raises ValueError with the file, and the key, at fault."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: no tuned table can be read: {error}") from error
    keys = ("provenance", "configs")
    if not isinstance(content, dict) or not all(isinstance(content.get(k), dict) for k in keys):
        raise ValueError(f"{file}: wanted an object with the objects 'provenance' and 'configs'")
    configs = {key: _config(f"{file}: {key}", entry) for key, entry in content["configs"].items()}
    return content["provenance"], configs


def _config(location: str, entry: Any) -> KernelConfig:
    fields = {field.name: field for field in dataclasses.fields(KernelConfig)}
    if not isinstance(entry, dict):
        raise ValueError(
            f"{location}: got {entry!r:.80}, wanted an object with {', '.join(fields)}"
        )
    wrong = [name for name, value in entry.items() if name not in fields or not _fits(name, value)]
    wrong += [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in entry]
    if wrong:
        present = {name: entry[name] for name in wrong if name in entry}
        absent = [name for name in wrong if name not in entry]
        raise ValueError(
            f"{location}: got {present!r:.200}, lacking {absent}; "
            f"wanted only {', '.join(fields)}: sides and warps powers of two, whole numbers over 0"
        )
    return KernelConfig(**entry)


def _fits(name: str, value: Any) -> bool:
    """Whether the field ``name`` may have this value."""
    if name == "reason" or value is None:
        return isinstance(value, str) or name == "registers"
    if type(value) is not int:
        return False
    if name.startswith("block_") or name == "warps":  # Triton takes only powers of two
        return value >= (name == "warps") and value & (value - 1) == 0
    return value > 0 or (value == 0 and name == "stagger")


def write_table(
    file: Path, provenance: Mapping[str, Any], configs: Mapping[str, KernelConfig]
) -> None:
    """Write a table for `read_table`: the whole file or nothing. The later of two writers wins."""
    rows = {key: dataclasses.asdict(config) for key, config in sorted(configs.items())}
    text = json.dumps({"provenance": provenance, "configs": rows}, indent=1)
    descriptor, partial = tempfile.mkstemp(".partial", f".{file.name}.", file.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as draft:
            draft.write(text + "\n")
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(partial, 0o666 & ~mask)  # a file from mkstemp is private
        os.replace(partial, file)
    except BaseException:
        os.unlink(partial)
        raise


def config_hash(arch: int) -> str:
    """SHA-256 of the tuned table without the reasons."""
    rows = {
        key: dataclasses.astuple(dataclasses.replace(config, reason=""))
        for key, config in tuned(arch).items()
    }
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
