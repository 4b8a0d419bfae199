from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrail.cli.options import (
    AsJson,
    BatchSize,
    Device,
    Dtype,
    Local,
    ModelName,
    ResizeOn,
    Revision,
    Size,
    load,
    needed,
    parse_size,
    report,
    tell_unread,
)
from vitrail.errors import CheckpointError, InputError, VitrailError

if TYPE_CHECKING:
    from vitrail.jobs.listing import Source
    from vitrail.model.model import Model

CLASSIFY_BATCH = 32

Found = list[tuple[str, float]] | str


def classify(
    images: Annotated[
        list[str], typer.Argument(help="Image files, folders (searched through) or glob patterns.")
    ],
    model: ModelName = None,
    labels: Annotated[str | None, typer.Option(help="Labels, with commas between.")] = None,
    labels_file: Annotated[Path | None, typer.Option(help="A file of labels, one a line.")] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="A text with {} for the label; may be given often. [default: a photo of a {}]"
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many labels an image.")] = 5,
    as_json: AsJson = False,
    batch_size: BatchSize = None,
    size: Size = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    resize_on: ResizeOn = "host",
    revision: Revision = None,
    local_files_only: Local = False,
) -> None:
    """Give images their most probable labels.

    With --labels or --labels-file: zero-shot, for CLIP. Without: the labels a checkpoint was
    fine-tuned for.
    """
    from vitrail.jobs.listing import find_images, path_text, shown

    options: dict[str, Any] = {"labels": _labels(labels, labels_file), "size": parse_size(size)}
    if template:
        options["templates"] = tuple(template)
    name = needed(model, "--model")
    listing = find_images(images)
    tell_unread(listing.unread)
    paths = listing.sources
    loaded = load(name, device, dtype, revision, local_files_only, resize_on)
    failed: list[tuple[Source, str]] = []
    width = max(len(shown(path)) for path in paths)
    titled = False
    for path, found in _classified(loaded, paths, top, batch_size, options):
        if isinstance(found, str):
            failed.append((path, found))
        if as_json:
            print(_json_line(path_text(path), found))
        elif not isinstance(found, str):
            if not titled:
                print(f"{'image':<{width}}  probability  label")
                titled = True
            for label, probability in found:
                print(f"{shown(path):<{width}}  {probability:11.4f}  {label}")
    report(len(failed), len(paths), failed)
    if len(failed) == len(paths):
        raise typer.Exit(1)


def _classified(
    model: Model,
    paths: Sequence[Source],
    top: int,
    batch_size: int | None,
    options: dict[str, Any],
) -> Iterator[tuple[Source, Found]]:
    """The best labels of each image, or why it has none; one bad image costs no other."""
    step = batch_size or CLASSIFY_BATCH
    for start in range(0, len(paths), step):
        batch = paths[start : start + step]
        try:
            yield from zip(batch, model.classify(batch, **options).top(top), strict=True)
        except VitrailError as failure:
            if isinstance(failure, InputError | CheckpointError):
                raise
            for path in batch:
                try:
                    yield path, model.classify([path], **options).top(top)[0]
                except VitrailError as error:
                    yield path, str(error).removeprefix("image 0: ")


def _json_line(path: str, found: Found) -> str:
    if isinstance(found, str):
        return json.dumps({"path": path, "status": "error", "error": found})
    labels = [{"label": label, "probability": probability} for label, probability in found]
    return json.dumps({"path": path, "status": "ok", "labels": labels})


def _labels(labels: str | None, file: Path | None) -> list[str] | None:
    if labels is not None and file is not None:
        raise typer.BadParameter("give --labels or --labels-file, not both", param_hint="--labels")
    if labels is None and file is None:
        return None
    if file is None:
        where, names = "--labels", (labels or "").split(",")
    else:
        where = "--labels-file"
        try:
            names = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"{file}: {error}", param_hint=where) from error
    found = [name.strip() for name in names if name.strip()]
    if not found:
        raise typer.BadParameter("got no label, wanted one or more", param_hint=where)
    return found
