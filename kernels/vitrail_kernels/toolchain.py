"""Triton and ptxas as they are installed: versions, GPUs that they know, settings of theirs."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from vitrail_kernels.launch import triton_version


@functools.cache
def compilers(arch: int) -> tuple[str, str]:
    """The versions of triton, and of the ptxas that it takes for ``arch``."""
    from triton.backends.nvidia.compiler import get_ptxas

    return str(triton_version()), str(get_ptxas(arch).version)


def first_fault(text: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    faults = [line for line in lines if re.search(r"\b(fatal|error)\b", line)]
    told = [line for line in faults if "fatal" in line] or faults or lines or ["no reason"]
    return " ".join(told[0].split())[:300]


def compiler_names(arch: int) -> tuple[str, str]:
    """ "triton 3.7.1" and "ptxas 12.8", as they are for ``arch``."""
    triton, ptxas = compilers(arch)
    return f"triton {triton}", f"ptxas {ptxas}"


@functools.cache
def why_not_compiled(arch: int) -> str | None:
    """Why the ptxas of triton cannot make machine code of ``arch``; None if it can.

    ptxas is asked, which takes hundredths of a second: Triton would print pages of its own code
    first. Each triton brings a ptxas that knows the GPUs that it knows.
    """
    from triton.backends.nvidia import compiler

    with tempfile.TemporaryDirectory(prefix="vitrail-", ignore_cleanup_errors=True) as folder:
        file = Path(folder, "nothing.ptx")
        file.write_text(".version 7.0\n.target sm_75\n.address_size 64\n")
        name = compiler.sm_arch_from_capability(arch)
        command = [compiler.get_ptxas(arch).path, f"--gpu-name={name}", file, "-o", f"{file}.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    triton, ptxas = compiler_names(arch)
    told = first_fault(done.stderr or done.stdout)
    return f"{ptxas} of {triton} has no machine code for sm_{arch} ({told})"


def why_no_launcher() -> str | None:
    """Why Triton cannot build its launchers, C code that it compiles when a kernel is first
    launched; None if it can."""
    from triton import knobs

    if not (knobs.build.cc or shutil.which("gcc") or shutil.which("clang")):
        return "triton's launcher needs a C compiler: install gcc, or set CC"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return f"triton's launcher needs Python's headers, and there is no {header}"
    return None


@functools.cache
def triton_build() -> str:
    """Version and size of triton's library. Equal for equal compilers: a digest would read 400 MB,
    which takes longer than a model's loading."""
    from triton._C import libtriton

    return f"{triton_version()} {os.stat(libtriton.__file__).st_size}"


def triton_cache() -> str:
    """The folder of Triton's own cache."""
    from triton import knobs

    return str(knobs.cache.dir)


CODE_VARIABLES = (
    "DISABLE_PTXAS_OPT",
    "PTXAS_OPTIONS",
    "TRITON_DISABLE_LINE_INFO",
    "TRITON_ENABLE_ASAN",
    "TRITON_INSTRUMENTATION_MODE",
    "TRITON_MOCK_PTX_VERSION",
)


def code_settings() -> tuple[tuple[str, str], ...]:
    """Settings of the environment, beside versions, that machine code follows from."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    own = {name: os.environ[name] for name in CODE_VARIABLES if name in os.environ}
    return tuple(sorted({**get_cache_invalidating_env_vars(), **own}.items()))
