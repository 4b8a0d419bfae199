"""Plans as values: their steps, their costs, and the slots of their buffers."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vitrail.plan.plan import Plan
from vitrail.plan.text import text_dense, text_pooled
from vitrail.plan.vision import vision_dense, vision_layers, vision_pooled, vision_scores
from vitrail.spec import BlockSpec, Features, HeadSpec, ModelSpec, PoolerSpec, TextSpec, VisionSpec
from vitrail.weights.layout import packed_layout, text_layout, vision_layout

VIT_B16 = VisionSpec(BlockSpec(768, 12, 12, 3072, "gelu", 1e-12), (224, 224), (16, 16))
CLIP_L14 = VisionSpec(
    BlockSpec(1024, 24, 16, 4096, "quick_gelu", 1e-5),
    (224, 224),
    (14, 14),
    patch_bias=False,
    pre_norm=True,
    norm="pooled",
    projection=768,
)
DINOV2_B = VisionSpec(
    BlockSpec(768, 12, 12, 3072, "gelu", 1e-6, layer_scale=True), (518, 518), (14, 14), registers=4
)
CLIP_B32_TEXT = TextSpec(
    BlockSpec(512, 12, 8, 2048, "quick_gelu", 1e-5, causal=True), 49408, 77, 49407, 512
)
BUILDERS: tuple[Callable[..., Plan], ...] = (
    vision_pooled,
    vision_dense,
    vision_layers,
    text_pooled,
    text_dense,
)
WRITTEN = {"out", "out_scale", "status", "stats"}
"""The arguments that an operator writes; it reads all others."""


# -- specs and plans drawn at random ---------------------------------------------------------------


def blocks(causal: bool) -> st.SearchStrategy[BlockSpec]:
    def build(heads: int, head_dim: int, int8: set[int], **rest: Any) -> BlockSpec:
        spec = BlockSpec(width=heads * head_dim, heads=heads, eps=1e-6, causal=causal, **rest)
        chosen = {name for i, name in enumerate(spec.int8_candidates) if i in int8}
        alone = {name for name in chosen if name.replace("down", "up") not in chosen}
        names = tuple(name for name in spec.int8_candidates if name in chosen - alone)
        return dataclasses.replace(spec, int8=names)

    return st.builds(
        build,
        int8=st.sets(st.integers(0, 12)),
        heads=st.integers(1, 4),
        head_dim=st.integers(1, 24),
        layers=st.integers(1, 5),
        mlp=st.integers(1, 90),
        activation=st.sampled_from(["gelu", "quick_gelu", "silu"]),
        gated=st.booleans(),
        qkv_bias=st.booleans(),
        layer_scale=st.booleans(),
    )


@st.composite
def vision_specs(draw: st.DrawFn) -> VisionSpec:
    patch = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    grid = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    pooled = draw(st.booleans())
    return VisionSpec(
        draw(blocks(causal=False)),
        (grid[0] * patch[0] + draw(st.integers(0, patch[0] - 1)), grid[1] * patch[1]),
        patch,
        channels=draw(st.integers(1, 4)),
        registers=draw(st.integers(0, 4)),
        pre_norm=draw(st.booleans()),
        norm="pooled" if pooled else "tokens",
        projection=draw(st.none() | st.integers(1, 40)) if pooled else None,
        pooler=None if pooled else draw(st.none() | st.just(PoolerSpec(13, "tanh"))),
    )


def text_specs() -> st.SearchStrategy[TextSpec]:
    projection = st.none() | st.integers(1, 40)
    return st.builds(TextSpec, blocks(causal=True), st.just(50), st.just(16), st.none(), projection)


KINDS = (
    "vision_pooled",
    "vision_scores",
    "vision_dense",
    "vision_layers",
    "text_pooled",
    "text_dense",
)


def subsets(numbers: range, min_size: int = 0) -> st.SearchStrategy[tuple[int, ...]]:
    """Any subset of ``numbers``; each number is in it with probability 1/2."""
    flags = st.tuples(*(st.booleans() for _ in numbers))
    chosen = flags.map(lambda f: tuple(n for n, kept in zip(numbers, f, strict=True) if kept))
    return chosen.filter(lambda taps: len(taps) >= min_size)


@st.composite
def any_plan(draw: st.DrawFn) -> Plan:
    """A plan of any kind, with any taps."""
    plan_name = draw(st.sampled_from(KINDS))
    if plan_name.startswith("text"):
        text = draw(text_specs())
        if plan_name == "text_pooled":
            return text_pooled(text)
        taps = draw(subsets(range(text.blocks.layers + 1)))
        return text_dense(text, taps=taps, masked=draw(st.booleans()))
    spec, uint8 = draw(vision_specs()), draw(st.booleans())
    if plan_name == "vision_layers":
        taps = draw(subsets(range(spec.blocks.layers), min_size=1))
        return vision_layers(spec, taps, draw(st.booleans()), uint8)
    head = None
    if spec.norm == "tokens":
        features = st.sampled_from(get_args(Features))
        head = draw(st.none() | st.builds(HeadSpec, st.just(("a", "b", "c")), features))
    if plan_name == "vision_scores" and head is not None:
        return vision_scores(spec, head, uint8=uint8)
    if plan_name in ("vision_scores", "vision_pooled"):
        return vision_pooled(spec, uint8=uint8)
    taps = draw(subsets(range(spec.blocks.layers + 1)))
    return vision_dense(spec, head, uint8=uint8, taps=taps)


drawn = settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])


def lifetimes(plan: Plan) -> dict[str, tuple[int, int]]:
    """Buffer -> first and last step that names it."""
    uses: dict[str, tuple[int, int]] = {}
    for number, step in enumerate(plan.steps):
        for _, name in step.buffers:
            uses[name] = uses.get(name, (number, number))[0], number
    return uses


def accesses(plan: Plan) -> Iterator[tuple[int, set[str], set[str]]]:
    """(step, buffers it reads, buffers it writes)."""
    for number, step in enumerate(plan.steps):
        written = {name for arg, name in step.buffers if arg in WRITTEN}
        yield number, {name for arg, name in step.buffers if arg not in WRITTEN}, written


@drawn
@given(any_plan())
def test_buffers_alive_at_the_same_time_never_share_a_slot(plan: Plan) -> None:
    slot = {b.name: b.slot for b in plan.buffers if b.slot is not None}
    alive = lifetimes(plan)
    for number in range(len(plan.steps)):
        live_slots = [slot[n] for n in slot if alive[n][0] <= number <= alive[n][1]]
        assert len(live_slots) == len(set(live_slots)), f"step {number}"


@drawn
@given(any_plan())
def test_every_buffer_is_written_before_it_is_read(plan: Plan) -> None:
    written = set(plan.inputs)
    for number, reads, writes in accesses(plan):
        assert reads <= written, f"step {number} reads {reads - written}"
        assert not writes & set(plan.inputs), f"step {number} writes an input"
        written |= writes
    assert set(plan.outputs) <= written


@drawn
@given(any_plan())
def test_nothing_is_written_that_nobody_reads(plan: Plan) -> None:
    read_later = set(plan.outputs)
    for number, reads, writes in reversed(list(accesses(plan))):
        assert writes <= read_later, f"step {number} writes {writes - read_later}"
        read_later |= reads


@drawn
@given(any_plan())
def test_inputs_and_outputs_have_no_slot_and_all_else_has_one(plan: Plan) -> None:
    outside = {*plan.inputs, *plan.outputs}
    for buffer in plan.buffers:
        assert (buffer.slot is None) == (buffer.name in outside), buffer
    slots = {b.slot for b in plan.buffers} - {None}
    assert slots == set(range(len(slots)))
    assert len({b.name for b in plan.buffers}) == len(plan.buffers)


@drawn
@given(any_plan(), st.integers(0, 70), st.integers(0, 300), st.sampled_from([2, 4]))
def test_every_slot_holds_its_largest_buffer(
    plan: Plan, batch: int, extra_tokens: int, item: int
) -> None:
    tokens = batch * 7 + extra_tokens
    sizes = plan.slot_bytes(batch, tokens, item)
    assert all(size % 256 == 0 for size in sizes)
    for buffer in plan.buffers:
        if buffer.slot is not None:
            width = {"compute": item, "int8": 1}.get(buffer.dtype, 4)
            need = math.prod(buffer.shape(batch, tokens)) * width
            assert need <= sizes[buffer.slot], buffer
    largest: dict[int, int] = {}
    for buffer in plan.buffers:
        if buffer.slot is not None:
            width = {"compute": item, "int8": 1}.get(buffer.dtype, 4)
            need = math.prod(buffer.shape(batch, tokens)) * width
            largest[buffer.slot] = max(need, largest.get(buffer.slot, 0))
    waste = [size - largest[slot] for slot, size in enumerate(sizes)]
    assert all(0 <= padding < 256 for padding in waste)
    assert plan.arena_bytes(batch, tokens, item) == sum(sizes)


@drawn
@given(any_plan(), st.integers(1, 40), st.integers(1, 60), st.integers(2, 9))
def test_arena_grows_with_its_calls_and_in_proportion(
    plan: Plan, batch: int, length: int, times: int
) -> None:
    tokens = batch * length
    once = plan.arena_bytes(batch, tokens)
    assert plan.arena_bytes(0, 0) == 0
    assert once <= plan.arena_bytes(batch + 1, tokens)
    assert once <= plan.arena_bytes(batch, tokens + 1)
    rounding = 256 * len(plan.slot_bytes(batch, tokens, 4))
    many = plan.arena_bytes(times * batch, times * tokens)
    assert abs(many - times * once) <= times * rounding


@drawn
@given(any_plan())
def test_buffers_are_affine_in_sequences_and_tokens(plan: Plan) -> None:
    for buffer in plan.buffers:
        rows = {
            (b, m, t): buffer.shape(b, m, t)[0] for b in (0, 1, 3) for m in (0, 7) for t in (0, 5)
        }
        zero = rows[0, 0, 0]
        for (b, m, t), count in rows.items():
            per_b, per_m, per_t = (
                rows[1, 0, 0] - zero,
                (rows[0, 7, 0] - zero) / 7,
                (rows[0, 0, 5] - zero) / 5,
            )
            assert count == zero + b * per_b + m * per_m + t * per_t


# -- steps of a plan -------------------------------------------------------------------------------


def block_steps(plan: Plan) -> dict[str, list[str]]:
    """Block -> operators of its steps, in order."""
    ops: dict[str, list[str]] = {}
    for step in plan.steps:
        block = re.match(r"\w+\.blocks\.\d+(?=\.)", step.label)
        if block:
            ops.setdefault(block[0], []).append(step.op)
    return ops


def without_int8(ops: list[str]) -> list[str]:
    """The steps that the block would have without int8."""
    for number, op in enumerate(ops):
        if op == "linear_int8":
            assert ops[number - 1] == "norm_quant"
        if op == "linear_int8_grouped":
            assert ops[number - 1] == "linear_int8"
    return ["linear" if op.startswith("linear") else op for op in ops if op != "norm_quant"]


FULL = ["linear", "attention", "linear", "linear", "linear"]
LAST = ["linear", "linear", "attention_one", "linear", "linear", "linear"]


@drawn
@given(any_plan())
def test_a_block_is_five_steps_and_a_pooled_last_one_six(plan: Plan) -> None:
    *full_blocks, last_block = map(without_int8, block_steps(plan).values())
    if not plan.name.endswith("scores"):  # whose last block has a test of its own
        assert last_block == (LAST if plan.name.endswith("pooled") else FULL)
    assert all(ops == FULL for ops in full_blocks)


@drawn
@given(vision_specs(), st.sampled_from(get_args(Features)), st.booleans())
def test_scores_need_the_class_token_of_the_last_block_or_all_of_it(
    spec: VisionSpec, features: Features, uint8: bool
) -> None:
    plan = vision_scores(spec, HeadSpec(("a", "b", "c"), features), uint8=uint8)
    *full_blocks, last_block = map(without_int8, block_steps(plan).values())
    assert last_block == (LAST if features == "class" else FULL)
    assert all(ops == FULL for ops in full_blocks)


def test_step_counts_of_published_models() -> None:
    """Patches, eleven full blocks, the last one, the pooling."""
    assert len(vision_pooled(VIT_B16, uint8=True).steps) == 1 + 11 * 5 + 6 + 1 == 63
    assert len(vision_pooled(CLIP_L14, uint8=True).steps) == 2 + 23 * 5 + 6 + 1
    assert len(text_pooled(CLIP_B32_TEXT).steps) == 1 + 11 * 5 + 6 + 1
    assert len(vision_dense(VIT_B16).steps) == 1 + 12 * 5 + 1
    assert len(text_dense(CLIP_B32_TEXT).steps) == 1 + 12 * 5 + 3


def test_an_int8_block_is_seven_steps() -> None:
    """In int8 qkv, up and down have codes; of the last block, keys and values alone."""
    blocks = dataclasses.replace(VIT_B16.blocks, int8=VIT_B16.blocks.int8_candidates)
    spec = dataclasses.replace(VIT_B16, blocks=blocks)
    quantized = ["norm_quant", "linear_int8"]
    full_block = [*quantized, "attention", "linear", *quantized, "linear_int8_grouped"]
    *full_blocks, last_block = block_steps(vision_pooled(spec, uint8=True)).values()
    assert full_blocks == [full_block] * 11
    assert last_block == [*quantized, *LAST[1:]]
    *full_blocks, last_block = block_steps(vision_dense(spec)).values()
    assert full_blocks == [full_block] * 11
    assert last_block == [*quantized, "attention", "linear", "linear", "linear"]


def test_int8_plans_write_statistics_for_16_bit_readers_alone() -> None:
    blocks = dataclasses.replace(VIT_B16.blocks, int8=VIT_B16.blocks.int8_candidates)
    plan = vision_pooled(dataclasses.replace(VIT_B16, blocks=blocks), uint8=True)
    writers = [step.label for step in plan.steps if "stats" in dict(step.buffers)]
    assert writers == ["vision.blocks.10.down", "vision.blocks.11.out"]


def test_the_residual_stream_is_updated_in_place() -> None:
    """No block of a pooled plan but the last needs a second stream."""
    plan = vision_pooled(VIT_B16, uint8=True)
    streams = {name for step in plan.steps for arg, name in step.buffers if arg == "out"}
    assert {name for name in streams if "blocks" not in name} == {
        "vision.stream",
        "vision.pooled",
        "vision.embedding",
    }


def test_the_pooled_plan_returns_nothing_but_the_embedding() -> None:
    assert vision_pooled(VIT_B16, uint8=True).outputs == (
        "vision.embedding",
        "vision.status",
    )


@pytest.mark.parametrize(("features", "last_steps"), [("class", 6), ("class_mean", 5 + 1 + 1)])
def test_the_plan_of_scores_returns_nothing_else(features: Any, last_steps: int) -> None:
    head = HeadSpec(("cat", "dog"), features)
    plan = vision_scores(VIT_B16, head, uint8=False)
    assert plan.outputs == ("vision.logits",)
    assert len(plan.steps) == 1 + 11 * 5 + last_steps + 1
    assert plan.steps[-1].label == "vision.head"
    dense = vision_dense(VIT_B16, head)
    assert plan.flops([197] * 3) < dense.flops([197] * 3) or features == "class_mean"


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("taps", [(0,), (3,), (0, 1, 2), (1, 4), (11,), tuple(range(12))], ids=str)
def test_nothing_after_the_last_tap_is_computed(taps: tuple[int, ...], norm: bool) -> None:
    plan = vision_layers(DINOV2_B, taps, norm)
    assert plan.outputs == tuple(f"vision.layer.{tap}" for tap in taps)
    assert list(block_steps(plan)) == [f"vision.blocks.{i}" for i in range(max(taps) + 1)]
    norms = [step for step in plan.steps if step.op == "layernorm"]
    assert len(norms) == (len(taps) if norm else 0)
    assert len(plan.steps) == 1 + 5 * (max(taps) + 1) + len(norms)
    assert plan.steps[-1].label == (
        f"vision.layer.{taps[-1]}" if norm else f"vision.blocks.{taps[-1]}.down"
    )


@drawn
@given(any_plan())
def test_a_tapped_stream_is_left_alone_once_its_block_is_done(plan: Plan) -> None:
    """``hidden.<i>`` is last written by block i - 1 or the embedding, ``layer.<i>`` by block i."""
    last_writer = {
        name: plan.steps[number].label for number, _, writes in accesses(plan) for name in writes
    }
    for name in plan.outputs:
        tower, output, *index = name.split(".")
        if output == "hidden":
            block = int(index[0]) - 1
            embeds = {f"{tower}.embed", f"{tower}.patch_embed", f"{tower}.pre_norm"}
            after = {f"{tower}.blocks.{block}.down"} if block >= 0 else embeds
            assert last_writer[name] in after
        elif output == "layer":
            assert last_writer[name] in {name, f"{tower}.blocks.{index[0]}.down"}


def test_taps_at_every_layer_cost_no_step() -> None:
    for dense in (
        lambda taps: vision_dense(CLIP_L14, taps=taps),
        lambda taps: vision_dense(DINOV2_B, taps=taps),
        lambda taps: text_dense(CLIP_B32_TEXT, taps=taps),
    ):
        bare, full = dense(()), dense(tuple(range(13)))
        assert len(full.steps) == len(bare.steps)
        assert [f"hidden.{i}" in name for i, name in enumerate(full.outputs[:13])] == [True] * 13


@drawn
@given(vision_specs(), text_specs())
def test_plans_use_every_packed_weight_and_no_other(vision: VisionSpec, text: TextSpec) -> None:
    """Except for the weights of the position table, which no step takes directly."""
    pooled, dense = (vision_pooled, vision_dense)
    plans = [pooled(vision, uint8=True), pooled(vision, uint8=False), dense(vision)]
    _uses_its_layout(plans, vision_layout(vision), {"vision.position", "vision.prefix"})
    _uses_its_layout([text_pooled(text), text_dense(text)], text_layout(text), set())


def _uses_its_layout(plans: list[Plan], layout: dict[str, Any], table: set[str]) -> None:
    used: set[str] = set()
    for plan in plans:
        named = {name for step in plan.steps for _, name in step.weights}
        assert named == {name for name, _ in plan.weights}
        assert all(layout[name] == packed for name, packed in plan.weights)
        used |= named
    unused = {name for name in set(layout) - used if not re.match(r"vision.patch.\w+.bias", name)}
    unneeded = {"vision.norm.weight", "vision.norm.bias", "text.norm.weight", "text.norm.bias"}
    assert unused - unneeded == table


@drawn
@given(any_plan())
def test_every_linear_fits_its_operands(plan: Plan) -> None:
    """Columns of input, weight, bias and output agree; so do rows of operands without an index."""
    columns = {b.name: b.columns for b in plan.buffers}
    rows = {b.name: b.rows for b in plan.buffers}
    shapes = {name: packed.shape for name, packed in plan.weights}
    for step in plan.steps:
        if step.op != "linear":
            continue
        operand, weight = dict(step.buffers), dict(step.weights)
        n, k = shapes[weight["weight"]]
        assert columns[operand["x"]] == k, step.label
        assert columns[operand["out"]] == n // (2 if dict(step.scalars).get("gated") else 1)
        assert all(shapes[weight[arg]] == (n,) for arg in ("bias", "scale") if arg in weight)
        assert rows[operand["out"]] == rows[operand.get("rows", operand["x"])], step.label
        if "residual" in operand:
            index = operand.get("residual_rows", operand["residual"])
            assert rows[index] == rows[operand["out"]]
            assert columns[operand["residual"]] == n


# -- values ----------------------------------------------------------------------------------------


CALLS: dict[str, Callable[[Any, Any], Plan]] = {
    "pooled uint8": lambda v, t: vision_pooled(v, uint8=True),
    "pooled float": lambda v, t: vision_pooled(v, uint8=False),
    "dense": lambda v, t: vision_dense(v, HeadSpec(("a",), "class"), taps=(0, 12)),
    "layers": lambda v, t: vision_layers(v, (2, 5), True),
    "text": lambda v, t: text_pooled(t),
    "text dense": lambda v, t: text_dense(t, taps=(1,), masked=True),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_equal_specs_give_equal_plans(call: Callable[[Any, Any], Plan]) -> None:
    plan = call(VIT_B16, CLIP_B32_TEXT)
    for builder in BUILDERS:
        builder.cache_clear()  # type: ignore[attr-defined]
    equal_plan = call(copy.deepcopy(VIT_B16), copy.deepcopy(CLIP_B32_TEXT))
    assert equal_plan is not plan
    assert equal_plan == plan
    assert hash(equal_plan) == hash(plan)
    assert equal_plan.dump([197]) == plan.dump([197])
    other_plan = call(
        dataclasses.replace(VIT_B16, blocks=dataclasses.replace(VIT_B16.blocks, eps=1e-5)),
        dataclasses.replace(CLIP_B32_TEXT, projection=None),
    )
    assert other_plan != plan


def test_a_plan_is_built_once() -> None:
    assert vision_pooled(VIT_B16, uint8=True) is vision_pooled(copy.deepcopy(VIT_B16), uint8=True)


# -- costs -----------------------------------------------------------------------------------------


def block_flops(spec: BlockSpec, lengths: list[int]) -> int:
    """One full block by hand: four products over the tokens, two over the pairs of tokens."""
    c, f = spec.width, spec.mlp * (3 if spec.gated else 2)
    pairs = sum(n * (n + 1) // 2 if spec.causal else n * n for n in lengths)
    return 2 * sum(lengths) * (4 * c * c + f * c) + 4 * c * pairs


def last_block_flops(spec: BlockSpec, lengths: list[int]) -> int:
    """Keys and values of every token, everything else of one token for each sequence."""
    c, f, b = spec.width, spec.mlp * (3 if spec.gated else 2), len(lengths)
    return 2 * sum(lengths) * 2 * c * c + 2 * b * (2 * c * c + f * c) + 4 * c * sum(lengths)


@drawn
@given(vision_specs(), text_specs(), st.lists(st.integers(1, 16), min_size=1, max_size=5))
def test_flops_are_those_of_the_products_by_hand(
    vision: VisionSpec, text: TextSpec, lengths: list[int]
) -> None:
    # int8 pads the hidden layer, whose products then count
    vision = dataclasses.replace(vision, blocks=dataclasses.replace(vision.blocks, int8=()))
    tokens = vision.tokens_at(vision.image)
    full, n = [tokens] * len(lengths), len(lengths)
    embed = 2 * n * (tokens - vision.prefix) * vision.patch_values * vision.blocks.width
    end = 2 * n * vision.blocks.width * (vision.projection or 0)
    full_blocks = (vision.blocks.layers - 1) * block_flops(vision.blocks, full)
    pooled = vision_pooled(vision, uint8=True)
    assert pooled.flops(full) == embed + full_blocks + last_block_flops(vision.blocks, full) + end
    pooler = 2 * n * vision.blocks.width * (vision.pooler.width if vision.pooler else 0)
    dense = vision_dense(vision)
    assert (
        dense.flops(full) == embed + full_blocks + block_flops(vision.blocks, full) + end + pooler
    )
    end = 2 * n * text.blocks.width * (text.projection or 0)
    full_blocks = (text.blocks.layers - 1) * block_flops(text.blocks, lengths)
    packed = text_pooled(text).flops(lengths)
    assert packed == full_blocks + last_block_flops(text.blocks, lengths) + end


def test_work_that_need_not_be_done_is_not() -> None:
    """Nine tokens of a caption against 77, and one pooled token against all of them."""
    dense = text_dense(CLIP_B32_TEXT).flops([77])
    assert text_pooled(CLIP_B32_TEXT).flops([9]) <= 0.115 * dense
    for spec, share in ((VIT_B16, 0.932), (CLIP_L14, 0.966)):
        tokens = [spec.tokens_at(spec.image)]
        pooled = vision_pooled(spec, uint8=True).flops(tokens)
        assert pooled <= share * vision_dense(spec, uint8=True).flops(tokens)


def test_the_cost_of_a_batch_is_the_sum_of_its_items() -> None:
    for plan, lengths in (
        (text_pooled(CLIP_B32_TEXT), [9, 5, 77, 1]),
        (vision_pooled(VIT_B16, uint8=True), [197] * 3),
        (vision_dense(CLIP_L14, taps=(3,)), [257] * 2),
    ):
        assert plan.flops(lengths) == sum(plan.flops([n]) for n in lengths)
        assert plan.flops([]) == 0


COUNTED = {
    "ViTModel": (VIT_B16, transformers.ViTModel, transformers.ViTConfig, {}),
    "CLIPVisionModelWithProjection": (
        CLIP_L14,
        transformers.CLIPVisionModelWithProjection,
        transformers.CLIPVisionConfig,
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "patch_size": 14,
            "projection_dim": 768,
        },
    ),
    "Dinov2WithRegistersModel": (
        DINOV2_B,
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig,
        {"image_size": 518, "patch_size": 14, "num_register_tokens": 4},
    ),
}


def counted(make: Any, config: Any, **inputs: torch.Tensor) -> int:
    """FLOPs that PyTorch counts in a forward of a transformers model that has no weights."""
    with torch.device("meta"):
        model = make._from_config(config, attn_implementation="eager").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**{name: t.to("meta") for name, t in inputs.items()})
    return counter.get_total_flops()


@pytest.mark.parametrize("name", COUNTED)
def test_dense_flops_are_those_of_transformers(name: str) -> None:
    spec, make, config, values = COUNTED[name]
    if name == "ViTModel":
        spec = dataclasses.replace(spec, pooler=PoolerSpec(768, "tanh"))
    theirs = counted(make, config(**values), pixel_values=torch.empty(2, 3, *spec.image))
    ours = vision_dense(spec).flops([spec.tokens_at(spec.image)] * 2)
    assert ours == pytest.approx(theirs, rel=0.01)


def test_dense_text_flops_are_those_of_transformers_without_the_masked_half() -> None:
    spec = CLIP_B32_TEXT.blocks
    config = transformers.CLIPTextConfig(eos_token_id=49407)
    theirs = counted(
        transformers.CLIPTextModelWithProjection,
        config,
        input_ids=torch.zeros(2, 77, dtype=torch.long),
    )
    masked = 2 * spec.layers * 4 * spec.width * (77 * 76 // 2)
    ours = text_dense(CLIP_B32_TEXT).flops([77, 77])
    assert ours + masked == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_dump_has_a_line_for_every_step_and_totals(
    call: Callable[[Any, Any], Plan], compute: str
) -> None:
    plan, lengths = call(VIT_B16, CLIP_B32_TEXT), [77, 77]
    head, *lines, total = plan.dump(lengths, compute).splitlines()
    assert head == f"{plan.name}: 2 sequences, 154 tokens, {compute}"
    assert len(lines) == len(plan.steps)
    costs = plan.count(lengths, compute)
    for number, (line, step, cost) in enumerate(zip(lines, plan.steps, costs, strict=True)):
        words = line.split()
        assert int(words[0]) == number
        assert float(words[1]) == pytest.approx(cost.flops / 1e6, abs=1e-3)
        assert float(words[3]) == pytest.approx(cost.bytes / 1e6, abs=1e-3)
        assert words[5:7] == [step.op, step.label]
        assert len(words[7:]) == len(step.buffers) + len(step.weights)
    flops, traffic, steps = (float(total.split()[i]) for i in (1, 3, 5))
    assert flops == pytest.approx(plan.flops(lengths) / 1e6, abs=1e-3)
    assert traffic == pytest.approx(sum(cost.bytes for cost in costs) / 1e6, abs=1e-3)
    assert steps == len(plan.steps)


def test_dump_shows_the_shapes_of_a_step() -> None:
    lines = vision_pooled(VIT_B16, uint8=True).dump([197, 197]).splitlines()
    assert "vision.patch_embed" in lines[1]
    assert "out(394,768) pixels(392,768) table(197,768) stats(24,394) weight(768,768)" in lines[1]
    assert "out(2,768) q(2,768) kv(394,1536) cu_seqlens(3,)" in lines[-6]


def test_half_precision_halves_what_a_linear_moves() -> None:
    plan = vision_pooled(VIT_B16, uint8=True)
    single, half = plan.count([197], "float32")[1], plan.count([197], "float16")[1]
    vectors = 4 * (2 * 2304 + 24 * 197)  # bias, row sums and row statistics stay fp32
    assert 2 * (half.bytes - vectors) == single.bytes - vectors
    assert half.flops == single.flops


def test_the_whole_layout_is_the_towers_one_after_the_other() -> None:
    text = dataclasses.replace(CLIP_B32_TEXT, projection=768)
    spec = ModelSpec("clip", "CLIPModel", CLIP_L14, text)
    layout = packed_layout(spec)
    assert list(layout) == [*vision_layout(CLIP_L14), *text_layout(text)]
