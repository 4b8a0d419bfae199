"""`vitrail export`: writes a checkpoint's weights, plans and compiled kernels into one folder.

The folder loads without the checkpoint and without triton; libvitrail (csrc/vitrail.h) loads it
without Python. `vitrail.exported.format` describes it. The files go into a draft folder, which is
renamed at the end, and vitrail.json is written last: a killed export leaves no folder that loads.
Exporting needs no GPU.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from vitrail._version import __version__
from vitrail.checkpoint.contents import EXPORT
from vitrail.dtypes import HALVES, parse_dtype
from vitrail.durable import check_replaceable, draft_folder, write_file, writing
from vitrail.errors import InputError, VitrailError
from vitrail.exported import contents
from vitrail.exported.digest import hash_file
from vitrail.exported.format import RECORD, Build, ExportRecord
from vitrail.model.fingerprint import fingerprint
from vitrail.model.loading import LoadedCheckpoint, read_model, warn_of_int8
from vitrail.plan.kernel_binary import kernel_key
from vitrail.plan.lowering import NativePlan, lower
from vitrail.runtime.kernel_cache import kernel_record
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.spec import MAX_IMAGE_SIDE, ModelSpec
from vitrail.tools.workload import preprocessed_size
from vitrail_kernels.compile import provenance
from vitrail_kernels.launch import INTERPRETING, MISSING, Call, Target, interpreted
from vitrail_kernels.processes import in_processes

SMS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}
"""Multiprocessors of a typical GPU of each architecture, from NVIDIA's architecture papers: A100,
RTX A6000, L40S, H100 SXM, B200, GeForce RTX 5090. The number decides which kernel configuration is
used for how many rows; it never changes a bit of the results."""

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Called with the number of kernels. Its context manager gives a function, which is called with the
number of kernels compiled so far."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of an export: the folder's total bytes, and kernels by architecture."""

    folder: Path
    bytes: int
    kernels: dict[int, int]


def export_model(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    architectures: Sequence[int] | None = None,
    *,
    size: tuple[int, int] | None = None,
    dtype: str = "float16",
    overwrite: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: Progress = lambda _: nullcontext(lambda _: None),
) -> Summary:
    """Export the checkpoint ``model`` to ``folder``, for GPUs of each of ``architectures``.

    ``architectures``: any of 80, 86, 89, 90, 100 and 120; None means those of this machine's GPUs.
    ``size``: (height, width) of images; None means the size that the checkpoint's processor
    produces. ``overwrite``: replace an earlier export in ``folder`` once the new one is complete.

    Raises InputError if triton is missing, if an architecture, dtype or size is unknown, or if the
    folder is not empty or cannot be written. Raises VitrailError if a kernel does not compile, and
    CheckpointError as `vitrail.load` does.
    """
    if MISSING is not None or interpreted():
        raise InputError(f"export: it needs triton's compiler, but {MISSING or INTERPRETING}")
    targets = _targets(architectures)
    compute = parse_dtype(dtype, HALVES)
    out = Path(folder).absolute()
    check_replaceable(out, EXPORT, overwrite)

    def check(spec: ModelSpec, source: str) -> None:
        if spec.int8 and compute != torch.float16:
            raise InputError(f"dtype: got {dtype!r} for an int8 folder, wanted 'float16'")

    loaded = read_model(
        model, compute, revision=revision, local_files_only=local_files_only, check=check
    )
    warn_of_int8(loaded)  # the exported folder has no record of it
    export = _Export(loaded, compute, _size(loaded.spec, size))
    for target in targets:
        export.lower(target)
    export.compile(progress)
    with writing(out), draft_folder(out) as draft:
        export.write(draft)
        total = sum(path.stat().st_size for path in draft.rglob("*") if path.is_file())
    return Summary(out, total, {arch: len(calls) for arch, calls in export.calls.items()})


def _targets(architectures: Sequence[int] | None) -> list[Target]:
    """A GPU for each architecture: one of this machine, else a typical one."""
    local: dict[int, Target] = {}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        arch = 10 * properties.major + properties.minor
        local.setdefault(arch, Target(arch, properties.multi_processor_count))
    known = ", ".join(f"sm_{arch}" for arch in SMS)
    requested = sorted(set(local) if architectures is None else set(architectures))
    if not requested:
        nothing = "no GPU" if architectures is None else "none"
        raise InputError(f"arch: got {nothing}, wanted --arch with one or more of {known}")
    for arch in requested:
        if arch not in SMS:
            raise InputError(f"arch: got sm_{arch}, wanted one or more of {known}")
    return [local.get(arch) or Target(arch, SMS[arch]) for arch in requested]


def _size(spec: ModelSpec, size: tuple[int, int] | None) -> tuple[int, int] | None:
    """(height, width) of the exported images; None without an image tower."""
    if spec.vision is None:
        if size is not None:
            raise InputError(f"size: got {size}, but {spec.architecture} has no image tower")
        return None
    sides = size or preprocessed_size(spec) or spec.vision.image
    for side, patch in zip(sides, spec.vision.patch, strict=True):
        if not patch <= side <= MAX_IMAGE_SIDE:
            raise InputError(
                f"size: got {sides[0]}x{sides[1]}, wanted sides from a patch, "
                f"{spec.vision.patch}, to {MAX_IMAGE_SIDE}"
            )
    return sides


# -- the contents of the folder --------------------------------------------------------------------


def _compile_kernel(call: Call, arch: int) -> bytes:
    """The kernel binary of a call. This function runs in a compiler process."""
    # line information would hold source paths of this machine
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    return kernel_record(kernel_key(call, arch), call, arch)


class _Export:
    """An export in progress: `lower` for every target, then `compile`, then `write`."""

    def __init__(
        self, loaded: LoadedCheckpoint, dtype: torch.dtype, size: tuple[int, int] | None
    ) -> None:
        self.loaded, self.spec, self.dtype, self.size = loaded, loaded.spec, dtype, size
        self.targets: dict[int, Target] = {}
        self.plans: dict[str, NativePlan] = {}  # by path
        self.calls: dict[int, dict[str, Call]] = {}  # by architecture and key
        self.kernels: dict[str, bytes] = {}  # by path

    def lower(self, target: Target) -> None:
        self.targets[target.arch], calls = target, self.calls.setdefault(target.arch, {})
        for name, plan in contents.exported_plans(self.spec).items():
            pixels = None
            if self.spec.vision is not None and self.size is not None and name != "text":
                pixels = contents.pixel_batch(self.spec.vision, name.partition(".")[2], self.size)
            try:
                native = lower(plan, target, self.dtype, self.loaded.weights, pixels)
            except ValueError as error:  # a kernel does not take these arguments
                raise InputError(f"export: {plan.name}: {error}") from error
            self.plans[f"sm_{target.arch}/{name}.plan"] = native
            calls |= native.calls

    def compile(self, progress: Progress) -> None:
        with progress(sum(map(len, self.calls.values()))) as tell:
            try:
                for arch, calls in self.calls.items():
                    self._compile(arch, calls, tell)
            except BrokenProcessPool as error:
                raise VitrailError(
                    "export: a compiler process was killed, perhaps for lack of memory"
                ) from error

    def _compile(self, arch: int, calls: Mapping[str, Call], tell: Callable[[int], None]) -> None:
        records = in_processes(partial(_compile_kernel, arch=arch), list(calls.values()))
        for key, record in zip(calls, records, strict=True):
            if isinstance(record, str):
                raise VitrailError(f"export: sm_{arch}: {record}")
            self.kernels[f"sm_{arch}/{key}.kernel"] = record
            tell(len(self.kernels))

    def write(self, folder: Path) -> None:
        """Writes every file. The record follows all files that it lists, vitrail.json is last."""
        for arch in self.targets:
            (folder / f"sm_{arch}").mkdir()
        for name, plan in self.plans.items():
            write_file(folder / name, plan.record)
        for name, binary in self.kernels.items():
            write_file(folder / name, binary)
        self._write_weights(folder / contents.WEIGHTS)
        for name in contents.COPIED:
            path = self.loaded.checkpoint.file(name)
            if path is not None:
                write_file(folder / name, path.read_bytes())
        record = self._record(folder)
        write_file(folder / RECORD, record.encode())
        write_file(folder / EXPORT, record.summary())

    def _record(self, folder: Path) -> ExportRecord:
        checkpoint, weights_hash = self.loaded.checkpoint, self.loaded.hash_weights()
        builds = {}
        for arch, target in self.targets.items():
            runner = self._identity(target)
            digest = fingerprint(
                checkpoint, self.spec, weights_hash, self.dtype, runner, __version__
            ).digits
            builds[arch] = Build(runner, digest)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return ExportRecord(
            version=__version__,
            source=checkpoint.name,
            revision=checkpoint.revision,
            spec=self.spec,
            dtype=self.dtype,
            size=self.size,
            weights_hash=weights_hash,
            logit_scale=self.loaded.weights.logit_scale,
            builds=builds,
            files={path.relative_to(folder).as_posix(): hash_file(path) for path in paths},
        )

    def _identity(self, target: Target) -> str:
        """Identity of the runners whose bits the exported kernels give (`TritonRunner.identity`).

        For a patch grid other than the checkpoint's, the position table is interpolated: here by
        PyTorch, in a runner by a kernel. The two tables differ in the last bits of fp32.
        """
        kernels = provenance(target)
        vision, size = self.spec.vision, self.size
        if vision is None or size is None or vision.grid_at(size) == vision.grid:
            return kernels
        return f"{kernels}; PyTorch's positions at {size[0]}x{size[1]}"

    def _write_weights(self, path: Path) -> None:
        weights, vision = self.loaded.weights, self.spec.vision
        spans, total = contents.position_tables(self.spec, self.dtype, self.size)
        weight_bytes = weights.arena.numel()
        tables = torch.zeros(total - weight_bytes, dtype=torch.uint8, device="cpu")
        if vision is not None and self.size is not None:
            runner = TorchRunner(weights, self.dtype, weights.arena.device)
            for pixel_format, (start, stop) in spans.items():
                table = runner.position_table(vision, vision.grid_at(self.size), pixel_format)
                tables[start - weight_bytes : stop - weight_bytes] = table.view(-1).view(
                    torch.uint8
                )
        write_file(
            path, contents.weights_header(total), weights.arena.numpy().data, tables.numpy().data
        )
