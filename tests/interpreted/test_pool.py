"""The kernels of pool and class_mean in Triton's interpreter: numbers, status words, isolation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import assert_close
from interpreted.guard import at_page_end
from kernels.test_operators import EPS, POISONS, Guarded, check, explicit_norm, normal, same_bits
from vitrail_kernels.launch import Target, launch
from vitrail_kernels.ops.class_mean import CLASS_MEAN, class_mean_calls
from vitrail_kernels.ops.layernorm import row_config
from vitrail_kernels.ops.pool import POOL, pool_calls

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # NumPy, of the poisons
]

TARGETS = (Target(90, 3), Target(80, 3))
DTYPES = (torch.float16, torch.float32)
KINDS = ("projected", "normalized")
Ends = dict[str, Tensor | None]


def run(
    x: Tensor,
    ends: Ends,
    rows: Tensor | None = None,
    *,
    eps: float = EPS,
    target: Target = TARGETS[0],
) -> tuple[Tensor, Tensor]:
    """Embedding and status; every input ends at a page that nobody may read."""
    weight, batch = ends.get("weight"), len(x) if rows is None else len(rows)
    width = x.shape[1] if weight is None else len(weight)
    out, status = Guarded(batch, width, dtype=torch.float32), Guarded(batch, dtype=torch.int32)
    arguments = {name: None if end is None else at_page_end(end) for name, end in ends.items()}
    rows = None if rows is None else at_page_end(rows)
    calls = pool_calls(target, out.out, status.out, at_page_end(x), **arguments, rows=rows, eps=eps)
    launch(calls)
    return out.done(), status.done()


def projection(columns: int, width: int, dtype: torch.dtype) -> Ends:
    return {"weight": normal(columns, width, dtype=dtype), "bias": normal(columns)}


def ends_of(kind: str, width: int, dtype: torch.dtype) -> Ends:
    if kind == "projected":
        return projection(40, width, dtype)
    return {"gamma": normal(width) + 1, "beta": normal(width)}


def explicit(x: Tensor, ends: Ends, eps: float) -> Tensor:
    """In the dtype of ``x``."""
    y = explicit_norm(x, eps)
    gamma, beta, weight, bias = (ends.get(name) for name in ("gamma", "beta", "weight", "bias"))
    y = y if gamma is None else y * gamma.to(x.dtype)
    y = y if beta is None else y + beta.to(x.dtype)
    y = y if weight is None else y @ weight.to(x.dtype).t()
    return y if bias is None else y + bias.to(x.dtype)


def judge(x: Tensor, ends: Ends, eps: float = EPS, target: Target = TARGETS[0]) -> None:
    """As near as fp32, whatever the dtype of what it is given, and nearer than PyTorch in it."""
    out, status = run(x, ends, eps=eps, target=target)
    reference = explicit(x.double(), ends, eps)
    assert_close(out, reference, name="embedding")
    if x.dtype == torch.float16:
        cast = {k: None if v is None else v.to(x.dtype) for k, v in ends.items()}
        y = F.layer_norm(x, (x.shape[1],), cast.get("gamma"), cast.get("beta"), eps)
        weight = cast.get("weight")
        peer = y if weight is None else F.linear(y, weight, cast.get("bias"))
        assert_close(out.half(), reference, peer, name="embedding in fp16")
    assert status.tolist() == [0] * len(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [32, 48, 64, 192, 200, 768])
@pytest.mark.parametrize("columns", [24, 33])
def test_a_projection_is_its_formula(width: int, columns: int, dtype: torch.dtype) -> None:
    batch = {24: 3, 33: 1}[columns]
    x = (normal(batch, width) * torch.logspace(-2, 2, batch)[:, None] + 3).to(dtype)
    judge(x, projection(columns, width, dtype), target=TARGETS[columns % 2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [63, 64, 65, 130])
def test_batches_around_a_tile(batch: int, dtype: torch.dtype) -> None:
    judge(normal(batch, 72, dtype=dtype), projection(64, 72, dtype), target=TARGETS[batch % 2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_widest_with_no_bias(dtype: torch.dtype) -> None:
    judge(normal(2, 1664, dtype=dtype), {"weight": normal(24, 1664, dtype=dtype)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [32, 48, 64, 192, 200, 768, 1664])
@pytest.mark.parametrize("extra", [-1, 1])
def test_a_norm_is_its_formula(width: int, extra: int, dtype: torch.dtype) -> None:
    batch = max(1, row_config(TARGETS[0], "", width).block_m + extra)
    x = (normal(batch, width) * torch.logspace(-2, 2, batch)[:, None]).to(dtype)
    judge(x, ends_of("normalized", width, dtype), target=TARGETS[extra % 2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [48, 200, 768])
def test_means_far_above_the_deviation(width: int, kind: str, dtype: torch.dtype) -> None:
    means = torch.tensor([1000.0, -1000, 20, 0])[:, None]
    judge((normal(4, width) + means).to(dtype), ends_of(kind, width, dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_deviations_of_a_few_units_in_the_last_place(kind: str) -> None:
    """The rounding of the mean, or of the pivot, is as large as they are."""
    x = 1000.3 + torch.randint(-2, 3, (4, 768)) * 2.0**-14
    judge(x, ends_of(kind, 768, torch.float32), eps=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_massive_channels_anywhere(kind: str, dtype: torch.dtype) -> None:
    """In the first columns too, whose mean is the pivot of the statistics."""
    x = normal(4, 768)
    x[0, 7] = x[1, 767] = 300
    x[2, :64] += 300
    x[3, 64:] -= 300
    judge(x.to(dtype), ends_of(kind, 768, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [1e-12, 1e-5])
def test_equal_values_come_out_as_the_bias(eps: float, kind: str, dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 1.0, 1000.3, -1000.3, 65504.0])
    ends = ends_of(kind, 200, dtype)
    out, status = run(values[:, None].expand(5, 200).to(dtype), ends, eps=eps)
    shift = ends["bias" if kind == "projected" else "beta"]
    assert shift is not None
    assert_close(out, shift.double().expand(5, -1), name="equal values")
    assert status.tolist() == [0] * 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_item_has_the_same_bits_alone_and_anywhere(kind: str, dtype: torch.dtype) -> None:
    """The first rows of tiles, as NumPy, whose product this is, has other bits for other rows."""
    x, ends = normal(70, 72, dtype=dtype), ends_of(kind, 72, dtype)
    out, _ = run(x, ends)
    for row in (0, 64):
        assert same_bits(run(x[row : row + 1], ends)[0], out[row : row + 1])


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_item_sees_another(kind: str, dtype: torch.dtype, poison: float) -> None:
    """Rows that are named, repeated, last, in any order; the others are poisoned, then a named."""
    x, ends = normal(70, 72, dtype=dtype), ends_of(kind, 72, dtype)
    rows = torch.tensor([69, 3, 3, 0, 20, 69, 41], dtype=torch.int32)
    clean, _ = run(x[rows.long()], ends)
    unused = torch.ones(70, dtype=torch.bool)
    unused[rows.long()] = False
    x[unused] = poison
    out, status = run(x, ends, rows)
    assert same_bits(out, clean)
    assert status.tolist() == [0] * 7
    x[20] = poison
    out, status = run(x, ends, rows)
    keep = torch.arange(7) != 4
    assert same_bits(out[keep], clean[keep])
    assert status.tolist() == [0, 0, 0, 0, int(poison != poison), 0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_items_that_are_not_finite(value: float, kind: str, dtype: torch.dtype) -> None:
    x = normal(8, 72, dtype=dtype)
    x[2, 71] = x[5, 0] = x[6, 40] = value
    out, status = run(x, ends_of(kind, 72, dtype))
    assert status.tolist() == [0, 0, 1, 0, 0, 1, 1, 0]
    assert out.isfinite().all(dim=1).tolist() == [word == 0 for word in status.tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_x_does_not_have_come_out_as_nan(kind: str) -> None:
    x, ends = normal(5, 48), ends_of(kind, 48, torch.float32)
    rows = torch.tensor([4, -1, 5, 2**31 - 1, -(2**31), 0], dtype=torch.int32)
    out, status = run(x, ends, rows)
    assert same_bits(out[[0, 5]], run(x, ends)[0][[4, 0]])
    assert out[1:5].isnan().all()
    assert status.tolist() == [0, 1, 1, 1, 1, 0]


def test_the_status_looks_at_every_value() -> None:
    """Whatever stood in the status, wherever the value stands; the largest float is finite."""
    columns = 1100
    out, status = Guarded(13, columns, dtype=torch.float32), Guarded(13, dtype=torch.int32)
    x, weight = normal(13, 32), normal(columns, 32)
    _, second = pool_calls(TARGETS[0], out.out, status.out, x, weight=weight, eps=EPS)
    top = torch.finfo(torch.float32).max
    out.out.copy_(normal(13, columns))
    out.out[12] = torch.tensor([top, -top]).repeat(columns // 2)
    positions = (0, 1, 511, 1023, 1024, 1099)
    for row, place in enumerate(positions):
        out.out[2 * row, place] = (float("nan"), float("inf"), -float("inf"))[row % 3]
    second.launch()
    out.done()
    assert status.done().tolist() == [1, 0] * len(positions) + [0]


def test_a_projection_that_overflows_is_marked() -> None:
    x, weight = normal(3, 64), normal(24, 64)
    weight[23] = 3e38 * torch.sign(explicit_norm(x[1:2].double(), EPS)[0]).float()
    out, status = run(x, {"weight": weight, "bias": normal(24)})
    assert status[1] == 1
    assert status.tolist() == [int(not row.isfinite().all()) for row in out]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_items(kind: str, dtype: torch.dtype) -> None:
    none, ends = torch.empty(0, dtype=torch.int32), ends_of(kind, 48, dtype)
    for x, rows in ((normal(0, 48, dtype=dtype), None), (normal(3, 48, dtype=dtype), none)):
        out, status = run(x, ends, rows)
        assert (len(out), len(status)) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_past_two_to_the_31_elements(kind: str) -> None:
    """Untouched memory costs nothing: two rows of it are written."""
    ends, count = ends_of(kind, 64, torch.float16), 2**31 // 64 + 3
    x = torch.empty(count, 64, dtype=torch.float16)
    last, two = normal(2, 64, dtype=torch.float16), [count - 1, count - 3]
    x[two] = last
    expected, _ = run(last, ends)
    out, status = torch.empty_like(expected), torch.empty(2, dtype=torch.int32)
    POOL.launch(out, status, x, **ends, rows=torch.tensor(two, dtype=torch.int32), eps=EPS)
    assert same_bits(out, expected)
    assert status.tolist() == [0, 0]


def test_what_pool_refuses() -> None:
    x, vector = normal(6, 48, dtype=torch.float16), normal(48)
    weight, out = normal(24, 48, dtype=torch.float16), torch.empty(6, 24)
    same, status = torch.empty(6, 48), torch.empty(6, dtype=torch.int32)
    wrong = {
        "x: got strides": (out, status, x[:, ::2]),
        "out: got shape": (out, status, x, vector, vector),
        "out: got torch.float16": (same.half(), status, x, vector, vector),
        "status: got torch.int64": (same, status.long(), x, vector, vector),
        "gamma: got shape": (same, status, x, vector[1:], vector),
        "weight: got torch.float32": (out, status, x, None, None, weight.float()),
        "weight: got shape": (out, status, x, None, None, weight[:, 1:]),
        "weight: got a tensor on meta": (out, status, x, None, None, weight.to("meta")),
        "bias: got shape": (out, status, x, None, None, weight, vector),
        "rows: got torch.int64": (same, status, x, vector, vector, None, None, status.long()),
        r"got \['gamma', 'weight'\]": (out, status, x, vector, None, weight),
        r"got \['bias'\]": (same, status, x, None, None, None, vector),
    }
    for message, tensors in wrong.items():
        with pytest.raises(ValueError, match=f"pool: {message}"):
            pool_calls(TARGETS[0], *tensors, eps=EPS)


# -- class_mean ------------------------------------------------------------------------------------


def run_mean(x: Tensor, tokens: int, prefix: int, target: Target = TARGETS[0]) -> Tensor:
    out = Guarded(len(x) // tokens, 2 * x.shape[1], dtype=x.dtype)
    launch(class_mean_calls(target, out.out, at_page_end(x), tokens=tokens, prefix=prefix))
    return out.done()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "width"), [(1, 200), (3, 24), (2, 72), (0, 24)])
@pytest.mark.parametrize(("prefix", "patches"), [(1, 1), (5, 64), (1, 65), (0, 257), (5, 257)])
def test_class_mean_leaves_the_registers_out(
    batch: int, width: int, prefix: int, patches: int, dtype: torch.dtype
) -> None:
    tokens = prefix + patches
    x = normal(batch * tokens, width, dtype=dtype) + 2
    items = x.view(batch, tokens, width)
    items[:, 1:prefix] = float("nan")
    ours = run_mean(x, tokens, prefix, TARGETS[batch % 2])
    assert same_bits(ours[:, :width], items[:, 0])
    mean = items[:, prefix:].double().sum(1) / patches
    check(ours[:, width:], mean, items[:, prefix:].mean(1), "mean")


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_item_of_class_mean_sees_another(dtype: torch.dtype, poison: float) -> None:
    x = normal(3 * 66, 72, dtype=dtype)
    clean = run_mean(x, 66, 1)
    x[66:132] = poison
    assert same_bits(run_mean(x, 66, 1)[[0, 2]], clean[[0, 2]])
    assert same_bits(run_mean(x[132:], 66, 1), clean[2:])


def test_class_mean_keeps_what_fp16_would_lose() -> None:
    """A running sum in fp16 stops at 2048 + 1; the sum of these overflows it."""
    x = torch.full((4097, 24), 40.0, dtype=torch.float16)
    x[1:, 3] = 1.0
    out = run_mean(x, 4097, 1)
    assert torch.equal(out, torch.cat((x[0], x[1]))[None])


def test_class_mean_past_two_to_the_31_elements() -> None:
    """The last items of an untouched tensor, and the last tokens of an untouched item."""
    tokens = 2**31 // 64 + 3
    x = torch.empty(tokens, 64, dtype=torch.float16)
    x[0] = x[-3:] = 1.0
    x[-1] = 4.0
    out = Guarded(1, 128, dtype=torch.float16)
    CLASS_MEAN.launch(out.out, x, tokens=tokens, prefix=tokens - 3)
    assert out.done().tolist() == [[1.0] * 64 + [2.0] * 64]


def test_what_class_mean_refuses() -> None:
    x, out = normal(12, 24), torch.empty(3, 48)
    with pytest.raises(ValueError, match="class_mean: got 12 rows in sequences of 5 with a prefix"):
        class_mean_calls(TARGETS[0], out, x, tokens=5, prefix=1)
    with pytest.raises(ValueError, match="sequences of 4 with a prefix of 4"):
        class_mean_calls(TARGETS[0], out, x, tokens=4, prefix=4)
    with pytest.raises(ValueError, match="class_mean: out: got shape"):
        class_mean_calls(TARGETS[0], out[1:], x, tokens=4, prefix=1)
    with pytest.raises(ValueError, match="class_mean: x: got strides"):
        class_mean_calls(TARGETS[0], out, normal(12, 48)[:, ::2], tokens=4, prefix=1)
