"""Small exported folders, and of every kernel in them the cubin and the PTX that it was made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import ViTImageProcessorPil

import vitrail
import vitrail.tools.export
from emulated.device import Device
from export_folder import LABELS, PROBLEM
from helpers import clip_folder, make, save
from vitrail.plan.kernel_binary import encode_binary
from vitrail.tools.export import export_model
from vitrail.tools.quantize import quantize_model
from vitrail_kernels.compile import compile_kernel
from vitrail_kernels.launch import Call

ARCHITECTURES = [80, 90]
SIDE, PATCH = 32, 8
TOWER = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}
IMAGE = {"image_size": SIDE, "patch_size": PATCH, "id2label": dict(enumerate(LABELS))}


def _clip(checkpoint: Path) -> Any:
    vision = {**TOWER, "image_size": SIDE, "patch_size": PATCH}
    text = {**TOWER, "vocab_size": 700, "max_position_embeddings": 40}
    text |= {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}  # 2: the legacy rule
    return clip_folder(checkpoint, vision=vision, text=text, projection_dim=64)[0]


def _classifier(architecture: str, **config: Any) -> Callable[[Path], Any]:
    def make_checkpoint(checkpoint: Path) -> Any:
        size = {"height": SIDE, "width": SIDE}
        ViTImageProcessorPil(size=size).save_pretrained(checkpoint)
        return save(make(architecture, **config), checkpoint)

    return make_checkpoint


CHECKPOINTS: dict[str, Callable[[Path], Any]] = {
    "clip": _clip,
    "vit": _classifier("ViTForImageClassification", **TOWER, **IMAGE, problem_type=PROBLEM),
    "deit": _classifier("DeiTForImageClassificationWithTeacher", **TOWER, **IMAGE),
    "dinov2": _classifier(
        "Dinov2ForImageClassification",
        **{name: value for name, value in TOWER.items() if name != "intermediate_size"},
        **IMAGE,
        mlp_ratio=2,
    ),
}


@dataclass(frozen=True)
class Export:
    """An exported ``folder``; ``theirs``: the model of transformers that it was made of, in fp32;
    ``int8``: the int8 folder that was exported, as the CPU serves it; ``kernels``: pairs of
    NAME.cubin and NAME.ptx."""

    family: str
    folder: Path
    theirs: Any
    kernels: Path
    int8: vitrail.Model | None

    def open(self, device: Device) -> None:
        """Let the folder's kernels compute on ``device``."""
        for cubin in self.kernels.glob("*.cubin"):
            ptx = cubin.with_suffix(".ptx").read_text()
            device.emulation.source(cubin.read_bytes(), ptx)


def export(family: str, dtype: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    """A tiny checkpoint of ``family``, exported for `ARCHITECTURES` in ``dtype``, which may be
    "int8"."""
    checkpoint, kernels = base / "checkpoint", base / "kernels"
    for folder in (checkpoint, kernels):
        folder.mkdir()

    def kept(key: str, call: Call, arch: int) -> bytes:
        """In a process of its own, of which files are left."""
        kernel = compile_kernel(call, arch)
        name = hashlib.sha256(kernel.asm["cubin"]).hexdigest()
        (kernels / f"{name}.cubin").write_bytes(kernel.asm["cubin"])
        (kernels / f"{name}.ptx").write_text(kernel.asm["ptx"])
        return encode_binary(key, call, arch, kernel)

    theirs, int8 = CHECKPOINTS[family](checkpoint), None
    if dtype == "int8":
        quantize_model(checkpoint, base / "int8", check=8, rounding="nearest", device="cpu")
        checkpoint, dtype, int8 = base / "int8", "float16", vitrail.load(base / "int8")
    with monkeypatch.context() as patched:
        patched.setattr(vitrail.tools.export, "kernel_record", kept)
        export_model(checkpoint, base / "exported", ARCHITECTURES, dtype=dtype)
    return Export(family, base / "exported", theirs, kernels, int8)
