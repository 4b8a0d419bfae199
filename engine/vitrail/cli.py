"""The ``vitrail`` command. Results go to stdout, everything else to stderr.

Exit codes: 0 done, also where only some images failed; 1 an error, or every image failed; 2 wrong
usage; 130 interrupted. Each command imports what it needs, so that ``--help`` stays quick.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from vitrail._version import __version__
from vitrail.errors import CheckpointError, InputError, VitrailError

if TYPE_CHECKING:
    from vitrail.model import Model

EXAMPLE = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
LOG_SECONDS = 5.0
CLASSIFY_BATCH = 32


class Commands(TyperGroup):
    """Turns what users may meet into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except VitrailError as error:
            say(f"error: {' '.join(str(error).split())}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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
    typer.Option(envvar="VITRAIL_REVISION", help="Branch, tag or commit of a hub id."),
]
Local = Annotated[
    bool,
    typer.Option(
        "--local-files-only", envvar="VITRAIL_LOCAL_FILES_ONLY", help="Never ask the hub."
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1, envvar="VITRAIL_BATCH_SIZE", help="Images at once; by memory if not given."
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        envvar="VITRAIL_SIZE",
        metavar="HxW",
        help="Height x width in pixels, such as 448x672 or 336; else the checkpoint's own.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", envvar="VITRAIL_JSON", help="Print JSON.")]


def main() -> None:
    """The entry point. A SIGTERM unwinds like an exit, so that no unfinished file is left."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    app(prog_name="vitrail")


def say(message: str) -> None:
    print(f"vitrail: {message}", file=sys.stderr, flush=True)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"vitrail {__version__}")
        raise typer.Exit


@app.callback()
def _vitrail(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """ViT, CLIP and DINOv2 checkpoints to embeddings and class scores."""


@app.command()
def info(
    model: Annotated[
        str | None, typer.Argument(envvar="VITRAIL_MODEL", help="Checkpoint folder or hub id.")
    ] = None,
    revision: Revision = None,
    local_files_only: Local = False,
    fingerprint: Annotated[
        bool,
        typer.Option(
            "--fingerprint",
            envvar="VITRAIL_FINGERPRINT",
            help="Also the fingerprint; reads all weights.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint is.

    Its towers, how its images and texts will be treated, and what would serve it. Reads no weights.
    """
    from vitrail.info import describe, read

    name = _needed(model, "MODEL")
    spec, facts = read(name, revision, local_files_only)
    if fingerprint:
        facts["fingerprint"] = _load(name, "auto", "auto", revision, local_files_only).fingerprint
    print(json.dumps(facts, indent=2) if as_json else describe(spec, facts))


@app.command()
def embed(
    inputs: Annotated[
        list[str], typer.Argument(help="Image files, folders (searched through) or glob patterns.")
    ],
    model: ModelName = None,
    out: Annotated[
        Path, typer.Option(envvar="VITRAIL_OUT", help="A .npy or .parquet file to write.")
    ] = Path("embeddings.npy"),
    batch_size: BatchSize = None,
    size: Size = None,
    normalize: Annotated[
        bool, typer.Option(envvar="VITRAIL_NORMALIZE", help="Scale embeddings to unit length.")
    ] = False,
    fp16_output: Annotated[
        bool,
        typer.Option("--fp16-output", envvar="VITRAIL_FP16_OUTPUT", help="Store float16."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", envvar="VITRAIL_OVERWRITE", help="Replace old output.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    local_files_only: Local = False,
) -> None:
    """Embed images into one file.

    An image that cannot be read costs no other. A .npy holds the embeddings of those that could;
    the .csv beside it says which row is which file, and why others failed; the .json says what made
    them. A .parquet holds all that in one file, a row an image.
    """
    from vitrail import embed as work

    pixels = _parse_size(size)
    name = _needed(model, "--model")
    work.check_output(out, overwrite)
    paths = work.find_images(inputs)
    loaded = _load(name, device, dtype, revision, local_files_only)
    with _progress(len(paths)) as progress:
        summary = work.embed(
            loaded,
            paths,
            out,
            batch_size=batch_size,
            size=pixels,
            normalize=normalize,
            precision="float16" if fp16_output else "float32",
            overwrite=overwrite,
            progress=progress,
        )
    _report(summary.failed, summary.inputs, summary.reasons)
    print(out)


@app.command()
def classify(
    images: Annotated[
        list[str], typer.Argument(help="Image files, folders (searched through) or glob patterns.")
    ],
    model: ModelName = None,
    labels: Annotated[
        str | None, typer.Option(envvar="VITRAIL_LABELS", help="Labels, with commas between.")
    ] = None,
    labels_file: Annotated[
        Path | None,
        typer.Option(envvar="VITRAIL_LABELS_FILE", help="A file of labels, one a line."),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="A text with {} for the label; may be given often. [env var: VITRAIL_TEMPLATE, "
            "one a line] [default: a photo of a {}]"
        ),
    ] = None,
    top: Annotated[
        int, typer.Option(min=1, envvar="VITRAIL_TOP", help="How many labels an image.")
    ] = 5,
    as_json: AsJson = False,
    batch_size: BatchSize = None,
    size: Size = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    local_files_only: Local = False,
) -> None:
    """Give images their most probable labels.

    With --labels or --labels-file: zero-shot, for CLIP. Without: the labels a checkpoint was
    fine-tuned for.
    """
    from vitrail.embed import find_images, path_text

    options: dict[str, Any] = {"labels": _labels(labels, labels_file), "size": _parse_size(size)}
    templates = template or os.environ.get("VITRAIL_TEMPLATE", "").splitlines()
    if templates:
        options["templates"] = tuple(templates)
    name = _needed(model, "--model")
    paths = find_images(images)
    loaded = _load(name, device, dtype, revision, local_files_only)
    failed: list[tuple[Path, str]] = []
    width = max(len(path_text(path)) for path in paths)
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
                print(f"{path_text(path):<{width}}  {probability:11.4f}  {label}")
    _report(len(failed), len(paths), failed)


@app.command()
def demo(
    model: ModelName = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    local_files_only: Local = False,
) -> None:
    """Try it on the sample photos.

    Finds each photo again from its crop and its mirror image. Without --model the weights are
    random, and no network is needed.
    """
    from vitrail.demo import run

    def load(name: str) -> Model:
        return _load(name, device, dtype, revision, local_files_only)

    run(load, model)


Found = list[tuple[str, float]] | str


def _classified(
    model: Model,
    paths: Sequence[Path],
    top: int,
    batch_size: int | None,
    options: dict[str, Any],
) -> Iterator[tuple[Path, Found]]:
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


def _load(
    name: str, device: str, dtype: str, revision: str | None, local_files_only: bool
) -> Model:
    from vitrail.model import load

    return load(
        name, device=device, dtype=dtype, revision=revision, local_files_only=local_files_only
    )


def _needed(model: str | None, where: str) -> str:
    if not model:
        raise typer.BadParameter(
            f"none given; wanted a checkpoint folder or a hub id, such as {EXAMPLE} "
            "(or set VITRAIL_MODEL)",
            param_hint=where,
        )
    return model


def _parse_size(size: str | None) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = size.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise typer.BadParameter(
            f"got {size!r}, wanted HxW such as 448x672, or one number", param_hint="--size"
        )
    return int(sides[0]), int(sides[-1])


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


def _report(failed: int, inputs: int, reasons: Sequence[tuple[Path, str]]) -> None:
    """Says which images failed; where all did, that is an error."""
    from vitrail.embed import REASONS, path_text

    if not failed:
        return
    say(f"{failed} of {inputs} images failed:")
    for path, reason in reasons[:REASONS]:
        text = path_text(path)
        print(f"  {reason if text in reason else f'{text}: {reason}'}", file=sys.stderr)
    if failed > REASONS:
        print(f"  and {failed - REASONS} more", file=sys.stderr)
    if failed == inputs:
        raise typer.Exit(1)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar where stderr is a terminal, else a line every few seconds."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, unit=" images", file=sys.stderr) as bar:
            yield lambda done: bar.update(done - bar.n)
        return
    start = last = time.monotonic()

    def log(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LOG_SECONDS:
            last = now
            say(f"{done} of {total} images, {done / (now - start):.1f}/s")

    yield log


if __name__ == "__main__":
    main()
