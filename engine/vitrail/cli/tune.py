from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from vitrail.cli.options import Local, Revision, Size, needed, parse_size, say

BATCHES = (1, 8, 64)


def tune(
    model: Annotated[
        str | None, typer.Argument(envvar="VITRAIL_MODEL", help="Checkpoint folder or hub id.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The table, a .json; else sm_<arch>.json in VITRAIL_TUNED, or in ./tuned.",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Images, or texts, at once; may be given often. Else 1, 8 and 64.",
        ),
    ] = None,
    size: Size = None,
    dtype: Annotated[
        str, typer.Option(envvar="VITRAIL_DTYPE", help="float16 or bfloat16.")
    ] = "float16",
    revision: Revision = None,
    local_files_only: Local = False,
) -> None:
    """Time kernel configurations on this GPU, for a checkpoint.

    Writes those that are faster than the built-in choice, and give the same bits, into a table that
    VITRAIL_TUNED=<its folder> puts into force; what the table holds of other shapes stays. Takes a
    minute or two and reads no weights. The table is written after every shape.
    """
    from vitrail.checkpoint.files import open_checkpoint
    from vitrail.tools.tune import cuda_bench, existing, provenance, save
    from vitrail.tools.tune import tune as search
    from vitrail.tools.workload import problems
    from vitrail.zoo import read_spec
    from vitrail_kernels.configs import VARIABLE

    name, sides, batches = needed(model, "MODEL"), parse_size(size), batch or BATCHES
    if dtype not in ("float16", "bfloat16"):
        raise typer.BadParameter(f"got {dtype!r}, wanted float16 or bfloat16", param_hint="--dtype")
    bench = cuda_bench()
    own = f"sm_{bench.target.arch}.json"
    file = out or Path(os.environ.get(VARIABLE) or "tuned", own)
    existing(file)
    spec = read_spec(open_checkpoint(name, revision=revision, local_files_only=local_files_only))
    shown = Path(name).name if Path(name).is_dir() else name  # no folder of this machine
    command = ["vitrail", "tune", shown, *(f"--batch={n}" for n in batches), f"--dtype={dtype}"]
    command += [f"--size={size}"] * (size is not None) + [f"--revision={revision}"] * bool(revision)
    origin = provenance(bench.device, shlex.join(command))
    findings = search(
        problems(spec, batches, dtype, sides), bench, say, lambda one: save(file, [one], origin)
    )
    for finding in findings:
        print(finding)
        for config in finding.refused:
            say(f"refused, since it gives other bits: {finding.key}: {config}")
    won = sum(finding.config is not None for finding in findings)
    folder = file.parent.resolve()
    say(f"{file}: {won} of {len(findings)} keys faster; in force where {VARIABLE}={folder}")
    if file.name != own:
        say(f"it is looked for under the name {own}")
