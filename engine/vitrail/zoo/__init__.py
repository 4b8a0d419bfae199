"""Checkpoint formats: the format of a folder, its spec, and where its tensors are."""

from collections.abc import Callable
from dataclasses import dataclass

from vitrail.checkpoint.files import Checkpoint
from vitrail.checkpoint.tensors import Source
from vitrail.errors import CheckpointError
from vitrail.spec import ModelSpec
from vitrail.zoo import hf, int8

__all__ = ["FORMATS", "Format", "map_tensors", "read_spec"]


@dataclass(frozen=True, slots=True)
class Format:
    """A way of writing checkpoints."""

    name: str
    matches: Callable[[Checkpoint], bool]
    read_spec: Callable[[Checkpoint], ModelSpec]
    map_tensors: Callable[[Checkpoint, ModelSpec], dict[str, Source]]


FORMATS = (
    Format("Hugging Face", hf.matches, hf.read_spec, hf.map_tensors),
    Format("Vitrail int8", int8.matches, int8.read_spec, int8.map_tensors),
)


def _format_of(checkpoint: Checkpoint) -> Format:
    """The format of a checkpoint; CheckpointError if none or several match."""
    matching = [candidate for candidate in FORMATS if candidate.matches(checkpoint)]
    if len(matching) != 1:
        names = " and ".join(candidate.name for candidate in matching) or "no known format"
        formats = ", ".join(candidate.name for candidate in FORMATS)
        raise CheckpointError(
            f"config.json: got {names}, wanted one of: {formats} (a config.json with model_type)"
        )
    return matching[0]


def read_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The whole model as plain values; reads no tensor. Raises CheckpointError."""
    try:
        return _format_of(checkpoint).read_spec(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.source}: {error}") from None


def map_tensors(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, Source]:
    """Canonical name -> source of every tensor of the spec: complete, or a CheckpointError.

    The (sliced) tensor of a source has as many elements as ``spec.tensor_shapes()`` says; leading
    dimensions of 1 may differ.
    """
    try:
        return _format_of(checkpoint).map_tensors(checkpoint, spec)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.source}: {error}") from None
