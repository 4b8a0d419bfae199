from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitrail.cli import options
from vitrail.cli.options import Device, Dtype, Local, ModelName, Revision

if TYPE_CHECKING:
    from vitrail.model.model import Model


def demo(
    model: ModelName = None,
    sheet: Annotated[Path, typer.Option(help="The contact sheet, a PNG.")] = Path(
        "vitrail-demo.png"
    ),
    seed: Annotated[int | None, typer.Option(help="Of the scenes; else new ones.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    local_files_only: Local = False,
) -> None:
    """Name and find pictures, and write a contact sheet.

    Rendered scenes are named and searched by words, the sample photos by altered ones. Without
    --model a small bundled CLIP does it, which knows shapes and colours; no network is needed.
    """
    from vitrail.demo.demo import run

    def load(name: str) -> Model:
        return options.load(name, device, dtype, revision, local_files_only)

    run(load, model, sheet, seed)
