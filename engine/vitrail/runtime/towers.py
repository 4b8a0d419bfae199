"""Image and text towers: they take prepared tensors and return the outputs of a plan."""

import functools
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from vitrail.plan.builder import DISTILLATION_ROWS
from vitrail.plan.plan import Plan
from vitrail.plan.text import text_dense, text_pooled
from vitrail.plan.vision import vision_dense, vision_layers, vision_pooled, vision_scores
from vitrail.runtime.runner import Runner
from vitrail.spec import HeadSpec, TextSpec, VisionSpec
from vitrail.text.tokens import Ints, TokenIds

MAX_BATCH = 4096


# cached: the search takes longer than the host's part of a forward of a single item
@functools.lru_cache(maxsize=256)
def _max_batch(spec: VisionSpec | TextSpec, length: int, itemsize: int, max_bytes: int) -> int:
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

    def image_size(self, pixels: Tensor) -> tuple[int, int]:
        """(height, width) of a batch of pixels."""
        height = 1 if pixels.dtype == torch.uint8 else 2
        return pixels.shape[height], pixels.shape[height + 1]

    def embeddings(self, pixels: Tensor) -> dict[str, Tensor]:
        """``vision.embedding`` (B, D) and ``vision.status`` (B,)."""
        return self._run(vision_pooled(self.spec, uint8=_is_uint8(pixels)), pixels)

    def scores(self, pixels: Tensor) -> Tensor:
        """Logits (B, labels) fp32. The tower must have a classification head."""
        assert self.head is not None, "the checkpoint has a classification head"
        plan = vision_scores(self.spec, self.head, uint8=_is_uint8(pixels))
        return self._run(plan, pixels)["vision.logits"]

    def dense(self, pixels: Tensor, taps: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """The outputs of `vision_dense`; tokens are (B, T, C)."""
        plan = vision_dense(self.spec, self.head, uint8=_is_uint8(pixels), taps=taps)
        return self._run(plan, pixels)

    def layers(self, pixels: Tensor, taps: tuple[int, ...], norm: bool) -> list[Tensor]:
        """The residual stream (B, T, C) after each block of ``taps``; normalized if ``norm``."""
        plan = vision_layers(self.spec, tuple(sorted(set(taps))), norm, _is_uint8(pixels))
        outputs = self._run(plan, pixels)
        return [outputs[f"vision.layer.{tap}"] for tap in taps]

    def max_batch(self, size: tuple[int, int], max_bytes: int) -> int:
        """How many images of ``size`` fit ``max_bytes`` of activations in a call."""
        itemsize = self.runner.dtype.itemsize
        return _max_batch(self.spec, self.spec.tokens_at(size), itemsize, max_bytes)

    def _run(self, plan: Plan, pixels: Tensor) -> dict[str, Tensor]:
        device, size = self.runner.device, self.image_size(pixels)
        batch, length = pixels.shape[0], self.spec.tokens_at(size)
        starts = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
        pixel_format = "uint8" if _is_uint8(pixels) else "float"
        inputs = {
            "pixels": pixels.to(device).contiguous(),
            "table": self.runner.position_table(self.spec, self.spec.grid_at(size), pixel_format),
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

    def batches(self, lengths: Ints, batch_size: int | None, max_bytes: int) -> Iterator[Ints]:
        """The indices of the texts of each call, the shortest texts first.

        ``lengths`` (N,): tokens of each text. A call has ``batch_size`` texts. If that is None, the
        texts of a call, padded to the longest of them, have at most as many tokens as the texts of
        full length whose activations fit ``max_bytes``.
        """
        order, context = np.argsort(lengths, kind="stable"), self.spec.context
        itemsize = self.runner.dtype.itemsize
        max_tokens = context * _max_batch(self.spec, context, itemsize, max_bytes)
        start = 0
        while start < len(order):
            count = batch_size
            if count is None:
                longest = lengths[order[start : start + max_tokens // lengths[order[start]]]]
                padded = longest * np.arange(1, len(longest) + 1)
                count = int(np.searchsorted(padded, max_tokens, side="right"))
            yield order[start : start + count]
            start += count
