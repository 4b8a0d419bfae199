"""The models whose shapes are measured, as published: spec by short name, and how many at once."""

from __future__ import annotations

from vitrail.spec import BlockSpec, TextSpec, VisionSpec

EOS, BOS = 49407, 49406

_BASE = (768, 12, 12, 3072)  # width, layers, heads, mlp
_LARGE = (1024, 24, 16, 4096)
_HUGE = (1280, 32, 16, 5120)


def _clip(patch: int, blocks: BlockSpec, projection: int) -> VisionSpec:
    side = (224, 224)
    return VisionSpec(
        blocks,
        image=side,
        patch=(patch, patch),
        patch_bias=False,
        pre_norm=True,
        norm="pooled",
        projection=projection,
    )


VISION: dict[str, VisionSpec] = {
    "B/32": _clip(32, BlockSpec(*_BASE, activation="quick_gelu", eps=1e-5), 512),
    "B/16": VisionSpec(BlockSpec(*_BASE, activation="gelu", eps=1e-12), (224, 224), (16, 16)),
    "L/14": _clip(14, BlockSpec(*_LARGE, activation="quick_gelu", eps=1e-5), 768),
    "H/14": _clip(14, BlockSpec(*_HUGE, activation="gelu", eps=1e-5), 1024),
    "DINOv2-B@518": VisionSpec(
        BlockSpec(*_BASE, activation="gelu", eps=1e-6, layer_scale=True), (518, 518), (14, 14)
    ),
}
"""CLIP B/32 and L/14 of OpenAI, CLIP H/14 of LAION, ViT-B/16 of Google, DINOv2-B of Meta."""

TEXT: dict[str, TextSpec] = {
    "CLIP-B text": TextSpec(
        BlockSpec(512, 12, 8, 2048, activation="quick_gelu", eps=1e-5, causal=True),
        vocab=49408,
        context=77,
        eos=EOS,
        projection=512,
    ),
}

CAPTIONS = tuple(5 + 35 * (37 * i % 256) // 255 for i in range(256))
"""Tokens of 256 captions, begin and end among them: 5 to 40, evenly, in no order."""

KERNEL_BATCHES: dict[str, tuple[int, ...]] = {
    "B/16": (256, 64, 1),
    "L/14": (256,),
    "B/32": (256,),
    "H/14": (64,),
    "DINOv2-B@518": (32,),
}
"""B/16 at 64 too: its narrow linears then fill the card two and a quarter times, a quarter idle."""
MODEL_CASES = (
    ("B/16", 256),
    ("L/14", 256),
    ("B/16", 1),
    ("CLIP-B text", len(CAPTIONS)),
    ("DINOv2-B@518", 32),
    ("B/16", 64),
    ("L/14", 64),
    ("B/32", 256),
    ("B/16", 8),
    ("B/32", 64),
    ("CLIP-B text", 1),
    ("L/14", 1),
)
"""Whole models and batches, the most wanted first: compiling the peers takes minutes in all."""


def captions(batch: int) -> tuple[int, ...]:
    """How many tokens each of ``batch`` captions has."""
    return CAPTIONS[:batch] if batch > 1 else (12,)
