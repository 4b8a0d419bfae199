"""`DeviceWorkers`: the embedder of several devices, with a process for each."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from multiprocessing import connection
from types import TracebackType
from typing import Any, Self

from vitrail.errors import InputError, VitrailError
from vitrail.jobs.embedder import ModelFacts
from vitrail.jobs.listing import Source
from vitrail.jobs.narrowing import TRIES, ChunkWork
from vitrail.jobs.rows import EmbeddingRows, EmbedOptions
from vitrail.jobs.worker import Computed, Failed, Loaded, Warned, WorkerSettings
from vitrail.jobs.worker_process import WorkerProcess

HELD = 2  # pieces that a worker has, so that it need not wait for the next
AHEAD = 4  # chunks per worker that are under way or wait for an earlier one: bounds the memory


class DeviceWorkers:
    """Embeds with a process per device; a context, at whose end the processes end.

    Workers get chunks one at a time, and the rows come in order, by the same calls as on one
    device. A worker that dies is replaced, and `narrowing` says what becomes of its chunk. An
    exception of a call is raised when the rows of its chunk are due, as on one device.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        devices: Sequence[str],
        say: Callable[[str], None] = lambda message: None,
        **keywords: Any,
    ) -> None:
        """Starts the workers and waits until all have loaded ``source``.

        ``devices``: "cpu", or GPUs such as "cuda:1", repeated or not. ``say`` gets a message for
        each worker that dies. ``keywords``: those of `vitrail.load` besides the device.

        Raises the errors of `load`, with the device; InputError if the fingerprints differ, as they
        do for a CPU beside a GPU; VitrailError if a process cannot be started, or if three
        processes of a device have died while they loaded.
        """
        self._settings, self._say = _settings(str(source), devices, keywords), say
        self._processes: list[WorkerProcess | None] = [None] * len(devices)
        self._failed_loads = [0] * len(devices)
        self._facts: tuple[ModelFacts, str] | None = None
        self._warned: set[tuple[str, type[Warning]]] = set()
        try:
            self._start_missing()
            while not all(process and process.is_loaded for process in self._processes):
                self._receive()
                self._start_missing()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        for number, process in enumerate(self._processes):
            if process is not None:
                process.end()
                self._processes[number] = None

    @property
    def facts(self) -> ModelFacts:
        assert self._facts is not None, "all workers have loaded"
        return self._facts[0]

    def rows(
        self, chunks: Iterable[Sequence[Source]], options: EmbedOptions
    ) -> Iterator[EmbeddingRows]:
        remaining = iter(chunks)
        ahead: deque[ChunkWork] = deque()
        limit = AHEAD * len(self._processes)
        while True:
            following = islice(remaining, limit - len(ahead))
            ahead.extend(ChunkWork(chunk, self.facts.width) for chunk in following)
            if not ahead:
                return
            self._hand_out(ahead, options)
            first = ahead[0]
            if first.error is not None:
                raise first.error
            if first.rows is None:
                self._receive()
            else:
                ahead.popleft()
                yield first.rows

    def _hand_out(self, ahead: Iterable[ChunkWork], options: EmbedOptions) -> None:
        """Gives waiting pieces to workers, the earliest first; replaces workers that have died."""
        waiting = [work for work in ahead if work.waiting]
        if waiting:
            self._start_missing()
        for held in range(HELD):
            for process in self._processes:
                if process is None or not process.is_loaded or len(process.pieces) > held:
                    continue
                while waiting and not waiting[0].waiting:
                    del waiting[0]
                if not waiting:
                    return
                process.give(waiting[0].waiting.popleft(), options)

    def _start_missing(self) -> None:
        for number, process in enumerate(self._processes):
            if process is None:
                self._processes[number] = WorkerProcess(self._settings[number])

    def _receive(self) -> None:
        """Waits for answers or deaths of workers, and takes one of each worker."""
        running = [process for process in self._processes if process is not None]
        ready = connection.wait([item for process in running for item in process.waitables])
        for number, process in enumerate(self._processes):
            if process is not None and not set(process.waitables).isdisjoint(ready):
                self._take(number, process)

    def _take(self, number: int, process: WorkerProcess) -> None:
        answer = process.receive()
        if isinstance(answer, Loaded):
            self._compare(answer.facts, process.device)
            process.is_loaded, self._failed_loads[number] = True, 0
        elif isinstance(answer, Warned):
            if (answer.text, answer.category) not in self._warned:
                self._warned.add((answer.text, answer.category))
                warnings.warn_explicit(answer.text, answer.category, answer.file, answer.line)
        elif isinstance(answer, Failed):
            if not process.is_loaded:
                raise _named(answer.error, process.device)
            piece = process.pieces.popleft()
            piece.work.error = answer.error
        elif isinstance(answer, Computed):
            piece = process.pieces.popleft()
            piece.work.finish(piece, answer)
        else:
            self._bury(number, process)

    def _bury(self, number: int, process: WorkerProcess) -> None:
        """Takes the pieces of a process that has died back."""
        self._processes[number] = None
        death = process.end()
        if not process.is_loaded:
            self._failed_loads[number] += 1
            if self._failed_loads[number] == TRIES:
                raise VitrailError(
                    f"{process.device}: {TRIES} processes have died while they loaded the model "
                    f"({death}); try --device {process.device} to see why, or leave it out"
                )
        self._say(f"{process.device}: a worker process has died ({death}); another replaces it")
        for piece in reversed(list(process.pieces)[1:]):
            piece.work.waiting.appendleft(piece)
        if process.pieces:
            process.pieces[0].work.lose(process.pieces[0], death)

    def _compare(self, facts: ModelFacts, device: str) -> None:
        if self._facts is None:
            self._facts = facts, device
        first, first_device = self._facts
        if facts.fingerprint != first.fingerprint:
            raise InputError(
                f"devices: the model on {first_device} has the fingerprint {first.fingerprint} "
                f"({first.precision}), and on {device} {facts.fingerprint} ({facts.precision}), "
                "wanted the same; use devices of one kind, and leave the checkpoint as it is"
            )


def _settings(
    source: str, devices: Sequence[str], keywords: dict[str, Any]
) -> list[WorkerSettings]:
    """Workers share the cores for decoding.

    Every worker has as many PyTorch threads as a single process would have, because their number
    changes the bits of an embedding on a CPU: OMP_NUM_THREADS sets it.
    """
    import torch

    from vitrail.image.preprocess import core_count

    cores, threads = core_count(), torch.get_num_threads()
    patient = threads * len(devices) > cores
    image_threads = max(1, cores // len(devices))
    return [
        WorkerSettings(source, device, keywords, image_threads, threads, patient)
        for device in devices
    ]


def _named(error: Exception, device: str) -> Exception:
    """The error of loading on ``device``, which its message names."""
    if isinstance(error, VitrailError):
        return type(error)(f"{device}: {error}")
    error.add_note(f"while a worker loaded the model on {device}")
    return error
