"""The build step of setup.py that compiles csrc/*.cu into the CUDA binaries of vitrail_kernels.

VITRAIL_CUDA unset  use the nvcc of CUDA_HOME or PATH; if there is none, or it fails, install
                    without CUDA binaries, and Vitrail uses its Triton kernels
VITRAIL_CUDA=1      fail if no binary can be built; without nvcc, the build downloads one (105 MB)
VITRAIL_CUDA=0      build none

Each binary is a fatbin, which cuModuleLoadData takes, with a JSON file that describes it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command
from setuptools.errors import CompileError, OptionError

SOURCES = sorted(Path("csrc").glob("*.cu"))
ARCHITECTURES = (80, 86, 89, 90, 100, 120)

# PTX for GPUs that have no machine code here. Not 80: GPUs of 8.x run sm_80's machine code, and
# code for architectures before 90 does not wait for the previous kernel, as overlap demands.
PTX = 90

# The oldest release of CUDA 13: the most drivers accept its binaries.
COMPILER = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-nvvm==13.0.88",
)


def setting() -> str:
    """VITRAIL_CUDA: "0", "1", or "" if unset."""
    value = os.environ.get("VITRAIL_CUDA", "")
    if value not in ("", "0", "1"):
        raise OptionError(f"VITRAIL_CUDA: got {value!r}, wanted 0, 1 or nothing")
    return value


def installed_nvcc() -> str | None:
    """The compiler of CUDA_HOME, else of PATH."""
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


def downloaded_nvcc() -> str | None:
    """The compiler of the wheels in COMPILER, which share the folder nvidia/cu13."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    paths = (shutil.which("nvcc", path=f"{folder}/cu13/bin") for folder in folders or ())
    return next(filter(None, paths), None)


def requirements() -> list[str]:
    """Requirements of the build besides build-system.requires. backend.py tells pip."""
    return list(COMPILER) if setting() == "1" and installed_nvcc() is None else []


def output_of(*command: str) -> str:
    """The output of a program. Raises CompileError with the output if the program fails."""
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode != 0:
        raise CompileError(f"{' '.join(command)}: exit status {run.returncode}\n{run.stdout}")
    return run.stdout


def compile_binary(nvcc: str, source: Path, binary: Path) -> dict[str, object]:
    """Write a fatbin of ``source`` for every architecture that ``nvcc`` knows.

    Returns the description for the JSON file. Raises CompileError.
    """
    known = output_of(nvcc, "--list-gpu-code").split()
    architectures = [arch for arch in ARCHITECTURES if f"sm_{arch}" in known]
    missing = ", ".join(f"sm_{arch}" for arch in ARCHITECTURES if arch not in architectures)
    if not architectures:
        raise CompileError(f"{nvcc}: got {' '.join(known)}, wanted one of {missing}")
    if missing:
        print(f"{binary.name} is without {missing}, which {nvcc} does not know", file=sys.stderr)
    codes = [f"arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    codes += [f"arch=compute_{PTX},code=compute_{PTX}"] * (PTX in architectures)
    # Uncompressed: wheels are compressed anyway, and old drivers cannot read a newer compression.
    options = ["-std=c++17", "-O3", "--threads", "0", "-fatbin", "--no-compress"]
    options += [f"-gencode={code}" for code in codes]
    output_of(nvcc, *options, "-o", str(binary), str(source))
    version = re.search(r"\bV(\d+\.\d+\.\d+)", output_of(nvcc, "--version"))
    return {
        "architectures": architectures,
        "ptx": PTX if PTX in architectures else None,
        "nvcc": version[1] if version else "of unknown version",
    }


class BuildCudaBinaries(Command):
    """``build_cuda_binaries``, a subcommand of ``build``."""

    description = "compile csrc/*.cu if there is a CUDA compiler"
    user_options: ClassVar = [
        ("build-lib=", None, "the folder that the packages are built in"),
        ("editable-mode", None, "write into the source tree"),
    ]
    boolean_options: ClassVar = ["editable-mode"]

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        # A folder that is built in again still has older binaries, which would be packed too.
        folder = self._folder()
        shutil.rmtree(folder, ignore_errors=True)
        requested = setting()
        if requested == "0":
            return
        try:
            nvcc = installed_nvcc() or (downloaded_nvcc() if requested == "1" else None)
            if nvcc is None:
                raise CompileError("no nvcc in CUDA_HOME or PATH")
            folder.mkdir(parents=True)
            for source in SOURCES:
                description = compile_binary(nvcc, source, folder / f"{source.stem}.fatbin")
                (folder / f"{source.stem}.json").write_text(json.dumps(description) + "\n")
        except (CompileError, OSError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            if requested == "1":
                raise
            print(
                f"No CUDA binaries were built: {error}\n"
                "Vitrail uses its Triton kernels instead. With VITRAIL_CUDA=1 the installation\n"
                "downloads a CUDA compiler if there is none.",
                file=sys.stderr,
            )

    def get_source_files(self) -> list[str]:
        # The headers are listed with vitrail._C.
        return [str(path) for path in (*SOURCES, *sorted(Path("csrc").glob("*.py")))]

    def get_outputs(self) -> list[str]:
        built = Path(str(self.build_lib), "vitrail_kernels/binaries")
        return [str(built / path.name) for path in sorted(self._folder().glob("*"))]

    def get_output_mapping(self) -> dict[str, str]:
        sources = map(str, sorted(self._folder().glob("*")))
        return dict(zip(self.get_outputs(), sources, strict=True)) if self.editable_mode else {}

    def _folder(self) -> Path:
        if self.editable_mode:
            build_py = self.get_finalized_command("build_py")
            return Path(build_py.get_package_dir("vitrail_kernels"), "binaries")
        return Path(str(self.build_lib), "vitrail_kernels/binaries")
