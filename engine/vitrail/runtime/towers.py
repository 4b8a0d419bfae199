"""One tower and its plans: tensors in, tensors out. What users pass is made ready in `model`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from vitrail.plan.plan import Plan
from vitrail.plan.text import text_dense, text_pooled
from vitrail.plan.vision import vision_dense, vision_layers, vision_pooled, vision_scores
from vitrail.runtime.runner import Runner
from vitrail.spec import HeadSpec, TextSpec, VisionSpec
from vitrail.text.tokens import Ints, TokenIds


def _largest_batch(plan: Plan, tokens: int, itemsize: int, budget: int) -> int:
    """The largest power of two of sequences whose activations fit ``budget`` bytes."""
    batch = 1
    while plan.arena_bytes(2 * batch, 2 * batch * tokens, itemsize) <= budget and batch < 4096:
        batch *= 2
    return batch


# a search takes longer than a forward of one item takes the host
@functools.lru_cache(maxsize=256)
def _images_at_once(spec: VisionSpec, size: tuple[int, int], itemsize: int, budget: int) -> int:
    plan = vision_pooled(spec, uint8=True)
    return _largest_batch(plan, spec.tokens_at(size), itemsize, budget)


@functools.lru_cache(maxsize=256)
def _texts_at_once(spec: TextSpec, itemsize: int, budget: int) -> int:
    return _largest_batch(text_pooled(spec), spec.context, itemsize, budget)


def _to_device(arrays: Mapping[str, Ints], device: torch.device) -> dict[str, Tensor]:
    """The arrays in int32, as parts of one tensor: one copy. Each starts at 16 bytes, as kernels
    want it."""
    places, size = {}, 0
    for name, array in arrays.items():
        places[name] = size
        size += -(-len(array) // 4) * 4
    host = np.zeros(size, np.int32)
    for name, array in arrays.items():
        host[places[name] : places[name] + len(array)] = array
    whole = torch.from_numpy(host).to(device)
    return {name: whole[places[name] : places[name] + len(arrays[name])] for name in arrays}


class VisionTower:
    """An image tower. Pixels: (B, H, W, channels) uint8, or (B, channels, H, W) floats."""

    def __init__(self, spec: VisionSpec, head: HeadSpec | None, runner: Runner) -> None:
        self.spec, self.head, self.runner = spec, head, runner

    def size(self, pixels: Tensor) -> tuple[int, int]:
        """(height, width) of a batch of pixels."""
        first = 1 if pixels.dtype == torch.uint8 else 2
        return pixels.shape[first], pixels.shape[first + 1]

    def _run(self, plan: Plan, pixels: Tensor) -> dict[str, Tensor]:
        device, size = self.runner.device, self.size(pixels)
        batch, tokens = pixels.shape[0], self.spec.tokens_at(size)
        offsets = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=device)
        kind = "uint8" if pixels.dtype == torch.uint8 else "float"
        inputs = {
            "pixels": pixels.to(device).contiguous(),
            "table": self.runner.table(self.spec, self.spec.grid_at(size), kind),
            "cu_seqlens": offsets,
            "token_rows": offsets[:-1],
        }
        return self.runner.run(plan, inputs, batch=batch, tokens=batch * tokens, longest=tokens)

    def embed(self, pixels: Tensor) -> dict[str, Tensor]:
        """``vision.embedding`` (B, D) and ``vision.status`` (B,)."""
        plan = vision_pooled(self.spec, uint8=pixels.dtype == torch.uint8)
        return self._run(plan, pixels)

    def scores(self, pixels: Tensor) -> Tensor:
        """Logits (B, labels) fp32 of the classification head, which there must be."""
        assert self.head is not None, "the checkpoint has a classification head"
        plan = vision_scores(self.spec, self.head, uint8=pixels.dtype == torch.uint8)
        return self._run(plan, pixels)["vision.logits"]

    def dense(self, pixels: Tensor, taps: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """All that ``forward`` returns; tokens shaped (B, T, C)."""
        uint8 = pixels.dtype == torch.uint8
        out = self._run(vision_dense(self.spec, self.head, uint8=uint8, taps=taps), pixels)
        return self._unpacked(out, pixels)

    def layers(self, pixels: Tensor, taps: tuple[int, ...], norm: bool) -> list[Tensor]:
        """The stream after each block of ``taps``: (B, T, C), normalised with ``norm``."""
        uint8 = pixels.dtype == torch.uint8
        plan = vision_layers(self.spec, tuple(sorted(set(taps))), norm, uint8)
        out = self._unpacked(self._run(plan, pixels), pixels)
        return [out[f"vision.layer.{tap}"] for tap in taps]

    def _unpacked(self, out: dict[str, Tensor], pixels: Tensor) -> dict[str, Tensor]:
        tokens, width = self.spec.tokens_at(self.size(pixels)), self.spec.blocks.width
        shape = (pixels.shape[0], tokens, width)
        packed = ("vision.hidden.", "vision.layer.", "vision.last")
        return {name: t.view(shape) if name.startswith(packed) else t for name, t in out.items()}

    def batch(self, size: tuple[int, int], budget: int) -> int:
        """How many images of ``size`` go through at once within ``budget`` bytes of activations."""
        return _images_at_once(self.spec, tuple(size), self.runner.dtype.itemsize, budget)


class TextTower:
    """A text tower. Texts are token ids, cut at the token that is pooled."""

    def __init__(self, spec: TextSpec, runner: Runner) -> None:
        self.spec, self.runner = spec, runner

    def pooled_position(self, ids: Tensor) -> Tensor:
        """(B,) which token of each row of ``ids`` (B, T) is pooled, as transformers does it.

        The first end-of-text token, 0 in a row that has none; for the legacy rule the first of the
        highest id.
        """
        key = ids if self.spec.eos is None else (ids == self.spec.eos).int()
        return key.argmax(dim=1)

    def embed(self, texts: TokenIds) -> dict[str, Tensor]:
        """``text.embedding`` (B, D), ``text.status`` (B,) of ids that end at the pooled token."""
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
        """All that ``forward`` returns for ``ids`` (B, T) int64; tokens shaped (B, T, C).

        ``kv_lens`` (B,): how many leading tokens of each row may be attended to.
        """
        device, (batch, tokens) = self.runner.device, ids.shape
        offsets = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=device)
        rows = offsets[:-1] + self.pooled_position(ids).to(device)
        inputs = {
            "ids": ids.flatten().to(device, torch.int32),
            "positions": torch.arange(tokens, dtype=torch.int32, device=device).repeat(batch),
            "cu_seqlens": offsets,
            "token_rows": rows.to(torch.int32),
        }
        if kv_lens is not None:
            inputs["kv_lens"] = kv_lens.to(device, torch.int32)
        plan = text_dense(self.spec, taps=taps, masked=kv_lens is not None)
        out = self.runner.run(plan, inputs, batch=batch, tokens=batch * tokens, longest=tokens)
        shape, packed = (batch, tokens, self.spec.blocks.width), ("text.hidden.", "text.last")
        return {name: t.view(shape) if name.startswith(packed) else t for name, t in out.items()}

    def batches(self, lengths: Ints, batch_size: int | None, budget: int) -> Iterator[Ints]:
        """The texts of each call by position, the shortest first; ``lengths`` (N,) in tokens.

        ``batch_size`` texts; without it as many as would, padded to the longest of the call, be no
        more tokens than the texts of full length whose activations fit ``budget`` bytes.
        """
        order = np.argsort(lengths, kind="stable")
        room = _texts_at_once(self.spec, self.runner.dtype.itemsize, budget) * self.spec.context
        start = 0
        while start < len(order):
            taken = batch_size
            if taken is None:
                longest = lengths[order[start : start + room // lengths[order[start]]]]
                padded = longest * np.arange(1, len(longest) + 1)
                taken = int(np.searchsorted(padded, room, side="right"))
            yield order[start : start + taken]
            start += taken
