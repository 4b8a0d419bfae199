"""What happens to a chunk whose computation kills worker processes.

1. The chunk gets three tries. Each goes to a worker as a whole, in the call that one device makes.
2. Then it is halved. A half that kills a worker is halved again at once, down to single images. An
   image that kills three workers while it is alone in them is a killer.
3. When every image is in a half that was computed, or is a killer, the chunk gets six more tries as
   a whole, with the killers counted as unreadable. So its rows have the bits of a run in which
   those files are unreadable, or, if there was no killer, because the kills came from outside, the
   bits of any other run.
4. If these tries fail too, for example because the memory is too small for a whole batch, the rows
   of the halves count. On a CPU their last bits may differ.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vitrail.jobs.listing import Source
from vitrail.jobs.rows import EmbeddingRows, EmbedOptions
from vitrail.jobs.worker import Computed, Task

TRIES = 3
FINAL_TRIES = 6


@dataclass(eq=False, slots=True)
class Piece:
    """Images ``start`` to ``stop`` of a chunk, which go to a worker together.

    ``deaths``: how each worker ended that computed the piece.
    """

    work: ChunkWork
    start: int
    stop: int
    withheld: frozenset[int] = frozenset()
    deaths: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return self.stop - self.start == len(self.work.chunk)

    @property
    def is_single(self) -> bool:
        return self.stop - self.start == 1

    @property
    def sources(self) -> Sequence[Source]:
        return self.work.chunk[self.start : self.stop]

    def task(self, options: EmbedOptions) -> Task:
        return Task(self.sources, self.withheld, options)


class ChunkWork:
    """A chunk until its rows are known.

    ``waiting`` holds the pieces that no worker has. ``rows`` or ``error`` is set at the end.
    """

    def __init__(self, chunk: Sequence[Source], width: int) -> None:
        """``width``: of an embedding."""
        self.chunk, self._width = chunk, width
        self.waiting = deque([Piece(self, 0, len(chunk))])
        self.rows: EmbeddingRows | None = None
        self.error: Exception | None = None
        self._narrowed = False
        self._killers: dict[int, str] = {}
        self._computed: dict[int, EmbeddingRows] = {}  # by the start of the piece

    def finish(self, piece: Piece, answer: Computed) -> None:
        """A worker has computed ``piece``."""
        errors = list(answer.errors)
        for position in piece.withheld:
            errors[position - piece.start] = self._killers[position]
        rows = EmbeddingRows(piece.sources, errors, answer.embeddings)
        if piece.is_whole:
            self.rows = rows
        else:
            self._add(piece, rows)

    def lose(self, piece: Piece, death: str) -> None:
        """The worker that computed ``piece`` has died."""
        piece.deaths.append(death)
        final = piece.is_whole and self._narrowed
        tries = FINAL_TRIES if final else TRIES if piece.is_whole or piece.is_single else 1
        if len(piece.deaths) < tries:
            self.waiting.appendleft(piece)
        elif final:
            self.rows = self._joined()
        elif piece.is_single:
            self._narrowed = True
            signals = ", ".join(dict.fromkeys(piece.deaths))
            reason = f"killed the process that read it {len(piece.deaths)} times ({signals})"
            self._killers[piece.start] = reason
            nothing = np.empty((0, self._width), np.float32)
            self._add(piece, EmbeddingRows(piece.sources, [reason], nothing))
        else:
            self._narrowed = True
            middle = (piece.start + piece.stop) // 2
            halves = (Piece(self, piece.start, middle), Piece(self, middle, piece.stop))
            self.waiting.extendleft(reversed(halves))

    def _add(self, piece: Piece, rows: EmbeddingRows) -> None:
        self._computed[piece.start] = rows
        if sum(len(rows.sources) for rows in self._computed.values()) == len(self.chunk):
            self.waiting.append(Piece(self, 0, len(self.chunk), frozenset(self._killers)))

    def _joined(self) -> EmbeddingRows:
        pieces = [rows for _, rows in sorted(self._computed.items())]
        errors = [error for rows in pieces for error in rows.errors]
        embeddings = np.concatenate([rows.embeddings for rows in pieces])
        return EmbeddingRows(self.chunk, errors, embeddings)
