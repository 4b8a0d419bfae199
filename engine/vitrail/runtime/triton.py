"""The backend "triton": launches the Triton kernels from Python, on CUDA or in the interpreter."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from vitrail import fork
from vitrail.errors import InputError, VitrailError
from vitrail.plan.plan import Step
from vitrail.runtime.runner import Runner
from vitrail_kernels import OPERATORS
from vitrail_kernels.compile import provenance
from vitrail_kernels.launch import Target, target_of
from vitrail_kernels.toolchain import triton_cache


@contextmanager
def _compiler_errors() -> Iterator[None]:
    """Errors of Triton's cache are raised as a VitrailError that names the folder."""
    try:
        yield
    except (OSError, json.JSONDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise VitrailError(
            f"triton backend: triton's cache in {triton_cache()}: {reason}; empty that folder, or "
            "name another one by TRITON_CACHE_DIR"
        ) from error


class TritonRunner(Runner):
    """Runs plans in fp16 or bf16 (fp32 in the interpreter) with Vitrail's own kernels."""

    name = "triton"

    @property
    def identity(self) -> str:
        try:
            return provenance(self.target)
        except ValueError as error:  # raised for a user's own tuning table
            raise InputError(str(error)) from error

    @fork.CachedProperty
    def target(self) -> Target:
        """The GPU that kernels are launched on."""
        return target_of(self.weights.arena)

    @property
    def resizer(self) -> str:
        return "Triton kernels"

    def _resize(self, *tensors: Tensor) -> None:
        with _compiler_errors():
            OPERATORS["resize"].launch(*tensors)

    def run_steps(self, steps: Sequence[Step], tensors: Mapping[str, Tensor], longest: int) -> None:
        with _compiler_errors():
            super().run_steps(steps, tensors, longest)

    def run_step(self, step: Step, arguments: Mapping[str, Tensor], longest: int) -> None:
        OPERATORS[step.op].launch(**arguments, **step.resolve(longest))
