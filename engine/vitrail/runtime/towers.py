"""Image and text towers: they take prepared tensors and return the outputs of a plan."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vitrail.plan.builder import DISTILLATION_ROWS
from vitrail.plan.plan import Plan
from vitrail.plan.text import text_dense, text_pooled
from vitrail.plan.vision import vision_dense, vision_layers, vision_pooled, vision_scores
from vitrail.runtime.budget import MAX_BATCH, Call
from vitrail.runtime.footprint import Footprint
from vitrail.runtime.runner import Runner
from vitrail.spec import HeadSpec, TextSpec, VisionSpec
from vitrail.text.tokens import Ints, TokenIds

Result = TypeVar("Result")


# cached: the search takes longer than the host's part of a forward of a single item
@functools.lru_cache(maxsize=256)
def max_batch(spec: VisionSpec | TextSpec, length: int, itemsize: int, max_bytes: int) -> int:
    """A power of two: how many sequences of ``length`` tokens fit ``max_bytes`` of activations."""
    plan = text_pooled(spec) if isinstance(spec, TextSpec) else vision_pooled(spec, uint8=True)
    batch = 2
    while batch <= MAX_BATCH and plan.arena_bytes(batch, batch * length, itemsize) <= max_bytes:
        batch *= 2
    return batch // 2


def _to_device(arrays: Mapping[str, Ints], device: torch.device) -> dict[str, Tensor]:
    """The arrays as int32 slices of one tensor on ``device``, so that a single copy is enough.

    Each slice starts at a multiple of 16 bytes, because kernels need that alignment.
    """
    starts, size = {}, 0
    for name, array in arrays.items():
        starts[name] = size
        size += -(-len(array) // 4) * 4
    host = np.zeros(size, np.int32)
    for name, array in arrays.items():
        host[starts[name] : starts[name] + len(array)] = array
    packed = torch.from_numpy(host).to(device)
    return {name: packed[starts[name] : starts[name] + len(arrays[name])] for name in arrays}


def _run_equal(
    runner: Runner, plan: Plan, inputs: Mapping[str, Tensor], length: int
) -> dict[str, Tensor]:
    """Runs sequences of ``length`` tokens each; tokens of the outputs are shaped (B, T, C)."""
    batch = len(inputs["token_rows"])
    outputs = runner.run(plan, inputs, batch=batch, tokens=batch * length, longest=length)
    for name in plan.token_outputs:
        outputs[name] = outputs[name].view(batch, length, outputs[name].shape[1])
    return outputs


class VisionTower:
    """An image tower. Pixels: (B, H, W, channels) uint8, or (B, channels, H, W) floats."""

    def __init__(self, spec: VisionSpec, head: HeadSpec | None, runner: Runner) -> None:
        self.spec, self.head, self.runner = spec, head, runner
        self._footprint = Footprint(type(runner), runner.dtype)

    def image_size(self, pixels: Tensor) -> tuple[int, int]:
        """(height, width) of a batch of pixels."""
        height = 1 if pixels.dtype == torch.uint8 else 2
        return pixels.shape[height], pixels.shape[height + 1]

    def pooled_plan(self, uint8: bool, scores: bool = False) -> Plan:
        """The plan of `embeddings`, or of `scores`: then the tower must have a head."""
        if not scores:
            return vision_pooled(self.spec, uint8=uint8)
        assert self.head is not None, "the checkpoint has a classification head"
        return vision_scores(self.spec, self.head, uint8=uint8)

    def dense_plan(self, pixels: Tensor, taps: tuple[int, ...] = ()) -> Plan:
        """The plan of `dense`."""
        return vision_dense(self.spec, self.head, uint8=_is_uint8(pixels), taps=taps)

    def layers_plan(self, pixels: Tensor, taps: tuple[int, ...], norm: bool) -> Plan:
        """The plan of `layers`."""
        return vision_layers(self.spec, tuple(sorted(set(taps))), norm, _is_uint8(pixels))

    def embeddings(self, pixels: Tensor) -> dict[str, Tensor]:
        """``vision.embedding`` (B, D) and ``vision.status`` (B,), in parts if memory is limited."""
        plan = self.pooled_plan(_is_uint8(pixels))
        parts = self.in_parts(lambda: plan, pixels, lambda part: self._run(plan, pixels[part]))
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts]) for name in plan.outputs}

    def scores(self, pixels: Tensor) -> Tensor:
        """Logits (B, labels) fp32. The tower must have a classification head."""
        plan = self.pooled_plan(_is_uint8(pixels), scores=True)
        return self._run(plan, pixels)["vision.logits"]

    def dense(self, pixels: Tensor, taps: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """The outputs of `vision_dense`; tokens are (B, T, C)."""
        return self._run(self.dense_plan(pixels, taps), pixels)

    def layers(self, pixels: Tensor, taps: tuple[int, ...], norm: bool) -> list[Tensor]:
        """The residual stream (B, T, C) after each block of ``taps``; normalized if ``norm``."""
        outputs = self._run(self.layers_plan(pixels, taps, norm), pixels)
        return [outputs[f"vision.layer.{tap}"] for tap in taps]

    def in_parts(
        self,
        plan: Callable[[], Plan],
        pixels: Tensor,
        compute: Callable[[slice], Result],
        counts_outputs: bool = True,
    ) -> list[Result]:
        """``compute`` of slices of ``pixels`` that run ``plan()`` within the memory limit.

        ``counts_outputs=False``: the outputs are the caller's. Raises OutOfMemoryError if not even
        one image fits.
        """
        budget = self.runner.budget
        if budget.limit is None:
            return [compute(slice(0, len(pixels)))]
        size = self.image_size(pixels)
        nbytes = pixels[:1].numel() * pixels.element_size()
        call = self.call(plan(), size, nbytes, counts_outputs)
        return budget.in_parts(len(pixels), call, compute)

    def call(
        self, plan: Plan, size: tuple[int, int], pixel_bytes: int, counts_outputs: bool = True
    ) -> Call:
        """The memory of a call of ``plan``; see `Footprint.image_call`."""
        return self._footprint.image_call(plan, self.spec, size, pixel_bytes, counts_outputs)

    def max_batch(self, size: tuple[int, int], max_bytes: int) -> int:
        """How many images of ``size`` fit ``max_bytes`` of activations in a call."""
        itemsize = self.runner.dtype.itemsize
        return max_batch(self.spec, self.spec.tokens_at(size), itemsize, max_bytes)

    def _run(self, plan: Plan, pixels: Tensor) -> dict[str, Tensor]:
        device, size = self.runner.device, self.image_size(pixels)
        batch, length = pixels.shape[0], self.spec.tokens_at(size)
        pixel_format = "uint8" if _is_uint8(pixels) else "float"
        # first: computing it takes memory of its own
        table = self.runner.position_table(self.spec, self.spec.grid_at(size), pixel_format)
        starts = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
        inputs = {
            "pixels": pixels.contiguous().to(device),
            "table": table,
            "cu_seqlens": starts,
            "token_rows": starts[:-1],
        }
        if DISTILLATION_ROWS.name in plan.inputs:
            inputs[DISTILLATION_ROWS.name] = starts[:-1] + 1
        return _run_equal(self.runner, plan, inputs, length)


def _is_uint8(pixels: Tensor) -> bool:
    return pixels.dtype == torch.uint8


class TextTower:
    """A text tower. Texts are token ids."""

    def __init__(self, spec: TextSpec, runner: Runner) -> None:
        self.spec, self.runner = spec, runner
        self._footprint = Footprint(type(runner), runner.dtype)

    def pooled_position(self, ids: Tensor) -> Tensor:
        """(B,) the index of the token that transformers pools in each row of ``ids`` (B, T).

        It is the first end-of-text token, or token 0 if there is none. By the legacy rule
        (`TextSpec.eos` is None) it is the first token with the highest id.
        """
        key = ids if self.spec.eos is None else (ids == self.spec.eos).int()
        return key.argmax(dim=1)

    def embeddings(self, texts: TokenIds) -> dict[str, Tensor]:
        """``text.embedding`` (B, D), ``text.status`` (B,); each text ends at its pooled token."""
        inputs = {
            "ids": texts.ids,
            "positions": texts.positions,
            "cu_seqlens": texts.starts,
            "token_rows": texts.starts[1:] - 1,
        }
        return self.runner.run(
            text_pooled(self.spec),
            _to_device(inputs, self.runner.device),
            batch=len(texts),
            tokens=len(texts.ids),
            longest=int(texts.lengths.max(initial=0)),
        )

    def dense(
        self, ids: Tensor, kv_lens: Tensor | None = None, taps: tuple[int, ...] = ()
    ) -> dict[str, Tensor]:
        """The outputs of `text_dense` for ``ids`` (B, T) int64; tokens are (B, T, C).

        ``kv_lens`` (B,): how many leading tokens of each row may be attended to.
        """
        device, (batch, length) = self.runner.device, ids.shape
        starts = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
        token_rows = starts[:-1] + self.pooled_position(ids).to(device)
        inputs = {
            "ids": ids.flatten().to(device, torch.int32),
            "positions": torch.arange(length, dtype=torch.int32, device=device).repeat(batch),
            "cu_seqlens": starts,
            "token_rows": token_rows.to(torch.int32),
        }
        if kv_lens is not None:
            inputs["kv_lens"] = kv_lens.to(device, torch.int32)
        plan = text_dense(self.spec, taps=taps, masked=kv_lens is not None)
        return _run_equal(self.runner, plan, inputs, length)

    def dense_in_parts(
        self,
        ids: Tensor,
        compute: Callable[[slice], Result],
        taps: tuple[int, ...] = (),
        masked: bool = False,
        counts_outputs: bool = True,
    ) -> list[Result]:
        """``compute`` of slices of ``ids`` that `dense` takes within the memory limit; see
        `VisionTower.in_parts`."""
        budget, (batch, length) = self.runner.budget, ids.shape
        if budget.limit is None:
            return [compute(slice(0, batch))]
        plan = text_dense(self.spec, taps=taps, masked=masked)
        return budget.in_parts(
            batch, self._footprint.text_call(plan, length, counts_outputs), compute
        )

    def batches(self, lengths: Ints, batch_size: int | None, max_bytes: int) -> Iterator[Ints]:
        """The indices of the texts of each call, the shortest texts first.

        ``lengths`` (N,): tokens of each text. A call has ``batch_size`` texts. If that is None, the
        texts of a call, padded to the longest of them, have at most as many tokens as the texts of
        full length whose activations fit ``max_bytes``. A memory limit cuts further. Raises
        OutOfMemoryError if not even one text fits.
        """
        order, context = np.argsort(lengths, kind="stable"), self.spec.context
        itemsize = self.runner.dtype.itemsize
        max_tokens = context * max_batch(self.spec, context, itemsize, max_bytes)
        start = 0
        while start < len(order):
            count = batch_size
            if count is None:
                longest = lengths[order[start : start + max_tokens // lengths[order[start]]]]
                padded = longest * np.arange(1, len(longest) + 1)
                count = int(np.searchsorted(padded, max_tokens, side="right"))
            if self.runner.budget.limit is not None:
                count = self._fitting(lengths[order[start : start + count]])
            yield order[start : start + count]
            start += count

    def hold(self, lengths: Ints) -> AbstractContextManager[object]:
        """A context in which `embeddings` of texts of these ``lengths`` has its memory."""
        call = self._footprint.text_call(text_pooled(self.spec), int(lengths.max(initial=1)))
        return self.runner.budget.hold(call.nbytes(len(lengths)), call)

    def _fitting(self, lengths: Ints) -> int:
        """How many of the first texts of ``lengths`` (N,), ascending, fit the memory limit."""
        budget, plan, count = self.runner.budget, text_pooled(self.spec), len(lengths)
        # fewer texts are shorter, so that more of them fit: in the end the limit is nearly full
        while True:
            fits = budget.most(count, self._footprint.text_call(plan, int(lengths[count - 1])))
            if fits >= count:
                return count
            count = fits
