"""patch_embed: pixels -> tokens, out[b, t] = table[t] + patch(b, t) W^T

    patch  the pixels of a patch; pixels left over at the right and bottom edge are dropped
    table  position + class / register tokens + projection bias, see `position`
    FLOPs  2 B P C K      bytes  pixels + C K + B T C      bound  by memory for uint8 at small K

uint8 pixels are (B, H, W, channels). The normalization is folded into their weight, whose K runs
over (row, column, channel). Float pixels are (B, channels, H, W) and already normalized. The K of
their weight runs over (channel, row, column). A uint8 value u enters as u / 256. This is exact in
every dtype, and it keeps weights with 1 / 255 folded in out of fp16's subnormals.

The kernel reads both formats as planes of lines. The values of a patch in one line are a run, which
is contiguous in memory. K is (plane, line, value of the run). uint8 pixels have a single plane and
runs of patch width * channels values. Float pixels have a plane for each channel and runs of patch
width values. A tile covers tokens, with the class and register tokens among them. The pixels of
these are masked to 0, so that table and statistics need no special case.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from vitrail_kernels.configs import KernelConfig, Ladder, config_key, dtype_name, ladder_of, tuned
from vitrail_kernels.cost import Cost, traffic
from vitrail_kernels.device.overlap import wait_for_previous
from vitrail_kernels.device.stats import stats_ref, stats_shape, store_stats
from vitrail_kernels.launch import (
    FLOATS,
    Call,
    Grid,
    Target,
    cdiv,
    check_tensor,
    descriptor,
    fits_descriptor,
    jit,
    tl,
)
from vitrail_kernels.operator import Operator

UINT8_UNIT = 256
"""The uint8 value that would stand for 1."""

K_MULTIPLE = 64
"""The weight is padded with zeros along K to a multiple of this number."""

VARYING = (
    "rows",
    "tokens",
    "columns",
    "image_stride",
    "plane_stride",
    "line_stride",
    "stats_stride",
)
"""The integers of the kernel that change with the batch and the size of the images."""


def _columns(pixels: Tensor, patch: tuple[int, int]) -> Tensor:
    """The patches as rows: (B, patches, K)."""
    down, across = patch
    if pixels.dtype == torch.uint8:
        batch, height, width, channels = pixels.shape
        h, w = height // down, width // across
        cropped = pixels[:, : h * down, : w * across]
        split = cropped.reshape(batch, h, down, w, across, channels).permute(0, 1, 3, 2, 4, 5)
    else:
        batch, channels, height, width = pixels.shape
        h, w = height // down, width // across
        cropped = pixels[:, :, : h * down, : w * across]
        split = cropped.reshape(batch, channels, h, down, w, across).permute(0, 2, 4, 1, 3, 5)
    return split.reshape(batch, h * w, down * across * channels)


def patch_embed_ref(
    out: Tensor,
    pixels: Tensor,
    weight: Tensor,
    table: Tensor,
    stats: Tensor | None = None,
    *,
    patch: tuple[int, int],
    channels: int,
    prefix: int,
) -> None:
    """Write ``out`` (B T, C) from ``pixels``, ``weight`` (C, K') and ``table`` (T, C) fp32.

    K' may be larger than the K values of a patch; the columns past K are padding and not used.
    ``stats`` (2 chunks, B T) fp32 receives the row statistics of ``out``. Raises ValueError if
    ``pixels`` do not have ``channels`` channels.
    """
    batch, actual = pixels.shape[0], pixels.shape[3 if pixels.dtype == torch.uint8 else 1]
    if actual != channels:
        raise ValueError(f"pixels {tuple(pixels.shape)}: got {actual} channels, wanted {channels}")
    if batch == 0:
        return
    # the product stays fp32 until the table is added: for uint8 pixels it is large, and the bias in
    # the table cancels most of it
    wide = torch.promote_types(weight.dtype, torch.float32)
    columns = _columns(pixels, patch).to(wide)
    if pixels.dtype == torch.uint8:
        columns /= UINT8_UNIT
    tokens = out.view(batch, table.shape[0], out.shape[1])
    tokens[:, :prefix] = table[:prefix]
    projected = torch.matmul(columns, weight[:, : columns.shape[2]].t().to(wide))
    if projected.dtype == out.dtype == table.dtype:
        torch.add(projected, table[prefix:], out=tokens[:, prefix:])
    else:
        tokens[:, prefix:] = projected + table[prefix:]
    if stats is not None:
        stats_ref(stats, out)


@jit()
def _gather(
    base: tl.tensor,  # the first image of the tile
    corner: tl.tensor,  # (BLOCK_M,) offset of each patch's first pixel from base
    mask_m: tl.tensor,  # (BLOCK_M,) whether the row is a patch
    first_k: int,
    plane_stride: int,
    line_stride: int,
    K: tl.constexpr,
    RUN: tl.constexpr,
    LINES: tl.constexpr,
    MASK_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Pixels (BLOCK_M, BLOCK_K) as stored; 0 for rows that are no patch, and past K."""
    offs_k = first_k + tl.arange(0, BLOCK_K)
    line = offs_k // RUN
    offset = line // LINES * plane_stride + line % LINES * line_stride + offs_k % RUN
    mask = mask_m[:, None]
    if MASK_K:
        mask = mask & (offs_k < K)[None, :]
    return tl.load(base + (corner[:, None] + offset[None, :]), mask=mask, other=0)


@jit()
def _operand(pixels: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """The operand of the product: float pixels rounded, a uint8 value u as u / 256.

    4 + u / 256 in fp16 and 2^15 + u / 256 in fp32 hold u in their last mantissa bits, and the
    subtraction is exact. This is cheaper than a conversion, because a multiprocessor does only 16
    conversions per cycle.
    """
    if pixels.dtype != tl.uint8:
        return pixels.to(dtype)  # float pixels are rounded here
    if dtype == tl.float16:
        half = pixels.to(tl.uint16) | 0x4400
        return half.to(tl.float16, bitcast=True) - 4.0
    wide = pixels.to(tl.uint32) | 0x47000000
    return (wide.to(tl.float32, bitcast=True) - 32768.0).to(dtype)


@jit(varying=VARYING)
def _patch_embed_kernel(
    out_ptr: tl.tensor,  # (B T, WIDTH)
    stats_ptr: tl.tensor,  # (2 chunks, B T) fp32 or None
    pixels_ptr: tl.tensor,  # uint8 (B, H, W, channels) or float (B, channels, H, W)
    weight: tl.tensor,  # (WIDTH, PADDED): a tensor map in tiles of (BLOCK_N, BLOCK_K), or a pointer
    table_ptr: tl.tensor,  # (T, WIDTH) fp32
    rows: int,  # B T
    tokens: int,  # T
    columns: int,  # patches across
    image_stride: int,  # in units of ALIGN pixel values, as the next two
    plane_stride: int,
    line_stride: int,
    stats_stride: int,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    PREFIX: tl.constexpr,
    RUN: tl.constexpr,
    LINES: tl.constexpr,
    ALIGN: tl.constexpr,
    TMA: tl.constexpr,
    PREFETCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_previous(PDL)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    # neighboring programs are tiles of the same tokens, which share pixels in the cache
    ACROSS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    first_m = tl.program_id(0) // ACROSS * BLOCK_M
    first_n = tl.program_id(0) % ACROSS * BLOCK_N

    # the first pixel of each row's patch, as a 32-bit offset from the first image of the tile
    offs_m = first_m + tl.arange(0, BLOCK_M)
    first_image = first_m // tokens
    image = offs_m // tokens
    patch = offs_m - image * tokens - PREFIX
    is_patch = (offs_m < rows) & (patch >= 0)
    patch = tl.maximum(patch, 0)
    down = patch // columns
    line_stride *= ALIGN
    plane_stride *= ALIGN
    image_stride *= ALIGN
    corner = (image - first_image) * image_stride + down * LINES * line_stride
    corner += (patch - down * columns) * RUN
    base = pixels_ptr + first_image.to(tl.int64) * image_stride

    if not TMA:
        offs_n = first_n + tl.arange(0, BLOCK_N)
        # (BLOCK_K, BLOCK_N): in the shape of the pixels, weight and pixels would be loaded in the
        # same layout, which suits only one of the two
        weight_ptrs = weight + (offs_n[None, :] * PADDED + tl.arange(0, BLOCK_K)[:, None])
    # PREFETCH, for runs too short for cp.async: the pixels of the next step wait in registers
    AHEAD: tl.constexpr = BLOCK_K if PREFETCH else 0
    MASK_K: tl.constexpr = PREFETCH or K != PADDED
    if PREFETCH:
        pixels = _gather(
            base, corner, is_patch, 0, plane_stride, line_stride, K, RUN, LINES, MASK_K, BLOCK_K
        )
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_k in tl.range(0, PADDED, BLOCK_K):
        if PREFETCH:
            a = _operand(pixels, DTYPE)
        ahead = first_k + AHEAD
        pixels = _gather(
            base, corner, is_patch, ahead, plane_stride, line_stride, K, RUN, LINES, MASK_K, BLOCK_K
        )
        if not PREFETCH:
            a = _operand(pixels, DTYPE)
        if TMA:
            w = weight.load([first_n, first_k]).T
        elif WIDTH % BLOCK_N == 0:
            w = tl.load(weight_ptrs + first_k)
        else:
            w = tl.load(weight_ptrs + first_k, mask=(offs_n < WIDTH)[None, :], other=0.0)
        acc = tl.dot(a, w, acc, input_precision="ieee")

    # Halves of a wide tile: 126 registers instead of 174, two blocks instead of one
    PARTS: tl.constexpr = 2 if BLOCK_N >= 128 else 1
    PART_N: tl.constexpr = BLOCK_N // PARTS
    # not offs_m % tokens: its quotients would stay in registers through all of K
    token = ((first_m % tokens + tl.arange(0, BLOCK_M)) % tokens)[:, None, None]
    mask_m = offs_m < rows
    part_m = tl.arange(0, BLOCK_M)[:, None, None]
    tile = out_ptr + first_m.to(tl.int64) * WIDTH
    # A shape that no other load has, with 4 values a thread. With 8 values, the layout of a 16-byte
    # store, a load of the table would use 16 bytes of every 32. But 4 values take twice the
    # addresses, and with short runs the wide tiles of sm_80 lack registers for them.
    SIDE: tl.constexpr = 4 if TMA or PARTS == 1 or RUN % 16 == 0 else 8
    chunk = tl.arange(0, PART_N // 64)[None, :, None] * 64
    for number in tl.static_range(PARTS):
        y = acc
        if PARTS == 2:
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, PART_N)), (0, 2, 1)))
            y = left if number == 0 else right
        column = first_n + number * PART_N
        part_n = chunk + tl.max_contiguous(tl.arange(0, 64), SIDE)[None, None, :]
        mask = mask_m[:, None, None] & (part_n < WIDTH - column)
        y = tl.reshape(y, (BLOCK_M, PART_N // 64, 64))
        ptrs = table_ptr + column + (token * WIDTH + part_n)
        # a tl.fma and not a plain sum, as in tile.epilogue
        y = tl.fma(y, 1.0, tl.load(ptrs, mask=mask, other=0.0))
        y = y.to(DTYPE)  # the only rounding
        tl.store(tile + column + (part_m * WIDTH + part_n), y, mask=mask)
        if stats_ptr is not None:
            y = tl.reshape(y.to(tl.float32), (BLOCK_M, PART_N))
            store_stats(
                stats_ptr, stats_stride, y, offs_m, mask_m, column, WIDTH, BLOCK_M, PART_N, True
            )


def patch_embed_cost(
    *,
    out: Tensor,
    table: Tensor,
    patch: tuple[int, int],
    channels: int,
    prefix: int,
    **arguments: object,
) -> Cost:
    """FLOPs of the projection of every patch, without the padding along K."""
    values = patch[0] * patch[1] * channels
    patches = out.shape[0] // max(table.shape[0], 1) * (table.shape[0] - prefix)
    return Cost(2 * patches * out.shape[1] * values, traffic(out, table, *arguments.values()))


# -- the calls -------------------------------------------------------------------------------------


def _patch_config(
    target: Target,
    key: str,
    pixels: Tensor,
    weight: Tensor,
    patch: tuple[int, int],
    step: int,
    stats: bool,
    rows: int,
) -> KernelConfig:
    """The configuration for pixels loaded ``step`` bytes at a time.

    All configurations of an architecture and dtype give the same bits: they use the same MMA family
    (64 rows or more make it HGMMA on sm_90), add K in the same order and use the same chunks for
    statistics.
    """
    config = tuned(target.arch).get(key)
    if config is not None:
        return config
    if weight.dtype == torch.float32:
        return KernelConfig(64, 64, 32, 4, 2, reason="fp32: for the interpreter alone")
    uint8 = pixels.dtype == torch.uint8
    # 64 if two addresses per thread are enough for the loads; with shorter loads, or in HMMA's
    # layout, 64 would spill
    block_k = 64 if step == 16 and uint8 and (target.arch == 90 or target.tcgen05) else 32
    if cdiv(rows, 128) * cdiv(weight.shape[0], 128) < target.sms:
        return KernelConfig(64, 64, block_k, 4, 3, reason="few rows: as many tiles as there can be")
    short_runs = target.arch == 80 and not uint8 and patch[1] % 16 != 0  # with many addresses
    alone = target.arch == 90 and block_k == 64 and not stats  # without statistics 128 would spill
    if target.arch not in (80, 90) or short_runs or alone or step == pixels.element_size():
        why = "small blocks: 130 to 168 registers, which two of 256 threads do not have"
        return KernelConfig(64, 128, block_k, 4, 3, registers=168, reason=why)
    why = "two blocks an SM: one gathers while one multiplies"
    return KernelConfig(128, 128, block_k, 8, 3, registers=128, ctas=2, reason=why)


def patch_ladder(
    target: Target,
    key: str,
    pixels: Tensor,
    weight: Tensor,
    patch: tuple[int, int],
    step: int,
    stats: bool,
) -> Ladder:
    """`_patch_config` for every number of rows."""
    # up to this number of rows, some multiprocessor has no tile
    few_rows = 128 * ((target.sms - 1) // cdiv(weight.shape[0], 128))
    choose = functools.partial(_patch_config, target, key, pixels, weight, patch, step, stats)
    return ladder_of([few_rows], choose)


def _strides(pixels: Tensor) -> tuple[int, int, int]:
    """The strides of images, planes and lines. Raises ValueError unless lines are contiguous."""
    if pixels.dtype == torch.uint8:
        image, line, pixel, value = pixels.stride()
        plane, contiguous = 0, value == 1 and pixel == pixels.shape[3]
    else:
        image, plane, line, pixel = pixels.stride()
        contiguous = pixel == 1
    if pixels.numel() and not contiguous:
        raise ValueError(
            f"patch_embed: pixels: got strides {pixels.stride()} for {tuple(pixels.shape)}, wanted "
            "lines without gaps"
        )
    return image, plane, line


def _patch_grid(pixels: Tensor, patch: tuple[int, int], channels: int) -> tuple[int, int]:
    """The patches down and across. Raises ValueError if ``pixels`` have a wrong dtype or shape."""
    uint8 = pixels.dtype == torch.uint8
    if not uint8 and pixels.dtype not in FLOATS:
        raise ValueError(
            f"patch_embed: pixels: got {pixels.dtype}, wanted uint8 or one of {FLOATS}"
        )
    if pixels.dim() != 4 or pixels.shape[3 if uint8 else 1] != channels:
        layout = f"(B, H, W, {channels})" if uint8 else f"(B, {channels}, H, W)"
        raise ValueError(
            f"patch_embed: pixels: got shape {tuple(pixels.shape)} of {pixels.dtype}, wanted "
            f"{layout}"
        )
    height, width = pixels.shape[1:3] if uint8 else pixels.shape[2:]
    return height // patch[0], width // patch[1]


def patch_embed_calls(
    target: Target,
    out: Tensor,
    pixels: Tensor,
    weight: Tensor,
    table: Tensor,
    stats: Tensor | None = None,
    *,
    patch: tuple[int, int],
    channels: int,
    prefix: int,
    config: KernelConfig | None = None,
) -> list[Call]:
    """The launch that computes `patch_embed_ref`; ``weight`` must be padded to `K_MULTIPLE`.

    Lines of pixels must be contiguous; images, planes and lines may lie apart. ``config`` replaces
    the configuration that the size would get. Raises ValueError for another shape, dtype or layout,
    and for images of about 2^31 values or more.
    """
    down, across = _patch_grid(pixels, patch, channels)
    if weight.dtype not in FLOATS:
        raise ValueError(f"patch_embed: weight: got {weight.dtype}, wanted one of {FLOATS}")
    values, (width, padded) = patch[0] * patch[1] * channels, weight.shape
    if padded % K_MULTIPLE or padded < values:
        raise ValueError(
            f"patch_embed: weight: got {padded} columns, wanted {values} padded with zeros to a "
            f"multiple of {K_MULTIPLE}"
        )
    tokens = prefix + down * across
    rows = pixels.shape[0] * tokens
    check_tensor("patch_embed: weight", weight, pixels, weight.dtype, (width, padded))
    check_tensor("patch_embed: table", table, pixels, torch.float32, (tokens, width))
    check_tensor("patch_embed: out", out, pixels, weight.dtype, (rows, width))
    check_tensor("patch_embed: stats", stats, pixels, torch.float32, stats_shape(rows, width))
    if out.numel() == 0:
        return []
    image, plane, line = _strides(pixels)
    run = patch[1] * (channels if pixels.dtype == torch.uint8 else 1)
    size = pixels.element_size()
    # every address is a multiple of ``align`` values, so the compiler may load as many at a time
    align = math.gcd(16 // size, run, image, plane, line) if pixels.data_ptr() % 16 == 0 else 1
    pixel_dtype = dtype_name(pixels.dtype)
    key = config_key("patch_embed", weight.dtype, f"{pixel_dtype} {patch[0]}x{patch[1]} {width}")
    fixed = target, key, pixels, weight, patch, align * size, stats is not None
    config = config or _patch_config(*fixed, rows)
    strides = zip(pixels.shape[1:], pixels.stride()[1:], strict=True)
    extent = 1 + sum((side - 1) * stride for side, stride in strides)
    if (config.block_m // tokens + 2) * max(image, extent) >= 1 << 31 or table.numel() >= 1 << 31:
        raise ValueError(
            f"patch_embed: got pixels {tuple(pixels.shape)} with strides {pixels.stride()} and a "
            f"table {tuple(table.shape)}, wanted offsets of 32 bits in a tile of {config.block_m}"
        )
    tma = target.tma and fits_descriptor(weight)
    arguments = {
        "out_ptr": out,
        "stats_ptr": stats,
        "pixels_ptr": pixels,
        "weight": descriptor(weight, config.block_n, config.block_k) if tma else weight,
        "table_ptr": table,
        "rows": rows,
        "tokens": tokens,
        "columns": max(across, 1),
        "image_stride": image // align,
        "plane_stride": plane // align,
        "line_stride": line // align,
        "stats_stride": rows,
        "WIDTH": width,
        "K": values,
        "PADDED": padded,
        "PREFIX": prefix,
        "RUN": run,
        "LINES": patch[0],
        "ALIGN": align,
        "TMA": tma,
        "PREFETCH": align * size < 4,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "PDL": target.pdl,
    }
    grid = Grid(rows, config.block_m, cdiv(width, config.block_n))
    ladder = functools.partial(patch_ladder, *fixed)
    return [Call(_patch_embed_kernel, grid, arguments, config, key, rows, ladder)]


PATCH_EMBED = Operator("patch_embed", patch_embed_ref, patch_embed_calls, patch_embed_cost)
