"""Full-size models with random weights: by transformers, saved in 16 bits, opened by Vitrail."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import vitrail
from gpu.common import DEVICE, DRY, NAMES, generator
from helpers import make, save, texts_with_end, with_outliers
from model.test_parity_full import CLIP_B32, CLIP_L14, DINOV2_B, VIT_B16

HALF = torch.float16
RUNNER = "triton" if DRY else os.environ.get("VITRAIL_GPU_TESTS_RUNNER", "auto")
SERVES = "native" if RUNNER == "auto" else RUNNER
"""The backend that ``RUNNER`` gives if the extension is built, which these tests require."""


class Recipe(NamedTuple):
    """A transformers class and its config; ``tiny`` replaces the config in a dry run."""

    architecture: str
    config: dict[str, Any]
    tiny: dict[str, Any]


_TINY: dict[str, Any] = {
    "hidden_size": 96,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 72,
    "image_size": 32,
    "patch_size": 8,
}
_TINY_DINOV2 = {key: value for key, value in _TINY.items() if key != "intermediate_size"}
_TINY_TEXT: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2}

RECIPES = {
    "ViT-B/16": Recipe(
        "ViTModel",
        {**VIT_B16, "add_pooling_layer": False},
        {**_TINY, "add_pooling_layer": False},
    ),
    "CLIP B/32": Recipe("CLIPModel", CLIP_B32, {"vision": _TINY, "text": _TINY_TEXT}),
    "CLIP L/14": Recipe(
        "CLIPVisionModelWithProjection", {**CLIP_L14["vision"], "projection_dim": 768}, _TINY
    ),
    "DINOv2-B": Recipe("Dinov2Model", DINOV2_B, _TINY_DINOV2),
    "DINOv2-B registers": Recipe(
        "Dinov2WithRegistersModel", {**DINOV2_B, "num_register_tokens": 4}, _TINY_DINOV2
    ),
}

SMALL: dict[str, dict[str, Any]] = {
    "ViTModel": {"hidden_size": 96, "num_attention_heads": 3},
    "CLIPModel": {
        "vision": {
            "hidden_size": 96,
            "num_attention_heads": 3,
            "patch_size": 14,
            "image_size": 42,
        },
        "text": {"hidden_size": 64, "num_attention_heads": 2},
    },
    "Dinov2WithRegistersForImageClassification": {
        "hidden_size": 96,
        "num_attention_heads": 3,
        "use_swiglu_ffn": True,
    },
}
"""Arguments of `helpers.make`: models of two blocks that meet every kernel between them."""
BUNDLED = Path(vitrail.__file__).parent / "assets/clip"


class Zoo:
    """The models of a test session, each made at its first use."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made = functools.cache(self._make)
        self._saved = functools.cache(self._save)
        self._opened = functools.cache(self._open)
        self._halved = functools.cache(self._halve)

    def _make(self, name: str) -> Any:
        recipe = RECIPES[name]
        return make(recipe.architecture, **(recipe.tiny if DRY else recipe.config))

    def _save(self, name: str, dtype: torch.dtype, outliers: bool) -> tuple[Path, Any]:
        folder = self._root / f"{name} {NAMES[dtype]} {outliers}".replace("/", "-")
        model = copy.deepcopy(self._made(name))
        if outliers:
            with_outliers(model)
        return folder, save(model, folder, dtype=dtype).to(DEVICE)

    def folder(self, name: str, dtype: torch.dtype = HALF, outliers: bool = False) -> Path:
        """The folder of the checkpoint, its weights rounded to ``dtype``."""
        return self._saved(name, dtype, outliers)[0]

    def theirs(self, name: str, dtype: torch.dtype = HALF, outliers: bool = False) -> Any:
        """The folder's model in transformers, in fp32: R. Attention is plain softmax."""
        return self._saved(name, dtype, outliers)[1]

    def peer(self, name: str, dtype: torch.dtype = HALF, outliers: bool = False) -> Any:
        """The same in ``dtype``, with PyTorch's fused attention: P."""
        return self._halved(name, dtype, outliers)

    def _halve(self, name: str, dtype: torch.dtype, outliers: bool) -> Any:
        model = copy.deepcopy(self.theirs(name, dtype, outliers)).to(dtype)
        model.set_attn_implementation("sdpa")
        return model

    def ours(
        self,
        name: str,
        dtype: torch.dtype = HALF,
        outliers: bool = False,
        runner: str = RUNNER,
    ) -> vitrail.Model:
        """The same by Vitrail's kernels."""
        return self._opened(name, dtype, outliers, runner)

    def _open(self, name: str, dtype: torch.dtype, outliers: bool, runner: str) -> vitrail.Model:
        stored = HALF if dtype == torch.float32 else dtype
        folder = self.folder(name, stored, outliers)
        model = vitrail.load(folder, device=DEVICE, dtype=dtype, backend=runner)
        wanted = SERVES if runner == "auto" else runner
        assert model.backend == wanted, f"{model.backend} serves {dtype}"
        return model


def images(count: int, size: tuple[int, int] | None = None, seed: int = 0) -> Tensor:
    """Smooth pixels of many colors and contrasts, so that embeddings differ: fp32, on the device.

    ``size``: 224 by 224 unless given; small in a dry run.
    """
    height, width = (32, 32) if DRY else size or (224, 224)
    dice = generator(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=dice, device=DEVICE)

    color, contrast = 1.5 * noise(3, 1, 1), noise(1, 1, 1).abs() + 0.3
    shapes = F.interpolate(noise(3, 4, 4), (height, width), mode="bicubic")
    return color + contrast * shapes + 0.1 * noise(3, height, width)


def texts(model: vitrail.Model, count: int, seed: int = 0) -> list[list[int]]:
    """Token ids that end with the end token, of all lengths from 2 on."""
    spec = model.spec.text
    assert spec is not None, "the model has a text tower"
    assert spec.eos is not None, "its end token is known"
    rows = texts_with_end(count, spec.context, vocab=spec.vocab, eos=spec.eos, seed=seed, first=1)
    return [row[: row.index(spec.eos) + 1] for row in rows.tolist()]


def padded(ids: list[list[int]]) -> Tensor:
    """(N, T) int64 on the device, the last token again and again after the end."""
    longest = max(map(len, ids))
    return torch.tensor([row + row[-1:] * (longest - len(row)) for row in ids], device=DEVICE)


def in_parts(function: Callable[[Tensor], Tensor], values: Tensor, step: int = 64) -> Tensor:
    """``function`` of ``step`` items at a time."""
    return torch.cat([function(part) for part in values.split(step)])
