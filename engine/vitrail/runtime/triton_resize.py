"""The operator `resize` by its Triton kernels, for the backend "native" without a CUDA binary.

They are launched through the driver, because Triton's own launcher needs a C compiler. They are not
part of a plan, because their integer arguments depend on the size of every image.
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
        """`resize_ref` on ``stream``; ``record`` gives the kernel binary of a call by its key.

        Raises ValueError for another shape, dtype or layout; `_C.DriverError` if the driver fails.
        """
        for call in resize_calls(self._target, *tensors):
            if call.grid.blocks == 0:
                continue
            binary, function, threads, shared = self._kernel(call, record)
            arguments, blocks = _arguments(call, self._target.arch), call.grid.blocks
            binary.launch(function, blocks, (threads, 1), arguments, stream, False, shared)

    def _kernel(self, call: Call, record: Record) -> tuple[_C.CudaBinary, str, int, int]:
        from vitrail import _C

        key = kernel_key(call, self._target.arch)
        if key not in self._loaded:
            function, threads, shared, cubin = decode_binary(record(key, call))
            self._loaded[key] = _C.CudaBinary(self._gpu, cubin), function, threads, shared
        return self._loaded[key]


def _arguments(call: Call, arch: int) -> list[tuple[int, int]]:
    """(value, bytes) of every parameter. The last two are for Triton's scratch memory."""
    values = []
    for name, type_name in source_of(call, arch)[0].signature.items():
        value = call.arguments[name]
        if type_name.startswith("*"):
            values.append((value.data_ptr(), 8))
        elif type_name != "constexpr":
            assert type_name == "i32", f"{name}: got a parameter of type {type_name}"
            values.append((value, 4))
    return [*values, (0, 8), (0, 8)]
