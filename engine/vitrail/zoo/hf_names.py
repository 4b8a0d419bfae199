"""Hugging Face tensor names, in the dialects of transformers 4 and 5, and what each one is.

Names are those of the modules in transformers' ``modeling_*.py``. transformers 5 renamed modules of
ViT and DINOv2, maps the old names on loading and writes the old ones back on saving; checkpoints
in both dialects exist.
"""

from __future__ import annotations

from collections.abc import Callable

from vitrail.checkpoint.files import Checkpoint
from vitrail.spec import ModelSpec
from vitrail.zoo.rules import Rule, Source, copy, expand, ignore, map_names, split

_MASK = "replaces masked patches in pre-training"
_BUFFER = "a buffer of 0..n-1, recomputed"

VIT = (
    copy("vision.class", "embeddings.cls_token"),
    copy("vision.position", "embeddings.position_embeddings"),
    copy("vision.patch.*", "embeddings.patch_embeddings.projection.*"),
    ignore(_MASK, "embeddings.mask_token"),
    copy(
        "vision.blocks.{i}.norm1.*",
        "encoder.layer.{i}.layernorm_before.*",
        "layers.{i}.layernorm_before.*",
    ),
    copy(
        "vision.blocks.{i}.q.*",
        "encoder.layer.{i}.attention.attention.query.*",
        "layers.{i}.attention.q_proj.*",
    ),
    copy(
        "vision.blocks.{i}.k.*",
        "encoder.layer.{i}.attention.attention.key.*",
        "layers.{i}.attention.k_proj.*",
    ),
    copy(
        "vision.blocks.{i}.v.*",
        "encoder.layer.{i}.attention.attention.value.*",
        "layers.{i}.attention.v_proj.*",
    ),
    copy(
        "vision.blocks.{i}.out.*",
        "encoder.layer.{i}.attention.output.dense.*",
        "layers.{i}.attention.o_proj.*",
    ),
    copy(
        "vision.blocks.{i}.norm2.*",
        "encoder.layer.{i}.layernorm_after.*",
        "layers.{i}.layernorm_after.*",
    ),
    copy(
        "vision.blocks.{i}.up.*", "encoder.layer.{i}.intermediate.dense.*", "layers.{i}.mlp.fc1.*"
    ),
    copy("vision.blocks.{i}.down.*", "encoder.layer.{i}.output.dense.*", "layers.{i}.mlp.fc2.*"),
    copy("vision.norm.*", "layernorm.*"),
    copy("vision.pooler.*", "pooler.dense.*"),
)

DINOV2 = (
    copy("vision.class", "embeddings.cls_token"),
    copy("vision.position", "embeddings.position_embeddings"),
    copy("vision.registers", "embeddings.register_tokens"),
    copy("vision.patch.*", "embeddings.patch_embeddings.projection.*"),
    ignore(_MASK, "embeddings.mask_token"),
    copy("vision.blocks.{i}.norm1.*", "encoder.layer.{i}.norm1.*"),
    copy(
        "vision.blocks.{i}.q.*",
        "encoder.layer.{i}.attention.attention.query.*",
        "encoder.layer.{i}.attention.q_proj.*",
    ),
    copy(
        "vision.blocks.{i}.k.*",
        "encoder.layer.{i}.attention.attention.key.*",
        "encoder.layer.{i}.attention.k_proj.*",
    ),
    copy(
        "vision.blocks.{i}.v.*",
        "encoder.layer.{i}.attention.attention.value.*",
        "encoder.layer.{i}.attention.v_proj.*",
    ),
    copy(
        "vision.blocks.{i}.out.*",
        "encoder.layer.{i}.attention.output.dense.*",
        "encoder.layer.{i}.attention.o_proj.*",
    ),
    copy("vision.blocks.{i}.scale1", "encoder.layer.{i}.layer_scale1.lambda1"),
    copy("vision.blocks.{i}.norm2.*", "encoder.layer.{i}.norm2.*"),
    copy("vision.blocks.{i}.scale2", "encoder.layer.{i}.layer_scale2.lambda1"),
    copy("vision.norm.*", "layernorm.*"),
)

DINOV2_MLP = (
    copy("vision.blocks.{i}.up.*", "encoder.layer.{i}.mlp.fc1.*"),
    copy("vision.blocks.{i}.down.*", "encoder.layer.{i}.mlp.fc2.*"),
)

DINOV2_SWIGLU = (
    split(
        ("vision.blocks.{i}.gate.*", "vision.blocks.{i}.up.*"),
        "encoder.layer.{i}.mlp.weights_in.*",
        "",
    ),
    copy("vision.blocks.{i}.gate.*", "", "encoder.layer.{i}.mlp.gate_proj.*"),
    copy("vision.blocks.{i}.up.*", "", "encoder.layer.{i}.mlp.up_proj.*"),
    copy(
        "vision.blocks.{i}.down.*",
        "encoder.layer.{i}.mlp.weights_out.*",
        "encoder.layer.{i}.mlp.down_proj.*",
    ),
)


def _clip_blocks(tower: str) -> tuple[Rule, ...]:
    names = {
        "norm1": "layer_norm1",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "out": "self_attn.out_proj",
        "norm2": "layer_norm2",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    }
    return tuple(
        copy(f"{tower}.blocks.{{i}}.{ours}.*", f"encoder.layers.{{i}}.{theirs}.*")
        for ours, theirs in names.items()
    )


CLIP_VISION = (
    copy("vision.class", "embeddings.class_embedding"),
    copy("vision.position", "embeddings.position_embedding.weight"),
    copy("vision.patch.weight", "embeddings.patch_embedding.weight"),
    ignore(_BUFFER, "embeddings.position_ids"),
    # The misspelling is the published name.
    copy("vision.pre_norm.*", "pre_layrnorm.*"),
    *_clip_blocks("vision"),
    copy("vision.norm.*", "post_layernorm.*"),
)

CLIP_TEXT = (
    copy("text.token", "embeddings.token_embedding.weight"),
    copy("text.position", "embeddings.position_embedding.weight"),
    ignore(_BUFFER, "embeddings.position_ids"),
    *_clip_blocks("text"),
    copy("text.norm.*", "final_layer_norm.*"),
)

CLIP_TOP = (
    copy("vision.projection.weight", "visual_projection.weight"),
    copy("text.projection.weight", "text_projection.weight"),
    copy("logit_scale", "logit_scale"),
)

HEAD = (copy("head.*", "classifier.*"),)

Groups = tuple[tuple[tuple[str, ...], tuple[Rule, ...]], ...]


def rules_for(spec: ModelSpec) -> Groups:
    """(prefixes, rules) of a family. transformers 5 stores a lone CLIP tower without a prefix."""
    if spec.family == "clip":
        vision = ("vision_model.",) if spec.text is not None else ("vision_model.", "")
        text = ("text_model.",) if spec.vision is not None else ("text_model.", "")
        return ((vision, CLIP_VISION), (text, CLIP_TEXT), (("",), CLIP_TOP))
    prefixes = ("", f"{spec.family}.")
    if spec.family == "vit":
        return ((prefixes, VIT), (("",), HEAD))
    assert spec.vision is not None, "a DINOv2 model is an image tower"
    mlp = DINOV2_SWIGLU if spec.vision.blocks.gated else DINOV2_MLP
    return ((prefixes, (*DINOV2, *mlp)), (("",), HEAD))


# Canonical names that an architecture may find in its folder and has no use for, and when.
UNUSED: tuple[tuple[str, Callable[[ModelSpec], bool], str], ...] = (
    (
        "vision.",
        lambda spec: spec.vision is None,
        "the image tower of a CLIP beside its text tower",
    ),
    ("text.", lambda spec: spec.text is None, "the text tower of a CLIP beside its image tower"),
    (
        "vision.projection.",
        lambda spec: spec.vision is None or spec.vision.projection is None,
        "CLIPVisionModel stops at the pooled output",
    ),
    (
        "text.projection.",
        lambda spec: spec.text is None or spec.text.projection is None,
        "CLIPTextModel stops at the pooled output",
    ),
    ("logit_scale", lambda spec: not spec.contrastive, "one tower compares nothing"),
    (
        "vision.pooler.",
        lambda spec: spec.vision is None or spec.vision.pooler is None,
        "ViTForImageClassification has no pooler",
    ),
    (
        "head.",
        lambda spec: not spec.architecture.endswith("ForImageClassification"),
        "the classifier over a model loaded for its features",
    ),
)


def map_tensors(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, Source]:
    """Canonical name -> where it is stored, for every tensor of the spec.

    Raises one CheckpointError listing every missing, unexpected, duplicated, misshaped or wrongly
    typed tensor.
    """
    idle = tuple(prefix for prefix, when, _ in UNUSED if when(spec))
    return map_names(
        checkpoint.tensors,
        spec.tensor_shapes(),
        expand(rules_for(spec)),
        lambda name: name.startswith(idle),
        spec.architecture,
    )
