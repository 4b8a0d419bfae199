"""What a model gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from vitrail.errors import InputError


@dataclass(frozen=True, slots=True)
class EncodeResult:
    """Embeddings of the inputs that could be read.

    ``embeddings`` (K, D) fp32; ``index``: position in the input of each row; ``errors``: position
    -> reason for every input without a row.
    """

    embeddings: Tensor
    index: tuple[int, ...]
    errors: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Classification:
    """``probs`` and ``logits`` (N, L) fp32 over ``labels``.

    The probabilities of a row add up to 1, except for a multi-label head, where each is its own;
    of a regression they are the logits themselves.
    """

    labels: tuple[str, ...]
    probs: Tensor
    logits: Tensor

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each image the ``k`` most probable labels, best first."""
        if k < 1:
            raise InputError(f"k: got {k}, wanted 1 or more")
        best = self.probs.topk(min(k, len(self.labels)), dim=1)
        return [
            [(self.labels[i], p) for i, p in zip(row, values, strict=True)]
            for row, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Output:
    """The fields of the transformers output of the checkpoint's class; those it lacks are None.

    B sequences of T tokens, width C, projection D. ``hidden_states``: the residual stream before
    every block and after the last, not normalised. ``pooler_output`` of a tower inside a CLIPModel
    is the projected embedding, as transformers 5 has it. ``status`` (B,) int32: 0 where every
    returned number of the item is finite, else 1; of a CLIPModel with both towers: of the images,
    then of the texts.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    logits: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    vision_model_output: Output | None = None
    text_model_output: Output | None = None
    status: Tensor | None = None
