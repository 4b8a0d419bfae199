"""norm_quant: out = int8 codes of norm(x)[rows] * smooth, with a scale for each row

norm    LayerNorm without its affine part: gamma and beta are folded into the linear that follows
scale   the largest magnitude of the row / 127; codes are rounded to nearest even
FLOPs   no matrix product       bytes  M K (x) + M K (codes), read and written once
bound   by memory
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = 1e-30
"""The smallest magnitude that a scale is computed from, so that a row of zeros has a scale."""


def norm_quant_ref(
    out: Tensor,
    out_scale: Tensor,
    x: Tensor,
    smooth: Tensor,
    rows: Tensor | None = None,
    *,
    eps: float,
) -> None:
    """Write ``out`` (M', K) int8 and ``out_scale`` (M',) fp32 from ``x`` (M, K).

    ``smooth`` (K,) fp32 multiplies each column of the normalized rows (biased variance, fp32).
    ``rows`` (M',) int32 picks rows of ``x``. Code times scale is the value. A row that is not
    finite has the scale NaN.
    """
    if rows is not None:
        x = x.index_select(0, rows)
    y = F.layer_norm(x.float(), (x.shape[1],), smooth, eps=eps)
    top = torch.maximum(y.amax(dim=1), -y.amin(dim=1))
    torch.div(top.clamp(min=TINY), 127, out=out_scale)
    y.mul_((127 / top.clamp(min=TINY))[:, None])
    out.copy_(y.clamp_(-127, 127).round_().nan_to_num_(0))
