from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from vitrail.cli.options import (
    AsJson,
    BatchSize,
    Device,
    Dtype,
    Local,
    ModelName,
    ResizeOn,
    Revision,
    Size,
    load,
    parse_size,
    progress,
    report_failures,
    report_unread,
    require_model,
    say,
)

PARTIAL = 3  # the exit code if some inputs failed and the rest is done


def embed(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Image files, folders (searched recursively), glob patterns or .tar files."
        ),
    ] = None,
    model: ModelName = None,
    out: Annotated[
        Path,
        typer.Option(
            help="Output folder (written in parts, resumable), or one .npy or .parquet file."
        ),
    ] = Path("embeddings.npy"),
    lists: Annotated[
        list[str] | None,
        typer.Option("--list", help="File of paths, one per line (-: stdin); repeatable."),
    ] = None,
    batch_size: BatchSize = None,
    size: Size = None,
    normalize: Annotated[bool, typer.Option(help="Scale each embedding to unit length.")] = False,
    fp16_output: Annotated[
        bool, typer.Option("--fp16-output", help="Store float16 instead of float32.")
    ] = False,
    layout: Annotated[
        str,
        typer.Option(help="Layout of an output folder: parquet, or npy (clip-retrieval's)."),
    ] = "parquet",
    part_size: Annotated[
        int, typer.Option(min=1, help="Number of inputs in each part of an output folder.")
    ] = 4096,
    stop_after: Annotated[
        int,
        typer.Option(
            min=0, help="Stop writing a folder after this many consecutive failures (0: never)."
        ),
    ] = 100,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an old output.")] = False,
    as_json: AsJson = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    resize_on: ResizeOn = "host",
    revision: Revision = None,
    local_files_only: Local = False,
) -> None:
    """Embed images into a folder or one file.

    An unreadable image does not stop the others. A folder is written in parts: after an
    interruption, the same command resumes. Read it with vitrail.read_embeddings or any parquet
    reader. A .npy file holds the embeddings of the readable images; the .csv file beside it lists
    each input with its row or its error, and the .json file records the model and the settings. A
    .parquet file holds all of this, one row per image.

    Exit codes: 0: all embedded; 3: some failed; 1: all failed, or an error; 130: interrupted.
    """
    from vitrail.jobs import folder as job
    from vitrail.jobs import one_file as single
    from vitrail.jobs.listing import find_images
    from vitrail.jobs.manifest import read_manifest

    if not inputs and not lists:
        raise typer.BadParameter("got none, wanted images or --list", param_hint="INPUTS")
    if layout not in job.FOLDERS:
        raise typer.BadParameter(f"got {layout!r}, wanted parquet or npy", param_hint="--layout")
    pixels = parse_size(size)
    name = require_model(model, "--model")
    one_file = bool(out.suffix) and not out.is_dir()
    if one_file:
        single.check_output(out, overwrite)
    else:
        job.check_folder(out)
    found = find_images(inputs or [], lists or [])
    report_unread(found.unread)
    loaded = load(name, device, dtype, revision, local_files_only, resize_on)
    precision: Any = "float16" if fp16_output else "float32"
    start = time.monotonic()
    with progress(len(found.sources)) as tell:
        if one_file:
            summary = single.embed(
                loaded,
                found.sources,
                out,
                batch_size=batch_size,
                size=pixels,
                normalize=normalize,
                precision=precision,
                overwrite=overwrite,
                progress=tell,
            )
        else:
            options = job.Options(
                layout=layout,  # type: ignore[arg-type]  # one of FOLDERS
                precision=precision,
                part_size=part_size,
                batch_size=batch_size,
                size=pixels,
                normalize=normalize,
                in_a_row=stop_after,
            )
            try:
                summary = job.run_job(
                    loaded, found.sources, out, options, overwrite=overwrite, progress=tell
                )
            except (KeyboardInterrupt, SystemExit):
                kept = len({part.part for part in read_manifest(out)})
                say(f"{kept} parts are committed; run the same command to resume")
                raise
    seconds = time.monotonic() - start
    report_failures(summary.failed, summary.inputs, summary.reasons)
    facts = {
        "out": str(out),
        "inputs": summary.inputs,
        "embedded": summary.inputs - summary.failed,
        "failed": summary.failed,
        "seconds": round(seconds, 3),
    }
    done = f"embedded {facts['embedded']} of {summary.inputs} images in {seconds:.1f} s"
    if isinstance(summary, job.JobSummary):
        facts |= {"parts": summary.parts, "made": summary.made, "again": summary.again}
        done += f"; wrote {summary.made} of {summary.parts} parts"
    say(done)
    nothing = summary.failed == summary.inputs
    if as_json or not (one_file and nothing):
        print(json.dumps(facts) if as_json else out)
    if summary.failed:
        raise typer.Exit(1 if nothing else PARTIAL)
