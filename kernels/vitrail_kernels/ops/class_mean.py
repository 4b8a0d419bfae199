"""class_mean: the class token, followed by the mean of the patch tokens (DINOv2's linear head)

out = (x[0], mean of x[prefix:])      bytes  M C + 2 B C      bound  by memory
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrail_kernels.configs import KernelConfig, config_key, tuned
from vitrail_kernels.cost import memory_cost
from vitrail_kernels.device.overlap import wait_for_previous
from vitrail_kernels.launch import Call, Grid, Target, cdiv, check_tensor, jit, tl
from vitrail_kernels.operator import Operator
from vitrail_kernels.ops.layernorm import check_rows


def class_mean_ref(out: Tensor, x: Tensor, *, tokens: int, prefix: int) -> None:
    """Write ``out`` (B, 2 C) from ``x`` (B tokens, C).

    A row of ``out`` is the first of a sequence's ``tokens`` rows, followed by the mean of its rows
    from ``prefix`` on.
    """
    sequences = x.view(-1, tokens, x.shape[1])
    width = x.shape[1]
    out[:, :width] = sequences[:, 0]
    wide = torch.promote_types(x.dtype, torch.float32)
    out[:, width:] = sequences[:, prefix:].mean(dim=1, dtype=wide)


@jit(varying=("tokens",))
def _class_mean_kernel(
    out_ptr: tl.tensor,  # (B, 2 WIDTH)
    x_ptr: tl.tensor,  # (B tokens, WIDTH)
    tokens: int,
    PREFIX: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A program makes BLOCK_N columns of a sequence."""
    wait_for_previous(PDL)
    ACROSS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    sequence = (tl.program_id(0) // ACROSS).to(tl.int64)
    column = tl.program_id(0) % ACROSS * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = column < WIDTH
    offs_m = tl.arange(0, BLOCK_M)
    x_ptr += sequence * tokens * WIDTH
    out_ptr += sequence * (2 * WIDTH)
    tl.store(out_ptr + column, tl.load(x_ptr + column, mask=mask, other=0.0), mask=mask)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(PREFIX, tokens, BLOCK_M):
        inside = (offs_m < tokens - start)[:, None] & mask[None, :]
        base = x_ptr + tl.cast(start, tl.int64) * WIDTH
        ptrs = base + offs_m[:, None] * WIDTH + column[None, :]
        total += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / (tokens - PREFIX)
    mean = mean.to(out_ptr.dtype.element_ty)  # the only rounding
    tl.store(out_ptr + WIDTH + column, mean, mask=mask)


# -- the calls -------------------------------------------------------------------------------------


CLASS_MEAN_CONFIG = KernelConfig(
    64, 64, 0, 4, 1, reason="128 bytes of a row at once, many programs, 32 values a thread"
)


def class_mean_calls(
    target: Target, out: Tensor, x: Tensor, *, tokens: int, prefix: int
) -> list[Call]:
    """The launch of `class_mean_ref`.

    Raises ValueError for a shape, dtype or layout that the kernel does not take, and if no token
    follows the prefix.
    """
    check_rows("class_mean", x, None)
    if not 0 <= prefix < tokens or x.shape[0] % tokens:
        raise ValueError(
            f"class_mean: got {x.shape[0]} rows in sequences of {tokens} with a prefix of {prefix},"
            " wanted whole sequences, each longer than its prefix"
        )
    batch, width = x.shape[0] // tokens, x.shape[1]
    check_tensor("class_mean: out", out, x, x.dtype, (batch, 2 * width))
    key = config_key("class_mean", x.dtype, str(width))
    config = tuned(target.arch).get(key, CLASS_MEAN_CONFIG)
    arguments = {
        "out_ptr": out,
        "x_ptr": x,
        "tokens": tokens,
        "PREFIX": prefix,
        "WIDTH": width,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PDL": target.pdl,
    }
    grid = Grid(batch, times=cdiv(width, config.block_n))
    return [Call(_class_mean_kernel, grid, arguments, config, key)]


CLASS_MEAN = Operator("class_mean", class_mean_ref, class_mean_calls, memory_cost)
