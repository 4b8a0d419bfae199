"""Every operator's reference against a formula written out in fp64, and what it must not touch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from helpers import HALVES, assert_close
from vitrail_kernels import OPERATORS, Cost

DTYPES = (torch.float32, *HALVES)
LONG = pytest.param(1370, marks=pytest.mark.slow)
TOKENS = (1, 50, 197, 257, 577, LONG)
HEAD_DIMS = (8, 64, 72, 80, 88, 104, 128)
BATCHES = (1, 3, 64)
POISONS = (float("nan"), 65504.0)
EPS = 1e-6
LOG2_E = math.log2(math.e)
GUARD = 3
SENTINEL = -0x5A5A5A5B


def call(op: str, *tensors: Tensor | None, **scalars: Any) -> None:
    OPERATORS[op].reference(*tensors, **scalars)


def bits(x: Tensor) -> Tensor:
    """The same bytes as integers, so that NaN equals itself and 0 is not -0."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(bits(a), bits(b))


class Guarded:
    """An output full of NaN inside a larger tensor whose other rows must keep their bytes."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        rows, *rest = shape
        sentinel = SENTINEL if dtype.itemsize == 4 else -0x5B
        fill = float("nan") if dtype.is_floating_point else sentinel
        self.whole = torch.full((rows + 2 * GUARD, *rest), fill, dtype=dtype)
        self.out = self.whole[GUARD : GUARD + rows]
        self.before = bits(self.whole).clone()

    def done(self) -> Tensor:
        """The output; every guard row is as it was."""
        changed = bits(self.whole)
        assert torch.equal(changed[:GUARD], self.before[:GUARD]), "wrote before its output"
        assert torch.equal(changed[-GUARD:], self.before[-GUARD:]), "wrote past its output"
        return self.out


def normal(*shape: int, dtype: torch.dtype = torch.float32, sd: float = 1.0) -> Tensor:
    return (torch.randn(shape) * sd).to(dtype)


def wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def check(ours: Tensor, reference: Tensor, peer: Tensor, name: str) -> None:
    """N2 where everything is fp32, else N1 against PyTorch's own result."""
    half = ours.dtype in HALVES
    assert_close(ours, reference, peer if half else None, name=name)


# -- linear ----------------------------------------------------------------------------------------

EXPLICIT = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: 1 - 2 / (torch.exp(2 * x) + 1),
    None: lambda x: x,
}
PLAIN = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    None: lambda x: x,
}


def explicit_norm(x: Tensor, eps: float) -> Tensor:
    mean = x.sum(1, keepdim=True) / x.shape[1]
    centered = x - mean
    return centered / torch.sqrt((centered * centered).sum(1, keepdim=True) / x.shape[1] + eps)


def explicit_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    rows: Tensor | None = None,
    residual_rows: Tensor | None = None,
    *,
    norm_eps: float | None = None,
    activation: str | None = None,
    gated: bool = False,
) -> Tensor:
    """The formula of the operator's header, step by step, in fp64."""
    x = x.double() if rows is None else x.double()[rows.long()]
    if norm_eps is not None:
        x = explicit_norm(x, norm_eps)
    y = x @ weight.double().t()
    if bias is not None:
        y = y + bias.double()
    if gated:
        gate, up = y.view(y.shape[0], -1, 2).unbind(2)
        y = EXPLICIT[activation](gate) * up
    else:
        y = EXPLICIT[activation](y)
    if scale is not None:
        y = y * scale.double()
    if residual is not None:
        picked = residual if residual_rows is None else residual[residual_rows.long()]
        y = picked.double() + y
    return y


def plain_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    rows: Tensor | None = None,
    residual_rows: Tensor | None = None,
    *,
    norm_eps: float | None = None,
    activation: str | None = None,
    gated: bool = False,
) -> Tensor:
    """What a PyTorch model does in ``x``'s dtype."""
    x = x if rows is None else x[rows.long()]
    if norm_eps is not None:
        x = F.layer_norm(x, (x.shape[1],), eps=norm_eps)
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    y = PLAIN[activation](y[:, 0::2]) * y[:, 1::2] if gated else PLAIN[activation](y)
    if scale is not None:
        y = y * scale.to(x.dtype)
    if residual is not None:
        y = (residual if residual_rows is None else residual[residual_rows.long()]) + y
    return y


# name -> what the call has; "alias": the output is the residual
LINEARS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "norm": {"norm": True},
    "norm, no bias": {"norm": True, "bias": False},
    **{name: {"activation": name} for name in PLAIN if name is not None},
    "norm and gelu": {"norm": True, "activation": "gelu"},
    "norm and quick_gelu": {"norm": True, "activation": "quick_gelu"},
    "gated silu": {"gated": True, "activation": "silu"},
    "gated gelu with norm": {"gated": True, "activation": "gelu", "norm": True},
    "gated by its default": {"gated": True},
    "scale": {"scale": True},
    "residual": {"residual": True},
    "residual in place": {"residual": True, "alias": True},
    "residual in place, no bias": {"residual": True, "alias": True, "bias": False},
    "layer scale and residual": {"scale": True, "residual": True},
    "layer scale and residual in place": {"scale": True, "residual": True, "alias": True},
    "activation and residual in place": {"residual": True, "alias": True, "activation": "gelu"},
    "rows": {"rows": True},
    "rows and norm": {"rows": True, "norm": True},
    "rows and activation": {"rows": True, "activation": "tanh"},
    "residual rows": {"residual": True, "residual_rows": True},
    "residual rows and layer scale": {"residual": True, "residual_rows": True, "scale": True},
    "rows of both": {"rows": True, "residual": True, "residual_rows": True},
}


def linear_case(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    norm: bool = False,
    activation: str | None = None,
    gated: bool = False,
    scale: bool = False,
    residual: bool = False,
    alias: bool = False,
    rows: bool = False,
    residual_rows: bool = False,
    residual_sd: float = 1.0,
) -> tuple[list[Tensor | None], dict[str, Any], bool]:
    """Operands in the operator's order, its scalars, and whether it writes over its residual."""
    picked = max(1, m // 2) if m else 0
    out_rows = picked if rows else m
    n = 2 * n if gated else n
    gather = torch.randint(max(m, 1), (out_rows,), dtype=torch.int32)
    gather[: out_rows // 2] = gather[:1]  # one row many times
    operands = [
        normal(m, k, dtype=dtype),
        normal(n, k, dtype=dtype, sd=k**-0.5),
        normal(n, sd=0.3) if bias else None,
        normal(n, sd=0.3) if scale else None,
        normal(m if residual_rows else out_rows, n, dtype=dtype, sd=residual_sd)
        if residual
        else None,
        gather if rows else None,
        gather.flip(0) if residual_rows else None,
    ]
    scalars = {"norm_eps": EPS if norm else None, "activation": activation, "gated": gated}
    return operands, scalars, alias


def run_linear(operands: list[Tensor | None], alias: bool, **scalars: Any) -> Tensor:
    x, weight, _, _, residual, rows, residual_rows = operands
    assert x is not None
    assert weight is not None
    picked = next((len(r) for r in (rows, residual_rows) if r is not None), x.shape[0])
    guarded = Guarded(picked, weight.shape[0] // (2 if scalars["gated"] else 1), dtype=x.dtype)
    arguments = list(operands)
    if alias and residual is not None:
        guarded.out.copy_(residual)
        arguments[4] = guarded.out
    call("linear", guarded.out, *arguments, **scalars)
    return guarded.done()


def check_linear(m: int, n: int, k: int, dtype: torch.dtype, **has: Any) -> None:
    operands, scalars, alias = linear_case(m, n, k, dtype, **has)
    kept = [None if t is None else t.clone() for t in operands]
    reference = explicit_linear(*operands, **{**scalars, **_default_gate(scalars)})
    peer = plain_linear(*operands, **{**scalars, **_default_gate(scalars)})
    check(run_linear(operands, alias, **scalars), reference, peer, "linear")
    for before, after in zip(kept, operands, strict=True):
        assert before is None or (after is not None and same_bits(before, after)), "input changed"


def _default_gate(scalars: dict[str, Any]) -> dict[str, str]:
    return {"activation": "silu"} if scalars["gated"] and not scalars["activation"] else {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has", LINEARS.values(), ids=LINEARS)
def test_linear_is_its_formula(has: dict[str, Any], dtype: torch.dtype) -> None:
    check_linear(197, 72, 96, dtype, **has)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", ["norm and gelu", "layer scale and residual in place"])
def test_linear_at_every_token_count(name: str, tokens: int, dtype: torch.dtype) -> None:
    for batch in BATCHES if tokens <= 50 else (1, 3):
        check_linear(batch * tokens, 40, 64, dtype, **LINEARS[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 588), (768, 8), (8, 1536)])
def test_linear_at_odd_widths(n: int, k: int, dtype: torch.dtype) -> None:
    for has in ({}, {"residual": True, "alias": True}, {"gated": True}):
        check_linear(64, n, k, dtype, **has)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
def test_linear_normalizes_with_the_epsilon_it_is_given(eps: float, dtype: torch.dtype) -> None:
    """Rows of a standard deviation from 1e-3 to 1: the epsilon shows."""
    x = (normal(50, 64) * torch.logspace(-3, 0, 50)[:, None]).to(dtype)
    weight, bias = normal(24, 64, dtype=dtype, sd=0.1), normal(24)
    guarded = Guarded(50, 24, dtype=dtype)
    call("linear", guarded.out, x, weight, bias, norm_eps=eps)
    reference = explicit_linear(x, weight, bias, norm_eps=eps)
    check(guarded.done(), reference, plain_linear(x, weight, bias, norm_eps=eps), "epsilon")


@pytest.mark.parametrize("residual_sd", [10.0, 100.0])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", [name for name, has in LINEARS.items() if has.get("residual")])
def test_linear_onto_a_large_residual(name: str, dtype: torch.dtype, residual_sd: float) -> None:
    check_linear(197, 72, 96, dtype, **LINEARS[name], residual_sd=residual_sd)


@pytest.mark.parametrize("has", LINEARS.values(), ids=LINEARS)
def test_linear_of_no_rows_writes_nothing(has: dict[str, Any]) -> None:
    operands, scalars, alias = linear_case(0, 8, 16, torch.float32, **has)
    assert run_linear(operands, alias, **scalars).numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_writes_another_dtype_than_it_computes_in(dtype: torch.dtype) -> None:
    (x, weight, bias, *_), _, _ = linear_case(50, 24, 64, dtype, norm=True)
    assert x is not None
    assert weight is not None
    guarded = Guarded(50, 24, dtype=torch.float32)
    call("linear", guarded.out, x, weight, bias, norm_eps=EPS)
    reference = explicit_linear(x, weight, bias, norm_eps=EPS)
    peer = plain_linear(x, weight, bias, norm_eps=EPS)
    check(guarded.done().to(dtype), reference, peer, "logits")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_of_strided_operands(dtype: torch.dtype) -> None:
    """Columns of wider tensors, one element off any alignment, as input, residual and output."""
    x, residual = normal(50, 97, dtype=dtype)[:, 1:], normal(50, 41, dtype=dtype)[:, 1:]
    weight, bias = normal(40, 97, dtype=dtype, sd=0.1)[:, 1:], normal(40)
    for with_residual in (None, residual):
        around = torch.full((50, 45), float("nan"), dtype=dtype)
        call("linear", around[:, 3:43], x, weight, bias, None, with_residual)
        reference = explicit_linear(x, weight, bias, None, with_residual)
        check(
            around[:, 3:43],
            reference,
            plain_linear(x, weight, bias, None, with_residual),
            "strided linear",
        )
        assert bool(around[:, :3].isnan().all())
        assert bool(around[:, 43:].isnan().all())


def test_linear_refuses_an_activation_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="'mish'"):
        call(
            "linear", torch.empty(2, 3), torch.ones(2, 4), torch.ones(3, 4), None, activation="mish"
        )


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has", LINEARS.values(), ids=LINEARS)
def test_no_row_of_linear_sees_another(
    has: dict[str, Any], dtype: torch.dtype, poison: float
) -> None:
    operands, scalars, alias = linear_case(50, 16, 32, dtype, **has)
    clean = run_linear(operands, alias, **scalars).clone()
    x, _, _, _, residual, rows, residual_rows = operands
    assert x is not None
    for at in (0, 7, 49):
        for operand, index in ((x, rows), (residual, residual_rows)):
            if operand is None or at >= operand.shape[0]:
                continue
            kept = operand[at].clone()
            operand[at] = poison
            result = run_linear(operands, alias, **scalars)
            operand[at] = kept
            other_rows = torch.arange(operand.shape[0]) if index is None else index.long()
            assert same_bits(result[other_rows != at], clean[other_rows != at])
            assert not same_bits(result, clean) or bool((other_rows != at).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layernorm_in_linear_survives_means_and_massive_channels(dtype: torch.dtype) -> None:
    """Means 20 times the standard deviation, channels 300 times larger than the rest."""
    x = torch.randn(197, 256)
    x[:, 5] *= 300
    x[:, 77] *= -300
    x = (x + 20 * x[:, 6:70].std()).to(dtype)
    weight, bias = normal(64, 256, dtype=dtype, sd=1 / 16), normal(64)
    guarded = Guarded(197, 64, dtype=dtype)
    call("linear", guarded.out, x, weight, bias, norm_eps=EPS)
    check(
        guarded.done(),
        explicit_linear(x, weight, bias, norm_eps=EPS),
        plain_linear(x, weight, bias, norm_eps=EPS),
        "outliers",
    )


# -- attention -------------------------------------------------------------------------------------


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """2^(q k) / sum 2^(q k) of (H, T, E) in fp64; ``mask`` (T_q, T_k): True where a key is seen."""
    scores = q.double() @ k.double().transpose(1, 2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.exp2(scores - scores.amax(2, keepdim=True))
    return (weights / weights.sum(2, keepdim=True)) @ v.double()


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scores, softmax and weighted sum, each in the operands' dtype."""
    scores = (q @ k.transpose(1, 2)) * math.log(2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(2) @ v


def over_sequences(
    form: Any,
    qkv: Tensor,
    lengths: Sequence[int],
    heads: int,
    causal: bool,
    seen: Sequence[int] | None = None,
) -> Tensor:
    """``form`` for every sequence by itself; ``seen`` keys of each may be attended to."""
    parts = []
    for number, rows in enumerate(qkv.split(list(lengths))):
        tokens, head_dim = rows.shape[0], rows.shape[1] // (3 * heads)
        q, k, v = (
            part.reshape(tokens, heads, head_dim).transpose(0, 1) for part in rows.chunk(3, dim=1)
        )
        mask = torch.ones(tokens, tokens, dtype=torch.bool)
        if causal:
            mask = mask.tril()
        if seen is not None:
            mask[:, seen[number] :] = False
        parts.append(form(q, k, v, mask).transpose(0, 1).reshape(tokens, heads * head_dim))
    return torch.cat(parts)


def packed_qkv(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """As `linear` writes it: head_dim^-0.5 log2(e) is already in the queries."""
    qkv = torch.randn(tokens, 3 * heads * head_dim)
    qkv[:, : heads * head_dim] *= 2 * head_dim**-0.5 * LOG2_E
    return qkv.to(dtype)


def run_attention(
    qkv: Tensor,
    lengths: Sequence[int],
    heads: int,
    causal: bool,
    seen: Sequence[int] | None = None,
) -> Tensor:
    guarded = Guarded(qkv.shape[0], qkv.shape[1] // 3, dtype=qkv.dtype)
    kv_lens = None if seen is None else torch.tensor(seen, dtype=torch.int32)
    call(
        "attention",
        guarded.out,
        qkv,
        offsets(lengths),
        kv_lens,
        heads=heads,
        causal=causal,
        max_seqlen=max(lengths, default=0),
    )
    return guarded.done()


def check_attention(
    lengths: Sequence[int],
    head_dim: int,
    dtype: torch.dtype,
    *,
    heads: int = 2,
    causal: bool = False,
    seen: Sequence[int] | None = None,
) -> None:
    qkv = packed_qkv(sum(lengths), heads, head_dim, dtype)
    ours = run_attention(qkv, lengths, heads, causal, seen)
    reference, peer = (
        over_sequences(form, qkv, lengths, heads, causal, seen)
        for form in (explicit_attention, plain_attention)
    )
    check(ours, reference, peer, "attention")


PACKED = ([1], [5, 1, 50, 7, 5, 5], [50, 3, 3], [2, 2, 3], [9] * 8 + [77])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention_is_its_formula(
    tokens: int, head_dim: int, dtype: torch.dtype, causal: bool
) -> None:
    check_attention([tokens], head_dim, dtype, causal=causal)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_attention_of_a_batch(batch: int, dtype: torch.dtype, causal: bool) -> None:
    for tokens in (1, 17, 50):
        check_attention([tokens] * batch, 16, dtype, causal=causal, heads=3)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", PACKED, ids=str)
def test_attention_of_packed_sequences(
    lengths: list[int], dtype: torch.dtype, causal: bool
) -> None:
    for head_dim in (8, 72):
        check_attention(lengths, head_dim, dtype, causal=causal)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_sees_only_the_first_kv_lens_keys(dtype: torch.dtype, causal: bool) -> None:
    for kv_lens in ([20, 9, 1], [1, 1, 1], [20, 20, 20], [19, 20, 2]):
        check_attention([20] * 3, 64, dtype, causal=causal, seen=kv_lens)


def test_attention_refuses_kv_lens_over_sequences_of_several_lengths() -> None:
    with pytest.raises(ValueError, match="kv_lens"):
        run_attention(torch.zeros(5, 24), [2, 3], 1, False, seen=[1, 1])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention_of_nothing_writes_nothing(causal: bool) -> None:
    assert run_attention(torch.empty(0, 48), [], 2, causal).numel() == 0
    assert run_attention(torch.empty(0, 48), [0, 0], 2, causal).numel() == 0


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention_of_strided_rows(causal: bool) -> None:
    for lengths in ([10, 10], [13, 7]):
        qkv = torch.randn(20, 52)[:, 3:51]
        ours = run_attention(qkv, lengths, 2, causal)
        assert_close(ours, over_sequences(explicit_attention, qkv, lengths, 2, causal))


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [*PACKED[1:], [17] * 4], ids=str)
def test_no_sequence_of_attention_sees_another(
    lengths: list[int], dtype: torch.dtype, causal: bool, poison: float
) -> None:
    qkv = packed_qkv(sum(lengths), 2, 16, dtype)
    clean = run_attention(qkv, lengths, 2, causal).clone().split(lengths)
    for bad in range(len(lengths)):
        poisoned = qkv.clone()
        poisoned.split(lengths)[bad].fill_(poison)
        result = run_attention(poisoned, lengths, 2, causal).split(lengths)
        for i in range(len(lengths)):
            assert i == bad or same_bits(result[i], clean[i]), f"{bad} changed {i}"


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_past_kv_lens_change_no_bit(dtype: torch.dtype, causal: bool, poison: float) -> None:
    kv_lens, tokens = [20, 9, 1], 20
    qkv = packed_qkv(3 * tokens, 2, 64, dtype)
    clean = run_attention(qkv, [tokens] * 3, 2, causal, kv_lens).clone().split(tokens)
    poisoned = qkv.clone()
    for rows, length in zip(poisoned.split(tokens), kv_lens, strict=True):
        rows[length:] = poison
    result = run_attention(poisoned, [tokens] * 3, 2, causal, kv_lens).split(tokens)
    for ours, expected, length in zip(result, clean, kv_lens, strict=True):
        assert same_bits(ours[:length], expected[:length])


# -- attention_one ---------------------------------------------------------------------------------


def run_attention_one(q: Tensor, kv: Tensor, lengths: Sequence[int], heads: int) -> Tensor:
    guarded = Guarded(*q.shape, dtype=q.dtype)
    call(
        "attention_one",
        guarded.out,
        q,
        kv,
        offsets(lengths),
        heads=heads,
        max_seqlen=max(lengths, default=0),
    )
    return guarded.done()


def one_query(form: Any, q: Tensor, kv: Tensor, lengths: Sequence[int], heads: int) -> Tensor:
    parts = []
    for query, rows in zip(q, kv.split(list(lengths)), strict=True):
        k, v = (part.reshape(len(rows), heads, -1).transpose(0, 1) for part in rows.chunk(2, dim=1))
        parts.append(form(query.view(heads, 1, -1), k, v).reshape(-1))
    return torch.stack(parts)


def one_query_case(
    lengths: Sequence[int], heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    width = heads * head_dim
    q = normal(len(lengths), width, sd=2 * head_dim**-0.5 * LOG2_E).to(dtype)
    return q, normal(sum(lengths), 2 * width, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention_of_one_query_is_its_formula(
    tokens: int, head_dim: int, dtype: torch.dtype
) -> None:
    # as many rows as make the root mean square of half-precision errors mean something
    lengths = [tokens] * 3
    q, kv = one_query_case(lengths, 2, head_dim, dtype)
    reference, peer = (
        one_query(form, q, kv, lengths, 2) for form in (explicit_attention, plain_attention)
    )
    check(run_attention_one(q, kv, lengths, 2), reference, peer, "one query")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [*PACKED, [17] * 64], ids=str)
def test_attention_of_one_query_over_packed_sequences(
    lengths: list[int], dtype: torch.dtype
) -> None:
    q, kv = one_query_case(lengths, 3, 40, dtype)
    reference, peer = (
        one_query(form, q, kv, lengths, 3) for form in (explicit_attention, plain_attention)
    )
    check(run_attention_one(q, kv, lengths, 3), reference, peer, "one query")


def test_attention_of_one_query_over_nothing_writes_nothing() -> None:
    assert run_attention_one(torch.empty(0, 16), torch.empty(0, 32), [], 2).numel() == 0


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [*PACKED[1:], [17] * 4], ids=str)
def test_no_sequence_of_one_query_sees_another(
    lengths: list[int], dtype: torch.dtype, poison: float
) -> None:
    q, kv = one_query_case(lengths, 2, 16, dtype)
    clean = run_attention_one(q, kv, lengths, 2).clone()
    for bad in range(len(lengths)):
        other_q, other_kv = q.clone(), kv.clone()
        other_q[bad] = poison
        other_kv.split(lengths)[bad].fill_(poison)
        result = run_attention_one(other_q, other_kv, lengths, 2)
        keep = torch.arange(len(lengths)) != bad
        assert same_bits(result[keep], clean[keep])


# -- patch_embed -----------------------------------------------------------------------------------


def patch_case(
    batch: int,
    size: tuple[int, int],
    patch: tuple[int, int],
    *,
    uint8: bool,
    dtype: torch.dtype,
    channels: int = 3,
    width: int = 40,
    prefix: int = 1,
    pad: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels, the kernel's weight with ``pad`` columns of NaN, the table, the 4-D weight."""
    values = channels * patch[0] * patch[1]
    kernel = normal(width, channels, *patch, dtype=dtype, sd=values**-0.5)
    if uint8:
        pixels = torch.randint(256, (batch, *size, channels), dtype=torch.uint8)
        kernel = (kernel.float() / 64).to(dtype)
    else:
        pixels = normal(batch, channels, *size)
    flat = (kernel.permute(0, 2, 3, 1) if uint8 else kernel).reshape(width, values)
    weight = torch.full((width, values + pad), float("nan"), dtype=dtype)
    weight[:, :values] = flat
    tokens = prefix + (size[0] // patch[0]) * (size[1] // patch[1])
    return pixels, weight, normal(tokens, width), kernel


def run_patch_embed(
    pixels: Tensor, weight: Tensor, table: Tensor, patch: tuple[int, int], prefix: int
) -> Tensor:
    guarded = Guarded(pixels.shape[0] * table.shape[0], weight.shape[0], dtype=weight.dtype)
    channels = pixels.shape[3 if pixels.dtype == torch.uint8 else 1]
    call(
        "patch_embed",
        guarded.out,
        pixels,
        weight,
        table,
        patch=patch,
        channels=channels,
        prefix=prefix,
    )
    return guarded.done().view(pixels.shape[0], table.shape[0], weight.shape[0])


def convolved(pixels: Tensor, kernel: Tensor, table: Tensor, prefix: int) -> Tensor:
    """A convolution that strides by its own size, in the dtype of its operands."""
    image = pixels.permute(0, 3, 1, 2) / 256 if pixels.dtype == torch.uint8 else pixels
    patches = F.conv2d(image.to(kernel.dtype), kernel, stride=kernel.shape[2:])
    tokens = patches.flatten(2).transpose(1, 2) + table[prefix:].to(kernel.dtype)
    first = table[:prefix].to(kernel.dtype).expand(pixels.shape[0], -1, -1)
    return torch.cat([first, tokens], dim=1)


def explicit_patches(pixels: Tensor, kernel: Tensor, table: Tensor, prefix: int) -> Tensor:
    """Every patch cut out and multiplied by itself, in fp64, on the pixels the operator sees."""
    image = pixels.permute(0, 3, 1, 2) / 256 if pixels.dtype == torch.uint8 else pixels
    image = image.to(kernel.dtype).double()
    down, across = kernel.shape[2:]
    rows = [table[:prefix].double().expand(len(image), -1, -1)]
    at = prefix
    for y in range(image.shape[2] // down):
        for x in range(image.shape[3] // across):
            cut = image[:, :, y * down : (y + 1) * down, x * across : (x + 1) * across]
            value = torch.einsum("bcij,ncij->bn", cut, kernel.double()) + table[at].double()
            rows.append(value[:, None])
            at += 1
    return torch.cat(rows, dim=1)


SIZES = {
    "one patch": ((4, 4), (4, 4)),
    "a grid": ((28, 28), (4, 4)),
    "not square": ((12, 40), (4, 4)),
    "patches not square": ((24, 30), (8, 3)),
    "remainder pixels": ((30, 19), (7, 4)),
    "single pixels": ((5, 3), (1, 1)),
    "14 by 14": ((57, 43), (14, 14)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize(("size", "patch"), SIZES.values(), ids=SIZES)
def test_patch_embed_is_its_formula(
    size: tuple[int, int], patch: tuple[int, int], uint8: bool, dtype: torch.dtype
) -> None:
    for batch, channels, prefix in ((1, 3, 1), (3, 1, 5), (2, 4, 0)):
        pixels, weight, table, kernel = patch_case(
            batch, size, patch, uint8=uint8, dtype=dtype, channels=channels, prefix=prefix
        )
        check(
            run_patch_embed(pixels, weight, table, patch, prefix),
            explicit_patches(pixels, kernel, table, prefix),
            convolved(pixels, kernel, table, prefix),
            "patch_embed",
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize("batch", [*BATCHES, 0])
def test_patch_embed_of_a_batch(batch: int, uint8: bool, dtype: torch.dtype) -> None:
    pixels, weight, table, kernel = patch_case(batch, (16, 24), (8, 8), uint8=uint8, dtype=dtype)
    check(
        run_patch_embed(pixels, weight, table, (8, 8), 1),
        explicit_patches(pixels, kernel, table, 1),
        convolved(pixels, kernel, table, 1),
        "patch_embed",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", [0, 115, 255])
def test_patch_embed_of_a_flat_image(level: int, dtype: torch.dtype) -> None:
    """An even sky: nothing of the error averages out."""
    pixels, weight, table, kernel = patch_case(4, (32, 32), (16, 16), uint8=True, dtype=dtype)
    pixels.fill_(level)
    check(
        run_patch_embed(pixels, weight, table, (16, 16), 1),
        explicit_patches(pixels, kernel, table, 1),
        convolved(pixels, kernel, table, 1),
        "flat",
    )


@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
def test_weight_columns_past_a_patch_are_not_read(uint8: bool) -> None:
    pixels, weight, table, kernel = patch_case(
        3, (21, 14), (7, 7), uint8=uint8, dtype=torch.float32, pad=45
    )
    ours = run_patch_embed(pixels, weight, table, (7, 7), 1)
    bare = run_patch_embed(pixels, weight[:, :147].contiguous(), table, (7, 7), 1)
    assert same_bits(ours, bare)
    assert_close(ours, explicit_patches(pixels, kernel, table, 1))


@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
def test_patch_embed_of_strided_pixels(uint8: bool) -> None:
    pixels, weight, table, _ = patch_case(3, (16, 16), (8, 8), uint8=uint8, dtype=torch.float32)
    straight = run_patch_embed(pixels, weight, table, (8, 8), 1).clone()
    turned = pixels.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not turned.is_contiguous()
    assert same_bits(run_patch_embed(turned, weight, table, (8, 8), 1), straight)


@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
def test_patch_embed_refuses_another_number_of_channels(uint8: bool) -> None:
    pixels, weight, table, _ = patch_case(2, (8, 8), (4, 4), uint8=uint8, dtype=torch.float32)
    with pytest.raises(ValueError, match="got 3 channels, wanted 1"):
        call(
            "patch_embed",
            torch.empty(10, 40),
            pixels,
            weight,
            table,
            patch=(4, 4),
            channels=1,
            prefix=1,
        )


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_patch_sees_another_nor_the_remainder(dtype: torch.dtype, poison: float) -> None:
    pixels, weight, table, _ = patch_case(3, (19, 17), (4, 4), uint8=False, dtype=dtype)
    clean = run_patch_embed(pixels, weight, table, (4, 4), 1).clone()
    edge = pixels.clone()
    edge[:, :, 16:] = poison
    edge[:, :, :, 16:] = poison
    assert same_bits(run_patch_embed(edge, weight, table, (4, 4), 1), clean)
    pixels[1, :, 4:8, 8:12] = poison  # image 1, patch row 1, column 2
    result = run_patch_embed(pixels, weight, table, (4, 4), 1)
    keep = torch.ones(3, table.shape[0], dtype=torch.bool)
    keep[1, 1 + 4 + 2] = False
    assert same_bits(result[keep], clean[keep])
    assert not same_bits(result, clean)


# -- position --------------------------------------------------------------------------------------


def cubic(x: float, a: float) -> float:
    """Keys' cubic convolution kernel."""
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a if x < 2 else 0.0


def resampling(size: int, target: int, antialias: bool) -> Tensor:
    """The (target, size) fp64 matrix of a one-dimensional bicubic resize, align_corners=False.

    Plain: a = -0.75, four taps, borders repeated. Antialiased: a = -0.5 as in Pillow, the kernel
    stretched where the grid shrinks, taps outside left out and the rest normalized.
    """
    matrix, ratio = torch.zeros(target, size, dtype=torch.float64), size / target
    for row in range(target):
        center = (row + 0.5) * ratio
        if not antialias:
            first = math.floor(center - 0.5)
            for tap in range(first - 1, first + 3):
                value = cubic(center - 0.5 - tap, -0.75)
                matrix[row, min(max(tap, 0), size - 1)] += value
            continue
        stretch = max(ratio, 1.0)
        low = max(int(center - 2 * stretch + 0.5), 0)
        high = min(int(center + 2 * stretch + 0.5), size)
        for tap in range(low, high):
            matrix[row, tap] = cubic((tap - center + 0.5) / stretch, -0.5)
        matrix[row] /= matrix[row].sum()
    return matrix


def run_position(
    table: Tensor,
    prefix: Tensor,
    bias: Tensor | None,
    table_grid: tuple[int, int],
    grid: tuple[int, int],
    antialias: bool,
) -> Tensor:
    guarded = Guarded(prefix.shape[0] + grid[0] * grid[1], table.shape[1], dtype=torch.float32)
    call(
        "position",
        guarded.out,
        table,
        prefix,
        bias,
        table_grid=table_grid,
        grid=grid,
        antialias=antialias,
    )
    return guarded.done()


@pytest.mark.parametrize("antialias", [False, True], ids=["plain", "antialias"])
@pytest.mark.parametrize(
    ("table_grid", "grid"),
    [
        ((7, 7), (14, 14)),
        ((7, 7), (3, 11)),
        ((16, 16), (5, 5)),
        ((4, 9), (9, 4)),
        ((2, 2), (1, 1)),
        ((1, 1), (3, 2)),
        ((37, 37), (16, 24)),
    ],
    ids=str,
)
def test_positions_are_resized_by_the_bicubic_formula(
    table_grid: tuple[int, int], grid: tuple[int, int], antialias: bool
) -> None:
    width = 24
    table, prefix, bias = (
        normal(1 + table_grid[0] * table_grid[1], width),
        normal(5, width),
        normal(width),
    )
    ours = run_position(table, prefix, bias, table_grid, grid, antialias)
    down, across = (resampling(g, t, antialias) for g, t in zip(table_grid, grid, strict=True))
    square = table[1:].double().view(*table_grid, width)
    resized = torch.einsum("yi,xj,ijc->yxc", down, across, square).reshape(-1, width)
    assert same_bits(ours[:5], prefix)
    assert_close(ours[5:], resized + bias.double())


@pytest.mark.parametrize("antialias", [False, True], ids=["plain", "antialias"])
def test_positions_at_their_own_grid_keep_every_bit(antialias: bool) -> None:
    table, prefix, bias = normal(1 + 4 * 6, 24), normal(1, 24), normal(24)
    assert same_bits(
        run_position(table, prefix, None, (4, 6), (4, 6), antialias),
        torch.cat([prefix, table[1:]]),
    )
    assert same_bits(
        run_position(table, prefix, bias, (4, 6), (4, 6), antialias)[1:], table[1:] + bias
    )


def test_a_grid_of_the_same_count_but_another_shape_is_resized() -> None:
    table, prefix = normal(1 + 4 * 6, 8), normal(1, 8)
    turned = run_position(table, prefix, None, (4, 6), (6, 4), False)
    assert not torch.equal(turned[1:], table[1:])


@pytest.mark.parametrize("grid", [(4, 6), (3, 3)])
def test_the_class_row_of_the_table_is_not_used(grid: tuple[int, int]) -> None:
    table, prefix = normal(1 + 4 * 6, 8), normal(1, 8)
    clean = run_position(table, prefix, None, (4, 6), grid, False).clone()
    table[0] = float("nan")
    assert same_bits(run_position(table, prefix, None, (4, 6), grid, False), clean)


# -- text_embed, layernorm -------------------------------------------------------------------------


def run_text_embed(ids: Tensor, places: Tensor, token: Tensor, position: Tensor) -> Tensor:
    guarded = Guarded(len(ids), token.shape[1], dtype=token.dtype)
    call("text_embed", guarded.out, ids, places, token, position)
    return guarded.done()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 50, 197])
def test_text_embed_adds_a_row_of_each_table(tokens: int, dtype: torch.dtype) -> None:
    token, position = normal(30, 24, dtype=dtype), normal(13, 24)
    ids = torch.randint(30, (tokens,), dtype=torch.int32)
    positions = torch.randint(13, (tokens,), dtype=torch.int32)
    expected = torch.empty(tokens, 24, dtype=torch.float64)
    for row, (i, p) in enumerate(zip(ids.tolist(), positions.tolist(), strict=True)):
        expected[row] = token[i].double() + position[p].double()
    peer = F.embedding(ids, token) + F.embedding(positions, position.to(dtype))
    check(run_text_embed(ids, positions, token, position), expected, peer, "text_embed")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_positions_of_texts_stay_fp32_until_the_sum(dtype: torch.dtype) -> None:
    """Every sum is exact in fp32 here, so one rounding is the only difference allowed."""
    token = torch.randint(-8, 9, (30, 24)).to(dtype)
    position = torch.randint(-4096, 4097, (13, 24)) / 4096
    ids = torch.randint(30, (50,), dtype=torch.int32)
    positions = torch.randint(13, (50,), dtype=torch.int32)
    exact = token.double()[ids.long()] + position.double()[positions.long()]
    assert same_bits(run_text_embed(ids, positions, token, position), exact.to(dtype))


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_text_embed_reads_only_the_rows_it_names(dtype: torch.dtype, poison: float) -> None:
    token, position = normal(30, 24, dtype=dtype), normal(13, 24)
    ids, positions = torch.tensor([3, 3, 29, 4]).int(), torch.tensor([0, 1, 12, 3]).int()
    clean = run_text_embed(ids, positions, token, position).clone()
    for table, used in ((token, ids), (position, positions)):
        unused = torch.ones(len(table), dtype=torch.bool)
        unused[used.long()] = False
        table[unused] = poison
    assert same_bits(run_text_embed(ids, positions, token, position), clean)
    token[29] = poison
    result = run_text_embed(ids, positions, token, position)
    assert same_bits(result[[0, 1, 3]], clean[[0, 1, 3]])
    assert not same_bits(result, clean)


def run_layernorm(
    x: Tensor, gamma: Tensor, beta: Tensor, rows: Tensor | None = None, eps: float = EPS
) -> Tensor:
    guarded = Guarded(len(x) if rows is None else len(rows), x.shape[1], dtype=x.dtype)
    call("layernorm", guarded.out, x, gamma, beta, rows, eps=eps)
    return guarded.done()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [None, [0, 3, 3, 3, 49], []], ids=["all", "some", "none"])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
def test_layernorm_is_its_formula(rows: list[int] | None, eps: float, dtype: torch.dtype) -> None:
    x = (normal(50, 64) * torch.logspace(-2, 2, 50)[:, None] + 3).to(dtype)
    gamma, beta = normal(64) + 1, normal(64)
    index = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    picked = x if index is None else x[index.long()]
    reference = explicit_norm(picked.double(), eps) * gamma.double() + beta.double()
    peer = F.layer_norm(picked, (64,), gamma.to(dtype), beta.to(dtype), eps)
    check(run_layernorm(x, gamma, beta, index, eps), reference, peer, "layernorm")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layernorm_over_its_own_input(dtype: torch.dtype) -> None:
    x, gamma, beta = normal(50, 64, dtype=dtype), normal(64), normal(64)
    apart = run_layernorm(x, gamma, beta).clone()
    call("layernorm", x, x, gamma, beta, eps=EPS)
    assert same_bits(x, apart)


def test_layernorm_of_no_rows_writes_nothing() -> None:
    assert run_layernorm(torch.empty(0, 8), torch.ones(8), torch.zeros(8)).numel() == 0


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_row_of_layernorm_sees_another(dtype: torch.dtype, poison: float) -> None:
    x, gamma, beta = normal(50, 64, dtype=dtype), normal(64), normal(64)
    clean = run_layernorm(x, gamma, beta).clone()
    x[17, 3] = poison
    keep = torch.arange(50) != 17
    assert same_bits(run_layernorm(x, gamma, beta)[keep], clean[keep])
    rows = torch.tensor([4, 4, 30], dtype=torch.int32)
    assert same_bits(run_layernorm(x, gamma, beta, rows), clean[rows.long()])


# -- pool, class_mean ------------------------------------------------------------------------------


def run_pool(
    x: Tensor,
    rows: Tensor | None,
    *,
    affine: tuple[Tensor, Tensor] | None = None,
    projection: tuple[Tensor, Tensor | None] | None = None,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    batch = len(x) if rows is None else len(rows)
    width = x.shape[1] if projection is None else projection[0].shape[0]
    out, status = Guarded(batch, width, dtype=torch.float32), Guarded(batch, dtype=torch.int32)
    gamma, beta = affine or (None, None)
    weight, bias = projection or (None, None)
    call("pool", out.out, status.out, x, gamma, beta, weight, bias, rows, eps=eps)
    return out.done(), status.done()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [None, [49, 0, 7, 7], []], ids=["all", "some", "none"])
def test_pool_with_a_projection_is_its_formula(rows: list[int] | None, dtype: torch.dtype) -> None:
    """fp32 inside, whatever the dtype of what it is given."""
    x, weight, bias = normal(50, 64, dtype=dtype), normal(24, 64, dtype=dtype), normal(24)
    index = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    picked = x if index is None else x[index.long()]
    for shift in (bias, None):
        out, status = run_pool(x, index, projection=(weight, shift))
        expected = explicit_norm(picked.double(), EPS) @ weight.double().t()
        assert_close(
            out, expected if shift is None else expected + shift.double(), name="projected"
        )
        assert status.tolist() == [0] * len(out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [None, [49, 0, 7, 7], []], ids=["all", "some", "none"])
def test_pool_without_a_projection_is_its_formula(
    rows: list[int] | None, dtype: torch.dtype
) -> None:
    x = (normal(50, 64) * torch.logspace(-3, 0, 50)[:, None]).to(dtype)
    gamma, beta = normal(64) + 1, normal(64)
    index = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    picked = x if index is None else x[index.long()]
    for eps in (1e-12, 1e-5, 0.5):
        out, status = run_pool(x, index, affine=(gamma, beta), eps=eps)
        expected = explicit_norm(picked.double(), eps) * gamma.double() + beta.double()
        assert_close(out, expected, name="normalized")
        assert status.tolist() == [0] * len(out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("projected", [True, False], ids=["projected", "normalized"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_pool_marks_the_items_that_are_not_finite(
    value: float, projected: bool, dtype: torch.dtype
) -> None:
    x = normal(8, 64, dtype=dtype)
    x[2, 63] = x[5, 0] = value
    ends: dict[str, Any] = (
        {"projection": (normal(24, 64, dtype=dtype), normal(24))}
        if projected
        else {"affine": (torch.ones(64), torch.zeros(64))}
    )
    out, status = run_pool(x, None, **ends)
    assert status.tolist() == [0, 0, 1, 0, 0, 1, 0, 0]
    assert torch.isfinite(out).all(dim=1).tolist() == [word == 0 for word in status.tolist()]


def test_pool_marks_a_projection_that_overflows() -> None:
    x, weight = normal(3, 64), normal(24, 64)
    weight[4] = 3e38 * torch.sign(explicit_norm(x[1:2].double(), EPS)[0]).float()
    out, status = run_pool(x, None, projection=(weight, None))
    assert status[1] == 1
    assert not torch.isfinite(out[1]).all()


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pool_reads_only_the_rows_it_names(dtype: torch.dtype, poison: float) -> None:
    x, projection = normal(50, 64, dtype=dtype), (normal(24, 64, dtype=dtype), normal(24))
    rows = torch.tensor([3, 20, 41], dtype=torch.int32)
    clean, _ = run_pool(x, rows, projection=projection)
    clean = clean.clone()
    keep = torch.ones(50, dtype=torch.bool)
    keep[rows.long()] = False
    x[keep] = poison
    out, status = run_pool(x, rows, projection=projection)
    assert same_bits(out, clean)
    assert status.tolist() == [0, 0, 0]
    x[20, 9] = float("nan")
    out, status = run_pool(x, rows, projection=projection)
    assert same_bits(out[[0, 2]], clean[[0, 2]])
    assert status.tolist() == [0, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [0, *BATCHES])
@pytest.mark.parametrize("prefix", [1, 5])
def test_class_mean_leaves_the_registers_out(batch: int, prefix: int, dtype: torch.dtype) -> None:
    tokens, width = prefix + 257, 24
    x = normal(batch * tokens, width, dtype=dtype) + 2
    guarded = Guarded(batch, 2 * width, dtype=dtype)
    call("class_mean", guarded.out, x, tokens=tokens, prefix=prefix)
    ours = guarded.done().clone()
    items = x.view(batch, tokens, width)
    mean = items[:, prefix:].double().sum(1) / (tokens - prefix)
    peer = items[:, prefix:].mean(1)
    assert same_bits(ours[:, :width], items[:, 0])
    check(ours[:, width:], mean, peer, "mean")
    items[:, 1:prefix] = float("nan")
    call("class_mean", guarded.out, x, tokens=tokens, prefix=prefix)
    assert same_bits(guarded.done(), ours)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_item_of_class_mean_sees_another(dtype: torch.dtype, poison: float) -> None:
    x = normal(3 * 50, 24, dtype=dtype)
    guarded = Guarded(3, 48, dtype=dtype)
    call("class_mean", guarded.out, x, tokens=50, prefix=1)
    clean = guarded.done().clone()
    x[50:100] = poison
    call("class_mean", guarded.out, x, tokens=50, prefix=1)
    assert same_bits(guarded.done()[[0, 2]], clean[[0, 2]])


# -- costs -----------------------------------------------------------------------------------------


def counted(op: str, *tensors: Tensor | None, **scalars: Any) -> int:
    """FLOPs that PyTorch counts while the reference runs."""
    with FlopCounterMode(display=False) as counter:
        call(op, *tensors, **scalars)
    return counter.get_total_flops()


def cost_of(op: str, *tensors: Tensor | None, **scalars: Any) -> Cost:
    """The cost, which takes all arguments by the names that the operator's calls give them."""
    names = list(inspect.signature(OPERATORS[op].calls).parameters)[1:]
    return OPERATORS[op].cost(**dict(zip(names, tensors, strict=False)), **scalars)


@pytest.mark.parametrize("has", LINEARS.values(), ids=LINEARS)
def test_linear_flops_are_those_counted(has: dict[str, Any]) -> None:
    operands, scalars, _ = linear_case(37, 24, 40, torch.float32, **has)
    x, weight, _, _, _, rows, residual_rows = operands
    assert x is not None
    assert weight is not None
    picked = next((len(r) for r in (rows, residual_rows) if r is not None), len(x))
    if residual_rows is not None and rows is None:
        operands[0] = x[:picked]
    out = torch.empty(picked, weight.shape[0] // (2 if scalars["gated"] else 1))
    cost = cost_of("linear", out, *operands, **scalars)
    assert cost.flops == counted("linear", out, *operands, **scalars)
    assert cost.flops == 2 * picked * weight.numel()


def test_linear_bytes_by_hand() -> None:
    """Half-precision rows gathered, a gathered residual, fp32 vectors, int32 indices."""
    m, n, k, stored = 5, 24, 40, 37
    half = torch.float16
    cost = cost_of(
        "linear",
        torch.empty(m, n, dtype=half),
        torch.empty(stored, k, dtype=half),
        torch.empty(n, k, dtype=half),
        torch.empty(n),
        torch.empty(n),
        torch.empty(stored, n, dtype=half),
        torch.empty(m, dtype=torch.int32),
        torch.empty(m, dtype=torch.int32),
    )
    activations = 2 * (m * k + m * n + m * n)  # rows of x and of the residual read, rows written
    assert cost.bytes == activations + 2 * n * k + 4 * (n + n) + 4 * (m + m)


@pytest.mark.parametrize("lengths", [[7], [7, 7, 7], [1, 9, 4]], ids=str)
def test_attention_flops_are_those_of_its_two_products(lengths: list[int]) -> None:
    heads, head_dim = 3, 16
    width, tokens = heads * head_dim, sum(lengths)
    out, qkv = torch.empty(tokens, width), torch.randn(tokens, 3 * width)
    operands = out, qkv, offsets(lengths)
    with FlopCounterMode(display=False) as counter:
        over_sequences(plain_attention, qkv, lengths, heads, False)
    full = cost_of("attention", *operands, heads=heads, causal=False, lengths=lengths)
    assert full.flops == counter.get_total_flops()
    kv_lens = sum(int(torch.ones(n, n).tril().sum()) for n in lengths)
    causal = cost_of("attention", *operands, heads=heads, causal=True, lengths=lengths)
    assert causal.flops == 2 * (2 * heads * head_dim) * kv_lens
    assert full.bytes == 4 * (3 * tokens * width + tokens * width + len(lengths) + 1)


@pytest.mark.parametrize("lengths", [[7], [7, 7, 7], [1, 9, 4]], ids=str)
def test_one_query_flops_are_those_of_its_two_products(lengths: list[int]) -> None:
    q, kv = one_query_case(lengths, 3, 16, torch.float32)
    out, starts = torch.empty_like(q), offsets(lengths)
    with FlopCounterMode(display=False) as counter:
        one_query(plain_attention, q, kv, lengths, 3)
    cost = cost_of("attention_one", out, q, kv, starts, heads=3, lengths=lengths)
    assert cost.flops == counter.get_total_flops()
    assert cost.bytes == 4 * (2 * len(lengths) * 48 + sum(lengths) * 96 + len(lengths) + 1)


@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
def test_patch_embed_cost(uint8: bool) -> None:
    pixels, weight, table, _ = patch_case(
        3, (30, 19), (7, 4), uint8=uint8, dtype=torch.float32, prefix=5, pad=12
    )
    out = torch.empty(3 * len(table), 40)
    scalars: dict[str, Any] = {"patch": (7, 4), "channels": 3, "prefix": 5}
    cost = cost_of("patch_embed", out, pixels, weight, table, **scalars)
    assert cost.flops == counted("patch_embed", out, pixels, weight, table, **scalars)
    assert cost.flops == 2 * 3 * (4 * 4) * 40 * 84
    read = 3 * 30 * 19 * 3 * (1 if uint8 else 4) + 4 * 40 * 96 + 4 * 21 * 40
    assert cost.bytes == read + 4 * 3 * 21 * 40


def test_pool_cost() -> None:
    x, rows = torch.randn(50, 64), torch.tensor([1, 4, 9], dtype=torch.int32)
    out, status = torch.empty(3, 24), torch.empty(3, dtype=torch.int32)
    weight, bias = torch.randn(24, 64), torch.randn(24)
    operands = out, status, x, None, None, weight, bias, rows
    cost = cost_of("pool", *operands, eps=EPS)
    assert cost.flops == counted("pool", *operands, eps=EPS) == 2 * 3 * 24 * 64
    assert cost.bytes == 4 * (3 * 64 + 24 * 64 + 24 + 3 + 3 * 24 + 3)
    plain = cost_of("pool", torch.empty(3, 64), status, x, bias, bias, rows=rows, eps=EPS)
    assert plain.flops == 0


def test_the_costs_of_what_multiplies_nothing() -> None:
    """(FLOPs, bytes): each number read once and written once, in its own width."""
    half, ints = torch.float16, torch.zeros(6, dtype=torch.int32)
    x, vector = torch.empty(50, 24, dtype=half), torch.empty(24)
    picked = torch.empty(6, 24, dtype=half)
    assert cost_of("layernorm", x, x, vector, vector) == (0, 2 * 2 * 50 * 24 + 2 * 4 * 24)
    assert cost_of("layernorm", picked, x, vector, vector, ints) == (
        0,
        2 * 2 * 6 * 24 + 2 * 4 * 24 + 4 * 6,
    )
    tables = torch.empty(1000, 24, dtype=half), torch.empty(77, 24)
    assert cost_of("text_embed", picked, ints, ints, *tables) == (
        0,
        6 * 24 * (2 + 4 + 2) + 2 * 4 * 6,
    )
    assert cost_of("class_mean", torch.empty(2, 48, dtype=half), x) == (0, 2 * (2 * 48 + 50 * 24))
    tables = torch.empty(26, 24), torch.empty(12, 24), torch.empty(3, 24)
    assert cost_of("position", *tables, vector) == (0, 4 * 24 * (26 + 12 + 3 + 1))
