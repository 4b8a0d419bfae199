"""ViT (transformers' ViTModel): config keys, spec, tensor names, image processor."""

import dataclasses

from vitrail.spec import VisionSpec
from vitrail.zoo import common
from vitrail.zoo.common import Architecture, Config, Family
from vitrail.zoo.preprocessor import BASE, Processor
from vitrail.zoo.rules import copy, ignore
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
    ignore("embeddings.mask_token"),
    *common.block_rules(
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


def read_vision(config: Config, prefix: str) -> VisionSpec:
    """``prefix``: that of the tensor names of the base model inside a classifier."""
    fields = config.fields(SCHEMA)
    blocks = common.read_blocks(fields, qkv_bias=fields.flag("qkv_bias"))
    vision = common.read_vision(fields, blocks)
    return dataclasses.replace(vision, pooler=common.read_pooler(config, fields, prefix))


FAMILY = Family(
    name="vit",
    schemas={"vit": SCHEMA},
    architectures={
        "ViTModel": Architecture(("last_hidden_state",), pooler=True),
        "ViTForImageClassification": Architecture(
            ("logits",), features="class", mark="classifier."
        ),
    },
    vision=lambda config: read_vision(config, "vit."),
    rules=lambda _: ((("", "vit."), RULES), (("",), common.HEAD)),
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
