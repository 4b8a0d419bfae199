"""The operator `resize` by its Triton kernels, launched through the driver.

They serve if no CUDA binary was built. Their numbers follow from every single image, so they are no
plan; Triton's own launcher would need a C compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from vitrail.plan.kernel_binary import decode_binary, kernel_key
from vitrail_kernels import Call
from vitrail_kernels.compile import source_of
from vitrail_kernels.launch import Target
from vitrail_kernels.ops.resize import resize_calls

if TYPE_CHECKING:
    from vitrail import _C

Record = Callable[[str, Call], bytes]


class TritonResize:
    """Kernels in the context of ``gpu``, loaded when a call first needs them."""

    def __init__(self, gpu: _C.Gpu, target: Target) -> None:
        self._gpu, self._target = gpu, target
        self._loaded: dict[str, tuple[_C.CudaBinary, str, int, int]] = {}

    def __call__(self, stream: int, record: Record, *tensors: Tensor) -> None:
        """`resize_ref` on ``stream``; ``record`` gives the image of a kernel by its key. Raises
        ValueError for another shape, dtype or layout, and `_C.DriverError`."""
        for call in resize_calls(self._target, *tensors):
            if call.grid.blocks == 0:
                continue
            image, function, threads, shared = self._kernel(call, record)
            arguments = _arguments(call, self._target.arch)
            blocks = call.grid.blocks
            image.launch(function, blocks, (threads, 1), arguments, stream, False, shared)

    def _kernel(self, call: Call, record: Record) -> tuple[_C.CudaBinary, str, int, int]:
        from vitrail import _C

        key = kernel_key(call, self._target.arch)
        if key not in self._loaded:
            function, threads, shared, cubin = decode_binary(record(key, call))
            self._loaded[key] = _C.CudaBinary(self._gpu, cubin), function, threads, shared
        return self._loaded[key]


def _arguments(call: Call, arch: int) -> list[tuple[int, int]]:
    """(value, bytes) of every parameter; Triton's two for scratch memory come last."""
    values = []
    for name, type_name in source_of(call, arch)[0].signature.items():
        value = call.arguments[name]
        if type_name.startswith("*"):
            values.append((value.data_ptr(), 8))
        elif type_name != "constexpr":
            assert type_name == "i32", f"{name}: got a parameter of type {type_name}"
            values.append((value, 4))
    return [*values, (0, 8), (0, 8)]
