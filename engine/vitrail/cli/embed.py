from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitrail.cli import console, options, ranks
from vitrail.cli.devices import check_devices, open_embedder

if TYPE_CHECKING:
    from vitrail.jobs.rows import Summary

PARTIAL = 3  # the exit code if some inputs failed and the rest is done


def embed(
    context: typer.Context,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Image files, folders (searched recursively), glob patterns or .tar files."
        ),
    ] = None,
    model: options.ModelName = None,
    out: Annotated[
        Path,
        typer.Option(
            help="Output folder (written in parts, resumable), or one .npy or .parquet file."
        ),
    ] = Path("embeddings.npy"),
    lists: Annotated[
        list[str] | None,
        typer.Option("--list", help="File of paths, one per line (- for stdin); repeatable."),
    ] = None,
    batch_size: options.BatchSize = None,
    size: options.Size = None,
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
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="K/N",
            help="Write every N-th part of an output folder that N processes or machines share, "
            "K from 0 to N-1 (default: RANK/WORLD_SIZE, which torchrun sets; with Slurm: "
            "--shard $SLURM_PROCID/$SLURM_NTASKS).",
        ),
    ] = None,
    as_json: options.AsJson = False,
    device: options.Device = "auto",
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Several devices, with a process for each: all (every GPU), numbers of GPUs such "
            "as 0,1,3, or cpu,cpu. The output has the same bytes as on one.",
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    resize_on: options.ResizeOn = "host",
    memory_limit: options.MemoryLimit = None,
    revision: options.Revision = None,
    local_files_only: options.Local = False,
) -> None:
    """Embed images into a folder or one file.

    An unreadable image does not stop the others. A folder is written in parts: after an
    interruption, the same command resumes. Read it with vitrail.read_embeddings or any parquet
    reader. A .npy file holds the embeddings of the readable images; the .csv file beside it lists
    each input with its row or its error, and the .json file records the model and the settings. A
    .parquet file holds all of this, one row per image.

    Shards write one folder together. Give all of them the same inputs, options and --out; any
    number of shards, or none, may resume. Under torchrun, LOCAL_RANK chooses the GPU, and failed
    images do not change the exit code, because torchrun would end the other shards.

    With --devices, an image that kills three processes becomes a failed image.

    Exit codes: 0: all embedded; 3: some failed; 1: all failed, or an error; 130: interrupted.
    """
    from vitrail.jobs.folder import check_folder, embed_to_folder
    from vitrail.jobs.listing import find_images
    from vitrail.jobs.manifest import read_manifest
    from vitrail.jobs.one_file import check_file, embed_to_file
    from vitrail.jobs.part_files import SUBFOLDERS
    from vitrail.jobs.rows import EmbedOptions

    if not inputs and not lists:
        raise typer.BadParameter("got none, wanted images or --list", param_hint="INPUTS")
    if layout not in SUBFOLDERS:
        raise typer.BadParameter(f"got {layout!r}, wanted parquet or npy", param_hint="--layout")
    device_from = context.get_parameter_source("device")  # VITRAIL_DEVICE is no contradiction
    check_devices(devices, device, device_from is not None and device_from.name == "COMMANDLINE")
    chosen = ranks.choose_shard(shard)
    if chosen.launched and "-" in (lists or []):
        raise typer.BadParameter(
            f"got - (stdin) with {chosen}, but a launcher gives its stdin to one process or none; "
            "save the list to a file that all shards read",
            param_hint="--list",
        )
    settings = EmbedOptions(
        layout=layout,
        precision="float16" if fp16_output else "float32",
        part_size=part_size,
        batch_size=batch_size,
        size=options.parse_size(size),
        normalize=normalize,
        stop_after=stop_after,
        overwrite=overwrite,
        shard=chosen.shard,
    )
    name = options.require_model(model, "--model")
    one_file = bool(out.suffix) and not out.is_dir()
    if one_file:
        check_file(out, overwrite, chosen.shard)
    else:
        check_folder(out)
    listing = find_images(inputs or [], lists or [])
    console.report_unread(listing.unread)
    inputs_of_run = chosen.shard.inputs(len(listing.sources), part_size)
    if chosen.shard.count > 1:
        console.say(f"{chosen}: {inputs_of_run} of {len(listing.sources)} images")
    write = embed_to_file if one_file else embed_to_folder
    with open_embedder(
        name, device, devices, dtype, revision, local_files_only, resize_on, memory_limit
    ) as (
        embedder,
        used,
    ):
        start = time.monotonic()
        with console.progress(inputs_of_run, resumes=not one_file) as report:
            try:
                summary = write(embedder, listing.sources, out, settings, report)
            except (KeyboardInterrupt, SystemExit):
                if not one_file:
                    console.say(
                        f"{len(read_manifest(out))} parts are committed; run the same command to "
                        "resume"
                    )
                raise
        seconds = time.monotonic() - start
    _report(summary, out, seconds, used, as_json, one_file)
    code = _exit_code(summary)
    if code and chosen.launched:
        console.say(f"exit code 0 instead of {code}, so that the launcher keeps the other shards")
        return
    if code:
        raise typer.Exit(code)


def _report(
    summary: Summary, out: Path, seconds: float, devices: list[str], as_json: bool, one_file: bool
) -> None:
    from vitrail.jobs.folder import FolderSummary

    console.report_failures(summary.failed, summary.inputs, summary.reasons)
    console.say(f"{summary} in {seconds:.1f} s")
    if isinstance(summary, FolderSummary) and summary.shard.count > 1:
        console.say(summary.job_state)
    if as_json or not (one_file and _exit_code(summary) == 1):
        facts = {"out": str(out), **summary.to_dict(), "seconds": round(seconds, 3)}
        facts["devices"] = devices
        print(json.dumps(facts) if as_json else out)


def _exit_code(summary: Summary) -> int:
    """The code for failed inputs; a shard without inputs has none."""
    if not summary.failed:
        return 0
    return 1 if summary.failed == summary.inputs else PARTIAL
