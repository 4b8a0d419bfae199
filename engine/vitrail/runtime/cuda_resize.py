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
"""CUresults of an image that a GPU or its driver cannot use: invalid, no machine code for the GPU,
and PTX that is invalid, has no compiler, is too new, or may not be compiled."""

ACROSS, DOWN = "vitrail_resize_across", "vitrail_resize_down"
LANES, ROWS, THREADS = 32, 4, 128  # as resize.cu has them
OVERLAPPING = (9, 0)
"""The oldest capability on which a kernel may begin before the one before it has ended."""


class CudaResize:
    """An image's kernels in the context of a GPU. ``image`` says what was loaded.

    ``overlap``: the second is launched before the first has ended, where the GPU can. Raises
    `_C.DriverError` where the driver refuses the image.
    """

    def __init__(self, gpu: _C.Gpu, image: CudaBinary, overlap: bool = False) -> None:
        from vitrail import _C

        self.image = image
        self._loaded = _C.CudaBinary(gpu, image.code)
        self._overlap = overlap and gpu.capability >= OVERLAPPING
        # a driver that loads lazily says only now whether it can
        none = torch.empty(0, device="cpu")
        self._loaded.launch(ACROSS, 0, (LANES, ROWS), _arguments([none] * 5, [0] * 3), 0, False)
        self._loaded.launch(DOWN, 0, (THREADS, 1), _arguments([none] * 4, [0] * 3), 0, False)

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
        self._loaded.launch(
            ACROSS,
            groups.numel() * cdiv(numbers, LANES),
            (LANES, ROWS),
            _arguments((middle, pixels, images, groups, taps), (width, stride, channels)),
            stream,
            False,  # what was on the stream before is not ours, and may not be overlapped
        )
        self._loaded.launch(
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
    """The kernels in the context of ``gpu``, or why they are not there.

    Raises `_C.DriverError` where the driver fails for a reason that is not the image's.
    """
    from vitrail import _C

    image = cuda_binary("resize")
    if image is None:
        return "no CUDA binary was built"
    try:
        return CudaResize(gpu, image, overlap)
    except _C.DriverError as error:
        if error.code not in REFUSED:
            raise
        return f"the driver refuses the {image}: {error}"
