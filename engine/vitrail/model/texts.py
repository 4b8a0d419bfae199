"""Texts to embeddings: tokenize, sort by length, compute in batches; a cache for labels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitrail import fork
from vitrail.errors import InputError, VitrailError
from vitrail.model.arguments import Texts, sort_texts
from vitrail.model.batches import ACTIVATION_BYTES, in_halves, l2_normalize, one_behind
from vitrail.model.layers import not_finite
from vitrail.runtime.towers import TextTower
from vitrail.text.tokenizer import Overflow, Tokenizer, pad
from vitrail.text.tokens import Ints, TokenIds

if TYPE_CHECKING:
    from vitrail.model.spreading import SpreadTexts

CPU_TEXT_BYTES = 32 << 20
"""`ACTIVATION_BYTES` for texts on the CPU, which are 6 % slower if the arena exceeds its caches."""
LABEL_SETS = 16
"""Number of label sets whose embeddings a model keeps."""


def activation_bytes(device: torch.device) -> int:
    """Bytes of activations in a batch of texts, unless the caller names a batch size."""
    return CPU_TEXT_BYTES if device.type == "cpu" else ACTIVATION_BYTES


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
        tokens = self.tokens(texts, overflow)
        embeddings = self.empty(len(tokens))
        for positions, rows in self.encode_batches(tokens, self.batches(tokens, batch_size)):
            embeddings[torch.from_numpy(positions)] = rows
        return l2_normalize(embeddings) if normalize else embeddings

    def tokens(self, texts: Texts, overflow: Overflow) -> TokenIds:
        """The ids of each text up to its end token."""
        spec = self.tower.spec
        tokens = sort_texts(texts, spec)
        if not isinstance(tokens, TokenIds):
            tokens = self.tokenizer().encode(tokens, overflow)
        return tokens.cut_at_end(spec.eos)

    def empty(self, count: int) -> Tensor:
        """Room for the embeddings (``count``, D) fp32, on the CPU."""
        return torch.empty(count, self.tower.spec.embedding, dtype=torch.float32, device="cpu")

    def batches(self, tokens: TokenIds, batch_size: int | None) -> Iterator[Ints]:
        """The positions of the texts of each batch."""
        nbytes = activation_bytes(self.tower.runner.device)
        return self.tower.batches(tokens.lengths, batch_size, nbytes)

    def encode_batches(
        self, tokens: TokenIds, batches: Iterable[Ints]
    ) -> Iterator[tuple[Ints, Tensor]]:
        """Yield positions and embeddings (n, D) fp32 on the CPU, until each batch is done.

        Raises VitrailError naming the first text of a batch whose embedding is not finite.
        """
        limited = self.tower.runner.budget.limit is not None

        def compute(texts: Ints) -> dict[str, Tensor]:
            batch = tokens.take(texts)
            if not limited:
                return self.tower.embeddings(batch)
            with self.tower.hold(batch.lengths):  # the next batch has all of the limit
                outputs = self.tower.embeddings(batch)
                return {name: output.cpu() for name, output in outputs.items()}

        results = (result for batch in batches for result in in_halves(compute, batch))
        for positions, outputs in one_behind(results):
            embeddings = outputs["text.embedding"].cpu()
            if (status := outputs["text.status"].cpu()).any():
                text = int(positions[status.nonzero().flatten().numpy()].min())
                reason = not_finite(self.tower.runner.dtype)
                raise VitrailError(f"text {text}: the embedding {reason}")
            yield positions, embeddings


class LabelCache:
    """Embeddings of the latest label sets. May be used from many threads at once."""

    def __init__(self, texts: TextEncoder | SpreadTexts) -> None:
        self._texts, self._lock = texts, fork.lock()
        self._embeddings: dict[tuple[tuple[str, ...], tuple[str, ...], Overflow], Tensor] = {}

    def embeddings(
        self, labels: tuple[str, ...], templates: tuple[str, ...], overflow: Overflow
    ) -> Tensor:
        """(L, D) fp32 of unit length: for each label the mean over ``templates`` with the label
        put in for ``{}``.

        Raises InputError: a template without ``{}``, or a text that is too long.
        """
        if any("{}" not in template for template in templates):
            raise InputError(
                f"templates: got {templates!r}, wanted strings with {{}} for the label"
            )
        key = labels, templates, overflow
        with self._lock:
            if key in self._embeddings:
                return self._embeddings[key]
        texts = [template.replace("{}", label) for label in labels for template in templates]
        by_template = self._texts.encode(texts, normalize=True, overflow=overflow).view(
            len(labels), len(templates), -1
        )
        several = len(templates) > 1
        embeddings = l2_normalize(by_template.mean(dim=1)) if several else by_template[:, 0]
        with self._lock:
            while len(self._embeddings) >= LABEL_SETS:
                self._embeddings.pop(next(iter(self._embeddings)))
            self._embeddings[key] = embeddings
        return embeddings
