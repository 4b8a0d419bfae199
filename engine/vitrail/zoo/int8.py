"""Folders that ``vitrail quantize`` wrote: the spec is in int8.json, tensors are canonical."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from vitrail.checkpoint.contents import INT8
from vitrail.checkpoint.files import Checkpoint
from vitrail.checkpoint.tensors import Source
from vitrail.dtypes import SAFETENSORS
from vitrail.errors import CheckpointError, refusal, show
from vitrail.spec import ModelSpec
from vitrail.zoo.rules import listing

FORMAT = 1
AGAIN = "as vitrail quantize writes it; quantize the checkpoint again"


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the folder has an int8.json."""
    return checkpoint.int8 is not None


def read_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The spec in int8.json. Raises CheckpointError."""
    record = checkpoint.int8 or {}
    check_format(record, INT8)
    return parse_spec(record.get("spec"), INT8)


def check_format(record: Mapping[str, Any], location: str) -> None:
    """Raises CheckpointError unless int8.json, the object ``record``, has this version's format."""
    number = record.get("format")
    if number != FORMAT or isinstance(number, bool):
        raise refusal(f"{location}: format", show(number), f"{FORMAT}, {AGAIN}")


def parse_spec(value: object, location: str) -> ModelSpec:
    """The spec in the JSON object ``value``. Raises CheckpointError if it has no int8 linears."""
    if not isinstance(value, dict):
        raise refusal(f"{location}: spec", show(value), f"an object, {AGAIN}")
    try:
        spec = ModelSpec.from_dict(value)
    except CheckpointError as error:
        raise CheckpointError(f"{location}: {error}") from None
    if not spec.int8:
        raise refusal(f"{location}: spec", "no int8 linears", f"some, {AGAIN}")
    return spec


def map_tensors(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, Source]:
    """The source of every tensor of the spec, which is stored by its canonical name.

    Raises a CheckpointError that lists every missing, unexpected, misshaped or wrongly typed
    tensor. Codes are I8; scales, ``smooth`` and folded biases are F32.
    """
    faults: dict[str, list[str]] = defaultdict(list)
    shapes, tensors = spec.tensor_shapes(), checkpoint.tensors
    faults["missing"] = [name for name in shapes if name not in tensors]
    faults["unexpected"] = [name for name in tensors if name not in shapes]
    for name in shapes.keys() & tensors.keys():
        entry, dtypes = tensors[name], _dtypes(name)
        if entry.shape != shapes[name]:
            faults["misshaped"].append(f"{name}: got {entry.shape}, wanted {shapes[name]}")
        if entry.dtype not in dtypes:
            actual = f"{name}: got {entry.dtype}, wanted {' or '.join(dtypes)}"
            faults["of another dtype"].append(actual)
    faults = {fault: sorted(names) for fault, names in faults.items() if names}
    if faults:
        raise CheckpointError(f"tensors do not fit {INT8}: {listing(faults)}")
    return {name: Source(tensors[name]) for name in shapes}


def _dtypes(name: str) -> tuple[str, ...]:
    """The safetensors codes that the tensor may have."""
    of_int8 = {"codes": ("I8",), **dict.fromkeys(("scale", "smooth", "folded_bias"), ("F32",))}
    return of_int8.get(name.rpartition(".")[2], tuple(SAFETENSORS))
