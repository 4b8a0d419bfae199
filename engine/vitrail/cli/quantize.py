from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitrail.cli import console, options

if TYPE_CHECKING:
    from vitrail.tools.quantize import Summary


def quantize(
    model: options.ModelArgument = None,
    folder: Annotated[Path | None, typer.Argument(help="Folder to write.")] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            help="Your image files, folders, glob patterns or .tar files; repeatable (default: the "
            "sample photos, which verify nothing)."
        ),
    ] = None,
    calibration: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Pictures to calibrate with (default: 64 images, or 36 crops of the sample "
            "photos; 0: those crops, so that every image checks).",
        ),
    ] = None,
    check: Annotated[
        int, typer.Option(min=2, help="Other pictures, on which the result is checked.")
    ] = 64,
    gptq: Annotated[
        bool,
        typer.Option(
            "--gptq/--no-gptq", help="Round so that outputs are accurate, or to the nearest code."
        ),
    ] = True,
    alpha: Annotated[
        float,
        typer.Option(min=0, max=1, help="How far smoothing moves ranges from inputs to weights."),
    ] = 0.7,
    keep_fp16: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of linears to leave in 16 bits, such as '0.*'; repeatable."),
    ] = None,
    min_centered: Annotated[
        float,
        typer.Option(min=0, max=1, help="Mean centered cosine from which the result is good."),
    ] = 0.999,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an old result.")] = False,
    as_json: options.AsJson = False,
    device: options.Device = "auto",
    revision: options.Revision = None,
    local_files_only: options.Local = False,
) -> None:
    """Write a folder of int8 weights, and say whether your pictures allow it.

    Other commands and vitrail.load take the folder in place of a checkpoint. The image tower's qkv,
    up and down projections become int8; everything else stays as it is. Give pictures of your own
    with --images: on pictures that look alike int8 can fail where it is excellent on others. After
    an interruption, the same command resumes.

    Exit codes: 0: good; 3: written with a warning, or not verified on your pictures; 1: refused
    and not written, or an error.
    """
    from vitrail.int8.guard import EXIT_CODES
    from vitrail.jobs.listing import find_images
    from vitrail.tools.quantize import quantize_model

    name = options.require_model(model, "MODEL")
    if folder is None:
        raise typer.BadParameter("none given; wanted a folder to write", param_hint="FOLDER")
    sources = []
    if images:
        listing = find_images(images)
        console.report_unread(listing.unread)
        sources = listing.sources
    else:
        console.say("no --images given; using crops of the sample photos, which verify nothing")
    summary = quantize_model(
        name,
        folder,
        sources,
        calibration=calibration,
        check=check,
        alpha=alpha,
        rounding="gptq" if gptq else "nearest",
        keep_fp16=keep_fp16 or (),
        min_centered=min_centered,
        overwrite=overwrite,
        device=device,
        revision=revision,
        local_files_only=local_files_only,
        progress=functools.partial(console.progress, unit="blocks"),
        say=console.say,
    )
    for reason in summary.pictures.unread:
        console.say(f"left out: {reason}")
    if as_json:
        print(json.dumps(summary.to_dict(), indent=2))
    else:
        _print(summary)
    if code := EXIT_CODES[summary.guard.verdict]:
        raise typer.Exit(code)


def _print(summary: Summary) -> None:
    lines = list(summary.lines())
    width = max(len(topic) for topic, _ in lines)
    for topic, text in lines:
        print(f"{topic:<{width}}  {text}")
