"""`load`: a checkpoint or an exported folder to a `Model`."""

import functools
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from vitrail.checkpoint import contents
from vitrail.checkpoint.files import Checkpoint, open_checkpoint
from vitrail.checkpoint.regular import absolute
from vitrail.dtypes import dtype_name
from vitrail.errors import CheckpointError, InputError, show_path
from vitrail.exported.folder import ExportFolder, open_exported
from vitrail.image.decoding import SixteenBit
from vitrail.image.normalize import linear_scale
from vitrail.int8.record import Int8Record, read_record
from vitrail.model.arguments import INT8, Resize, check_device, check_dtype, check_precision
from vitrail.model.load_arguments import LoadArguments
from vitrail.model.model import Model
from vitrail.runtime import RUNNERS, choose
from vitrail.runtime.native import NativeRunner
from vitrail.runtime.runner import Runner
from vitrail.spec import ModelSpec
from vitrail.weights.folding import load_weights
from vitrail.weights.layout import Weights
from vitrail.weights.loader import hash_weights
from vitrail.zoo import map_tensors, read_spec


class LoadedCheckpoint(NamedTuple):
    """A checkpoint as read. The weights are packed, on the CPU; ``hash_weights`` hashes them.

    ``int8``: the record of a folder that ``vitrail quantize`` wrote; None for any other.
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    weights: Weights
    hash_weights: Callable[[], str]
    int8: Int8Record | None = None


def load(
    path_or_id: str | os.PathLike[str],
    *,
    device: str | int | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    sixteen_bit: SixteenBit = "scale",
    backend: str = "auto",
    resize: Resize = "host",
    runner: str | None = None,
) -> Model:
    """Open a checkpoint folder, a hub id, or a folder that ``vitrail export`` wrote.

    A hub id is, for example, ``laion/CLIP-ViT-B-32-laion2B-s34B-b79K``. A folder is read without
    network access.

    ``device``: such as "cpu", "cuda:1" or 1; "auto" is CUDA if there is a GPU, else the CPU.
    ``dtype``: "float32", "float16", "bfloat16", a shorter name such as "bf16" or "half", or the
    torch.dtype; "auto" is float32 on the CPU and float16 on CUDA. An exported folder has its own.
    A folder that ``vitrail quantize`` wrote takes "auto" or "int8" alone: its other weights and its
    activations have the dtype that "auto" is.
    ``revision``, ``local_files_only``: as in huggingface_hub.
    ``sixteen_bit``: 16-bit gray images are scaled to 8 bits, or clipped ("clip"), as transformers
    does.
    ``backend``: Vitrail's kernels launched from C++ ("native") or from Python ("triton"), or
    PyTorch's operators ("torch"). "auto" is the first of them that serves the device and the dtype;
    see `Model.backend`. ``runner`` is the older name of this argument.
    ``resize``: images are decoded on the host, and resized and cropped there ("host") or on the
    model's device ("device"), to the same bits. Which is faster has not been measured on a GPU.

    Warns of int8 weights that the guard of ``vitrail quantize`` did not find good on the user's own
    pictures.

    Raises CheckpointError: the files are damaged, or Vitrail cannot serve the checkpoint exactly.
    InputError: an unknown argument, or one that cannot be met on this machine. OutOfMemoryError:
    the GPU has no room for the weights.
    """
    device = check_device(device)
    check_dtype(dtype, device)
    if sixteen_bit not in ("scale", "clip"):
        raise InputError(f"sixteen_bit: got {sixteen_bit!r}, wanted 'scale' or 'clip'")
    if resize not in ("host", "device"):
        raise InputError(f"resize: got {resize!r}, wanted 'host' or 'device'")
    if runner is not None:
        if backend != "auto":
            raise InputError(
                f"runner: got {runner!r} with backend={backend!r}, wanted backend alone"
            )
        backend = runner
    loaded, model = _load(
        path_or_id, device, dtype, revision, local_files_only, sixteen_bit, backend, resize
    )
    warn_of_int8(loaded)
    return model


def load_again(load_arguments: LoadArguments) -> Model:
    """The model that was loaded with these arguments, without the warnings. Errors: see `load`."""
    keywords = load_arguments.keywords()
    device = check_device(keywords.pop("device"))
    return _load(load_arguments.source, device, **keywords)[1]


def _load(
    path_or_id: str | os.PathLike[str],
    device: torch.device,
    dtype: str | torch.dtype,
    revision: str | None,
    local_files_only: bool,
    sixteen_bit: SixteenBit,
    backend: str,
    resize: Resize,
) -> tuple[LoadedCheckpoint, Model]:
    """As `load`, after its arguments were checked."""
    compute_dtype = check_dtype(dtype, device)
    exported = open_exported(path_or_id, revision)
    if exported is None:
        runner_class = RUNNERS[choose(backend, compute_dtype, device)]
        loaded = read_model(
            path_or_id,
            compute_dtype,
            revision=revision,
            local_files_only=local_files_only,
            check=functools.partial(check_precision, dtype),
        )
        serving = runner_class(loaded.weights, compute_dtype, device)
    else:
        check_precision(dtype, exported.spec, str(exported.folder))
        if not exported.spec.int8 and dtype != "auto" and compute_dtype != exported.dtype:
            raise InputError(
                f"dtype: got {dtype_name(compute_dtype)}, wanted {dtype_name(exported.dtype)}, in "
                f"which {exported.folder} was exported; load the checkpoint itself, or export it "
                "again"
            )
        loaded, serving = _load_exported(exported, device, backend)
    source, commit = loaded.checkpoint.source, loaded.checkpoint.revision
    load_arguments = LoadArguments(
        source=str(absolute(source)) if commit is None else source,
        revision=commit,
        local_files_only=local_files_only,
        device=str(serving.device),
        dtype=INT8 if loaded.spec.int8 else dtype_name(serving.dtype),
        backend=serving.name,
        sixteen_bit=sixteen_bit,
        resize=resize,
    )
    model = Model(
        loaded.checkpoint,
        loaded.spec,
        loaded.hash_weights,
        serving,
        sixteen_bit,
        resize,
        load_arguments,
    )
    return loaded, model


def warn_of_int8(loaded: LoadedCheckpoint) -> None:
    """Warn the caller's caller of int8 weights that the guard did not find good."""
    if loaded.int8 is None or loaded.int8.guard.verdict == "good":
        return
    guard, folder = loaded.int8.guard, show_path(loaded.checkpoint.folder)
    warnings.warn(
        f"{folder}: int8 is {guard.verdict}: {'; '.join(guard.reasons)}. Check it: vitrail verify "
        f"PICTURES --model {folder} --against MODEL, with {loaded.int8.source.name} for MODEL",
        stacklevel=3,
    )


def read_model(
    path_or_id: str | os.PathLike[str],
    dtype: torch.dtype,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    check: Callable[[ModelSpec, str], None] = lambda spec, source: None,
) -> LoadedCheckpoint:
    """Read the files of a checkpoint and pack its weights. Arguments and errors: see `load`.

    ``check`` may refuse the spec and the source before any weight is read.
    """
    checkpoint = open_checkpoint(path_or_id, revision=revision, local_files_only=local_files_only)
    spec = read_spec(checkpoint)
    check(spec, checkpoint.source)
    sources = map_tensors(checkpoint, spec)
    make_hash = functools.cache(functools.partial(hash_weights, spec, sources))
    # a damaged code is a number like any other, so nothing else would tell
    record = None if checkpoint.int8 is None else read_record(checkpoint)
    if record is not None and record.weights != make_hash():
        raise CheckpointError(
            f"{checkpoint.source}: {contents.INT8_WEIGHTS}: got other tensors than those that "
            f"{contents.INT8} was written for; quantize the checkpoint again"
        )
    weights = load_weights(spec, sources, dtype, pixel_scale(spec))
    return LoadedCheckpoint(checkpoint, spec, weights, make_hash, record)


def pixel_scale(spec: ModelSpec) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(a, b), each (channels,) fp64, with normalized pixel = a * uint8 + b; None if the model takes
    no uint8 pixels."""
    if spec.vision is None or spec.image is None:
        return None
    factor, offset = linear_scale(spec.image, spec.vision.channels)
    return torch.from_numpy(factor), torch.from_numpy(offset)


def _load_exported(
    exported: ExportFolder, device: torch.device, backend: str
) -> tuple[LoadedCheckpoint, Runner]:
    dtype, digest = exported.dtype, exported.record.weights_hash
    name = choose(backend, dtype, device, exported)
    weights = exported.load()
    loaded = LoadedCheckpoint(exported.checkpoint(), exported.spec, weights, lambda: digest)
    if name == NativeRunner.name:
        return loaded, NativeRunner(weights, dtype, device, exported=exported)
    return loaded, RUNNERS[name](weights, dtype, device)
