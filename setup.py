"""Packages of both roots and the optional C++ extension. Plain metadata is in pyproject.toml."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

sys.path.insert(0, "csrc")
from cuda_binaries import BuildCudaBinaries

EXTENSION = (
    "cubin",
    "cuda_binary",
    "driver",
    "executor",
    "int8_avx512",
    "int8_avx_vnni",
    "int8_cpu",
    "int8_module",
    "module",
    "plan",
)
LIBRARY = ("csrc/Makefile", "csrc/vitrail.h")
VERSION = runpy.run_path("engine/vitrail/_version.py")["__version__"]


class OptionalExtension(build_ext):
    """Builds ``vitrail._C`` if possible; if not, says why and installs Vitrail in pure Python."""

    def run(self) -> None:
        try:
            super().run()
        except (BaseError, CCompilerError, OSError) as error:
            self.skipped(error)

    def build_extension(self, ext: Pybind11Extension) -> None:
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError, OSError) as error:
            self.skipped(error)

    def skipped(self, error: Exception) -> None:
        print(
            f"vitrail._C was not built: {error}\n"
            "Vitrail is installed in pure Python. For the extension, install a C++ compiler and\n"
            "the Python headers (Debian, Ubuntu: g++ python3-dev), then install Vitrail again.",
            file=sys.stderr,
        )


build.sub_commands.append(("build_cuda_binaries", None))

setup(
    version=VERSION,
    packages=find_packages("engine") + find_packages("kernels"),
    package_dir={
        "vitrail": "engine/vitrail",
        "vitrail_kernels": "kernels/vitrail_kernels",
    },
    package_data={
        "vitrail": ["py.typed", "*.pyi", "assets/*.md", "assets/*/*", "tuned/*.json"],
        "vitrail_kernels": ["py.typed", "*.pyi", "tuned/*.json"],
    },
    ext_modules=[
        Pybind11Extension(
            "vitrail._C",
            [f"csrc/{name}.cpp" for name in EXTENSION],
            # with libvitrail's files: an sdist packs the files that are listed here
            depends=[*map(str, sorted(Path("csrc").glob("*.[ch]pp"))), *LIBRARY],
            cxx_std=17,
            define_macros=[("VITRAIL_VERSION", f'"{VERSION}"')],
            libraries=["dl"] if sys.platform == "linux" else [],
            optional=True,
        )
    ],
    cmdclass={"build_ext": OptionalExtension, "build_cuda_binaries": BuildCudaBinaries},
    zip_safe=False,
)
