"""Sort the texts that users pass: strings to tokenize, or token ids; and check ids and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from vitrail.errors import InputError
from vitrail.model.arguments import check_data
from vitrail.spec import TextSpec
from vitrail.text.tokens import TokenIds

Texts = str | Sequence[str] | Sequence[Sequence[int]] | Tensor | np.ndarray[Any, Any]


def sort_texts(texts: Texts, tower: TextSpec) -> TokenIds | str | Sequence[str]:
    """``texts`` as `TokenIds` if they are token ids, else unchanged.

    An empty list is `TokenIds` of no text. Raises InputError for bytes and for ids that ``tower``
    does not take.
    """
    if isinstance(texts, bytes | bytearray | memoryview):
        raise InputError("texts: got bytes, wanted strings or token ids")
    if isinstance(texts, str):
        return texts
    if isinstance(texts, Sequence):
        if not len(texts):
            return TokenIds.of([])
        if any(isinstance(text, str) for text in texts):
            return cast("Sequence[str]", texts)
    return token_ids(texts, tower.vocab, tower.context)


def check_strings(name: str, values: Sequence[str]) -> tuple[str, ...]:
    """``values`` as a tuple. Raises InputError unless they are a list of at least one string."""
    if isinstance(values, str) or not values or not all(isinstance(value, str) for value in values):
        raise InputError(f"{name}: got {values!r:.80}, wanted a list of one string or more")
    return tuple(values)


def token_ids(ids: object, vocab: int, context: int) -> TokenIds:
    """Token ids as `TokenIds`: from a tensor or array (N, T), or from lists of any lengths.

    Raises InputError: another type, ids outside 0 to ``vocab`` - 1, more than ``context`` ids in a
    text.
    """
    if isinstance(ids, np.ndarray):
        if ids.dtype.kind != "i":
            raise InputError(f"texts: got an array of {ids.dtype}, wanted strings or int64 ids")
        ids = torch.from_numpy(ids.astype(ids.dtype.newbyteorder("=")))
    if isinstance(ids, Tensor):
        matrix = check_id_tensor(ids, vocab, context).cpu().numpy()
        texts, tokens = matrix.shape
        return TokenIds(matrix.reshape(-1), tokens * np.arange(texts + 1))
    if not isinstance(ids, Sequence):
        raise InputError(f"texts: got {type(ids).__name__}, wanted strings or token ids")
    if ids and all(isinstance(token, int) for token in ids):
        ids = [ids]
    for position, row in enumerate(ids):
        integers = isinstance(row, Sequence) and set(map(type, row)) == {int}
        if isinstance(row, str) or not integers:
            raise InputError(f"text {position}: got {row!r:.80}, wanted a string or a list of ids")
        if len(row) > context or min(row) < 0 or max(row) >= vocab:
            raise InputError(
                f"text {position}: got {len(row)} ids from {min(row)} to {max(row)}, "
                f"wanted at most {context} from 0 to {vocab - 1}"
            )
    return TokenIds.of(ids)


def check_id_tensor(ids: Tensor, vocab: int, context: int) -> Tensor:
    """Token ids (B, T) int64 from int32 or int64 (B, T) or (T,).

    Raises InputError as `token_ids` does.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        type_text = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"input_ids: got {type_text}, wanted an int32 or int64 tensor (B, T)")
    check_data("input_ids", ids)
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or not 1 <= ids.shape[1] <= context:
        raise InputError(
            f"input_ids: got shape {tuple(ids.shape)}, wanted (B, T) with T from 1 to {context}"
        )
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab):
        raise InputError(
            f"input_ids: got ids from {int(ids.min())} to {int(ids.max())}, wanted 0 to {vocab - 1}"
        )
    return ids.long()


def mask_lengths(mask: Tensor, ids: Tensor) -> Tensor | None:
    """Number of unmasked tokens in each row (B,) of a right-padded mask (B, T) of ones and zeros.

    None if no token is masked. Raises InputError for another shape or pattern, and for a row that
    masks every token.
    """
    if not isinstance(mask, Tensor) or tuple(mask.shape) != tuple(ids.shape):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"attention_mask: got {shape}, wanted a tensor of shape {tuple(ids.shape)}"
        )
    check_data("attention_mask", mask)
    attended = mask != 0
    lengths = attended.sum(dim=1)
    expected = torch.arange(ids.shape[1], device=mask.device) < lengths[:, None]
    if not torch.equal(attended, expected) or not torch.equal(attended.to(mask.dtype), mask):
        raise InputError("attention_mask: wanted ones, then zeros (right padding) in every row")
    if bool((lengths == 0).any()):
        row = int((lengths == 0).nonzero()[0])
        raise InputError(f"attention_mask: row {row} lets no token through, wanted one or more")
    return None if bool(attended.all()) else lengths
