"""DeiT, a ViT with a distillation token: config keys, spec, tensor names, image processor."""

from __future__ import annotations

import dataclasses

from vitrail.spec import ModelSpec
from vitrail.zoo import vit
from vitrail.zoo.common import HEAD, Architecture, Config, Family, Towers
from vitrail.zoo.preprocessor import BASE, Processor
from vitrail.zoo.rules import Groups, copy

_RULES = (*vit.RULES, copy("vision.distillation", "embeddings.distillation_token"))
_TEACHER_HEADS = (
    copy("head.class.*", "cls_classifier.*"),
    copy("head.distillation.*", "distillation_classifier.*"),
)


def _towers(config: Config) -> Towers:
    return dataclasses.replace(vit.read_vision(config, "deit."), distillation=True), None


def _rules(spec: ModelSpec) -> Groups:
    return ((("", "deit."), _RULES), (("",), (*HEAD, *_TEACHER_HEADS)))


FAMILY = Family(
    name="deit",
    schemas={"deit": vit.SCHEMA},  # DeiTConfig has the keys and the defaults of ViTConfig
    architectures={
        "DeiTModel": Architecture(("last_hidden_state",), pooler=True),
        "DeiTForImageClassification": Architecture(
            ("logits",), features="class", mark="classifier."
        ),
        "DeiTForImageClassificationWithTeacher": Architecture(
            ("logits",), features="class_distillation", mark="cls_classifier."
        ),
    },
    towers=_towers,
    rules=_rules,
    # DeiTImageProcessorPil
    processor=Processor(
        "DeiT",
        {
            **BASE,
            "do_convert_rgb": None,
            "size": {"height": 256, "width": 256},
            "default_to_square": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    ),
)
