"""What the commands share: options, the opening of a model, progress, and the last words."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vitrail.model.model import Model

EXAMPLE = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
LOG_SECONDS = 5.0

ModelName = Annotated[
    str | None,
    typer.Option("--model", envvar="VITRAIL_MODEL", help="Checkpoint folder or hub id."),
]
Device = Annotated[str, typer.Option(envvar="VITRAIL_DEVICE", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str, typer.Option(envvar="VITRAIL_DTYPE", help="auto, float32, float16 or bfloat16.")
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a hub id."),
]
Local = Annotated[
    bool,
    typer.Option("--local-files-only", help="Never ask the hub."),
]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Images at once; by memory if not given."),
]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="HxW",
        help="Height x width in pixels, such as 448x672 or 336; else the checkpoint's own.",
    ),
]
ResizeOn = Annotated[
    str,
    typer.Option(
        "--resize-on",
        help="Where decoded images are resized: host, or device. The same bits.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def say(message: str) -> None:
    print(f"vitrail: {message}", file=sys.stderr, flush=True)


def load(
    name: str,
    device: str,
    dtype: str,
    revision: str | None,
    local_files_only: bool,
    resize: str = "host",
) -> Model:
    from vitrail.model import model

    return model.load(
        name,
        device=device,
        dtype=dtype,
        revision=revision,
        local_files_only=local_files_only,
        resize=resize,  # type: ignore[arg-type]  # load checks it
    )


def needed(model: str | None, where: str) -> str:
    if not model:
        raise typer.BadParameter(
            f"none given; wanted a checkpoint folder or a hub id, such as {EXAMPLE} "
            "(or set VITRAIL_MODEL)",
            param_hint=where,
        )
    return model


def parse_size(size: str | None) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = size.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise typer.BadParameter(
            f"got {size!r}, wanted HxW such as 448x672, or one number", param_hint="--size"
        )
    return int(sides[0]), int(sides[-1])


def tell_unread(unread: Mapping[str, int]) -> None:
    """Says what folders hold besides, so that no one thinks it was embedded."""
    if unread:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(unread.items()))
        say(f"left out, since Vitrail does not read these formats: {kinds}")


def report(failed: int, inputs: int, reasons: Sequence[tuple[object, str]]) -> None:
    """Says which images failed."""
    from vitrail.jobs.listing import shown
    from vitrail.jobs.one_file import REASONS

    if not failed:
        return
    say(f"{failed} of {inputs} images failed:")
    for source, reason in reasons[:REASONS]:
        text, why = shown(source), shown(reason)
        print(f"  {why if text in why else f'{text}: {why}'}", file=sys.stderr)
    if failed > REASONS:
        print(f"  and {failed - REASONS} more", file=sys.stderr)


@contextmanager
def progress(total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """A bar where stderr is a terminal, else a line every few seconds."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, unit=f" {unit}", file=sys.stderr) as bar:
            yield lambda done: bar.update(done - bar.n)
        return
    start = last = time.monotonic()

    def log(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LOG_SECONDS:
            last = now
            say(f"{done} of {total} {unit}, {done / (now - start):.1f}/s")

    yield log
