"""linear: out = residual + scale * act(norm(x)[rows] W^T + b)

norm   LayerNorm without affine part, gamma and beta being folded into W and b
act    none, GELU (erf), tanh-GELU, QuickGELU, ReLU, SiLU, tanh; gated: act(gate) * up
FLOPs  2 M N K            bytes  M K + N K + M N (+ M N residual), in the compute dtype
bound  by the tensor cores once M passes a few hundred rows, by the read of W below that
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail_kernels.cost import Cost, traffic


def _activate_(y: Tensor, activation: str) -> Tensor:
    """Apply the activation, in place where the dtype allows it; 16-bit values go through fp32."""
    if y.dtype in (torch.float16, torch.bfloat16):
        return _activate_(y.float(), activation).to(y.dtype)
    if activation == "gelu":
        return torch.ops.aten.gelu_(y)  # type: ignore[no-any-return]
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_(y, approximate="tanh")  # type: ignore[no-any-return]
    if activation == "quick_gelu":
        # x sigmoid(1.702 x) = silu(1.702 x) / 1.702: three passes in place, no temporary
        return torch.ops.aten.silu_(y.mul_(1.702)).mul_(1 / 1.702)  # type: ignore[no-any-return]
    if activation == "relu":
        return y.relu_()
    if activation == "silu":
        return torch.ops.aten.silu_(y)  # type: ignore[no-any-return]
    if activation == "tanh":
        return y.tanh_()
    raise ValueError(f"activation: got {activation!r}, wanted a name the operator knows")


def linear_ref(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    rows: Tensor | None = None,
    residual_rows: Tensor | None = None,
    *,
    norm_eps: float | None = None,
    activation: str | None = None,
    gated: bool = False,
) -> None:
    """Write ``out`` (M', N), in its dtype; ``gated``: (M', N / 2).

    ``x`` (M, K); ``weight`` (N, K), with gate and up rows interleaved pairwise where ``gated``;
    ``bias`` and ``scale`` (N,) fp32; ``residual`` (M, N), may be ``out`` itself; ``rows`` (M',)
    picks rows of ``x``, ``residual_rows`` (M',) of ``residual``. ``norm_eps``: normalise each row
    of ``x`` first (biased variance, fp32).
    """
    if rows is not None:
        x = x.index_select(0, rows)
    if residual is not None and residual_rows is not None:
        residual = residual.index_select(0, residual_rows)
    if norm_eps is not None:
        x = F.layer_norm(x, (x.shape[1],), eps=norm_eps)
    plain = scale is None and activation is None and not gated
    if residual is not None and plain and out.dtype == x.dtype == torch.float32:
        # no temporary, and the same order of additions whether out is the residual or not;
        # 16-bit sums take the way below, which rounds once less
        if bias is not None:
            torch.add(residual, bias, out=out)
        elif residual is not out:
            out.copy_(residual)
        torch.addmm(out, x, weight.t(), out=out)
        return
    direct = residual is None and not gated and scale is None and out.dtype == x.dtype
    y = out if direct else torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    if bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias.to(x.dtype), x, weight.t(), out=y)
    if gated:
        gate = _activate_(y[:, 0::2].contiguous(), activation or "silu")
        y = gate.mul_(y[:, 1::2])
    elif activation is not None:
        y = _activate_(y, activation)
    if scale is not None:
        y = y * scale
    if residual is not None:
        torch.add(residual, y, out=out) if y.dtype == out.dtype else out.copy_(residual + y)
    elif y is not out:
        out.copy_(y)


def linear_cost(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    rows: Tensor | None = None,
    residual_rows: Tensor | None = None,
    **_: object,
) -> Cost:
    """FLOPs of the rows computed; a gathered operand is read at those rows only."""
    m, (n, k) = out.shape[0], weight.shape
    gathered = m * k * x.element_size()
    skipped = 0 if residual is None else m * n * residual.element_size()
    return Cost(
        2 * m * n * k, gathered + skipped + traffic(out, weight, bias, scale, rows, residual_rows)
    )
