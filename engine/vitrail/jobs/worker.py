"""A worker process: loads a model on its device, then embeds the tasks that its parent sends.

This module imports no torch, so that settings of the process can be made before. A thread reads the
parent's pipe: so the parent never waits to send a task, and the process ends with its parent.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from vitrail.jobs.embedder import ModelFacts, embed_chunk, model_facts
from vitrail.jobs.listing import Source
from vitrail.jobs.rows import EmbedOptions, Floats

if TYPE_CHECKING:
    from vitrail.model.model import Model

ENDING_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
"""A process starts with these blocked."""
PARENT_SECONDS = 1.0
PLAIN_ERRORS = ("builtins", "vitrail.errors")
"""The modules whose exceptions can be sent to the parent."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker process loads, where, and how many threads it uses.

    ``keywords``: those of `vitrail.load` besides the device. ``image_threads`` decode images;
    ``torch_threads``: of PyTorch's operators on the CPU. ``patient``: threads that wait leave their
    core to the others.
    """

    source: str
    device: str
    keywords: Mapping[str, Any]
    image_threads: int
    torch_threads: int
    patient: bool


@dataclass(frozen=True, slots=True)
class Task:
    """Sources to embed by one call; those at the positions ``withheld`` count as unreadable."""

    sources: Sequence[Source]
    withheld: frozenset[int]
    options: EmbedOptions


@dataclass(frozen=True, slots=True)
class Loaded:
    """The model is loaded."""

    facts: ModelFacts


@dataclass(frozen=True, slots=True)
class Computed:
    """The oldest task is done: an error or None per source, and the embeddings of the others."""

    errors: Sequence[str | None]
    embeddings: Floats


@dataclass(frozen=True, slots=True)
class Failed:
    """Loading, or else the oldest task, raised ``error``."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Warned:
    """A warning of Python that this process has not sent before."""

    text: str
    category: type[Warning]
    file: str
    line: int


Answer = Loaded | Computed | Failed | Warned


class _Answers:
    """The pipe to the parent, for all threads of this process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._lock = pipe, threading.Lock()
        self._warned: set[Warned] = set()

    def send(self, answer: Answer) -> None:
        with self._lock:
            try:
                self._pipe.send(answer)
            except BrokenPipeError:  # the parent has ended
                os._exit(1)

    def send_error(self, error: Exception) -> None:
        if type(error).__module__ not in PLAIN_ERRORS:
            error = RuntimeError("".join(traceback.format_exception(error)))
        self.send(Failed(error))

    def send_warning(
        self, message: Warning | str, category: type[Warning], file: str, line: int, *_: Any
    ) -> None:
        """For `warnings.showwarning`."""
        if category.__module__ not in PLAIN_ERRORS:
            category = UserWarning
        warned = Warned(str(message), category, file, line)
        if warned not in self._warned:
            self._warned.add(warned)
            self.send(warned)


def serve(settings: WorkerSettings, requests: Connection, answers: Connection) -> None:
    """The life of a worker process, until its parent ends or closes ``requests``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)
    parent_process = multiprocessing.parent_process()
    parent_id = parent_process.pid if parent_process and parent_process.pid else os.getppid()
    tasks: SimpleQueue[Task] = SimpleQueue()
    threading.Thread(target=_receive, args=(requests, tasks, parent_id), daemon=True).start()
    parent = _Answers(answers)
    warnings.showwarning = parent.send_warning  # type: ignore[assignment]
    warnings.simplefilter("always")  # the parent's filters decide
    try:
        model = _load(settings)
        parent.send(Loaded(model_facts(model)))
    except Exception as error:
        parent.send_error(error)
        return
    while True:
        task = tasks.get()
        try:
            parent.send(_embed(model, task))
        except Exception as error:
            parent.send_error(error)


def _receive(requests: Connection, tasks: SimpleQueue[Task], parent: int) -> None:
    """Reads tasks until the parent ends: then the pipe does, unless a fork of the parent has it."""
    try:
        while os.getppid() == parent:
            if requests.poll(PARENT_SECONDS):
                tasks.put(requests.recv())
    finally:
        os._exit(1)


def _load(settings: WorkerSettings) -> Model:
    if settings.patient:
        os.environ["OMP_WAIT_POLICY"] = "passive"  # read when torch is imported
    import torch

    from vitrail.image.preprocess import limit_cores
    from vitrail.model.loading import load

    limit_cores(settings.image_threads)
    if torch.get_num_threads() != settings.torch_threads:  # setting it is not without effect
        torch.set_num_threads(settings.torch_threads)
    if settings.device.startswith("cuda"):
        torch.cuda.set_device(settings.device)  # so that no other GPU gets a context
    return load(settings.source, device=settings.device, **settings.keywords)


def _embed(model: Model, task: Task) -> Computed:
    # an empty file fails before anything is computed, as every unreadable image does
    images: list[Any] = list(task.sources)
    for position in task.withheld:
        images[position] = b""
    rows = embed_chunk(model, images, task.options)
    return Computed(rows.errors, rows.embeddings)
