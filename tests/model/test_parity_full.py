"""The published sizes with random weights: every field and embedding is that of transformers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vitrail
from helpers import (
    arguments,
    assert_close,
    assert_same,
    image_embedding,
    make,
    outputs,
    save,
    text_embedding,
)

pytestmark = pytest.mark.slow

VIT_B16 = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
}
TEXT = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "num_hidden_layers": 12,
    "eos_token_id": 49407,
    "bos_token_id": 49406,
    "pad_token_id": 49407,
}
CLIP_B32 = {
    "vision": {**VIT_B16, "patch_size": 32},
    "text": {
        **TEXT,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
    },
    "projection_dim": 512,
}
CLIP_L14 = {
    "vision": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "image_size": 224,
        "patch_size": 14,
    },
    "text": {
        **TEXT,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "projection_dim": 768,
}
DINOV2_B = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
}
DINOV2_G = {
    **DINOV2_B,
    "hidden_size": 1536,
    "num_attention_heads": 24,
    "num_hidden_layers": 4,
    "use_swiglu_ffn": True,
}
OWN = None

CASES = {
    "ViT-B/16": ("ViTModel", VIT_B16, [OWN]),
    "CLIP B/32": ("CLIPModel", CLIP_B32, [OWN]),
    "CLIP L/14": ("CLIPModel", CLIP_L14, [OWN]),
    "DINOv2-B with registers": (
        "Dinov2WithRegistersModel",
        {**DINOV2_B, "num_register_tokens": 4},
        [(224, 224), OWN, (448, 672)],
    ),
    "DINOv2-g, 4 layers": ("Dinov2Model", DINOV2_G, [(224, 224)]),
}


@pytest.fixture(autouse=True)
def one_model_at_a_time() -> Iterator[None]:
    yield
    gc.collect()


@pytest.mark.parametrize(("architecture", "config", "sizes"), CASES.values(), ids=CASES)
def test_full_sizes_equal_transformers(
    architecture: str, config: dict[str, Any], sizes: list[tuple[int, int] | None], tmp_path: Path
) -> None:
    model = make(architecture, **config)
    save(model, tmp_path, shards="500MB")
    ours = vitrail.load(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    for size in sizes:
        batch = 2 if size != OWN or architecture != "Dinov2WithRegistersModel" else 1
        inputs = arguments(architecture, model.config, batch=batch, size=size)
        got = ours.forward(**inputs, output_hidden_states=True)
        assert_same(got, outputs(model, inputs), where=f"{size} ")
        pixels = inputs["pixel_values"]
        embedding = image_embedding(model, pixels)
        assert_close(ours.encode_image(pixels), embedding, what="model", name=f"{size} image")
        if "input_ids" in inputs:
            ids = inputs["input_ids"]
            embedding = text_embedding(model, ids)
            assert_close(ours.encode_text(ids), embedding, what="model", name="text")
