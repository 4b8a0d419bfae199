"""The dense pass of a checkpoint, field by field as its transformers class gives it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitrail.model.batches import l2_normalize
from vitrail.model.outputs import Output
from vitrail.runtime.towers import TextTower, VisionTower
from vitrail.spec import ModelSpec, OutputField


def forward_vision(tower: VisionTower, spec: ModelSpec, pixels: Tensor, hidden: bool) -> Output:
    """``pixels`` (B, C, H, W) floats; ``hidden``: with the residual stream of every block.

    Runs in parts if memory is limited; the limit does not count the outputs.
    """
    taps = tuple(range(tower.spec.blocks.layers + 1)) if hidden else ()
    parts = tower.in_parts(
        lambda: tower.dense_plan(pixels, taps),
        pixels,
        lambda part: _vision_output(tower, spec, pixels[part], taps),
        counts_outputs=False,
    )
    return _join(parts)


def _vision_output(
    tower: VisionTower, spec: ModelSpec, pixels: Tensor, taps: tuple[int, ...]
) -> Output:
    layers = tower.spec.blocks.layers
    out = tower.dense(pixels, taps)
    tokens = out["vision.last" if tower.spec.norm == "tokens" else f"vision.hidden.{layers}"]
    pooled, embeds = out.get("vision.pooler"), out.get("vision.embedding")
    if pooled is None and "pooler_output" in spec.outputs:
        pooled = tokens[:, 0].clone()
    logits, class_logits, distillation_logits = _logits(spec, out, tokens)
    return Output(
        last_hidden_state=_returned(spec, "last_hidden_state", tokens),
        pooler_output=_returned(spec, "pooler_output", pooled),
        hidden_states=_hidden(out, "vision", taps),
        logits=logits,
        cls_logits=class_logits,
        distillation_logits=distillation_logits,
        image_embeds=embeds,
        status=finite_status(tokens, pooled, embeds, class_logits, distillation_logits, logits),
    )


def _returned(spec: ModelSpec, field: OutputField, value: Tensor | None) -> Tensor | None:
    """``value`` if the output of the checkpoint's class has such a field."""
    return value if field in spec.outputs else None


def _logits(
    spec: ModelSpec, out: Mapping[str, Tensor], tokens: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Logits, then those of the class token and of the distillation token if each has a classifier.

    Without labels transformers has no classifier, and its logits are the features: the normalized
    tokens (B, T, C) that a classifier would read.
    """
    if spec.features == "class_distillation":
        half = out.get("vision.class_logits", tokens[:, 0] / 2)
        other_half = out.get("vision.distillation_logits", tokens[:, 1] / 2)
        return half + other_half, 2 * half, 2 * other_half
    logits = out.get("vision.logits")
    if logits is None and spec.features is not None:
        assert spec.vision is not None, "a classifier reads an image tower"
        logits = tokens[:, 0]
        if spec.features == "class_mean":
            mean = tokens[:, spec.vision.prefix :].mean(dim=1)
            logits = torch.cat([logits, mean], dim=1)
    return logits, None, None


def forward_text(
    tower: TextTower, spec: ModelSpec, ids: Tensor, kv_lens: Tensor | None, hidden: bool
) -> Output:
    """``ids`` (B, T) int64; ``kv_lens`` (B,): leading tokens of a row that may be attended to.

    In parts, as `forward_vision`.
    """
    taps = tuple(range(tower.spec.blocks.layers + 1)) if hidden else ()

    def compute(part: slice) -> Output:
        return _text_output(
            tower, spec, ids[part], None if kv_lens is None else kv_lens[part], taps
        )

    parts = tower.dense_in_parts(
        ids, compute, taps, masked=kv_lens is not None, counts_outputs=False
    )
    return _join(parts)


def _text_output(
    tower: TextTower, spec: ModelSpec, ids: Tensor, kv_lens: Tensor | None, taps: tuple[int, ...]
) -> Output:
    out = tower.dense(ids, kv_lens, taps)
    embeds = out.get("text.embedding")
    return Output(
        last_hidden_state=out["text.last"],
        pooler_output=_returned(spec, "pooler_output", out["text.pooler"]),
        hidden_states=_hidden(out, "text", taps),
        text_embeds=embeds,
        status=finite_status(out["text.last"], embeds),
    )


def forward_pair(vision: Output | None, text: Output | None, logit_scale: float) -> Output:
    """The fields of a whole CLIPModel, from the outputs of its towers.

    Inside it the ``pooler_output`` of a tower is its projected embedding. ``logit_scale`` is the
    factor itself, after exp.
    """
    image_embeds = None if vision is None else _normalized(vision.image_embeds)
    text_embeds = None if text is None else _normalized(text.text_embeds)
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


def _normalized(embeds: Tensor | None) -> Tensor | None:
    return None if embeds is None else l2_normalize(embeds)


def finite_status(*outputs: Tensor | None) -> Tensor:
    """(B,) int32: 0 if every number of the item is finite in all outputs, else 1."""
    finite = [torch.isfinite(t).flatten(1).all(dim=1) for t in outputs if t is not None]
    return torch.stack(finite).all(dim=0).logical_not().to(torch.int32)


def _hidden(
    out: Mapping[str, Tensor], tower: str, taps: tuple[int, ...]
) -> tuple[Tensor, ...] | None:
    return tuple(out[f"{tower}.hidden.{tap}"] for tap in taps) or None


def _join(parts: Sequence[Output]) -> Output:
    """The outputs of one tower for consecutive items, as one."""
    if len(parts) == 1:
        return parts[0]
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(Output):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], Tensor):
            fields[field.name] = torch.cat(values)
        elif values[0] is not None:
            fields[field.name] = tuple(map(torch.cat, zip(*values, strict=True)))
    return Output(**fields)
