"""Options and arguments that the commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitrail.cli import console

if TYPE_CHECKING:
    from vitrail.model.model import Model

EXAMPLE = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"

_MODEL_HELP = "Checkpoint folder, or Hugging Face Hub id."
ModelName = Annotated[str | None, typer.Option("--model", envvar="VITRAIL_MODEL", help=_MODEL_HELP)]
ModelArgument = Annotated[str | None, typer.Argument(envvar="VITRAIL_MODEL", help=_MODEL_HELP)]
Device = Annotated[
    str,
    typer.Option(envvar="VITRAIL_DEVICE", help="Device to run on: auto, cpu, cuda or cuda:N."),
]
Dtype = Annotated[
    str,
    typer.Option(
        envvar="VITRAIL_DTYPE",
        help="Compute dtype: auto, float32, float16 or bfloat16; or int8, for a folder that "
        "vitrail quantize wrote.",
    ),
]
HalfDtype = Annotated[
    str, typer.Option(envvar="VITRAIL_DTYPE", help="Compute dtype: float16 or bfloat16.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repository.")]
Local = Annotated[
    bool,
    typer.Option("--local-files-only", help="Use files on this machine; never ask the hub."),
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Images per batch (default: chosen by memory use).")
]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="HxW",
        help="Image size in pixels, height x width, such as 448x672 or 336 "
        "(default: the checkpoint's).",
    ),
]
ResizeOn = Annotated[
    str,
    typer.Option(
        "--resize-on",
        help="Where to resize decoded images: host or device. Both give the same bits.",
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        envvar="VITRAIL_MEMORY_LIMIT",
        help="The most memory on the device beyond the weights, such as 512M or 2G (powers of "
        "1024); batches are cut to fit (default: no limit).",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load(
    name: str,
    device: str,
    dtype: str,
    revision: str | None,
    local_files_only: bool,
    resize: str = "host",
    memory_limit: str | None = None,
) -> Model:
    from vitrail.model import loading

    with console.say_warnings():
        return loading.load(
            name,
            device=device,
            dtype=dtype,
            revision=revision,
            local_files_only=local_files_only,
            resize=resize,  # type: ignore[arg-type]  # load checks it
            memory_limit=memory_limit,
        )


def require_model(model: str | None, parameter: str) -> str:
    """The name of the model; wrong usage of ``parameter`` if the user gave none."""
    if not model:
        raise typer.BadParameter(
            f"none given; wanted a checkpoint folder or a hub id, such as {EXAMPLE} "
            "(or set VITRAIL_MODEL)",
            param_hint=parameter,
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


def read_lines(file: Path, option: str) -> list[str]:
    """The lines of a UTF-8 file that are not blank; wrong usage if the file cannot be read."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file}: {error}", param_hint=option) from error
    return [line for line in lines if line.strip()]
