"""The position kernel in Triton's interpreter, against fp64, PyTorch and what it must not touch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import assert_close
from interpreted.guard import at_page_end
from kernels.test_operators import POISONS, Guarded, normal, resampling, same_bits
from vitrail_kernels.launch import Target, launch
from vitrail_kernels.ops.position import POSITION, position_calls, position_ref

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # NumPy, of the poisons
]

GPU = Target(90, 3)


def run(
    table: Tensor,
    prefix: Tensor,
    bias: Tensor | None,
    table_grid: tuple[int, int],
    grid: tuple[int, int],
    antialias: bool,
) -> Tensor:
    """Every input ends at a page that nobody may read; the table's first row is nobody's."""
    out = Guarded(prefix.shape[0] + grid[0] * grid[1], table.shape[1], dtype=torch.float32)
    table = at_page_end(table)
    table[0] = float("nan")
    bias = None if bias is None else at_page_end(bias)
    scalars: dict[str, Any] = {"table_grid": table_grid, "grid": grid, "antialias": antialias}
    launch(position_calls(GPU, out.out, table, at_page_end(prefix), bias, **scalars))
    return out.done()


def case(table_grid: tuple[int, int], prefix: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return normal(1 + table_grid[0] * table_grid[1], width), normal(prefix, width), normal(width)


def matrices(
    table_grid: tuple[int, int], grid: tuple[int, int], antialias: bool
) -> tuple[Tensor, Tensor]:
    down, across = (resampling(g, t, antialias) for g, t in zip(table_grid, grid, strict=True))
    return down, across


@pytest.mark.parametrize("antialias", [False, True], ids=["plain", "antialias"])
@pytest.mark.parametrize(
    ("table_grid", "grid", "prefix", "width"),
    [
        ((7, 7), (8, 9), 1, 24),
        ((7, 7), (14, 3), 5, 24),
        ((7, 7), (3, 11), 0, 24),
        ((6, 6), (3, 4), 1, 130),
        ((4, 9), (9, 4), 5, 128),
        ((5, 4), (5, 7), 1, 7),
        ((2, 2), (1, 1), 1, 24),
        ((1, 1), (3, 2), 3, 24),
        ((9, 8), (1, 2), 1, 24),
    ],
    ids=str,
)
def test_it_is_the_bicubic_formula_and_pytorch(
    table_grid: tuple[int, int], grid: tuple[int, int], prefix: int, width: int, antialias: bool
) -> None:
    table, special, bias = case(table_grid, prefix, width)
    ours = run(table, special, bias, table_grid, grid, antialias)
    down, across = matrices(table_grid, grid, antialias)
    square = table[1:].double().view(*table_grid, width)
    resized = torch.einsum("yi,xj,ijc->yxc", down, across, square).reshape(-1, width)
    assert same_bits(ours[:prefix], special)
    assert_close(ours[prefix:], resized + bias.double(), name="formula")
    theirs = torch.empty_like(ours)
    position_ref(
        theirs, table, special, bias, table_grid=table_grid, grid=grid, antialias=antialias
    )
    assert_close(ours, theirs, name="F.interpolate")


@pytest.mark.parametrize("antialias", [False, True], ids=["plain", "antialias"])
@pytest.mark.parametrize("prefix", [1, 5])
def test_its_own_grid_keeps_every_bit(prefix: int, antialias: bool) -> None:
    table, special, bias = case((4, 9), prefix, 24)
    table[3], special[0, :3] = -0.0, -0.0
    table[5, 2], special[0, 5] = float("nan"), float("inf")
    plain = run(table, special, None, (4, 9), (4, 9), antialias)
    assert same_bits(plain, torch.cat([special, table[1:]]))
    moved = run(table, special, bias, (4, 9), (4, 9), antialias)
    assert same_bits(moved, torch.cat([special, table[1:] + bias]))


def test_a_grid_of_the_same_count_but_another_shape_is_resized() -> None:
    table, special, _ = case((4, 6), 1, 8)
    assert not torch.equal(run(table, special, None, (4, 6), (6, 4), False)[1:], table[1:])


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize(
    ("grid", "antialias"), [((9, 5), False), ((4, 4), False), ((3, 5), True), ((7, 9), True)]
)
def test_a_row_reaches_only_the_cells_it_weighs_in(
    grid: tuple[int, int], antialias: bool, poison: float
) -> None:
    table_grid, (y, x) = (6, 8), (1, 6)
    table, special, bias = case(table_grid, 1, 24)
    clean = run(table, special, bias, table_grid, grid, antialias)
    table[1 + y * table_grid[1] + x] = poison
    changed = run(table, special, bias, table_grid, grid, antialias)
    down, across = matrices(table_grid, grid, antialias)
    reached = (down[:, y, None].abs() > 1e-6) & (across[None, :, x].abs() > 1e-6)
    keep = torch.cat([torch.ones(1, dtype=torch.bool), ~reached.flatten()])
    assert 1 < keep.sum() < len(keep)
    assert same_bits(changed[keep], clean[keep])
    assert ((changed != clean)[~keep]).all()


def test_the_operator_is_the_call() -> None:
    table, special, bias = case((3, 3), 1, 24)
    expected = run(table, special, bias, (3, 3), (4, 2), True)
    out = torch.empty_like(expected)
    POSITION.launch(out, table, special, bias, table_grid=(3, 3), grid=(4, 2), antialias=True)
    assert same_bits(out, expected)


# -- the call --------------------------------------------------------------------------------------


def good() -> dict[str, Any]:
    return {
        "out": torch.empty(13, 24),
        "table": torch.zeros(10, 24),
        "prefix": torch.zeros(1, 24),
        "bias": torch.zeros(24),
        "table_grid": (3, 3),
        "grid": (4, 3),
        "antialias": False,
    }


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "half a table": (
        {"table": torch.zeros(10, 24, dtype=torch.float16)},
        "table: got torch.float16",
    ),
    "another table": (
        {"table_grid": (3, 4)},
        r"table: got shape \(10, 24\), wanted \(13, 24\)",
    ),
    "another grid": ({"grid": (4, 4)}, r"out: got shape \(13, 24\), wanted \(17, 24\)"),
    "an empty grid": ({"grid": (0, 3)}, "wanted a row at least"),
    "narrow prefix": ({"prefix": torch.zeros(1, 23)}, "prefix: got shape"),
    "long bias": ({"bias": torch.zeros(25)}, r"bias: got shape \(25,\), wanted \(24,\)"),
    "turned": ({"table": torch.zeros(24, 10).t()}, "table: got strides"),
    "elsewhere": ({"bias": torch.empty(24, device="meta")}, "bias: got a tensor on meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_kernel_cannot_take_is_refused(name: str) -> None:
    change, words = BAD[name]
    assert position_calls(GPU, **good())
    with pytest.raises(ValueError, match=words):
        position_calls(GPU, **(good() | change))


def test_tables_of_two_billion_numbers_are_refused() -> None:
    change = {"grid": (1100, 1000), "out": torch.empty(1_100_001, 2048, device="meta")}
    for name, shape in (("table", (10, 2048)), ("prefix", (1, 2048)), ("bias", (2048,))):
        change[name] = torch.empty(shape, device="meta")
    with pytest.raises(ValueError, match="offsets of 32 bits"):
        position_calls(GPU, **(good() | change))
