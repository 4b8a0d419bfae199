"""DINOv2, without and with registers: config keys, spec, tensor names, image processor."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from vitrail.spec import ModelSpec, VisionSpec
from vitrail.zoo import common
from vitrail.zoo.common import Architecture, Config, Family, block_rules
from vitrail.zoo.fields import Fields, words
from vitrail.zoo.preprocessor import BASE, Processor
from vitrail.zoo.rules import Groups, NameRule, copy, ignore
from vitrail.zoo.schema import DROPOUT, Schema

_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "num_channels": 3,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}
_INERT = DROPOUT | words(
    """
    _out_features _out_indices apply_layernorm drop_path_rate layerscale_value out_features
    out_indices reshape_hidden_states stage_names use_mask_token
    """
)

_STACK = ("encoder.layer.{i}.",)
_RULES = (
    copy("vision.class", "embeddings.cls_token"),
    copy("vision.position", "embeddings.position_embeddings"),
    copy("vision.registers", "embeddings.register_tokens"),
    copy("vision.patch.*", "embeddings.patch_embeddings.projection.*"),
    ignore("embeddings.mask_token"),
    *block_rules(
        "vision",
        _STACK,
        {
            "norm1.*": "norm1.*",
            "q.*": ("attention.attention.query.*", "attention.q_proj.*"),
            "k.*": ("attention.attention.key.*", "attention.k_proj.*"),
            "v.*": ("attention.attention.value.*", "attention.v_proj.*"),
            "out.*": ("attention.output.dense.*", "attention.o_proj.*"),
            "scale1": "layer_scale1.lambda1",
            "norm2.*": "norm2.*",
            "scale2": "layer_scale2.lambda1",
        },
    ),
    copy("vision.norm.*", "layernorm.*"),
)
_MLP = block_rules("vision", _STACK, {"up.*": "mlp.fc1.*", "down.*": "mlp.fc2.*"})
# transformers 5 splits `weights_in` into two tensors
_SWIGLU = (
    NameRule(
        ("encoder.layer.{i}.mlp.weights_in.*", ""),
        ("vision.blocks.{i}.gate.*", "vision.blocks.{i}.up.*"),
    ),
    copy("vision.blocks.{i}.gate.*", "", "encoder.layer.{i}.mlp.gate_proj.*"),
    copy("vision.blocks.{i}.up.*", "", "encoder.layer.{i}.mlp.up_proj.*"),
    *block_rules("vision", _STACK, {"down.*": ("mlp.weights_out.*", "mlp.down_proj.*")}),
)


def _mlp_width(fields: Fields, gated: bool) -> int:
    """The width of Dinov2MLP, or of Dinov2SwiGLUFFN: two thirds, rounded up to a multiple of 8."""
    width, ratio = common.read_width(fields), fields.get("mlp_ratio")
    fields.number("mlp_ratio", 0, 16)
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def _vision(schema: Schema, antialias: bool, config: Config) -> VisionSpec:
    fields = config.fields(schema)
    gated = fields.flag("use_swiglu_ffn")
    blocks = common.read_blocks(
        fields,
        mlp=_mlp_width(fields, gated),
        gated=gated,
        qkv_bias=fields.flag("qkv_bias"),
        layer_scale=True,
    )
    vision = common.read_vision(fields, blocks)
    if vision.grid[0] != vision.grid[1]:
        square = f"as many patches down as across: DINOv2 reads {vision.grid} as a square"
        fields.refuse("image_size", square)
    return dataclasses.replace(vision, position_antialias=antialias)


def _vision_with_registers(config: Config) -> VisionSpec:
    registers = config.fields(_WITH_REGISTERS).count("num_register_tokens", 1, 1024)
    return dataclasses.replace(_vision(_WITH_REGISTERS, True, config), registers=registers)


def _rules(spec: ModelSpec) -> Groups:
    assert spec.vision is not None, "a DINOv2 model is an image tower"
    mlp = _SWIGLU if spec.vision.blocks.gated else _MLP
    return ((("", f"{spec.family}."), (*_RULES, *mlp)), (("",), common.HEAD))


def _schema(antialias: bool, **keys: int) -> Schema:
    fixed = {"interpolate_antialias": (antialias,), "interpolate_offset": (0,)}
    return Schema(_DEFAULTS | keys, _INERT, fixed)


_PLAIN = _schema(False, patch_size=14)  # Dinov2Config
_WITH_REGISTERS = _schema(True, patch_size=16, num_register_tokens=4)  # Dinov2WithRegistersConfig


def _family(
    model_type: str,
    schema: Schema,
    vision: Callable[[Config], VisionSpec],
    base_model: str,
    classifier: str,
) -> Family:
    return Family(
        name=model_type,
        schemas={model_type: schema},
        architectures={
            base_model: Architecture(("last_hidden_state", "pooler_output")),
            classifier: Architecture(("logits",), features="class_mean", mark="classifier."),
        },
        vision=vision,
        rules=_rules,
        processor=Processor("Bit", BASE),  # BitImageProcessorPil
        mlp_key="mlp_ratio",
    )


FAMILY = _family(
    "dinov2",
    _PLAIN,
    partial(_vision, _PLAIN, False),
    "Dinov2Model",
    "Dinov2ForImageClassification",
)
WITH_REGISTERS = _family(
    "dinov2_with_registers",
    _WITH_REGISTERS,
    _vision_with_registers,
    "Dinov2WithRegistersModel",
    "Dinov2WithRegistersForImageClassification",
)
