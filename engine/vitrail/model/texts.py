"""Texts to embeddings: tokenize, sort by length, compute in batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vitrail.errors import VitrailError
from vitrail.model.batches import ACTIVATION_BYTES, in_halves, one_behind
from vitrail.model.forward import l2_normalize
from vitrail.model.layers import not_finite
from vitrail.model.text_arguments import Texts, sort_texts
from vitrail.runtime.towers import TextTower
from vitrail.text.tokenizer import Overflow, Tokenizer, pad
from vitrail.text.tokens import TokenIds

CPU_TEXT_BYTES = 32 << 20
"""`ACTIVATION_BYTES` for texts on the CPU, which are 6 % slower if the arena exceeds its caches."""


class TextEncoder:
    """The text tower with its tokenizer, which is read at the first string.

    A checkpoint without a tokenizer can therefore still embed token ids.
    """

    def __init__(self, tower: TextTower, tokenizer: Callable[[], Tokenizer]) -> None:
        self.tower, self.tokenizer = tower, functools.cache(tokenizer)

    def tokenize(self, texts: str | Sequence[str], overflow: Overflow) -> Tensor:
        """Token ids (N, context) int64 of strings, padded on the right."""
        tokenizer = self.tokenizer()
        tokens = tokenizer.encode(texts, overflow)
        return torch.from_numpy(pad(tokens, self.tower.spec, tokenizer.pad_id)[0])

    def encode(
        self,
        texts: Texts,
        normalize: bool = False,
        batch_size: int | None = None,
        overflow: Overflow = "error",
    ) -> Tensor:
        """Embeddings (N, D) fp32 on the CPU; arguments and errors as in `Model.encode_text`."""
        spec, runner = self.tower.spec, self.tower.runner
        tokens = sort_texts(texts, spec)
        if not isinstance(tokens, TokenIds):
            tokens = self.tokenizer().encode(tokens, overflow)
        tokens = tokens.cut_at_end(spec.eos)
        embeddings = torch.empty(len(tokens), spec.embedding, dtype=torch.float32, device="cpu")
        budget = CPU_TEXT_BYTES if runner.device.type == "cpu" else ACTIVATION_BYTES
        results = (
            result
            for batch in self.tower.batches(tokens.lengths, batch_size, budget)
            for result in in_halves(
                lambda chosen: self.tower.embeddings(tokens.take(chosen)), batch
            )
        )
        for positions, outputs in one_behind(results):
            embeddings[torch.from_numpy(positions)] = outputs["text.embedding"].cpu()
            if (status := outputs["text.status"].cpu()).any():
                text = int(positions[status.nonzero().flatten().numpy()].min())
                raise VitrailError(f"text {text}: the embedding {not_finite(runner.dtype)}")
        return l2_normalize(embeddings) if normalize else embeddings
