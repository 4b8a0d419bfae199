"""Launches that do not fit their kernel: grids, shared memory, parameters, tensor maps, data. The
emulator or the numbers say so, or nothing goes wrong for a reason that is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from emulated.planted import (
    Planted,
    Subject,
    Values,
    add,
    check_fault,
    exchange,
    of_map,
    put,
)
from emulated.subjects import attention, gathered, layernorm, linear

pytestmark = pytest.mark.usefixtures("emulated_kernels")

SEEDS = range(3)
"""A launch is wrong in any schedule: each seed notices each of these faults."""

READ, WRITE = "read out of bounds, .* byte {} of {} ", "write out of bounds, .* byte {} of {} "
EMPTY = "read of what nobody wrote, byte .* of {} "
UNWRITTEN = r"bytes of {} .* stay unwritten"
NUMBERS = "wrong: .* largest error"
MISALIGNED = "global memory: misaligned address.*, wanted a multiple of"
THREADS = "a block of .* threads, the kernel requires"
SHARED = "shared memory: out of bounds, .* bytes at .*, the block has"
RACE = "bytes that another block writes in the same launch, in no order"
DEADLOCK = "deadlock in block 0: warp 0 at mbarrier"
OVERLAP = "write after write at byte .* of shared memory, by a bulk load"

Faults = dict[str, tuple[Planted, str]]
"""By name: a fault, and a pattern of its symptom; or after "harmless: " why there is none."""


def launch(**fields: Any) -> Planted:
    return Planted(launch=fields)


def values(change: Callable[[Values], Values]) -> Planted:
    return Planted(values=change)


def maps(name: str, **fields: Any) -> Planted:
    return Planted(maps=of_map(name, **fields))


def data(name: str, change: Callable[[Tensor], object]) -> Planted:
    return Planted(data={name: change})


LINEAR_80: Faults = {
    "grid one block short": (launch(grid=(1,)), UNWRITTEN.format("out_ptr")),
    "grid one block long": (launch(grid=(3,)), "harmless: its tile is masked, it has no columns"),
    "block half as large": (launch(block=(64,)), THREADS),
    "block twice as large": (launch(block=(256,)), THREADS),
    "no shared memory": (launch(shared=0), SHARED),
    "16 bytes of shared memory short": (launch(shared=lambda size: size - 16), SHARED),
    "out and x exchanged": (values(exchange("out_ptr", "x_ptr")), EMPTY.format("out_ptr")),
    "x and weight exchanged": (
        values(exchange("x_ptr", "weight_ptr")),
        READ.format(r"\d+", "x_ptr"),
    ),
    "weight and bias exchanged": (
        values(exchange("weight_ptr", "bias_ptr")),
        READ.format(r"\d+", "bias_ptr"),
    ),
    "x 16 bytes late": (values(add("x_ptr", 16)), READ.format(64000, "x_ptr")),
    "x 8 bytes late": (values(add("x_ptr", 8)), MISALIGNED),
    "bias 4 bytes late": (values(add("bias_ptr", 4)), MISALIGNED),
    "out a row early": (values(add("out_ptr", -384)), WRITE.format(-384, "out_ptr")),
    "m a row short": (values(add("m", -1)), "384 " + UNWRITTEN.format("out_ptr")),
    "m a row long": (values(add("m", 1)), READ.format(64000, "x_ptr")),
    "m 64 rows long": (values(add("m", 64)), READ.format(r"\d+", "x_ptr")),
    "depth a step short": (values(add("depth", -32)), NUMBERS),
    "depth a step long": (values(add("depth", 32)), READ.format(64000, "x_ptr")),
}

BOUNDED = "harmless: the tensor maps bound the rows, and there are no statistics"
LINEAR_90: Faults = {
    "grid of 7": (launch(grid=(7,)), "harmless: each block takes every so many-th tile"),
    "block half as large": (launch(block=(128,)), THREADS),
    "no shared memory": (launch(shared=0), SHARED),
    "16 bytes of shared memory short": (launch(shared=lambda size: size - 16), SHARED),
    "bias 8 bytes late": (values(add("bias_ptr", 8)), READ.format(768, "bias_ptr")),
    "m a row short": (values(add("m", -1)), BOUNDED),
    "m 28 rows long": (values(add("m", 28)), BOUNDED),
    "m 0": (values(add("m", -100)), UNWRITTEN.format("out_map")),
    "x_map and weight_map exchanged": (values(exchange("x_map", "weight_map")), NUMBERS),
    "out_map and x_map exchanged": (values(exchange("out_map", "x_map")), EMPTY.format("out_map")),
    "half a box": (maps("x_map", box=lambda b: [b[0], b[1] // 2]), DEADLOCK),
    "a box of twice the rows": (maps("x_map", box=lambda b: [b[0], b[1] * 2]), OVERLAP),
    "half a box of out": (
        maps("out_map", box=lambda b: [b[0], b[1] // 2]),
        UNWRITTEN.format("out_map"),
    ),
    "swizzle 64 for 128 of x": (maps("x_map", swizzle=2), NUMBERS),
    "no swizzle of weight": (maps("weight_map", swizzle=0), NUMBERS),
    "no swizzle of out": (maps("out_map", swizzle=0), NUMBERS),
    "stride 16 bytes long": (
        maps("weight_map", strides=lambda s: [s[0] + 16]),
        READ.format(r"\d+", "weight_map"),
    ),
    "stride 16 bytes short": (maps("weight_map", strides=lambda s: [s[0] - 16]), NUMBERS),
    "stride of out 0": (maps("out_map", strides=[0]), UNWRITTEN.format("out_map")),
    "dims exchanged": (maps("x_map", dims=lambda d: d[::-1]), READ.format(64000, "x_map")),
    "a row of x short": (maps("x_map", dims=lambda d: [d[0], d[1] - 1]), NUMBERS),
    "a row of out short": (
        maps("out_map", dims=lambda d: [d[0], d[1] - 1]),
        "384 " + UNWRITTEN.format("out_map"),
    ),
    "64 rows of x long": (
        maps("x_map", dims=lambda d: [d[0], d[1] + 64]),
        READ.format(64000, "x_map"),
    ),
    "64 rows of out long": (
        maps("out_map", dims=lambda d: [d[0], d[1] + 64]),
        WRITE.format(38400, "out_map") + r".*by the store \[cp.async.bulk.tensor.2d.global",
    ),
    "base of x 16 bytes late": (maps("x_map", base=lambda b: b + 16), READ.format(64000, "x_map")),
    "base of out a row early": (
        maps("out_map", base=lambda b: b - 384),
        WRITE.format(-384, "out_map"),
    ),
    "bf16 for fp16": (maps("x_map", element_type=9), "harmless: the bytes are the same"),
    "fp32 for fp16": (maps("x_map", element_type=7), OVERLAP),
    "three dimensions": (
        maps("x_map", dims=lambda d: [*d, 1], strides=[640, 64000], box=lambda b: [*b, 1]),
        "2 coordinates, the map has 3 dimensions",
    ),
    "one dimension": (
        maps("weight_map", dims=lambda d: d[:1], strides=[], box=lambda b: b[:1]),
        "2 coordinates, the map has 1 dimensions",
    ),
    "no tensor map": (values(lambda v: v | {"x_map": bytes(128)}), "the 128 bytes are no tensor"),
}

SEQUENCES = "cu_seqlens_ptr"
ATTENTION_80: Faults = {
    "grid three blocks short": (launch(grid=(13,)), UNWRITTEN.format("out_ptr")),
    "out and qkv exchanged": (values(exchange("out_ptr", "qkv_ptr")), EMPTY.format("out_ptr")),
    "max_seqlen a tile short": (values(add("max_seqlen", -64)), READ.format(20, SEQUENCES)),
    "max_seqlen a tile long": (values(add("max_seqlen", 64)), UNWRITTEN.format("out_ptr")),
    "cu_seqlens an element late": (values(add(SEQUENCES, 4)), READ.format(20, SEQUENCES)),
    "cu_seqlens 2 bytes late": (values(add(SEQUENCES, 2)), MISALIGNED),
    "sequences a row early": (data(SEQUENCES, lambda t: t[1:-1].sub_(1)), NUMBERS),
    "the last a row long": (
        data(SEQUENCES, lambda t: t[-1:].add_(1)),
        READ.format(197120, "qkv_ptr"),
    ),
    "the last a row short": (
        data(SEQUENCES, lambda t: t[-1:].sub_(1)),
        "128 " + UNWRITTEN.format("out_ptr"),
    ),
    "sequences from the end": (
        data(SEQUENCES, lambda t: t.copy_(t.flip(0))),
        UNWRITTEN.format("out_ptr"),
    ),
}
ATTENTION_90: Faults = {
    "out and qkv exchanged": (
        values(exchange("out_ptr", "qkv_ptr")),
        READ.format(75392, "out_ptr"),
    ),
    "sequences a row early": (data(SEQUENCES, lambda t: t[1:-1].sub_(1)), NUMBERS),
    "the last a row long": (
        data(SEQUENCES, lambda t: t[-1:].add_(1)),
        READ.format(197120, "qkv_ptr"),
    ),
    "half a box of kv": (maps("kv_desc", box=lambda b: [b[0], b[1] // 2]), DEADLOCK),
    "base of kv a row late": (
        maps("kv_desc", base=lambda b: b + 384),
        READ.format(197120, "qkv_ptr"),
    ),
    "a row of q short": (maps("q_desc", dims=lambda d: [d[0], d[1] - 1]), NUMBERS),
}

LAYERNORM: Faults = {
    "rows one long": (values(add("rows", 1)), READ.format(19968, "x_ptr")),
    "rows one short": (values(add("rows", -1)), "1536 " + UNWRITTEN.format("out_ptr")),
    "x_rows one short": (values(add("x_rows", -1)), "harmless: no rows are gathered"),
    "eps 1": (values(put("eps", 1.0)), NUMBERS),
    "gamma and beta exchanged": (values(exchange("gamma_ptr", "beta_ptr")), NUMBERS),
}

GATHERED: Faults = {
    "a row index off by one": (data("rows_ptr", lambda t: t[5].add_(1)), NUMBERS),
    "a row that is not there": (
        data("rows_ptr", lambda t: t[5].fill_(150)),
        READ.format(57600, "x_ptr"),
    ),
    "a row before the first": (
        data("rows_ptr", lambda t: t[5].fill_(-1)),
        READ.format(-384, "x_ptr"),
    ),
    "rows an element late": (values(add("rows_ptr", 4)), READ.format(360, "rows_ptr")),
    "x_stats_stride one short": (values(add("x_stats_stride", -1)), NUMBERS),
    "x_stats_stride one long": (
        values(add("x_stats_stride", 1)),
        READ.format(r"\d+", "x_stats_ptr"),
    ),
    "stats_stride one short": (values(add("stats_stride", -1)), f"write of {RACE}"),
    "stats_stride one long": (values(add("stats_stride", 1)), WRITE.format(1440, "stats_ptr")),
    "eps 1": (values(put("eps", 1.0)), NUMBERS),
    "bias and scale exchanged": (values(exchange("bias_ptr", "scale_ptr")), NUMBERS),
    "row_sums and bias exchanged": (values(exchange("row_sums_ptr", "bias_ptr")), NUMBERS),
    "out and residual exchanged": (
        values(exchange("out_ptr", "residual_ptr")),
        EMPTY.format("out_ptr"),
    ),
    "stats and x_stats exchanged": (
        values(exchange("stats_ptr", "x_stats_ptr")),
        EMPTY.format("stats_ptr"),
    ),
    "residual a row late": (values(add("residual_ptr", 144)), READ.format(12960, "residual_ptr")),
}

CASES = [
    pytest.param(subject, arch, planted, message, id=f"{subject.__name__} sm_{arch} {label}")
    for subject, arch, faults in (
        (linear, 80, LINEAR_80),
        (linear, 90, LINEAR_90),
        (attention, 80, ATTENTION_80),
        (attention, 90, ATTENTION_90),
        (layernorm, 80, LAYERNORM),
        (layernorm, 90, LAYERNORM),
        (gathered, 80, GATHERED),
        (gathered, 90, GATHERED),
    )
    for label, (planted, message) in faults.items()
]


@pytest.mark.parametrize(("make", "arch", "planted", "message"), CASES)
def test_a_launch_that_does_not_fit_is_noticed(
    make: Callable[[int], Subject], arch: int, planted: Planted, message: str
) -> None:
    check_fault(make, arch, planted, message, SEEDS)
