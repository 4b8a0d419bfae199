"""The torch runner against models written out in PyTorch, and what its calls share."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from helpers import HALVES, assert_close
from vitrail.checkpoint.header import read_header
from vitrail.checkpoint.tensors import Source
from vitrail.plan.plan import Plan
from vitrail.plan.text import text_dense, text_pooled
from vitrail.plan.vision import vision_dense, vision_layers, vision_pooled, vision_scores
from vitrail.runtime.memory import ARENAS, IDLE_ARENAS, ArenaPool
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.spec import BlockSpec, HeadSpec, ModelSpec, PoolerSpec, TextSpec, VisionSpec
from vitrail.weights.folding import load_weights
from vitrail_kernels import OPERATORS

CPU = torch.device("cpu")
DTYPES = (torch.float32, *HALVES)
POSITION = OPERATORS["position"].reference
A = torch.tensor([1 / 58, 1 / 57, 1 / 57], dtype=torch.float64)
B = torch.tensor([-2.1, -2.0, -1.8], dtype=torch.float64)

_BLOCKS = BlockSpec(48, 3, 3, 80, "gelu", 1e-6)
_SWIGLU = BlockSpec(48, 2, 2, 72, "silu", 1e-6, gated=True, qkv_bias=False, layer_scale=True)
VISION: dict[str, VisionSpec] = {
    "vit": VisionSpec(_BLOCKS, (32, 24), (8, 8), pooler=PoolerSpec(20, "tanh")),
    "deit": VisionSpec(_BLOCKS, (24, 24), (8, 8), distillation=True),
    "clip": VisionSpec(
        dataclasses.replace(_BLOCKS, activation="quick_gelu", eps=1e-5),
        (28, 28),
        (7, 7),
        patch_bias=False,
        pre_norm=True,
        norm="pooled",
        projection=20,
    ),
    "dinov2": VisionSpec(_SWIGLU, (28, 28), (14, 14), registers=4, position_antialias=True),
    "one layer": VisionSpec(
        dataclasses.replace(_BLOCKS, layers=1, layer_scale=True), (8, 8), (4, 2)
    ),
}
# enough labels, and below enough images, that errors in 16 bits mean something
LABELS = tuple(f"label {number}" for number in range(24))
HEADS = {
    "vit": HeadSpec(LABELS, "class"),
    "deit": HeadSpec(LABELS, "class_distillation"),
    "dinov2": HeadSpec(LABELS, "class_mean"),
}
TEXT = TextSpec(dataclasses.replace(_BLOCKS, causal=True, activation="gelu_tanh"), 40, 24, 39, 20)

Tensors = dict[str, Tensor]
ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "tanh": torch.tanh,
}


# -- models written out ----------------------------------------------------------------------------


def random_tensors(spec: ModelSpec) -> Tensors:
    """Matrices that keep the scale of what passes through them, vectors unlike any constant."""
    tensors = {}
    for name, shape in spec.tensor_shapes().items():
        columns = math.prod(shape[1:]) if len(shape) > 1 else 10
        tensors[name] = torch.randn(shape) * max(columns, 1) ** -0.5
        if "norm" in name and name.endswith("weight"):
            tensors[name] += 1
        if name in ("vision.position", "text.position", "text.token", "vision.registers"):
            tensors[name] *= 5
    return tensors


def norm(t: Tensors, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


def linear(t: Tensors, name: str, x: Tensor) -> Tensor:
    return F.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))


def block(spec: BlockSpec, t: Tensors, name: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """One pre-norm transformer block over (B, T, C), as any textbook has it."""
    batch, tokens, _ = x.shape
    y = norm(t, f"{name}.norm1", x, spec.eps)
    q, k, v = (
        linear(t, f"{name}.{projection}", y).view(batch, tokens, spec.heads, -1).transpose(1, 2)
        for projection in "qkv"
    )
    scores = q @ k.transpose(2, 3) / math.sqrt(spec.head_dim)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    y = (scores.softmax(3) @ v).transpose(1, 2).reshape(batch, tokens, -1)
    x = x + linear(t, f"{name}.out", y) * t.get(f"{name}.scale1", torch.ones((), dtype=x.dtype))
    y = norm(t, f"{name}.norm2", x, spec.eps)
    hidden = linear(t, f"{name}.up", y)
    act = ACT[spec.activation]
    hidden = act(linear(t, f"{name}.gate", y)) * hidden if spec.gated else act(hidden)
    scale = t.get(f"{name}.scale2", torch.ones((), dtype=x.dtype))
    return x + linear(t, f"{name}.down", hidden) * scale


def vision_streams(spec: VisionSpec, t: Tensors, pixels: Tensor) -> list[Tensor]:
    """The residual stream (B, T, C) before every block and after the last one."""
    patches = F.conv2d(
        pixels.to(t["vision.class"].dtype),
        t["vision.patch.weight"],
        t.get("vision.patch.bias"),
        stride=spec.patch,
    ).flatten(2)
    table = t["vision.position"]
    grid = spec.grid_at((pixels.shape[2], pixels.shape[3]))
    positions = table[spec.positioned :]
    if grid != spec.grid:
        square = positions.float().view(1, *spec.grid, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(
            square, grid, mode="bicubic", antialias=spec.position_antialias, align_corners=False
        )
        positions = resized.flatten(2)[0].t().to(table.dtype)
    prefix = (t["vision.class"] + table[0])[None]
    if spec.distillation:
        prefix = torch.cat([prefix, (t["vision.distillation"] + table[1])[None]])
    prefix = torch.cat([prefix, t.get("vision.registers", prefix[:0])])
    x = torch.cat([prefix.expand(len(pixels), -1, -1), patches.transpose(1, 2) + positions], dim=1)
    if spec.pre_norm:
        x = norm(t, "vision.pre_norm", x, spec.blocks.eps)
    streams = [x]
    for layer in range(spec.blocks.layers):
        streams.append(block(spec.blocks, t, f"vision.blocks.{layer}", streams[-1], None))
    return streams


def vision_outputs(
    spec: VisionSpec, head: HeadSpec | None, t: Tensors, pixels: Tensor
) -> dict[str, Tensor]:
    """All outputs of the dense plan with every tap, tokens shaped (B, T, C)."""
    streams = vision_streams(spec, t, pixels)
    out = {f"vision.hidden.{i}": x for i, x in enumerate(streams)}
    normalized = norm(t, "vision.norm", streams[-1], spec.blocks.eps)
    if spec.norm == "pooled":
        out["vision.pooler"] = normalized[:, 0]
        if spec.projection:
            out["vision.embedding"] = linear(t, "vision.projection", normalized[:, 0])
        return out
    out["vision.last"] = normalized
    if spec.pooler:
        out["vision.pooler"] = ACT[spec.pooler.activation](
            linear(t, "vision.pooler", normalized[:, 0])
        )
    if head is not None and head.features == "class_distillation":
        out["vision.class_logits"] = linear(t, "head.class", normalized[:, 0]) / 2
        out["vision.distillation_logits"] = linear(t, "head.distillation", normalized[:, 1]) / 2
    elif head is not None:
        features = normalized[:, 0]
        if head.features == "class_mean":
            features = torch.cat([features, normalized[:, spec.prefix :].mean(1)], dim=1)
        out["vision.logits"] = linear(t, "head", features)
    return out


def text_outputs(spec: TextSpec, t: Tensors, ids: Tensor, ends: Sequence[int]) -> dict[str, Tensor]:
    """All outputs of the dense text plan for ``ids`` (B, T), pooled at ``ends``."""
    tokens = ids.shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    streams = [F.embedding(ids.long(), t["text.token"]) + t["text.position"][:tokens]]
    for layer in range(spec.blocks.layers):
        streams.append(block(spec.blocks, t, f"text.blocks.{layer}", streams[-1], mask))
    out = {f"text.hidden.{i}": x for i, x in enumerate(streams)}
    out["text.last"] = norm(t, "text.norm", streams[-1], spec.blocks.eps)
    out["text.pooler"] = out["text.last"][torch.arange(len(ids)), torch.tensor(ends)]
    if spec.projection:
        out["text.embedding"] = linear(t, "text.projection", out["text.pooler"])
    return out


# -- the runner ------------------------------------------------------------------------------------


def open_runner(
    folder: Path,
    vision: VisionSpec | None,
    text: TextSpec | None = None,
    head: HeadSpec | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensors, TorchRunner]:
    spec = ModelSpec("vit", "test", vision, text, head)
    tensors = random_tensors(spec)
    save_file(tensors, folder / "model.safetensors")
    entries = read_header(folder / "model.safetensors")
    sources = {name: Source(entry) for name, entry in entries.items()}
    weights = load_weights(spec, sources, dtype, (A, B))
    return tensors, TorchRunner(weights, dtype, CPU)


def normalized(pixels: Tensor) -> Tensor:
    return (pixels.double() * A + B).permute(0, 3, 1, 2)


def images(batch: int, size: tuple[int, int]) -> Tensor:
    return torch.randint(256, (batch, *size, 3), dtype=torch.uint8)


def see(runner: TorchRunner, spec: VisionSpec, plan: Plan, pixels: Tensor) -> dict[str, Tensor]:
    """Run a vision plan; tokens come back as (B, T, C)."""
    uint8 = pixels.dtype == torch.uint8
    size = (pixels.shape[1], pixels.shape[2]) if uint8 else (pixels.shape[2], pixels.shape[3])
    batch, tokens = len(pixels), spec.tokens_at(size)
    starts = torch.arange(batch + 1, dtype=torch.int32) * tokens
    inputs = {
        "pixels": pixels,
        "table": runner.position_table(spec, spec.grid_at(size), "uint8" if uint8 else "float"),
        "cu_seqlens": starts,
        "token_rows": starts[:-1],
        "distillation_rows": starts[:-1] + 1,
    }
    inputs = {name: inputs[name] for name in plan.inputs}
    out = runner.run(plan, inputs, batch=batch, tokens=batch * tokens, longest=tokens)
    streams = ("vision.hidden.", "vision.layer.", "vision.last")
    return {
        name: t.view(batch, tokens, t.shape[1]) if name.startswith(streams) else t
        for name, t in out.items()
    }


def logits_of(out: Mapping[str, Tensor]) -> Tensor:
    """Those of the head of a dense plan: of two heads it gives half the logits each."""
    if "vision.class_logits" in out:
        return out["vision.class_logits"] + out["vision.distillation_logits"]
    return out["vision.logits"]


def read(
    runner: TorchRunner, plan: Plan, texts: Sequence[Tensor], ends: Sequence[int]
) -> dict[str, Tensor]:
    """Run a text plan over packed id rows, pooled at ``ends``."""
    lengths = [len(ids) for ids in texts]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = [torch.arange(n, dtype=torch.int32) for n in lengths]
    inputs = {
        "ids": torch.cat([*texts, torch.empty(0)]).to(torch.int32),
        "positions": torch.cat([*positions, torch.empty(0)]).to(torch.int32),
        "cu_seqlens": starts,
        "token_rows": starts[:-1] + torch.tensor(ends, dtype=torch.int32),
    }
    return runner.run(
        plan, inputs, batch=len(texts), tokens=sum(lengths), longest=max(lengths, default=0)
    )


def check(
    name: str, ours: Tensor, t: Tensors, form: Callable[[Tensors], Tensor], dtype: Any
) -> None:
    """A whole model's output against ``form`` in fp64, and in ``kind`` where that is 16 bits."""
    reference = form({n: v.double() for n, v in t.items()})
    peer = form({n: v.to(dtype) for n, v in t.items()}) if dtype in HALVES else None
    assert_close(ours, reference, peer, what="model", name=name)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(bits(a[name]), bits(b[name])) for name in a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("family", VISION)
def test_dense_outputs_are_those_of_a_plain_model(
    tmp_path: Path, family: str, uint8: bool, dtype: torch.dtype
) -> None:
    spec, head = VISION[family], HEADS.get(family)
    tensors, runner = open_runner(tmp_path, spec, head=head, dtype=dtype)
    taps = tuple(range(spec.blocks.layers + 1))
    plan = vision_dense(spec, head, uint8=uint8, taps=taps)
    larger = (spec.image[0] + 2 * spec.patch[0] + 1, spec.image[1] + spec.patch[1])
    for size in (spec.image, larger):
        pixels = images(12, size)
        out = see(runner, spec, plan, pixels if uint8 else normalized(pixels).float())
        expected = vision_outputs(
            spec, head, {n: v.double() for n, v in tensors.items()}, normalized(pixels)
        )
        status = out.pop("vision.status", torch.zeros(1))
        assert not status.any()
        assert out.keys() == expected.keys()
        for name in out:

            def form(t: Tensors, name: str = name, pixels: Tensor = pixels) -> Tensor:
                return vision_outputs(spec, head, t, normalized(pixels))[name]

            check(name, out[name], tensors, form, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", VISION)
def test_the_pooled_plan_is_a_plain_models_class_token(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    spec, head = VISION[family], HEADS.get(family)
    tensors, runner = open_runner(tmp_path, spec, head=head, dtype=dtype)
    pixels = images(12, spec.image)
    out = see(runner, spec, vision_pooled(spec, uint8=True), pixels)
    assert out["vision.status"].tolist() == [0] * 12
    assert out["vision.embedding"].dtype == torch.float32

    def embedding(t: Tensors) -> Tensor:
        last = vision_streams(spec, t, normalized(pixels))[-1][:, 0]
        last = norm(t, "vision.norm", last, spec.blocks.eps)
        return linear(t, "vision.projection", last) if spec.projection else last

    def logits(t: Tensors) -> Tensor:
        return logits_of(vision_outputs(spec, head, t, normalized(pixels)))

    check("embedding", out["vision.embedding"], tensors, embedding, dtype)
    if head is not None:
        out = see(runner, spec, vision_scores(spec, head, uint8=True), pixels)
        check("logits", out["vision.logits"], tensors, logits, dtype)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("family", ["vit", "clip"])
def test_layers_are_a_plain_models_streams(tmp_path: Path, family: str, normed: bool) -> None:
    spec = VISION[family]
    tensors, runner = open_runner(tmp_path, spec)
    pixels = images(2, spec.image)
    for taps in ((0,), (1,), (0, 2), (0, 1, 2)):
        out = see(runner, spec, vision_layers(spec, taps, normed, True), pixels)
        assert list(out) == [f"vision.layer.{tap}" for tap in taps]
        for tap in taps:

            def form(t: Tensors, tap: int = tap) -> Tensor:
                x = vision_streams(spec, t, normalized(pixels))[tap + 1]
                return norm(t, "vision.norm", x, spec.blocks.eps) if normed else x

            check(f"layer {tap}", out[f"vision.layer.{tap}"], tensors, form, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("projection", [None, 20])
def test_text_outputs_are_those_of_a_plain_model(
    tmp_path: Path, projection: int | None, dtype: torch.dtype
) -> None:
    spec = dataclasses.replace(TEXT, projection=projection)
    tensors, runner = open_runner(tmp_path, None, spec, dtype=dtype)
    ids, ends = torch.randint(40, (12, 17)), [16, 3, 0, 9, 1, 12, 16, 5, 2, 7, 11, 14]
    taps = tuple(range(spec.blocks.layers + 1))
    out = read(runner, text_dense(spec, taps=taps), list(ids), ends)
    packed = read(
        runner,
        text_pooled(spec),
        [row[: end + 1] for row, end in zip(ids, ends, strict=True)],
        ends,
    )

    def form(name: str) -> Callable[[Tensors], Tensor]:
        return lambda t: text_outputs(spec, t, ids, ends)[name]

    for name in set(out) - {"text.status"}:
        streams = name.startswith(("text.hidden.", "text.last"))
        ours = out[name].view(12, 17, -1) if streams else out[name]
        check(name, ours, tensors, form(name), dtype)
    pooled = form("text.embedding" if projection else "text.pooler")
    check("packed", packed["text.embedding"], tensors, pooled, dtype)
    assert not packed["text.status"].any()


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_spec_runs_as_a_plain_model_does(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 999)))
    heads, head_dim = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 5, 8, 16]))
    blocks = BlockSpec(
        heads * head_dim,
        data.draw(st.integers(1, 3)),
        heads,
        data.draw(st.integers(2, 50)),
        data.draw(st.sampled_from(["gelu", "gelu_tanh", "quick_gelu", "silu"])),
        1e-5,
        gated=data.draw(st.booleans()),
        qkv_bias=data.draw(st.booleans()),
        layer_scale=data.draw(st.booleans()),
    )
    pooled = data.draw(st.booleans())
    patch = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    spec = VisionSpec(
        blocks,
        (patch[0] * data.draw(st.integers(1, 3)), patch[1] * data.draw(st.integers(1, 3))),
        patch,
        registers=data.draw(st.integers(0, 3)),
        patch_bias=data.draw(st.booleans()),
        pre_norm=data.draw(st.booleans()),
        norm="pooled" if pooled else "tokens",
        projection=9 if pooled else None,
        pooler=PoolerSpec(6, "tanh") if not pooled and data.draw(st.booleans()) else None,
    )
    tensors, runner = open_runner(tmp_path_factory.mktemp("spec"), spec)
    size = data.draw(
        st.sampled_from([spec.image, (patch[0] * 2, patch[1] * 3), (patch[0] * 4, patch[1])])
    )
    pixels = images(data.draw(st.integers(1, 3)), size)
    expected = vision_outputs(
        spec, None, {n: v.double() for n, v in tensors.items()}, normalized(pixels)
    )
    taps = tuple(range(blocks.layers + 1))
    uint8 = data.draw(st.booleans())
    given_pixels = pixels if uint8 else normalized(pixels).float()
    out = see(runner, spec, vision_dense(spec, uint8=uint8, taps=taps), given_pixels)
    for name, reference in expected.items():
        assert_close(out[name], reference, what="model", name=name)


@pytest.mark.parametrize("family", VISION)
def test_a_tap_changes_no_other_output(tmp_path: Path, family: str) -> None:
    spec, head = VISION[family], HEADS.get(family)
    _, runner = open_runner(tmp_path, spec, head=head)
    pixels = images(2, spec.image)
    layers = spec.blocks.layers

    def run(taps: tuple[int, ...]) -> dict[str, Tensor]:
        return see(runner, spec, vision_dense(spec, head, uint8=True, taps=taps), pixels)

    everything = run(tuple(range(layers + 1)))
    for taps in ((), *((i,) for i in range(layers + 1)), tuple(range(0, layers + 1, 2))):
        out = run(taps)
        assert set(out) >= {f"vision.hidden.{tap}" for tap in taps}
        for name in out:
            if name != "vision.status":
                assert_close(out[name], everything[name], name=f"{name} with taps {taps}")


# -- what calls share ------------------------------------------------------------------------------


@pytest.fixture
def vit(tmp_path: Path) -> TorchRunner:
    return open_runner(tmp_path, VISION["vit"])[1]


def embed(runner: TorchRunner, pixels: Tensor) -> dict[str, Tensor]:
    spec = VISION["vit"]
    return see(runner, spec, vision_pooled(spec, uint8=pixels.dtype == torch.uint8), pixels)


@pytest.mark.parametrize("poison", [math.nan, 65504.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_image_of_a_batch_sees_another(
    tmp_path: Path, dtype: torch.dtype, poison: float
) -> None:
    spec = VISION["vit"]
    _, runner = open_runner(tmp_path, spec, dtype=dtype)
    pixels = normalized(images(4, spec.image)).float()
    clean = embed(runner, pixels)
    pixels[2, 1, 20, 3] = poison
    poisoned = embed(runner, pixels)
    keep = torch.tensor([0, 1, 3])
    assert torch.equal(
        bits(poisoned["vision.embedding"][keep]), bits(clean["vision.embedding"][keep])
    )
    assert not poisoned["vision.status"][keep].any()
    finite = torch.isfinite(poisoned["vision.embedding"][2]).all()
    assert bool(poisoned["vision.status"][2]) == (not finite)
    assert math.isfinite(poison) or not finite


@pytest.mark.parametrize("family", VISION)
def test_what_an_arena_held_before_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Arenas and outputs full of NaN: nothing is read before it is written."""
    spec, head = VISION[family], HEADS.get(family)
    _, runner = open_runner(tmp_path, spec, head=head)
    pixels = images(2, spec.image)
    plans = [
        vision_dense(spec, head, uint8=True, taps=(0, 1)),
        vision_pooled(spec, uint8=True),
        vision_layers(spec, (0,), True, True),
    ]
    clean = [see(runner, spec, plan, pixels) for plan in plans]
    allocated, taken = torch.empty, ArenaPool.take

    def poisoned(*shape: Any, **options: Any) -> Tensor:
        fresh = allocated(*shape, **options)
        fresh.untyped_storage().fill_(0xFF)
        return fresh

    def stale(self: ArenaPool, nbytes: int) -> Tensor:
        return taken(self, nbytes).fill_(0xFF)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(ArenaPool, "take", stale)
    for plan, expected in zip(plans, clean, strict=True):
        assert same_bits(see(runner, spec, plan, pixels), expected)


def test_results_are_fresh_tensors(tmp_path: Path) -> None:
    spec = VISION["clip"]
    _, runner = open_runner(tmp_path, spec)
    plan = vision_dense(spec, uint8=True, taps=(0, 1, 2, 3))
    earlier = see(runner, spec, plan, images(3, spec.image))
    copies = {name: t.clone() for name, t in earlier.items()}
    later = see(runner, spec, plan, images(3, spec.image))
    assert same_bits(earlier, copies)
    assert not same_bits(earlier, later)
    owners = [t.untyped_storage().data_ptr() for t in (*earlier.values(), *later.values())]
    assert len(set(owners)) == len(owners)
    for t in later.values():
        assert t.is_contiguous()
        t.fill_(7)
    assert same_bits(earlier, copies)


@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
def test_inputs_keep_every_bit(vit: TorchRunner, uint8: bool) -> None:
    pixels = images(2, (32, 24))
    pixels = pixels if uint8 else normalized(pixels).float()
    kept, weights = pixels.clone(), vit.weights.arena.clone()
    table = vit.position_table(VISION["vit"], (4, 3), "uint8").clone()
    embed(vit, pixels)
    assert torch.equal(bits(pixels), bits(kept))
    assert torch.equal(vit.weights.arena, weights)
    assert torch.equal(vit.position_table(VISION["vit"], (4, 3), "uint8"), table)


@pytest.mark.parametrize("family", VISION)
def test_an_empty_batch_gives_empty_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    spec, head = VISION[family], HEADS.get(family)
    _, runner = open_runner(tmp_path, spec, head=head)
    runner.position_table(spec, spec.grid, "uint8")
    monkeypatch.setattr(TorchRunner, "run_steps", None)  # nothing may be launched
    none = images(0, spec.image)
    dense = see(runner, spec, vision_dense(spec, head, uint8=True, taps=(0,)), none)
    tokens, width = spec.tokens_at(spec.image), spec.blocks.width
    assert dense["vision.hidden.0"].shape == (0, tokens, width)
    if spec.norm == "tokens":
        assert dense["vision.last"].shape == (0, tokens, width)
    if head is not None:
        assert logits_of(dense).shape == (0, 24)
    pooled = see(runner, spec, vision_pooled(spec, uint8=True), none)
    assert pooled["vision.embedding"].shape == (0, spec.embedding)
    assert pooled["vision.embedding"].dtype == torch.float32
    assert pooled["vision.status"].shape == (0,)


def test_no_texts_give_no_embeddings(tmp_path: Path) -> None:
    _, runner = open_runner(tmp_path, None, TEXT)
    out = read(runner, text_pooled(TEXT), [], [])
    assert out["text.embedding"].shape == (0, 20)
    assert out["text.status"].shape == (0,)


def test_results_are_ordinary_tensors_under_any_grad_mode(vit: TorchRunner) -> None:
    pixels = images(2, (32, 24))
    plain = embed(vit, pixels)
    with torch.inference_mode():
        larger = embed(vit, images(2, (40, 24)))  # its table is made and cached here
        inside = embed(vit, pixels.clone())
    with torch.enable_grad():
        graded = embed(vit, pixels)
        again = embed(vit, images(2, (40, 24)))
    assert same_bits(inside, plain)
    assert same_bits(graded, plain)
    for out in (plain, inside, graded, larger, again):
        assert not any(t.is_inference() or t.requires_grad for t in out.values())
        out["vision.embedding"].add_(1)
    weight = torch.ones(48, requires_grad=True)
    (inside["vision.embedding"] @ weight).sum().backward()
    assert weight.grad is not None


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(kept)


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "another default dtype": lambda: default_dtype(torch.float64),
    "another default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("family", VISION)
def test_the_callers_mode_changes_no_bit(
    tmp_path: Path, family: str, mode: Callable[[], contextlib.AbstractContextManager[Any]]
) -> None:
    """Neither while loading nor while running; the position table is made anew in both."""
    spec, head = VISION[family], HEADS.get(family)
    _, runner = open_runner(tmp_path, spec, head=head)
    model = ModelSpec("vit", "test", spec, None, head)
    pixels = images(2, (spec.image[0] + spec.patch[0], spec.image[1]))
    plan = vision_dense(spec, head, uint8=True, taps=(0,))
    size = (pixels.shape[1], pixels.shape[2])
    batch, tokens = len(pixels), spec.tokens_at(size)
    starts = torch.arange(batch + 1, dtype=torch.int32) * tokens

    def run(runner: TorchRunner) -> dict[str, Tensor]:
        table = runner.position_table(spec, spec.grid_at(size), "uint8")
        given_inputs = {
            "pixels": pixels,
            "table": table,
            "cu_seqlens": starts,
            "token_rows": starts[:-1],
            "distillation_rows": starts[:-1] + 1,
        }
        given_inputs = {name: given_inputs[name] for name in plan.inputs}
        return runner.run(plan, given_inputs, batch=batch, tokens=batch * tokens, longest=tokens)

    expected = run(runner)
    entries = read_header(tmp_path / "model.safetensors")
    sources = {name: Source(entry) for name, entry in entries.items()}
    with mode():
        weights = load_weights(model, sources, torch.float32, (A, B))
        out = run(TorchRunner(weights, torch.float32, CPU))
    assert torch.equal(weights.arena, runner.weights.arena)
    assert same_bits(out, expected)
    assert not any(t.is_inference() or t.requires_grad for t in (weights.arena, *out.values()))


@pytest.mark.parametrize("batch", [1, 7, 60])
def test_repeats_are_bit_identical(vit: TorchRunner, batch: int) -> None:
    pixels = images(batch, (32, 24))
    expected = embed(vit, pixels)
    assert all(same_bits(embed(vit, pixels), expected) for _ in range(20))


def test_calls_from_many_threads_do_not_disturb_each_other(vit: TorchRunner) -> None:
    """Different batches and image sizes at once, each with the bits it has alone."""
    calls = [images(1 + n % 5, (32 + 8 * (n % 3), 24)) for n in range(24)]
    alone = [embed(vit, pixels) for pixels in calls]
    barrier = threading.Barrier(8)

    def work(start: int) -> list[dict[str, Tensor]]:
        barrier.wait(timeout=60)
        return [embed(vit, calls[(start + step) % 24]) for step in range(24)]

    with ThreadPoolExecutor(8) as pool:
        by_thread = list(pool.map(work, range(8)))
    for start, results in enumerate(by_thread):
        for step, out in enumerate(results):
            assert same_bits(out, alone[(start + step) % 24])
    assert len(ARENAS._idle) <= IDLE_ARENAS


def test_a_call_that_fails_leaves_the_runner_usable(vit: TorchRunner) -> None:
    pixels = images(2, (32, 24))
    expected = embed(vit, pixels)
    plan = vision_pooled(VISION["vit"], uint8=True)
    for _ in range(3 * IDLE_ARENAS):
        with pytest.raises(ValueError, match="channels"):
            see(vit, VISION["vit"], plan, torch.zeros(2, 32, 24, 1, dtype=torch.uint8))
        assert same_bits(embed(vit, pixels), expected)


def test_a_runner_goes_with_the_last_that_holds_it(tmp_path: Path) -> None:
    """Not at the next garbage collection: the weights would stay on the device until then."""
    _, runner = open_runner(tmp_path, VISION["vit"])
    see(runner, VISION["vit"], vision_pooled(VISION["vit"], uint8=True), images(1, (32, 24)))
    gone = weakref.ref(runner)
    gc.disable()
    try:
        del runner
        assert gone() is None
    finally:
        gc.enable()
