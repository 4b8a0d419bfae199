"""A GPU that computes and is not there: a driver stand-in with the emulator behind it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import standin
from standin.emulation import Emulation
from vitrail.errors import DeviceError
from vitrail.exported.folder import ExportFolder
from vitrail.model import loading
from vitrail.plan.kernel_binary import encode_binary
from vitrail.runtime import triton
from vitrail.runtime.native import NativeRunner, Size, _CachedPlan, _SizeEntry
from vitrail.weights.layout import Weights
from vitrail_kernels.compile import compile_kernel
from vitrail_kernels.launch import Call, Target

CPU = torch.device("cpu")


def unedited(call: Call, ptx: str) -> str:
    """The PTX as it was compiled."""
    return ptx


class Device:
    """A stand-in of its own, of ``arch`` (90 for sm_90) with ``sms`` multiprocessors; or, with
    ``beside``, one more device of that stand-in."""

    def __init__(self, folder: Path, arch: int, sms: int, beside: Device | None = None) -> None:
        self.arch, self.target = arch, Target(arch, sms)
        if beside is None:
            library = Path(shutil.copy(standin.build(), folder / f"libcuda_{arch}_{sms}.so.1"))
            self.driver, self.ordinal = standin.Standin(library), 0
            self.driver.device(arch // 10, arch % 10, sms)
            self.emulation = Emulation(self.driver)
        else:
            self.driver, self.emulation = beside.driver, beside.emulation
            self.ordinal = self.driver.add_device(arch // 10, arch % 10, sms)
        self.edit: Callable[[Call, str], str] = unedited
        """Plants faults: what runs in place of a kernel's PTX."""

    def compile(self, call: Call) -> Any:
        """Triton's kernel of ``call``, which computes once it is loaded."""
        kernel = compile_kernel(call, self.arch)
        self.emulation.source(kernel.asm["cubin"], self.edit(call, kernel.asm["ptx"]))
        return kernel

    def hold(self, tensor: Tensor, name: str, *, written: bool = True) -> None:
        """Make ``tensor`` device memory: kernels may use its bytes and none beside them."""
        if tensor.numel() == 0:
            return
        size = tensor.numel() * tensor.element_size()
        self.driver.register(tensor.data_ptr(), size, self.ordinal)
        self.emulation.name(tensor.data_ptr(), name, written=written)

    def release(self, tensor: Tensor) -> None:
        """`hold` no longer."""
        if tensor.numel():
            self.driver.unregister(tensor.data_ptr())

    def check_written(self, tensor: Tensor) -> None:
        """Raises ValueError if kernels left some bytes of ``tensor`` unwritten."""
        if tensor.numel():
            size = tensor.numel() * tensor.element_size()
            self.emulation.check_written(tensor.data_ptr(), size)


class EmulatedRunner(NativeRunner):
    """The native runner on a `Device`. Every tensor of a call is device memory of its own, and
    every output must be written in full. Raises DeviceError for a fault of a kernel."""

    def __init__(
        self,
        device: Device,
        weights: Weights,
        dtype: torch.dtype,
        exported: ExportFolder | None = None,
    ) -> None:
        super().__init__(weights, dtype, CPU, str(device.driver.path), exported, device.ordinal)
        self._emulated = device
        self._held: dict[int, Tensor] = {}
        self._exact = True  # whether the arena has just the rows of the call
        for name, tensor in weights.tensors.items():
            if not self._inside(tensor):
                device.hold(tensor, f"weight {name}")
                self._held[tensor.data_ptr()] = tensor
        self._weights = dict(self._held)

    def _inside(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is part of another that is held, as queries are of a fused matrix."""
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        return any(
            at <= start and stop <= at + held.numel() * held.element_size()
            for at, held in self._held.items()
        )

    def close(self) -> None:
        """Give the weights back."""
        while self._weights:
            self._emulated.release(self._weights.popitem()[1])

    def _record(self, key: str, call: Call) -> bytes:
        return encode_binary(key, call, self.target.arch, self._emulated.compile(call))

    def _hold(self, tensor: Tensor, name: str, written: bool) -> Tensor:
        if tensor.data_ptr() not in self._held:
            self._emulated.hold(tensor, name, written=written)
            self._held[tensor.data_ptr()] = tensor
        return tensor

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = super()._empty(shape, dtype)
        if dtype == torch.uint8:
            return self._hold(tensor.fill_(0xFF), "the arena", written=not self._exact)
        name = f"output {shape} of {str(dtype).removeprefix('torch.')}"
        return self._hold(tensor, name, written=False)

    def _input(self, buffer: Any, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        return self._hold(super()._input(buffer, tensor, shape), buffer.name, written=True)

    def _execute(
        self, cached: _CachedPlan, external: Iterable[Tensor], size: Size, entry: _SizeEntry
    ) -> None:
        # Tensor maps describe a capacity: loads reach rows past the call's, of which nothing
        # comes (tests/interpreted/test_capacity.py): there the arena is NaN, and not tracked.
        self._exact = entry.capacity == size
        try:
            super()._execute(cached, external, size, entry)
            self._emulated.emulation.finish()
        except (DeviceError, ValueError) as error:
            complaint = self._emulated.driver.complaint()
            raise DeviceError(f"{cached.plan.name}: {complaint}") from error

    def _outputs(
        self, cached: _CachedPlan, inputs: Mapping[str, Tensor], size: Size
    ) -> dict[str, Tensor]:
        try:
            out = super()._outputs(cached, inputs, size)
            for tensor in out.values():
                self._emulated.check_written(tensor)
            return out
        finally:
            for at in self._held.keys() - self._weights.keys():
                self._emulated.release(self._held.pop(at))


@contextmanager
def served_by(
    open_runner: Callable[[Weights, torch.dtype, ExportFolder | None], EmulatedRunner],
    target: Target,
) -> Iterator[None]:
    """`vitrail.load` opens runners with ``open_runner``, and fingerprints are of ``target``."""

    def native(
        weights: Weights, dtype: torch.dtype, device: Any, exported: ExportFolder | None
    ) -> EmulatedRunner:
        return open_runner(weights, dtype, exported)

    native.name = "native"  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loading, "NativeRunner", native)
        patched.setattr(loading, "choose", lambda *_: "native")
        patched.setattr(triton, "target_of", lambda _: target)
        yield
