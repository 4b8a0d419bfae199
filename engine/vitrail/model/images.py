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
from vitrail.model.batches import ACTIVATION_BYTES, ResultRows, in_halves, in_windows
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
        the first error as soon as its window is done.
        """
        rows = ResultRows(strict)
        if positions := self.positions(images, size, rows):
            windows = in_windows(positions, self.step(images, batch_size, size))
            self.encode_windows(images, windows, batch_size, size, rows, scores)
        return rows

    def positions(
        self, images: Tensor | list[PixelInput], size: Size | None, rows: ResultRows
    ) -> Sequence[int]:
        """The positions of the images to compute. Adds the errors of the others to ``rows``."""
        if not isinstance(images, Tensor):
            return range(len(images))
        tower = self.tower
        rows.errors |= check_pixels(images, tower.spec, self.image_spec, rows.strict)
        pixel_size = tower.image_size(images)
        if size is not None and tuple(size) != pixel_size:
            raise InputError(
                f"size: got {tuple(size)} with preprocessed pixels of {pixel_size}; "
                "floats are taken as they are, so leave it out"
            )
        return [item for item in range(len(images)) if item not in rows.errors]

    def step(
        self, images: Tensor | list[PixelInput], batch_size: int | None, size: Size | None
    ) -> int:
        """The number of images in a window."""
        tower = self.tower
        if isinstance(images, Tensor):
            return batch_size or tower.max_batch(tower.image_size(images), ACTIVATION_BYTES)
        spec = self._required_spec("images")
        max_batch = tower.max_batch(size or spec.crop or tower.spec.image, ACTIVATION_BYTES)
        return batch_size or min(max_batch, DECODED_IMAGES)

    def encode_windows(
        self,
        images: Tensor | list[PixelInput],
        windows: Iterator[Sequence[int]],
        batch_size: int | None,
        size: Size | None,
        rows: ResultRows,
        scores: bool,
    ) -> None:
        """Adds the results of the images at the positions of each window to ``rows``.

        No batch has images of two windows. Images to be decoded are decoded a window ahead.
        """
        for positions, pixels in (
            self._pixel_batches(images, windows, rows)
            if isinstance(images, Tensor)
            else self._crop_batches(images, windows, batch_size, size, rows)
        ):
            results_of = functools.partial(self._results, pixels, scores)
            for items, results in in_halves(results_of, range(len(positions))):
                for item, result in zip(items, results, strict=True):
                    rows.add(positions[item], result)
            del pixels, results_of  # free this batch before the next is made

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
        self, pixels: Tensor, windows: Iterator[Sequence[int]], rows: ResultRows
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Yield the positions and the pixels of each batch."""
        for positions in windows:
            begin, end = positions[0], positions[-1] + 1
            adjacent = end - begin == len(positions)
            yield positions, pixels[begin:end] if adjacent else pixels[positions]
            rows.check()

    def _crop_batches(
        self,
        images: list[PixelInput],
        windows: Iterator[Sequence[int]],
        batch_size: int | None,
        size: Size | None,
        rows: ResultRows,
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """The same for images that are decoded and cropped here: uint8 (n, height, width, C).

        Adds the errors of other positions to ``rows``.
        """
        tower = self.tower
        for window, batch in self._one_ahead(images, windows, size):
            for member, error in batch.errors.items():
                rows.add(window[member], error)
            for crops in batch.groups:
                positions = [window[member] for member in crops.members]
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
        self, images: list[PixelInput], windows: Iterator[Sequence[int]], size: Size | None
    ) -> Iterator[tuple[Sequence[int], CropBatch]]:
        """Yield the positions and the crops of each window; in parts, if a window's images have too
        many bytes.

        The next crops are made on a thread while the caller works on the current ones.
        """
        window = next(windows, ())
        # a pool of the call's own: a forked process would inherit a dead one from the model
        pool = ThreadPoolExecutor(1, "vitrail-prefetch")
        try:
            batch = self._crops([images[position] for position in window], size)
            while window:
                following = window[batch.taken :] or next(windows, ())
                waiting = [images[position] for position in following]
                ahead = pool.submit(self._crops, waiting, size) if waiting else None
                yield window[: batch.taken], batch
                if ahead is None:
                    return
                window, batch = following, ahead.result()
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
