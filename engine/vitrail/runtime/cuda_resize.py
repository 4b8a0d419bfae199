"""The operator `resize` by its CUDA kernels, csrc/resize.cu, launched through the driver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitrail_kernels.cuda_binary import CudaBinary, cuda_binary
from vitrail_kernels.launch import cdiv
from vitrail_kernels.ops.resize import check_resize

if TYPE_CHECKING:
    from vitrail import _C

REFUSED = {200, 209, 218, 221, 222, 223}
"""CUresults for a binary that a GPU or its driver cannot use: it is invalid, has no machine code
for the GPU, or its PTX is invalid, has no compiler, is too new, or may not be compiled."""

ACROSS, DOWN = "vitrail_resize_across", "vitrail_resize_down"
LANES, ROWS, THREADS = 32, 4, 128  # as resize.cu has them
OVERLAPPING = (9, 0)
"""The lowest capability on which a kernel may start before the previous one has ended."""


class CudaResize:
    """The kernels of a CUDA binary in the context of a GPU.

    ``overlap``: the second kernel may start before the first has ended, if the GPU supports it.
    Raises `_C.DriverError` if the driver refuses the binary.
    """

    def __init__(self, gpu: _C.Gpu, binary: CudaBinary, overlap: bool = False) -> None:
        from vitrail import _C

        self.binary = binary
        self._kernels = _C.CudaBinary(gpu, binary.code)
        self._overlap = overlap and gpu.capability >= OVERLAPPING
        # launches of 0 blocks: a driver that loads lazily reports only now whether it can
        none = torch.empty(0, device="cpu")
        self._kernels.launch(ACROSS, 0, (LANES, ROWS), _arguments([none] * 5, [0] * 3), 0, False)
        self._kernels.launch(DOWN, 0, (THREADS, 1), _arguments([none] * 4, [0] * 3), 0, False)

    def __call__(
        self,
        stream: int,
        out: Tensor,
        middle: Tensor,
        pixels: Tensor,
        images: Tensor,
        groups: Tensor,
        taps: Tensor,
    ) -> None:
        """`resize_ref` on ``stream``. Raises ValueError for another shape, dtype or layout, and
        `_C.DriverError`."""
        check_resize(out, middle, pixels, images, groups, taps)
        batch, height, width, channels = out.shape
        numbers, stride = width * channels, middle.shape[1]
        self._kernels.launch(
            ACROSS,
            groups.numel() * cdiv(numbers, LANES),
            (LANES, ROWS),
            _arguments((middle, pixels, images, groups, taps), (width, stride, channels)),
            stream,
            False,  # this kernel must not overlap the caller's work on the stream
        )
        self._kernels.launch(
            DOWN,
            batch * cdiv(height * (stride // 16), THREADS),
            (THREADS, 1),
            _arguments((out, middle, images, taps), (height, numbers, stride)),
            stream,
            self._overlap,
        )


def _arguments(tensors: Sequence[Tensor], numbers: Sequence[int]) -> list[tuple[int, int]]:
    return [*((tensor.data_ptr(), 8) for tensor in tensors), *((number, 4) for number in numbers)]


def open_resize(gpu: _C.Gpu, overlap: bool = False) -> CudaResize | str:
    """The kernels in the context of ``gpu``, or the reason why they cannot be used.

    Raises `_C.DriverError` if the driver fails for a reason other than the binary.
    """
    from vitrail import _C

    binary = cuda_binary("resize")
    if binary is None:
        return "no CUDA binary was built"
    try:
        return CudaResize(gpu, binary, overlap)
    except _C.DriverError as error:
        if error.code not in REFUSED:
            raise
        return f"the driver refuses the {binary}: {error}"
