"""The dense pass of a checkpoint, field by field as its transformers class gives it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vitrail.model.outputs import Output
from vitrail.runtime.towers import TextTower, VisionTower
from vitrail.spec import ModelSpec


def unit(x: Tensor) -> Tensor:
    """Rows of ``x`` (N, D) divided by their length; a row of zeros stays one."""
    return torch.nn.functional.normalize(x, dim=1)


def forward_vision(tower: VisionTower, spec: ModelSpec, pixels: Tensor, hidden: bool) -> Output:
    """``pixels`` (B, C, H, W) floats; ``hidden``: with the residual stream of every block."""
    layers = tower.spec.blocks.layers
    out = tower.dense(pixels, tuple(range(layers + 1)) if hidden else ())
    last = out["vision.last" if tower.spec.norm == "tokens" else f"vision.hidden.{layers}"]
    pooler = last[:, 0].clone() if spec.family.startswith("dinov2") else out.get("vision.pooler")
    headed = spec.architecture.endswith("ForImageClassification")
    logits = out.get("vision.logits")
    if headed and logits is None:  # no labels: transformers gives the features themselves
        logits = last[:, 0]
        if spec.family.startswith("dinov2"):
            logits = torch.cat([logits, last[:, tower.spec.prefix :].mean(dim=1)], dim=1)
    projected = spec.architecture == "CLIPVisionModelWithProjection"
    return Output(
        last_hidden_state=None if headed else last,
        pooler_output=None if headed or projected else pooler,
        hidden_states=_hidden(out, "vision", layers) if hidden else None,
        logits=logits,
        image_embeds=out.get("vision.embedding"),
        status=_status(last, pooler, out.get("vision.embedding"), logits),
    )


def forward_text(
    tower: TextTower, spec: ModelSpec, ids: Tensor, kv_lens: Tensor | None, hidden: bool
) -> Output:
    """``ids`` (B, T) int64; ``kv_lens`` (B,): leading tokens of a row that may be attended to."""
    layers = tower.spec.blocks.layers
    out = tower.dense(ids, kv_lens, tuple(range(layers + 1)) if hidden else ())
    projected = spec.architecture == "CLIPTextModelWithProjection"
    return Output(
        last_hidden_state=out["text.last"],
        pooler_output=None if projected else out["text.pooler"],
        hidden_states=_hidden(out, "text", layers) if hidden else None,
        text_embeds=out.get("text.embedding"),
        status=_status(out["text.last"], out.get("text.embedding")),
    )


def forward_pair(vision: Output | None, text: Output | None, logit_scale: float) -> Output:
    """CLIPModel's own fields; inside it a tower's ``pooler_output`` is its projected embedding.

    ``logit_scale`` is the factor itself, after exp.
    """
    image_embeds = None if vision is None else _normalised(vision.image_embeds)
    text_embeds = None if text is None else _normalised(text.text_embeds)
    per_image = per_text = None
    if image_embeds is not None and text_embeds is not None:
        per_text = text_embeds @ image_embeds.t() * logit_scale
        per_image = per_text.t()
    statuses = [out.status for out in (vision, text) if out is not None and out.status is not None]
    return Output(
        image_embeds=image_embeds,
        text_embeds=text_embeds,
        logits_per_image=per_image,
        logits_per_text=per_text,
        vision_model_output=None if vision is None else _inside(vision, vision.image_embeds),
        text_model_output=None if text is None else _inside(text, text.text_embeds),
        status=torch.cat(statuses),
    )


def _inside(out: Output, embeds: Tensor | None) -> Output:
    return Output(
        last_hidden_state=out.last_hidden_state,
        pooler_output=embeds,
        hidden_states=out.hidden_states,
        status=out.status,
    )


def _normalised(embeds: Tensor | None) -> Tensor | None:
    return None if embeds is None else unit(embeds)


def _status(*outputs: Tensor | None) -> Tensor:
    """(B,) int32: 0 where every number of the item is finite in all outputs, else 1."""
    finite = [torch.isfinite(t).flatten(1).all(dim=1) for t in outputs if t is not None]
    return torch.stack(finite).all(dim=0).logical_not().to(torch.int32)


def _hidden(out: Mapping[str, Tensor], tower: str, layers: int) -> tuple[Tensor, ...]:
    return tuple(out[f"{tower}.hidden.{layer}"] for layer in range(layers + 1))
