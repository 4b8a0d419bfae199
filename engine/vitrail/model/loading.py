"""`load`: a checkpoint or an exported folder to a `Model`."""

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from vitrail.checkpoint import contents
from vitrail.checkpoint.files import Checkpoint, open_checkpoint
from vitrail.checkpoint.regular import absolute
from vitrail.cuda import cuda_capability
from vitrail.dtypes import dtype_name
from vitrail.errors import CheckpointError, InputError, show_path
from vitrail.exported.folder import open_exported
from vitrail.image.decoding import SixteenBit
from vitrail.image.normalize import linear_scale
from vitrail.int8.record import Int8Record, read_record
from vitrail.model.arguments import INT8, Resize, check_device, check_dtype, check_precision
from vitrail.model.capacity import Capacity
from vitrail.model.load_arguments import LoadArguments
from vitrail.model.model import Model
from vitrail.model.replicas import Replicas
from vitrail.runtime import RUNNERS, choose
from vitrail.runtime.budget import parse_memory_limit
from vitrail.runtime.native import NativeRunner
from vitrail.runtime.runner import Runner
from vitrail.spec import ModelSpec
from vitrail.torch_modes import public_call
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
    memory_limit: int | str | None = None,
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

    ``memory_limit``: the most that the model holds on its device beyond its weights, in bytes, or
    "512M" or "2G" (K, M, G and T are powers of 1,024): activations, inputs and outputs of calls,
    images that the device resizes, position tables, and on the backend "torch" PyTorch's
    temporaries. Larger batches are cut, to the same bits on kernels; PyTorch's bits on a CPU depend
    on the batch. Calls of several threads share the limit, and wait for each other. What `forward`,
    `get_intermediate_layers` and `as_module` return belongs to the caller and does not count.

    Warns of int8 weights that the guard of ``vitrail quantize`` did not find good on the user's own
    pictures.

    Raises CheckpointError: the files are damaged, or Vitrail cannot serve the checkpoint exactly.
    InputError: an unknown argument, one that cannot be met on this machine, or a memory limit that
    does not hold one item. OutOfMemoryError: the GPU has no room for the weights.
    """
    if runner is not None:
        if backend != "auto":
            raise InputError(
                f"runner: got {runner!r} with backend={backend!r}, wanted backend alone"
            )
        backend = runner
    loaded, (model,) = _load(
        path_or_id,
        [check_device(device)],
        dtype,
        revision,
        local_files_only,
        sixteen_bit,
        backend,
        resize,
        parse_memory_limit(memory_limit),
    )
    warn_of_int8(loaded)
    return model


def load_replicas(
    path_or_id: str | os.PathLike[str],
    *,
    devices: Sequence[str | int | torch.device] | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    sixteen_bit: SixteenBit = "scale",
    backend: str = "auto",
    resize: Resize = "host",
    memory_limit: int | str | None = None,
) -> Replicas:
    """A model on each of ``devices``, as one object whose calls spread over them (`Replicas`).

    ``devices``: such as ``["cuda:0", "cuda:2"]``; None: every CUDA device, or the CPU if there is
    none. Replicas on the same device share its weights. The checkpoint is read once.
    ``memory_limit``: of each replica. For the other arguments and errors see `load`.

    Raises InputError if the devices would give different bits: other architectures, dtypes or
    backends.
    """
    if devices is None:
        has_gpu = check_device("auto", "devices").type == "cuda"
        count = torch.cuda.device_count() if has_gpu else 0
        devices = [f"cuda:{number}" for number in range(count)] or ["cpu"]
    if isinstance(devices, str | int | torch.device) or not devices:
        raise InputError(f"devices: got {devices!r}, wanted a list of one device or more")
    checked = [check_device(device, "devices") for device in devices]
    loaded, models = _load(
        path_or_id,
        checked,
        dtype,
        revision,
        local_files_only,
        sixteen_bit,
        backend,
        resize,
        parse_memory_limit(memory_limit),
    )
    warn_of_int8(loaded)
    return Replicas(models)


def load_again(load_arguments: LoadArguments) -> Model:
    """The model that was loaded with these arguments, without the warnings. Errors: see `load`."""
    return load_again_on(load_arguments, [load_arguments.device])[0]


def load_again_on(load_arguments: LoadArguments, devices: Sequence[str]) -> list[Model]:
    """`load_again` for a model on each of ``devices``, whatever device the arguments name."""
    keywords = load_arguments.keywords()
    del keywords["device"]
    checked = [check_device(device) for device in devices]
    return _load(load_arguments.source, checked, **keywords)[1]


@public_call
def _load(
    path_or_id: str | os.PathLike[str],
    devices: Sequence[torch.device],
    dtype: str | torch.dtype,
    revision: str | None,
    local_files_only: bool,
    sixteen_bit: SixteenBit,
    backend: str,
    resize: Resize,
    memory_limit: int | None,
) -> tuple[LoadedCheckpoint, list[Model]]:
    """As `load`, with a model for each of ``devices``. Their fingerprints are equal."""
    dtypes = [check_dtype(dtype, device) for device in devices]
    _check_same("dtype", devices, [dtype_name(computed) for computed in dtypes])
    if sixteen_bit not in ("scale", "clip"):
        raise InputError(f"sixteen_bit: got {sixteen_bit!r}, wanted 'scale' or 'clip'")
    if resize not in ("host", "device"):
        raise InputError(f"resize: got {resize!r}, wanted 'host' or 'device'")
    compute_dtype, exported = dtypes[0], open_exported(path_or_id, revision)
    if exported is not None:
        check_precision(dtype, exported.spec, str(exported.folder))
        if not exported.spec.int8 and dtype != "auto" and compute_dtype != exported.dtype:
            raise InputError(
                f"dtype: got {dtype_name(compute_dtype)}, wanted {dtype_name(exported.dtype)}, in "
                f"which {exported.folder} was exported; load the checkpoint itself, or export it "
                "again"
            )
        compute_dtype = exported.dtype
    names = [choose(backend, compute_dtype, device, exported) for device in devices]
    _check_same("backend", devices, names)
    _check_same("hardware", devices, [_hardware(device, names[0]) for device in devices])
    if exported is None:
        loaded = read_model(
            path_or_id,
            compute_dtype,
            revision=revision,
            local_files_only=local_files_only,
            check=functools.partial(check_precision, dtype),
        )
    else:
        digest = exported.record.weights_hash
        weights = exported.load()
        loaded = LoadedCheckpoint(exported.checkpoint(), exported.spec, weights, lambda: digest)
    runners: list[Runner] = []
    for device in devices:
        # replicas on a device share its weights
        weights = next((r.weights for r in runners if r.device == device), loaded.weights)
        if names[0] == NativeRunner.name:
            runners.append(NativeRunner(weights, compute_dtype, device, exported=exported))
        else:
            runners.append(RUNNERS[names[0]](weights, compute_dtype, device))
    _check_same("kernels", devices, [runner.identity for runner in runners])
    if memory_limit is not None:
        Capacity(loaded.spec, type(runners[0]), compute_dtype, resize).check(memory_limit)
        for runner in runners:
            runner.budget.limit = memory_limit
    source, commit = loaded.checkpoint.source, loaded.checkpoint.revision
    load_arguments = LoadArguments(
        source=str(absolute(source)) if commit is None else source,
        revision=commit,
        local_files_only=local_files_only,
        device=str(runners[0].device),
        dtype=INT8 if loaded.spec.int8 else dtype_name(runners[0].dtype),
        backend=runners[0].name,
        sixteen_bit=sixteen_bit,
        resize=resize,
        memory_limit=memory_limit,
    )
    checkpoint, spec, make_hash = loaded.checkpoint, loaded.spec, loaded.hash_weights
    models = [
        Model(
            checkpoint,
            spec,
            make_hash,
            runner,
            sixteen_bit,
            resize,
            replace(load_arguments, device=str(runner.device)),
        )
        for runner in runners
    ]
    return loaded, models


def _hardware(device: torch.device, backend: str) -> str:
    """What the bits of ``backend`` depend on; PyTorch's products also on the multiprocessors."""
    if device.type == "cpu":
        return "CPU"
    major, minor = cuda_capability(device)
    if backend != "torch":
        return f"sm_{major}{minor}"
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return f"sm_{major}{minor} ({count} multiprocessors)"


def _check_same(subject: str, devices: Sequence[torch.device], values: Sequence[str]) -> None:
    """Refuse devices that differ in something that a bit of a result depends on."""
    for device, value in zip(devices, values, strict=True):
        if value != values[0]:
            raise InputError(
                f"devices: got {devices[0]} with the {subject} {values[0]}, and {device} with "
                f"{value}: replicas must give the same bits; name devices of one kind"
            )


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
