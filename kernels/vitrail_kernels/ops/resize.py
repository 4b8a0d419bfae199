"""resize: uint8 images of mixed sizes -> a uint8 window of each, bit for bit as Pillow does

    middle  = clip((2^21 + sum_t u[first + t] weight[t]) >> 22), along each needed line
    out     = the same down the columns of middle

FLOPs  none counted      bytes  pixels + 2 middle + out      bound  by memory

Lines are resized across first, then down, with uint8 between, in Pillow's order up to version 12.
(Exception: if an image is over 100 times taller than wide and loses height, Pillow resizes down
first. The caller must resize such an image itself.) The sources and 22-bit weights of all outputs
come from `resize_tables`. All sums are over integers, so that every implementation and order of
sums has the same bits. With 255 times the largest sum of weights (Lanczos at an edge) a sum takes
65 % of 31 bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitrail_kernels.configs import KernelConfig, config_key, tuned
from vitrail_kernels.cost import Cost, traffic
from vitrail_kernels.device.overlap import wait_for_previous
from vitrail_kernels.launch import Call, Grid, Target, cdiv, check_tensor, jit, tl
from vitrail_kernels.operator import Operator
from vitrail_kernels.ops.resize_tables import FIELDS, LINES, PRECISION

LINES_PER_PROGRAM = 4


def resize_ref(
    out: Tensor, middle: Tensor, pixels: Tensor, images: Tensor, groups: Tensor, taps: Tensor
) -> None:
    """Write ``out`` (B, h, w, channels) from ``pixels``, both uint8; for the tables see
    `vitrail_kernels.ops.resize_tables`.

    ``middle`` (16 G, w channels rounded up to a multiple of 16) uint8 holds the lines between the
    two passes.
    """
    _, height, width, channels = out.shape
    for image, window in zip(images.tolist(), out, strict=True):
        start, stride, lines, group, column_table, column_taps, row_table, row_taps = image
        across = taps[column_table : column_table + (2 + column_taps) * width].view(-1, width)
        down = taps[row_table : row_table + (2 + row_taps) * height].view(-1, height)
        if lines == 0:  # the window lies above or below the image
            window.zero_()
            continue
        columns = int((across[0] + across[1]).max())
        size, strides = (columns, lines, channels), (channels, stride, 1)
        source = pixels.as_strided(size, strides, start + pixels.storage_offset())
        image_middle = middle[LINES * group : LINES * group + lines, : width * channels]
        image_middle.copy_(_resample(source, across).transpose(0, 1).flatten(1))
        window.copy_(_resample(image_middle, down).view(window.shape))


def _resample(lines: Tensor, table: Tensor) -> Tensor:
    """``lines`` resampled along the first dimension by a table of ``taps``."""
    start, count, weights = table[0].long(), table[1], table[2:]
    shape = (len(start),) + (1,) * (lines.dim() - 1)
    total = lines.new_full((len(start), *lines.shape[1:]), 1 << (PRECISION - 1), dtype=torch.int32)
    for tap, weight in enumerate(weights):
        used = tap < count
        source = torch.where(used, start + tap, 0)
        total += torch.where(used, weight, 0).view(shape) * lines[source].int()
    return (total >> PRECISION).clamp(0, 255).to(torch.uint8)


@jit()
def _byte_of(acc: tl.tensor) -> tl.tensor:
    """A sum with 22 binary places as a byte, rounded as in Pillow: the sum starts with one half."""
    return tl.minimum(tl.maximum(acc >> 22, 0), 255).to(tl.uint8)


@jit(varying=("width", "stride"))
def _across_kernel(
    middle_ptr: tl.tensor,  # (G LINES, stride) uint8
    pixels_ptr: tl.tensor,  # uint8
    images_ptr: tl.tensor,  # (B, FIELDS) int64
    groups_ptr: tl.tensor,  # (G,) int32
    taps_ptr: tl.tensor,  # int32
    width: int,  # columns of the output
    stride: int,  # from one line of middle to the next
    CHANNELS: tl.constexpr,
    FIELDS: tl.constexpr,
    LINES: tl.constexpr,
    LINES_PER_PROGRAM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A program makes BLOCK_N values (column, channel) of four lines, which share the weights.

    The four lines are four vectors. If they were a matrix, the compiler and its version would
    decide which lanes of a warp are neighbors. Loads of single bytes are fast only along a line.
    """
    wait_for_previous(PDL)
    tl.static_assert(LINES_PER_PROGRAM == 4, "the lines are written out below")
    PROGRAMS: tl.constexpr = LINES // LINES_PER_PROGRAM
    values = width * CHANNELS
    tiles = (values + BLOCK_N - 1) // BLOCK_N
    number = tl.program_id(0) // tiles
    group = number // PROGRAMS
    offs_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < values
    image_ptr = images_ptr + tl.load(groups_ptr + group).to(tl.int64) * FIELDS

    # The first byte of each line. A line of the group past the image reads the image's last line.
    line = number - tl.load(image_ptr + 3) * PROGRAMS
    line *= LINES_PER_PROGRAM
    last_line = tl.load(image_ptr + 2) - 1
    line_stride = tl.load(image_ptr + 1)
    base = pixels_ptr + tl.load(image_ptr)
    line_0 = base + tl.minimum(line, last_line) * line_stride
    line_1 = base + tl.minimum(line + 1, last_line) * line_stride
    line_2 = base + tl.minimum(line + 2, last_line) * line_stride
    line_3 = base + tl.minimum(line + 3, last_line) * line_stride

    table_ptr = taps_ptr + tl.load(image_ptr + 4)
    column = offs_n // CHANNELS
    offset = tl.load(table_ptr + column, mask=mask_n, other=0) * CHANNELS + offs_n % CHANNELS
    count = tl.load(table_ptr + width + column, mask=mask_n, other=0)
    weight_ptrs = table_ptr + 2 * width + column
    acc_0 = tl.full((BLOCK_N,), 1 << 21, tl.int32)
    acc_1, acc_2, acc_3 = acc_0, acc_0, acc_0
    taps = tl.where(line <= last_line, tl.load(image_ptr + 5), 0).to(tl.int32)
    for tap in range(taps):
        used = tap < count
        weight = tl.load(weight_ptrs + tap * width, mask=used, other=0)
        acc_0 += tl.load(line_0 + offset, mask=used, other=0).to(tl.int32) * weight
        acc_1 += tl.load(line_1 + offset, mask=used, other=0).to(tl.int32) * weight
        acc_2 += tl.load(line_2 + offset, mask=used, other=0).to(tl.int32) * weight
        acc_3 += tl.load(line_3 + offset, mask=used, other=0).to(tl.int32) * weight
        offset += CHANNELS
    out_ptrs = middle_ptr + number.to(tl.int64) * LINES_PER_PROGRAM * stride + offs_n
    tl.store(out_ptrs, _byte_of(acc_0), mask=mask_n & (line <= last_line))
    tl.store(out_ptrs + stride, _byte_of(acc_1), mask=mask_n & (line + 1 <= last_line))
    tl.store(out_ptrs + 2 * stride, _byte_of(acc_2), mask=mask_n & (line + 2 <= last_line))
    tl.store(out_ptrs + 3 * stride, _byte_of(acc_3), mask=mask_n & (line + 3 <= last_line))


@jit(varying=("height", "values", "stride"))
def _down_kernel(
    out_ptr: tl.tensor,  # (B, height, ALIGN values) uint8
    middle_ptr: tl.tensor,  # (G LINES, 16 stride) uint8
    images_ptr: tl.tensor,  # (B, FIELDS) int64
    taps_ptr: tl.tensor,  # int32
    height: int,  # of the output
    values: int,  # of a line of the output, in units of ALIGN
    stride: int,  # from one line of middle to the next, in 16 bytes
    ALIGN: tl.constexpr,
    FIELDS: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A program makes BLOCK_N values of BLOCK_M lines of an image's output."""
    wait_for_previous(PDL)
    values *= ALIGN
    stride *= 16
    across = (values + BLOCK_N - 1) // BLOCK_N
    tiles = (height + BLOCK_M - 1) // BLOCK_M * across
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    offs_m = tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < height
    mask_n = offs_n < stride  # whole 16 bytes: bytes past the output's line are not stored

    image_ptr = images_ptr + image * FIELDS
    table_ptr = taps_ptr + tl.load(image_ptr + 6)
    first_source = tl.load(table_ptr + offs_m, mask=mask_m, other=0)
    count = tl.load(table_ptr + height + offs_m, mask=mask_m, other=0)
    line_ptrs = middle_ptr + (tl.load(image_ptr + 3) * LINES + first_source) * stride
    weight_ptrs = table_ptr + 2 * height + offs_m
    acc = tl.full((BLOCK_M, BLOCK_N), 1 << 21, tl.int32)
    for tap in range(tl.load(image_ptr + 7).to(tl.int32)):
        used = tap < count
        weight = tl.load(weight_ptrs + tap * height, mask=used, other=0)
        mask = used[:, None] & mask_n[None, :]
        pixel = tl.load(line_ptrs[:, None] + offs_n[None, :], mask=mask, other=0)
        acc += pixel.to(tl.int32) * weight[:, None]
        line_ptrs += stride
    base = out_ptr + image * height * values
    mask = mask_m[:, None] & (offs_n < values)[None, :]
    tl.store(base + (offs_m[:, None] * values + offs_n[None, :]), _byte_of(acc), mask=mask)


def resize_cost(*, middle: Tensor, **arguments: object) -> Cost:
    """``middle`` is written and read. All of ``pixels`` counts, though a crop reads less."""
    return Cost(0, traffic(middle, middle, *arguments.values()))


# -- the calls -------------------------------------------------------------------------------------


def check_resize(
    out: Tensor, middle: Tensor, pixels: Tensor, images: Tensor, groups: Tensor, taps: Tensor
) -> None:
    """Check the tensors of the operator. Raises ValueError if the kernels cannot take them."""
    if out.dim() != 4 or 0 in out.shape[1:] or math.prod(out.shape[1:]) >= 1 << 31:
        raise ValueError(
            f"resize: out: got shape {tuple(out.shape)}, wanted (B, h, w, channels) of less than "
            "2^31 numbers an image"
        )
    batch, _, width, channels = out.shape
    stride = 16 * cdiv(width * channels, 16)
    check_tensor("resize: out", out, out, torch.uint8, out.shape)
    check_tensor("resize: pixels", pixels, out, torch.uint8, (pixels.numel(),))
    check_tensor("resize: images", images, out, torch.int64, (batch, FIELDS))
    check_tensor("resize: groups", groups, out, torch.int32, (groups.numel(),))
    check_tensor("resize: taps", taps, out, torch.int32, (taps.numel(),))
    check_tensor("resize: middle", middle, out, torch.uint8, (LINES * groups.numel(), stride))


def resize_calls(
    target: Target,
    out: Tensor,
    middle: Tensor,
    pixels: Tensor,
    images: Tensor,
    groups: Tensor,
    taps: Tensor,
) -> list[Call]:
    """The launches of `resize_ref`. Raises ValueError for another shape, dtype or layout.

    The contents of the tables are not checked: ``pixels`` must hold as many bytes as they were made
    for.
    """
    check_resize(out, middle, pixels, images, groups, taps)
    batch, height, width, channels = out.shape
    values, stride = width * channels, middle.shape[1]
    align = math.gcd(values, 16) if out.data_ptr() % 16 == 0 else 1
    across_key, down_key = (
        config_key("resize", torch.uint8, f"{kernel} {channels}") for kernel in ("across", "down")
    )
    why = "one number a thread: neighbors on a line are neighbors in a warp"
    across = tuned(target.arch).get(across_key, KernelConfig(0, 128, 0, 4, 1, reason=why))
    why = "16 sums a thread, of the 16 bytes that it loads at a time"
    down = tuned(target.arch).get(down_key, KernelConfig(8, 256, 0, 4, 1, reason=why))
    shared = {"images_ptr": images, "taps_ptr": taps, "FIELDS": FIELDS, "LINES": LINES}
    shared["PDL"] = target.pdl
    across_arguments = {
        "middle_ptr": middle,
        "pixels_ptr": pixels,
        "groups_ptr": groups,
        "width": width,
        "stride": stride,
        "CHANNELS": channels,
        "LINES_PER_PROGRAM": LINES_PER_PROGRAM,
        "BLOCK_N": across.block_n,
    }
    down_arguments = {
        "out_ptr": out,
        "middle_ptr": middle,
        "height": height,
        "values": values // align,
        "stride": stride // 16,
        "ALIGN": align,
        "BLOCK_M": down.block_m,
        "BLOCK_N": down.block_n,
    }
    tiles = (LINES // LINES_PER_PROGRAM) * cdiv(values, across.block_n)
    across_grid = Grid(groups.numel(), times=tiles)
    down_grid = Grid(batch, times=cdiv(height, down.block_m) * cdiv(values, down.block_n))
    return [
        Call(_across_kernel, across_grid, shared | across_arguments, across, across_key),
        Call(_down_kernel, down_grid, shared | down_arguments, down, down_key),
    ]


RESIZE = Operator("resize", resize_ref, resize_calls, resize_cost)
