"""The int8 operators on a CPU: the plain references, and the kernels of `vitrail._C`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import vitrail
from vitrail.plan.vision import vision_pooled
from vitrail.runtime import host_int8
from vitrail.runtime.host_int8 import ACTIVATIONS, HOST_OPERATORS
from vitrail_kernels.ops.linear_int8 import group_columns, linear_int8_ref
from vitrail_kernels.ops.linear_int8_grouped import FLOAT_OF_INTEGER, linear_int8_grouped_ref
from vitrail_kernels.ops.norm_quant import norm_quant_ref

REFERENCES: dict[str, Callable[..., None]] = {
    "norm_quant": norm_quant_ref,
    "linear_int8": linear_int8_ref,
    "linear_int8_grouped": linear_int8_grouped_ref,
}
IMPLEMENTATIONS = ("AVX512-VNNI", "AVX-VNNI", "reference")
TOKENS, WIDTH, HIDDEN = 7, 80, 384
EXTREME = torch.tensor([127, -127, -128], dtype=torch.int8)


def _refuse(*tensors: object, **others: object) -> None:
    raise AssertionError("the kernels did not take the call")


@pytest.fixture(params=IMPLEMENTATIONS)
def operators(request: pytest.FixtureRequest) -> Iterator[dict[str, Callable[..., None]]]:
    """The three operators. The kernels raise if a call falls back to the references."""
    if request.param == "reference":
        yield REFERENCES
        return
    extension = pytest.importorskip("vitrail._C", exc_type=ImportError)
    before = extension.int8_instructions()
    if not extension.use_int8_instructions(request.param):
        pytest.skip(f"this CPU has no {request.param}")

    with pytest.MonkeyPatch.context() as patch:
        for name in REFERENCES:
            patch.setattr(host_int8, f"{name}_ref", _refuse)
        yield HOST_OPERATORS
    assert extension.use_int8_instructions(before)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Layer(NamedTuple):
    """A weight, its scales and its bias."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    @property
    def shift(self) -> Tensor:
        """For unsigned codes in groups of 128."""
        sums = self.weight.unflatten(1, (-1, 128)).sum(2).float()
        return (FLOAT_OF_INTEGER - 128 * sums).t().contiguous()


def layer(columns: int, depth: int, seed: int = 0) -> Layer:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (columns, depth), generator=random, dtype=torch.int8)
    scale = 0.01 + 0.01 * torch.rand(columns, generator=random)
    return Layer(weight, scale / depth**0.5, torch.randn(columns, generator=random))


def codes(rows: int, depth: int, groups: int = 1, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Codes (rows, depth) and scales (groups, rows)."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (rows, depth), generator=random, dtype=torch.int8)
    return x, 0.005 + 0.01 * torch.rand(groups, rows, generator=random)


def hidden(
    operators: dict[str, Callable[..., None]], x: Tensor, activation: str | None, gated: bool
) -> tuple[Tensor, Tensor]:
    """The up projection's codes and scales of fp32 rows ``x``."""
    up = layer(HIDDEN, WIDTH)
    out, out_scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0])
    operators["norm_quant"](out, out_scale, x, torch.linspace(0.5, 2, WIDTH), eps=1e-6)
    y = torch.empty(x.shape[0], HIDDEN // (2 if gated else 1), dtype=torch.int8)
    y_scale = torch.empty(y.shape[1] // group_columns(gated), x.shape[0])
    operators["linear_int8"](y, out, out_scale, *up, y_scale, activation=activation, gated=gated)
    return y, y_scale


def everything(operators: dict[str, Callable[..., None]], x: Tensor) -> list[Tensor]:
    """Results by row of all operators, as a block calls them, on fp32 rows ``x``."""
    rows = torch.arange(x.shape[0], dtype=torch.int32)
    out, out_scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0])
    operators["norm_quant"](out, out_scale, x, torch.linspace(0.5, 2, WIDTH), rows, eps=1e-6)
    results = [out, out_scale]
    for activation in ACTIVATIONS:
        qkv = torch.empty(x.shape[0], 3 * WIDTH)
        operators["linear_int8"](
            qkv, out, out_scale, *layer(3 * WIDTH, WIDTH), activation=activation
        )
        results.append(qkv)
    for activation, gated in (("gelu", False), ("silu", True), (None, False)):
        y, y_scale = hidden(operators, x, activation, gated)
        results += [y, y_scale.t()]
    y, y_scale = hidden(operators, x, "gelu", gated=False)
    down, result = layer(WIDTH, HIDDEN), torch.empty_like(x)
    operators["linear_int8_grouped"](
        result,
        y,
        y_scale,
        down.weight,
        down.scale,
        down.shift,
        down.bias,
        torch.linspace(0.1, 1, WIDTH),
        x,
        rows,
    )
    return [*results, result]


def stream(rows: int) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(3))


def test_one_item_has_the_bits_that_it_has_in_a_batch(
    operators: dict[str, Callable[..., None]], threads: int
) -> None:
    items = stream(33 * TOKENS).split(TOKENS)
    alone = {item: everything(operators, items[item]) for item in (0, 1, 2, 15, 32)}
    for batch in (2, 3, 16, 33):
        together = everything(operators, torch.cat(items[:batch]))
        for item in (item for item in alone if item < batch):
            for number, result in enumerate(together):
                ours = result[item * TOKENS : (item + 1) * TOKENS]
                assert torch.equal(ours, alone[item][number]), (batch, item, number)


def test_calls_from_many_threads_have_the_bits_of_calls_in_turn(
    operators: dict[str, Callable[..., None]],
) -> None:
    inputs = [stream(rows) for rows in (1, 7, 30, 100)] * 6
    wanted = [everything(operators, x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda x: everything(operators, x), inputs))
    for ours, theirs in zip(results, wanted, strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_nan_marks_its_row_and_no_other(
    operators: dict[str, Callable[..., None]], threads: int
) -> None:
    x = stream(23)
    clean = everything(operators, x)
    x[11, 5] = torch.nan
    others = torch.arange(23) != 11
    for number, (before, after) in enumerate(zip(clean, everything(operators, x), strict=True)):
        assert torch.equal(before[others], after[others]), number
        if after.is_floating_point():
            assert after[11].isnan().all(), number


def test_an_infinite_row_has_scales_that_are_nan(operators: dict[str, Callable[..., None]]) -> None:
    x, x_scale = codes(9, WIDTH)
    x_scale[0, 4] = torch.inf
    y, y_scale = torch.empty(9, HIDDEN, dtype=torch.int8), torch.empty(HIDDEN // 128, 9)
    operators["linear_int8"](y, x, x_scale[0], *layer(HIDDEN, WIDTH), y_scale, activation="gelu")
    assert y_scale[:, 4].isnan().all()
    assert y_scale.isfinite().sum() == 8 * HIDDEN // 128


def test_a_row_of_zeros_has_a_scale(operators: dict[str, Callable[..., None]]) -> None:
    out, scale = torch.ones(2, WIDTH, dtype=torch.int8), torch.empty(2)
    operators["norm_quant"](out, scale, torch.zeros(2, WIDTH), torch.ones(WIDTH), eps=1e-6)
    assert scale.gt(0).all()
    assert not out.any()


@pytest.mark.parametrize("depth", [4, 1028, 16384])
def test_extreme_codes_are_added_exactly(
    operators: dict[str, Callable[..., None]], depth: int
) -> None:
    random = torch.Generator().manual_seed(depth)
    x = EXTREME[torch.randint(0, 3, (8, depth), generator=random)]
    weight = EXTREME[torch.randint(0, 3, (70, depth), generator=random)]
    x[0], weight[0], x[1], weight[1] = 127, 127, -128, -128
    # sums below 2^24, which fp32 holds to the last bit
    x[2, ::2], weight[2] = -127, 127
    x[2, 1::2] = 127
    wanted = x.long() @ weight.long().t()
    out = torch.empty(8, 70)
    one = torch.ones(70)
    operators["linear_int8"](out, x, torch.ones(8), weight, one, torch.zeros(70))
    assert torch.equal(out, wanted.float())


@pytest.mark.parametrize("group", [128, 256])
@pytest.mark.parametrize("is_unsigned", [False, True])
def test_extreme_groups_are_added_exactly(
    operators: dict[str, Callable[..., None]], group: int, is_unsigned: bool
) -> None:
    depth, columns = 16384, 70
    random = torch.Generator().manual_seed(group)
    x = EXTREME[torch.randint(0, 3, (8, depth), generator=random)]
    weight = EXTREME[:2][torch.randint(0, 2, (columns, depth), generator=random)]
    x[0], weight[0], x[1], weight[1] = 127, 127, -128, -127
    groups = depth // group
    shift = torch.full((groups, columns), FLOAT_OF_INTEGER)
    if is_unsigned:
        shift -= 128 * weight.unflatten(1, (groups, group)).sum(2).t()
    for number in (0, 1, groups - 1):  # one group alone, then all
        x_scale = torch.zeros(groups, 8)
        x_scale[number] = 1
        part = slice(number * group, (number + 1) * group)
        wanted = (x[:, part].long() + 128 * is_unsigned) @ weight[:, part].long().t()
        out = torch.empty(8, columns)
        one, zero = torch.ones(columns), torch.zeros(columns)
        operators["linear_int8_grouped"](out, x, x_scale, weight, one, shift, zero, group=group)
        assert torch.equal(out, wanted.float()), number
    total = (x.long() + 128 * is_unsigned) @ weight.long().t()
    operators["linear_int8_grouped"](
        out, x, torch.ones(groups, 8), weight, one, shift, zero, group=group
    )
    torch.testing.assert_close(out, total.float(), rtol=2e-7 * groups**0.5, atol=0)


def test_products_of_any_shape_are_exact(operators: dict[str, Callable[..., None]]) -> None:
    """All sums are below 2^24, so that fp32 holds them."""
    dice = Random(0)
    for number in range(40):
        rows, columns = dice.randint(1, 20), dice.randint(1, 300)
        group, groups = 4 * dice.randint(1, 40), dice.randint(1, 5)
        x, _ = codes(rows, group * groups, seed=number)
        weight = layer(columns, group * groups).weight
        one, zero = torch.ones(columns), torch.zeros(columns)
        wanted = (x.long() @ weight.long().t()).float()
        out = torch.empty(rows, columns)
        operators["linear_int8"](out, x, torch.ones(rows), weight, one, zero)
        assert torch.equal(out, wanted), (rows, columns, group, groups)
        out.zero_()
        shift = torch.full((groups, columns), FLOAT_OF_INTEGER)
        operators["linear_int8_grouped"](
            out, x, torch.ones(groups, rows), weight, one, shift, zero,
            group=group,
        )  # fmt: skip
        assert torch.equal(out, wanted), (rows, columns, group, groups)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_codes_are_those_of_the_reference(
    operators: dict[str, Callable[..., None]], activation: str | None, gated: bool
) -> None:
    """At most 1 apart, at most one code in 1,000."""
    x = stream(150)
    ours, ours_scale = hidden(operators, x, activation, gated)
    wanted, wanted_scale = hidden(REFERENCES, x, activation, gated)
    apart = (ours.int() - wanted.int()).abs()
    assert apart.max() <= 1
    assert apart.count_nonzero() <= apart.numel() / 1000
    torch.testing.assert_close(ours_scale, wanted_scale, rtol=1e-3, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("columns", [70, 384])
def test_values_are_those_of_the_reference(
    operators: dict[str, Callable[..., None]], activation: str | None, gated: bool, columns: int
) -> None:
    x, x_scale = codes(19, WIDTH)
    ours, wanted = torch.empty(2, 19, columns // (2 if gated else 1))
    for out, call in ((ours, operators["linear_int8"]), (wanted, linear_int8_ref)):
        call(out, x, x_scale[0], *layer(columns, WIDTH), activation=activation, gated=gated)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("columns", [70, 256])
@pytest.mark.parametrize("form", ["plain", "scale", "residual", "residual rows", "in place"])
def test_grouped_values_are_those_of_the_reference(
    operators: dict[str, Callable[..., None]], form: str, columns: int
) -> None:
    down = layer(columns, HIDDEN)
    x, x_scale = codes(19, HIDDEN, HIDDEN // 128)
    values = torch.randn(40, columns, generator=torch.Generator().manual_seed(5))
    rows = torch.arange(39, 1, -2, dtype=torch.int32)
    ours, wanted = values[:19].clone(), values[:19].clone()
    for out, call in ((ours, operators["linear_int8_grouped"]), (wanted, linear_int8_grouped_ref)):
        call(
            out,
            x,
            x_scale,
            down.weight,
            down.scale,
            down.shift,
            down.bias,
            torch.linspace(0.1, 2, columns) if form == "scale" else None,
            {"residual": values[:19], "residual rows": values, "in place": out}.get(form),
            rows if form == "residual rows" else None,
        )
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=2e-6)


def test_norm_quant_gives_the_codes_of_the_reference(
    operators: dict[str, Callable[..., None]],
) -> None:
    """Of any width of 16 columns, at a mean that is 100 times the deviation, by picked rows."""
    rows = torch.tensor([4, 4, 0, 9], dtype=torch.int32)
    for width in (16, 48, 80, 384, 1040):
        x = torch.randn(10, width, generator=torch.Generator().manual_seed(width)) + 100
        smooth = torch.linspace(0.1, 3, width)
        ours, wanted = torch.empty(2, 4, width, dtype=torch.int8)
        ours_scale, wanted_scale = torch.empty(2, 4)
        operators["norm_quant"](ours, ours_scale, x, smooth, rows, eps=1e-6)
        norm_quant_ref(wanted, wanted_scale, x, smooth, rows, eps=1e-6)
        apart = (ours.int() - wanted.int()).abs()
        assert apart.max() <= 1
        assert apart.count_nonzero() <= 1 + apart.numel() / 1000
        torch.testing.assert_close(ours_scale, wanted_scale, rtol=1e-4, atol=0)


def test_other_tensors_go_to_the_reference() -> None:
    """fp16 rows, strided rows, a depth that is no multiple of 4, and wrong shapes."""
    x, x_scale = codes(9, 30)
    ours, wanted = torch.empty(2, 9, 16)
    HOST_OPERATORS["linear_int8"](ours, x, x_scale[0], *layer(16, 30))
    linear_int8_ref(wanted, x, x_scale[0], *layer(16, 30))
    assert torch.equal(ours, wanted)
    for dtype in (torch.float16, torch.float32):
        rows = stream(18).to(dtype)[::2]
        out, ref = torch.empty(2, 9, WIDTH, dtype=torch.int8)
        scale, ref_scale = torch.empty(2, 9)
        HOST_OPERATORS["norm_quant"](out, scale, rows, torch.ones(WIDTH), eps=1e-6)
        norm_quant_ref(ref, ref_scale, rows, torch.ones(WIDTH), eps=1e-6)
        assert torch.equal(out, ref)
        assert torch.equal(scale, ref_scale)
    with pytest.raises(RuntimeError):
        HOST_OPERATORS["linear_int8"](ours, x, x_scale[0], *layer(17, 30))


@pytest.mark.filterwarnings("ignore:.*not verified on your data")
def test_every_int8_step_of_a_model_takes_the_kernels(
    int8_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not host_int8.instructions():
        pytest.skip("this CPU has no VNNI, or vitrail._C is not built")
    model = vitrail.load(int8_clip, device="cpu")
    spec = model.spec.vision
    assert spec is not None
    pixels = torch.randint(0, 256, (3, *spec.image, 3), dtype=torch.uint8)
    taken: Counter[str] = Counter()
    with monkeypatch.context() as patch:
        for name, function in HOST_OPERATORS.items():

            def count(
                *tensors: Tensor, name: str = name, function: Any = function, **others: Any
            ) -> None:
                taken[name] += 1
                function(*tensors, **others)

            patch.setitem(HOST_OPERATORS, name, count)
            patch.setattr(host_int8, f"{name}_ref", _refuse)
        ours = model.encode_image(pixels)
    steps = Counter(step.op for step in vision_pooled(spec, uint8=True).steps)
    assert taken == {name: steps[name] for name in HOST_OPERATORS}
    monkeypatch.setattr(host_int8, "_extension", lambda: None)
    similarity = torch.cosine_similarity(ours, model.encode_image(pixels))
    assert similarity.min() >= 0.9999
