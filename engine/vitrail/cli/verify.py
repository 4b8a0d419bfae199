import json
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from vitrail.cli import console, options

TEXTS = ("a photo of a cat", "two people on a beach", "Stained glass.")


def verify(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Image files, folders, glob patterns or .tar files (default: the sample photos)."
        ),
    ] = None,
    model: options.ModelName = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to compare; repeatable (default: three captions)."),
    ] = None,
    texts_file: Annotated[Path | None, typer.Option(help="File of texts, one per line.")] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Checkpoint that a folder of int8 weights was made from."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Largest number of images to compare.")] = 512,
    as_json: options.AsJson = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    local_files_only: options.Local = False,
) -> None:
    """Compare Vitrail with transformers on your images and texts.

    Compares configuration, pixels, tokens and embeddings, and reports how far the largest residual
    stays below float16's maximum. Without transformers the reference is Vitrail in float32; an
    error that both runs share stays hidden.

    A folder that vitrail quantize wrote is compared with --against, the checkpoint that it was made
    from: on your pictures, the mean centered cosine and the neighbors kept say whether int8 may be
    used. Without --against only its files, integer sums and codes are checked.

    Exit codes: 0: all checks pass; 1: a check fails, or an error.
    """
    from vitrail.jobs.listing import Source, find_images, shown
    from vitrail.tools.verify import verify as compare

    name = options.require_model(model, "--model")
    loaded = options.load(name, device, dtype, revision, local_files_only)
    images: list[Source] = []
    if loaded.spec.vision is not None:
        if not inputs:
            console.say("no images given; using the sample photos")
        photos = str(resources.files("vitrail") / "assets" / "photos")
        listing = find_images(inputs or [photos])
        console.report_unread(listing.unread)
        images = listing.sources[:limit]
    texts = list(text or [])
    if texts_file is not None:
        texts += options.read_lines(texts_file, "--texts-file")
    if loaded.spec.text is not None and not texts:
        console.say("no texts given; using three captions")
        texts = list(TEXTS)
    report = compare(loaded, images, texts, against=against, own=bool(inputs))
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        width = max(len(check.name) for check in report.checks)
        print(f"{loaded.spec.architecture} in {report.dtype} against {report.reference}")
        for check in report.checks:
            print(f"{check.verdict.upper():<5} {check.name:<{width}}  {shown(check.text)}")
        print("PASS" if report.passed else "FAIL")
    if not report.passed:
        raise typer.Exit(1)
