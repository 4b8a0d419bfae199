import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from vitrail.cli import console, options
from vitrail.dtypes import ALIASES, HALVES

BATCHES = (1, 8, 64)


def tune(
    model: options.ModelArgument = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Table to write, a .json file (default: sm_<arch>.json in the folder that "
            "VITRAIL_TUNED names, or else in ./tuned)."
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Images or texts per batch; repeatable (default: 1, 8 and 64)."),
    ] = None,
    size: options.Size = None,
    dtype: options.HalfDtype = "float16",
    revision: options.Revision = None,
    local_files_only: options.Local = False,
) -> None:
    """Time kernel configurations on this GPU for a checkpoint.

    A configuration enters the table if it is faster than the built-in choice and gives the same
    bits. Set VITRAIL_TUNED=<folder of the table> to use the table. Its entries for other shapes
    stay. Tuning takes a minute or two, reads no weights, and saves the table after every shape.
    """
    from vitrail.checkpoint.files import open_checkpoint
    from vitrail.tools.bench import cuda_bench, provenance
    from vitrail.tools.tune import open_table, save
    from vitrail.tools.tune import tune as search
    from vitrail.tools.workload import problems
    from vitrail.zoo import read_spec
    from vitrail_kernels.configs import VARIABLE

    name = options.require_model(model, "MODEL")
    sides, batches = options.parse_size(size), batch or BATCHES
    dtype = ALIASES.get(dtype, dtype)
    if dtype not in HALVES:
        raise typer.BadParameter(f"got {dtype!r}, wanted float16 or bfloat16", param_hint="--dtype")
    bench = cuda_bench()
    table_name = f"sm_{bench.target.arch}.json"
    file = out or Path(os.environ.get(VARIABLE) or "tuned", table_name)
    open_table(file)
    checkpoint = open_checkpoint(name, revision=revision, local_files_only=local_files_only)
    spec = read_spec(checkpoint)
    command = ["vitrail", "tune", checkpoint.name]
    command += [*(f"--batch={n}" for n in batches), f"--dtype={dtype}"]
    command += [f"--size={size}"] * (size is not None) + [f"--revision={revision}"] * bool(revision)
    origin = provenance(bench.device, shlex.join(command))
    results = search(
        problems(spec, batches, dtype, sides),
        bench,
        console.say,
        lambda result: save(file, [result], origin),
    )
    for result in results:
        print(result)
        for config in result.rejected:
            console.say(f"rejected, because its output differs: {result.key}: {config}")
    faster = sum(result.config is not None for result in results)
    folder = file.parent.resolve()
    console.say(
        f"{file}: {faster} of {len(results)} keys faster; to use it, set {VARIABLE}={folder}"
    )
    if file.name != table_name:
        console.say(f"Vitrail reads the table only under the name {table_name}")
