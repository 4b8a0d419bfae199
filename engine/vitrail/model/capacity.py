"""How many items a call takes within a memory limit, known before any weight is read."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from vitrail.errors import InputError, OutOfMemoryError
from vitrail.model.arguments import Resize
from vitrail.model.batches import ACTIVATION_BYTES
from vitrail.model.crops import one_crop_bytes
from vitrail.model.texts import activation_bytes
from vitrail.plan.text import text_dense, text_pooled
from vitrail.plan.vision import vision_dense, vision_pooled, vision_scores
from vitrail.runtime.budget import Call, MemoryBudget
from vitrail.runtime.footprint import Footprint
from vitrail.runtime.memory import PositionTables
from vitrail.runtime.runner import Runner
from vitrail.runtime.towers import max_batch
from vitrail.spec import ModelSpec, VisionSpec


class Capacity(NamedTuple):
    """The memory that calls of a model need. ``backend`` and ``dtype`` compute them; ``resize``: as
    `vitrail.load`."""

    spec: ModelSpec
    backend: type[Runner]
    dtype: torch.dtype
    resize: Resize = "host"

    def one_item(self) -> tuple[int, str]:
        """The bytes that the item of a call that needs most needs, and which item that is."""
        return max((call.nbytes(1), call.item) for call in self._calls())

    def check(self, limit: int) -> None:
        """Raise InputError unless one item of every kind fits ``limit`` bytes."""
        needed, item = self.one_item()
        if needed > limit:
            raise InputError(
                f"memory_limit: got {limit:,} bytes, wanted {needed:,} or more: {item} needs them "
                "beyond the weights"
            )

    def images(self, limit: int | None) -> int | None:
        """How many images, of the size that the preprocessor makes, are computed at once; 0 if not
        even one fits ``limit`` bytes. None without an image tower."""
        vision = self.spec.vision
        if vision is None:
            return None
        tokens, itemsize = vision.tokens_at(self._image_size(vision)), self.dtype.itemsize
        most = max_batch(vision, tokens, itemsize, ACTIVATION_BYTES)
        return min(self._most(limit, most, call) for call in self._image_calls())

    def texts(self, limit: int | None, device: torch.device) -> int | None:
        """The same for texts that fill the context."""
        text = self.spec.text
        if text is None:
            return None
        nbytes = activation_bytes(device)
        most = max_batch(text, text.context, self.dtype.itemsize, nbytes)
        return min(self._most(limit, most, call) for call in self._text_calls())

    def _most(self, limit: int | None, most: int, call: Call) -> int:
        try:
            return MemoryBudget(PositionTables(), limit).most(most, call)
        except OutOfMemoryError:
            return 0

    def _image_size(self, vision: VisionSpec) -> tuple[int, int]:
        image = self.spec.image
        return (None if image is None else image.crop) or vision.image

    def _calls(self) -> Iterator[Call]:
        """Of every kind that users can make: also `Model.forward`, whose outputs do not count."""
        yield from self._image_calls()
        yield from self._text_calls()
        vision, text, head = self.spec.vision, self.spec.text, self.spec.head
        footprint = Footprint(self.backend, self.dtype)
        if vision is not None:
            size = self._image_size(vision)
            pixel_bytes = 4 * vision.channels * size[0] * size[1]
            for taps in ((), tuple(range(vision.blocks.layers + 1))):
                plan = vision_dense(vision, head, taps=taps)
                yield footprint.image_call(plan, vision, size, pixel_bytes, counts_outputs=False)
        if text is not None:
            for taps in ((), tuple(range(text.blocks.layers + 1))):
                plan = text_dense(text, taps=taps, masked=True)
                yield footprint.text_call(plan, text.context, counts_outputs=False)

    def _image_calls(self) -> Iterator[Call]:
        vision, image, head = self.spec.vision, self.spec.image, self.spec.head
        if vision is None:
            return
        size, footprint = self._image_size(vision), Footprint(self.backend, self.dtype)
        numbers = vision.channels * size[0] * size[1]
        # without a preprocessor images are floats; with one, bytes or floats
        for uint8, pixel_bytes in ((True, numbers), (False, 4 * numbers))[image is None :]:
            plans = [vision_pooled(vision, uint8=uint8)]
            if head is not None:
                plans.append(vision_scores(vision, head, uint8=uint8))
            for plan in plans:
                call = footprint.image_call(plan, vision, size, pixel_bytes)
                if uint8 and self.resize == "device":
                    crop = one_crop_bytes(size, vision.channels, self.backend)
                    call = call._replace(nbytes=functools.partial(_with_crops, call, crop))
                yield call

    def _text_calls(self) -> Iterator[Call]:
        text = self.spec.text
        if text is not None:
            footprint = Footprint(self.backend, self.dtype)
            yield footprint.text_call(text_pooled(text), text.context)


def _with_crops(call: Call, crop: int, batch: int) -> int:
    """The images that the device resizes are counted one at a time."""
    return call.nbytes(batch) + crop
