"""Token ids in one array against lists, and how many plan calls captions and labels take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vitrail
from vitrail.demo import demo
from vitrail.errors import InputError
from vitrail.model.batches import one_behind
from vitrail.model.texts import CPU_TEXT_BYTES
from vitrail.plan.plan import Plan
from vitrail.plan.text import text_pooled
from vitrail.runtime.budget import MemoryBudget
from vitrail.runtime.memory import PositionTables
from vitrail.runtime.native import MAX_SIZES
from vitrail.runtime.towers import TextTower
from vitrail.spec import BlockSpec, TextSpec
from vitrail.text.tokens import TokenIds

ROWS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), max_size=8)

# -- arrays against lists --------------------------------------------------------------------------


@given(ROWS)
def test_the_array_holds_the_lists(rows: list[list[int]]) -> None:
    tokens = TokenIds.of(rows)
    assert tokens.lists() == rows
    assert len(tokens) == len(rows)
    assert tokens.lengths.tolist() == [len(row) for row in rows]
    assert tokens.positions.tolist() == [place for row in rows for place in range(len(row))]
    assert tokens.highest.tolist() == [max(row) for row in rows]


@given(st.lists(ROWS, min_size=1, max_size=3))
def test_parts_are_joined_in_order(parts: list[list[list[int]]]) -> None:
    joined = TokenIds.join([TokenIds.of(part) for part in parts])
    assert joined.lists() == [row for part in parts for row in part]


@given(ROWS, st.data())
def test_texts_are_taken_in_any_order(rows: list[list[int]], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1)) if rows else st.just([]))
    taken = TokenIds.of(rows).take(np.array(chosen, dtype=np.int64))
    assert taken.lists() == [rows[text] for text in chosen]


@given(ROWS, st.none() | st.integers(0, 9))
def test_texts_end_at_their_first_end_token(rows: list[list[int]], eos: int | None) -> None:
    ends = [max(row) if eos is None else eos for row in rows]
    missing = [text for text, row in enumerate(rows) if ends[text] not in row]
    if missing:
        got = f"text {missing[0]}: got no end token .{eos}. among its {len(rows[missing[0]])} ids"
        with pytest.raises(InputError, match=got):
            TokenIds.of(rows).cut_at_end(eos)
        return
    cut = [row[: row.index(end) + 1] for row, end in zip(rows, ends, strict=True)]
    assert TokenIds.of(rows).cut_at_end(eos).lists() == cut


# -- plan calls ------------------------------------------------------------------------------------


class Counting:
    """In place of a runner: computes nothing, gives each text its first ids for an embedding."""

    device, dtype, name, identity = torch.device("cpu"), torch.float32, "counting", "counting"

    def __init__(self, width: int) -> None:
        self.width, self.calls = width, list[tuple[str, int, int, int]]()
        self.budget = MemoryBudget(PositionTables())

    def run(
        self, plan: Plan, inputs: Mapping[str, Tensor], *, batch: int, tokens: int, longest: int
    ) -> dict[str, Tensor]:
        self.calls.append((plan.name, batch, tokens, longest))
        out = torch.zeros(batch, self.width)
        if plan.name != "text.pooled":
            return {"vision.embedding": out + 1, "vision.status": torch.zeros(batch)}
        starts = inputs["cu_seqlens"].long()
        assert (len(starts), int(starts[-1])) == (batch + 1, tokens)
        assert torch.equal(inputs["token_rows"], inputs["cu_seqlens"][1:] - 1)
        for name in inputs:
            assert inputs[name].data_ptr() % 16 == 0, f"{name}: kernels would get a copy"
            assert inputs[name].dtype == torch.int32, name
        ids, lengths = inputs["ids"], starts.diff()
        assert int(lengths.max()) == longest
        places = torch.arange(tokens) - starts[:-1].repeat_interleave(lengths)
        assert torch.equal(inputs["positions"], places.int())
        out[:, 0], out[:, 1] = ids[starts[:-1]], ids[starts[1:] - 1]
        return {"text.embedding": out, "text.status": torch.zeros(batch, dtype=torch.int32)}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> vitrail.Model:
    """The bundled model over a `Counting` runner."""
    model = vitrail.load(demo.bundled(), device="cpu")
    assert model.spec.text is not None
    assert model._text is not None
    assert model._vision is not None
    counting: Any = Counting(model.spec.text.embedding)
    counting.position_table = model._vision.runner.position_table
    monkeypatch.setattr(model._text, "runner", counting)
    monkeypatch.setattr(model._vision, "runner", counting)
    return model


def calls(model: vitrail.Model) -> list[tuple[str, int, int, int]]:
    assert model._text is not None
    counting: Any = model._text.runner
    made = list(counting.calls)
    counting.calls.clear()
    return made


@pytest.mark.parametrize("batch_size", [None, 1000])
def test_100000_captions_take_a_plan_call_a_batch_and_keep_their_order(
    model: vitrail.Model, batch_size: int | None
) -> None:
    text = model.spec.text
    assert text is not None
    assert text.eos is not None
    count, dice = 100_000, np.random.default_rng(0)
    ids = dice.integers(1, text.eos, (count, text.context))
    lengths = dice.integers(4, 15, count)
    ids[np.arange(count), lengths - 1] = text.eos
    out = model.encode_text(ids, batch_size=batch_size)
    assert torch.equal(out[:, 0], torch.from_numpy(ids[:, 0]).float())
    assert (out[:, 1] == text.eos).all()
    made = calls(model)
    assert sum(batch for _, batch, _, _ in made) == count
    assert sum(tokens for _, _, tokens, _ in made) == lengths.sum()
    assert [longest for *_, longest in made] == sorted(longest for *_, longest in made)
    if batch_size is not None:
        assert {batch for _, batch, _, _ in made} == {batch_size}
        return
    plan, whole = text_pooled(text), 1
    while plan.arena_bytes(2 * whole, 2 * whole * text.context) <= CPU_TEXT_BYTES:
        whole *= 2
    arenas = [plan.arena_bytes(batch, tokens) for _, batch, tokens, _ in made]
    assert max(arenas) <= CPU_TEXT_BYTES
    # as few as the arena allows, and one more for each length, where a call ends early
    fewest = lengths.sum() / (whole * text.context)
    assert fewest <= len(made) <= fewest + len(set(lengths.tolist()))
    assert len(set(made)) < MAX_SIZES, "more sizes than the native runner keeps"


def test_1000_labels_take_one_plan_call_and_none_once_they_are_known(model: vitrail.Model) -> None:
    labels = [f"{color} {number}" for number in range(100) for color in "abcdefghij"]
    pixels = torch.zeros(3, 3, 56, 56)
    first = model.classify(pixels, labels)
    assert first.logits.shape == (3, 1000)
    assert [call[:2] for call in calls(model)] == [("text.pooled", 1000), ("vision.pooled", 3)]
    again = model.classify(pixels, labels)
    assert [call[:2] for call in calls(model)] == [("vision.pooled", 3)]
    assert torch.equal(first.logits, again.logits)


def test_a_call_searches_for_no_batch_size_again(
    model: vitrail.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search walks the plan dozens of times, which takes longer than a caption."""
    pixels = torch.zeros(1, 3, 56, 56)
    model.encode_text("a cat")
    model.encode_image(pixels)

    def searched(*_: object) -> int:
        raise AssertionError("the plan was walked again")

    monkeypatch.setattr(Plan, "slot_bytes", searched)
    model.encode_text("a dog")
    model.encode_image(pixels)


BLOCKS = BlockSpec(512, 12, 8, 2048, "quick_gelu", 1e-5, causal=True)
CLIP = TextSpec(BLOCKS, vocab=49408, context=77, eos=49407, projection=512)


@given(st.lists(st.integers(1, 77), max_size=300), st.none() | st.integers(1, 400))
def test_batches_hold_each_text_once_within_the_tokens_of_whole_texts(
    lengths: list[int], batch_size: int | None
) -> None:
    runner: Any = Counting(512)
    tower, budget = TextTower(CLIP, runner), 4 << 20
    sizes = np.array(lengths, dtype=np.int64)
    batches = list(tower.batches(sizes, batch_size, budget))
    order = np.concatenate([np.zeros(0, np.int64), *batches])
    assert order.tolist() == sorted(range(len(lengths)), key=lengths.__getitem__)
    whole = 4
    plan = text_pooled(CLIP)
    assert (
        plan.arena_bytes(whole, whole * 77) <= budget < plan.arena_bytes(2 * whole, 2 * whole * 77)
    )
    for number, batch in enumerate(batches):
        if batch_size is None:
            padded = len(batch) * sizes[batch].max()
            assert padded <= whole * 77
            following = order[len(np.concatenate(batches[: number + 1])) :]
            if len(following):
                assert (len(batch) + 1) * sizes[following[0]] > whole * 77, "one more would fit"
        else:
            assert len(batch) == batch_size or number == len(batches) - 1


def test_a_batch_is_made_ready_while_the_one_before_is_computed() -> None:
    """Results are read, which waits for the device, only once the next call is under way."""
    log: list[str] = []

    def made() -> Any:
        for item in (1, 2, 3):
            log.append(f"call {item}")
            yield item

    for item in one_behind(made()):
        log.append(f"read {item}")
    assert log == ["call 1", "call 2", "read 1", "call 3", "read 2", "read 3"]
