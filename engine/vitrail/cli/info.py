import json
from typing import Annotated

import typer

from vitrail.cli import options


def info(
    model: options.ModelArgument = None,
    revision: options.Revision = None,
    local_files_only: options.Local = False,
    fingerprint: Annotated[
        bool,
        typer.Option("--fingerprint", help="Also print the fingerprint (reads all weights)."),
    ] = False,
    memory_limit: options.MemoryLimit = None,
    as_json: options.AsJson = False,
) -> None:
    """Describe a checkpoint without reading its weights.

    Prints its towers, how it preprocesses images and texts, the backend and device that would run
    it on this machine, and the items of a call that fit a memory limit.
    """
    from vitrail.tools.info import describe, read

    name = options.require_model(model, "MODEL")
    spec, facts = read(name, revision, local_files_only, memory_limit)
    if fingerprint:
        facts["fingerprint"] = options.load(
            name, "auto", "auto", revision, local_files_only
        ).fingerprint
    print(json.dumps(facts, indent=2) if as_json else describe(spec, facts))
