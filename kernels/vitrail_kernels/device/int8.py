"""Int8 codes inside a kernel: from sums of products to values, and from values to codes."""

from __future__ import annotations

from vitrail_kernels.device.activations import activate
from vitrail_kernels.device.tile import epilogue, part_of
from vitrail_kernels.launch import jit, tl


@jit()
def to_int8(y: tl.tensor, LEAST: tl.constexpr) -> tl.tensor:
    """The nearest integer to fp32 values, ties to even, clamped to [LEAST, 127]. NaN gives any.

    Adding 1.5 * 2^23 leaves the integer in the low bits. This is one add, where a conversion would
    take a slower unit.
    """
    y = tl.minimum(tl.maximum(y, LEAST * 1.0), 127.0)
    return (y + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@jit()
def scale_of(top: tl.tensor, total: tl.tensor, LEVELS: tl.constexpr) -> tl.tensor:
    """The scale and its inverse for rows whose largest value is ``top``, of sum ``total``.

    A hardware maximum drops NaN, so that codes alone would make finite numbers of it. The sum
    keeps it: 0 times the sum makes the scale NaN.
    """
    TINY: tl.constexpr = 1e-30
    top = tl.maximum(top, TINY)
    return top / LEVELS + 0.0 * total, LEVELS / top


@jit()
def finish(
    acc: tl.tensor,  # (BLOCK_M, BLOCK_N) int32
    x_scale: tl.tensor,  # (BLOCK_M,) fp32
    weight_scale_ptr: tl.tensor,  # (N,) fp32
    bias_ptr: tl.tensor,  # (N,) fp32
    column: int,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """The values of a tile in fp32: scaled, biased and activated; half as wide if gated."""
    offs_n = column + tl.arange(0, BLOCK_N)
    weight_scale = tl.load(weight_scale_ptr + offs_n, mask=offs_n < N, other=0.0)
    bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
    y = tl.fma(acc.to(tl.float32) * x_scale[:, None], weight_scale[None, :], bias[None, :])
    if GATED:
        gate, up = tl.split(tl.reshape(y, (BLOCK_M, BLOCK_N // 2, 2)))
        return activate(gate, ACTIVATION) * up
    else:
        return activate(y, ACTIVATION)


@jit()
def finish_halves(
    acc: tl.tensor,  # (BLOCK_M, BLOCK_N) int32
    x_scale: tl.tensor,  # (BLOCK_M,) fp32
    weight_scale_ptr: tl.tensor,  # (N,) fp32
    bias_ptr: tl.tensor,  # (N,) fp32
    column: int,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """`finish` of both halves of a tile, in fp16, which takes half the registers until the largest
    value of a row is known."""
    HALF: tl.constexpr = BLOCK_N // 2
    left = finish(
        part_of(acc, 0, 2, BLOCK_M, BLOCK_N),
        x_scale, weight_scale_ptr, bias_ptr, column, N, ACTIVATION, GATED, BLOCK_M, HALF,
    )  # fmt: skip
    left = left.to(tl.float16)
    right = finish(
        part_of(acc, 1, 2, BLOCK_M, BLOCK_N),
        x_scale, weight_scale_ptr, bias_ptr, column + HALF, N, ACTIVATION, GATED, BLOCK_M, HALF,
    )  # fmt: skip
    return left, right.to(tl.float16)


@jit()
def scale_of_halves(left: tl.tensor, right: tl.tensor, OFFSET: tl.constexpr) -> tl.tensor:
    """The scale and its inverse for the rows of a group, given as two fp16 halves.

    OFFSET is added to values whose codes need no sign; it is None if codes have a sign.
    """
    left = left.to(tl.float32)
    right = right.to(tl.float32)
    total = tl.sum(left + right, axis=1)
    if OFFSET is None:
        return scale_of(tl.max(tl.maximum(tl.abs(left), tl.abs(right)), axis=1), total, 127.0)
    else:
        return scale_of(tl.max(tl.maximum(left, right), axis=1) + OFFSET, total, 255.0)


@jit()
def codes_of(y: tl.tensor, inverse: tl.tensor, OFFSET: tl.constexpr) -> tl.tensor:
    """The codes of fp16 values, by the inverse scale of their rows."""
    y = y.to(tl.float32)
    if OFFSET is None:
        return to_int8(y * inverse[:, None], -128)
    else:
        return to_int8(tl.fma(y + OFFSET, inverse[:, None], -128.0), -128)


@jit()
def load_group(
    x_scale_ptr: tl.tensor,  # (groups, M) fp32
    shift_ptr: tl.tensor,  # (groups, N) fp32
    group: int,
    row: int,
    column: int,
    m: int,
    x_scale_stride: int,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """A group's scales of a tile's rows and shifts of its columns.

    The tile's place is added to the pointers first, so that threads keep their offsets.
    """
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    x_scales = x_scale_ptr + (group * tl.cast(x_scale_stride, tl.int64) + row)
    x_scale = tl.load(x_scales + offs_m, mask=offs_m < m - row, other=0.0)
    shifts = shift_ptr + (group * N + column)
    if N % BLOCK_N == 0:
        return x_scale, tl.load(shifts + offs_n)
    else:
        return x_scale, tl.load(shifts + offs_n, mask=offs_n < N - column, other=0.0)


@jit()
def add_group(
    total: tl.tensor,  # (BLOCK_M, BLOCK_N) fp32
    acc: tl.tensor,  # (BLOCK_M, BLOCK_N) int32, begun at the bits of 1.5 * 2^23
    shift: tl.tensor,  # (BLOCK_N,) fp32
    x_scale: tl.tensor,  # (BLOCK_M,) fp32
) -> tl.tensor:
    """``total`` plus the scaled sums of a group. The subtraction is exact."""
    sums = acc.to(tl.float32, bitcast=True) - shift[None, :]
    return tl.fma(sums, x_scale[:, None], total)


@jit()
def finish_sums(
    total: tl.tensor,  # (BLOCK_M, BLOCK_N) fp32
    out_dtype: tl.constexpr,
    weight_scale_ptr: tl.tensor,  # (N,) fp32
    bias_ptr: tl.tensor,  # (N,) fp32
    scale_ptr: tl.tensor,  # (N,) fp32 or None
    residual_ptr: tl.tensor,  # (M', N) or None
    residual_rows_ptr: tl.tensor,  # (M,) int32 or None
    stats_ptr: tl.tensor,  # (2 chunks, M) fp32 or None
    stats_stride: int,
    offs_m: tl.tensor,  # (BLOCK_M,)
    mask_m: tl.tensor,  # (BLOCK_M,)
    column: int,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """The rounded values of a tile from the sums of its groups; also writes the statistics."""
    offs_n = column + tl.arange(0, BLOCK_N)
    weight_scale = tl.load(weight_scale_ptr + offs_n, mask=offs_n < N, other=0.0)
    bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
    y = tl.fma(total, weight_scale[None, :], bias[None, :])
    return epilogue(
        y, out_dtype, None, scale_ptr, residual_ptr, residual_rows_ptr, None, stats_ptr,
        stats_stride, None, None, offs_m, mask_m, column,
        N, False, None, False, BLOCK_M, BLOCK_N,
        PAIRED=True,  # loads of int8 have other layouts in other tiles, also beside a residual
    )  # fmt: skip
