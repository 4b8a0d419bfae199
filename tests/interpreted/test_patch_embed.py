"""The patch_embed kernel in Triton's interpreter, against fp64 and what it must not touch."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import assert_close
from interpreted.guard import at_page_end
from kernels.test_operators import (
    POISONS,
    Guarded,
    check,
    convolved,
    explicit_patches,
    patch_case,
    same_bits,
)
from vitrail_kernels.device.stats import stats_ref, stats_shape
from vitrail_kernels.launch import Target, launch
from vitrail_kernels.ops.patch_embed import (
    PATCH_EMBED,
    VARYING,
    patch_embed_calls,
    patch_embed_cost,
)
from vitrail_kernels.ops.patch_embed import patch_embed_ref as reference

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # NumPy, of the poisons
]

# few multiprocessors make tiles large: 128 x 128, finished in halves; many make them 64 x 64
LARGE, SMALL, OLD = Target(90, 1), Target(90, 99), Target(80, 99)
DTYPES = (torch.float16, torch.float32)


def padded(weight: Tensor, extra: int = 0) -> Tensor:
    """With zeros up to a multiple of 64 columns, and ``extra`` more."""
    rows, values = weight.shape
    stored = torch.zeros(rows, -(-values // 64) * 64 + extra, dtype=weight.dtype)
    stored[:, :values] = weight
    return stored


def run(
    pixels: Tensor,
    weight: Tensor,
    table: Tensor,
    patch: tuple[int, int],
    prefix: int,
    target: Target = SMALL,
) -> tuple[Tensor, Tensor]:
    """Output (B, T, C) and statistics; every input ends at a page that nobody may read."""
    batch, (tokens, width) = pixels.shape[0], table.shape
    out = Guarded(batch * tokens, width, dtype=weight.dtype)
    stats = Guarded(*stats_shape(batch * tokens, width), dtype=torch.float32)
    if pixels.is_contiguous():
        pixels = at_page_end(pixels)
    launch(
        patch_embed_calls(
            target,
            out.out,
            pixels,
            at_page_end(weight),
            at_page_end(table),
            stats.out,
            patch=patch,
            channels=pixels.shape[3 if pixels.dtype == torch.uint8 else 1],
            prefix=prefix,
        )
    )
    return out.done().view(batch, tokens, width), stats.done()


def judge(
    out: Tensor, stats: Tensor, pixels: Tensor, kernel: Tensor, table: Tensor, prefix: int
) -> None:
    """The output within the rules, its statistics those of what was written, special rows exact."""
    expected = explicit_patches(pixels, kernel, table, prefix)
    check(out, expected, convolved(pixels, kernel, table, prefix), "patch_embed")
    first = table[:prefix].to(out.dtype).expand(out.shape[0], -1, -1)
    assert same_bits(out[:, :prefix], first), "special tokens are not the table's"
    exact = torch.empty(stats.shape, dtype=torch.float64)
    stats_ref(exact, out.double().flatten(0, 1))
    chunks = len(stats) // 2
    assert_close(stats[:chunks], exact[:chunks], name="sums")
    assert_close(stats[chunks:], exact[chunks:], name="squares")


CASES: dict[str, dict[str, Any]] = {
    "16 by 16": {"size": (48, 32), "patch": (16, 16), "batch": 3},
    "16 by 16, a remainder": {"size": (37, 51), "patch": (16, 16), "batch": 2, "prefix": 5},
    "14 by 14": {"size": (28, 56), "patch": (14, 14), "batch": 3, "width": 72},
    "14 by 14, a remainder": {"size": (41, 45), "patch": (14, 14), "prefix": 5},
    "14 by 14, gray": {"size": (28, 30), "patch": (14, 14), "channels": 1, "batch": 3},
    "4 by 4": {"size": (33, 34), "patch": (4, 4), "width": 200},
    "4 by 4, gray": {"size": (9, 11), "patch": (4, 4), "channels": 1, "batch": 3, "prefix": 0},
    "5 by 5": {"size": (17, 13), "patch": (5, 5), "batch": 3, "prefix": 5},
    "not square": {"size": (24, 30), "patch": (8, 3), "batch": 2, "width": 128},
    "single pixels": {"size": (5, 3), "patch": (1, 1), "width": 30},
    "one token": {"size": (16, 16), "patch": (16, 16), "prefix": 0, "width": 64},
    "64 tokens": {"size": (28, 36), "patch": (4, 4), "width": 64},
    "129 tokens": {"size": (32, 64), "patch": (4, 4)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_its_formula(name: str, uint8: bool, dtype: torch.dtype) -> None:
    case = dict(CASES[name])
    patch, batch, prefix = case["patch"], case.pop("batch", 1), case.get("prefix", 1)
    pixels, weight, table, kernel = patch_case(batch, uint8=uint8, dtype=dtype, **case)
    weight = padded(weight)
    # one tile each way round, so that a case takes no longer than it must
    target = (LARGE, SMALL, OLD)[(list(CASES).index(name) + uint8) % 3]
    out, stats = run(pixels, weight, table, patch, prefix, target)
    judge(out, stats, pixels, kernel, table, prefix)


@pytest.mark.parametrize("target", [LARGE, SMALL, OLD, Target(80, 1)], ids=str)
@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
def test_every_tile_and_way_of_loading(uint8: bool, target: Target) -> None:
    """More than one tile down and across; three columns of the last statistics chunk."""
    pixels, weight, table, kernel = patch_case(
        5, (25, 30), (5, 5), uint8=uint8, dtype=torch.float16, width=131
    )
    out, stats = run(pixels, padded(weight), table, (5, 5), 1, target)
    judge(out, stats, pixels, kernel, table, 1)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_float_pixels_of_any_dtype(stored: torch.dtype) -> None:
    pixels, weight, table, kernel = patch_case(
        2, (29, 31), (14, 14), uint8=False, dtype=torch.float16
    )
    pixels = pixels.to(stored)
    out, stats = run(pixels, padded(weight), table, (14, 14), 1)
    judge(out, stats, pixels, kernel, table, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_uint8_value_enters_exactly(dtype: torch.dtype) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    out, _ = run(pixels, torch.eye(256, dtype=dtype), torch.zeros(1, 256), (16, 16), 0)
    assert same_bits(out[0, 0], (torch.arange(256) / 256).to(dtype))


def test_the_sum_stays_wide_until_the_table_is_added() -> None:
    """u / 256 + 64 - 64 is u / 256, where fp16 has steps of 1 / 16 at 64."""
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    pixels[0, 15, 15] = 128
    weight, table = torch.eye(256, dtype=torch.float16), torch.zeros(1, 256)
    weight[:255, 255] = 128
    table[:, :255] = -64
    out, _ = run(pixels, weight, table, (16, 16), 0)
    assert same_bits(out[0, 0], (pixels.flatten() / 256).half())


@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
def test_no_images(uint8: bool) -> None:
    pixels, weight, table, _ = patch_case(0, (9, 9), (4, 4), uint8=uint8, dtype=torch.float16)
    out, stats = run(pixels, padded(weight), table, (4, 4), 1)
    assert out.numel() == stats.numel() == 0


def test_an_image_smaller_than_a_patch_is_special_tokens_alone() -> None:
    pixels, weight, table, _ = patch_case(
        3, (3, 9), (4, 4), uint8=True, dtype=torch.float16, prefix=2
    )
    out, _ = run(pixels, padded(weight), table, (4, 4), 2)
    assert same_bits(out, table.half().expand(3, -1, -1))


@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
def test_the_operator_is_the_call_with_or_without_statistics(uint8: bool) -> None:
    pixels, weight, table, _ = patch_case(2, (9, 9), (4, 4), uint8=uint8, dtype=torch.float16)
    weight = padded(weight)
    expected, its = run(pixels, weight, table, (4, 4), 1, Target(90, 3))
    out, stats = torch.empty_like(expected).flatten(0, 1), torch.empty_like(its)
    scalars: dict[str, Any] = {"patch": (4, 4), "channels": 3, "prefix": 1}
    PATCH_EMBED.launch(out, pixels, weight, table, stats, **scalars)
    assert same_bits(out, expected.flatten(0, 1))
    assert same_bits(stats, its)
    PATCH_EMBED.launch(out.zero_(), pixels, weight, table, **scalars)
    assert same_bits(out, expected.flatten(0, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_writes_the_same_statistics(dtype: torch.dtype) -> None:
    pixels, weight, table, _ = patch_case(2, (9, 9), (4, 4), uint8=True, dtype=dtype, width=72)
    out, stats = Guarded(10, 72, dtype=dtype), Guarded(4, 10, dtype=torch.float32)
    reference(out.out, pixels, weight, table, stats.out, patch=(4, 4), channels=3, prefix=1)
    expected = torch.empty(4, 10)
    stats_ref(expected, out.done())
    assert same_bits(stats.done(), expected)


def test_statistics_are_traffic() -> None:
    pixels, weight, table, _ = patch_case(2, (9, 9), (4, 4), uint8=True, dtype=torch.float16)
    out, stats = torch.empty(10, 40, dtype=torch.float16), torch.empty(2, 10)
    scalars: dict[str, Any] = {"patch": (4, 4), "channels": 3, "prefix": 1}
    tensors = {"out": out, "pixels": pixels, "weight": weight, "table": table}
    without = patch_embed_cost(**tensors, **scalars)
    assert patch_embed_cost(**tensors, stats=stats, **scalars) == (
        without.flops,
        without.bytes + 4 * 2 * 10,
    )


# -- what must change no bit -----------------------------------------------------------------------


@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
def test_an_image_has_the_same_bits_alone_and_anywhere(uint8: bool) -> None:
    """In fp16: products in fp32 are NumPy's, whose bits depend on the row."""
    pixels, weight, table, _ = patch_case(7, (17, 19), (5, 5), uint8=uint8, dtype=torch.float16)
    weight = padded(weight)
    out, stats = run(pixels, weight, table, (5, 5), 1)
    its = stats.view(2, 7, -1)
    for i in (0, 4, 6):
        alone, statistics = run(pixels[i : i + 1], weight, table, (5, 5), 1)
        assert same_bits(alone[0], out[i])
        assert same_bits(statistics, its[:, i])


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", [LARGE, OLD], ids=str)
def test_no_patch_sees_another_nor_the_remainder(
    target: Target, dtype: torch.dtype, poison: float
) -> None:
    pixels, weight, table, _ = patch_case(3, (19, 17), (4, 4), uint8=False, dtype=dtype)
    weight = padded(weight)
    clean, stats = run(pixels, weight, table, (4, 4), 1, target)
    pixels[:, :, 16:] = poison
    pixels[:, :, :, 16:] = poison
    edge, its = run(pixels, weight, table, (4, 4), 1, target)
    assert same_bits(edge, clean)
    assert same_bits(its, stats)
    pixels[0] = poison
    pixels[1, :, 4:8, 8:12] = poison  # image 1, patch row 1, column 2
    changed, its = run(pixels, weight, table, (4, 4), 1, target)
    keep = torch.ones(3, table.shape[0], dtype=torch.bool)
    keep[0, 1:] = False
    keep[1, 1 + 4 + 2] = False
    assert same_bits(changed[keep], clean[keep])
    assert same_bits(its[:, keep.flatten()], stats[:, keep.flatten()])
    assert not same_bits(changed[~keep], clean[~keep])


def test_no_uint8_patch_sees_another_nor_the_remainder() -> None:
    pixels, weight, table, _ = patch_case(3, (31, 30), (14, 14), uint8=True, dtype=torch.float16)
    weight = padded(weight)
    clean, _ = run(pixels, weight, table, (14, 14), 1)
    pixels[:, 28:] ^= 255
    pixels[:, :, 28:] ^= 255
    assert same_bits(run(pixels, weight, table, (14, 14), 1)[0], clean)
    pixels[1, 14:28, :14] ^= 255  # image 1, patch row 1, column 0
    changed, _ = run(pixels, weight, table, (14, 14), 1)
    keep = torch.ones(3, table.shape[0], dtype=torch.bool)
    keep[1, 1 + 2] = False
    assert same_bits(changed[keep], clean[keep])
    assert not same_bits(changed, clean)


@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
def test_more_zeros_along_k_change_nothing(uint8: bool) -> None:
    pixels, weight, table, _ = patch_case(2, (21, 14), (7, 7), uint8=uint8, dtype=torch.float16)
    out, _ = run(pixels, padded(weight), table, (7, 7), 1)
    assert same_bits(run(pixels, padded(weight, 64), table, (7, 7), 1)[0], out)


@pytest.mark.parametrize(("uint8", "patch"), [(True, (16, 16)), (False, (14, 14))])
def test_a_crop_of_larger_images_is_read_in_place(uint8: bool, patch: tuple[int, int]) -> None:
    size = 2 * patch[0] + 3, 2 * patch[1] + 1
    pixels, weight, table, _ = patch_case(3, size, patch, uint8=uint8, dtype=torch.float16)
    weight = padded(weight)
    expected, _ = run(pixels, weight, table, patch, 1)
    top, left, bottom, right = 2, 5, 3, 4
    edges = (0, 0, left, right, top, bottom) if uint8 else (left, right, top, bottom)
    fill = 77 if uint8 else float("nan")
    whole = torch.nn.functional.pad(pixels, edges, value=fill)
    rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
    crop = whole[:, rows, columns] if uint8 else whole[:, :, rows, columns]
    assert not crop.is_contiguous()
    assert same_bits(run(crop, weight, table, patch, 1)[0], expected)


def test_one_plane_for_all_channels_is_read_in_place() -> None:
    pixels, weight, table, _ = patch_case(2, (9, 9), (4, 4), uint8=False, dtype=torch.float16)
    gray = pixels[:, :1].expand(-1, 3, -1, -1)
    expected, _ = run(gray.contiguous(), padded(weight), table, (4, 4), 1)
    assert same_bits(run(gray, padded(weight), table, (4, 4), 1)[0], expected)


def test_images_past_two_billion_bytes() -> None:
    """60 MB from one image to the next, of which only a few pages are ever touched."""
    batch, stride = 72, 60_000_000
    pixels, weight, table, _ = patch_case(batch, (8, 8), (8, 8), uint8=True, dtype=torch.float16)
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = torch.frombuffer(mmap.mmap(-1, batch * stride, flags=kind), dtype=torch.uint8)
    far = memory.as_strided(pixels.shape, (stride, *pixels.stride()[1:]))
    far.copy_(pixels)
    expected, _ = run(pixels, padded(weight), table, (8, 8), 1)
    assert same_bits(run(far, padded(weight), table, (8, 8), 1)[0], expected)


# -- the call --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "patch", "channels", "stored", "numbers"),
    [
        ((224, 224), 16, 3, torch.uint8, 16),
        ((224, 224), 14, 3, torch.uint8, 2),
        ((518, 518), 14, 3, torch.uint8, 2),
        ((240, 200), 16, 3, torch.uint8, 8),
        ((224, 225), 16, 3, torch.uint8, 1),
        ((224, 224), 16, 3, torch.float32, 4),
        ((224, 224), 14, 3, torch.float32, 2),
        ((224, 224), 16, 3, torch.float16, 8),
        ((224, 225), 14, 3, torch.float16, 1),
    ],
    ids=str,
)
def test_loads_are_as_wide_as_every_address_allows(
    size: tuple[int, int], patch: int, channels: int, stored: torch.dtype, numbers: int
) -> None:
    uint8 = stored == torch.uint8
    shape = (2, *size, channels) if uint8 else (2, channels, *size)
    pixels = torch.empty(shape, dtype=stored, device="meta")
    (call,) = calls_of(pixels, patch, channels)
    assert call.arguments["ALIGN"] == numbers
    positions = torch.arange(pixels.numel()).view(shape) if uint8 else None
    if positions is not None:  # the first number of every run of every patch
        runs = positions[:, : size[0] // patch * patch, : size[1] // patch * patch : patch, 0]
        assert not (runs % numbers).any()
        assert numbers == 16 or (runs % (2 * numbers)).any()
    assert call.arguments["PREFETCH"] == (numbers * stored.itemsize < 4)


def calls_of(pixels: Tensor, patch: int, channels: int, width: int = 64, tokens: int = 0) -> Any:
    """The calls on meta tensors, prefix 1."""
    size = pixels.shape[1:3] if pixels.dtype == torch.uint8 else pixels.shape[2:]
    tokens = tokens or 1 + (size[0] // patch) * (size[1] // patch)
    columns = -(-patch * patch * channels // 64) * 64
    return patch_embed_calls(
        SMALL,
        torch.empty(pixels.shape[0] * tokens, width, dtype=torch.float16, device="meta"),
        pixels,
        torch.empty(width, columns, dtype=torch.float16, device="meta"),
        torch.empty(tokens, width, device="meta"),
        patch=(patch, patch),
        channels=channels,
        prefix=1,
    )


def test_an_image_size_recompiles_nothing() -> None:
    """Only alignment is constant; sizes and strides are varying integers."""
    first, second = (
        calls_of(torch.empty(b, h, w, 3, dtype=torch.uint8, device="meta"), 16, 3)[0]
        for b, h, w in ((80, 224, 224), (99, 384, 512))
    )
    numbers = {key: value for key, value in first.arguments.items() if isinstance(value, int)}
    changed = {key for key, value in numbers.items() if value != second.arguments[key]}
    assert {"rows", "tokens", "columns", "image_stride", "line_stride"} <= changed <= set(VARYING)


def good() -> dict[str, Any]:
    pixels, weight, table, _ = patch_case(2, (8, 9), (4, 4), uint8=True, dtype=torch.float16)
    return {
        "out": torch.empty(10, 40, dtype=torch.float16),
        "pixels": pixels,
        "weight": padded(weight),
        "table": table,
        "stats": torch.empty(2, 10),
        "patch": (4, 4),
        "channels": 3,
        "prefix": 1,
    }


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "int8 pixels": ({"pixels": torch.zeros(2, 8, 9, 3, dtype=torch.int8)}, "got torch.int8"),
    "three dimensions": ({"pixels": torch.zeros(8, 9, 3, dtype=torch.uint8)}, "got shape"),
    "channels first": ({"pixels": torch.zeros(2, 3, 8, 9, dtype=torch.uint8)}, r"\(B, H, W, 3\)"),
    "channels last": ({"pixels": torch.zeros(2, 8, 9, 3)}, r"\(B, 3, H, W\)"),
    "mirrored": ({"pixels": torch.zeros(2, 8, 9, 6, dtype=torch.uint8)[..., ::2]}, "without gaps"),
    "turned": ({"pixels": torch.zeros(2, 3, 9, 8).transpose(2, 3)}, "without gaps"),
    "int32 weight": ({"weight": torch.zeros(40, 64, dtype=torch.int32)}, "weight: got torch.int32"),
    "no padding": ({"weight": torch.zeros(40, 48, dtype=torch.float16)}, "wanted 48 padded"),
    "too few columns": ({"patch": (8, 8), "prefix": 4}, "wanted 192 padded"),
    "half a table": (
        {"table": torch.zeros(5, 40, dtype=torch.float16)},
        "table: got torch.float16",
    ),
    "another grid": (
        {"table": torch.zeros(6, 40)},
        r"table: got shape \(6, 40\), wanted \(5, 40\)",
    ),
    "another prefix": ({"prefix": 2}, r"table: got shape \(5, 40\), wanted \(6, 40\)"),
    "fp32 out": ({"out": torch.empty(10, 40)}, "out: got torch.float32, wanted torch.float16"),
    "short out": ({"out": torch.empty(9, 40, dtype=torch.float16)}, r"out: got shape \(9, 40\)"),
    "turned out": ({"out": torch.empty(40, 10, dtype=torch.float16).t()}, "out: got strides"),
    "short stats": ({"stats": torch.empty(1, 10)}, r"stats: got shape \(1, 10\), wanted \(2, 10\)"),
    "elsewhere": ({"table": torch.empty(5, 40, device="meta")}, "table: got a tensor on meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_kernel_cannot_take_is_refused(name: str) -> None:
    change, words = BAD[name]
    assert patch_embed_calls(SMALL, **good())
    with pytest.raises(ValueError, match=words):
        patch_embed_calls(SMALL, **(good() | change))


def test_images_of_two_billion_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="offsets of 32 bits"):
        calls_of(torch.empty(1, 20_000, 40_000, 3, dtype=torch.uint8, device="meta"), 16, 3)
