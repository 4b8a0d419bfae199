"""Images to embeddings and class scores: preprocess, group by size, compute in batches."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vitrail.errors import CheckpointError, ImageError, InputError, VitrailError
from vitrail.image import preprocess
from vitrail.image.decoding import SixteenBit
from vitrail.image.sources import PixelInput
from vitrail.model.arguments import Size, check_pixels
from vitrail.model.batches import ACTIVATION_BYTES, ResultRows, in_halves, in_windows
from vitrail.model.crops import (
    CropBatch,
    CropGroup,
    FloatCrops,
    device_batch,
    host_batch,
    resize_bytes,
)
from vitrail.model.layers import first_bad_block
from vitrail.model.preprocessor import Preprocessor
from vitrail.runtime.budget import Call
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
        for group in (
            self._float_groups(images, windows, rows)
            if isinstance(images, Tensor)
            else self._crop_groups(images, windows, batch_size, size, rows)
        ):
            for position, pixels in self._encode_group(group, scores, rows):
                rows.add(position, VitrailError(first_bad_block(self.tower, pixels)))

    def _encode_group(
        self, group: ImageGroup, scores: bool, rows: ResultRows
    ) -> list[tuple[int, Tensor]]:
        """Adds the results of ``group`` to ``rows``, in parts if memory is limited.

        Returns positions and pixels (1, ...) of the images whose result is not finite, on the CPU:
        the reason is found when this batch has given its memory back.
        """
        positions, crops = group.positions, group.crops
        budget, bad = self.tower.runner.budget, list[tuple[int, Tensor]]()

        def compute(part: slice, step: int = group.step) -> None:
            for begin in range(part.start, part.stop, step):
                members = positions[begin : min(begin + step, part.stop)]
                pixels = crops[begin : begin + len(members)]
                results_of = functools.partial(self._results, pixels, scores)
                for items, results in in_halves(results_of, range(len(members))):
                    for item, row in zip(items, results, strict=True):
                        if row is None:
                            bad.append((members[item], pixels[item : item + 1].cpu()))
                        else:
                            rows.add(members[item], row)
                del pixels, results_of  # free this batch before the next is made

        if budget.limit is None:
            compute(slice(0, len(positions)))
            return bad
        call = self._call(crops, scores)
        if not crops.device_bytes:
            budget.in_parts(len(positions), call, compute)
            return bad
        # the crops stay on the device until all of them are computed
        step = min(group.step, budget.most(len(positions), call))
        with budget.hold(call.nbytes(min(step, len(positions))), call):
            compute(slice(0, len(positions)), step)
        return bad

    def _call(self, crops: CropGroup, scores: bool) -> Call:
        """The memory that some images of ``crops`` need, besides all crops on the device."""
        plan = self.tower.pooled_plan(crops.itemsize == 1, scores)
        height, width = crops.size
        pixel_bytes = height * width * self.tower.spec.channels * crops.itemsize
        call = self.tower.call(plan, crops.size, pixel_bytes)
        if not crops.device_bytes:
            return call
        resize, kept = crops.resize_bytes, crops.device_bytes
        return call._replace(
            nbytes=lambda images: max(resize, kept + call.nbytes(images)),
            shape=(call.shape, resize, kept),
        )

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

    def _results(self, batch: Tensor, scores: bool, items: range) -> list[Tensor | None]:
        """For each of ``items`` of ``batch`` its row, on the CPU; None if it is not finite."""
        tower, pixels = self.tower, batch[items.start : items.stop]
        rows = tower.scores(pixels) if scores else tower.embeddings(pixels)["vision.embedding"]
        rows = rows.cpu()
        finite = torch.isfinite(rows).all(dim=1).tolist()
        return [row if ok else None for row, ok in zip(rows, finite, strict=True)]

    def _float_groups(
        self, pixels: Tensor, windows: Iterator[Sequence[int]], rows: ResultRows
    ) -> Iterator[ImageGroup]:
        """Yield preprocessed images, a group for each window."""
        size = self.tower.image_size(pixels)
        for positions in windows:
            yield ImageGroup(positions, FloatCrops(size, pixels, positions), len(positions))
            rows.check()

    def _crop_groups(
        self,
        images: list[PixelInput],
        windows: Iterator[Sequence[int]],
        batch_size: int | None,
        size: Size | None,
        rows: ResultRows,
    ) -> Iterator[ImageGroup]:
        """Yield images that are decoded and cropped here. Adds the errors of the others to
        ``rows``."""
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
                step = batch_size or tower.max_batch(crops.size, ACTIVATION_BYTES)
                yield ImageGroup(positions, crops, step)
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
        room, backend = self._resize_room(size or spec.crop or self.tower.spec.image)
        tasks = preprocess.decode_crop_tasks(
            images,
            spec,
            channels,
            stop_bytes=room,
            size=size,
            sixteen_bit=kind,
            fits=lambda task: backend is None or resize_bytes([task], backend) <= room,
        )
        return device_batch(tasks, self._resizer, room)

    def _resize_room(self, size: Size) -> tuple[int, type[Runner] | None]:
        """Device bytes for decoded images that leave room to compute one of ``size``, and the
        backend that needs them if memory is limited."""
        tower, limit = self.tower, self.tower.runner.budget.limit
        if limit is None:
            return DECODED_BYTES, None
        pixel_bytes = tower.spec.channels * size[0] * size[1]
        plans = [tower.pooled_plan(uint8=True, scores=scores) for scores in self._scores]
        needed = max(tower.call(plan, size, pixel_bytes).nbytes(1) for plan in plans)
        return max(0, min(DECODED_BYTES, limit - needed)), type(tower.runner)

    @property
    def _scores(self) -> tuple[bool, ...]:
        return (False,) if self.tower.head is None else (False, True)


class ImageGroup(NamedTuple):
    """Images of one size. ``positions``: in the call; ``crops``: their pixels, in the same order;
    ``step``: images of a batch."""

    positions: Sequence[int]
    crops: CropGroup
    step: int
