"""The installed triton and ptxas: their versions, the GPUs that they support, their settings."""

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
    """The versions of triton and of the ptxas that it uses for ``arch``."""
    from triton.backends.nvidia.compiler import get_ptxas

    return str(triton_version()), str(get_ptxas(arch).version)


def first_fault(text: str) -> str:
    """The line of a compiler's output that names the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    faults = [line for line in lines if re.search(r"\b(fatal|error)\b", line)]
    worst = [line for line in faults if "fatal" in line] or faults or lines or ["no reason"]
    return " ".join(worst[0].split())[:300]


def compiler_names(arch: int) -> tuple[str, str]:
    """The names of `compilers` with their versions: "triton 3.7.1" and "ptxas 12.8"."""
    triton, ptxas = compilers(arch)
    return f"triton {triton}", f"ptxas {ptxas}"


@functools.cache
def why_not_compiled(arch: int) -> str | None:
    """Why triton's ptxas cannot make machine code for ``arch``; None if it can.

    This runs ptxas on an empty program, which takes hundredths of a second. Triton itself would
    print pages of code before the error.
    """
    try:
        refusal = _ptxas_refusal(arch)
    except (OSError, RuntimeError) as error:  # missing, not executable, or no temporary folder
        return f"ptxas of triton {triton_version()} does not run: {error}"
    if refusal is None:
        return None
    triton, ptxas = compiler_names(arch)
    return f"{ptxas} of {triton} has no machine code for sm_{arch} ({refusal})"


def _ptxas_refusal(arch: int) -> str | None:
    """The error of ptxas if it refuses ``arch``."""
    from triton.backends.nvidia import compiler

    with tempfile.TemporaryDirectory(prefix="vitrail-", ignore_cleanup_errors=True) as folder:
        file = Path(folder, "nothing.ptx")
        file.write_text(".version 7.0\n.target sm_75\n.address_size 64\n")
        name = compiler.sm_arch_from_capability(arch)
        command = [compiler.get_ptxas(arch).path, f"--gpu-name={name}", file, "-o", f"{file}.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else first_fault(done.stderr or done.stdout)


def why_no_launcher() -> str | None:
    """Why Triton cannot build its launchers; None if it can.

    A launcher is C code that Triton compiles when a kernel is launched for the first time.
    """
    from triton import knobs

    if not (knobs.build.cc or shutil.which("gcc") or shutil.which("clang")):
        return "triton's launcher needs a C compiler: install gcc, or set CC"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return f"triton's launcher needs Python's headers, and there is no {header}"
    return None


@functools.cache
def triton_build() -> str:
    """Version and size of triton's library, to tell two builds apart. A digest would have to read
    400 MB, which takes longer than loading a model."""
    from triton._C import libtriton

    return f"{triton_version()} {os.stat(libtriton.__file__).st_size}"


def triton_cache() -> str:
    """The folder of Triton's cache."""
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
    """The environment variables that change machine code, with their values."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    ours = {name: os.environ[name] for name in CODE_VARIABLES if name in os.environ}
    return tuple(sorted({**get_cache_invalidating_env_vars(), **ours}.items()))
