"""The attention kernels in Triton's interpreter: against fp64, and what they must not see."""

from __future__ import annotations

import inspect
import mmap
from collections.abc import Sequence
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
    explicit_attention,
    normal,
    offsets,
    one_query,
    one_query_case,
    over_sequences,
    packed_qkv,
    plain_attention,
    same_bits,
)
from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.launch import INTERPRETED, Target, interpreted, launch
from vitrail_kernels.ops.attention import (
    ATTENTION,
    _attention_kernel,
    attention_calls,
    attention_ref,
)
from vitrail_kernels.ops.attention_one import (
    ATTENTION_ONE,
    _attention_one_kernel,
    attention_one_calls,
    attention_one_ref,
)

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # NumPy, of the poisons
]

TARGETS = (Target(90, 3), Target(80, 3))
WIDE, NARROW = KernelConfig(128, 64, 0, 8, 2), KernelConfig(64, 64, 0, 4, 2)
DTYPES = (torch.float16, torch.float32)
HEAD_DIMS = (8, 12, 16, 32, 40, 64, 72, 80, 88, 104, 120, 128)
LENGTHS = (5, 1, 64, 17, 130, 63, 65, 77)
MAP_NORESERVE = 0x4000
"""Of Linux, where Triton runs; Python's mmap names it from 3.13 on."""
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
ARCH = pytest.mark.parametrize("target", TARGETS, ids=["sm_90", "sm_80"])
EITHER = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def poisoned(rows: int, columns: int) -> Tensor:
    """Rows of NaN and of 65504, by turns."""
    return torch.tensor(POISONS).half().repeat(rows)[:rows, None].repeat(1, columns)


def run(
    qkv: Tensor,
    lengths: Sequence[int],
    heads: int,
    causal: bool,
    seen: Sequence[int] | None = None,
    target: Target = TARGETS[0],
    config: KernelConfig | None = None,
) -> Tensor:
    """The kernel's output; every input ends at a page that nobody may read."""
    out = Guarded(len(qkv), qkv.shape[1] // 3, dtype=qkv.dtype)
    calls = attention_calls(
        target,
        out.out,
        at_page_end(qkv),
        at_page_end(offsets(lengths)),
        None if seen is None else at_page_end(torch.tensor(seen, dtype=torch.int32)),
        heads=heads,
        causal=causal,
        max_seqlen=max(lengths, default=0),
        config=config,
    )
    launch(calls)
    return out.done()


def judge(
    qkv: Tensor,
    lengths: Sequence[int],
    heads: int,
    causal: bool,
    seen: Sequence[int] | None = None,
    target: Target = TARGETS[0],
) -> None:
    ours = run(qkv, lengths, heads, causal, seen, target)
    reference, peer = (
        over_sequences(form, qkv, lengths, heads, causal, seen)
        for form in (explicit_attention, plain_attention)
    )
    check(ours, reference, peer, "attention")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(head_dim: int) -> None:
    judge(packed_qkv(82, 2, head_dim, torch.float16), [77, 5], 2, False)
    if interpreted():  # nobody launches fp32 on a GPU, and it takes ptxas half a minute
        judge(packed_qkv(82, 1, head_dim, torch.float32), [77, 5], 1, True, target=TARGETS[1])


@ARCH
@CAUSAL
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(16, torch.float16), (72, torch.float32)], ids=["16", "72"]
)
def test_sequences_below_at_and_above_every_tile(
    head_dim: int, dtype: torch.dtype, causal: bool, target: Target
) -> None:
    judge(packed_qkv(sum(LENGTHS), 1, head_dim, dtype), LENGTHS, 1, causal, target=target)


@ARCH
@CAUSAL
@pytest.mark.parametrize("tokens", [50, 197])
def test_equal_lengths_read_no_offsets_and_change_no_bit(
    tokens: int, causal: bool, target: Target
) -> None:
    batch, qkv = 3, packed_qkv(3 * tokens, 1, 16, torch.float16)
    expected = run(qkv, [tokens] * batch, 1, causal, target=target)
    out = Guarded(batch * tokens, 16, dtype=torch.float16)
    wrong = torch.full((batch + 1,), -(1 << 30), dtype=torch.int32)
    sizes: dict[str, Any] = {"heads": 1, "causal": causal, "max_seqlen": tokens}
    launch(attention_calls(target, out.out, qkv, wrong, equal_lengths=True, **sizes))
    assert same_bits(out.done(), expected)
    with pytest.raises(ValueError, match="equal_lengths: wanted sequences of one length"):
        attention_calls(target, out.out, qkv, wrong[:2], equal_lengths=True, **sizes)


@CAUSAL
@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_of_one_length(batch: int, causal: bool) -> None:
    for tokens in (1, 50):
        lengths = [tokens] * batch
        judge(packed_qkv(sum(lengths), 3, 16, torch.float16), lengths, 3, causal)


@CAUSAL
def test_tiles_of_64_and_128_queries_give_the_same_bits(causal: bool) -> None:
    """NumPy's products are not the same for 64 and 128 rows, so these are exact: scores of small
    eighths, and values of which a key tile has one a column. What is left is the tiles' order."""
    lengths = [77, 130, 70, 128]
    tokens = sum(lengths)
    qkv = torch.randint(-12, 13, (tokens, 192)).half() / 8
    qkv[:, 128:] = 0
    for rows in qkv.split(lengths):
        key = torch.arange(len(rows))
        rows[key, 128 + key % 64] = normal(len(rows), dtype=torch.float16)
    wide, narrow = (run(qkv, lengths, 1, causal, config=config) for config in (WIDE, NARROW))
    assert same_bits(wide, narrow)
    judge(qkv, lengths, 1, causal)


@ARCH
@CAUSAL
def test_a_sequence_has_the_same_bits_alone_and_anywhere(causal: bool, target: Target) -> None:
    lengths = [9, 77, 33]
    qkv = packed_qkv(sum(lengths), 1, 32, torch.float16)
    together = run(qkv, lengths, 1, causal, target=target).split(lengths)
    for rows, length, expected in zip(qkv.split(lengths), lengths, together, strict=True):
        assert same_bits(run(rows, [length], 1, causal, target=target), expected)


@ARCH
@CAUSAL
@pytest.mark.parametrize("head_dim", [16, 80])
def test_no_sequence_sees_another(head_dim: int, causal: bool, target: Target) -> None:
    lengths = [5, 66, 17]
    qkv = packed_qkv(sum(lengths), 1, head_dim, torch.float16)
    clean = run(qkv, lengths, 1, causal, target=target).split(lengths)
    for good in range(len(lengths)):
        other = poisoned(*qkv.shape)
        other.split(lengths)[good].copy_(qkv.split(lengths)[good])
        result = run(other, lengths, 1, causal, target=target).split(lengths)
        assert same_bits(result[good], clean[good])


@ARCH
@CAUSAL
@pytest.mark.parametrize(
    ("tokens", "dtype"), [(20, torch.float32), (70, torch.float16)], ids=["20", "70"]
)
def test_only_the_first_kv_lens_keys_are_seen(
    tokens: int, dtype: torch.dtype, causal: bool, target: Target
) -> None:
    kv_lens = [tokens, 16, 1, min(64, tokens - 1)]
    judge(packed_qkv(4 * tokens, 1, 16, dtype), [tokens] * 4, 1, causal, kv_lens, target)


@CAUSAL
def test_queries_without_a_key_give_zero(causal: bool) -> None:
    """As PyTorch's fused attention, and so the reference, does."""
    qkv = packed_qkv(3 * 20, 2, 16, torch.float16)
    ours = run(qkv, [20] * 3, 2, causal, [20, 0, 5])
    out = torch.full_like(ours, float("nan"))
    kv_lens = torch.tensor([20, 0, 5], dtype=torch.int32)
    attention_ref(out, qkv, offsets([20] * 3), kv_lens, heads=2, causal=causal, max_seqlen=20)
    assert same_bits(ours[20:40], torch.zeros_like(ours[20:40]))
    assert same_bits(out[20:40], ours[20:40])
    unmasked = run(qkv, [20] * 3, 2, causal)
    assert same_bits(ours[:20], unmasked[:20])


@ARCH
@CAUSAL
def test_keys_past_kv_lens_change_no_bit(causal: bool, target: Target) -> None:
    kv_lens, tokens = [70, 64, 9], 70
    qkv = packed_qkv(3 * tokens, 1, 32, torch.float16)
    clean = run(qkv, [tokens] * 3, 1, causal, kv_lens, target).split(tokens)
    other = poisoned(*qkv.shape)
    for changed, rows, length in zip(other.split(tokens), qkv.split(tokens), kv_lens, strict=True):
        changed[:length] = rows[:length]
    result = run(other, [tokens] * 3, 1, causal, kv_lens, target).split(tokens)
    for ours, expected, length in zip(result, clean, kv_lens, strict=True):
        assert same_bits(ours[:length], expected[:length])


@EITHER
@CAUSAL
def test_scores_far_apart(causal: bool, dtype: torch.dtype) -> None:
    """Weights of 1 and 0, the largest score at any key, every score negative, all alike."""
    qkv = packed_qkv(4 * 70, 1, 16, dtype)
    parts = qkv.split(70)
    parts[0][:, :16] *= 60
    parts[1][:, :16] = 40
    parts[1][:, 16:32] = -parts[1][:, 16:32].abs() * 40
    parts[2][:, 16:32] = 1
    parts[3][:, 32:] *= 1000
    judge(qkv, [70] * 4, 1, causal)


def test_nan_is_not_hidden() -> None:
    qkv = packed_qkv(2 * 20, 2, 16, torch.float16)
    qkv[7, 33] = float("nan")  # a key of the first head
    ours = run(qkv, [20, 20], 2, False)
    assert ours[:20, :16].isnan().all()
    assert ours[:20, 16:].isfinite().all()
    assert ours[20:].isfinite().all()


@CAUSAL
def test_nothing_writes_nothing(causal: bool) -> None:
    for lengths in ([], [0, 0]):
        assert run(torch.empty(0, 48), lengths, 2, causal).numel() == 0


def sparse(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Zeros of which a page takes memory once it is touched."""
    size = rows * columns * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).view(rows, columns)


@ARCH
def test_offsets_past_two_to_the_31(target: Target) -> None:
    heads, head_dim, tokens, batch = 4, 128, 5, 1
    width = heads * head_dim
    before = 2**31 // width + 3
    qkv, out = (sparse(before + tokens, n * width, torch.float16) for n in (3, 1))
    qkv[before:] = packed_qkv(tokens, heads, head_dim, torch.float16)
    starts = torch.tensor([before, before + tokens], dtype=torch.int32)
    scalars = {"heads": heads, "max_seqlen": tokens}
    launch(attention_calls(target, out, qkv, starts, causal=False, **scalars))
    near = run(qkv[before:].clone(), [tokens], heads, False, target=target)
    assert same_bits(out[before:], near)
    q, one = normal(batch, width, dtype=torch.float16), torch.empty(batch, width).half()
    kv = qkv.view(-1, 2 * width)[: (before + tokens) * 3 // 2]  # other rows of the same memory
    starts = torch.tensor([len(kv) - 3, len(kv)], dtype=torch.int32)
    launch(attention_one_calls(target, one, q, kv, starts, **scalars))
    assert same_bits(one, run_one(q, kv[-3:].clone(), [3], heads, target))


def test_numbers_that_change_between_calls_compile_once() -> None:
    for kernel, names in (
        (_attention_kernel, ["max_seqlen"]),
        (_attention_one_kernel, []),
    ):
        parameters = inspect.signature(kernel.fn).parameters.values()
        assert [p.name for p in parameters if p.annotation == "int"] == names
        told = kernel.kwargs["do_not_specialize"] if interpreted() else kernel.do_not_specialize
        assert told == names
        shapes = {p.name for p in parameters if p.annotation == "tl.constexpr"}
        assert not shapes & {"max_seqlen", "tokens", "batch"}


def test_what_it_refuses() -> None:
    qkv, out, starts = torch.zeros(6, 96), torch.zeros(6, 32), offsets([3, 3])
    good: dict[str, Any] = {"heads": 2, "causal": False, "max_seqlen": 3}

    def refused(match: str, *tensors: Tensor | None, **scalars: Any) -> None:
        with pytest.raises(ValueError, match=match):
            attention_calls(INTERPRETED, *tensors, **(good | scalars))

    refused(r"qkv: got shape \(6, 95\), wanted \(M, 3 x 2 x E\)", out, qkv[:, :95], starts)
    refused("qkv: got heads of 160 columns", torch.zeros(6, 320), torch.zeros(6, 960), starts)
    refused("qkv: got torch.float64", out.double(), qkv.double(), starts)
    refused("qkv: got strides", out, torch.zeros(6, 100)[:, :96], starts)
    refused("out: got torch.float16, wanted torch.float32", out.half(), qkv, starts)
    refused(r"out: got shape \(5, 32\), wanted \(6, 32\)", out[:5], qkv, starts)
    refused("out: got a tensor on meta", out.to("meta"), qkv, starts)
    refused("cu_seqlens: got torch.int64, wanted torch.int32", out, qkv, starts.long())
    refused(r"cu_seqlens: got \(0,\), wanted", out, qkv, starts[:0])
    refused(r"kv_lens: got shape \(3,\), wanted \(2,\)", out, qkv, starts, starts)
    refused("kv_lens: wanted sequences of one length", out, qkv, starts, starts[:2], max_seqlen=4)
    refused("qkv: got shape", out, qkv, starts, heads=0)


def test_the_launcher_and_its_reference_agree() -> None:
    lengths = [9, 20]
    qkv = packed_qkv(29, 2, 16, torch.float32)
    ours, expected = torch.full((2, 29, 32), float("nan"))
    scalars = {"heads": 2, "max_seqlen": 20}
    ATTENTION.launch(ours, qkv, offsets(lengths), causal=True, **scalars)
    attention_ref(expected, qkv, offsets(lengths), causal=True, **scalars)
    assert_close(ours, expected)
    ours, expected = torch.full((2, 2, 32), float("nan"))
    for form, out in ((ATTENTION_ONE.launch, ours), (attention_one_ref, expected)):
        form(out, qkv[:2, :32].clone(), qkv[:, 32:].clone(), offsets(lengths), **scalars)
    assert_close(ours, expected)


# -- attention_one ---------------------------------------------------------------------------------


def run_one(
    q: Tensor, kv: Tensor, lengths: Sequence[int], heads: int, target: Target = TARGETS[0]
) -> Tensor:
    out = Guarded(*q.shape, dtype=q.dtype)
    tensors = [at_page_end(t) for t in (q, kv, offsets(lengths))]
    scalars = {"heads": heads, "max_seqlen": max(lengths, default=0)}
    launch(attention_one_calls(target, out.out, *tensors, **scalars))
    return out.done()


def judge_one(q: Tensor, kv: Tensor, lengths: Sequence[int], heads: int) -> None:
    reference, peer = (
        one_query(form, q, kv, lengths, heads) for form in (explicit_attention, plain_attention)
    )
    check(run_one(q, kv, lengths, heads), reference, peer, "one query")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_one_query_of_every_head_dim(head_dim: int) -> None:
    lengths = [7, 77, 20]
    judge_one(*one_query_case(lengths, 2, head_dim, torch.float16), lengths, 2)


@EITHER
@pytest.mark.parametrize("head_dim", [12, 128])
def test_one_query_over_every_length(head_dim: int, dtype: torch.dtype) -> None:
    lengths = [*LENGTHS, 31, 32, 33, 257]
    judge_one(*one_query_case(lengths, 1, head_dim, dtype), lengths, 1)


def test_one_query_over_nothing() -> None:
    assert run_one(torch.empty(0, 16), torch.empty(0, 32), [], 2).numel() == 0
    assert same_bits(run_one(normal(2, 16), torch.empty(0, 32), [0, 0], 2), torch.zeros(2, 16))
    q, kv = one_query_case([3, 0, 4], 2, 8, torch.float32)
    ours = run_one(q, kv, [3, 0, 4], 2)
    expected = torch.full_like(ours, float("nan"))
    attention_one_ref(expected, q, kv, offsets([3, 0, 4]), heads=2, max_seqlen=4)
    assert same_bits(ours[1], torch.zeros(16))
    assert_close(ours, expected)


@EITHER
def test_one_query_with_scores_far_apart(dtype: torch.dtype) -> None:
    """Slots whose largest scores differ by thousands, or that no key reaches."""
    lengths = [70, 70, 5]
    q, kv = one_query_case(lengths, 2, 64, dtype)
    q[0] *= 60
    q[1] = 4
    kv[70:140, :128] = -kv[70:140, :128].abs() * 40
    judge_one(q, kv, lengths, 2)


@pytest.mark.parametrize("head_dim", [12, 64])
def test_no_sequence_of_one_query_sees_another(head_dim: int) -> None:
    lengths = [5, 66, 17]
    q, kv = one_query_case(lengths, 1, head_dim, torch.float16)
    clean = run_one(q, kv, lengths, 1)
    for good, rows in enumerate(kv.split(lengths)):
        other_q, other_kv = poisoned(*q.shape), poisoned(*kv.shape)
        other_q[good] = q[good]
        other_kv.split(lengths)[good].copy_(rows)
        assert same_bits(run_one(other_q, other_kv, lengths, 1)[good], clean[good])
        assert same_bits(run_one(q[good : good + 1], rows, [len(rows)], 1)[0], clean[good])


def test_what_one_query_refuses() -> None:
    out, kv, starts = torch.zeros(2, 32), torch.zeros(6, 64), offsets([3, 3])

    def refused(match: str, *tensors: Tensor, heads: int = 2) -> None:
        with pytest.raises(ValueError, match=match):
            attention_one_calls(INTERPRETED, *tensors, heads=heads, max_seqlen=3)

    refused(r"kv: got shape \(6, 64\), wanted \(M, 2 x 5 x E\)", out, out, kv, starts, heads=5)
    refused(r"q: got shape \(1, 32\), wanted \(2, 32\)", out, out[:1], kv, starts)
    refused("out: got torch.float16, wanted torch.float32", out.half(), out, kv, starts)
    refused("kv: got strides", out, out, torch.zeros(6, 70)[:, :64], starts)
    refused("cu_seqlens: got torch.int64", out, out, kv, starts.long())
