from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from vitrail.cli.options import (
    AsJson,
    Device,
    Dtype,
    Local,
    ModelName,
    Revision,
    load,
    needed,
    say,
    tell_unread,
)

TEXTS = ("a photo of a cat", "two people on a beach", "Stained glass.")


def verify(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(help="Images, folders, patterns or tars; else the sample photos."),
    ] = None,
    model: ModelName = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="A text; may be given often. Else three captions."),
    ] = None,
    texts_file: Annotated[Path | None, typer.Option(help="A file of texts, one a line.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Images at most, the first ones.")] = 512,
    as_json: AsJson = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    local_files_only: Local = False,
) -> None:
    """Check the engine against transformers, on your images and texts.

    Compares configuration, pixels, tokens and embeddings, and says how far the largest residual is
    from float16's end. Without transformers the engine in float32 is the reference and sees less.

    Exit codes: 0 all checks pass, 1 one fails or an error.
    """
    from vitrail.jobs.listing import Source, find_images, shown
    from vitrail.tools.verify import verify as compare

    name = needed(model, "--model")
    loaded = load(name, device, dtype, revision, local_files_only)
    images: list[Source] = []
    if loaded.spec.vision is not None:
        if not inputs:
            say("no images given: the sample photos")
        photos = str(resources.files("vitrail") / "assets" / "photos")
        found = find_images(inputs or [photos])
        tell_unread(found.unread)
        images = found.sources[:limit]
    texts = list(text or [])
    if texts_file is not None:
        try:
            lines = texts_file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"{texts_file}: {error}", param_hint="--texts-file") from error
        texts += [line for line in lines if line.strip()]
    if loaded.spec.text is not None and not texts:
        say("no texts given: three captions")
        texts = list(TEXTS)
    report = compare(loaded, images, texts)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        width = max(len(check.name) for check in report.checks)
        print(f"{loaded.spec.architecture} against {report.reference}")
        for check in report.checks:
            print(f"{check.verdict.upper():<5} {check.name:<{width}}  {shown(check.text)}")
        print("PASS" if report.passed else "FAIL")
    if not report.passed:
        raise typer.Exit(1)
