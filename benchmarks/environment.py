"""The environment of a benchmark's numbers: machine, versions, commit, command."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CODE = ("engine", "kernels", "csrc", "benchmarks")
SUFFIXES = (".py", ".json", ".cpp", ".hpp", ".cu")
BUILT = ("results", "binaries", "tuned")
"""Folders inside `CODE` that a build, a tuning or a measurement writes."""
SECONDS = 20
"""For nvidia-smi, or git, to answer."""
PACKED = "build/pack/commit"
"""Whose files these are in a copy without git, written by ``benchmarks/gpu.sh pack``: the commit,
and `sources` as they were."""
DESCRIBE = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _output(*command: str, folder: Path | None = None) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=folder or ROOT, capture_output=True, text=True, check=True, timeout=SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def revision() -> tuple[str, bool]:
    """The commit, and whether the files differ from it; results are no difference.

    A copy without git takes VITRAIL_COMMIT, or the file `PACKED`: a hash, with ``-dirty`` behind it
    or not, as `DESCRIBE` prints it. Files that changed since they were packed are dirty. Without
    either the commit is "unknown", and dirty.
    """
    head = _output("git", "rev-parse", "HEAD")
    if head is None:
        commit, unchanged = os.environ.get("VITRAIL_COMMIT", ""), True
        if not commit and (ROOT / PACKED).exists():
            commit, _, packed = (ROOT / PACKED).read_text().strip().partition(" ")
            unchanged = packed == sources()
        clean = bool(commit) and not commit.endswith("-dirty") and unchanged
        return commit.removesuffix("-dirty") or "unknown", not clean
    status, no_results = ("git", "status", "--porcelain"), ":!benchmarks/results"
    changed = _output(*status, "--untracked-files=no", "--", ".", no_results)
    untracked = _output(*status, "--", *CODE, no_results)
    return head, changed != "" or untracked != ""


def describe() -> str:
    """The commit as `PACKED` holds it."""
    commit, dirty = revision()
    return f"{commit}{'-dirty' * dirty}"


def last_change(folder: Path) -> str:
    """The commit that last changed ``folder``, of this checkout or another; "unknown" without git.

    With ``-dirty`` behind it if files there differ from the commit.
    """
    commit = _output("git", "log", "-1", "--format=%H", "--", ".", folder=folder)
    changed = _output("git", "status", "--porcelain", "--", ".", folder=folder)
    return f"{commit}{'-dirty' * bool(changed)}" if commit else "unknown"


def sources(folders: Sequence[str] = CODE) -> str:
    """SHA-256 of the code that is measured and that measures: a result belongs to it.

    Files of `BUILT` folders do not count, so that a build between two calls changes nothing.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT)
            if path.suffix in SUFFIXES and not set(BUILT) & set(name.parts):
                digest.update(f"{name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _ptxas() -> str | None:
    """The version of the ptxas that Triton takes, which TRITON_PTXAS_PATH may change."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return str(get_ptxas(90).version)
    except (ImportError, RuntimeError, OSError):
        return None


def _tuned(arch: int) -> str | None:
    """The hash of the tuned table in force for ``arch``, or None."""
    from vitrail_kernels.configs import config_hash, tuned

    return config_hash(arch)[:16] if tuned(arch) else None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _gpu(present: bool) -> dict[str, Any]:
    names = ("gpu", "gpu_arch", "gpu_memory", "gpu_sms", "driver", "clocks", "tuned")
    if not present:
        return dict.fromkeys(names)
    import torch

    card = torch.cuda.get_device_properties()
    query = "--query-gpu=driver_version,clocks.max.sm,power.limit"
    answer = _output("nvidia-smi", query, "--format=csv,noheader", "--id=0") or "unknown"
    driver, _, clocks = answer.partition(", ")
    arch = 10 * card.major + card.minor
    sizes = (card.total_memory, card.multi_processor_count)
    values = (card.name, f"sm_{arch}", *sizes, driver, clocks or None, _tuned(arch))
    return dict(zip(names, values, strict=True))


def environment(device: str = "cpu") -> dict[str, Any]:
    """The environment of the numbers: machine, versions, commit, date, command.

    The GPU's fields are None unless ``device`` is "cuda".
    """
    import torch

    commit, dirty = revision()
    return {
        **_gpu(device == "cuda"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in ("triton", "numpy", "pillow", "transformers")},
        "ptxas": _ptxas(),
        "commit": commit,
        "dirty": dirty,
        "sources": sources(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", *sys.argv]),
    }


def refuse_dirty(allowed: bool) -> None:
    """Stop if git says that the numbers would belong to no commit; a copy without git goes on."""
    if not allowed and _output("git", "rev-parse", "HEAD") and revision()[1]:
        sys.exit("the tree has uncommitted changes; commit them, or give --allow-dirty")
