from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from vitrail.cli.options import Local, Revision, Size, needed, parse_size, progress, say


def export(
    model: Annotated[
        str | None, typer.Argument(envvar="VITRAIL_MODEL", help="Checkpoint folder or hub id.")
    ] = None,
    folder: Annotated[Path | None, typer.Argument(help="The folder to write.")] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="A GPU's architecture, such as sm_90; may be given often. Else that of this GPU.",
        ),
    ] = None,
    size: Size = None,
    dtype: Annotated[
        str, typer.Option(envvar="VITRAIL_DTYPE", help="float16 or bfloat16.")
    ] = "float16",
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an earlier export."),
    ] = False,
    revision: Revision = None,
    local_files_only: Local = False,
) -> None:
    """Write weights, plans and compiled kernels as one folder.

    --model takes the folder as it takes a checkpoint; on a GPU of one of the architectures nothing
    is compiled for embeddings at its size, and triton may be missing. Exporting needs triton and no
    GPU, and takes minutes. Architectures: sm_80, sm_86, sm_89, sm_90, sm_100, sm_120.
    """
    from vitrail.tools.export import export_model

    name, sides = needed(model, "MODEL"), parse_size(size)
    if folder is None:
        raise typer.BadParameter("none given; wanted a folder to write", param_hint="FOLDER")
    written = export_model(
        name,
        folder,
        None if arch is None else [_number(one) for one in arch],
        size=sides,
        dtype=dtype,
        overwrite=overwrite,
        revision=revision,
        local_files_only=local_files_only,
        progress=functools.partial(progress, unit="kernels"),
    )
    kernels = ", ".join(f"{count} for sm_{arch}" for arch, count in written.kernels.items())
    say(f"{written.bytes / 1e6:,.1f} MB; kernels: {kernels}")
    print(folder)


def _number(arch: str) -> int:
    digits = arch.removeprefix("sm_")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 3):
        raise typer.BadParameter(f"got {arch!r}, wanted such as sm_90", param_hint="--arch")
    return int(digits)
