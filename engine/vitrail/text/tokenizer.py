"""Strings to token ids for a text tower. BOS is the begin token of a text, EOS its end token."""

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import tokenizers

from vitrail.errors import CheckpointError, InputError
from vitrail.spec import TextSpec
from vitrail.text.tokens import TokenIds

Overflow = Literal["error", "warn", "truncate"]

MAX_CHARACTERS = 1_000_000
"""The longest text. It takes about two seconds and 200 MB. A text of 77 tokens has a few hundred
characters."""
CHUNK = 512
"""Texts per call of the tokenizers library. The library keeps about 1 KiB for each text; the memory
of a chunk fits a core's cache (18 us per caption; 21 us with chunks of 4,096)."""


class Tokenizer:
    """Token ids of texts, at most ``spec.context`` each. Any number of threads may call it.

    ``pad_id`` fills a padded row after EOS. It is the checkpoint's padding id, unless that id has
    no embedding or would be pooled instead of EOS; then it is EOS.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, spec: TextSpec, pad_id: int | None = None
    ) -> None:
        self._backend = backend
        self._spec = spec
        self._eos = _pooled_end(backend, spec)
        highest = self._eos if spec.eos is None else spec.vocab - 1
        self.pad_id: int = self._eos if pad_id is None or pad_id > highest else pad_id

    def encode(self, texts: str | Sequence[str], overflow: Overflow = "error") -> TokenIds:
        """For each text: BOS, its tokens, EOS. A string is a single text.

        ``overflow``: a text of more than ``spec.context`` ids raises InputError ("error"), is cut
        with a warning ("warn", once per call), or is cut ("truncate"). EOS stays the last id.

        A text that spells a special token, such as ``<|endoftext|>``, gets that token, and is
        pooled at its first EOS, as in transformers.

        Raises InputError for a text that is not a string, has a lone surrogate or has more than
        `MAX_CHARACTERS` characters, for an id without an embedding, and for an id above EOS if the
        tower pools at the highest id.
        """
        if overflow not in get_args(Overflow):
            raise InputError(f"overflow: got {overflow!r}, wanted one of {get_args(Overflow)}")
        batch = _checked([texts] if isinstance(texts, str) else texts)
        context = self._spec.context
        chunks, cut = [], []
        for start in range(0, len(batch), CHUNK):
            encodings = self._backend.encode_batch_fast(batch[start : start + CHUNK])
            rows = [encoding.ids for encoding in encodings]
            for text, ids in enumerate(rows, start):
                if len(ids) > context:
                    if overflow == "error":
                        raise InputError(
                            f"text {text}: got {len(ids)} tokens, wanted at most {context}"
                            " (overflow='truncate' or 'warn' cuts the text and keeps its end token)"
                        )
                    rows[text - start] = [*ids[: context - 1], self._eos]
                    cut.append(text)
            chunks.append(TokenIds.of(rows))
        if cut and overflow == "warn":
            warnings.warn(
                f"{len(cut)} of {len(batch)} texts were cut to {context} tokens (first: {cut[0]})",
                stacklevel=2,
            )
        tokens = TokenIds.join(chunks or [TokenIds.of([])])
        self._check(tokens)
        return tokens

    def _check(self, tokens: TokenIds) -> None:
        """Refuse ids without an embedding, and ids that would be pooled instead of EOS."""
        highest, vocab = tokens.highest, self._spec.vocab
        limit = vocab - 1 if self._spec.eos is not None else min(vocab - 1, self._eos)
        if not (over := highest > limit).any():
            return
        text = int(over.argmax())
        token = int(highest[text])
        prefix = f"text {text}: token id {token} ({self._backend.id_to_token(token)!r})"
        if token >= vocab:
            raise InputError(f"{prefix}, wanted ids under the text tower's vocabulary size {vocab}")
        raise InputError(
            f"{prefix} is above the end token {self._eos}; this text tower pools at the highest "
            "id, so the embedding would not be the text's"
        )


def pad(
    tokens: TokenIds, spec: TextSpec, pad_id: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pad ids on the right to the context length T of the tower.

    Returns ``input_ids`` (N, T), and ``attention_mask`` (N, T) with 1 for the ids of the text.
    Raises InputError if a text has more than T ids.
    """
    lengths = tokens.lengths
    if (long := lengths > spec.context).any():
        text = int(long.argmax())
        raise InputError(f"text {text}: got {lengths[text]} tokens, wanted at most {spec.context}")
    mask = np.arange(spec.context) < lengths[:, None]
    input_ids = np.full(mask.shape, pad_id, dtype=np.int64)
    input_ids[mask] = tokens.ids
    return input_ids, mask.astype(np.int64)


def _checked(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, bytes) or not isinstance(texts, Sequence):
        raise InputError(f"texts: got {type(texts).__name__}, wanted a string or a list of strings")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {index}: got {type(text).__name__}, wanted a string")
        if len(text) > MAX_CHARACTERS:
            raise InputError(
                f"text {index}: got {len(text)} characters, wanted at most {MAX_CHARACTERS}"
            )
        try:
            if not text.isascii():
                text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text {index}: got the lone surrogate {text[error.start]!r} at {error.start}, "
                "wanted characters that UTF-8 can hold"
            ) from None
    return list(texts)


def _pooled_end(backend: tokenizers.Tokenizer, spec: TextSpec) -> int:
    """The id that ends every text. Raises CheckpointError unless the tower pools at it."""
    empty = backend.encode("").ids
    end = max(empty) if spec.eos is None else spec.eos
    if empty[-1] != end:
        rule = "the highest id" if spec.eos is None else "eos_token_id of config.json"
        raise CheckpointError(
            f"the empty text gives the ids {empty}, wanted an end in {end} ({rule}), "
            "the token at which the text tower pools"
        )
    if max(empty) >= spec.vocab:
        raise CheckpointError(
            f"the empty text gives the ids {empty}, wanted ids under the text tower's vocabulary "
            f"size {spec.vocab}"
        )
    return end
