"""Hugging Face folders (transformers 4 and 5): the registry of families, spec and tensors."""

from collections.abc import Mapping

from vitrail.checkpoint.files import Checkpoint
from vitrail.checkpoint.tensors import Source
from vitrail.errors import CheckpointError, show
from vitrail.spec import ImageSpec, ModelSpec
from vitrail.zoo import clip, deit, dinov2, vit
from vitrail.zoo.common import Config, Family, read_head
from vitrail.zoo.contradictions import contradictions
from vitrail.zoo.preprocessor import Processor, read_image_spec
from vitrail.zoo.rules import expand, map_names
from vitrail.zoo.schema import Schema, refuse_code

FAMILIES: tuple[Family, ...] = (
    vit.FAMILY,
    deit.FAMILY,
    dinov2.FAMILY,
    dinov2.WITH_REGISTERS,
    clip.FAMILY,
)

SCHEMAS: Mapping[str, Schema] = {
    model_type: schema for family in FAMILIES for model_type, schema in family.schemas.items()
}
PROCESSORS: Mapping[str, Processor] = {
    name: family.processor for family in FAMILIES for name in family.processor.class_names
}


def matches(checkpoint: Checkpoint) -> bool:
    """Whether transformers wrote config.json and the weights."""
    return "model_type" in checkpoint.config and checkpoint.int8 is None


def read_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The model of a Hugging Face folder, from config.json and the names of its tensors.

    Vitrail matches the outputs of the class in ``architectures``; if it names none, the tensors
    tell the class. Raises CheckpointError for a model type, class, key or value outside the schema.
    """
    config = checkpoint.config
    refuse_code("config.json", config)
    model_type = config["model_type"]
    if not isinstance(model_type, str) or model_type not in SCHEMAS:
        raise CheckpointError(
            f"config.json: model_type: got {show(model_type)}, wanted one of {', '.join(SCHEMAS)}"
        )
    SCHEMAS[model_type].check(config, "config.json")
    family = next(family for family in FAMILIES if model_type in family.schemas)
    named = _named_class(checkpoint, family, model_type)
    name = family.choose(family, checkpoint, model_type, named)
    architecture = family.architectures[name]
    config_of_class = Config(checkpoint, model_type, named, architecture)
    vision = family.vision(config_of_class) if architecture.vision else None
    text = family.text(config_of_class) if architecture.text and family.text else None
    outputs = architecture.outputs
    if vision is not None and vision.pooler is not None:
        outputs += ("pooler_output",)
    return ModelSpec(
        family=family.name,
        architecture=name,
        outputs=outputs,
        features=architecture.features,
        vision=vision,
        text=text,
        head=read_head(checkpoint, architecture),
        image=_image(checkpoint, family, vision.channels) if vision is not None else None,
    )


def _named_class(checkpoint: Checkpoint, family: Family, model_type: str) -> str | None:
    """The class that config.json names, if any."""
    names = checkpoint.config.get("architectures")
    if names is None or names == []:
        return None
    allowed = [
        name
        for name, architecture in family.architectures.items()
        if not architecture.model_types or model_type in architecture.model_types
    ]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in allowed:
        raise CheckpointError(
            f"config.json: architectures: got {show(names)}, wanted one of {', '.join(allowed)}"
        )
    name: str = names[0]
    return name


def _image(checkpoint: Checkpoint, family: Family, channels: int) -> ImageSpec | None:
    if checkpoint.preprocessor is None:
        return None
    refuse_code("preprocessor_config.json", checkpoint.preprocessor)
    return read_image_spec(checkpoint.preprocessor, family.processor, PROCESSORS, channels)


def _unused(spec: ModelSpec) -> tuple[str, ...]:
    """Prefixes of canonical names that a folder may hold and this class has no use for."""
    vision, text = spec.vision, spec.text
    unused = {
        "vision.": vision is None,  # the other tower of a CLIP
        "text.": text is None,
        "vision.projection.": vision is None or vision.projection is None,
        "text.projection.": text is None or text.projection is None,
        "logit_scale": not spec.contrastive,
        "vision.pooler.": vision is None or vision.pooler is None,
        "head.": spec.features is None,  # a classifier's folder, loaded for its features
    }
    return tuple(prefix for prefix, holds in unused.items() if holds)


def map_tensors(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, Source]:
    """Canonical name -> where it is stored, for every tensor of the spec.

    Raises a CheckpointError that lists every missing, unexpected, duplicated, misshaped or
    wrongly typed tensor, after the keys of config.json that the tensors contradict.
    """
    family = next(family for family in FAMILIES if family.name == spec.family)
    unused = _unused(spec)
    return map_names(
        checkpoint.tensors,
        spec.tensor_shapes(),
        expand(family.rules(spec)),
        lambda name: name.startswith(unused),
        spec.architecture,
        lambda shapes: contradictions(spec, family, checkpoint.config, shapes),
    )
