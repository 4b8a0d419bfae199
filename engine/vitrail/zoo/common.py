"""The pieces that families share: their row in the registry, and readers of common config keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from vitrail.checkpoint.files import Checkpoint
from vitrail.errors import CheckpointError
from vitrail.spec import (
    MAX_IMAGE_SIDE,
    MAX_LAYERS,
    MAX_TABLE,
    MAX_WIDTH,
    Activation,
    BlockSpec,
    Features,
    HeadSpec,
    ModelSpec,
    OutputField,
    PoolerSpec,
    TextSpec,
    VisionSpec,
)
from vitrail.zoo.fields import Fields
from vitrail.zoo.preprocessor import Processor
from vitrail.zoo.rules import Groups, NameRule, copy
from vitrail.zoo.schema import Schema

# transformers' names (activations.py) of our activations. Its spellings of tanh-GELU agree to
# 1e-12 in float64.
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

HEAD = (copy("head.*", "classifier.*"),)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A transformers class whose outputs Vitrail equals.

    ``outputs``: the fields of its output; `pooler_output` is added if the checkpoint has a dense
    pooler. ``features``: the input of its classifier, None without a classifier. ``mark``: the
    prefix of its classifier's tensors, which tells the class if config.json names none.
    ``model_types``: the config types that it takes, all of its family if empty.
    """

    outputs: tuple[OutputField, ...]
    vision: bool = True
    text: bool = False
    projection: bool = False
    pooler: bool = False
    features: Features | None = None
    mark: str = ""
    model_types: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Config:
    """config.json, once its class is known. ``named``: the class that it names, if any."""

    checkpoint: Checkpoint
    model_type: str
    named: str | None
    architecture: Architecture

    def fields(self, schema: Schema) -> Fields:
        """The top level of config.json, with the defaults of ``schema``."""
        return Fields("config.json", self.checkpoint.config, schema.defaults)


def marked_class(family: Family, checkpoint: Checkpoint, model_type: str, named: str | None) -> str:
    """The named class; else the class whose mark the tensors bear, or the family's first."""
    if named is not None:
        return named
    marked = (
        name
        for name, architecture in family.architectures.items()
        if architecture.mark and any_starts(checkpoint.tensors, architecture.mark)
    )
    return next(marked, next(iter(family.architectures)))


@dataclass(frozen=True, slots=True)
class Family:
    """A row of the registry: everything that Vitrail knows of a model family.

    ``schemas``: the keys of config.json by model type. ``architectures``: its transformers classes,
    the base model first. ``vision`` and ``text`` read the towers. ``rules``: the tensor names.
    ``processor``: the default image processor. ``mlp_key``: the config key of the MLP's width.
    ``choose`` tells the class of a checkpoint from its named class, or from its tensors.
    """

    name: str
    schemas: Mapping[str, Schema]
    architectures: Mapping[str, Architecture]
    vision: Callable[[Config], VisionSpec]
    rules: Callable[[ModelSpec], Groups]
    processor: Processor
    text: Callable[[Config], TextSpec] | None = None
    mlp_key: str = "intermediate_size"
    choose: Callable[[Family, Checkpoint, str, str | None], str] = marked_class


def any_starts(names: Mapping[str, object], *prefixes: str) -> bool:
    """Whether any of the names begins with any of the prefixes."""
    return any(name.startswith(prefixes) for name in names)


def block_rules(
    tower: str, stacks: tuple[str, ...], names: Mapping[str, str | tuple[str, ...]]
) -> tuple[NameRule, ...]:
    """Rules for the tensors of a block, such as ``{"norm1.*": "layernorm_before.*"}``.

    ``stacks``: the prefix of a block in each dialect, such as ``"layers.{i}."``. A name is the same
    in every dialect, or each dialect has its own.
    """
    rules = []
    for canonical, stored in names.items():
        spellings = (stored,) * len(stacks) if isinstance(stored, str) else stored
        prefixes = stacks * (len(spellings) // len(stacks))
        full = (prefix + name for prefix, name in zip(prefixes, spellings, strict=True))
        rules.append(copy(f"{tower}.blocks.{{i}}.{canonical}", *full))
    return tuple(rules)


def read_activation(fields: Fields, key: str) -> Activation:
    """An activation of transformers that Vitrail has too."""
    name = fields.text(key)
    if name not in ACTIVATIONS:
        fields.refuse(key, f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def read_width(fields: Fields) -> int:
    """The width of the residual stream."""
    return fields.count("hidden_size", 1, MAX_WIDTH)


def read_blocks(
    fields: Fields,
    *,
    mlp: int | None = None,
    gated: bool = False,
    qkv_bias: bool = True,
    layer_scale: bool = False,
    causal: bool = False,
) -> BlockSpec:
    """The blocks of a tower. ``mlp``: width of the MLP, by default `intermediate_size`."""
    width = read_width(fields)
    heads = fields.count("num_attention_heads", 1, width)
    if width % heads:
        fields.refuse("num_attention_heads", f"a divisor of hidden_size {width}")
    if fields.values.get("head_dim", width // heads) != width // heads:
        fields.refuse("head_dim", f"hidden_size / num_attention_heads = {width // heads}")
    return BlockSpec(
        width=width,
        layers=fields.count("num_hidden_layers", 1, MAX_LAYERS),
        heads=heads,
        mlp=fields.count("intermediate_size", 1, 16 * MAX_WIDTH) if mlp is None else mlp,
        activation="silu" if gated else read_activation(fields, "hidden_act"),
        eps=fields.number("layer_norm_eps", 0, 1),
        gated=gated,
        qkv_bias=qkv_bias,
        layer_scale=layer_scale,
        causal=causal,
    )


def read_vision(fields: Fields, blocks: BlockSpec) -> VisionSpec:
    """A plain image tower, whose patches tile the image."""
    image = fields.pair("image_size", MAX_IMAGE_SIDE)
    patch = fields.pair("patch_size", MAX_IMAGE_SIDE)
    if image[0] % patch[0] or image[1] % patch[1]:
        fields.refuse("image_size", f"a multiple of the patch size {patch}")
    return VisionSpec(blocks, image, patch, fields.count("num_channels", 1, 1024))


def read_pooler(config: Config, fields: Fields, prefix: str) -> PoolerSpec | None:
    """The dense pooler, if the class has it and the checkpoint its tensors: config.json does not
    tell. ``prefix``: that of the tensor names inside another model."""
    names = "pooler.dense.", f"{prefix}pooler.dense."
    if not config.architecture.pooler or not any_starts(config.checkpoint.tensors, *names):
        return None
    width, tanh = read_width(fields), fields.get("pooler_act") == "tanh"
    if fields.get("pooler_output_size") is not None:
        width = fields.count("pooler_output_size", 1, MAX_WIDTH)
    return PoolerSpec(width, "tanh" if tanh else read_activation(fields, "pooler_act"))


def read_head(checkpoint: Checkpoint, architecture: Architecture) -> HeadSpec | None:
    """The classifier's labels. None for a class without a classifier, and for ``num_labels`` 0:
    transformers has no classifier then."""
    if architecture.features is None:
        return None
    fields = Fields("config.json", checkpoint.config, {"id2label": None, "num_labels": None})
    listed = fields.get("id2label") is not None
    labels = (
        _listed_labels(fields) if listed else _numbered_labels(fields, checkpoint, architecture)
    )
    scores = _scores(checkpoint, len(labels))
    return HeadSpec(labels, architecture.features, scores) if labels else None


def _scores(checkpoint: Checkpoint, labels: int) -> Literal["softmax", "sigmoid", "none"]:
    """The function that transformers' image classification pipeline applies to the logits."""
    problem = checkpoint.config.get("problem_type")
    if problem == "regression":
        return "none"
    return "sigmoid" if problem == "multi_label_classification" or labels == 1 else "softmax"


def _listed_labels(fields: Fields) -> tuple[str, ...]:
    """Labels in the order of their numbers, from ``{"0": ..., "1": ...}`` without gaps."""
    names = fields.get("id2label")
    if not isinstance(names, dict) or not all(isinstance(label, str) for label in names.values()):
        fields.refuse("id2label", "an object of strings")
    for index in range(len(names)):
        if str(index) not in names:
            fields.refuse("id2label", f"the keys 0 to {len(names) - 1}; there is no {index}")
    return tuple(names[str(index)] for index in range(len(names)))


def _numbered_labels(
    fields: Fields, checkpoint: Checkpoint, architecture: Architecture
) -> tuple[str, ...]:
    """LABEL_0, LABEL_1, ...: as many as the classifier has rows, or two, as in transformers."""
    counts: dict[str, int] = {
        name: checkpoint.tensors[name].shape[0]
        for name in (f"{architecture.mark}weight", f"{architecture.mark}bias")
        if name in checkpoint.tensors and checkpoint.tensors[name].shape
    }
    if fields.get("num_labels") is not None:
        counts["num_labels"] = fields.count("num_labels", 0, MAX_TABLE)
    if len(set(counts.values())) > 1 or max(counts.values(), default=0) > MAX_TABLE:
        raise CheckpointError(
            f"config.json: got {counts}, wanted one number of labels, at most {MAX_TABLE}"
        )
    return tuple(f"LABEL_{index}" for index in range(next(iter(counts.values()), 2)))
