"""Results of the calls of a `Model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from vitrail.errors import InputError


@dataclass(frozen=True, slots=True)
class EncodeResult:
    """Embeddings of the images that succeed.

    ``embeddings`` (K, D) fp32; ``index``: position in the input of each row; ``errors``: the reason
    for each position without a row.
    """

    embeddings: Tensor
    index: tuple[int, ...]
    errors: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class PreprocessResult:
    """Pixels of the images that succeed.

    ``pixel_values`` (K, channels, H, W) fp32; ``index`` and ``errors`` as in `EncodeResult`.
    """

    pixel_values: Tensor
    index: tuple[int, ...]
    errors: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Classification:
    """``probs`` and ``logits`` (K, L) fp32 over ``labels``; ``index`` and ``errors`` as in
    `EncodeResult`.

    The probabilities of a row add up to 1, except for a multi-label head: there each label has a
    probability of its own. For a regression head ``probs`` are the logits.
    """

    labels: tuple[str, ...]
    probs: Tensor
    logits: Tensor
    index: tuple[int, ...]
    errors: Mapping[int, str]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """The ``k`` most probable labels of each row with their probabilities, descending.

        Raises InputError if ``k`` is less than 1.
        """
        if k < 1:
            raise InputError(f"k: got {k}, wanted 1 or more")
        top = self.probs.topk(min(k, len(self.labels)), dim=1)
        return [
            [(self.labels[label], prob) for label, prob in zip(labels, probs, strict=True)]
            for labels, probs in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Output:
    """The output fields of the checkpoint's transformers class; fields that it lacks are None.

    B items of T tokens, width C, embedding width D, L labels. ``last_hidden_state`` (B, T, C);
    ``pooler_output`` (B, C), or inside a CLIPModel the embedding (B, D), as in transformers 5;
    ``hidden_states``: the residual stream (B, T, C) before every block and after the last, without
    the final LayerNorm; ``logits`` (B, L); ``image_embeds`` and ``text_embeds`` (B, D), of unit
    length in a CLIPModel; ``logits_per_image`` (images, texts) and its transpose
    ``logits_per_text``. ``status`` (B,) int32: 0 if every number returned for the item is finite,
    else 1; a CLIPModel with both inputs has the images first, then the texts.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    logits: Tensor | None = None
    cls_logits: Tensor | None = None
    distillation_logits: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    vision_model_output: Output | None = None
    text_model_output: Output | None = None
    status: Tensor | None = None
