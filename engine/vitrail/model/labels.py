"""Label embeddings for zero-shot classification, and a cache of them."""

from __future__ import annotations

import threading

from torch import Tensor

from vitrail.errors import InputError
from vitrail.model.forward import l2_normalize
from vitrail.model.texts import TextEncoder
from vitrail.text.tokenizer import Overflow

LABEL_SETS = 16
"""Number of label sets that a cache keeps."""


class LabelCache:
    """Embeddings of the latest label sets. May be used from many threads at once."""

    def __init__(self, texts: TextEncoder) -> None:
        self._texts, self._lock = texts, threading.Lock()
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
