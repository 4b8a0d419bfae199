from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrail.cli import console, options

if TYPE_CHECKING:
    from vitrail.jobs.listing import Source
    from vitrail.model.model import Model

CLASSIFY_BATCH = 32

Answer = list[tuple[str, float]] | str
"""The most probable labels of an image with their probabilities, or why the image failed."""


def classify(
    images: Annotated[
        list[str],
        typer.Argument(help="Image files, folders (searched recursively) or glob patterns."),
    ],
    model: options.ModelName = None,
    labels: Annotated[str | None, typer.Option(help="Labels, separated by commas.")] = None,
    labels_file: Annotated[Path | None, typer.Option(help="File of labels, one per line.")] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help="Text with {} for the label; repeatable (default: a photo of a {})."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of labels to print per image.")] = 5,
    as_json: options.AsJson = False,
    batch_size: options.BatchSize = None,
    size: options.Size = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    resize_on: options.ResizeOn = "host",
    memory_limit: options.MemoryLimit = None,
    revision: options.Revision = None,
    local_files_only: options.Local = False,
) -> None:
    """Print the most probable labels of each image.

    With --labels or --labels-file, CLIP compares images and labels (zero-shot). Without them, a
    classifier uses the labels it was trained on.
    """
    from vitrail.jobs.listing import find_images, path_text, shown

    arguments: dict[str, Any] = {
        "labels": _labels(labels, labels_file),
        "size": options.parse_size(size),
    }
    if template:
        arguments["templates"] = tuple(template)
    name = options.require_model(model, "--model")
    listing = find_images(images)
    console.report_unread(listing.unread)
    paths = listing.sources
    loaded = options.load(name, device, dtype, revision, local_files_only, resize_on, memory_limit)
    failed: list[tuple[Source, str]] = []
    width = max(len(shown(path)) for path in paths)
    titled = False
    for path, answer in _classified(loaded, paths, top, batch_size, arguments):
        if isinstance(answer, str):
            failed.append((path, answer))
        if as_json:
            print(_json_line(path_text(path), answer))
        elif not isinstance(answer, str):
            if not titled:
                print(f"{'image':<{width}}  probability  label")
                titled = True
            for label, probability in answer:
                print(f"{shown(path):<{width}}  {probability:11.4f}  {label}")
    console.report_failures(len(failed), len(paths), failed)
    if len(failed) == len(paths):
        raise typer.Exit(1)


def _classified(
    model: Model,
    paths: Sequence[Source],
    top: int,
    batch_size: int | None,
    arguments: dict[str, Any],
) -> Iterator[tuple[Source, Answer]]:
    """The answer for each image; an unreadable image does not stop the others."""
    step = batch_size or CLASSIFY_BATCH
    for start in range(0, len(paths), step):
        batch = paths[start : start + step]
        result = model.classify(batch, on_error="skip", **arguments)
        answers: dict[int, Answer] = dict(zip(result.index, result.top(top), strict=True))
        answers |= {i: reason.removeprefix(f"image {i}: ") for i, reason in result.errors.items()}
        yield from ((path, answers[i]) for i, path in enumerate(batch))


def _json_line(path: str, answer: Answer) -> str:
    if isinstance(answer, str):
        return json.dumps({"path": path, "status": "error", "error": answer})
    labels = [{"label": label, "probability": probability} for label, probability in answer]
    return json.dumps({"path": path, "status": "ok", "labels": labels})


def _labels(labels: str | None, file: Path | None) -> list[str] | None:
    if labels is not None and file is not None:
        raise typer.BadParameter("give --labels or --labels-file, not both", param_hint="--labels")
    if labels is None and file is None:
        return None
    option = "--labels" if file is None else "--labels-file"
    lines = (labels or "").split(",") if file is None else options.read_lines(file, option)
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise typer.BadParameter("got no label, wanted one or more", param_hint=option)
    return names
