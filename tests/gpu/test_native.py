"""The native runner on a GPU: the Triton runner's bits, in graphs, threads, streams and exports."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor

import vitrail
from gpu.common import DEVICE, DRY, HALVES, NAMES, gpu_alone, same_bits
from gpu.models import BUNDLED, HALF, Zoo, images, padded, texts
from vitrail.errors import OutOfMemoryError
from vitrail.plan.lowering import NativePlan
from vitrail.plan.plan import Plan
from vitrail.plan.vision import vision_pooled
from vitrail.runtime import native
from vitrail.runtime.native import OVERLAP, NativeRunner
from vitrail.text.tokens import TokenIds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("kernels", *(["ordered_dot"] if DRY else [])),
]

ROOT = Path(__file__).parents[2]
RUNNER = "triton" if DRY else "native"
BATCHES = (2,) if DRY else (1, 3, 16, 64)
OVERLAPS = (False,) if DRY else (False, True)
DENSE = 16
"""Images of a batch whose every token is looked at."""

Outputs = Mapping[str, Tensor]


def opened(folder: Path, dtype: torch.dtype, overlap: bool = False) -> vitrail.Model:
    """By the native runner; in a dry run by another Triton runner, for the tests' own sake."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(OVERLAP, str(int(overlap)))
        model = vitrail.load(folder, device=DEVICE, dtype=dtype, backend=RUNNER)
    assert model.backend == RUNNER
    return model


def bytes_of(count: int) -> Tensor:
    """uint8 pixels of the bundled model's size."""
    dice = torch.Generator().manual_seed(count)
    return torch.randint(256, (count, 56, 56, 3), generator=dice).to(torch.uint8).to(DEVICE)


def everything(model: vitrail.Model, pixels: Tensor, batch: int) -> Iterator[tuple[str, Outputs]]:
    """What every plan of the model gives, by the plan's name."""
    vision, text = model._vision, model._text
    assert vision is not None
    some, last = pixels[:batch], vision.spec.blocks.layers
    yield "pooled", vision.embeddings(some)
    if vision.head is not None:
        yield "scores", {"vision.logits": vision.scores(some)}
    few = some[:DENSE]
    yield "dense", vision.dense(few, (0, 1, last))
    for norm in (False, True):
        layers = vision.layers(few, (0, last - 1), norm)
        yield f"layers, norm {norm}", {str(place): out for place, out in enumerate(layers)}
    if text is not None:
        ids = texts(model, batch)
        yield "text pooled", text.embeddings(TokenIds.of(ids))
        rows = padded(ids[:DENSE])
        lengths = torch.tensor([len(row) for row in ids[:DENSE]])
        yield "text dense", text.dense(rows, taps=(0, 1))
        yield "text masked", text.dense(rows, lengths)


def unlike(ours: vitrail.Model, other: vitrail.Model, pixels: Tensor) -> Iterator[str]:
    """Which outputs of two models have other bits, at every batch."""
    for batch in BATCHES:
        pairs = zip(everything(ours, pixels, batch), everything(other, pixels, batch), strict=True)
        for (plan, mine), (_, theirs) in pairs:
            assert mine.keys() == theirs.keys()
            for name, found in mine.items():
                if not same_bits(found, theirs[name]):
                    yield f"batch {batch}, {plan}: {name}"


# -- the same bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", OVERLAPS, ids={False: "in turn", True: "overlap"}.get)
@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
@pytest.mark.parametrize("name", ["ViT-B/16", "CLIP B/32", "DINOv2-B registers"])
def test_native_gives_the_triton_bits(
    name: str, dtype: torch.dtype, overlap: bool, zoo: Zoo
) -> None:
    """Float pixels and texts, by every plan."""
    ours = opened(zoo.folder(name, dtype), dtype, overlap)
    other = zoo.ours(name, dtype, runner="triton")
    assert list(unlike(ours, other, images(max(BATCHES)))) == []


@pytest.mark.parametrize("overlap", OVERLAPS, ids={False: "in turn", True: "overlap"}.get)
@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
def test_uint8_pixels_give_the_triton_bits(dtype: torch.dtype, overlap: bool) -> None:
    ours = opened(BUNDLED, dtype, overlap)
    other = vitrail.load(BUNDLED, device=DEVICE, dtype=dtype, backend="triton")
    assert list(unlike(ours, other, bytes_of(max(BATCHES)))) == []
    moved = torch.empty(bytes_of(3).numel() + 1, dtype=torch.uint8, device=DEVICE)[1:]
    moved = moved.view(bytes_of(3).shape).copy_(bytes_of(3))
    assert ours._vision is not None
    found, wanted = (ours._vision.embeddings(pixels) for pixels in (moved, bytes_of(3)))
    assert same_bits(found["vision.embedding"], wanted["vision.embedding"]), "at an odd address"


def test_another_image_would_be_noticed() -> None:
    """The comparison can fail, at one byte of one image."""
    model, other = opened(BUNDLED, HALF), bytes_of(max(BATCHES))
    pixels = other.clone()
    pixels[0, 9, 9, 0] ^= 64
    assert model._vision is not None
    one, two = (model._vision.embeddings(x)["vision.embedding"] for x in (pixels, other))
    assert not same_bits(one[0], two[0])
    assert same_bits(one[1:], two[1:])


@gpu_alone
def test_one_program_serves_every_batch_and_no_kernel_is_loaded_twice(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: Counter[str] = Counter()
    load = NativeRunner._load

    def noted(runner: NativeRunner, key: str, program: NativePlan) -> None:
        loaded[key] += 1
        load(runner, key, program)

    monkeypatch.setattr(NativeRunner, "_load", noted)
    model = opened(zoo.folder("ViT-B/16"), HALF)
    for _ in range(2):
        for batch in (1, 2, 5, 16, 33, 64, 100):
            model.encode_image(images(batch), batch_size=batch)
    assert set(loaded.values()) == {1}
    assert len(runner_of(model)._plans) == 1


def runner_of(model: vitrail.Model) -> NativeRunner:
    assert model._vision is not None
    runner = model._vision.runner
    assert isinstance(runner, NativeRunner)
    return runner


# -- in a caller's graph ---------------------------------------------------------------------------


def captured(run: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """``run`` of each input, by one graph that is captured with the first."""
    given = inputs[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # PyTorch's own kernels warm up too
        run(given)
    torch.cuda.current_stream().wait_stream(side)
    graph, found = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        result = run(given)
    for pixels in inputs:
        given.copy_(pixels)
        graph.replay()
        found.append(result.clone())
    return found


@gpu_alone
@pytest.mark.parametrize("overlap", OVERLAPS, ids={False: "in turn", True: "overlap"}.get)
@pytest.mark.parametrize("batch", [1, 8])
def test_a_callers_graph_replays_to_the_same_bits(batch: int, overlap: bool, zoo: Zoo) -> None:
    """`Model.forward`, an embedding, and one as a module among PyTorch's operators."""
    model = opened(zoo.folder("ViT-B/16"), HALF, overlap)
    module, inputs = model.as_module("image"), [images(batch, seed=seed) for seed in range(3)]

    def forward(pixels: Tensor) -> Tensor:
        out = model.forward(pixel_values=pixels).last_hidden_state
        assert out is not None
        return out

    def embedding(pixels: Tensor) -> Tensor:
        assert model._vision is not None
        return model._vision.embeddings(pixels)["vision.embedding"]

    def mixed(pixels: Tensor) -> Tensor:
        first = torch.nn.functional.normalize(module(pixels * 0.5 + 0.1), dim=1)
        return first @ module(pixels.flip(3)).T

    with torch.no_grad():
        for run in (forward, embedding, mixed):
            wanted = [run(pixels) for pixels in inputs]
            assert not same_bits(wanted[0], wanted[1])
            for number, found in enumerate(captured(run, inputs)):
                assert same_bits(found, wanted[number]), f"{run.__name__}, replay {number}"


@gpu_alone
def test_a_replay_keeps_its_positions_whatever_was_asked_since(zoo: Zoo) -> None:
    """Tables past the cache's limit are forgotten, but not those that a graph knows."""
    model = opened(zoo.folder("ViT-B/16"), HALF)
    vision, pixels = model._vision, images(1, (512, 512), seed=1)
    assert vision is not None

    def embedding(given: Tensor) -> Tensor:
        return vision.embeddings(given)["vision.embedding"]

    wanted, given = embedding(pixels), pixels.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = embedding(given)
    for side in range(528, 1040, 32):
        embedding(images(1, (side, side)))
    graph.replay()
    assert same_bits(result, wanted)


@gpu_alone
def test_a_cold_model_compiles_with_reduce_overhead(zoo: Zoo) -> None:
    """Where torch.compile warms up, memory comes from the pool of the graph to be."""
    model = opened(zoo.folder("ViT-B/16"), HALF)
    module, pixels = model.as_module("image"), images(2)
    net = torch.compile(lambda x: module(x) * 2.0, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        found = [net(pixels).clone() for _ in range(4)]
        wanted = module(pixels) * 2.0
    assert all(same_bits(one, wanted) for one in found)


@gpu_alone
def test_kernels_are_loaded_while_another_thread_captures(zoo: Zoo) -> None:
    model, pixels = opened(zoo.folder("ViT-B/16"), HALF), images(1)
    vision, cold = model._vision, opened(BUNDLED, HALF)
    assert vision is not None
    wanted, graph, started, loaded = (
        vision.embeddings(pixels),
        torch.cuda.CUDAGraph(),
        Barrier(2),
        [],
    )
    assert cold._vision is not None
    plan = vision_pooled(cold._vision.spec, uint8=False)
    tokens, floats = cold._vision.spec.tokens_at((56, 56)), torch.empty(1, 3, 56, 56, device=DEVICE)

    def load() -> None:
        runner = runner_of(cold)
        started.wait(timeout=60)
        runner._size_entry(runner._cached_plan(plan, {"pixels": floats}), (1, tokens, tokens))
        loaded.append(True)

    thread = Thread(target=load)
    thread.start()
    with torch.cuda.graph(graph):
        result = vision.embeddings(pixels)
        started.wait(timeout=60)
        thread.join(timeout=120)
    assert loaded == [True]
    graph.replay()
    assert same_bits(result["vision.embedding"], wanted["vision.embedding"])


@gpu_alone
def test_memory_goes_with_the_model_and_waits_for_no_collector(zoo: Zoo) -> None:
    pixels = images(2)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        model = opened(zoo.folder("ViT-B/16"), HALF)
        model.encode_image(pixels)
        assert torch.cuda.memory_allocated() > before + model.weight_bytes // 2
        del model
        assert torch.cuda.memory_allocated() <= before + (1 << 20)
    finally:
        gc.enable()


# -- threads, streams and devices ------------------------------------------------------------------

THREADS = 8


@gpu_alone
def test_threads_that_are_first_to_call_give_the_serial_bits(zoo: Zoo) -> None:
    """All at once, on streams of their own, when neither program nor kernel is there yet."""
    wanted = zoo.ours("ViT-B/16", runner="triton").encode_image(images(4))
    model, start = opened(zoo.folder("ViT-B/16"), HALF), Barrier(THREADS)
    pixels = images(4)
    torch.cuda.synchronize()

    def work(number: int) -> list[Tensor]:
        start.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            return [model.encode_image(pixels[: 1 + (number + i) % 4]) for i in range(20)]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(work, range(THREADS)))
    wrong = [
        f"thread {number}, call {place}"
        for number, rows in enumerate(found)
        for place, out in enumerate(rows)
        if not same_bits(out, wanted[: len(out)])
    ]
    assert wrong == []


@gpu_alone
def test_a_thread_without_a_context_is_served(zoo: Zoo) -> None:
    """A fresh thread's first call; and one whose context someone took away."""
    model, pixels = opened(zoo.folder("ViT-B/16"), HALF), images(3)
    wanted, found = model.encode_image(pixels), list[Tensor]()
    driver = ctypes.CDLL(native.DRIVER)

    def work() -> None:
        found.append(model.encode_image(pixels))
        assert driver.cuCtxSetCurrent(None) == 0
        found.append(model.encode_image(pixels))

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 2, "the thread ended early"
    assert all(same_bits(out, wanted) for out in found)


@gpu_alone
@pytest.mark.skipif(not DRY and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_current_device_stays_current(zoo: Zoo) -> None:
    model, pixels = opened(zoo.folder("ViT-B/16"), HALF), images(3)
    wanted = model.encode_image(pixels)
    with torch.cuda.device(1):
        found = model.encode_image(pixels)
        assert torch.cuda.current_device() == 1
        assert torch.ones(3, device="cuda").sum().item() == 3
    assert same_bits(found, wanted)


# -- memory ----------------------------------------------------------------------------------------


@gpu_alone
@pytest.mark.parametrize("what", ["images", "texts"])
def test_too_little_memory_splits_the_batch_to_the_same_bits(
    what: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, count = opened(zoo.folder("CLIP B/32"), HALF), 512
    pixels, ids = images(count), texts(model, count)

    def encode() -> Tensor:
        if what == "images":
            return model.encode_image(pixels, batch_size=count)
        return model.encode_text(ids, batch_size=count)

    wanted, run = encode(), NativeRunner.run
    served, refused = list[int](), list[int]()

    def noted(runner: NativeRunner, plan: Plan, inputs: Any, **sizes: int) -> dict[str, Tensor]:
        try:
            out = run(runner, plan, inputs, **sizes)
        except OutOfMemoryError:
            refused.append(sizes["batch"])
            raise
        served.append(sizes["batch"])
        return out

    monkeypatch.setattr(NativeRunner, "run", noted)
    tower = model._vision if what == "images" else model._text
    assert tower is not None
    torch.cuda.empty_cache()
    cached = next(reversed(runner_of(model)._plans.values()))
    arena = max(entry.arena_shape[0] for entry in cached.sizes.values())
    total = torch.cuda.get_device_properties().total_memory
    free = arena // 2 + (24 << 20)  # half of it fits, with what goes in and comes out
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + free) / total)
    try:
        found = encode()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert refused[:1] == [count], "all of it fits: nothing was tried"
    assert sum(served) == count
    assert same_bits(found, wanted)
    assert same_bits(encode(), wanted), "afterwards"


# -- exported --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(kernels: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, by the program that users have, for this GPU."""
    folder = tmp_path_factory.mktemp("exported") / "clip"
    paths = [path for path in sys.path if path not in ("", str(ROOT))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-P", "-m", "vitrail.cli", "export", str(BUNDLED), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@gpu_alone
def test_an_exported_folder_gives_the_same_bits_and_compiles_nothing(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, words = opened(BUNDLED, HALF), ["a red star", "a circle on the left", "two"]
    pools = [list(bytes_of(batch).cpu().numpy()) for batch in BATCHES]
    wanted = [*(model.encode_image(pool) for pool in pools), model.encode_text(words)]

    def refuse(*_: Any) -> None:
        raise AssertionError("the folder should have it")

    monkeypatch.setattr(native, "lower", refuse)
    monkeypatch.setattr(native, "kernel_record", refuse)
    loaded = vitrail.load(exported)
    assert loaded.backend == "native"
    found = [*(loaded.encode_image(pool) for pool in pools), loaded.encode_text(words)]
    for number, (out, right) in enumerate(zip(found, wanted, strict=True)):
        assert same_bits(out, right), f"call {number}"


@gpu_alone
@pytest.mark.skipif(
    not (shutil.which("make") and shutil.which(os.environ.get("CXX", "c++"))),
    reason="needs make and a C++ compiler",
)
def test_the_example_in_cpp_prints_the_same_numbers(exported: Path, tmp_path: Path) -> None:
    """libvitrail against the real driver: pictures of the model's own size, five digits of each."""
    command = ["make", "-C", str(ROOT / "examples/cpp"), f"BUILD={tmp_path}"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    pixels = bytes_of(5)
    files = [tmp_path / f"{number}.ppm" for number in range(len(pixels))]
    for file, one in zip(files, pixels.cpu().numpy(), strict=True):
        file.write_bytes(b"P6\n56 56\n255\n" + one.tobytes())
    command = [str(tmp_path / "embed"), str(exported), *map(str, files)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    model = opened(BUNDLED, HALF)
    assert model._vision is not None
    wanted = model._vision.embeddings(pixels)["vision.embedding"][:, :3].tolist()
    found = re.findall(r"^\S+\.ppm: (.*) \.\.\. similarity", ran.stdout, re.M)
    assert found == [" ".join(f"{x:8.5f}" for x in row) for row in wanted]
