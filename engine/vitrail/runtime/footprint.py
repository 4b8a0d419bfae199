"""Device bytes of a call beyond the weights: arena, inputs, outputs, and PyTorch's temporaries."""

import functools
import math
from typing import NamedTuple

import torch

from vitrail.plan.plan import ITEM_BYTES, Plan
from vitrail.plan.vision import vision_table
from vitrail.runtime.budget import Call
from vitrail.runtime.runner import Runner
from vitrail.spec import VisionSpec

BLOCK = 512
"""PyTorch's allocator on a GPU rounds sizes up to a multiple."""


class Footprint(NamedTuple):
    """The bytes that calls of a backend and a compute dtype need."""

    backend: type[Runner]
    dtype: torch.dtype

    def image_call(
        self,
        plan: Plan,
        spec: VisionSpec,
        size: tuple[int, int],
        pixel_bytes: int,
        counts_outputs: bool = True,
    ) -> Call:
        """A call of ``plan`` for images of ``size`` (height, width), of ``pixel_bytes`` each.

        ``counts_outputs=False``: outputs are the caller's, and only the temporaries that check them
        count.
        """
        nbytes = functools.partial(
            self.images, plan, spec, size, pixel_bytes, counts_outputs=counts_outputs
        )
        table = (*spec.grid_at(size), "uint8" if _takes_uint8(plan) else "float")
        item = f"an image of {size[1]}x{size[0]} pixels"
        return Call(nbytes, item, plan, (size, pixel_bytes, counts_outputs), table)

    def text_call(self, plan: Plan, longest: int, counts_outputs: bool = True) -> Call:
        """A call of ``plan`` for texts of at most ``longest`` tokens."""
        nbytes = functools.partial(self.texts, plan, longest, counts_outputs=counts_outputs)
        return Call(nbytes, f"a text of {longest} tokens", plan, (longest, counts_outputs))

    def images(
        self,
        plan: Plan,
        spec: VisionSpec,
        size: tuple[int, int],
        pixel_bytes: int,
        batch: int,
        *,
        counts_outputs: bool = True,
    ) -> int:
        """Bytes for ``batch`` images, with the position table and the memory to compute it."""
        length = spec.tokens_at(size)
        table_plan = vision_table(spec, spec.grid_at(size), uint8=_takes_uint8(plan))
        table = _blocks(4 * length * spec.blocks.width)
        making = self.backend.workspace_bytes(table_plan, 1, 1, self.dtype)
        inputs = _blocks(batch * pixel_bytes, 4 * (batch + 1), 4 * batch)
        return table + max(making, inputs + self._call(plan, batch, length, counts_outputs))

    def texts(self, plan: Plan, longest: int, batch: int, *, counts_outputs: bool = True) -> int:
        """Bytes for ``batch`` texts of at most ``longest`` tokens."""
        inputs = _blocks(16 * batch * longest, 4 * (batch + 1), 12 * batch)
        return inputs + self._call(plan, batch, longest, counts_outputs)

    def _call(self, plan: Plan, batch: int, longest: int, counts_outputs: bool) -> int:
        tokens, itemsize = batch * longest, self.dtype.itemsize
        # the native backend rounds sequences of different lengths up in another way
        arena = max(
            self.backend.arena_bytes(plan, batch, tokens, length, itemsize)
            for length in (longest, longest + 1)
        )
        outputs, checks = 0, 0
        for buffer in plan.buffers:
            if buffer.name in plan.outputs:
                numbers = math.prod(buffer.shape(batch, tokens, longest))
                nbytes = numbers * ITEM_BYTES.get(buffer.dtype, itemsize)
                outputs += _blocks(nbytes)
                checks = max(checks, _blocks(nbytes) + 3 * _blocks(numbers))  # torch.isfinite
        workspace = self.backend.workspace_bytes(plan, batch, longest, self.dtype)
        return max(_blocks(arena) + workspace, 0 if counts_outputs else checks) + (
            outputs if counts_outputs else 0
        )


def _takes_uint8(plan: Plan) -> bool:
    return any(buffer.name == "pixels" and buffer.dtype == "uint8" for buffer in plan.buffers)


def _blocks(*sizes: int) -> int:
    return sum(-(-size // BLOCK) * BLOCK for size in sizes)
