"""Every operator at the shapes of published models: N1 against PyTorch, and N10."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gpu.cases import INT8_OPS, PER_TOKEN, SHAPES, TILES, Case, Work, case_of, different, works
from gpu.common import DEVICE, DRY, HALVES, NAMES, POISONS, Guarded, same_bits
from helpers import assert_close, reference_numbers
from vitrail.plan.plan import Affine, Step
from vitrail_kernels import OPERATORS
from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.device.stats import stats_ref
from vitrail_kernels.ops.position import position_ref

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]


def _params(least: int = 1) -> list[Any]:
    return [
        pytest.param(work, launch, id=f"{name} {label}")
        for name, shapes in SHAPES.items()
        for label, work, launch in different(list(works(shapes)))
        if len(work.lengths) >= least
    ]


# -- N1 --------------------------------------------------------------------------------------------


def judge(case: Case, dtype: torch.dtype) -> None:
    """The kernel's outputs against the reference in fp64, and PyTorch's own in ``dtype``."""
    kept = {name: tensor.clone() for name, tensor in case.given.items()}
    ours = case.run()
    for name, tensor in case.given.items():
        assert same_bits(tensor, kept[name]), f"{name}: an input changed"
    with reference_numbers():
        exact = case.reference(torch.float64)["out"]
        peer = case.reference()["out"].to(dtype)
    out = ours["out"]
    if case.op == "pool":  # fp32 inside, whatever it is given
        assert_close(out, exact, name="embedding")
        assert_close(out.to(dtype), exact, peer, name="embedding, rounded")
        assert not ours["status"].any(), "status of finite items"
        return
    assert_close(out.to(dtype), exact, peer, name=case.op)
    if "stats" in ours:
        wanted = torch.empty_like(ours["stats"], dtype=torch.float64)
        stats_ref(wanted, out.double())
        chunks = len(wanted) // 2
        assert_close(ours["stats"][:chunks], wanted[:chunks], name="sums")
        assert_close(ours["stats"][chunks:], wanted[chunks:], name="squares")


@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
@pytest.mark.parametrize(("work", "launch"), _params())
def test_a_kernel_errs_no_more_than_pytorch(work: Work, launch: Step, dtype: torch.dtype) -> None:
    judge(case_of(work, launch, dtype), dtype)


# -- one order of sums -----------------------------------------------------------------------------

QUERIES = (
    KernelConfig(64, 64, 0, 4, 2),
    KernelConfig(64, 64, 0, 4, 3),
    KernelConfig(128, 64, 0, 8, 3),
)


@pytest.mark.usefixtures("kernels", *(["ordered_dot"] if DRY else []))
@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
@pytest.mark.parametrize("label", ["qkv", "attention", "out", "up", "down"])
def test_every_tile_gives_the_same_bits(
    label: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that tiles may be chosen by the size of the batch."""
    work = next(works(SHAPES["CLIP H/14"]))
    launch = next(one for one in work.plan.steps if one.label.endswith(f".0.{label}"))
    case = case_of(work, launch, dtype)
    configs = QUERIES if label == "attention" else TILES
    chooser = "attention.attention_config" if label == "attention" else "linear.linear_config"
    results = []
    for config in configs:
        monkeypatch.setattr(f"vitrail_kernels.ops.{chooser}", lambda *_, c=config: c)
        results.append(case.run())
    for config, result in zip(configs, results, strict=True):
        for name, values in result.items():
            assert same_bits(values, results[0][name]), f"{name}: {config} gives other bits"


def test_all_operators_are_met() -> None:
    met = {one.op for shapes in SHAPES.values() for _, _, one in different(list(works(shapes)))}
    assert set(OPERATORS) - met <= {"position", "resize", *INT8_OPS}  # with tests of their own


@pytest.mark.parametrize("antialias", [False, True], ids=["plain", "antialias"])
@pytest.mark.parametrize(
    ("table_grid", "grid"),
    [
        ((14, 14), (14, 14)),
        ((14, 14), (24, 24)),
        ((7, 7), (14, 9)),
        ((16, 16), (24, 32)),
        ((37, 37), (16, 16)),
        ((37, 37), (32, 48)),
        ((37, 37), (37, 37)),
    ],
    ids=str,
)
def test_positions_are_pytorchs_in_fp64(
    table_grid: tuple[int, int], grid: tuple[int, int], antialias: bool
) -> None:
    width = 64 if DRY else 768
    prefix = torch.randn(5, width, device=DEVICE)
    table = torch.randn(1 + table_grid[0] * table_grid[1], width, device=DEVICE)
    bias = torch.randn(width, device=DEVICE)
    scalars: dict[str, Any] = {"table_grid": table_grid, "grid": grid, "antialias": antialias}
    out = Guarded((5 + grid[0] * grid[1], width), torch.float32)
    OPERATORS["position"].launch(out.out, table, prefix, bias, **scalars)
    exact = torch.empty_like(out.out, dtype=torch.float64)
    position_ref(exact, table.double(), prefix.double(), bias.double(), **scalars)
    ours = out.done()
    assert same_bits(ours[:5], prefix)
    assert_close(ours, exact, name="positions")


# -- N10 -------------------------------------------------------------------------------------------


def rows_of(case: Case, rows: Affine, items: list[int]) -> Tensor:
    """Which rows of a tensor with ``rows`` belong to ``items``."""
    if rows != PER_TOKEN:
        return torch.tensor(items, device=DEVICE)
    ends = torch.tensor(case.lengths).cumsum(0).tolist()
    spans = [torch.arange(ends[i] - case.lengths[i], ends[i]) for i in items]
    return torch.cat(spans).to(DEVICE)


def poisoned(case: Case, items: list[int], poison: float) -> dict[str, Tensor]:
    """The inputs with every number of ``items`` replaced."""
    given = {name: tensor.clone() for name, tensor in case.given.items()}
    for name, (rows, dimension) in case.rows.items():
        if name not in given or name == "x_stats":
            continue
        tensor, index = given[name], rows_of(case, rows, items)
        if tensor.dtype == torch.uint8:
            tensor.index_fill_(dimension, index, 255)
        elif tensor.is_floating_point():
            tensor.index_fill_(dimension, index, poison)
        elif name == "ids":  # the last word of the vocabulary is nobody else's
            tensor.index_fill_(0, index, len(given["token"]) - 1)
            given["token"][-1] = poison
    if "x_stats" in given:
        stats_ref(given["x_stats"], given["x"])
    return given


@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
@pytest.mark.parametrize(("work", "launch"), _params(least=3))
def test_a_poisoned_item_changes_no_bit_of_another(
    work: Work, launch: Step, dtype: torch.dtype, poison: float
) -> None:
    case = case_of(work, launch, dtype)
    count = len(case.lengths)
    items = sorted({1, count // 2, count - 1})
    others = [item for item in range(count) if item not in items]
    clean, dirty = case.run(), case.run(poisoned(case, items, poison))
    for name in case.outputs:
        rows, dimension = case.rows[name]
        kept, changed = rows_of(case, rows, others), rows_of(case, rows, items)
        a, b = (result[name].index_select(dimension, kept) for result in (clean, dirty))
        assert same_bits(a, b), f"{name}: {int((a != b).sum())} numbers of other items changed"
        if name == "out":
            a, b = (result[name].index_select(dimension, changed) for result in (clean, dirty))
            assert not same_bits(a, b), "the poison did not arrive"


def test_a_shared_row_would_be_noticed() -> None:
    """The comparison can fail: of items that are poisoned, the bits do change."""
    work = next(works(SHAPES["CLIP H/14"]))
    launch = next(one for one in work.plan.steps if one.op == "linear")
    case = case_of(work, launch, HALVES[0])
    clean, dirty = case.run()["out"], case.run(poisoned(case, [1], float("nan")))["out"]
    assert not same_bits(clean, dirty)
