"""Kernel launches as values.

An operator's ``<op>_calls(target, ...)`` returns its `Call`s and launches nothing. `launch` runs
calls on the device of their tensors, `vitrail_kernels.compile` compiles the same calls for any GPU
without having that GPU, and Triton's interpreter runs them on the CPU. This module imports without
triton.
"""

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from vitrail_kernels.configs import KernelConfig, Ladder
from vitrail_kernels.fork_lock import fork_lock

OLDEST_TRITON = "3.6"


def _why_no_triton(error: ImportError) -> ImportError:
    """Why triton cannot be imported: it is absent, too old or damaged."""
    version = getattr(sys.modules.get("triton"), "__version__", None)
    if isinstance(error, ModuleNotFoundError) and error.name == "triton":
        return ImportError("triton is not installed")
    if version is not None and isinstance(error, ModuleNotFoundError):
        return ImportError(f"triton {version} is too old, wanted {OLDEST_TRITON} or later")
    return ImportError(f"triton does not load: {error}")


try:
    import triton
    import triton.language
    from triton.tools.tensor_descriptor import TensorDescriptor

    tl = triton.language
except ImportError as error:  # CPU-only machines, and platforms without a triton wheel
    MISSING: ImportError | None = _why_no_triton(error)
    """Why triton, and with it every kernel, is missing; None if triton is here."""
    triton = tl = TensorDescriptor = None
else:
    MISSING = None

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""The floating-point dtypes that kernels compute in; float32 only in the interpreter."""

_F = TypeVar("_F", bound=Callable[..., Any])


def jit(*, varying: Sequence[str] = ()) -> Callable[[_F], Any]:
    """`triton.jit`. A new value of an integer named in ``varying`` never compiles the kernel again.

    Without triton the function is returned unchanged; `target_of` refuses to launch it.
    """

    def decorate(function: _F) -> Any:
        return function if triton is None else triton.jit(function, do_not_specialize=list(varying))

    return decorate


TMA = "VITRAIL_TMA"
"""Environment variable: 0 turns tensor maps off, for GPUs or drivers on which they hang."""


def _tensor_maps_allowed() -> bool:
    return os.environ.get(TMA) != "0"


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU: its architecture (``arch`` 80, 86, 89, 90, 100 or 120) and its multiprocessors.

    ``maps`` says whether kernels may use tensor maps. VITRAIL_TMA sets the default.
    """

    arch: int
    sms: int
    maps: bool = field(default_factory=_tensor_maps_allowed)

    @property
    def tcgen05(self) -> bool:
        """Whether it has data center Blackwell's tensor cores, whose sums are not in registers."""
        return 100 <= self.arch < 120

    @property
    def tma(self) -> bool:
        """Whether kernels load and store whole tiles by tensor maps (sm_90 and later)."""
        return self.arch >= 90 and self.maps

    @property
    def without_tma(self) -> bool:
        """Whether the GPU has tensor maps but they are turned off."""
        return self.arch >= 90 and not self.maps

    @property
    def pdl(self) -> bool:
        """Whether kernels run the instructions of `wait_for_previous` (dependent launch)."""
        return self.arch >= 90 and not interpreted()


INTERPRETED = Target(arch=90, sms=3)
"""The target of kernels that Triton's interpreter runs on the CPU."""


@functools.lru_cache(maxsize=64)
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)


def target_of(tensor: Tensor) -> Target:
    """The GPU that holds ``tensor``, or `INTERPRETED`. Raises RuntimeError if no kernel can run."""
    if MISSING is not None:
        raise RuntimeError(f"kernels: {MISSING}") from MISSING
    if tensor.device.type == "cuda":
        return _cuda_target(tensor.device.index)
    if not interpreted():
        raise RuntimeError(
            f"kernels: got a tensor on {tensor.device}, wanted CUDA (or TRITON_INTERPRET=1 before "
            "the first import)"
        )
    return INTERPRETED


def triton_version() -> str | None:
    """The version of triton; None without triton."""
    return None if triton is None else str(triton.__version__)


INTERPRETING = "TRITON_INTERPRET=1 is set, with which triton compiles nothing: unset it"


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels of this process."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, slots=True)
class Grid:
    """The blocks of a launch: times * ceil(rows / block), and at most ``limit`` unless it is None.

    ``rows`` and ``times`` are affine in the number of sequences, the number of tokens and the
    length of the longest sequence. So the grids of a few calls give the grid of every other call.
    """

    rows: int
    block: int = 1
    times: int = 1
    limit: int | None = None

    @property
    def blocks(self) -> int:
        """The number of blocks, in one dimension; may be 0."""
        blocks = self.times * cdiv(self.rows, self.block)
        return blocks if self.limit is None else min(blocks, self.limit)


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel launch: every argument of ``kernel`` by name, and its configuration.

    ``key`` names the configuration in a tuned table; "" if the configuration is fixed. If the
    configuration depends on the number of rows, ``rows`` is this call's number, and ``ladder()``
    lists the configurations for all numbers, by the tuned table in force when it is called.
    """

    kernel: Any
    grid: Grid
    arguments: Mapping[str, Any]
    config: KernelConfig
    key: str = ""
    rows: int = 0
    ladder: Callable[[], Ladder] | None = None

    def launch(self) -> None:
        """Launch on the current device's current stream; a grid of 0 blocks launches nothing."""
        blocks = self.grid.blocks
        if blocks:
            with _LAUNCHING:
                self.kernel[(blocks,)](**self.arguments, **self.config.options())


_LAUNCHING = fork_lock()
"""Triton loads kernels without a lock: a second thread would get a kernel that has no function."""


def launch(calls: Sequence[Call]) -> None:
    """Launch ``calls`` in order, each on the current stream of the device with its arguments."""
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
    """Whether tensor maps can describe ``tensors``: base and row stride are multiples of 16 bytes,
    rows are contiguous, and no tensor is empty."""
    return all(
        t.data_ptr() % 16 == 0
        and t.stride(-1) == 1
        and t.stride(0) * t.element_size() % 16 == 0
        and t.numel() > 0
        for t in tensors
    )


def check_tensor(
    name: str, tensor: Tensor | None, like: Tensor, dtype: torch.dtype, shape: Sequence[int]
) -> None:
    """Check one optional argument of an operator.

    Raises ValueError unless ``tensor`` is None, or is contiguous, on the device of ``like``, and of
    this dtype and shape.
    """
    if tensor is None:
        return
    if tensor.device != like.device:
        raise ValueError(f"{name}: got a tensor on {tensor.device}, wanted {like.device}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: got {tensor.dtype}, wanted {dtype}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted {tuple(shape)}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name}: got strides {tensor.stride()} for {tuple(shape)}, wanted contiguous"
        )


def cdiv(a: int, b: int) -> int:
    """``a`` / ``b``, rounded up."""
    return -(-a // b)
