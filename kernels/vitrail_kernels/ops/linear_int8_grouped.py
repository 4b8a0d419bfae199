"""linear_int8_grouped: out = residual + scale * (weight_scale sum_g x_scale_g (x_g W_g^T) + b)

x      int8 codes in groups of columns, with a scale for each row and group
W      int8, one scale a row
FLOPs  2 M N K            bytes  M K + N K + M N (+ M N residual)
bound  by the tensor cores from a few hundred rows on, by the read of W below that

An accumulator that begins at the bits of 1.5 * 2^23 is the float 1.5 * 2^23 + sum, since |sum| is
below 2^22 for up to 256 columns. Subtracting ``shift`` is then exact: it removes 1.5 * 2^23 and, if
codes are unsigned less 128, adds 128 times the sum of the weight's codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrail_kernels.device.stats import stats_ref
from vitrail_kernels.int8_product import int8_product

FLOAT_OF_INTEGER = 12582912.0
"""1.5 * 2^23: the float whose bits plus an integer n, |n| < 2^22, are those of 1.5 * 2^23 + n."""


def linear_int8_grouped_ref(
    out: Tensor,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    shift: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    residual_rows: Tensor | None = None,
    stats: Tensor | None = None,
    *,
    group: int = 128,
) -> None:
    """Write ``out`` (M, N) from int8 ``x`` (M, K) and ``weight`` (N, K), with K a multiple of
    ``group``.

    fp32: ``x_scale`` (K / group, M), ``weight_scale`` (N,), ``shift`` (K / group, N), ``bias``
    (N,), ``scale`` (N,). ``shift`` is `FLOAT_OF_INTEGER` less 128 times the group's sum of codes of
    the weight's row if the codes of ``x`` are unsigned less 128, else `FLOAT_OF_INTEGER`.
    ``residual`` may be ``out`` itself; ``residual_rows`` (M,) picks its rows. ``stats``
    (2 chunks, M) receives the row statistics of ``out``.
    """
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
    for number, start in enumerate(range(0, x.shape[1], group)):
        columns = slice(start, start + group)
        sums = int8_product(x[:, columns].contiguous(), weight[:, columns].contiguous()).float()
        sums += FLOAT_OF_INTEGER - shift[number]
        total.addcmul_(sums, x_scale[number][:, None])
    y = total.mul_(weight_scale).add_(bias)
    if scale is not None:
        y.mul_(scale)
    if residual is not None:
        y += residual if residual_rows is None else residual.index_select(0, residual_rows)
    out.copy_(y)
    if stats is not None:
        stats_ref(stats, out)
