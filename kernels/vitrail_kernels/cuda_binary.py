"""CUDA binaries: kernels of csrc/*.cu, compiled when the package was built with a CUDA compiler."""

import json
from importlib.resources import files
from typing import NamedTuple

FOLDER = files("vitrail_kernels") / "binaries"


class CudaBinary(NamedTuple):
    """A fatbin that csrc/cuda_binaries.py built.

    ``code`` is what cuModuleLoadData takes. It holds machine code for ``architectures`` (80 is
    sm_80) and, unless ``ptx`` is None, PTX of that architecture for later GPUs. ``nvcc`` is the
    compiler's version.
    """

    code: bytes
    architectures: tuple[int, ...]
    ptx: int | None
    nvcc: str

    def __str__(self) -> str:
        targets = ", ".join(f"sm_{arch}" for arch in self.architectures)
        later = "" if self.ptx is None else " and, as PTX, later ones"
        return f"CUDA binary for {targets}{later} (nvcc {self.nvcc})"


def cuda_binary(name: str) -> CudaBinary | None:
    """The binary of csrc/``name``.cu; None if it was not built."""
    description = FOLDER / f"{name}.json"  # written last: if it exists, the fatbin is complete
    if not description.is_file():
        return None
    fields = json.loads(description.read_text(encoding="utf-8"))
    code = (FOLDER / f"{name}.fatbin").read_bytes()
    return CudaBinary(code, tuple(fields["architectures"]), fields["ptx"], fields["nvcc"])
