"""What the kernels compile to, for GPUs that are not here: no spills, the right instructions."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import triton
from main_loops import ASYNC_COPY, TMA_LOAD, TMA_STORE
from roofline import CARDS, SHAPES, Step, steps, table

from vitrail_kernels.compile import (
    SHARED_LIMIT,
    KernelCode,
    compile_all,
    compile_call,
    identity,
    order_of_sums,
)
from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.device.overlap import wait_for_previous
from vitrail_kernels.launch import Call, Grid, Target, jit, tl
from vitrail_kernels.ops.attention import attention_calls
from vitrail_kernels.ops.linear import linear_calls

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted: nothing is compiled"
)

MMA = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
PRODUCTS = {"patch_embed", "linear", "attention", "pool"}
FULL, OTHERS = (80, 90), (86, 89, 100, 120)
QUICK = (("ViT-B/16", 80), ("ViT-B/16", 90), ("CLIP-B text", 90))
"""The models and architectures that `make test` compiles; the others are slow."""
SLOWER_80 = (pytest.param(80, marks=pytest.mark.slow), 90)
# the ptxas of triton 3.6 keeps one value of 8 bytes in local memory in some kernels, however few
# registers they take
STACK = 8 if triton.__version__.startswith("3.6.") else 0
HALF, BRAIN = torch.float16, torch.bfloat16


def target(arch: int) -> Target:
    return Target(arch, CARDS[arch].sms)


WAIT, NEXT = "griddepcontrol.wait;", "griddepcontrol.launch_dependents;"
TOUCHES = re.compile(
    r"\b(?:(?:ld|st)\.(?:\w+\.)*global|cp\.async|atom|red|mbarrier|ret|bra)\b[\w.:]*"
)
"""What no block may do before the kernel before it has ended."""


def check_overlap(code: KernelCode) -> None:
    """The wait stands before all that touches memory, branches or returns; the signal after it."""
    ptx = re.sub(r"//.*", "", code.ptx).partition(".entry")[2]
    location = f"sm_{code.arch} {code.name}"
    if code.arch < 90:
        assert "griddepcontrol" not in ptx, f"{location}: no such instruction there"
        return
    assert (ptx.count(WAIT), ptx.count(NEXT)) == (1, 1), f"{location}: {ptx.count(WAIT)} waits"
    before, _, after = ptx.partition(WAIT)
    assert TOUCHES.findall(before) == [], f"{location}: before the wait"
    between, _, rest = after.partition(NEXT)
    assert TOUCHES.findall(between) == [], f"{location}: between wait and signal"
    # a block of the next kernel takes tensor memory before it waits, and keeps it: all blocks of
    # this one must have theirs, or both would wait for ever
    assert "tcgen05.alloc" not in rest, f"{location}: tensor memory is taken after the signal"


LOOSE = re.compile(r"\b(?:mul|add|sub)(?:\.ftz|\.sat)*\.(?:f|bf)(?:16|32)(?:x2)?\b")
"""A product or a sum without .rn: ptxas may join the two, in one tile and not in another."""


def check_contraction(code: KernelCode) -> None:
    """Only kernels say where a product and a sum are one instruction."""
    location = f"sm_{code.arch} {code.name}"
    assert LOOSE.findall(code.ptx) == [], f"{location}: {Counter(LOOSE.findall(code.ptx))}"


def check_groups(code: KernelCode) -> None:
    """ptxas starts and awaits groups of products as it was told.

    It may not: where it finds sums touched while a product is in flight, it waits for each product
    before it issues the next, and says so to nobody (C7510 and others are notes of its log).
    """
    told = code.ptx.count("wgmma.commit_group") + code.ptx.count("wgmma.wait_group")
    done = code.instructions["WARPGROUP"]
    assert done == told, f"sm_{code.arch} {code.name}: got {done} starts and waits, wanted {told}"


def check(launch: Step, call: Call, code: KernelCode) -> None:
    """What must hold of every kernel of a model."""
    location = f"sm_{code.arch} {launch.label} {code.name} {call.config}"
    check_overlap(code)
    check_contraction(code)
    assert code.stack <= STACK, f"{location}: {code.stack} bytes of stack"
    assert code.spills == 0 or 0 < code.stack <= STACK, f"{location}: {code.spills} spills"
    assert code.shared <= SHARED_LIMIT[code.arch], f"{location}: {code.shared} bytes shared"
    assert code.blocks >= call.config.ctas, f"{location}: {code.blocks} blocks fit"
    assert not any(name.startswith(("DFMA", "DADD", "DMUL")) for name in code.instructions), (
        location
    )
    if launch.op not in PRODUCTS or code.name == "_pool_status_kernel":
        return
    assert code.instructions[MMA[code.arch]] > 0, f"{location}: {code.tensor_core}"
    assert set(code.tensor_core) == {MMA[code.arch]}, f"{location}: {code.tensor_core}"
    check_groups(code)
    if launch.op in ("linear", "attention"):
        maps = code.instructions[TMA_LOAD]
        gathered = {"rows", "residual_rows"} & launch.tensors.keys()
        if code.arch >= 90 and not gathered:
            assert maps > 0, f"{location}: no tensor maps"
            # beside a residual a result leaves in the layout in which that came
            stores = launch.op == "linear" and "residual" not in launch.tensors
            assert (code.instructions[TMA_STORE] > 0) == stores, f"{location}: tensor map out"
        else:
            assert code.instructions[ASYNC_COPY] > 0, f"{location}: no cp.async"


def compiled(
    name: str, arch: int, dtype: torch.dtype, batch: int | None = None
) -> Iterator[tuple[Step, Call, KernelCode]]:
    every = [
        (launch, call)
        for launch in steps(SHAPES[name], dtype, batch)
        for call in launch.calls(target(arch))
    ]
    codes = compile_all([call for _, call in every], arch)
    for (launch, call), code in zip(every, codes, strict=True):
        yield launch, call, code


MODELS = [
    pytest.param(name, arch, marks=[] if (name, arch) in QUICK else pytest.mark.slow)
    for name in SHAPES
    for arch in FULL
]


@pytest.mark.parametrize(("name", "arch"), MODELS)
def test_every_kernel_of_a_model(name: str, arch: int) -> None:
    for launch, call, code in compiled(name, arch, HALF):
        check(launch, call, code)


@pytest.mark.slow
@pytest.mark.parametrize("arch", FULL)
def test_a_batch_of_one_and_bf16(arch: int) -> None:
    for launch, call, code in compiled("ViT-B/16", arch, BRAIN, 1):
        check(launch, call, code)


def test_the_other_architectures_in_rotation() -> None:
    """Half of the kernels, each on one architecture; every architecture has kernels."""
    every = list(steps(SHAPES["ViT-B/16"], HALF))
    for place, arch in enumerate(OTHERS):
        some = [
            (launch, call)
            for number, launch in enumerate(every)
            if number % (2 * len(OTHERS)) == place
            for call in launch.calls(target(arch))
        ]
        assert some, f"sm_{arch}: no kernel"
        codes = compile_all([call for _, call in some], arch)
        for (launch, call), code in zip(some, codes, strict=True):
            check(launch, call, code)


@pytest.mark.slow
@pytest.mark.parametrize("arch", OTHERS)
@pytest.mark.parametrize("name", ["ViT-B/16", "CLIP L/14", "DINOv2-g"])
def test_the_other_architectures_in_full(name: str, arch: int) -> None:
    for launch, call, code in compiled(name, arch, HALF):
        check(launch, call, code)


# -- one order of sums -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "arch"),
    [
        (HALF, 80),
        (BRAIN, 90),
        pytest.param(BRAIN, 80, marks=pytest.mark.slow),
        pytest.param(HALF, 90, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_all_tiles_of_linear_add_in_one_order(arch: int, dtype: torch.dtype) -> None:
    """On a GPU the bits of a row then depend on neither the tile nor the batch."""
    result = []
    tiles = set()
    for batch in (1, 8, 256):
        for launch in steps(SHAPES["ViT-B/16"], dtype, batch):
            if launch.label == "down":
                (call,) = launch.calls(target(arch))
                tiles.add((call.config.block_m, call.config.block_n))
                result.append(order_of_sums(compile_call(call, arch)))
    assert len(tiles) >= 3, f"only {tiles} were compared"
    for order in result:
        kinds = {kind for kind, *_ in order}
        assert kinds == {"product", "reduction"}, f"no statistics in the code: {order}"
        assert order == result[0]


def test_a_tile_of_another_family_is_told_apart() -> None:
    """The check above can fail: 16 rows are another instruction on sm_90."""
    (launch,) = (one for one in steps(SHAPES["ViT-B/16"], HALF, 1) if one.label == "down")
    (call,) = launch.calls(target(90))
    small = KernelConfig(16, 64, 64, 4, 3)
    arguments = dict(call.arguments, BLOCK_M=16)
    old = arguments["x_map"]
    arguments["x_map"] = type(old)(old.base, old.shape, old.strides, [16, old.block_shape[1]])
    other = Call(call.kernel, call.grid, arguments, small)
    assert order_of_sums(compile_call(call, 90)) != order_of_sums(compile_call(other, 90))


# -- what may change without compiling again -------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_no_size_that_changes_between_calls_recompiles(name: str) -> None:
    """Batches of 3, 5, 16 and 17 of one tile are one piece of machine code an operator."""
    for arch in FULL:
        kinds: dict[str, set[tuple[object, ...]]] = {}
        for batch in (3, 5, 16, 17):
            for launch in steps(SHAPES[name], HALF, 8 * batch):
                for call in launch.calls(target(arch)):
                    tile = str(call.config)
                    key = f"{launch.label} {call.kernel.__name__} {tile}"
                    kinds.setdefault(key, set()).add(identity(call))
        assert {key: len(ids) for key, ids in kinds.items()} == dict.fromkeys(kinds, 1)


def test_tensor_maps_are_used_where_they_can_be() -> None:
    def kernel(arch: int, m: int, n: int, k: int, **rows: torch.Tensor) -> str:
        x, w, out = (torch.empty(*s, dtype=HALF, device="meta") for s in ((m, k), (n, k), (m, n)))
        (call,) = linear_calls(target(arch), out, x, w, **rows)
        return str(call.kernel.__name__)

    assert kernel(90, 33, 768, 768) == kernel(120, 1, 8, 8) == "_linear_tma_kernel"
    assert kernel(80, 33, 768, 768) == kernel(89, 33, 768, 768) == "_linear_pointer_kernel"
    assert kernel(90, 33, 3, 768) == kernel(90, 33, 768, 36) == "_linear_pointer_kernel"
    rows = torch.empty(33, dtype=torch.int32, device="meta")
    assert kernel(90, 33, 768, 768, rows=rows) == "_linear_pointer_kernel"


def test_rows_of_any_alignment_are_one_kernel() -> None:
    half = {"dtype": HALF, "device": "meta"}
    codes = set()
    for m in (1, 16, 17, 1600):
        x, out = torch.empty(m, 768, **half), torch.empty(m, 768, **half)
        rows = torch.empty(m, dtype=torch.int32, device="meta")
        weight = torch.empty(768, 768, **half)
        for arguments in ({}, {"rows": rows}):
            (call,) = linear_calls(Target(90, 1), out, x, weight, **arguments)
            codes.add((*identity(call)[:2], len(arguments), identity(call)))
    per_tile = Counter(code[:3] for code in codes)
    assert set(per_tile.values()) == {1}, per_tile


# -- the tools themselves --------------------------------------------------------------------------


@jit()
def _spilling_kernel(x_ptr: tl.tensor, BLOCK: tl.constexpr) -> None:
    """A row of sums of everything: more live values than a thread has registers."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
    y = tl.dot(x, tl.trans(x))
    z = tl.dot(x, x)
    tl.store(
        x_ptr + tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :],
        (tl.cumsum(y, 0) + tl.cumsum(z, 1)).to(HALF_TYPE),
    )


HALF_TYPE = tl.constexpr(tl.float16)


def test_a_kernel_that_spills_is_seen() -> None:
    x = torch.empty(128, 128, dtype=HALF, device="meta")
    config = KernelConfig(128, 128, 0, 4, 1, registers=64)
    code = compile_call(Call(_spilling_kernel, Grid(1), {"x_ptr": x, "BLOCK": 128}, config), 80)
    assert code.spills > 0
    assert code.stack > 0


def test_products_that_wait_for_one_another_are_seen() -> None:
    """Heads of 128 columns in 128 rows lack registers, and ptxas gives their overlap up."""
    half = {"dtype": HALF, "device": "meta"}
    sequences = torch.empty(33, dtype=torch.int32, device="meta")
    out, qkv = torch.empty(32 * 197, 1024, **half), torch.empty(32 * 197, 3072, **half)
    for config in (KernelConfig(64, 64, 0, 4, 2), KernelConfig(128, 64, 0, 8, 2, registers=128)):
        (call,) = attention_calls(
            target(90), out, qkv, sequences, heads=8, causal=False, max_seqlen=197, config=config
        )
        code = compile_call(call, 90)
        if config.block_m == 64:
            check_groups(code)
        else:
            with pytest.raises(AssertionError, match="starts and waits"):
                check_groups(code)


@jit()
def _hasty_kernel(x_ptr: tl.tensor, PDL: tl.constexpr, WRONG: tl.constexpr) -> None:
    """Does before the wait what WRONG says."""
    x = 1.0
    if WRONG == "loads":
        x = tl.load(x_ptr)
    if WRONG == "stores":
        tl.store(x_ptr + 1, x)
    if WRONG == "adds":
        tl.atomic_add(x_ptr + 1, x)
    if WRONG == "returns":
        block = tl.program_id(0)
        if block > 3:
            return
    wait_for_previous(PDL)
    if WRONG == "waits twice":
        wait_for_previous(PDL)
    tl.store(x_ptr, x)


@pytest.mark.parametrize("wrong", ["nothing", "loads", "stores", "adds", "returns", "waits twice"])
def test_what_is_done_before_the_wait_is_seen(wrong: str) -> None:
    x = torch.empty(2, dtype=torch.float32, device="meta")
    arguments = {"x_ptr": x, "PDL": True, "WRONG": wrong}
    code = compile_call(Call(_hasty_kernel, Grid(1), arguments, KernelConfig(0, 0, 0, 1, 1)), 90)
    if wrong == "nothing":
        check_overlap(code)
        with pytest.raises(AssertionError, match="no such instruction"):
            check_overlap(dataclasses.replace(code, arch=80))
    else:
        with pytest.raises(AssertionError, match=r"before the wait|2 waits"):
            check_overlap(code)


def test_the_report_says_what_was_compiled_and_what_is_an_estimate() -> None:
    lines = list(table("CLIP-B text", 90, HALF))
    labels = [launch.label for launch in steps(SHAPES["CLIP-B text"], HALF)]
    assert all(any(line.startswith(label) for line in lines) for label in labels)
    assert "HGMMA" in "".join(lines)
    assert lines[-1].startswith("estimate: ")
    assert lines[-1].endswith("not a measurement")


def test_the_report_counts_what_a_plan_counts() -> None:
    from vitrail.plan.vision import vision_pooled
    from vitrail.spec import BlockSpec, VisionSpec

    blocks = BlockSpec(768, 12, 12, 3072, "gelu", 1e-12)
    plan = vision_pooled(VisionSpec(blocks, (224, 224), (16, 16)), uint8=True)
    every = list(steps(SHAPES["ViT-B/16"], HALF, 2))
    # this ViT is not projected
    counted = sum(one.times * one.cost().flops for one in every if one.op != "pool")
    assert counted == plan.flops([197, 197])
    assert sum(launch.times for launch in every) == len(plan.steps)


@pytest.mark.parametrize("arch", SLOWER_80)
def test_heads_and_poolers(arch: int) -> None:
    """What only dense plans launch: scores in fp32, tanh, masks, LayerNorm by itself; and what is
    launched outside of plans."""

    def empty(*shape: int, kind: torch.dtype = HALF) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    def wide(*shape: int) -> torch.Tensor:
        return empty(*shape, kind=torch.float32)

    def whole(*shape: int) -> torch.Tensor:
        return empty(*shape, kind=torch.int32)

    x, stats = empty(6304, 768), wide(24, 6304)
    head = {"weight": empty(1000, 768), "bias": wide(1000), "row_sums": wide(1000)}
    vectors = {"gamma": wide(768), "beta": wide(768)}
    sequences = {"cu_seqlens": whole(33), "kv_lens": whole(32)}
    resized = {
        "out": empty(2, 224, 224, 3, kind=torch.uint8),
        "middle": empty(16 * 30, 672, kind=torch.uint8),
        "pixels": empty(1 << 20, kind=torch.uint8),
        "images": empty(2, 8, kind=torch.int64),
        "groups": whole(30),
        "taps": whole(5000),
    }
    cases: list[tuple[str, dict[str, torch.Tensor], dict[str, object]]] = [
        ("linear", {"out": wide(6304, 1000), "x": x, "x_stats": stats} | head, {"norm_eps": 1e-6}),
        (
            "linear",
            {"out": wide(32, 1000), "x": x, "x_stats": stats, "rows": whole(32)} | head,
            {"norm_eps": 1e-6},
        ),
        (
            "linear",
            {"out": empty(32, 768), "x": empty(32, 768), "weight": empty(768, 768)},
            {"activation": "tanh"},
        ),
        (
            "attention",
            {"out": empty(2464, 512), "qkv": empty(2464, 1536)} | sequences,
            {"heads": 8, "causal": True, "max_seqlen": 77},
        ),
        ("layernorm", {"out": x, "x": x, "stats": stats} | vectors, {"eps": 1e-6}),
        ("layernorm", {"out": empty(32, 768), "x": x, "rows": whole(32)} | vectors, {"eps": 1e-6}),
        ("pool", {"out": wide(32, 768), "status": whole(32), "x": x[:32]} | vectors, {"eps": 1e-6}),
        ("class_mean", {"out": empty(32, 1536), "x": x}, {"tokens": 197, "prefix": 1}),
        (
            "position",
            {"out": wide(257, 768), "table": wide(1370, 768), "prefix": wide(1, 768)},
            {"table_grid": (37, 37), "grid": (16, 16), "antialias": True},
        ),
        ("resize", resized, {}),
    ]
    for op, tensors, scalars in cases:
        launch = Step(op, op, tensors, scalars, 1, ())
        for call in launch.calls(target(arch)):
            code = compile_call(call, arch)
            assert (code.stack, code.spills) == (0, 0), f"{op} {call.config}: {code.stack} bytes"
            assert code.shared <= SHARED_LIMIT[arch]
            check_overlap(code)
            check_contraction(code)
