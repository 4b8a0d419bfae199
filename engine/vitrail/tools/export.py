"""`vitrail export`: a checkpoint's weights, plans and compiled kernels as one folder.

It loads without a checkpoint, without triton and, by csrc's library, without Python. What is in
it: `exported.format`. The folder is written aside and renamed, and vitrail.json comes last: what a
killed export leaves behind does not load. Needs no GPU.
"""

from __future__ import annotations

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
from vitrail.dtypes import HALVES, dtype_name, parse_dtype
from vitrail.durable import draft_folder, write_file, writing
from vitrail.errors import InputError, VitrailError
from vitrail.exported.format import (
    COPIED,
    FORMAT,
    NATIVE,
    WEIGHTS,
    exported_plans,
    manifest_bytes,
    native_record,
    pixel_batch,
    read_digest,
    table_places,
    weights_header,
)
from vitrail.model.fingerprint import fingerprint
from vitrail.model.loading import LoadedCheckpoint, read_model
from vitrail.plan.lowering import Program, image_key, lower
from vitrail.runtime.kernel_cache import kernel_record
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.spec import MAX_IMAGE_SIDE, ModelSpec
from vitrail.tools.workload import preprocessed_size
from vitrail_kernels.compile import provenance
from vitrail_kernels.launch import INTERPRETING, MISSING, Call, Target, interpreted
from vitrail_kernels.processes import in_processes

SMS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}
"""Multiprocessors of a typical GPU of each architecture, from NVIDIA's architecture papers: A100,
RTX A6000, L40S, H100 SXM, B200, GeForce RTX 5090. Which configuration serves how many rows follows
from it, and no bit; how many blocks run at once follows from the GPU at hand."""

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Given how many kernels there are: what is told how many are compiled."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What was written: bytes in all, and kernels by architecture."""

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
    """Write ``folder`` from the checkpoint ``model``, for GPUs of each of ``architectures``.

    ``architectures``: as 80, 86, 89, 90, 100 or 120; None: the GPUs' at hand. ``size`` (H, W): of
    images; else what the checkpoint's processor makes of them. ``overwrite``: an earlier export in
    ``folder`` goes once the new one is whole.

    Raises InputError: triton missing, an unknown architecture, dtype or size, a folder with
    something in it, or one that cannot be written; VitrailError where a kernel does not compile;
    CheckpointError as `vitrail.load`.
    """
    if MISSING is not None or interpreted():
        raise InputError(f"export: it needs triton's compiler, but {MISSING or INTERPRETING}")
    targets = _targets(architectures)
    compute = parse_dtype(dtype, HALVES)
    out = Path(folder).absolute()
    _check_output(out, overwrite)
    found = read_model(model, compute, revision=revision, local_files_only=local_files_only)
    sides = _size(found.spec, size)
    package = _Package(found, compute, sides)
    for target in targets:
        package.lower(target)
    package.compile(progress)
    with writing(out), draft_folder(out) as partial:
        package.write(partial)
        total = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    return Summary(out, total, {arch: len(build.calls) for arch, build in package.builds.items()})


def _targets(architectures: Sequence[int] | None) -> list[Target]:
    """One GPU of each architecture: that of this machine, else a typical one."""
    here: dict[int, Target] = {}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        arch = 10 * properties.major + properties.minor
        here.setdefault(arch, Target(arch, properties.multi_processor_count))
    known = ", ".join(f"sm_{arch}" for arch in SMS)
    wanted = sorted(set(here) if architectures is None else set(architectures))
    if not wanted:
        got = "no GPU" if architectures is None else "none"
        raise InputError(f"arch: got {got}, wanted --arch with one or more of {known}")
    for arch in wanted:
        if arch not in SMS:
            raise InputError(f"arch: got sm_{arch}, wanted one or more of {known}")
    return [here.get(arch) or Target(arch, SMS[arch]) for arch in wanted]


def _size(spec: ModelSpec, size: tuple[int, int] | None) -> tuple[int, int] | None:
    """The size of images that is exported; None without an image tower."""
    if spec.vision is None:
        if size is not None:
            raise InputError(f"size: got {size}, but {spec.architecture} has no image tower")
        return None
    sides = size or preprocessed_size(spec) or spec.vision.image
    for side, least in zip(sides, spec.vision.patch, strict=True):
        if not least <= side <= MAX_IMAGE_SIDE:
            raise InputError(
                f"size: got {sides[0]}x{sides[1]}, wanted sides from a patch, "
                f"{spec.vision.patch}, to {MAX_IMAGE_SIDE}"
            )
    return sides


# -- what goes into the folder ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Build:
    """Programs by name, and by its key every kernel that they launch."""

    target: Target
    programs: dict[str, Program]
    calls: dict[str, Call]


def _image(call: Call, arch: int) -> bytes:
    """The image of a kernel, in a process of its own."""
    # lines of source, and with them where on this machine it lies, stay out of the code
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    return kernel_record(image_key(call, arch), call, arch)


class _Package:
    """An export in the making: `lower` for every architecture, then `compile`, then `write`."""

    def __init__(
        self, found: LoadedCheckpoint, dtype: torch.dtype, size: tuple[int, int] | None
    ) -> None:
        self.found, self.spec, self.dtype, self.size = found, found.spec, dtype, size
        self.builds: dict[int, _Build] = {}
        self.images: dict[str, bytes] = {}

    def lower(self, target: Target) -> None:
        programs: dict[str, Program] = {}
        for name, plan in exported_plans(self.spec).items():
            pixels = None
            if self.spec.vision is not None and self.size is not None and name != "text":
                pixels = pixel_batch(self.spec.vision, name.partition(".")[2], self.size)
            try:
                programs[name] = lower(plan, target, self.dtype, self.found.weights, pixels)
            except ValueError as error:  # what no kernel takes
                raise InputError(f"export: {plan.name}: {error}") from error
        calls = {key: call for one in programs.values() for key, call in one.calls.items()}
        self.builds[target.arch] = _Build(target, programs, calls)

    def compile(self, progress: Progress) -> None:
        with progress(sum(len(build.calls) for build in self.builds.values())) as tell:
            try:
                for arch, build in self.builds.items():
                    self._compile(arch, build.calls, tell)
            except BrokenProcessPool as error:
                raise VitrailError(
                    "export: a compiler process was killed, by lack of memory?"
                ) from error

    def _compile(self, arch: int, calls: Mapping[str, Call], tell: Callable[[int], None]) -> None:
        records = in_processes(partial(_image, arch=arch), list(calls.values()))
        for key, record in zip(calls, records, strict=True):
            if isinstance(record, str):
                raise VitrailError(f"export: sm_{arch}: {record}")
            self.images[f"sm_{arch}/{key}.image"] = record
            tell(len(self.images))

    def write(self, folder: Path) -> None:
        """Every file, and vitrail.json after all others are on the disk."""
        for arch, build in self.builds.items():
            (folder / f"sm_{arch}").mkdir()
            for name, program in build.programs.items():
                write_file(folder / f"sm_{arch}/{name}.plan", program.record)
        for name, record in self.images.items():
            write_file(folder / name, record)
        self._write_weights(folder / WEIGHTS)
        for name in COPIED:
            path = self.found.checkpoint.file(name)
            if path is not None:
                write_file(folder / name, path.read_bytes())
        files = {
            path.relative_to(folder).as_posix(): read_digest(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        checkpoint, weights = self.found.checkpoint, self.found.hash_weights()
        built = {}
        for arch, build in self.builds.items():
            runner = self._identity(build.target)
            print_of = fingerprint(checkpoint, self.spec, weights, self.dtype, runner)
            built[arch] = {"runner": runner, "fingerprint": print_of}
        prints = {arch: one["fingerprint"] for arch, one in built.items()}
        write_file(folder / NATIVE, self._native(prints, files))
        files[NATIVE] = read_digest(folder / NATIVE)
        local = checkpoint.revision is None
        content = {
            "format": FORMAT,
            "version": __version__,
            # no folder of this machine
            "source": checkpoint.folder.resolve().name if local else checkpoint.source,
            "revision": checkpoint.revision,
            "spec": self.spec.to_dict(),
            "dtype": dtype_name(self.dtype),
            "size": self.size,
            "weights": weights,
            "logit_scale": self.found.weights.logit_scale,
            "builds": {str(arch): one for arch, one in built.items()},
            "files": {name: digest for name, (digest, _) in files.items()},
        }
        write_file(folder / EXPORT, manifest_bytes(content))

    def _identity(self, target: Target) -> str:
        """That of the runners whose bits the exported kernels give: see `TritonRunner.identity`.

        A position table for another grid than the checkpoint's is interpolated, here by the
        reference and there by a kernel: the same but for fp32's last bits.
        """
        kernels = provenance(target)
        vision, size = self.spec.vision, self.size
        if vision is None or size is None or vision.grid_at(size) == vision.grid:
            return kernels
        return f"{kernels}; the reference's positions at {size[0]}x{size[1]}"

    def _write_weights(self, path: Path) -> None:
        weights, vision = self.found.weights, self.spec.vision
        places, total = table_places(self.spec, self.dtype, self.size)
        tables = torch.zeros(total - weights.arena.numel(), dtype=torch.uint8, device="cpu")
        if vision is not None and self.size is not None:
            reference = TorchRunner(weights, self.dtype, weights.arena.device)
            for kind, (start, stop) in places.items():
                table = reference.position_table(vision, vision.grid_at(self.size), kind)
                at = weights.arena.numel()
                tables[start - at : stop - at] = table.view(-1).view(torch.uint8)
        parts = weights_header(total), weights.arena.numpy().data, tables.numpy().data
        write_file(path, *parts)

    def _native(self, prints: Mapping[int, str], files: Mapping[str, tuple[str, int]]) -> bytes:
        builds = {
            arch: (prints[arch], list(build.programs), list(build.calls))
            for arch, build in self.builds.items()
        }
        files = {name: file for name, file in files.items() if name not in COPIED}
        return native_record(self.spec, self.dtype, self.size, files, builds)


# -- the folder ------------------------------------------------------------------------------------


def _check_output(out: Path, overwrite: bool) -> None:
    """Refuses what must not be replaced, before any work is done."""
    with writing(out):
        if not os.path.lexists(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        elif not out.is_dir() or out.is_symlink():
            raise InputError(
                f"{out}: got something other than a folder, wanted a folder or nothing"
            )
        elif any(out.iterdir()):
            if not overwrite:
                raise InputError(f"{out}: got a folder with something in it; wanted --overwrite")
            if not (out / EXPORT).is_file():
                raise InputError(f"{out}: got a folder without {EXPORT}, wanted an earlier export")
        if not os.access(out.parent, os.W_OK | os.X_OK):
            raise PermissionError(f"{out.parent}: cannot be written to")
