"""CLIP, whole or a single tower: config keys, spec, tensor names, image processor."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from vitrail.checkpoint.files import Checkpoint
from vitrail.errors import CheckpointError, show
from vitrail.spec import MAX_TABLE, MAX_WIDTH, ModelSpec, TextSpec, VisionSpec
from vitrail.zoo import common
from vitrail.zoo.common import Architecture, Config, Family, any_starts, block_rules
from vitrail.zoo.fields import Fields, is_integer
from vitrail.zoo.preprocessor import BASE, Processor
from vitrail.zoo.rules import Groups, copy, ignore
from vitrail.zoo.schema import Schema

_INERT = frozenset({"attention_dropout", "dropout", "initializer_factor"})

# CLIPConfig
_SCHEMA = Schema(
    {
        "text_config": None,
        "text_config_dict": None,
        "vision_config": None,
        "vision_config_dict": None,
        "projection_dim": 512,
    },
    frozenset({"initializer_factor", "logit_scale_init_value"}),
)
# CLIPTextConfig and CLIPVisionConfig
_TOWER_SCHEMAS = {
    "text": Schema(
        {
            "vocab_size": 49408,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "projection_dim": 512,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "max_position_embeddings": 77,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "eos_token_id": 49407,
        },
        _INERT,
    ),
    "vision": Schema(
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "projection_dim": 512,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_channels": 3,
            "image_size": 224,
            "patch_size": 32,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
        _INERT,
    ),
}

_STACK = ("encoder.layers.{i}.",)
_BLOCK = {
    "norm1.*": "layer_norm1.*",
    "q.*": "self_attn.q_proj.*",
    "k.*": "self_attn.k_proj.*",
    "v.*": "self_attn.v_proj.*",
    "out.*": "self_attn.out_proj.*",
    "norm2.*": "layer_norm2.*",
    "up.*": "mlp.fc1.*",
    "down.*": "mlp.fc2.*",
}
_VISION_RULES = (
    copy("vision.class", "embeddings.class_embedding"),
    copy("vision.position", "embeddings.position_embedding.weight"),
    copy("vision.patch.weight", "embeddings.patch_embedding.weight"),
    ignore("embeddings.position_ids"),
    copy("vision.pre_norm.*", "pre_layrnorm.*"),  # the misspelling is the published name
    *block_rules("vision", _STACK, _BLOCK),
    copy("vision.norm.*", "post_layernorm.*"),
)
_TEXT_RULES = (
    copy("text.token", "embeddings.token_embedding.weight"),
    copy("text.position", "embeddings.position_embedding.weight"),
    ignore("embeddings.position_ids"),
    *block_rules("text", _STACK, _BLOCK),
    copy("text.norm.*", "final_layer_norm.*"),
)
_TOP_RULES = (
    copy("vision.projection.weight", "visual_projection.weight"),
    copy("text.projection.weight", "text_projection.weight"),
    copy("logit_scale", "logit_scale"),
)


def _rules(spec: ModelSpec) -> Groups:
    """transformers 5 stores a lone tower without the tower's prefix."""
    vision = ("vision_model.",) if spec.text is not None else ("vision_model.", "")
    text = ("text_model.",) if spec.vision is not None else ("text_model.", "")
    return ((vision, _VISION_RULES), (text, _TEXT_RULES), (("",), _TOP_RULES))


_VISION_MARKS = (
    "vision_model.",
    "pre_layrnorm.",
    "embeddings.class_embedding",
    "embeddings.patch_",
)
_TEXT_MARKS = ("text_model.", "final_layer_norm.", "embeddings.token_embedding.")


def _choose(family: Family, checkpoint: Checkpoint, model_type: str, named: str | None) -> str:
    """The class that config.json names; for CLIPModel or no name, the class that fits the tensors.

    Some checkpoints hold a single tower beside the config of a whole CLIPModel. Such a tower embeds
    into the shared space, so it must have a projection. If no class is named, it may lack it.
    """
    if named not in (None, "CLIPModel"):
        return str(named)
    names = checkpoint.tensors
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


def _fields(config: Config, tower: Literal["text", "vision"]) -> Fields:
    """The config of a tower: config.json itself, or its ``<tower>_config``.

    A whole CLIPModel takes ``<tower>_config_dict`` first: its values, and the defaults of the keys
    that it leaves out, replace those of ``<tower>_config`` (CLIPConfig.__post_init__). The class of
    a lone tower reads ``<tower>_config`` alone (PreTrainedConfig.from_pretrained).
    """
    schema, top = _TOWER_SCHEMAS[tower], config.checkpoint.config
    if config.model_type != "clip":
        return config.fields(schema)
    nested = _nested(top, f"{tower}_config", tower)
    legacy = _nested(top, f"{tower}_config_dict", tower)
    merged = dict(nested or {})
    if legacy is not None and (config.named == "CLIPModel" or nested is None):
        merged |= {**schema.defaults, **legacy}
    elif "projection_dim" not in merged and "projection_dim" in top:
        merged["projection_dim"] = top["projection_dim"]
    return Fields(f"config.json ({tower}_config)", merged, schema.defaults)


def _nested(top: Mapping[str, Any], key: str, tower: str) -> Mapping[str, Any] | None:
    values = top.get(key)
    if values is None:
        return None
    if not isinstance(values, dict):
        raise CheckpointError(f"config.json: {key}: got {show(values)}, wanted an object")
    _TOWER_SCHEMAS[tower].check(values, f"config.json ({key})")
    model_type = f"clip_{tower}_model"
    stored = values.get("model_type", model_type)
    if stored != model_type:
        raise CheckpointError(
            f"config.json ({key}): model_type: got {show(stored)}, wanted {model_type!r}"
        )
    return values


def _projection(config: Config, fields: Fields) -> int | None:
    """Width of the shared space, from CLIPModel's own key or from the config of a lone tower."""
    if not config.architecture.projection:
        return None
    if config.named == "CLIPModel":
        fields = config.fields(_SCHEMA)
    return fields.count("projection_dim", 1, MAX_WIDTH)


def _vision(config: Config) -> VisionSpec:
    fields = _fields(config, "vision")
    blocks = common.read_blocks(fields)
    for key in ("image_size", "patch_size"):
        if not is_integer(fields.get(key)):
            fields.refuse(key, "an integer: CLIP's images and patches are squares")
    return dataclasses.replace(
        common.read_vision(fields, blocks),
        patch_bias=False,
        pre_norm=True,
        norm="pooled",
        projection=_projection(config, fields),
    )


def _text(config: Config) -> TextSpec:
    fields = _fields(config, "text")
    vocab = fields.count("vocab_size", 1, MAX_TABLE)
    return TextSpec(
        blocks=common.read_blocks(fields, causal=True),
        vocab=vocab,
        context=fields.count("max_position_embeddings", 1, MAX_TABLE),
        eos=_eos(fields, vocab),
        projection=_projection(config, fields),
    )


def _eos(fields: Fields, vocab: int) -> int | None:
    """The id that is pooled; None for the legacy id 2: CLIPTextModel then pools the highest id."""
    value = fields.get("eos_token_id")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not is_integer(value) or not 0 <= value < vocab:
        fields.refuse("eos_token_id", f"one integer from 0 to {vocab - 1}")
    return None if value == 2 else int(value)


_VISION_MODEL = Architecture(
    ("last_hidden_state", "pooler_output"), model_types=("clip", "clip_vision_model")
)
_TEXT_MODEL = Architecture(
    ("last_hidden_state", "pooler_output"),
    vision=False,
    text=True,
    model_types=("clip", "clip_text_model"),
)

FAMILY = Family(
    name="clip",
    schemas={
        "clip": _SCHEMA,
        "clip_text_model": _TOWER_SCHEMAS["text"],
        "clip_vision_model": _TOWER_SCHEMAS["vision"],
    },
    architectures={
        "CLIPModel": Architecture(
            ("last_hidden_state", "image_embeds", "text_embeds"),
            text=True,
            projection=True,
            model_types=("clip",),
        ),
        "CLIPVisionModel": _VISION_MODEL,
        "CLIPVisionModelWithProjection": dataclasses.replace(
            _VISION_MODEL, outputs=("last_hidden_state", "image_embeds"), projection=True
        ),
        "CLIPTextModel": _TEXT_MODEL,
        "CLIPTextModelWithProjection": dataclasses.replace(
            _TEXT_MODEL, outputs=("last_hidden_state", "text_embeds"), projection=True
        ),
    },
    vision=_vision,
    text=_text,
    rules=_rules,
    processor=Processor("CLIP", BASE),  # CLIPImageProcessorPil
    choose=_choose,
)
