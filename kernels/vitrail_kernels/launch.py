"""Kernel calls as values: what an operator launches, apart from the launching.

An operator's ``<op>_calls(target, ...)`` gives its `Call`s. The launcher runs them on the tensors'
device, `vitrail_kernels.compile` compiles the very same calls for any GPU without one, and the
interpreter of Triton runs them on the CPU. Importable without triton.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from vitrail_kernels.configs import KernelConfig, Ladder

OLDEST_TRITON = "3.6"


def _why_no_triton(error: ImportError) -> ImportError:
    """The reason in words, ready to be shown: absent, too old, or damaged."""
    version = getattr(sys.modules.get("triton"), "__version__", None)
    if isinstance(error, ModuleNotFoundError) and error.name == "triton":
        return ImportError("triton is not installed")
    if version is not None and isinstance(error, ModuleNotFoundError):
        return ImportError(f"triton {version} is too old, wanted {OLDEST_TRITON} or later")
    return ImportError(f"triton does not load: {error}")


try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:  # CPUs and platforms that triton has no wheel for
    MISSING: ImportError | None = _why_no_triton(error)
    """Why there are no kernels, in words."""
    triton = tl = TensorDescriptor = None
else:
    MISSING = None

__all__ = [
    "INTERPRETED",
    "INTERPRETING",
    "MISSING",
    "Call",
    "Grid",
    "Target",
    "cdiv",
    "check_tensor",
    "descriptor",
    "fits_descriptor",
    "interpreted",
    "jit",
    "launch",
    "target_of",
    "tl",
    "triton_version",
]

_F = TypeVar("_F", bound=Callable[..., Any])


def jit(*, varying: Sequence[str] = ()) -> Callable[[_F], Any]:
    """`triton.jit`; ``varying`` names integers that change between calls and never recompile.

    Where triton is not installed the function stays as it is, to be refused at launch.
    """

    def decorate(function: _F) -> Any:
        return function if triton is None else triton.jit(function, do_not_specialize=list(varying))

    return decorate


TMA = "VITRAIL_TMA"
"""Set to 0: no kernel uses tensor maps, as before sm_90. For GPUs or drivers on which they hang."""


def _maps() -> bool:
    return os.environ.get(TMA) != "0"


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU: ``arch`` as 80, 86, 89, 90, 100 or 120, and its number of multiprocessors.

    ``maps``: whether kernels may use tensor maps; VITRAIL_TMA decides if it is left out.
    """

    arch: int
    sms: int
    maps: bool = field(default_factory=_maps)

    @property
    def tcgen05(self) -> bool:
        """Multiplies by datacentre Blackwell's tensor cores, whose sums are not in registers."""
        return 100 <= self.arch < 120

    @property
    def tma(self) -> bool:
        """Loads and stores whole tiles by tensor descriptors (sm_90 and later)."""
        return self.arch >= 90 and self.maps

    @property
    def without_tma(self) -> bool:
        """It has tensor maps, and they are switched off."""
        return self.arch >= 90 and not self.maps

    @property
    def pdl(self) -> bool:
        """Kernels wait for the one before them by an instruction, see `device.overlap`."""
        return self.arch >= 90 and not interpreted()


INTERPRETED = Target(arch=90, sms=3)
"""Stands for the CPU, where Triton's interpreter runs the kernels."""


@functools.lru_cache(maxsize=64)
def _cuda(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)


def target_of(tensor: Tensor) -> Target:
    """The GPU that holds ``tensor``, or `INTERPRETED`. Raises RuntimeError where none can run."""
    if MISSING is not None:
        raise RuntimeError(f"kernels: {MISSING}") from MISSING
    if tensor.device.type == "cuda":
        return _cuda(tensor.device.index)
    if not interpreted():
        raise RuntimeError(
            f"kernels: got a tensor on {tensor.device}, wanted CUDA (or TRITON_INTERPRET=1 before "
            "the first import)"
        )
    return INTERPRETED


def triton_version() -> str | None:
    """The version of triton, under whatever name it was installed; None without it."""
    return None if triton is None else str(triton.__version__)


INTERPRETING = "TRITON_INTERPRET=1 is set, with which triton compiles nothing: unset it"


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels of this process."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, slots=True)
class Grid:
    """Blocks of a launch: times * ceil(rows / block), at most limit where there is one.

    ``rows`` and ``times`` are each affine in sequences, tokens and the longest sequence, so that
    whoever holds the call knows the grid of any other size.
    """

    rows: int
    block: int = 1
    times: int = 1
    limit: int | None = None

    @property
    def blocks(self) -> int:
        """How many blocks there are, in one dimension; may be 0."""
        wanted = self.times * cdiv(self.rows, self.block)
        return wanted if self.limit is None else min(wanted, self.limit)


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel launch: every parameter of ``kernel`` by name, and how it is configured.

    Where ``config`` depends on the call's size, ``ladder`` gives all of them, by the tuned table in
    force when it is asked: (largest rows, configuration), ascending, up to 2^31. A call of ``rows``
    takes the first that reaches so far.
    """

    kernel: Any
    grid: Grid
    arguments: Mapping[str, Any]
    config: KernelConfig
    rows: int = 0
    ladder: Callable[[], Ladder] | None = None

    def launch(self) -> None:
        """Launch on the current stream of the current device; nothing for a grid of 0 blocks."""
        blocks = self.grid.blocks
        if blocks:
            with _LAUNCHING:
                self.kernel[(blocks,)](**self.arguments, **self.config.options())


_LAUNCHING = threading.Lock()
"""Triton hands a kernel that one thread is still loading to another, which then has no function."""


def launch(calls: Sequence[Call]) -> None:
    """Launch in order, on the current stream of the device that holds the arguments."""
    for call in calls:
        tensor = next(a for a in call.arguments.values() if isinstance(a, Tensor))
        if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                call.launch()
        else:
            call.launch()


def descriptor(tensor: Tensor, rows: int, columns: int) -> Any:
    """A tensor map over a 2-D row-major ``tensor`` in tiles of (rows, columns)."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


def fits_descriptor(*tensors: Tensor) -> bool:
    """Whether tensor maps can describe these: 16-byte bases and rows, whole rows, not empty."""
    return all(
        t.data_ptr() % 16 == 0
        and t.stride(-1) == 1
        and t.stride(0) * t.element_size() % 16 == 0
        and t.numel() > 0
        for t in tensors
    )


def check_tensor(
    name: str, got: Tensor | None, like: Tensor, dtype: torch.dtype, shape: Sequence[int]
) -> None:
    """Raises ValueError unless ``got`` is None, or contiguous, of this dtype and shape, and on the
    device of ``like``."""
    if got is None:
        return
    if got.device != like.device:
        raise ValueError(f"{name}: got a tensor on {got.device}, wanted {like.device}")
    if got.dtype != dtype:
        raise ValueError(f"{name}: got {got.dtype}, wanted {dtype}")
    if tuple(got.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(got.shape)}, wanted {tuple(shape)}")
    if not got.is_contiguous():
        raise ValueError(
            f"{name}: got strides {got.stride()} for {tuple(shape)}, wanted contiguous"
        )


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
