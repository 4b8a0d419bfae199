"""Weights rounded to int8 codes with a scale for each row: to the nearest code, or by GPTQ.

GPTQ rounds a column at a time and lets the later columns make up for its error, so that the error
of the outputs, not that of the weight, is small. Source: Frantar et al., GPTQ, arXiv 2210.17323,
algorithm 1. Columns go in the order of falling input energy, and scales are fixed beforehand.
"""

import torch
from torch import Tensor

from vitrail.errors import VitrailError

LARGEST = 127
DAMPING = (0.01, 0.1, 1.0)
"""Added to the diagonal of the Hessian, as fractions of its mean: the first with which a Cholesky
decomposition exists."""
BLOCK = 128
"""Columns whose errors are added up before the columns after them are updated."""
SMALLEST = 2.0**-126


def row_scales(weight: Tensor) -> Tensor:
    """(N,) fp32: the largest magnitude of each row of ``weight`` (N, K) over 127; 1 for a row of
    zeros."""
    top = weight.abs().amax(dim=1).double()
    scale = torch.where(top > 0, top / LARGEST, 1.0).float()
    return scale.clamp(min=SMALLEST)


def round_nearest(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 codes (N, K) in [-127, 127] of ``weight`` with a ``scale`` (N,) for each row."""
    return _codes(weight.double(), scale.double()[:, None]).to(torch.int8)


def round_gptq(weight: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """As `round_nearest`, by GPTQ. ``hessian`` (K, K) fp64: the sum of x^T x of the inputs.

    Raises VitrailError if the Hessian is not finite.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order])
    # columns as rows, so that each is contiguous
    columns = weight.double()[:, order].t().contiguous()
    codes = torch.empty_like(columns, dtype=torch.int8)
    scales = scale.double()
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        block, errors = columns[start:stop], torch.empty_like(columns[start:stop])
        inner = factor[start:stop, start:stop]
        for row in range(stop - start):
            code = _codes(block[row], scales)
            codes[start + row] = code.to(torch.int8)
            errors[row] = (block[row] - code * scales) / inner[row, row]
            block[row + 1 :].addr_(inner[row, row + 1 :], errors[row], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return codes[torch.argsort(order)].t().contiguous()


def _codes(values: Tensor, scales: Tensor) -> Tensor:
    return (values / scales).round_().clamp_(-LARGEST, LARGEST)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian."""
    mean = float(hessian.diagonal().mean())
    if not torch.isfinite(hessian).all():
        raise VitrailError("gptq: got inputs that are not finite, wanted finite activations")
    for damping in DAMPING:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean or 1.0)
        factor, failure = torch.linalg.cholesky_ex(damped)
        if failure == 0:
            inverse = torch.cholesky_inverse(factor)
            upper: Tensor
            upper, failure = torch.linalg.cholesky_ex(inverse, upper=True)
            if failure == 0:
                return upper
    raise VitrailError("gptq: got a Hessian without a Cholesky decomposition; use --no-gptq")
