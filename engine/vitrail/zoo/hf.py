"""Hugging Face folders (transformers 4 and 5): config.json -> ModelSpec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from vitrail.checkpoint.files import Checkpoint
from vitrail.errors import CheckpointError, show
from vitrail.spec import (
    MAX_IMAGE_SIDE,
    MAX_LAYERS,
    MAX_TABLE,
    MAX_WIDTH,
    Activation,
    BlockSpec,
    HeadSpec,
    ModelSpec,
    PoolerSpec,
    TextSpec,
    VisionSpec,
)
from vitrail.zoo.fields import Fields, is_integer
from vitrail.zoo.hf_classes import (
    ARCHITECTURES,
    Architecture,
    any_starts,
    architecture_of,
    named_architecture,
)
from vitrail.zoo.hf_keys import SCHEMAS, refuse_code
from vitrail.zoo.processor import read_image_spec

# transformers' names (activations.py) of the activations that ours equal: the spellings of
# tanh-GELU agree to 1e-12 in float64.
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


def matches(checkpoint: Checkpoint) -> bool:
    """Whether config.json is one that transformers wrote."""
    return "model_type" in checkpoint.config


def read_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The model of a Hugging Face folder, from config.json and the names of its tensors.

    The class in ``architectures`` is the one whose outputs are matched; without one, the tensors
    say which. Raises CheckpointError for a model type, class, key or value outside the schema.
    """
    config = checkpoint.config
    refuse_code("config.json", config)
    model_type = config["model_type"]
    if not isinstance(model_type, str) or model_type not in SCHEMAS:
        raise CheckpointError(
            f"config.json: model_type: got {show(model_type)}, wanted one of {', '.join(SCHEMAS)}"
        )
    SCHEMAS[model_type].check(config, "config.json")
    named = named_architecture(config, model_type)
    name = architecture_of(checkpoint, model_type, named)
    kind = ARCHITECTURES[name]
    whole = named == "CLIPModel"
    vision = _vision(checkpoint, model_type, kind, whole) if kind.vision else None
    image = None
    if vision is not None and checkpoint.preprocessor is not None:
        refuse_code("preprocessor_config.json", checkpoint.preprocessor)
        image = read_image_spec(checkpoint.preprocessor, kind.family, vision.channels)
    return ModelSpec(
        family=kind.family,
        architecture=name,
        vision=vision,
        text=_text(config, model_type, kind, whole) if kind.text else None,
        head=_head(checkpoint, kind.head) if kind.head is not None else None,
        image=image,
    )


def _tower(
    config: Mapping[str, Any], model_type: str, tower: Literal["text", "vision"], whole: bool
) -> Fields:
    """The config of one CLIP tower: config.json itself, or its ``<tower>_config``.

    A whole CLIPModel takes ``<tower>_config_dict`` first: its values, and the defaults of what it
    leaves out, replace those of ``<tower>_config`` (CLIPConfig.__post_init__). A lone tower's class
    reads ``<tower>_config`` alone (PreTrainedConfig.from_pretrained).
    """
    schema = SCHEMAS[f"clip_{tower}_model"]
    if model_type != "clip":
        return Fields("config.json", config, schema.defaults)
    given: list[Mapping[str, Any] | None] = []
    for key in (f"{tower}_config", f"{tower}_config_dict"):
        values = config.get(key)
        if values is not None:
            if not isinstance(values, dict):
                raise CheckpointError(f"config.json: {key}: got {show(values)}, wanted an object")
            schema.check(values, f"config.json ({key})")
            if values.get("model_type", f"clip_{tower}_model") != f"clip_{tower}_model":
                raise CheckpointError(
                    f"config.json ({key}): model_type: got {show(values['model_type'])}, "
                    f"wanted 'clip_{tower}_model'"
                )
        given.append(values)
    nested, legacy = given
    merged = dict(nested or {})
    if legacy is not None and (whole or nested is None):
        merged |= {**schema.defaults, **legacy}
    elif "projection_dim" not in merged and "projection_dim" in config:
        merged["projection_dim"] = config["projection_dim"]
    return Fields(f"config.json ({tower}_config)", merged, schema.defaults)


def _projection(config: Mapping[str, Any], fields: Fields, whole: bool) -> int:
    """Width of the shared space: CLIPModel has its own, a lone tower that of its own config."""
    if whole:
        fields = Fields("config.json", config, SCHEMAS["clip"].defaults)
    return fields.count("projection_dim", 1, MAX_WIDTH)


def _activation(fields: Fields, key: str) -> Activation:
    name = fields.text(key)
    if name not in ACTIVATIONS:
        fields.refuse(key, f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _blocks(fields: Fields, *, causal: bool = False) -> BlockSpec:
    """The stack of a ViT or of a CLIP tower, or of a DINOv2 (LayerScale, ratio, SwiGLU)."""
    width = fields.count("hidden_size", 1, MAX_WIDTH)
    heads = fields.count("num_attention_heads", 1, width)
    if width % heads:
        fields.refuse("num_attention_heads", f"a divisor of hidden_size {width}")
    if fields.values.get("head_dim", width // heads) != width // heads:
        fields.refuse("head_dim", f"hidden_size / num_attention_heads = {width // heads}")
    dinov2 = "mlp_ratio" in fields.defaults
    gated = dinov2 and fields.flag("use_swiglu_ffn")
    return BlockSpec(
        width=width,
        layers=fields.count("num_hidden_layers", 1, MAX_LAYERS),
        heads=heads,
        mlp=_mlp_width(fields, width, gated) if dinov2 else _intermediate(fields),
        activation="silu" if gated else _activation(fields, "hidden_act"),
        eps=fields.number("layer_norm_eps", 0, 1),
        gated=gated,
        qkv_bias=fields.flag("qkv_bias") if "qkv_bias" in fields.defaults else True,
        layer_scale=dinov2,
        causal=causal,
    )


def _intermediate(fields: Fields) -> int:
    return fields.count("intermediate_size", 1, 16 * MAX_WIDTH)


def _mlp_width(fields: Fields, width: int, gated: bool) -> int:
    """Dinov2MLP's width, or Dinov2SwiGLUFFN's: two thirds of it, rounded up to a multiple of 8."""
    ratio = fields.get("mlp_ratio")
    fields.number("mlp_ratio", 0, 16)
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def _vision(checkpoint: Checkpoint, model_type: str, kind: Architecture, whole: bool) -> VisionSpec:
    config = checkpoint.config
    clip = kind.family == "clip"
    fields = (
        _tower(config, model_type, "vision", whole)
        if clip
        else Fields("config.json", config, SCHEMAS[model_type].defaults)
    )
    blocks = _blocks(fields)
    image, patch = _sides(fields, square=clip)
    registers = "num_register_tokens" in fields.defaults
    return VisionSpec(
        blocks=blocks,
        image=image,
        patch=patch,
        channels=fields.count("num_channels", 1, 1024),
        registers=fields.count("num_register_tokens", 1, 1024) if registers else 0,
        patch_bias=not clip,
        position_antialias=registers,
        pre_norm=clip,
        norm="pooled" if clip else "tokens",
        projection=_projection(config, fields, whole) if kind.projection else None,
        pooler=_pooler(checkpoint, fields, blocks.width) if kind.pooler else None,
    )


def _sides(fields: Fields, square: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """Image and patch size, (height, width) each; the patches tile the image."""
    for key in ("image_size", "patch_size"):
        if square and not is_integer(fields.get(key)):
            fields.refuse(key, "an integer: CLIP's images and patches are squares")
    image = fields.pair("image_size", MAX_IMAGE_SIDE)
    patch = fields.pair("patch_size", MAX_IMAGE_SIDE)
    if image[0] % patch[0] or image[1] % patch[1]:
        fields.refuse("image_size", f"a multiple of the patch size {patch}")
    grid = image[0] // patch[0], image[1] // patch[1]
    if "mlp_ratio" in fields.defaults and grid[0] != grid[1]:
        fields.refuse(
            "image_size", f"as many patches down as across: DINOv2 reads {grid} as a square"
        )
    return image, patch


def _pooler(checkpoint: Checkpoint, fields: Fields, width: int) -> PoolerSpec | None:
    """ViTModel's pooler where the checkpoint has one: the config does not tell."""
    if not any_starts(checkpoint.tensors, "pooler.dense.", "vit.pooler.dense."):
        return None
    size = fields.get("pooler_output_size")
    return PoolerSpec(
        width=width if size is None else fields.count("pooler_output_size", 1, MAX_WIDTH),
        activation="tanh"
        if fields.get("pooler_act") == "tanh"
        else _activation(fields, "pooler_act"),
    )


def _text(config: Mapping[str, Any], model_type: str, kind: Architecture, whole: bool) -> TextSpec:
    fields = _tower(config, model_type, "text", whole)
    vocab = fields.count("vocab_size", 1, MAX_TABLE)
    return TextSpec(
        blocks=_blocks(fields, causal=True),
        vocab=vocab,
        context=fields.count("max_position_embeddings", 1, MAX_TABLE),
        eos=_eos(fields, vocab),
        projection=_projection(config, fields, whole) if kind.projection else None,
    )


def _eos(fields: Fields, vocab: int) -> int | None:
    """The id that is pooled; None for the legacy 2, where CLIPTextModel pools the highest id."""
    value = fields.get("eos_token_id")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not is_integer(value) or not 0 <= value < vocab:
        fields.refuse("eos_token_id", f"one integer from 0 to {vocab - 1}")
    return None if value == 2 else int(value)


def _head(checkpoint: Checkpoint, features: Literal["class", "class_mean"]) -> HeadSpec | None:
    """The classifier's labels; None for ``num_labels`` 0, where transformers has no classifier."""
    fields = Fields("config.json", checkpoint.config, {"id2label": None, "num_labels": None})
    labels = (
        _labels(fields) if fields.get("id2label") is not None else _numbered(fields, checkpoint)
    )
    return HeadSpec(labels, features, _scores(checkpoint, len(labels))) if labels else None


def _scores(checkpoint: Checkpoint, labels: int) -> Literal["softmax", "sigmoid", "none"]:
    """What transformers' image classification pipeline does with the logits."""
    kind = checkpoint.config.get("problem_type")
    if kind == "regression":
        return "none"
    return "sigmoid" if kind == "multi_label_classification" or labels == 1 else "softmax"


def _labels(fields: Fields) -> tuple[str, ...]:
    """Labels in the order of their numbers, from ``{"0": ..., "1": ...}`` without gaps."""
    names = fields.get("id2label")
    if not isinstance(names, dict) or not all(isinstance(label, str) for label in names.values()):
        fields.refuse("id2label", "an object of strings")
    for index in range(len(names)):
        if str(index) not in names:
            fields.refuse("id2label", f"the keys 0 to {len(names) - 1}; there is no {index}")
    return tuple(names[str(index)] for index in range(len(names)))


def _numbered(fields: Fields, checkpoint: Checkpoint) -> tuple[str, ...]:
    """LABEL_0, LABEL_1, ... for the classifier's rows; two where nothing says, as transformers."""
    counts: dict[str, int] = {
        name: checkpoint.tensors[name].shape[0]
        for name in ("classifier.weight", "classifier.bias")
        if name in checkpoint.tensors and checkpoint.tensors[name].shape
    }
    if fields.get("num_labels") is not None:
        counts["num_labels"] = fields.count("num_labels", 0, MAX_TABLE)
    if len(set(counts.values())) > 1 or max(counts.values(), default=0) > MAX_TABLE:
        raise CheckpointError(
            f"config.json: got {counts}, wanted one number of labels, at most {MAX_TABLE}"
        )
    return tuple(f"LABEL_{index}" for index in range(next(iter(counts.values()), 2)))
