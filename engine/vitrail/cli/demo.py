from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitrail.cli import options

if TYPE_CHECKING:
    from vitrail.model.model import Model


def demo(
    model: options.ModelName = None,
    sheet: Annotated[Path, typer.Option(help="Contact sheet to write, a PNG file.")] = Path(
        "vitrail-demo.png"
    ),
    seed: Annotated[
        int | None, typer.Option(help="Random seed for the scenes (default: a new one).")
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    local_files_only: options.Local = False,
) -> None:
    """Recognize and search pictures, and write a contact sheet.

    The model names rendered scenes, finds them by text, and recognizes altered copies of the sample
    photos. The default model is a small bundled CLIP: it knows colors and shapes, and needs no
    network.
    """
    from vitrail.demo.demo import run

    def load(name: str) -> Model:
        return options.load(name, device, dtype, revision, local_files_only)

    run(load, model, sheet, seed)
    print(f"\nWith a CLIP that knows the world:\n  vitrail demo --model {options.EXAMPLE}")
