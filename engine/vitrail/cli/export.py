import functools
from pathlib import Path
from typing import Annotated

import typer

from vitrail.cli import console, options


def export(
    model: options.ModelArgument = None,
    folder: Annotated[Path | None, typer.Argument(help="Folder to write.")] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="GPU architecture, such as sm_90; repeatable (default: this machine's GPU)."
        ),
    ] = None,
    size: options.Size = None,
    dtype: options.HalfDtype = "float16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an old export.")] = False,
    revision: options.Revision = None,
    local_files_only: options.Local = False,
) -> None:
    """Write weights, plans and compiled kernels as one folder.

    Other commands and vitrail.load take the folder in place of a checkpoint. On a GPU of an
    exported architecture, images of the exported size need no compilation and no Triton. Exporting
    needs Triton but no GPU, and takes minutes. Architectures: sm_80, sm_86, sm_89, sm_90, sm_100,
    sm_120.
    """
    from vitrail.tools.export import export_model

    name, sides = options.require_model(model, "MODEL"), options.parse_size(size)
    if folder is None:
        raise typer.BadParameter("none given; wanted a folder to write", param_hint="FOLDER")
    with console.say_warnings():
        written = export_model(
            name,
            folder,
            None if arch is None else [_number(name) for name in arch],
            size=sides,
            dtype=dtype,
            overwrite=overwrite,
            revision=revision,
            local_files_only=local_files_only,
            progress=functools.partial(console.progress, unit="kernels"),
        )
    kernels = ", ".join(f"{count} for sm_{number}" for number, count in written.kernels.items())
    console.say(f"{written.bytes / 1e6:,.1f} MB; kernels: {kernels}")
    print(folder)


def _number(arch: str) -> int:
    digits = arch.removeprefix("sm_")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 3):
        raise typer.BadParameter(f"got {arch!r}, wanted such as sm_90", param_hint="--arch")
    return int(digits)
