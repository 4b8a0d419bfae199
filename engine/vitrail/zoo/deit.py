"""DeiT, a ViT with a distillation token: config keys, spec, tensor names, image processor."""

from dataclasses import replace

from vitrail.zoo import vit
from vitrail.zoo.common import HEAD, Architecture, Family
from vitrail.zoo.preprocessor import BASE, Processor
from vitrail.zoo.rules import copy

_RULES = (*vit.RULES, copy("vision.distillation", "embeddings.distillation_token"))
_TEACHER_HEADS = (
    copy("head.class.*", "cls_classifier.*"),
    copy("head.distillation.*", "distillation_classifier.*"),
)


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
    vision=lambda config: replace(vit.read_vision(config, "deit."), distillation=True),
    rules=lambda _: ((("", "deit."), _RULES), (("",), (*HEAD, *_TEACHER_HEADS))),
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
