from __future__ import annotations

import json
from typing import Annotated

import typer

from vitrail.cli.options import AsJson, Local, ModelArgument, Revision, load, require_model


def info(
    model: ModelArgument = None,
    revision: Revision = None,
    local_files_only: Local = False,
    fingerprint: Annotated[
        bool,
        typer.Option("--fingerprint", help="Also print the fingerprint (reads all weights)."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Describe a checkpoint without reading its weights.

    Prints its towers, how it preprocesses images and texts, and the backend and device that would
    run it on this machine.
    """
    from vitrail.tools.info import describe, read

    name = require_model(model, "MODEL")
    spec, facts = read(name, revision, local_files_only)
    if fingerprint:
        facts["fingerprint"] = load(name, "auto", "auto", revision, local_files_only).fingerprint
    print(json.dumps(facts, indent=2) if as_json else describe(spec, facts))
