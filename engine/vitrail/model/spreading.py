"""Encoders that spread a call over the replicas of a model, with the bits of one model.

A call is cut into windows. Each replica has a thread, which takes the next window when it needs
one. Kernels give an item the same bits in any batch, so their windows are cut to keep all replicas
busy. PyTorch's operators do not: there a window is a batch that one model would compute.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from vitrail import fork
from vitrail.errors import DeviceError
from vitrail.image.sources import PixelInput
from vitrail.model.arguments import Size, Texts
from vitrail.model.batches import ResultRows, in_windows, l2_normalize
from vitrail.model.images import ImageEncoder
from vitrail.model.preprocessor import Preprocessor
from vitrail.model.texts import TextEncoder
from vitrail.runtime.towers import TextTower, VisionTower
from vitrail.text.tokenizer import Overflow
from vitrail.text.tokens import Ints
from vitrail.torch_modes import default_modes

Window = TypeVar("Window")


class Turns(Generic[Window]):
    """Hands out the windows of a call in order. Any thread may ask."""

    def __init__(self, windows: Sequence[Window], threads: int) -> None:
        # each thread's first window is its own: a thread that decodes a window ahead must not take
        # the window that another thread is about to ask for
        self._first = list(enumerate(windows[:threads]))
        self._waiting = deque(list(enumerate(windows))[threads:])
        self._lock = threading.Lock()

    def of(self, thread: int, taken: list[tuple[int, Window]]) -> Iterator[Window]:
        """The windows of one thread. Adds each with its number to ``taken``."""
        turn: tuple[int, Window] | None = self._first[thread]
        while turn is not None:
            taken.append(turn)
            yield turn[1]
            with self._lock:
                turn = self._waiting.popleft() if self._waiting else None

    def stop(self) -> None:
        """Hand out no more windows. Those that come before a window in progress are taken."""
        with self._lock:
            self._waiting.clear()


class Crew:
    """The threads of the replicas. ``devices``: a name of each replica, for errors.

    Any number of threads may `run` at once.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self.devices = devices
        self._forget()
        self._lock = fork.lock()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._busy, self._last = [0] * len(self.devices), [0] * len(self.devices)

    def run(
        self,
        windows: Sequence[Window],
        work: Callable[[int, Iterator[Window]], None],
        is_done: Callable[[int, Window], bool],
    ) -> None:
        """Calls ``work`` (replica, its windows) for as many replicas as there are windows.

        ``is_done`` (replica, window): whether the replica has computed the whole window. If calls
        fail, raises the error of the first window that failed.
        """
        failures: list[tuple[int, BaseException]] = []
        turns: Turns[Window]
        cores = torch.get_num_threads()

        def attempt(thread: int, replica: int) -> None:
            taken: list[tuple[int, Window]] = []
            try:
                if torch.get_num_threads() != cores:  # it may be a setting of the caller's thread
                    torch.set_num_threads(cores)
                with default_modes():
                    work(replica, turns.of(thread, taken))
            except BaseException as error:
                turns.stop()
                undone = (number for number, window in taken if not is_done(replica, window))
                failures.append((min(undone, default=len(windows)), self._named(replica, error)))

        with self._claimed(min(len(windows), len(self.devices))) as replicas:
            turns = Turns(windows, len(replicas))
            if len(replicas) == 1:
                attempt(0, replicas[0])
            elif replicas:
                # threads of the call's own: a forked process would inherit dead ones
                with ThreadPoolExecutor(len(replicas), "vitrail-replica") as pool:
                    try:
                        list(pool.map(attempt, range(len(replicas)), replicas))
                    except BaseException:  # such as KeyboardInterrupt
                        turns.stop()
                        raise
        if failures:
            raise min(failures, key=lambda failure: failure[0])[1]

    def _named(self, replica: int, error: BaseException) -> BaseException:
        if not isinstance(error, DeviceError):
            return error
        named = type(error)(f"{self.devices[replica]}: {error}")
        named.__cause__ = error
        return named

    @contextmanager
    def _claimed(self, count: int) -> Iterator[list[int]]:
        """The ``count`` replicas with the fewest calls in progress; of these, the longest idle."""
        with self._lock:
            if self._process != os.getpid():  # calls of the parent process do not go on here
                self._forget()
            every = sorted(range(len(self._busy)), key=lambda r: (self._busy[r], self._last[r]))
            claimed, tick = sorted(every[:count]), max(self._last) + 1
            for replica in claimed:
                self._busy[replica] += 1
                self._last[replica] = tick
        try:
            yield claimed
        finally:
            with self._lock:
                for replica in claimed:
                    # 0 in a process that was forked meanwhile
                    self._busy[replica] = max(0, self._busy[replica] - 1)


class SpreadImages:
    """`ImageEncoder` over several. ``any_batch``: an image has the same bits in any batch."""

    def __init__(self, encoders: Sequence[ImageEncoder], crew: Crew, any_batch: bool) -> None:
        self._encoders, self._crew, self._any_batch = encoders, crew, any_batch

    @property
    def tower(self) -> VisionTower:
        """The first replica's."""
        return self._encoders[0].tower

    @property
    def preprocessor(self) -> Preprocessor:
        """As `ImageEncoder.preprocessor`."""
        return self._encoders[0].preprocessor

    def encode(
        self,
        images: Tensor | list[PixelInput],
        batch_size: int | None,
        size: Size | None,
        strict: bool,
        scores: bool = False,
    ) -> ResultRows:
        """As `ImageEncoder.encode`."""
        first, rows = self._encoders[0], ResultRows(strict)
        if not (positions := first.positions(images, size, rows)):
            return rows
        step = first.step(images, batch_size, size)
        if self._any_batch:
            step = even_step(len(positions), step, len(self._encoders))
        by_replica = [ResultRows(strict) for _ in self._encoders]

        def work(replica: int, windows: Iterator[Sequence[int]]) -> None:
            encoder, computed = self._encoders[replica], by_replica[replica]
            encoder.encode_windows(images, windows, batch_size, size, computed, scores)

        def is_done(replica: int, window: Sequence[int]) -> bool:
            computed = by_replica[replica]
            refused = () if strict else computed.errors
            return all(place in computed.by_position or place in refused for place in window)

        self._crew.run(list(in_windows(positions, step)), work, is_done)
        for computed in by_replica:
            rows.by_position |= computed.by_position
            rows.errors |= computed.errors
        return rows


class SpreadTexts:
    """`TextEncoder` over several. ``any_batch``: a text has the same bits in any batch."""

    def __init__(self, encoders: Sequence[TextEncoder], crew: Crew, any_batch: bool) -> None:
        self._encoders, self._crew, self._any_batch = encoders, crew, any_batch

    @property
    def tower(self) -> TextTower:
        """The first replica's."""
        return self._encoders[0].tower

    def tokenize(self, texts: str | Sequence[str], overflow: Overflow) -> Tensor:
        """As `TextEncoder.tokenize`."""
        return self._encoders[0].tokenize(texts, overflow)

    def encode(
        self,
        texts: Texts,
        normalize: bool = False,
        batch_size: int | None = None,
        overflow: Overflow = "error",
    ) -> Tensor:
        """As `TextEncoder.encode`."""
        first = self._encoders[0]
        tokens = first.tokens(texts, overflow)
        batches, embeddings = list(first.batches(tokens, batch_size)), first.empty(len(tokens))
        if self._any_batch:
            most = even_step(len(tokens), len(tokens), len(self._encoders))
            batches = [part for batch in batches for part in _dealt(batch, most)]
        done = np.zeros(len(tokens), bool)

        def work(replica: int, windows: Iterator[Ints]) -> None:
            for positions, rows in self._encoders[replica].encode_batches(tokens, windows):
                embeddings[torch.from_numpy(positions)] = rows
                done[positions] = True

        self._crew.run(batches, work, lambda _, batch: bool(done[batch].all()))
        return l2_normalize(embeddings) if normalize else embeddings


def even_step(count: int, most: int, replicas: int) -> int:
    """The items of a window, at most ``most``, so that ``replicas`` get equally many windows."""
    windows = -(-count // max(most, 1))
    windows = -(-windows // replicas) * replicas
    return -(-count // max(windows, 1))


def _dealt(batch: Ints, most: int) -> list[Ints]:
    """Parts of at most ``most`` texts, each with texts of all the batch's lengths."""
    parts = -(-len(batch) // most)
    return [batch[part::parts] for part in range(parts)]
