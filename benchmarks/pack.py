"""`gpu.sh pack`: builds files beforehand that would take minutes of a call on a GPU.

build/pack holds the extension, the CUDA binaries, the commit, and the caches of Triton and Vitrail
with every kernel and launcher of the calls. Triton's keeps absolute paths: it is in `CACHE` on both
machines.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from environment import PACKED, ROOT, describe, sources

FOLDER = "build/pack"
CACHE, ARCHIVE = Path("/var/tmp/vitrail-kernels"), "kernels.tar.xz"
BUILDS = {
    "the extension": ("setup.py", "build_ext", "--inplace"),
    "the CUDA binaries": ("setup.py", "build_cuda_binaries", "--editable-mode"),
}
KERNELS = ("benchmarks/precompile.py", "--launchers")
ENGINE, BINARIES = "engine/vitrail", "kernels/vitrail_kernels/binaries"


def use_caches() -> None:
    """Children of this process find and keep kernels in `CACHE`."""
    os.environ["TRITON_CACHE_DIR"] = str(CACHE / "triton")
    os.environ["VITRAIL_CACHE"] = str(CACHE / "vitrail")


def pack() -> int:
    """Build all of it, a line a part; 1 if a part fails."""
    use_caches()
    shutil.rmtree(CACHE, ignore_errors=True)
    folder = ROOT / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, words in {**BUILDS, "the kernels": KERNELS}.items():
        start = time.monotonic()
        code = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
        print(f"{name}: {'FAILED' if code else 'ok'}, {time.monotonic() - start:.0f} s", flush=True)
        if code:
            return 1
    for extension in (ROOT / ENGINE).glob(f"_C.{sys.implementation.cache_tag}-*.so"):
        shutil.copy(extension, folder)
    if (ROOT / BINARIES).exists():
        shutil.copytree(ROOT / BINARIES, folder / "binaries")
    with tarfile.open(folder / ARCHIVE, "w:xz") as archive:
        archive.add(CACHE, CACHE.name)
    (ROOT / PACKED).write_text(f"{describe()} {sources()}\n")
    (folder / "csrc").write_text(sources(("csrc",)))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{FOLDER}: {size / 1e6:.1f} MB of commit {describe()}; take it along")
    return 0


def unpack() -> Iterator[str]:
    """Copy the parts of build/pack into place, and print their names."""
    folder = ROOT / FOLDER
    if not folder.exists():
        yield f"no {FOLDER}: the extension and the kernels are built here, which takes minutes"
        return
    if (folder / "csrc").exists() and (folder / "csrc").read_text() == sources(("csrc",)):
        for extension in folder.glob("_C.*.so"):
            shutil.copy(extension, ROOT / ENGINE)
        if (folder / "binaries").exists():
            shutil.copytree(folder / "binaries", ROOT / BINARIES, dirs_exist_ok=True)
    else:
        yield f"{FOLDER} is of another csrc: its extension and CUDA binaries are not used"
    archive, mark = folder / ARCHIVE, CACHE / "unpacked"
    if archive.exists():
        use_caches()
        stamp = str(archive.stat().st_size)
        if not mark.exists() or mark.read_text() != stamp:
            with tarfile.open(archive) as opened:
                opened.extractall(CACHE.parent, filter="data")
            mark.write_text(stamp)
    yield f"unpacked {', '.join(sorted(path.name for path in folder.iterdir()))}"
