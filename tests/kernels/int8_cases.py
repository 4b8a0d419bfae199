"""Inputs of the int8 operators, and their formulas in fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.test_operators import EXPLICIT, normal
from vitrail_kernels.ops.linear_int8_grouped import FLOAT_OF_INTEGER

HALF = torch.float16


def codes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape) * 0.01 + 0.005


def int8_case(m: int, n: int, k: int) -> list[Tensor]:
    """x, x_scale, weight, weight_scale and bias of `linear_int8`, with values near 1."""
    x, weight = codes(m, k), codes(n, k)
    return [x, scales(m), weight, scales(n) * (3.0 / k**0.5), normal(n)]


def exact_linear_int8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    *,
    activation: str | None = None,
    gated: bool = False,
) -> Tensor:
    """The formula in fp64, of which the sums of products are integers."""
    y = (x.double() @ weight.double().t()) * x_scale.double()[:, None] * weight_scale.double()
    y += bias.double()
    if gated:
        return EXPLICIT[activation or "silu"](y[:, 0::2]) * y[:, 1::2]
    return EXPLICIT[activation](y)


def grouped_case(
    m: int, n: int, k: int, group: int, *, unsigned: bool = True, **has: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arguments of `linear_int8_grouped` besides ``out``; ``has``: its optional tensors."""
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    weight = codes(n, k)
    sums = weight.view(n, -1, group).double().sum(2).t()
    tensors = {
        "x": x,
        "x_scale": scales(k // group, m),
        "weight": weight,
        "weight_scale": scales(n) * (3.0 / k**0.5),
        "shift": (FLOAT_OF_INTEGER - 128.0 * unsigned * sums).float().contiguous(),
        "bias": normal(n),
    }
    if has.get("scale"):
        tensors["scale"] = normal(n)
    if has.get("residual"):
        tensors["residual"] = normal(m, n, dtype=HALF)
    if has.get("residual_rows"):
        tensors["residual"] = normal(2 * m + 1, n, dtype=HALF)
        tensors["residual_rows"] = torch.randint(2 * m + 1, (m,), dtype=torch.int32)
    return tensors, {"group": group}


def exact_grouped(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    shift: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    residual_rows: Tensor | None = None,
    *,
    group: int,
) -> Tensor:
    """The formula in fp64. Codes less 128 are made whole again, not by ``shift``'s arithmetic."""
    unsigned = bool((shift != FLOAT_OF_INTEGER).any())
    y = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    values = (x.double() + 128 * unsigned) * x_scale.t().double().repeat_interleave(group, dim=1)
    y = (values @ weight.double().t()) * weight_scale.double() + bias.double()
    if scale is not None:
        y *= scale.double()
    if residual is not None:
        picked = residual if residual_rows is None else residual[residual_rows.long()]
        y += picked.double()
    return y
