from __future__ import annotations

import json
from typing import Annotated

import typer

from vitrail.cli.options import AsJson, Local, Revision, load, needed


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
            help="Also the fingerprint; reads all weights.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint is.

    Its towers, how its images and texts will be treated, and what would serve it. Reads no weights.
    """
    from vitrail.tools.info import describe, read

    name = needed(model, "MODEL")
    spec, facts = read(name, revision, local_files_only)
    if fingerprint:
        facts["fingerprint"] = load(name, "auto", "auto", revision, local_files_only).fingerprint
    print(json.dumps(facts, indent=2) if as_json else describe(spec, facts))
