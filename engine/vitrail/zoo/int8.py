"""Folders that ``vitrail quantize`` wrote: the spec is in int8.json, tensors are canonical."""

from collections import defaultdict

from vitrail.checkpoint.contents import INT8
from vitrail.checkpoint.files import Checkpoint
from vitrail.checkpoint.tensors import Source
from vitrail.dtypes import SAFETENSORS
from vitrail.errors import CheckpointError, show
from vitrail.spec import ModelSpec
from vitrail.zoo.rules import listing

FORMAT = 1


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the folder has an int8.json."""
    return checkpoint.int8 is not None


def read_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The spec in int8.json. Raises CheckpointError."""
    record = checkpoint.int8 or {}
    if record.get("format") != FORMAT:
        raise CheckpointError(
            f"{INT8}: format: got {show(record.get('format'))}, wanted {FORMAT}; quantize the "
            "checkpoint with this version"
        )
    if not isinstance(record.get("spec"), dict):
        raise CheckpointError(f"{INT8}: spec: got {show(record.get('spec'))}, wanted an object")
    try:
        spec = ModelSpec.from_dict(record["spec"])
    except CheckpointError as error:
        raise CheckpointError(f"{INT8}: {error}") from None
    if not spec.int8:
        raise CheckpointError(f"{INT8}: spec: got no int8 linears, wanted some")
    return spec


def map_tensors(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, Source]:
    """The source of every tensor of the spec, which is stored by its canonical name.

    Raises a CheckpointError that lists every missing, unexpected, misshaped or wrongly typed
    tensor. Codes are I8; scales, ``smooth`` and the folded biases are F32.
    """
    faults: dict[str, list[str]] = defaultdict(list)
    shapes, tensors = spec.tensor_shapes(), checkpoint.tensors
    faults["missing"] = [name for name in shapes if name not in tensors]
    faults["unexpected"] = [name for name in tensors if name not in shapes]
    for name in shapes.keys() & tensors.keys():
        entry, dtypes = tensors[name], _dtypes(name, spec)
        if entry.shape != shapes[name]:
            faults["misshaped"].append(f"{name}: got {entry.shape}, wanted {shapes[name]}")
        if entry.dtype not in dtypes:
            actual = f"{name}: got {entry.dtype}, wanted {' or '.join(dtypes)}"
            faults["of another dtype"].append(actual)
    faults = {fault: sorted(names) for fault, names in faults.items() if names}
    if faults:
        raise CheckpointError(f"tensors do not fit {INT8}: {listing(faults)}")
    return {name: Source(tensors[name]) for name in shapes}


def _dtypes(name: str, spec: ModelSpec) -> tuple[str, ...]:
    """The safetensors codes that the tensor may have."""
    linear, _, tensor = name.rpartition(".")
    if tensor == "codes":
        return ("I8",)
    assert spec.vision is not None, "a spec with int8 linears has an image tower"
    int8 = linear.removeprefix("vision.blocks.") in spec.vision.blocks.int8
    # the bias of a down projection is the checkpoint's own
    plain = not int8 or (tensor == "bias" and linear.endswith(".down"))
    return tuple(SAFETENSORS) if plain else ("F32",)
