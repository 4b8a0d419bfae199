"""The transformers classes whose outputs Vitrail equals, and which of them a checkpoint is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vitrail.checkpoint.files import Checkpoint
from vitrail.errors import CheckpointError, show

Family = Literal["vit", "clip", "dinov2", "dinov2_with_registers"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a transformers class computes, and the model types whose config it takes."""

    family: Family
    model_types: tuple[str, ...]
    vision: bool = True
    text: bool = False
    projection: bool = False
    pooler: bool = False
    head: Literal["class", "class_mean"] | None = None


ARCHITECTURES: Mapping[str, Architecture] = {
    "ViTModel": Architecture("vit", ("vit",), pooler=True),
    "ViTForImageClassification": Architecture("vit", ("vit",), head="class"),
    "CLIPModel": Architecture("clip", ("clip",), text=True, projection=True),
    "CLIPVisionModel": Architecture("clip", ("clip", "clip_vision_model")),
    "CLIPVisionModelWithProjection": Architecture(
        "clip", ("clip", "clip_vision_model"), projection=True
    ),
    "CLIPTextModel": Architecture("clip", ("clip", "clip_text_model"), vision=False, text=True),
    "CLIPTextModelWithProjection": Architecture(
        "clip", ("clip", "clip_text_model"), vision=False, text=True, projection=True
    ),
    "Dinov2Model": Architecture("dinov2", ("dinov2",)),
    "Dinov2ForImageClassification": Architecture("dinov2", ("dinov2",), head="class_mean"),
    "Dinov2WithRegistersModel": Architecture("dinov2_with_registers", ("dinov2_with_registers",)),
    "Dinov2WithRegistersForImageClassification": Architecture(
        "dinov2_with_registers", ("dinov2_with_registers",), head="class_mean"
    ),
}


def named_architecture(config: Mapping[str, Any], model_type: str) -> str | None:
    """The one class that config.json names, None where it names none."""
    names = config.get("architectures")
    if names is None or names == []:
        return None
    known = [name for name, kind in ARCHITECTURES.items() if model_type in kind.model_types]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in known:
        raise CheckpointError(
            f"config.json: architectures: got {show(names)}, wanted one of {', '.join(known)}"
        )
    name: str = names[0]
    return name


def architecture_of(checkpoint: Checkpoint, model_type: str, named: str | None) -> str:
    """The class to match: the named one, or what the tensors are where none is named.

    A CLIPModel config beside the tensors of one tower is that tower: people save it so. It embeds
    in the shared space, so that its projection must be there; an unnamed tower may lack it.
    """
    names = checkpoint.tensors
    if model_type not in ("clip", "clip_text_model", "clip_vision_model"):
        if named is not None:
            return named
        head = any_starts(names, "classifier.")
        return next(
            name
            for name, kind in ARCHITECTURES.items()
            if kind.family == model_type and (kind.head is not None) == head
        )
    if named not in (None, "CLIPModel"):
        return str(named)
    vision = model_type != "clip_text_model" and any_starts(names, *_VISION_MARKS)
    text = model_type != "clip_vision_model" and any_starts(names, *_TEXT_MARKS)
    if not vision and not text:
        raise CheckpointError(
            "tensors: got neither vision_model.* nor text_model.*, wanted a CLIP tower"
        )
    if vision and text:
        return "CLIPModel"
    tower, projection = ("Vision", "visual_projection.") if vision else ("Text", "text_projection.")
    projected = named is not None or any_starts(names, projection)
    return f"CLIP{tower}Model" + ("WithProjection" if projected else "")


_VISION_MARKS = (
    "vision_model.",
    "pre_layrnorm.",
    "embeddings.class_embedding",
    "embeddings.patch_",
)
_TEXT_MARKS = ("text_model.", "final_layer_norm.", "embeddings.token_embedding.")


def any_starts(names: Mapping[str, object], *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in names)
