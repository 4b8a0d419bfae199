"""`WorkerProcess`: the parent's side of a worker process."""

from __future__ import annotations

import fcntl
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection

from vitrail.errors import VitrailError
from vitrail.jobs.narrowing import Piece
from vitrail.jobs.rows import EmbedOptions
from vitrail.jobs.worker import ENDING_SIGNALS, Answer, WorkerSettings, serve

PIPE_BYTES = 1 << 20  # Linux's limit; the rows of a chunk usually fit
KILL_SECONDS = 10.0


class WorkerProcess:
    """A process for one device.

    ``pieces``: those that it has not answered, in order; it computes the first. ``is_loaded``: it
    takes pieces.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        """Starts the process. Raises VitrailError if the system starts none."""
        self.device = settings.device
        self.pieces: deque[Piece] = deque()
        self.is_loaded = False
        context = multiprocessing.get_context("spawn")
        requests, self._requests = context.Pipe(duplex=False)
        self._answers, answers = context.Pipe(duplex=False)
        _enlarge(answers)
        self._process = context.Process(
            target=serve,
            args=(settings, requests, answers),
            name=f"vitrail-{settings.device}",
            daemon=True,
        )
        try:
            with _without_signals():
                self._process.start()
        except OSError as error:
            self._close_pipes()
            raise VitrailError(
                f"{self.device}: cannot start a process: {error.strerror or error}; name fewer "
                "devices, or raise the limit of processes"
            ) from error
        finally:
            requests.close()
            answers.close()

    @property
    def waitables(self) -> tuple[Connection, int]:
        """For `multiprocessing.connection.wait`: ready if `receive` has something to say."""
        return self._answers, self._process.sentinel

    def give(self, piece: Piece, options: EmbedOptions) -> None:
        """Sends ``piece``. If the process has died, `receive` will say so."""
        self.pieces.append(piece)
        with suppress(OSError):
            self._requests.send(piece.task(options))

    def receive(self) -> Answer | None:
        """The next answer; None if the process has died. Call it if one of `waitables` is ready."""
        try:
            if self._answers.poll():
                answer: Answer = self._answers.recv()
                return answer
        except (EOFError, OSError):  # OSError: it died while it sent an answer
            pass
        return None

    def end(self) -> str:
        """Kills the process, if it still runs, and says how it ended: "SIGKILL" for example."""
        self._process.kill()
        self._process.join(KILL_SECONDS)
        self._close_pipes()
        code = self._process.exitcode
        if code is None:
            return "cannot be killed"
        if code >= 0:
            return f"exit status {code}"
        with suppress(ValueError):
            return signal.Signals(-code).name
        return f"signal {-code}"

    def _close_pipes(self) -> None:
        self._requests.close()
        self._answers.close()


def _enlarge(pipe: Connection) -> None:
    """Lets a worker go on to its next chunk while the parent writes a part."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with suppress(OSError):  # the user has too many large pipes: workers wait a little more
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)


@contextmanager
def _without_signals() -> Iterator[None]:
    """Puts off the signals that end a command; a process that starts in here has them blocked.

    Otherwise a process that lost its parent half started would print a traceback.
    """
    resource_tracker.ensure_running()  # if it starts a process, it unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
