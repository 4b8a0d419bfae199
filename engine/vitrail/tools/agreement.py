"""Compares a model's outputs with a reference, by the rules that docs/numerics.md has for models.

A float32 result needs a largest error below an absolute bound. A 16-bit result needs at most twice
the error of PyTorch in the same dtype, and high cosines, also after the mean of all items is
subtracted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vitrail.int8 import similarity

MODEL_ATOL = 1e-4
"""Largest error of a model in float32, as a fraction of the reference's largest value."""
COSINE = {torch.float16: 0.99995, torch.bfloat16: 0.9995}
CENTERED_COSINE = 0.9999
CORPUS = 512
"""The mean over fewer items is not subtracted: it would be too noisy."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """``worst`` is the item with the lowest cosine; ``error`` is the largest error, as a fraction
    of the reference's largest value. ``reasons`` names the broken rules; empty if all hold.
    """

    items: int
    cosine_mean: float
    cosine_worst: float
    worst: int
    error: float
    reasons: tuple[str, ...]


def compare(
    output: Tensor,
    reference: Tensor,
    dtype: torch.dtype = torch.float32,
    peer: Tensor | None = None,
    *,
    cosines: bool = True,
) -> Agreement:
    """Compares ``output`` (N, ...), computed in ``dtype``, with ``reference`` (N, ...) in float32.

    ``peer`` is PyTorch's own result in ``dtype``; without it the error of a 16-bit result has no
    bound. ``cosines=False`` leaves out the rules for cosines: scores, for example, are too few or
    too similar for them.
    """
    items = len(reference) if reference.dim() else 1
    y, r = (x.detach().double().cpu().reshape(items, -1) for x in (output, reference))
    if not torch.isfinite(y).all():
        item = int((~torch.isfinite(y)).any(dim=1).nonzero()[0])
        reason = f"item {item} holds numbers that are not finite"
        return Agreement(items, float("nan"), float("nan"), item, float("inf"), (reason,))
    cosine = similarity.cosines(y, r)
    top = float(r.abs().max())
    error = float((y - r).abs().max())
    reasons: list[str] = []
    if dtype == torch.float32:
        if error > MODEL_ATOL * top:
            position = int((y - r).abs().argmax())
            bound = f"wanted {MODEL_ATOL * top:.3e} of {top:.3g}"
            reasons.append(f"largest error {error:.3e} at {position}, {bound}")
    else:
        if peer is not None:
            reasons += _large_errors(y, r, peer.detach().double().cpu().reshape(items, -1))
        if cosines:
            reasons += _low_cosines(y, r, cosine, dtype)
    worst = int(cosine.argmin())
    mean, lowest = float(cosine.mean()), float(cosine[worst])
    return Agreement(items, mean, lowest, worst, error / top if top else 0.0, tuple(reasons))


def _large_errors(y: Tensor, r: Tensor, peer: Tensor) -> Iterator[str]:
    ours, theirs = (y - r).norm(dim=1), (peer - r).norm(dim=1)
    for label, error, peer_error in (
        ("mean", ours.mean(), theirs.mean()),
        ("99th percentile", ours.quantile(0.99), theirs.quantile(0.99)),
        ("largest", ours.max(), theirs.max()),
    ):
        if error > 2 * peer_error:
            yield f"{label} error {error:.3e}, PyTorch's own {peer_error:.3e}"


def _low_cosines(y: Tensor, r: Tensor, cosine: Tensor, dtype: torch.dtype) -> Iterator[str]:
    worst = float(cosine.min())
    if worst < COSINE[dtype]:
        yield f"worst cosine {worst:.7f}, wanted {COSINE[dtype]}"
    if len(r) >= CORPUS and dtype == torch.float16:
        lowest = float(similarity.centered_cosines(y, r).min())
        if lowest < CENTERED_COSINE:
            yield f"worst centered cosine {lowest:.7f}, wanted {CENTERED_COSINE}"
