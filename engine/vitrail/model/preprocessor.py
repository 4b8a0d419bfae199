"""`Preprocessor`: images to pixels by the specification alone, in any process, without weights.

Unpickling it imports neither the backends nor Triton nor the reader of checkpoints.
"""

from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from vitrail.errors import InputError, VitrailError
from vitrail.image.decoding import SixteenBit
from vitrail.image.geometry import spec_at
from vitrail.image.preprocess import preprocess_float
from vitrail.model.arguments import Images, OnError, Size, check_options, list_images
from vitrail.model.batches import ResultRows
from vitrail.model.outputs import PreprocessResult
from vitrail.spec import ImageSpec
from vitrail.torch_modes import public_call


@dataclass(frozen=True, slots=True)
class Preprocessor:
    """A model's preprocessing, for example in the workers of a DataLoader: small and picklable.

    ``spec``: the steps of the processor. ``channels``, ``image_size`` (height, width): of the image
    tower. ``sixteen_bit``: as `vitrail.load` was told. Equal values preprocess alike, bit for bit.
    """

    spec: ImageSpec
    channels: int
    image_size: Size
    sixteen_bit: SixteenBit = "scale"

    @overload
    def __call__(
        self, images: Images, *, size: Size | None = ..., on_error: Literal["raise"] = ...
    ) -> Tensor: ...

    @overload
    def __call__(
        self, images: Images, *, size: Size | None = ..., on_error: Literal["skip"]
    ) -> PreprocessResult: ...

    @overload
    def __call__(
        self, images: Images, *, size: Size | None = ..., on_error: OnError
    ) -> Tensor | PreprocessResult: ...

    @public_call
    def __call__(
        self, images: Images, *, size: Size | None = None, on_error: OnError = "raise"
    ) -> Tensor | PreprocessResult:
        """Images to ``pixel_values`` (N, channels, H, W) float32, as `Model.preprocess`.

        Raises ImageError: an image cannot be read. InputError: a wrong argument, or images that
        come out in several sizes.
        """
        check_options(None, size, on_error)
        decoded = preprocess_float(
            list_images(images), self.spec, self.channels, size=size, sixteen_bit=self.sixteen_bit
        )
        rows = ResultRows(strict=on_error == "raise")
        for position, image in enumerate(decoded):
            rows.add(
                position, image if isinstance(image, VitrailError) else torch.from_numpy(image)
            )
        rows.check()
        # numpy's copy needs no threads of PyTorch, which a forked process has lost
        pixels = [image for image in decoded if not isinstance(image, VitrailError)]
        if len(sizes := {image.shape[1:] for image in pixels}) > 1:
            raise InputError(
                f"preprocess: got images of sizes {sorted(sizes)}, wanted one size a batch"
            )
        if pixels:
            stacked = torch.from_numpy(np.stack(pixels))
        else:
            shape = self.channels, *self._output_size(size)
            stacked = torch.empty(0, *shape, dtype=torch.float32, device="cpu")
        return stacked if rows.strict else PreprocessResult(stacked, rows.index, rows.reasons)

    def _output_size(self, size: Size | None) -> Size:
        """The (height, width) of a batch without images."""
        sized = spec_at(self.spec, size)
        if sized.crop is not None:
            return sized.crop
        if sized.resize is not None and sized.resize[0] == "exact":
            return sized.resize[1], sized.resize[2]
        return self.image_size
