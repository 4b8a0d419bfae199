"""Images to embeddings and class scores: preprocess, group by size, compute in batches."""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from vitrail.errors import CheckpointError, ImageError, InputError, VitrailError
from vitrail.image import preprocess
from vitrail.image.decoding import SixteenBit
from vitrail.image.sources import PixelInput
from vitrail.model.arguments import Size, check_pixels
from vitrail.model.batches import ACTIVATION_BYTES, ResultRows, in_halves
from vitrail.model.crops import CropBatch, device_batch, host_batch
from vitrail.model.layers import first_bad_block
from vitrail.model.preprocessor import Preprocessor
from vitrail.runtime.runner import Runner
from vitrail.runtime.towers import VisionTower
from vitrail.spec import ImageSpec

DECODED_IMAGES = 64
"""Images decoded at once, unless the caller names a batch size."""
DECODED_BYTES = 256 << 20
"""Bytes of decoded images, and of their crops, that the device resizes at once."""


class ImageEncoder:
    """The image tower with its preprocessing.

    ``image_spec``: None if ``folder`` has no preprocessor configuration; preprocessed pixels still
    work. ``resizer``: the runner that resizes on its device; None: the host resizes.
    """

    def __init__(
        self,
        tower: VisionTower,
        image_spec: ImageSpec | None,
        resizer: Runner | None,
        sixteen_bit: SixteenBit,
        folder: Path,
    ) -> None:
        self.tower, self.image_spec, self.folder = tower, image_spec, folder
        self._resizer = resizer
        self._sixteen_bit: SixteenBit = sixteen_bit

    def encode(
        self,
        images: Tensor | list[PixelInput],
        batch_size: int | None,
        size: Size | None,
        strict: bool,
        scores: bool = False,
    ) -> ResultRows:
        """The embedding (D,) fp32 of each image, or its class scores.

        ``images``: preprocessed floats (N, C, H, W), or a list of single images. ``strict``: raise
        the first error as soon as its batch is done.
        """
        rows = ResultRows(strict)
        for positions, pixels in (
            self._pixel_batches(images, batch_size, size, rows)
            if isinstance(images, Tensor)
            else self._crop_batches(images, batch_size, size, rows)
        ):
            results_of = functools.partial(self._results, pixels, scores)
            for items, results in in_halves(results_of, range(len(positions))):
                for item, result in zip(items, results, strict=True):
                    rows.add(positions[item], result)
            del pixels, results_of  # free this batch before the next is made
        return rows

    @property
    def preprocessor(self) -> Preprocessor:
        """Raises CheckpointError if there is no preprocessor configuration."""
        spec, tower = self._required_spec("preprocess"), self.tower.spec
        return Preprocessor(spec, tower.channels, tower.image, self._sixteen_bit)

    def _required_spec(self, call: str) -> ImageSpec:
        if self.image_spec is None:
            raise CheckpointError(
                f"{self.folder}: {call} needs preprocessor_config.json (or "
                "processor_config.json), which the folder lacks; preprocessed float pixels work"
            )
        return self.image_spec

    def _results(self, batch: Tensor, scores: bool, items: range) -> list[Tensor | VitrailError]:
        """For each of ``items`` of ``batch`` its row, or an error if the row is not finite."""
        tower, pixels = self.tower, batch[items.start : items.stop]
        rows = tower.scores(pixels) if scores else tower.embeddings(pixels)["vision.embedding"]
        finite = torch.isfinite(rows).all(dim=1).tolist()
        return [
            row if ok else VitrailError(first_bad_block(tower, pixels[item : item + 1]))
            for item, (row, ok) in enumerate(zip(rows, finite, strict=True))
        ]

    def _pixel_batches(
        self, pixels: Tensor, batch_size: int | None, size: Size | None, rows: ResultRows
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Yield the positions and the pixels of each batch; add the errors of other positions."""
        tower = self.tower
        rows.errors |= check_pixels(pixels, tower.spec, self.image_spec, rows.strict)
        pixel_size = tower.image_size(pixels)
        if size is not None and tuple(size) != pixel_size:
            raise InputError(
                f"size: got {tuple(size)} with preprocessed pixels of {pixel_size}; "
                "floats are taken as they are, so leave it out"
            )
        step = batch_size or tower.max_batch(pixel_size, ACTIVATION_BYTES)
        finite = [item for item in range(len(pixels)) if item not in rows.errors]
        for start in range(0, len(finite), step):
            positions = finite[start : start + step]
            begin, end = positions[0], positions[-1] + 1
            adjacent = end - begin == len(positions)
            yield positions, pixels[begin:end] if adjacent else pixels[positions]
            rows.check()

    def _crop_batches(
        self,
        images: list[PixelInput],
        batch_size: int | None,
        size: Size | None,
        rows: ResultRows,
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """The same for images that are decoded and cropped here: uint8 (n, height, width, C)."""
        if not images:
            return
        tower, spec = self.tower, self._required_spec("images")
        max_batch = tower.max_batch(size or spec.crop or tower.spec.image, ACTIVATION_BYTES)
        step = batch_size or min(max_batch, DECODED_IMAGES)
        for start, batch in self._one_ahead(images, step, size):
            for member, error in batch.errors.items():
                rows.add(start + member, error)
            for crops in batch.groups:
                positions = [start + member for member in crops.members]
                (height, width), (patch_height, patch_width) = crops.size, tower.spec.patch
                if height < patch_height or width < patch_width:
                    too_small = ImageError(
                        f"got {width}x{height} pixels after preprocessing, "
                        f"wanted at least one patch of {patch_width}x{patch_height}"
                    )
                    for position in positions:
                        rows.add(position, too_small)
                    continue
                # without a crop, the size of the images is known only now
                max_batch = batch_size or tower.max_batch(crops.size, ACTIVATION_BYTES)
                for begin in range(0, len(positions), max_batch):
                    members = slice(begin, begin + max_batch)
                    yield positions[members], crops[members]
            rows.check()

    def _one_ahead(
        self, images: list[PixelInput], step: int, size: Size | None
    ) -> Iterator[tuple[int, CropBatch]]:
        """Yield the start and the crops of at most ``step`` images at a time.

        The next crops are made on a thread while the caller works on the current ones.
        """
        # a pool of the call's own: a forked process would inherit a dead one from the model
        pool = ThreadPoolExecutor(1, "vitrail-prefetch")
        start, batch = 0, self._crops(images[:step], size)
        try:
            while True:
                following = start + batch.taken
                waiting = images[following : following + step]
                ahead = pool.submit(self._crops, waiting, size) if waiting else None
                yield start, batch
                if ahead is None:
                    return
                start, batch = following, ahead.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _crops(self, images: list[PixelInput], size: Size | None) -> CropBatch:
        """uint8 crops of the first images: all of them, or as many as `DECODED_BYTES` allow."""
        spec, channels = self._required_spec("images"), self.tower.spec.channels
        kind: SixteenBit = self._sixteen_bit
        if self._resizer is None:
            return host_batch(
                preprocess.preprocess_uint8(images, spec, channels, size=size, sixteen_bit=kind)
            )
        tasks = preprocess.decode_crop_tasks(
            images, spec, channels, stop_bytes=DECODED_BYTES, size=size, sixteen_bit=kind
        )
        return device_batch(tasks, self._resizer, DECODED_BYTES)
