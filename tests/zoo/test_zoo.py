"""Checkpoints of Hugging Face: config.json -> spec, stored names -> canonical names."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import json
import math
import re
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from safetensors import safe_open
from transformers.activations import ACT2FN

import checkpoints
from vitrail import zoo
from vitrail.checkpoint.files import Checkpoint, open_checkpoint
from vitrail.checkpoint.tensors import Source
from vitrail.errors import CheckpointError
from vitrail.spec import BlockSpec, ModelSpec
from vitrail.zoo import vit
from vitrail.zoo.common import ACTIVATIONS
from vitrail.zoo.hf import FAMILIES, SCHEMAS
from vitrail.zoo.rules import LISTED, expand

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# ---- published checkpoints

# architecture; image tower: width, layers, heads, mlp, activation, eps, image, patch, projection;
# text tower: width, layers, heads, mlp, activation, eps, eos, projection; labels
CLIP_B_TEXT = (512, 12, 8, 2048, "quick_gelu", 1e-5, None, 512)
CLIP_L_TEXT = (768, 12, 12, 3072, "quick_gelu", 1e-5, 49407, 768)
GOLDEN: dict[str, tuple[str, tuple[Any, ...] | None, tuple[Any, ...] | None, int]] = {
    "vit-base-patch16-224": (
        "ViTForImageClassification",
        (768, 12, 12, 3072, "gelu", 1e-12, 224, 16, None),
        None,
        1000,
    ),
    "vit-large-patch16-384": (
        "ViTForImageClassification",
        (1024, 24, 16, 4096, "gelu", 1e-12, 384, 16, None),
        None,
        1000,
    ),
    "vit-base-patch16-224-in21k": (
        "ViTModel",
        (768, 12, 12, 3072, "gelu", 1e-12, 224, 16, None),
        None,
        0,
    ),
    "vit-small-patch16-224": (
        "ViTForImageClassification",
        (384, 12, 6, 1536, "gelu", 1e-12, 224, 16, None),
        None,
        1000,
    ),
    "dino-vits16": ("ViTModel", (384, 12, 6, 1536, "gelu", 1e-12, 224, 16, None), None, 0),
    "clip-vit-base-patch32": (
        "CLIPModel",
        (768, 12, 12, 3072, "quick_gelu", 1e-5, 224, 32, 512),
        CLIP_B_TEXT,
        0,
    ),
    "clip-vit-base-patch16": (
        "CLIPModel",
        (768, 12, 12, 3072, "quick_gelu", 1e-5, 224, 16, 512),
        CLIP_B_TEXT,
        0,
    ),
    "clip-vit-large-patch14": (
        "CLIPModel",
        (1024, 24, 16, 4096, "quick_gelu", 1e-5, 224, 14, 768),
        CLIP_L_TEXT,
        0,
    ),
    "clip-vit-large-patch14-336": (
        "CLIPModel",
        (1024, 24, 16, 4096, "quick_gelu", 1e-5, 336, 14, 768),
        CLIP_L_TEXT,
        0,
    ),
    "clip-vit-b-32-laion2b": (
        "CLIPModel",
        (768, 12, 12, 3072, "gelu", 1e-5, 224, 32, 512),
        (512, 12, 8, 2048, "gelu", 1e-5, 49407, 512),
        0,
    ),
    "clip-vit-h-14-laion2b": (
        "CLIPModel",
        (1280, 32, 16, 5120, "gelu", 1e-5, 224, 14, 1024),
        (1024, 24, 16, 4096, "gelu", 1e-5, 49407, 1024),
        0,
    ),
    "clip-vit-h-14-image-encoder": (
        "CLIPVisionModel",
        (1280, 32, 16, 5120, "gelu", 1e-5, 224, 14, None),
        None,
        0,
    ),
    "sd-image-variations-encoder": (
        "CLIPVisionModelWithProjection",
        (1024, 24, 16, 4096, "quick_gelu", 1e-5, 224, 14, 768),
        None,
        0,
    ),
    "sd-text-encoder": (
        "CLIPTextModel",
        None,
        (768, 12, 12, 3072, "quick_gelu", 1e-5, None, None),
        0,
    ),
    "deit-base-distilled-patch16-224": (
        "DeiTForImageClassificationWithTeacher",
        (768, 12, 12, 3072, "gelu", 1e-12, 224, 16, None),
        None,
        1000,
    ),
    "dinov2-small": ("Dinov2Model", (384, 12, 6, 1536, "gelu", 1e-6, 518, 14, None), None, 0),
    "dinov2-base": ("Dinov2Model", (768, 12, 12, 3072, "gelu", 1e-6, 518, 14, None), None, 0),
    "dinov2-large": ("Dinov2Model", (1024, 24, 16, 4096, "gelu", 1e-6, 518, 14, None), None, 0),
    "dinov2-giant": ("Dinov2Model", (1536, 40, 24, 4096, "silu", 1e-6, 518, 14, None), None, 0),
    "dinov2-small-imagenet1k-1-layer": (
        "Dinov2ForImageClassification",
        (384, 12, 6, 1536, "gelu", 1e-6, 518, 14, None),
        None,
        1000,
    ),
    "dinov2-with-registers-base": (
        "Dinov2WithRegistersModel",
        (768, 12, 12, 3072, "gelu", 1e-6, 518, 14, None),
        None,
        0,
    ),
}

FAMILY = {name: family for family in FAMILIES for name in family.architectures}
UNUSED = re.compile(r"(.*\.)?embeddings\.(position_ids|mask_token)")


def _blocks(blocks: BlockSpec) -> tuple[Any, ...]:
    return (
        blocks.width,
        blocks.layers,
        blocks.heads,
        blocks.mlp,
        blocks.activation,
        blocks.eps,
    )


def test_the_published_checkpoints_are_those_with_a_golden_spec() -> None:
    assert sorted(GOLDEN) == checkpoints.NAMES
    assert len(GOLDEN) >= 12


@pytest.mark.parametrize("name", GOLDEN)
def test_a_published_checkpoint_has_its_spec(name: str) -> None:
    architecture, vision, text, labels = GOLDEN[name]
    spec = zoo.read_spec(checkpoints.load(name))
    assert spec.architecture == architecture
    if spec.vision is None:
        assert vision is None
    else:
        (side, down), (patch, across) = spec.vision.image, spec.vision.patch
        assert (side, patch) == (down, across)
        assert vision == (*_blocks(spec.vision.blocks), side, patch, spec.vision.projection)
    if spec.text is None:
        assert text is None
    else:
        assert text == (*_blocks(spec.text.blocks), spec.text.eos, spec.text.projection)
        assert (spec.text.vocab, spec.text.context) == (49408, 77)
    assert len(spec.head.labels if spec.head else ()) == labels


@pytest.mark.parametrize("name", GOLDEN)
def test_a_published_checkpoint_has_the_traits_of_its_family(name: str) -> None:
    spec = zoo.read_spec(checkpoints.load(name))
    if spec.vision is None:
        assert spec.family == "clip"
        return
    vision = spec.vision
    clip, dinov2 = spec.family == "clip", spec.family.startswith("dinov2")
    registers = spec.family == "dinov2_with_registers"
    assert vision.channels == 3
    assert vision.blocks.qkv_bias
    assert vision.blocks.layer_scale == dinov2
    assert vision.blocks.gated == (name == "dinov2-giant")
    assert vision.pre_norm == clip
    assert vision.patch_bias == (not clip)
    assert vision.norm == ("pooled" if clip else "tokens")
    assert vision.registers == (4 if registers else 0)
    assert vision.distillation == (spec.family == "deit")
    assert vision.position_antialias == registers
    assert (vision.pooler is not None) == (name == "vit-base-patch16-224-in21k")
    if spec.head is not None:
        features = {"deit": "class_distillation", "vit": "class"}
        assert spec.head.features == spec.features == features.get(spec.family, "class_mean")
        assert spec.head.labels[:2] == ("class 0", "class 1")


@pytest.mark.parametrize("name", GOLDEN)
def test_every_tensor_of_a_published_checkpoint_is_used_or_known_to_be_unused(name: str) -> None:
    checkpoint = checkpoints.load(name)
    spec = zoo.read_spec(checkpoint)
    sources = zoo.map_tensors(checkpoint, spec)
    assert sources.keys() == spec.tensor_shapes().keys()
    for canonical, shape in spec.tensor_shapes().items():
        source = sources[canonical]
        stored = list(source.entry.shape)
        if source.rows is not None:
            stored[0] = source.rows[1] - source.rows[0]
        assert math.prod(stored) == math.prod(shape), canonical
    left = checkpoint.tensors.keys() - {source.entry.name for source in sources.values()}
    assert all(UNUSED.fullmatch(one) for one in left), left


# ---- one tensor wrong


def _changed(checkpoint: Checkpoint, tensor: str, /, **changes: Any) -> Checkpoint:
    """The checkpoint with one tensor's entry changed, or renamed with ``name=``."""
    tensors = dict(checkpoint.tensors)
    entry = dataclasses.replace(tensors.pop(tensor), **changes)
    return dataclasses.replace(checkpoint, tensors=tensors | {entry.name: entry})


def _without(checkpoint: Checkpoint, name: str) -> Checkpoint:
    tensors = {key: entry for key, entry in checkpoint.tensors.items() if key != name}
    return dataclasses.replace(checkpoint, tensors=tensors)


def _refusal(checkpoint: Checkpoint) -> str:
    with pytest.raises(CheckpointError) as caught:
        zoo.map_tensors(checkpoint, zoo.read_spec(checkpoint))
    return str(caught.value)


def _sample(checkpoint: Checkpoint) -> Iterator[str]:
    """Every tensor outside the blocks, and those of the first and the last block."""
    layers = [int(one) for name in checkpoint.tensors for one in re.findall(r"\.(\d+)\.", name)]
    ends = {"0", str(max(layers))}
    for name in checkpoint.tensors:
        if ends.issuperset(re.findall(r"\.(\d+)\.", name)):
            yield name


@pytest.mark.parametrize("name", GOLDEN)
def test_a_dropped_tensor_is_refused_and_named(name: str) -> None:
    checkpoint = checkpoints.load(name)
    for tensor in _sample(checkpoint):
        if not UNUSED.fullmatch(tensor):
            refusal = _refusal(_without(checkpoint, tensor))
            assert f"1 missing: {tensor}" in refusal or f"{tensor}: got" in refusal


@pytest.mark.parametrize("name", GOLDEN)
def test_a_renamed_tensor_is_refused_under_both_names(name: str) -> None:
    checkpoint = checkpoints.load(name)
    for tensor in _sample(checkpoint):
        refusal = _refusal(_changed(checkpoint, tensor, name=f"{tensor}_old"))
        assert f"1 unexpected: {tensor}_old" in refusal
        assert UNUSED.fullmatch(tensor) or f"1 missing: {tensor}" in refusal


@pytest.mark.parametrize("name", GOLDEN)
def test_a_reshaped_tensor_is_refused_and_named(name: str) -> None:
    checkpoint = checkpoints.load(name)
    for tensor in _sample(checkpoint):
        shape = checkpoint.tensors[tensor].shape
        wrong = (*shape[:-1], shape[-1] + 1) if shape else (2,)
        if not UNUSED.fullmatch(tensor):
            refusal = _refusal(_changed(checkpoint, tensor, shape=wrong))
            assert f"1 misshaped: {tensor}: got {wrong}" in refusal


def test_a_transposed_matrix_is_refused() -> None:
    checkpoint = checkpoints.load("vit-base-patch16-224")
    name = "vit.encoder.layer.3.intermediate.dense.weight"
    refusal = _refusal(_changed(checkpoint, name, shape=(768, 3072)))
    assert f"1 misshaped: {name}: got (768, 3072), wanted (3072, 768)" in refusal


@pytest.mark.parametrize("dtype", ["I64", "F64", "I8", "BOOL", "F8_E4M3"])
def test_a_dtype_other_than_the_three_is_refused(dtype: str) -> None:
    checkpoint = checkpoints.load("dinov2-small")
    refusal = _refusal(_changed(checkpoint, "layernorm.weight", dtype=dtype))
    assert f"layernorm.weight: got {dtype}, wanted F32 or F16 or BF16" in refusal


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_each_of_the_three_dtypes_is_taken(dtype: str) -> None:
    checkpoint = checkpoints.load("dinov2-small")
    sources = zoo.map_tensors(
        _changed(checkpoint, "layernorm.weight", dtype=dtype), zoo.read_spec(checkpoint)
    )
    assert sources["vision.norm.weight"].entry.dtype == dtype


def test_weights_of_another_model_are_refused_whole_in_one_line() -> None:
    """All kinds at once, the first names of each and how many more."""
    small, base = checkpoints.load("dinov2-small"), checkpoints.load("dinov2-base")
    refusal = _refusal(dataclasses.replace(small, tensors=base.tensors))
    reason = "config.json says hidden_size 384, the tensors are 768 wide"
    listed = "tensors do not fit Dinov2Model: 222 misshaped: "
    assert refusal.startswith(f"folder: {reason}; {listed}")
    assert refusal.endswith(f"and {222 - LISTED} more")
    assert "\n" not in refusal
    vit = checkpoints.load("vit-base-patch16-224-in21k")
    refusal = _refusal(dataclasses.replace(small, tensors=vit.tensors))
    assert "unexpected: " in refusal
    assert "missing: " in refusal


def test_two_tensors_that_are_the_same_one_are_refused() -> None:
    checkpoint = checkpoints.load("vit-base-patch16-224")
    double = dataclasses.replace(checkpoint.tensors["vit.layernorm.bias"], name="layernorm.bias")
    tensors = {**checkpoint.tensors, "layernorm.bias": double}
    refusal = _refusal(dataclasses.replace(checkpoint, tensors=tensors))
    assert (
        "1 duplicated: vit.layernorm.bias and layernorm.bias (both are vision.norm.bias)" in refusal
    )


def test_a_tensor_in_both_dialects_is_refused() -> None:
    checkpoint = checkpoints.load("dinov2-giant")
    entry = checkpoint.tensors["encoder.layer.0.mlp.weights_in.bias"]
    half = dataclasses.replace(entry, name="encoder.layer.0.mlp.gate_proj.bias", shape=(4096,))
    tensors = {**checkpoint.tensors, half.name: half}
    refusal = _refusal(dataclasses.replace(checkpoint, tensors=tensors))
    assert f"{entry.name} and {half.name} (both are vision.blocks.0.gate.bias)" in refusal


@pytest.mark.parametrize(
    "extra",
    [
        "encoder.layer.12.norm1.weight",
        "encoder.layer.00.norm1.weight",
        "encoder.layer.0.attention.attention.query.weight.1",
        "embeddings.register_tokens",
        "encoder.layer.0.mlp.weights_in.weight",
        "decoder.weight",
        "pooler.dense.weight",
    ],
)
def test_a_tensor_too_many_is_refused(extra: str) -> None:
    checkpoint = checkpoints.load("dinov2-base")
    entry = dataclasses.replace(checkpoint.tensors["layernorm.weight"], name=extra)
    tensors = {**checkpoint.tensors, extra: entry}
    refusal = _refusal(dataclasses.replace(checkpoint, tensors=tensors))
    assert f"1 unexpected: {extra}" in refusal


def test_a_missing_tensor_is_named_in_the_dialect_of_the_others() -> None:
    spec = zoo.read_spec(checkpoints.load("dinov2-giant"))
    patterns = expand(FAMILY[spec.architecture].rules(spec))
    new = {
        row.pattern.replace("{i}", "0"): ("F32", (1,))
        for row in patterns.values()
        if row.prefix == "dinov2." and row.dialect == 1
    }
    checkpoint = checkpoints.load("dinov2-giant")
    refusal = _refusal(dataclasses.replace(checkpoint, tensors=checkpoints.fake({}, new).tensors))
    missing = refusal.partition(" missing: ")[2]
    assert "dinov2.encoder.layer.1.attention.q_proj.weight" in missing
    assert "weights_in" not in missing


def test_no_two_rules_match_one_name() -> None:
    for name in GOLDEN:
        spec = zoo.read_spec(checkpoints.load(name))
        assert len(expand(FAMILY[spec.architecture].rules(spec))) >= 40
    with pytest.raises(AssertionError, match=r"two rules for layernorm\.weight"):
        expand(((("",), vit.RULES), (("",), vit.RULES[-2:])))


# ---- the real classes, tiny, in both dialects

TINY = {
    "hidden_size": st.sampled_from([8, 12, 24]),
    "num_hidden_layers": st.integers(1, 3),
    "num_attention_heads": st.sampled_from([1, 2, 4]),
    "hidden_act": st.sampled_from(sorted(ACTIVATIONS)),
    "layer_norm_eps": st.sampled_from([1e-12, 1e-6, 1e-5, 0.001]),
}
IMAGE = {"num_channels": st.integers(1, 4)}
PLAIN = {"intermediate_size": st.integers(1, 40)}
PROJECTED = {"projection_dim": st.integers(1, 20)}
DINOV2 = {
    "mlp_ratio": st.integers(1, 5),
    "qkv_bias": st.booleans(),
    "use_swiglu_ffn": st.booleans(),
}
TEXT = {"vocab_size": st.integers(5, 30), "max_position_embeddings": st.integers(1, 9)}
VIT_KEYS = {**TINY, **IMAGE, **PLAIN, "qkv_bias": st.booleans()}
SAMPLES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "vit": VIT_KEYS,
    "deit": VIT_KEYS,
    "dinov2": {**TINY, **IMAGE, **DINOV2, "use_mask_token": st.booleans()},
    "dinov2_with_registers": {
        **TINY,
        **IMAGE,
        **DINOV2,
        "num_register_tokens": st.integers(1, 5),
    },
    "clip_vision_model": {**TINY, **IMAGE, **PLAIN, **PROJECTED},
    "clip_text_model": {**TINY, **TEXT, **PLAIN, **PROJECTED},
}
"""Random arguments of a config class, by model type."""


@st.composite
def drawn(draw: st.DrawFn, model_type: str) -> dict[str, Any]:
    """`SAMPLES`, and the keys that depend on others."""
    values = {key: draw(strategy) for key, strategy in SAMPLES[model_type].items()}
    if model_type == "clip_text_model":
        values["eos_token_id"] = draw(st.integers(0, values["vocab_size"] - 1))
        return values
    patch = draw(st.integers(1, 5))
    values |= {"patch_size": patch, "image_size": patch * draw(st.integers(1, 4))}
    if hasattr(CONFIG_CLASSES[model_type](), "pooler_act"):
        across = draw(st.integers(1, 4))
        values["image_size"] = draw(
            st.sampled_from([values["image_size"], [values["image_size"], patch * across]])
        )
        values["patch_size"] = draw(st.sampled_from([patch, [patch, patch]]))
        values["pooler_output_size"] = draw(st.sampled_from([None, 5]))
        values["pooler_act"] = draw(st.sampled_from(["tanh", "relu"]))
    return values


def _perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter different from every other, so that a swap shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model


@st.composite
def models(draw: st.DrawFn, architecture: str) -> Any:
    """A tiny random model of one transformers class, with a random config."""
    cls = getattr(transformers, architecture)
    labels = {"num_labels": draw(st.integers(1, 5))} if "Classification" in architecture else {}
    if architecture == "CLIPModel":
        config = transformers.CLIPConfig(
            text_config=draw(drawn("clip_text_model")),
            vision_config=draw(drawn("clip_vision_model")),
            projection_dim=draw(st.integers(1, 20)),
        )
    else:
        config = cls.config_class(**draw(drawn(cls.config_class.model_type)), **labels)
    if "add_pooling_layer" in inspect.signature(cls).parameters:
        return _perturbed(cls(config, add_pooling_layer=draw(st.booleans())))
    return _perturbed(cls(config))


def _agrees(spec: ModelSpec, model: Any) -> None:
    """The spec's numbers against attributes of the modules that transformers made."""
    config = model.config
    towers = [(spec.vision, getattr(config, "vision_config", config))]
    towers.append((spec.text, getattr(config, "text_config", config)))
    for tower, settings_ in towers:
        if tower is not None:
            assert tower.blocks.width == settings_.hidden_size
            assert tower.blocks.layers == settings_.num_hidden_layers
            assert tower.blocks.heads == settings_.num_attention_heads
            assert tower.blocks.eps == settings_.layer_norm_eps
            gated = getattr(settings_, "use_swiglu_ffn", False)
            assert tower.blocks.activation == (
                "silu" if gated else ACTIVATIONS[settings_.hidden_act]
            )
    if spec.text is not None:
        eos = getattr(config, "text_config", config).eos_token_id
        assert spec.text.eos == (None if eos == 2 else eos)
    if spec.head is not None:
        assert spec.head.labels == tuple(config.id2label[i] for i in range(config.num_labels))


def _value(tensors: dict[str, torch.Tensor], source: Source) -> torch.Tensor:
    value = tensors[source.entry.name]
    return value if source.rows is None else value[slice(*source.rows)]


@pytest.mark.parametrize("architecture", FAMILY)
@settings(max_examples=12, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data())
def test_a_real_model_maps_whole_and_equal_in_both_dialects(
    architecture: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In memory the names are those of transformers 5; saved, those of transformers 4."""
    model = data.draw(models(architecture))
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    saved = open_checkpoint(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        old = {name: file.get_tensor(name) for name in saved.tensors}
    new = dict(model.state_dict())
    live = checkpoints.fake(
        saved.config, {name: ("F32", tensor.shape) for name, tensor in new.items()}
    )
    spec = zoo.read_spec(saved)
    assert spec == zoo.read_spec(live)
    assert spec.architecture == architecture
    _agrees(spec, model)
    mapped_old, mapped_new = zoo.map_tensors(saved, spec), zoo.map_tensors(live, spec)
    for name, shape in spec.tensor_shapes().items():
        left, right = _value(old, mapped_old[name]), _value(new, mapped_new[name])
        assert torch.equal(left.reshape(shape), right.reshape(shape)), name
    used = sum({s.entry.name: s.entry.nbytes for s in mapped_new.values()}.values())
    mask = [tensor.nbytes for name, tensor in new.items() if name.endswith("mask_token")]
    assert used + sum(mask) == sum(tensor.nbytes for tensor in new.values())


def test_the_dialects_of_memory_and_disk_differ() -> None:
    """What makes the test above cover both."""
    config = transformers.ViTConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    names = transformers.ViTModel(config).state_dict()
    assert "layers.0.attention.q_proj.weight" in names
    assert not any(name.startswith("encoder.") for name in names)


# Every mixture of these with the defaults is a valid CLIP.
LEGACY = {
    "hidden_size": st.sampled_from([96, 192]),
    "intermediate_size": st.integers(1, 500),
    "num_hidden_layers": st.integers(1, 20),
    "num_attention_heads": st.sampled_from([2, 4]),
    "hidden_act": st.sampled_from(["gelu", "relu"]),
    "projection_dim": st.integers(1, 20),
}
LEGACY_TOWERS = {
    "text": {
        **LEGACY,
        "vocab_size": st.integers(49408, 50000),
        "max_position_embeddings": st.integers(1, 99),
        "eos_token_id": st.sampled_from([2, 3, 49406]),
    },
    "vision": {
        **LEGACY,
        "image_size": st.sampled_from([448, 672]),
        "patch_size": st.sampled_from([14, 16]),
    },
}


@settings(max_examples=60, deadline=None)
@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            f"{tower}_{key}": st.none() | st.fixed_dictionaries({}, optional=fields)
            for tower, fields in LEGACY_TOWERS.items()
            for key in ("config", "config_dict")
        },
    )
)
def test_legacy_config_dicts_override_as_clipconfig_has_it(values: dict[str, Any]) -> None:
    config = {"model_type": "clip", "architectures": ["CLIPModel"], **values}
    theirs = transformers.CLIPConfig(**copy.deepcopy(config))
    text, vision = theirs.text_config, theirs.vision_config
    names = {"text_model.final_layer_norm.bias": ("F32", [1]), "vision_model.x": ("F32", [1])}
    spec = zoo.read_spec(checkpoints.fake(config, names))
    assert spec.text is not None
    assert spec.vision is not None
    for ours, other in ((spec.text, text), (spec.vision, vision)):
        assert ours.projection == theirs.projection_dim
        assert _blocks(ours.blocks) == (
            other.hidden_size,
            other.num_hidden_layers,
            other.num_attention_heads,
            other.intermediate_size,
            ACTIVATIONS[other.hidden_act],
            other.layer_norm_eps,
        )
    assert (spec.text.vocab, spec.text.context) == (text.vocab_size, text.max_position_embeddings)
    assert spec.text.eos == (None if text.eos_token_id == 2 else text.eos_token_id)
    assert spec.vision.image == (vision.image_size, vision.image_size)
    assert spec.vision.patch == (vision.patch_size, vision.patch_size)


CONFIG_CLASSES = {
    "vit": transformers.ViTConfig,
    "deit": transformers.DeiTConfig,
    "dinov2": transformers.Dinov2Config,
    "dinov2_with_registers": transformers.Dinov2WithRegistersConfig,
    "clip": transformers.CLIPConfig,
    "clip_text_model": transformers.CLIPTextConfig,
    "clip_vision_model": transformers.CLIPVisionConfig,
}


@pytest.mark.parametrize("model_type", SCHEMAS)
def test_defaults_are_those_of_the_config_class(model_type: str) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(CONFIG_CLASSES[model_type])}
    legacy = {"text_config_dict": None, "vision_config_dict": None}
    for key, default in SCHEMAS[model_type].defaults.items():
        assert (fields | legacy)[key] == default, key


@pytest.mark.parametrize("architecture", FAMILY)
def test_a_config_without_keys_reads_as_the_config_class(architecture: str) -> None:
    """A reader that takes another family's schema would take its defaults."""
    config_class = getattr(transformers, architecture).config_class
    config = {"model_type": config_class.model_type, "architectures": [architecture]}
    towers = {f"{tower}_model.x": ("F32", [1]) for tower in ("text", "vision")}
    names = towers if architecture == "CLIPModel" else {}
    spec = zoo.read_spec(checkpoints.fake(config, names))
    _agrees(spec, SimpleNamespace(config=config_class()))


@pytest.mark.parametrize("model_type", SCHEMAS)
def test_every_key_that_transformers_5_writes_is_known(model_type: str) -> None:
    written = json.loads(CONFIG_CLASSES[model_type]().to_json_string(use_diff=False))
    SCHEMAS[model_type].check(written, "config.json")
    for tower in ("text", "vision"):
        if f"{tower}_config" in written:
            SCHEMAS[f"clip_{tower}_model"].check(written[f"{tower}_config"], "config.json")


def test_an_activation_equals_its_namesake_in_float64() -> None:
    x = torch.linspace(-30, 30, 200_001, dtype=torch.float64)
    ours: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
        "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
    }
    for theirs, name in ACTIVATIONS.items():
        assert (ACT2FN[theirs](x) - ours[name](x)).abs().max() < 1e-7, theirs


# ---- a config that contradicts its tensors

CONTRADICTIONS = [
    ("dinov2-small", {"hidden_size": 390}, "hidden_size 390, the tensors are 384 wide"),
    (
        "vit-base-patch16-224",
        {"hidden_size": 384, "num_hidden_layers": 6},
        "hidden_size 384, the tensors are 768 wide; config.json says num_hidden_layers 6, the "
        "tensors have 12 layers",
    ),
    ("dinov2-base", {"num_hidden_layers": 24}, "num_hidden_layers 24, the tensors have 12 layers"),
    (
        "vit-base-patch16-224",
        {"intermediate_size": 3000},
        "intermediate_size 3000, the tensors' MLPs are 3072 wide",
    ),
    (
        "dinov2-base",
        {"mlp_ratio": 2},
        "mlp_ratio 2 (MLPs 1536 wide), the tensors' MLPs are 3072 wide",
    ),
    (
        "dinov2-giant",
        {"mlp_ratio": 2},
        "mlp_ratio 2 (MLPs 2048 wide), the tensors' MLPs are 4096 wide",
    ),
    ("vit-base-patch16-224", {"qkv_bias": False}, "qkv_bias false, the queries have a bias"),
    ("dinov2-base", {"num_channels": 1}, "num_channels 1, the patch projection reads 3"),
    (
        "vit-base-patch16-224",
        {"patch_size": 14},
        "patch_size 14, the patch projection reads patches of 16",
    ),
    ("vit-base-patch16-224", {"image_size": 384}, "image_size 384, the position table is for 224"),
    (
        "dinov2-with-registers-base",
        {"num_register_tokens": 8},
        "num_register_tokens 8, the tensors have 4",
    ),
    (
        "vit-base-patch16-224-in21k",
        {"pooler_output_size": 512},
        "pooler_output_size 512, the pooler is 768 wide",
    ),
    (
        "dinov2-small-imagenet1k-1-layer",
        {"id2label": {"0": "cat", "1": "dog"}},
        "id2label of 2 labels, the classifier has 1000 rows",
    ),
    ("clip-vit-base-patch32", {"projection_dim": 640}, "projection_dim 640, the projection is 512"),
    (
        "clip-vit-base-patch32",
        {"text_config/hidden_size": 768},
        "(text_config) says hidden_size 768, the tensors are 512 wide",
    ),
    (
        "clip-vit-base-patch32",
        {"text_config/vocab_size": 50000},
        "(text_config) says vocab_size 50000, the token table has 49408 rows",
    ),
    (
        "clip-vit-base-patch32",
        {"text_config/max_position_embeddings": 64},
        "(text_config) says max_position_embeddings 64, the position table has 77 rows",
    ),
    (
        "clip-vit-base-patch32",
        {"vision_config/patch_size": 16},
        "(vision_config) says patch_size 16, the patch projection reads patches of 32",
    ),
    (
        "sd-image-variations-encoder",
        {"projection_dim": 512},
        "projection_dim 512, the projection is 768 wide",
    ),
]


def _with_config(name: str, changes: dict[str, Any]) -> Checkpoint:
    """A published checkpoint with some values of its config changed; a key is a path."""
    checkpoint = checkpoints.load(name)
    config = copy.deepcopy(checkpoint.config)
    for path, value in changes.items():
        *parents, key = path.split("/")
        inner = config
        for parent in parents:
            inner = inner[parent]
        inner[key] = value
    return dataclasses.replace(checkpoint, config=config)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"), CONTRADICTIONS, ids=[str(row[1]) for row in CONTRADICTIONS]
)
def test_a_config_that_contradicts_its_tensors_says_so_first(
    name: str, changes: dict[str, Any], sentence: str
) -> None:
    checkpoint = dataclasses.replace(_with_config(name, changes), preprocessor=None)
    refusal = _refusal(checkpoint)
    location = "config.json " if sentence.startswith("(") else "config.json says "
    assert refusal.startswith(f"folder: {location}{sentence}")
    assert "; tensors do not fit " in refusal


def test_a_key_that_the_config_leaves_out_is_named_with_its_default() -> None:
    checkpoint = checkpoints.load("vit-large-patch16-384")
    config = {key: value for key, value in checkpoint.config.items() if key != "intermediate_size"}
    refusal = _refusal(dataclasses.replace(checkpoint, config=config))
    wanted = "config.json leaves intermediate_size at 3072, the tensors' MLPs are 4096 wide; "
    assert refusal.startswith(f"folder: {wanted}")


@pytest.mark.parametrize("name", GOLDEN)
def test_one_wrong_tensor_of_many_is_no_contradiction(name: str) -> None:
    checkpoint = checkpoints.load(name)
    for tensor in filter(re.compile(r".*\.0\..*norm.*weight").match, checkpoint.tensors):
        refusal = _refusal(_changed(checkpoint, tensor, shape=(7,)))
        assert refusal.startswith("folder: tensors do not fit ")


# ---- which class a checkpoint is


def _clip(config: dict[str, Any], *towers: str) -> Checkpoint:
    """A base CLIP with the tensors whose names start so, under another config."""
    whole = checkpoints.load("clip-vit-base-patch32")
    tensors = {
        name: entry
        for name, entry in whole.tensors.items()
        if not towers or name.startswith(towers)
    }
    return dataclasses.replace(whole, config={**whole.config, **config}, tensors=tensors)


@pytest.mark.parametrize(
    ("named", "towers", "architecture"),
    [
        (["CLIPModel"], (), "CLIPModel"),
        (["CLIPModel"], ("vision", "visual"), "CLIPVisionModelWithProjection"),
        (["CLIPModel"], ("text",), "CLIPTextModelWithProjection"),
        (None, (), "CLIPModel"),
        ([], ("vision", "visual"), "CLIPVisionModelWithProjection"),
        (None, ("vision",), "CLIPVisionModel"),
        (None, ("text_model",), "CLIPTextModel"),
        (["CLIPVisionModel"], (), "CLIPVisionModel"),
        (["CLIPVisionModelWithProjection"], (), "CLIPVisionModelWithProjection"),
        (["CLIPTextModel"], (), "CLIPTextModel"),
        (["CLIPTextModelWithProjection"], ("text",), "CLIPTextModelWithProjection"),
    ],
)
def test_the_tensors_say_which_tower_of_a_clip_there_is(
    named: list[str] | None, towers: tuple[str, ...], architecture: str
) -> None:
    checkpoint = _clip({"architectures": named}, *towers)
    spec = zoo.read_spec(checkpoint)
    assert spec.architecture == architecture
    vision, text = "Text" not in architecture, "Vision" not in architecture
    assert (spec.vision is not None, spec.text is not None) == (vision, text)
    assert spec.contrastive == (architecture == "CLIPModel")
    width = 512 if "With" in architecture or architecture == "CLIPModel" else None
    assert {tower.projection for tower in (spec.vision, spec.text) if tower} == {width}
    sources = zoo.map_tensors(checkpoint, spec)
    assert sources.keys() == spec.tensor_shapes().keys()


@pytest.mark.parametrize("named", ["CLIPModel", "CLIPVisionModelWithProjection"])
def test_a_tower_without_its_projection_is_refused_where_the_class_has_one(named: str) -> None:
    checkpoint = _clip({"architectures": [named]}, "vision")
    assert "1 missing: visual_projection.weight" in _refusal(checkpoint)


def test_a_clip_without_a_tower_is_refused() -> None:
    with pytest.raises(CheckpointError, match="wanted a CLIP tower"):
        zoo.read_spec(_clip({}, "logit_scale"))


def test_a_lone_tower_has_its_own_projection_width_and_clipmodel_the_top_one() -> None:
    checkpoint = _clip({"projection_dim": 640})
    spec = zoo.read_spec(checkpoint)
    assert spec.vision is not None
    assert spec.vision.projection == 640
    config = {"projection_dim": 640, "architectures": ["CLIPVisionModelWithProjection"]}
    lone = zoo.read_spec(_clip(config)).vision
    assert lone is not None
    assert lone.projection == 512
    nested = dict(checkpoint.config["vision_config"])
    del nested["projection_dim"]
    lone = zoo.read_spec(_clip({**config, "vision_config": nested})).vision
    assert lone is not None
    assert lone.projection == 640


def test_a_lone_text_tower_pools_by_its_own_config_alone() -> None:
    """CLIPTextModel reads text_config; CLIPModel lets text_config_dict's defaults override it."""
    whole = checkpoints.load("clip-vit-large-patch14")
    lone = dataclasses.replace(whole, config={**whole.config, "architectures": ["CLIPTextModel"]})
    specs = [zoo.read_spec(one).text for one in (whole, lone)]
    assert [spec.eos for spec in specs if spec] == [49407, None]


@pytest.mark.parametrize("prefix", ["vit.", ""])
@pytest.mark.parametrize("head", [True, False])
def test_a_vit_without_a_named_class_is_what_its_tensors_are(prefix: str, head: bool) -> None:
    whole = checkpoints.load("vit-base-patch16-224")
    config = {key: value for key, value in whole.config.items() if key != "architectures"}
    tensors = {
        name.replace("vit.", prefix): dataclasses.replace(entry, name=name.replace("vit.", prefix))
        for name, entry in whole.tensors.items()
        if head or not name.startswith("classifier")
    }
    checkpoint = dataclasses.replace(whole, config=config, tensors=tensors)
    spec = zoo.read_spec(checkpoint)
    assert spec.architecture == ("ViTForImageClassification" if head else "ViTModel")
    assert zoo.map_tensors(checkpoint, spec).keys() == spec.tensor_shapes().keys()


def test_a_base_model_loads_from_the_folder_of_a_classifier() -> None:
    whole = checkpoints.load("dinov2-small-imagenet1k-1-layer")
    base = dataclasses.replace(whole, config={**whole.config, "architectures": ["Dinov2Model"]})
    spec = zoo.read_spec(base)
    assert spec.head is None
    assert zoo.map_tensors(base, spec).keys() == spec.tensor_shapes().keys()


def test_a_classifier_from_the_folder_of_a_base_model_is_refused() -> None:
    base = checkpoints.load("vit-base-patch16-224-in21k")
    config = {**base.config, "architectures": ["ViTForImageClassification"]}
    refusal = _refusal(dataclasses.replace(base, config=config))
    assert "2 missing: classifier.weight, classifier.bias" in refusal


def test_a_classifier_ignores_a_pooler() -> None:
    base = checkpoints.load("vit-base-patch16-224")
    names = {
        "vit.pooler.dense.weight": ("F32", (768, 768)),
        "vit.pooler.dense.bias": ("F32", (768,)),
    }
    extra = checkpoints.fake({}, names).tensors
    checkpoint = dataclasses.replace(base, tensors={**base.tensors, **extra})
    spec = zoo.read_spec(checkpoint)
    assert spec == zoo.read_spec(base)
    assert zoo.map_tensors(checkpoint, spec) == zoo.map_tensors(base, spec)


# ---- labels


def _labelled(rows: int, **config: Any) -> Checkpoint:
    base = checkpoints.load("vit-base-patch16-224")
    values = {key: value for key, value in base.config.items() if key != "id2label"}
    tensors = dict(base.tensors)
    for name, shape in (("classifier.weight", (rows, 768)), ("classifier.bias", (rows,))):
        tensors[name] = dataclasses.replace(tensors[name], shape=shape)
    return dataclasses.replace(base, config=values | config, tensors=tensors)


@pytest.mark.parametrize(
    ("rows", "config", "labels"),
    [
        (3, {}, ("LABEL_0", "LABEL_1", "LABEL_2")),
        (2, {"num_labels": 2}, ("LABEL_0", "LABEL_1")),
        (3, {"id2label": {"2": "c", "0": "a", "1": "b"}}, ("a", "b", "c")),
        (12, {"id2label": {str(i): str(i) for i in range(12)}}, tuple(map(str, range(12)))),
        (1, {"id2label": {"0": "same"}, "num_labels": 9}, ("same",)),
    ],
)
def test_labels_come_in_the_order_of_their_numbers(
    rows: int, config: dict[str, Any], labels: tuple[str, ...]
) -> None:
    head = zoo.read_spec(_labelled(rows, **config)).head
    assert head is not None
    assert head.labels == labels


@pytest.mark.parametrize("config", [{"num_labels": 0}, {"id2label": {}}])
def test_no_labels_mean_no_head(config: dict[str, Any]) -> None:
    base = _labelled(3, **config)
    tensors = {name: entry for name, entry in base.tensors.items() if "classifier" not in name}
    assert zoo.read_spec(dataclasses.replace(base, tensors=tensors)).head is None


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "the keys 0 to 1; there is no 1"),
        ({"id2label": {"00": "a"}}, "the keys 0 to 0; there is no 0"),
        ({"id2label": {"0": 1}}, "an object of strings"),
        ({"id2label": ["a"]}, "an object of strings"),
        ({"num_labels": 4}, "wanted one number of labels"),
        ({"num_labels": -1}, "num_labels: got -1"),
        ({"num_labels": True}, "num_labels: got True"),
        ({"num_labels": 2**31}, "num_labels: got 2147483648"),
    ],
)
def test_labels_with_gaps_or_of_another_number_are_refused(
    config: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(wanted)):
        zoo.read_spec(_labelled(3, **config))


def test_a_number_of_labels_that_no_classifier_has_is_refused_before_labels_are_made() -> None:
    with pytest.raises(CheckpointError, match="wanted one number of labels"):
        zoo.read_spec(_labelled(3, num_labels=16_000_000))


# ---- configurations that are refused


def _refused(base: str, changes: dict[str, Any]) -> str:
    checkpoint = _with_config(base, changes)
    with pytest.raises(CheckpointError) as caught:
        zoo.read_spec(checkpoint)
    message = str(caught.value)
    assert message.startswith("folder: ")
    assert "\n" not in message
    return message


VIT, CLIP, DINO = "vit-base-patch16-224", "clip-vit-base-patch32", "dinov2-small"
REGISTERS = "dinov2-with-registers-base"
BAD = [
    # patches, heads, layers
    (VIT, {"patch_size": 0}, "patch_size: got 0, wanted an integer from 1"),
    (VIT, {"num_attention_heads": 0}, "num_attention_heads: got 0"),
    (VIT, {"num_hidden_layers": -1}, "num_hidden_layers: got -1"),
    (VIT, {"num_hidden_layers": 0}, "num_hidden_layers: got 0"),
    (VIT, {"hidden_size": 0}, "hidden_size: got 0"),
    (VIT, {"intermediate_size": -3}, "intermediate_size: got -3"),
    (DINO, {"mlp_ratio": 0}, "mlp_ratio: got 0"),
    (DINO, {"mlp_ratio": -4}, "mlp_ratio: got -4"),
    (DINO, {"mlp_ratio": 1e-9}, "mlp: got 0"),
    (REGISTERS, {"num_register_tokens": -1}, "num_register_tokens: got -1"),
    # sizes beyond all reason
    (VIT, {"hidden_size": 2**31}, "hidden_size: got 2147483648, wanted an integer from 1 to 65536"),
    (VIT, {"hidden_size": 10**300}, "hidden_size: got "),
    (VIT, {"num_hidden_layers": 10**9}, "num_hidden_layers: got 1000000000"),
    (VIT, {"image_size": 2**31}, "image_size: got 2147483648"),
    (VIT, {"intermediate_size": 2**40}, "intermediate_size: got 1099511627776"),
    (
        VIT,
        {"hidden_size": 65536, "num_attention_heads": 64, "num_hidden_layers": 256},
        "parameters: got ",
    ),
    (CLIP, {"text_config/vocab_size": 2**31}, "(text_config): vocab_size: got 2147483648"),
    (CLIP, {"text_config/max_position_embeddings": 2**31}, "max_position_embeddings: got 21"),
    (CLIP, {"projection_dim": 2**31}, "config.json: projection_dim: got 2147483648"),
    (DINO, {"mlp_ratio": 10**300}, "mlp_ratio: got "),
    (REGISTERS, {"num_register_tokens": 2**31}, "num_register_tokens: got 2147483648"),
    # not finite
    (VIT, {"layer_norm_eps": math.nan}, "layer_norm_eps: got nan, wanted a number in (0, 1)"),
    (VIT, {"layer_norm_eps": math.inf}, "layer_norm_eps: got inf"),
    (VIT, {"layer_norm_eps": 0}, "layer_norm_eps: got 0"),
    (VIT, {"layer_norm_eps": -1e-5}, "layer_norm_eps: got -1e-05"),
    (DINO, {"mlp_ratio": math.nan}, "mlp_ratio: got nan"),
    (DINO, {"mlp_ratio": math.inf}, "mlp_ratio: got inf"),
    # what does not divide
    (
        VIT,
        {"num_attention_heads": 7},
        "num_attention_heads: got 7, wanted a divisor of hidden_size",
    ),
    (CLIP, {"vision_config/num_attention_heads": 5}, "(vision_config): num_attention_heads: got 5"),
    (VIT, {"head_dim": 32}, "head_dim: got 32, wanted hidden_size / num_attention_heads = 64"),
    (VIT, {"image_size": 225}, "image_size: got 225, wanted a multiple of the patch size (16, 16)"),
    (VIT, {"image_size": [224, 230]}, "image_size: got [224, 230], wanted a multiple"),
    (CLIP, {"vision_config/image_size": 200}, "image_size: got 200, wanted a multiple"),
    (VIT, {"patch_size": 448}, "image_size: got 224, wanted a multiple of the patch size (448"),
    (DINO, {"image_size": [28, 56]}, "wanted as many patches down as across"),
    # activations
    (VIT, {"hidden_act": "gelu_10"}, "hidden_act: got 'gelu_10', wanted one of gelu, "),
    (VIT, {"hidden_act": "GELU"}, "hidden_act: got 'GELU'"),
    (VIT, {"hidden_act": None}, "hidden_act: got None, wanted a string"),
    (CLIP, {"text_config/hidden_act": "mish"}, "(text_config): hidden_act: got 'mish'"),
    # types
    (VIT, {"hidden_size": "768"}, "hidden_size: got '768', wanted an integer"),
    (VIT, {"hidden_size": 768.0}, "hidden_size: got 768.0, wanted an integer"),
    (VIT, {"hidden_size": True}, "hidden_size: got True, wanted an integer"),
    (VIT, {"hidden_size": None}, "hidden_size: got None, wanted an integer"),
    (VIT, {"qkv_bias": 1}, "qkv_bias: got 1, wanted true or false"),
    (VIT, {"qkv_bias": "true"}, "qkv_bias: got 'true'"),
    (VIT, {"layer_norm_eps": "1e-6"}, "layer_norm_eps: got '1e-6'"),
    (VIT, {"image_size": "224"}, "image_size: got '224'"),
    (VIT, {"image_size": [224]}, "image_size: got [224]"),
    (VIT, {"image_size": [224, 224, 224]}, "image_size: got [224, 224, 224]"),
    (VIT, {"image_size": [True, True]}, "image_size: got [True, True]"),
    (
        CLIP,
        {"vision_config/image_size": [224, 224]},
        "image_size: got [224, 224], wanted an integer",
    ),
    (DINO, {"use_swiglu_ffn": 0}, "use_swiglu_ffn: got 0, wanted true or false"),
    (CLIP, {"text_config": []}, "text_config: got [], wanted an object"),
    (CLIP, {"vision_config_dict": "x"}, "vision_config_dict: got 'x', wanted an object"),
    (CLIP, {"vision_config/model_type": "siglip_vision_model"}, "wanted 'clip_vision_model'"),
    (CLIP, {"projection_dim": None}, "projection_dim: got None"),
    (CLIP, {"text_config/eos_token_id": None}, "eos_token_id: got None"),
    (CLIP, {"text_config/eos_token_id": [2, 3]}, "eos_token_id: got [2, 3], wanted one integer"),
    (CLIP, {"text_config/eos_token_id": 49408}, "eos_token_id: got 49408, wanted one integer"),
    (CLIP, {"text_config/eos_token_id": True}, "eos_token_id: got True"),
    # keys that change the network, and keys nobody knows
    (VIT, {"pruned_heads": {"0": [1]}}, "pruned_heads: got {'0': [1]}"),
    (VIT, {"is_decoder": True}, "is_decoder: got True"),
    (CLIP, {"text_config/add_cross_attention": True}, "add_cross_attention: got True"),
    (VIT, {"quantization_config": {"bits": 4}}, "quantization_config: got {'bits': 4}"),
    (VIT, {"per_layer_config": {"0": {"hidden_size": 4}}}, "per_layer_config: got "),
    (VIT, {"tie_last_hidden_states": False}, "tie_last_hidden_states: got False"),
    (DINO, {"interpolate_antialias": True}, "interpolate_antialias: got True"),
    (REGISTERS, {"interpolate_antialias": False}, "interpolate_antialias: got False"),
    (REGISTERS, {"interpolate_offset": 0.1}, "interpolate_offset: got 0.1"),
    (VIT, {"use_rotary": True}, "config.json: unknown key 'use_rotary'"),
    (VIT, {"intermediate_sizes": [1]}, "unknown key 'intermediate_sizes'"),
    (VIT, {"mlp_ratio": 4}, "unknown key 'mlp_ratio'"),
    (DINO, {"intermediate_size": 1536}, "unknown key 'intermediate_size'"),
    (CLIP, {"text_config/rope_theta": 1e4}, "(text_config): unknown key 'rope_theta'"),
    (CLIP, {"text_config_dict": {"layers": 3}}, "(text_config_dict): unknown key 'layers'"),
    (CLIP, {"vision_config/qkv_bias": True}, "(vision_config): unknown key 'qkv_bias'"),
    # other models and classes
    (VIT, {"model_type": "beit"}, "model_type: got 'beit', wanted one of vit, "),
    (VIT, {"model_type": "siglip"}, "model_type: got 'siglip'"),
    (VIT, {"model_type": 3}, "model_type: got 3"),
    (VIT, {"architectures": ["ViTForMaskedImageModeling"]}, "wanted one of ViTModel, ViTFor"),
    (CLIP, {"architectures": ["CLIPForImageClassification"]}, "wanted one of CLIPModel, CLIPVis"),
    (DINO, {"architectures": ["Dinov2Backbone"]}, "architectures: got ['Dinov2Backbone']"),
    (DINO, {"architectures": ["ViTModel"]}, "wanted one of Dinov2Model, Dinov2ForImage"),
    (VIT, {"architectures": ["ViTModel", "ViTModel"]}, "architectures: got ['ViTModel', "),
    (VIT, {"architectures": "ViTModel"}, "architectures: got 'ViTModel'"),
    (VIT, {"architectures": [["ViTModel"]]}, "architectures: got [['ViTModel']]"),
]


@pytest.mark.parametrize(("base", "changes", "wanted"), BAD, ids=[str(bad[1]) for bad in BAD])
def test_a_bad_configuration_is_refused_and_named(
    base: str, changes: dict[str, Any], wanted: str
) -> None:
    assert wanted in _refused(base, changes)


@pytest.mark.parametrize(("base", "changes", "wanted"), BAD, ids=[str(bad[1]) for bad in BAD])
def test_a_bad_configuration_is_refused_before_anything_is_allocated(
    base: str, changes: dict[str, Any], wanted: str
) -> None:
    checkpoints.load(base)
    tracemalloc.start()
    try:
        _refused(base, changes)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code", "custom_pipelines"])
@pytest.mark.parametrize(
    "place", ["{}", "text_config/{}", "vision_config_dict", "task_specific_params"]
)
def test_a_key_that_asks_for_code_is_refused_wherever_it_stands(key: str, place: str) -> None:
    value: Any = {key: None}
    if place == "task_specific_params":
        value = [{"any": value}]
    changes = {place: value} if "{}" not in place else {place.format(key): True}
    message = _refused(CLIP, changes)
    assert f"config.json: got {key}, wanted a checkpoint without code" in message


def test_the_code_of_a_checkpoint_is_never_imported(tmp_path: Path) -> None:
    model = transformers.ViTModel(
        transformers.ViTConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    )
    model.save_pretrained(tmp_path)
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('imported')")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="got auto_map"):
        zoo.read_spec(open_checkpoint(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": None}))
    with pytest.raises(CheckpointError, match="got auto_map"):
        zoo.read_spec(open_checkpoint(tmp_path))
    del config["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"a": "b.C"}}))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: got auto_map"):
        zoo.read_spec(open_checkpoint(tmp_path))
    assert "modeling_evil" not in sys.modules


@pytest.mark.parametrize("config", [{}, {"hidden_size": 3}, {"architecture": "vit_base"}])
def test_a_config_of_no_known_format_is_refused(config: dict[str, Any]) -> None:
    checkpoint = checkpoints.fake(config, {})
    with pytest.raises(CheckpointError, match="got no known format, wanted one of: Hugging Face"):
        zoo.read_spec(checkpoint)
    with pytest.raises(CheckpointError, match="got no known format"):
        zoo.map_tensors(checkpoint, zoo.read_spec(checkpoints.load(VIT)))


def test_a_config_of_two_formats_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(zoo.FORMATS[0], name="another")
    monkeypatch.setattr(zoo, "FORMATS", (*zoo.FORMATS, other))
    with pytest.raises(CheckpointError, match="got Hugging Face and another, wanted one of"):
        zoo.read_spec(checkpoints.load(VIT))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_json_value_under_any_key_is_read_or_refused_by_us(data: st.DataObject) -> None:
    """No exception but CheckpointError leaves the reader."""
    name = data.draw(st.sampled_from([VIT, CLIP, DINO, REGISTERS]))
    checkpoint = checkpoints.load(name)
    config = copy.deepcopy(checkpoint.config)
    target = config
    if name == CLIP:
        target = data.draw(
            st.sampled_from([config, config["text_config"], config["vision_config"]])
        )
    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=5,
    )
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(json_values)
    changed = dataclasses.replace(checkpoint, config=config)
    with contextlib.suppress(CheckpointError):
        assert zoo.read_spec(changed).parameters > 0


def test_the_zoo_imports_no_torch() -> None:
    for path in Path(inspect.getfile(zoo)).parent.glob("*.py"):
        assert not re.search(r"^\s*(import|from) torch", path.read_text(), re.MULTILINE), path.name
