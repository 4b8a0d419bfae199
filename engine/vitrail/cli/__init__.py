"""The ``vitrail`` command. Results go to stdout, everything else to stderr.

Exit codes: 0: done; 1: an error, or every image failed; 2: wrong usage; 3: some images failed
(embed); 130: interrupted. Each command is a file in this folder. It imports heavy modules only when
it runs, so that ``--help`` stays quick.
"""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vitrail._version import __version__
from vitrail.cli import classify, console, demo, embed, export, info, quantize, tune, verify
from vitrail.errors import VitrailError


class OutputError(OSError):
    """Stdout cannot be written."""


class Output(TextIOWrapper):
    """A stdout that raises OutputError, so that its errors differ from those of other files."""

    def write(self, text: str) -> int:
        with self._output_errors():
            return super().write(text)

    def flush(self) -> None:
        with self._output_errors():
            super().flush()

    @contextmanager
    def _output_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from error


class Commands(TyperGroup):
    """Turns each error that a user can meet into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except OutputError:
            raise
        except (VitrailError, OSError, ImportError) as error:
            # OSError, ImportError: a disk or a library of this machine fails.
            console.say(f"error: {' '.join(str(error).split())}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            console.say("interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(requested: bool) -> None:
    if requested:
        print(f"vitrail {__version__}")
        raise typer.Exit


@app.callback()
def _vitrail(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compute embeddings and class scores with vision transformers such as ViT, CLIP and DINOv2."""


for command in (
    info.info,
    embed.embed,
    classify.classify,
    verify.verify,
    quantize.quantize,
    tune.tune,
    export.export,
    demo.demo,
):  # in the order of --help
    app.command()(command)


def main() -> None:
    """The entry point. SIGTERM and SIGHUP unwind like an exit, so no unfinished file stays."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    stdout = sys.stdout
    if isinstance(stdout, TextIOWrapper):  # "backslashreplace": a terminal may lack a character
        sys.stdout = Output(
            stdout.buffer, stdout.encoding, "backslashreplace", None, stdout.line_buffering
        )
    code: int | str | None = 0
    try:
        try:
            app(prog_name="vitrail")
        except SystemExit as done:
            code = done.code
        sys.stdout.flush()
    except OutputError as error:
        # Otherwise the interpreter flushes again when it ends, and fails again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:  # EPIPE: the reader closed the pipe, for example `head`
            console.say(f"error: cannot write the output: {error.strerror or error}")
        sys.exit(1)
    sys.exit(code)
