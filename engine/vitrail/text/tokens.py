"""Token ids of many texts in an array, so that no step needs a Python loop over texts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vitrail.errors import InputError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class TokenIds:
    """N texts of at least one token each, M tokens in all, one text after another.

    ``ids`` (M,) int64; ``starts`` (N + 1,) int64: text i is ``ids[starts[i] : starts[i + 1]]``.
    """

    ids: Ints
    starts: Ints

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> TokenIds:
        """The texts ``rows``, each a list of ids."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        flat = itertools.chain.from_iterable(rows)
        return cls(np.fromiter(flat, np.int64, int(lengths.sum())), _starts(lengths))

    @classmethod
    def join(cls, groups: Sequence[TokenIds]) -> TokenIds:
        """The texts of all ``groups`` (at least one group), in order."""
        if len(groups) == 1:
            return groups[0]
        lengths = np.concatenate([group.lengths for group in groups])
        return cls(np.concatenate([group.ids for group in groups]), _starts(lengths))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Ints:
        """(N,) number of ids of each text."""
        return np.diff(self.starts)

    @property
    def positions(self) -> Ints:
        """(M,) position of each id in its text."""
        return np.arange(len(self.ids)) - np.repeat(self.starts[:-1], self.lengths)

    @property
    def highest(self) -> Ints:
        """(N,) the highest id of each text."""
        return np.maximum.reduceat(self.ids, self.starts[:-1]) if len(self) else self.ids[:0]

    def lists(self) -> list[list[int]]:
        """The ids of each text."""
        return [ids.tolist() for ids in np.split(self.ids, self.starts[1:-1])[: len(self)]]

    def take(self, texts: Ints) -> TokenIds:
        """The texts at the positions ``texts`` (K,), in that order."""
        lengths = self.lengths[texts]
        starts = _starts(lengths)
        index = np.arange(starts[-1]) + np.repeat(self.starts[texts] - starts[:-1], lengths)
        return TokenIds(self.ids[index], starts)

    def cut_at_end(self, eos: int | None) -> TokenIds:
        """Each text up to its first ``eos``, or if that is None, up to its first highest id.

        The cut text ends at that token. Raises InputError for a text without ``eos``.
        """
        end = np.repeat(self.highest, self.lengths) if eos is None else eos
        ends = np.append(np.flatnonzero(self.ids == end), len(self.ids))
        first_ends = ends[np.searchsorted(ends, self.starts[:-1])]
        missing = first_ends >= self.starts[1:]
        if missing.any():
            text = int(missing.argmax())
            raise InputError(
                f"text {text}: got no end token ({eos}) among its {self.lengths[text]} ids"
            )
        lengths = first_ends + 1 - self.starts[:-1]
        if np.array_equal(lengths, self.lengths):
            return self
        keep = self.positions < np.repeat(lengths, self.lengths)
        return TokenIds(self.ids[keep], _starts(lengths))


def _starts(lengths: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
