"""Tensors of more than 2^31 numbers: the rows on both sides of that edge, and the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu.common import DEVICE, DRY, room, same_bits
from gpu.models import HALF
from vitrail_kernels import OPERATORS
from vitrail_kernels.device.stats import stats_ref, stats_shape
from vitrail_kernels.ops.patch_embed import K_MULTIPLE

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

EDGE = 1 << 13 if DRY else 1 << 31
WIDTH, HEADS, TOKENS, EPS = (64, 2, 5, 1e-6) if DRY else (768, 12, 197, 1e-6)
PART = TOKENS  # rows that are computed alone
GIB = 1 << 30


def past_edge(columns: int, step: int = 1) -> int:
    """Rows of ``columns`` numbers that go past the edge: a multiple of ``step``."""
    return (EDGE // columns + 3 * PART) // step * step + step


def filled(rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=HALF, device=DEVICE).normal_()


def empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def small(*shape: int, sd: float = 0.3) -> Tensor:
    return torch.randn(shape, device=DEVICE) * sd


def places(rows: int, columns: int, step: int = 1) -> list[int]:
    """First rows, multiples of ``step``: of the tensor, across the edge, and of its end."""
    across = (EDGE // columns - PART // 2) // step * step
    return [0, across, (rows - PART) // step * step]


def check(name: str, whole: Tensor, alone: Callable[[int], Tensor], starts: list[int]) -> None:
    """``alone(row)``: PART rows from there, computed by themselves, have the bits of ``whole``."""
    assert not torch.isnan(whole).any(), f"{name}: not all is written"
    for start in starts:
        part = alone(start)
        assert same_bits(whole[start : start + len(part)], part), f"{name}: rows from {start}"
    first, last = whole[: len(part)], whole[-len(part) :]
    assert not same_bits(first, last), f"{name}: first and last rows are alike"


def launch(op: str, **given: Any) -> Tensor:
    OPERATORS[op].launch(**given)
    out: Tensor = given["out"]
    return out


# -- linear ----------------------------------------------------------------------------------------


def test_linear_from_more_numbers() -> None:
    """The down projection onto the residual, with statistics: x is (M, 4 C)."""
    room(12 * GIB)
    k = 4 * WIDTH
    rows = past_edge(k)
    x, residual = filled(rows, k), filled(rows, WIDTH)
    weight, bias = small(WIDTH, k, sd=k**-0.5).to(HALF), small(WIDTH)
    stats = empty(*stats_shape(rows, WIDTH), dtype=torch.float32)
    out = empty(rows, WIDTH)
    given = {"weight": weight, "bias": bias}
    launch("linear", out=out, x=x, residual=residual, stats=stats, **given)

    def alone(start: int) -> Tensor:
        part = slice(start, start + PART)
        own = empty(*stats_shape(PART, WIDTH), dtype=torch.float32)
        more = {"residual": residual[part], "stats": own}
        result = launch("linear", out=empty(PART, WIDTH), x=x[part], **more, **given)
        assert same_bits(stats[:, part], own), f"statistics from {start}"
        return result

    check("linear", out, alone, places(rows, k))


def test_linear_to_more_numbers() -> None:
    """Query, key and value of normalized rows: out is (M, 3 C)."""
    room(18 * GIB)
    n = 3 * WIDTH
    rows = past_edge(n)
    x = filled(rows, WIDTH)
    weight = small(n, WIDTH, sd=WIDTH**-0.5).to(HALF)
    given = {"weight": weight, "bias": small(n), "row_sums": weight.float().sum(1)}

    stats = empty(*stats_shape(rows, WIDTH), dtype=torch.float32)
    stats_ref(stats, x)

    def run(start: int, count: int) -> Tensor:
        part = slice(start, start + count)
        own = {"x": x[part], "x_stats": stats[:, part].contiguous(), "norm_eps": EPS}
        return launch("linear", out=empty(count, n), **own, **given)

    check("linear", run(0, rows), lambda start: run(start, PART), places(rows, n))


def test_linear_and_pool_of_rows_past_the_edge() -> None:
    """Gathered rows, by pointer: the pooled token of every sequence."""
    room(8 * GIB)
    rows = past_edge(WIDTH, TOKENS)
    x = filled(rows, WIDTH)
    chosen = torch.arange(0, rows, TOKENS, dtype=torch.int32, device=DEVICE)
    weight, bias = small(WIDTH, WIDTH, sd=WIDTH**-0.5).to(HALF), small(WIDTH)
    picked = x[chosen.long()]
    given = {"weight": weight, "bias": bias}
    out = launch("linear", out=empty(len(chosen), WIDTH), x=x, rows=chosen, **given)
    every = torch.arange(len(chosen), dtype=torch.int32, device=DEVICE)
    wanted = launch("linear", out=empty(len(chosen), WIDTH), x=picked, rows=every, **given)
    assert same_bits(out, wanted)
    status = torch.zeros(len(chosen), dtype=torch.int32, device=DEVICE)
    pooled = [
        launch(
            "pool",
            out=empty(len(chosen), WIDTH, dtype=torch.float32),
            status=status,
            x=source,
            rows=index,
            eps=EPS,
            **given,
        )
        for source, index in ((x, chosen), (picked, None))
    ]
    assert same_bits(*pooled)
    assert not status.any()


# -- attention -------------------------------------------------------------------------------------


def offsets(rows: int) -> Tensor:
    return torch.arange(0, rows + 1, TOKENS, dtype=torch.int32, device=DEVICE)


def test_attention_over_more_numbers() -> None:
    room(10 * GIB)
    n = 3 * WIDTH
    rows = past_edge(n, TOKENS)
    qkv = filled(rows, n)
    scalars = {"heads": HEADS, "causal": False, "max_seqlen": TOKENS}

    def run(qkv: Tensor) -> Tensor:
        out = empty(len(qkv), WIDTH)
        return launch("attention", out=out, qkv=qkv, cu_seqlens=offsets(len(qkv)), **scalars)

    starts = places(rows, n, TOKENS)
    check("attention", run(qkv), lambda s: run(qkv[s : s + TOKENS].clone()), starts)


def test_attention_of_one_query_over_more_numbers() -> None:
    room(10 * GIB)
    n = 2 * WIDTH
    rows = past_edge(n, TOKENS)
    kv, q = filled(rows, n), filled(rows // TOKENS, WIDTH)
    scalars = {"heads": HEADS, "max_seqlen": TOKENS}

    def run(q: Tensor, kv: Tensor) -> Tensor:
        given = {"q": q, "kv": kv, "cu_seqlens": offsets(len(kv))}
        return launch("attention_one", out=empty(*q.shape), **given, **scalars)

    out = run(q, kv)
    assert not torch.isnan(out).any()
    for start in places(rows, n, TOKENS):
        item = start // TOKENS
        alone = run(q[item : item + 1].clone(), kv[start : start + TOKENS].clone())
        assert same_bits(out[item : item + 1], alone), f"sequence {item}"


# -- rows and pixels -------------------------------------------------------------------------------


def test_layernorm_of_more_numbers() -> None:
    room(16 * GIB)
    rows = past_edge(WIDTH)
    x, gamma, beta = filled(rows, WIDTH), 1 + small(WIDTH), small(WIDTH)

    def run(x: Tensor) -> Tensor:
        stats = empty(*stats_shape(*x.shape), dtype=torch.float32)
        out = empty(*x.shape)
        return launch("layernorm", out=out, x=x, gamma=gamma, beta=beta, stats=stats, eps=EPS)

    check("layernorm", run(x), lambda s: run(x[s : s + PART].clone()), places(rows, WIDTH))


def test_class_mean_of_more_numbers() -> None:
    room(8 * GIB)
    rows = past_edge(WIDTH, TOKENS)
    x = filled(rows, WIDTH)

    def run(x: Tensor) -> Tensor:
        out = empty(len(x) // TOKENS, 2 * WIDTH)
        return launch("class_mean", out=out, x=x, tokens=TOKENS, prefix=1)

    out = run(x)
    for start in places(rows, WIDTH, TOKENS):
        item = start // TOKENS
        assert same_bits(out[item : item + 1], run(x[start : start + TOKENS])), f"item {item}"


def test_text_embed_to_more_numbers() -> None:
    room(10 * GIB)
    width = 512
    rows = past_edge(width)
    token, position = filled(49408, width), small(77, width)
    ids = torch.randint(49408, (rows,), dtype=torch.int32, device=DEVICE)
    at = torch.randint(77, (rows,), dtype=torch.int32, device=DEVICE)

    def run(ids: Tensor, at: Tensor) -> Tensor:
        stats = empty(*stats_shape(len(ids), width), dtype=torch.float32)
        tables = {"token": token, "position": position, "stats": stats}
        return launch("text_embed", out=empty(len(ids), width), ids=ids, positions=at, **tables)

    out = run(ids, at)
    starts = places(rows, width)
    check("text_embed", out, lambda s: run(ids[s : s + PART], at[s : s + PART]), starts)


@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
def test_patch_embed_of_more_numbers(uint8: bool) -> None:
    """Both the pixels and the tokens go past the edge."""
    room(12 * GIB if uint8 else 20 * GIB)
    patch, side = (4, 8) if DRY else (16, 224)
    values, tokens = 3 * patch * patch, 1 + (side // patch) ** 2
    batch = EDGE // min(3 * side * side, tokens * WIDTH) + 3
    shape = (batch, side, side, 3) if uint8 else (batch, 3, side, side)
    pixels = torch.empty(shape, dtype=torch.uint8 if uint8 else torch.float32, device=DEVICE)
    pixels.random_(256) if uint8 else pixels.normal_()
    weight = torch.zeros(WIDTH, -(-values // K_MULTIPLE) * K_MULTIPLE, dtype=HALF, device=DEVICE)
    weight[:, :values] = small(WIDTH, values, sd=values**-0.5)
    table = small(tokens, WIDTH)
    scalars = {"patch": (patch, patch), "channels": 3, "prefix": 1}

    def run(pixels: Tensor) -> Tensor:
        out = empty(len(pixels) * tokens, WIDTH)
        return launch("patch_embed", out=out, pixels=pixels, weight=weight, table=table, **scalars)

    out = run(pixels)
    assert pixels.numel() > EDGE
    assert out.numel() > EDGE
    assert not torch.isnan(out).any()
    for item in (0, EDGE // pixels[0].numel(), EDGE // (tokens * WIDTH), batch - 1):
        whole = out[item * tokens : (item + 1) * tokens]
        assert same_bits(whole, run(pixels[item : item + 1].clone())), f"image {item}"
