"""How near a model's outputs are to a reference, and whether that is near enough.

The rules are those of docs/numerics.md for whole models: in fp32 an absolute bound, in 16 bits
twice the error of PyTorch in the same dtype and a cosine, again without what all items share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MODEL_ATOL = 1e-4
"""Of max|R|, for a whole model in fp32."""
COSINE = {torch.float16: 0.99995, torch.bfloat16: 0.9995}
CENTRED_COSINE = 0.9999
CORPUS = 512
"""Items from which the mean over them means something."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """``worst`` is the item with the lowest cosine; ``error`` the largest, of max|R|.

    ``reasons`` says which rules are broken; none where the two agree.
    """

    items: int
    cosine_mean: float
    cosine_worst: float
    worst: int
    error: float
    reasons: tuple[str, ...]


def agree(
    y: Tensor,
    r: Tensor,
    dtype: torch.dtype = torch.float32,
    p: Tensor | None = None,
    *,
    cosines: bool = True,
) -> Agreement:
    """``y`` (N, ...) of ``dtype`` against the reference ``r`` in fp32, and ``p``, PyTorch's own.

    Without ``p`` a 16-bit result is judged by its cosines alone; ``cosines=False`` leaves those
    out, for scores, which are too few or too alike to have one.
    """
    items = len(r) if r.dim() else 1
    y, r = (x.detach().double().cpu().reshape(items, -1) for x in (y, r))
    if not torch.isfinite(y).all():
        item = int((~torch.isfinite(y)).any(dim=1).nonzero()[0])
        why = f"item {item} holds numbers that are not finite"
        return Agreement(items, float("nan"), float("nan"), item, float("inf"), (why,))
    cosine = torch.nn.functional.cosine_similarity(y, r, dim=1, eps=0.0)
    top = float(r.abs().max())
    error = float((y - r).abs().max())
    reasons: list[str] = []
    if dtype == torch.float32:
        if error > MODEL_ATOL * top:
            at = int((y - r).abs().argmax())
            wanted = f"wanted {MODEL_ATOL * top:.3e} of {top:.3g}"
            reasons.append(f"largest error {error:.3e} at {at}, {wanted}")
    else:
        if p is not None:
            reasons += _beyond(y, r, p.detach().double().cpu().reshape(items, -1))
        if cosines:
            reasons += _apart(y, r, cosine, dtype)
    worst = int(cosine.argmin())
    mean, lowest = float(cosine.mean()), float(cosine[worst])
    return Agreement(items, mean, lowest, worst, error / top if top else 0.0, tuple(reasons))


def _beyond(y: Tensor, r: Tensor, p: Tensor) -> Iterator[str]:
    ours, theirs = (y - r).norm(dim=1), (p - r).norm(dim=1)
    for label, got, peer in (
        ("mean", ours.mean(), theirs.mean()),
        ("99th percentile", ours.quantile(0.99), theirs.quantile(0.99)),
        ("largest", ours.max(), theirs.max()),
    ):
        if got > 2 * peer:
            yield f"{label} error {got:.3e}, PyTorch's own {peer:.3e}"


def _apart(y: Tensor, r: Tensor, cosine: Tensor, dtype: torch.dtype) -> Iterator[str]:
    worst = float(cosine.min())
    if worst < COSINE[dtype]:
        yield f"worst cosine {worst:.7f}, wanted {COSINE[dtype]}"
    if len(r) >= CORPUS and dtype == torch.float16:
        mean = r.mean(dim=0)
        centred = torch.nn.functional.cosine_similarity(y - mean, r - mean, dim=1, eps=0.0)
        if float(centred.min()) < CENTRED_COSINE:
            yield f"worst centred cosine {float(centred.min()):.7f}, wanted {CENTRED_COSINE}"
