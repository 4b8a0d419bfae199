"""Small exported folders for the tests of libvitrail."""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import ViTImageProcessorPil

from helpers import clip_folder, make, save
from vitrail.export import export_model

ARCH = 90
LABELS = ("cat", "dog", "fish, of any kind", "Vögel", "snake")
PROBLEM = "multi_label_classification"  # scores are sigmoids
_TOWER = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}


def export_clip(folder: Path) -> None:
    """Both towers, two blocks of width 64, images of 32 x 32."""
    with tempfile.TemporaryDirectory() as checkpoint:
        vision = {**_TOWER, "image_size": 32, "patch_size": 8}
        text = {**_TOWER, "vocab_size": 700, "max_position_embeddings": 40}
        text |= {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}  # 2: the legacy rule
        clip_folder(Path(checkpoint), vision=vision, text=text, projection_dim=64)
        export_model(checkpoint, folder, [ARCH])


def export_vit(folder: Path) -> None:
    """An image tower without a projection, one block, and a head over `LABELS`."""
    with tempfile.TemporaryDirectory() as checkpoint:
        config = {**_TOWER, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
        config |= {"id2label": dict(enumerate(LABELS)), "problem_type": PROBLEM}
        save(make("ViTForImageClassification", **config), checkpoint)
        size = {"height": 32, "width": 32}
        ViTImageProcessorPil(size=size).save_pretrained(checkpoint)
        export_model(checkpoint, folder, [ARCH])


def export_dinov2(folder: Path) -> None:
    """One block without an image processor, and a head over the class token and the mean."""
    with tempfile.TemporaryDirectory() as checkpoint:
        config = {**_TOWER, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
        del config["intermediate_size"]
        config |= {"mlp_ratio": 2, "id2label": dict(enumerate(LABELS))}
        save(make("Dinov2ForImageClassification", **config), checkpoint)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(checkpoint)
        export_model(checkpoint, folder, [ARCH])


def export_two(folder: Path) -> None:
    """One block without an image processor, for sm_80 and sm_90."""
    with tempfile.TemporaryDirectory() as checkpoint:
        config = {**_TOWER, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
        save(make("ViTModel", **config), checkpoint)
        export_model(checkpoint, folder, [80, ARCH])
