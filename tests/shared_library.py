"""Compiles the C++ of tests into shared libraries, and keeps them while their sources stay as
they are."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
NATIVE = "-march=native"


def compiler() -> str | None:
    """The C++ compiler of this machine, or None."""
    return shutil.which(os.environ.get("CXX", "c++"))


@functools.cache
def native_flags() -> tuple[tuple[str, ...], str]:
    """The flag for this machine's own instructions, if the compiler takes it, and what tells such
    machines apart."""
    command = [compiler() or "c++", NATIVE, "-dM", "-E", "-x", "c++", os.devnull]
    run = subprocess.run(command, capture_output=True, text=True)
    return ((NATIVE,), run.stdout) if run.returncode == 0 else ((), "")


def build(
    label: str,
    folder: Path,
    library: str,
    flags: Sequence[str],
    *,
    headers: Sequence[Path] = (),
    native: bool = False,
) -> Path:
    """The library ``library`` of every .cpp of ``folder``, compiled with ``flags``.

    ``headers``: files outside ``folder`` that they include. With ``native`` it may use
    instructions that only this machine has. Raises RuntimeError, which names ``label``, without a
    compiler, or with the compiler's errors.
    """
    if (program := compiler()) is None:
        raise RuntimeError(f"{label}: got no C++ compiler, wanted c++ or $CXX")
    extra, machine = native_flags() if native else ((), "")
    flags = (*flags, *extra)
    key = hashlib.sha256(repr((program, flags, machine)).encode())
    for source in [*sorted(folder.glob("*.[ch]pp")), *sorted(folder.glob("*.h")), *headers]:
        key.update(source.read_bytes())
    built = ROOT / "build" / folder.name / key.hexdigest()[:16] / library
    built.parent.mkdir(parents=True, exist_ok=True)
    with (built.parent / "lock").open("w") as lock:  # other processes wait for the first
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            _compile([program, *flags], folder, built, label)
    return built


def _compile(command: Sequence[str], folder: Path, built: Path, label: str) -> None:
    def compile(unit: Path, object_file: Path) -> str:
        run = subprocess.run(
            [*command, "-c", unit, "-o", object_file], capture_output=True, text=True
        )
        return run.stderr if run.returncode != 0 else ""

    with tempfile.TemporaryDirectory(dir=built.parent) as objects:
        units = sorted(folder.glob("*.cpp"))
        files = [Path(objects, f"{unit.stem}.o") for unit in units]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            errors = "".join(pool.map(compile, units, files))
        if errors:
            raise RuntimeError(f"{label} does not compile:\n{errors}")
        unfinished = Path(objects, built.name)
        run = subprocess.run(
            [*command, "-shared", "-o", unfinished, *files], capture_output=True, text=True
        )
        if run.returncode != 0:
            raise RuntimeError(f"{label} does not link:\n{run.stderr}")
        unfinished.replace(built)
