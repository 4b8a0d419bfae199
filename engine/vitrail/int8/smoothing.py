"""SmoothQuant: a scale for each column, divided out of the inputs and multiplied into the weight.

The rewrite is exact: (x / s) (W s)^T = x W^T. With s_j = max|x_j|^alpha / max|W_j|^(1 - alpha) a
column of large inputs no longer sets the scale of its whole row. Source: Xiao et al., SmoothQuant,
arXiv 2211.10438, equation 4; there alpha is 0.5.
"""

import torch
from torch import Tensor

FLOOR = 1e-5
"""The smallest magnitude of a column, as a fraction of the largest. A column that calibration never
saw would else get a scale without bound."""


def smooth_factors(x_top: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """1 / s for each column, (K,) fp32, which `norm_quant` multiplies by.

    ``x_top`` (K,): the largest magnitudes of the inputs' columns. ``weight`` (N, K). The geometric
    mean of the factors is 1: a common factor would change no code, because rows have scales.
    """
    w_top = weight.abs().amax(dim=0).double()
    x_top, w_top = _lifted(x_top.double()), _lifted(w_top)
    log = (1 - alpha) * w_top.log() - alpha * x_top.log()
    return (log - log.mean()).exp().float()


def _lifted(top: Tensor) -> Tensor:
    """Magnitudes of at least `FLOOR` of the largest; ones if all are zero."""
    largest = top.max()
    if largest == 0:
        return torch.ones_like(top)
    return top.clamp(min=FLOOR * float(largest))
