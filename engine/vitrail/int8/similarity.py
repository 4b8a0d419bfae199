"""How like two sets of embeddings, or two outputs of a linear, are.

The mean of all embeddings is common to them, so that it hides what tells pictures apart: on
pictures that look alike, a cosine of 0.9999 went with 14 % of the neighbors lost. Centered cosines
are those of embeddings less the mean of the reference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitrail.int8.figures import Accuracy, LinearFigures

MIN_SHARE = 1e-4
SMALLEST_CHANNEL = 0.25
"""A channel is left out if its variance is less than `MIN_SHARE` of its layer's and less than
`SMALLEST_CHANNEL` of the mean channel's: noise would decide its gain."""
MAX_SQNR = 200.0
"""Stands for infinity, which JSON does not have."""


def cosines(y: Tensor, r: Tensor) -> Tensor:
    """(N,) cosines of the rows of ``y`` and ``r`` (N, D); NaN for a row of zeros."""
    return torch.nn.functional.cosine_similarity(_double(y), _double(r), dim=1, eps=0.0)


def centered_cosines(y: Tensor, r: Tensor) -> Tensor:
    """`cosines` after the mean of the rows of ``r`` is subtracted from both."""
    y, r = _double(y), _double(r)
    mean = r.mean(dim=0)
    return cosines(y - mean, r - mean)


def neighbors_kept(y: Tensor, r: Tensor, count: int) -> float:
    """The mean share of a row's ``count`` nearest rows in ``r`` that are also nearest in ``y``.

    Nearest by the cosine of rows less the mean of ``r``. Both are (N, D). If N is at most ``count``
    every other row is a neighbor, and the share is 1.
    """
    y, r = _double(y), _double(r)
    mean, count = r.mean(dim=0), min(count, len(r) - 1)
    if count < 1:
        return 1.0
    nearest = []
    for rows in (y - mean, r - mean):
        rows = torch.nn.functional.normalize(rows, dim=1)
        similarity = (rows @ rows.t()).fill_diagonal_(-math.inf)
        members = torch.zeros(similarity.shape, dtype=torch.bool)
        nearest.append(members.scatter_(1, similarity.topk(count, dim=1).indices, True))
    return float((nearest[0] & nearest[1]).sum() / (count * len(r)))


def accuracy(y: Tensor, r: Tensor) -> Accuracy:
    """Every figure of embeddings ``y`` against the reference ``r``, (N, D) both with N > 1."""
    if y.shape != r.shape or len(r) < 2:
        raise ValueError(f"got {tuple(y.shape)} and {tuple(r.shape)}, wanted two (N, D), N > 1")
    plain, centered = cosines(y, r), centered_cosines(y, r)
    sums = ChannelSums(r.shape[1])
    sums.add(_double(y), _double(r))
    return Accuracy(
        pictures=len(r),
        cosine_mean=plain.mean().item(),
        cosine_p1=plain.quantile(0.01).item(),
        cosine_worst=plain.min().item(),
        centered_mean=centered.mean().item(),
        centered_p1=centered.quantile(0.01).item(),
        centered_worst=centered.min().item(),
        top1=neighbors_kept(y, r, 1),
        top10=neighbors_kept(y, r, 10),
        sqnr=sums.sqnr,
    )


class ChannelSums:
    """Sums over the rows of outputs y and r, for each channel, from which gains follow.

    Outputs of any number of rows are added one after the other. ``layers``: so many equal layers
    make up the channels, as queries, keys and values do, each with a variance of its own.
    """

    def __init__(self, channels: int, layers: int = 1) -> None:
        self.rows, self._layers = 0, layers
        # <y, r>, <r, r>, <y - r, y - r>, sum of y, sum of r
        self._sums = torch.zeros(5, channels, dtype=torch.float64)

    def add(self, y: Tensor, r: Tensor) -> None:
        """Add the rows of ``y`` and ``r``, (M, channels) both: products in at least fp32, sums in
        fp64."""
        y, r = (x if x.dtype == torch.float64 else x.float() for x in (y, r))
        error = y - r
        self.rows += len(r)
        sums = [x.sum(dim=0, dtype=torch.float64) for x in (y * r, r * r, error * error, y, r)]
        self._sums += torch.stack(sums).cpu()

    @property
    def sqnr(self) -> float:
        """Signal over error in dB, at most `MAX_SQNR`; NaN if both are zero."""
        _, signal, error, *_ = self._sums.sum(dim=1)
        return float((10 * torch.log10(signal / error)).clamp(max=MAX_SQNR))

    @property
    def layer_gain(self) -> float:
        """|<y, r> / <r, r> - 1| of all channels together."""
        product, signal, *_ = self._sums.sum(dim=1)
        return float((product / signal - 1).abs())

    @property
    def channel_gain(self) -> float:
        """The largest |<y, r> / <r, r> - 1| of a channel, and of its deviations from its means.

        Deviations show a scale that is off also where a bias makes up most of the channel.
        """
        product, signal, _, *totals = self._sums
        y_mean, r_mean = (total / self.rows for total in totals)
        variance = signal / self.rows - r_mean**2
        covariance = product / self.rows - y_mean * r_mean
        layers = variance.view(self._layers, -1)
        share = min(MIN_SHARE, SMALLEST_CHANNEL / layers.shape[1])
        large = (layers > share * layers.sum(dim=1, keepdim=True)).flatten()
        gains = torch.stack([product / signal, covariance / variance])[:, large]
        return float((gains - 1).abs().max()) if gains.numel() else math.nan

    @property
    def figures(self) -> LinearFigures:
        return LinearFigures(self.sqnr, self.layer_gain, self.channel_gain)


def linear_figures(y: Tensor, r: Tensor) -> LinearFigures:
    """The figures of a linear's output ``y`` against the reference ``r``, (M, N) both."""
    sums = ChannelSums(r.shape[1])
    sums.add(y, r)
    return sums.figures


def _double(x: Tensor) -> Tensor:
    return x.detach().double().cpu()
