"""The text_embed kernel in Triton's interpreter: one rounding, the rows it names and no other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import assert_close
from interpreted.guard import at_page_end
from kernels.test_operators import POISONS, Guarded, check, normal, same_bits
from vitrail_kernels.device.stats import stats_ref, stats_shape
from vitrail_kernels.launch import Target, launch
from vitrail_kernels.ops.text_embed import TEXT_EMBED, text_embed_calls

pytestmark = pytest.mark.interpreted

TARGETS = (Target(90, 3), Target(80, 3))
DTYPES = (torch.float16, torch.float32)


def run(
    ids: Tensor, places: Tensor, token: Tensor, position: Tensor, target: Target = TARGETS[0]
) -> tuple[Tensor, Tensor]:
    """Output and statistics; every input ends at a page that nobody may read."""
    count, width = len(ids), token.shape[1]
    out = Guarded(count, width, dtype=token.dtype)
    stats = Guarded(*stats_shape(count, width), dtype=torch.float32)
    inputs = map(at_page_end, (ids, places, token, position))
    launch(text_embed_calls(target, out.out, *inputs, stats.out))
    return out.done(), stats.done()


def indices(count: int, below: int) -> Tensor:
    return torch.randint(below, (count,), dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [32, 48, 64, 192, 200, 768, 1664])
@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_it_adds_a_row_of_each_table(width: int, tokens: int, dtype: torch.dtype) -> None:
    token, position = normal(30, width, dtype=dtype), normal(13, width)
    ids, positions = indices(tokens, 30), indices(tokens, 13)
    out, stats = run(ids, positions, token, position, TARGETS[tokens % 2])
    reference = token.double()[ids.long()] + position.double()[positions.long()]
    peer = F.embedding(ids, token) + F.embedding(positions, position.to(dtype))
    check(out, reference, peer, "text_embed")
    expected = torch.empty(stats.shape, dtype=torch.float64)
    stats_ref(expected, out.double())
    chunks = len(stats) // 2
    assert_close(stats[:chunks], expected[:chunks], name="sums")
    assert_close(stats[chunks:], expected[chunks:], name="squares")


def test_positions_stay_fp32_until_the_sum() -> None:
    """Every sum is exact in fp32 here, so one rounding is the only difference allowed."""
    token = torch.randint(-8, 9, (30, 48)).half()
    position = torch.randint(-4096, 4097, (13, 48)) / 4096
    ids, positions = indices(33, 30), indices(33, 13)
    exact = token.double()[ids.long()] + position.double()[positions.long()]
    assert same_bits(run(ids, positions, token, position)[0], exact.half())


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_token_sees_another(dtype: torch.dtype, poison: float) -> None:
    token, position = normal(30, 200, dtype=dtype), normal(13, 200)
    ids, positions = indices(33, 30), indices(33, 13)
    ids[ids == 29] = 28
    ids[5] = 29
    out, stats = run(ids, positions, token, position)
    for table, used in ((token, ids), (position, positions)):
        unused = torch.ones(len(table), dtype=torch.bool)
        unused[used.long()] = False
        table[unused] = poison
    token[29] = poison
    changed, its = run(ids, positions, token, position)
    keep = torch.arange(33) != 5
    assert same_bits(changed[keep], out[keep])
    assert same_bits(its[:, keep], stats[:, keep])
    assert not same_bits(changed, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_has_the_same_bits_alone_and_anywhere(dtype: torch.dtype) -> None:
    tables = normal(30, 200, dtype=dtype), normal(13, 200)
    ids, positions = indices(33, 30), indices(33, 13)
    out, stats = run(ids, positions, *tables)
    for row in (0, 15, 32):
        alone, its = run(ids[row : row + 1], positions[row : row + 1], *tables)
        assert same_bits(alone, out[row : row + 1])
        assert same_bits(its, stats[:, row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_table_does_not_have_comes_out_as_nan(dtype: torch.dtype) -> None:
    """Were it read, the interpreter would die at a page that nobody may read, or far from it."""
    tables = normal(30, 48, dtype=dtype), normal(13, 48)
    edge = 2**31 - 1
    ids = torch.tensor([29, 30, -1, edge, -edge - 1, 3, 3, 3, 3], dtype=torch.int32)
    positions = torch.tensor([12, 1, 1, 1, 1, 13, -1, edge, 0], dtype=torch.int32)
    out, stats = run(ids, positions, *tables)
    good = torch.tensor([0, 8])
    assert same_bits(out[good], run(ids[good], positions[good], *tables)[0])
    assert out[1:8].isnan().all()
    assert stats[:, 1:8].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens(dtype: torch.dtype) -> None:
    none = torch.empty(0, dtype=torch.int32)
    out, stats = run(none, none, normal(30, 48, dtype=dtype), normal(13, 48))
    assert (len(out), stats.shape) == (0, (2, 0))


def test_a_table_past_two_to_the_31_elements() -> None:
    """Untouched memory costs nothing: two rows of it are written."""
    count = 2**31 // 64 + 3
    token, position = torch.empty(count, 64, dtype=torch.float16), normal(13, 64)
    rows, ids = normal(2, 64, dtype=torch.float16), [count - 1, count - 3]
    token[ids] = rows
    positions = torch.tensor([3, 12], dtype=torch.int32)
    out = Guarded(2, 64, dtype=torch.float16)
    TEXT_EMBED.launch(out.out, torch.tensor(ids, dtype=torch.int32), positions, token, position)
    few = torch.tensor([0, 1], dtype=torch.int32)
    assert same_bits(out.done(), run(few, positions, rows, position)[0])


def test_what_it_refuses() -> None:
    token, position = normal(30, 48, dtype=torch.float16), normal(13, 48)
    out, ids = torch.empty(6, 48, dtype=torch.float16), indices(6, 13)
    wrong = {
        "token: got torch.float64": (out, ids, ids, token.double(), position),
        "token: got torch.int32": (out, ids, ids, ids, position),
        "token: got strides": (out[:, :24], ids, ids, token[:, :24], position[:, :24]),
        "out: got shape": (out[1:], ids, ids, token, position),
        "out: got torch.float32": (out.float(), ids, ids, token, position),
        "ids: got torch.int64": (out, ids.long(), ids, token, position),
        "positions: got shape": (out, ids, ids[1:], token, position),
        "positions: got a tensor on meta": (out, ids, ids.to("meta"), token, position),
        "position: got torch.float16": (out, ids, ids, token, position.half()),
        "position: got shape": (out, ids, ids, token, position[:, 1:]),
        "stats: got shape": (out, ids, ids, token, position, torch.empty(2, 5)),
    }
    for message, tensors in wrong.items():
        with pytest.raises(ValueError, match=f"text_embed: {message}"):
            text_embed_calls(TARGETS[0], *tensors)
