"""CUDA images that were compiled when the package was built, where there was a compiler."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import NamedTuple

IMAGES = files("vitrail_kernels") / "images"


class CudaImage(NamedTuple):
    """Kernels as csrc/cuda_images.py built them.

    ``code`` is a fatbin, as cuModuleLoadData takes it: machine code for ``architectures``, where 80
    is sm_80, and, unless ``ptx`` is None, PTX of that architecture for GPUs that came later.
    """

    code: bytes
    architectures: tuple[int, ...]
    ptx: int | None
    nvcc: str  # version of the compiler

    def __str__(self) -> str:
        targets = ", ".join(f"sm_{arch}" for arch in self.architectures)
        later = "" if self.ptx is None else " and, as PTX, later ones"
        return f"CUDA image for {targets}{later} (nvcc {self.nvcc})"


def cuda_image(name: str) -> CudaImage | None:
    """The image of csrc/``name``.cu; None where none was built."""
    facts = IMAGES / f"{name}.json"  # written after the image: with it, that is whole
    if not facts.is_file():
        return None
    found = json.loads(facts.read_text(encoding="utf-8"))
    code = (IMAGES / f"{name}.fatbin").read_bytes()
    return CudaImage(code, tuple(found["architectures"]), found["ptx"], found["nvcc"])
