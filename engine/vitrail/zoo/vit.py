"""ViT (transformers' ViTModel): config keys, spec, tensor names, image processor."""

from __future__ import annotations

from vitrail.spec import ModelSpec, VisionSpec
from vitrail.zoo.common import (
    HEAD,
    MASK_TOKEN,
    Architecture,
    Config,
    Family,
    Towers,
    block_rules,
    read_blocks,
    read_channels,
    read_pooler,
    read_sides,
)
from vitrail.zoo.preprocessor import BASE, Processor
from vitrail.zoo.rules import Groups, copy, ignore
from vitrail.zoo.schema import DROPOUT, Schema

# ViTConfig
SCHEMA = Schema(
    {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "qkv_bias": True,
        "pooler_output_size": None,
        "pooler_act": "tanh",
    },
    DROPOUT | {"encoder_stride"},
)

# transformers 4, then 5, which renamed the modules
RULES = (
    copy("vision.class", "embeddings.cls_token"),
    copy("vision.position", "embeddings.position_embeddings"),
    copy("vision.patch.*", "embeddings.patch_embeddings.projection.*"),
    ignore(MASK_TOKEN, "embeddings.mask_token"),
    *block_rules(
        "vision",
        ("encoder.layer.{i}.", "layers.{i}."),
        {
            "norm1.*": "layernorm_before.*",
            "q.*": ("attention.attention.query.*", "attention.q_proj.*"),
            "k.*": ("attention.attention.key.*", "attention.k_proj.*"),
            "v.*": ("attention.attention.value.*", "attention.v_proj.*"),
            "out.*": ("attention.output.dense.*", "attention.o_proj.*"),
            "norm2.*": "layernorm_after.*",
            "up.*": ("intermediate.dense.*", "mlp.fc1.*"),
            "down.*": ("output.dense.*", "mlp.fc2.*"),
        },
    ),
    copy("vision.norm.*", "layernorm.*"),
    copy("vision.pooler.*", "pooler.dense.*"),
)


def _towers(config: Config) -> Towers:
    fields = config.fields(SCHEMA)
    blocks = read_blocks(fields, qkv_bias=fields.flag("qkv_bias"))
    image, patch = read_sides(fields)
    vision = VisionSpec(
        blocks=blocks,
        image=image,
        patch=patch,
        channels=read_channels(fields),
        pooler=read_pooler(config, fields, "pooler.dense.", "vit.pooler.dense."),
    )
    return vision, None


def _rules(spec: ModelSpec) -> Groups:
    return ((("", "vit."), RULES), (("",), HEAD))


FAMILY = Family(
    name="vit",
    schemas={"vit": SCHEMA},
    architectures={
        "ViTModel": Architecture(("last_hidden_state",), pooler=True),
        "ViTForImageClassification": Architecture(
            ("logits",), features="class", mark="classifier."
        ),
    },
    towers=_towers,
    rules=_rules,
    # ViTImageProcessorPil
    processor=Processor(
        "ViT",
        {
            **BASE,
            "do_convert_rgb": False,
            "size": {"height": 224, "width": 224},
            "default_to_square": True,
            "resample": 2,
            "do_center_crop": False,
            "crop_size": None,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    ),
)
