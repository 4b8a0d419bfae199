"""The build step that compiles csrc/*.cu to the CUDA images of vitrail_kernels, by setup.py.

VITRAIL_CUDA unset  where CUDA_HOME or PATH has nvcc; without it, or where it fails, Vitrail is
                    installed all the same and its Triton kernels serve
VITRAIL_CUDA=1      an error where it cannot; without nvcc, the build fetches one (105 MB)
VITRAIL_CUDA=0      never

An image is a fatbin, as cuModuleLoadData takes it, and a JSON file that says what is in it.
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

# For GPUs that no image fits. Not 80: those of 8.x take sm_80's image, and code older than 90 does
# not wait for the kernel before it, which a launch of ours may rely on.
PTX = 90

# Of CUDA 13 the oldest, whose images the most drivers take.
COMPILER = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-nvvm==13.0.88",
)


def setting() -> str:
    """VITRAIL_CUDA: "0", "1", or "" where it is not set."""
    value = os.environ.get("VITRAIL_CUDA", "")
    if value not in ("", "0", "1"):
        raise OptionError(f"VITRAIL_CUDA: got {value!r}, wanted 0, 1 or nothing")
    return value


def installed_nvcc() -> str | None:
    """The compiler of CUDA_HOME, else of PATH."""
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


def fetched_nvcc() -> str | None:
    """The compiler among the wheels of COMPILER, which share the folder nvidia/cu13."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    found = (shutil.which("nvcc", path=f"{folder}/cu13/bin") for folder in folders or ())
    return next(filter(None, found), None)


def requirements() -> list[str]:
    """What the build needs besides build-system.requires; backend.py tells pip."""
    return list(COMPILER) if setting() == "1" and installed_nvcc() is None else []


def output_of(*command: str) -> str:
    """What a program prints. Raises CompileError with what it said where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise CompileError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def compile_image(nvcc: str, source: Path, image: Path) -> dict[str, object]:
    """Write the fatbin of ``source`` for every architecture that ``nvcc`` knows; say what it is."""
    known = output_of(nvcc, "--list-gpu-code").split()
    made = [arch for arch in ARCHITECTURES if f"sm_{arch}" in known]
    left_out = ", ".join(f"sm_{arch}" for arch in ARCHITECTURES if arch not in made)
    if not made:
        raise CompileError(f"{nvcc}: got {' '.join(known)}, wanted one of {left_out}")
    if left_out:
        print(f"{image.name} is without {left_out}, which {nvcc} does not know", file=sys.stderr)
    codes = [f"arch=compute_{arch},code=sm_{arch}" for arch in made]
    codes += [f"arch=compute_{PTX},code=compute_{PTX}"] * (PTX in made)
    # A wheel is compressed anyway, and not every driver knows how every nvcc compresses.
    options = ["-std=c++17", "-O3", "--threads", "0", "-fatbin", "--no-compress"]
    options += [f"-gencode={code}" for code in codes]
    output_of(nvcc, *options, "-o", str(image), str(source))
    version = re.search(r"\bV(\d+\.\d+\.\d+)", output_of(nvcc, "--version"))
    return {
        "architectures": made,
        "ptx": PTX if PTX in made else None,
        "nvcc": version[1] if version else "of unknown version",
    }


class BuildCudaImages(Command):
    """``build_cuda_images``, a part of ``build``: by setuptools' protocol for such commands."""

    description = "compile csrc/*.cu where there is a CUDA compiler"
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
        # Older images go first: of a folder that is built in again, all is packed.
        folder = self._folder()
        shutil.rmtree(folder, ignore_errors=True)
        wanted = setting()
        if wanted == "0":
            return
        try:
            nvcc = installed_nvcc() or (fetched_nvcc() if wanted == "1" else None)
            if nvcc is None:
                raise CompileError("no nvcc in CUDA_HOME or PATH")
            folder.mkdir(parents=True)
            for source in SOURCES:
                facts = compile_image(nvcc, source, folder / f"{source.stem}.fatbin")
                (folder / f"{source.stem}.json").write_text(json.dumps(facts) + "\n")
        except (CompileError, OSError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            if wanted == "1":
                raise
            print(
                f"No CUDA images were built: {error}\n"
                "Vitrail's Triton kernels serve instead. With VITRAIL_CUDA=1 the installation\n"
                "fetches a CUDA compiler where there is none.",
                file=sys.stderr,
            )

    def get_source_files(self) -> list[str]:
        # vitrail._C names the headers
        return [str(path) for path in (*SOURCES, *sorted(Path("csrc").glob("*.py")))]

    def get_outputs(self) -> list[str]:
        built = Path(str(self.build_lib), "vitrail_kernels/images")
        return [str(built / path.name) for path in sorted(self._folder().glob("*"))]

    def get_output_mapping(self) -> dict[str, str]:
        places = map(str, sorted(self._folder().glob("*")))
        return dict(zip(self.get_outputs(), places, strict=True)) if self.editable_mode else {}

    def _folder(self) -> Path:
        if self.editable_mode:
            build_py = self.get_finalized_command("build_py")
            return Path(build_py.get_package_dir("vitrail_kernels"), "images")
        return Path(str(self.build_lib), "vitrail_kernels/images")
