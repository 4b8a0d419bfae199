"""Small exported folders for the tests of libvitrail."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import ViTImageProcessorPil

from helpers import clip_folder, make, save
from vitrail.tools.export import export_model

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
    """An image tower without a projection, and a head over `LABELS`."""
    labeled = {"id2label": dict(enumerate(LABELS)), "problem_type": PROBLEM}
    _export("ViTForImageClassification", {**_TOWER, **labeled}, folder, [ARCH])


def export_dinov2(folder: Path) -> None:
    """A head over the class token and the mean of the patches."""
    config = {key: value for key, value in _TOWER.items() if key != "intermediate_size"}
    config |= {"mlp_ratio": 2, "id2label": dict(enumerate(LABELS))}
    _export("Dinov2ForImageClassification", config, folder, [ARCH])


def export_deit(folder: Path) -> None:
    """A head over the class token, and one over the distillation token."""
    labeled = {"id2label": dict(enumerate(LABELS))}
    architecture = "DeiTForImageClassificationWithTeacher"
    _export(architecture, {**_TOWER, **labeled}, folder, [ARCH])


def export_two(folder: Path) -> None:
    """Without an image processor, for sm_80 and sm_90."""
    _export("ViTModel", _TOWER, folder, [80, ARCH], processor=False)


def _export(
    architecture: str,
    config: dict[str, Any],
    folder: Path,
    architectures: list[int],
    processor: bool = True,
) -> None:
    """An image tower of one block, for images of 32 x 32."""
    with tempfile.TemporaryDirectory() as checkpoint:
        config = {**config, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
        save(make(architecture, **config), checkpoint)
        if processor:
            ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(checkpoint)
        export_model(checkpoint, folder, architectures)
