"""The native runner against a driver stand-in: every launch is what the operators say it is."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import standin
from runtime.test_runner import CPU, HEADS, TEXT, VISION, images, normalized, open_runner, read, see
from vitrail.errors import DeviceError, OutOfMemoryError
from vitrail.plan.plan import Plan
from vitrail.plan.text import text_pooled
from vitrail.plan.vision import vision_dense, vision_pooled, vision_scores, vision_table
from vitrail.runtime import native
from vitrail.runtime.native import NativeRunner
from vitrail_kernels import OPERATORS, Call
from vitrail_kernels.compile import compile_kernel, source_of
from vitrail_kernels.launch import MISSING, Target, interpreted

POSITION = "_position_kernel"
SMS = 2
"""So few that small batches reach every step of the tables of configurations."""

pytestmark = pytest.mark.skipif(
    MISSING is not None or interpreted() or native.MISSING is not None or not standin.compiler(),
    reason="the native runner: needs triton's compiler, vitrail._C and a C++ compiler",
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> standin.Standin:
    return standin.own(tmp_path_factory.mktemp("driver"), SMS)


@pytest.fixture(autouse=True)
def undisturbed(driver: standin.Standin) -> Iterator[None]:
    driver.reset()
    driver.record(True)
    yield
    assert driver.complaint() == ""
    driver.reset()


class Runner(NativeRunner):
    """On the CPU, which is the stand-in's device."""

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros: the stand-in also takes into its digests what launches are about to write."""
        return super()._empty(shape, dtype).zero_()


def open_native(
    driver: standin.Standin, folder: Path, family: str, dtype: torch.dtype = torch.float16
) -> NativeRunner:
    spec = None if family == "text" else VISION[family]
    text = TEXT if family == "text" else None
    _, reference = open_runner(folder, spec, text, HEADS.get(family), dtype)
    return Runner(reference.weights, dtype, CPU, str(driver.path))


# -- what was launched, against the operators' own calls -------------------------------------------


@dataclass
class Expected:
    """The calls of a plan at the very sizes of a run, and where their tensors should be."""

    plan: Plan
    runner: NativeRunner
    lengths: Sequence[int]
    pixels: Tensor | None = None

    def calls(self) -> Iterator[tuple[Call, Mapping[int, str]]]:
        meta = self.runner.weights.to(torch.device("meta"))
        compute = str(self.runner.dtype).removeprefix("torch.")
        inputs = {} if self.pixels is None else {"pixels": self.pixels.to("meta")}
        for launch, tensors, scalars in self.plan.bind(self.lengths, compute, inputs, meta.tensors):
            names = dict((*launch.buffers, *launch.weights))
            for call in OPERATORS[launch.op].calls(Target(90, SMS), **tensors, **scalars):
                if call.grid.blocks:
                    yield call, {id(t): names[name] for name, t in tensors.items()}


class Places:
    """Addresses by name: weights and inputs are known, and each slot of the arena is one place."""

    def __init__(self, runner: NativeRunner, plan: Plan, known: Mapping[str, Tensor]) -> None:
        weights = runner.weights.tensors.items()
        self.at = {name: t.data_ptr() for name, t in (*weights, *known.items())}
        self.slots = {buffer.name: buffer.slot for buffer in plan.buffers}
        self.slot_at: dict[int, int] = {}

    def check(self, name: str, address: int) -> None:
        slot = self.slots.get(name)
        if slot is not None:
            assert self.slot_at.setdefault(slot, address) == address, name
        else:
            assert self.at.setdefault(name, address) == address, name

    def apart(self, sizes: Sequence[int]) -> None:
        """The slots that were used do not overlap."""
        spans = sorted((at, at + sizes[slot]) for slot, at in self.slot_at.items())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def check_launch(
    launch: standin.Launch, call: Call, names: Mapping[int, str], places: Places
) -> None:
    kernel = compile_kernel(call, 90)
    assert launch.name == kernel.metadata.name
    assert launch.grid == (call.grid.blocks, 1, 1)
    assert launch.block == (32 * call.config.warps, 1, 1)
    assert launch.shared == kernel.metadata.shared
    blocks = min(32, 2048 // (32 * call.config.warps))  # as many as its threads allow
    asked = math.ceil(100 * blocks * (launch.shared + 1024) / 233_472)
    assert launch.carveout == (min(100, asked) if launch.shared else -1)
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    source, _, _ = source_of(call, 90)
    parameters = list(launch.parameters)
    boxes = list(kernel.metadata.tensordesc_meta or ())
    for name, type_name in source.signature.items():
        if type_name == "constexpr":
            continue
        value: Any = call.arguments[name]
        parameter = parameters.pop(0)
        if type_name.startswith("tensordesc"):
            assert parameter.map is not None, name
            box = boxes.pop(0)
            places.check(names[id(value.base)], parameter.map.base)
            rows, columns = value.shape
            assert parameter.map.dims[0] == columns, name
            assert rows <= parameter.map.dims[1] <= rows * 9 / 8 + 1, name
            assert parameter.map.strides == (columns * value.base.element_size(),)
            assert parameter.map.box == tuple(reversed(box["block_size"]))
            assert parameter.map.swizzle == box["swizzle"]
            assert parameter.map.type == TMA_DTYPE_DEVICE_TO_HOST[box["elem_type"]]
            shape = [parameters.pop(0) for _ in range(4)]
            assert [number.size for number in shape] == [4, 4, 8, 8]
            assert [number.value for number in shape] == [rows, columns, columns, 1]
        elif type_name.startswith("*"):
            places.check(names[id(value)], parameter.value)
        elif type_name == "fp32":
            assert parameter.raw == struct.pack("<f", value), name
        else:
            assert (parameter.size, parameter.value) == ({"i32": 4, "i64": 8}[type_name], value), (
                name
            )
    assert [number.value for number in parameters] == [0, 0]  # scratch


def check_run(
    driver: standin.Standin,
    runner: NativeRunner,
    plan: Plan,
    lengths: Sequence[int],
    tensors: Mapping[str, Tensor],
) -> set[tuple[str, int]]:
    """Every launch since the last reset but that of a position table; returns the kernels by name
    and block's bytes."""
    expected = list(Expected(plan, runner, lengths, tensors.get("pixels")).calls())
    launched = [launch for launch in driver.launched() if launch.name != POSITION]
    assert len(launched) == len(expected)
    places = Places(runner, plan, tensors)
    for launch, (call, names) in zip(launched, expected, strict=True):
        check_launch(launch, call, names, places)
    places.apart(plan.slot_bytes(len(lengths), sum(lengths), 2))
    driver.reset()
    driver.record(True)
    return {(launch.name, launch.shared) for launch in launched}


@pytest.mark.parametrize(
    ("family", "pixel_formats"),
    [
        pytest.param("vit", ("uint8", "float"), id="vit"),
        pytest.param("clip", ("uint8",), id="clip"),
        pytest.param("dinov2", ("uint8",), id="dinov2"),
        pytest.param("clip", ("float",), id="clip-float", marks=pytest.mark.slow),
        pytest.param("dinov2", ("float",), id="dinov2-float", marks=pytest.mark.slow),
    ],
)
def test_every_launch_of_an_image_plan_is_the_operators_own(
    driver: standin.Standin, tmp_path: Path, family: str, pixel_formats: tuple[str, ...]
) -> None:
    runner, spec, head = open_native(driver, tmp_path, family), VISION[family], HEADS.get(family)
    tokens = spec.tokens_at(spec.image)
    seen: dict[int, set[tuple[str, int]]] = {}
    for pixel_format in pixel_formats:
        uint8 = pixel_format == "uint8"
        walked = [
            vision_pooled(spec, uint8=uint8),
            vision_dense(spec, head, uint8=uint8, taps=(0, 1)),
        ]
        if head is not None:
            walked.append(vision_scores(spec, head, uint8=uint8))
        for batch in (1, 3, 40):
            pixels = images(batch, spec.image)
            if not uint8:
                pixels = normalized(pixels).float().contiguous()
            for plan in walked:
                out = see(runner, spec, plan, pixels)
                known = {"pixels": pixels, **out}
                found = check_run(driver, runner, plan, [tokens] * batch, known)
                seen.setdefault(batch, set()).update(found)
    assert seen[1] != seen[40], "one step of the tables of configurations served all batches"


@pytest.mark.parametrize(
    "lengths",
    [[1], [5, 9, 24, 3], [24] * 40, [7, 1] * 50],
    ids=lambda lengths: f"{len(lengths)}x{max(lengths)}",
)
def test_every_launch_of_a_text_plan_is_the_operators_own(
    driver: standin.Standin, text: NativeRunner, lengths: list[int]
) -> None:
    plan = text_pooled(TEXT)
    out = read(text, plan, ids_of(lengths), [n - 1 for n in lengths])
    check_run(driver, text, plan, lengths, out)


def test_one_program_serves_every_batch(driver: standin.Standin, text: NativeRunner) -> None:
    plan = text_pooled(TEXT)
    for lengths in ([3], [9, 2], [24] * 7):
        read(text, plan, ids_of(lengths), [n - 1 for n in lengths])
    assert [cached.plan for cached in text._plans.values()] == [plan]


def test_other_sizes_and_kinds_of_pixels_are_other_plans(
    driver: standin.Standin, tmp_path: Path
) -> None:
    runner, spec = open_native(driver, tmp_path, "clip"), VISION["clip"]
    plan = vision_pooled(spec, uint8=True)
    for size in ((28, 28), (21, 35), (30, 29)):  # the last with pixels left over at its edges
        pixels = images(2, size)
        out = see(runner, spec, plan, pixels)
        lengths = [spec.tokens_at(size)] * 2
        check_run(driver, runner, plan, lengths, {"pixels": pixels, **out})
    assert len(runner._plans) == 3
    plan = vision_pooled(spec, uint8=False)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        pixels = normalized(images(2, (28, 28))).to(dtype).contiguous()
        out = see(runner, spec, plan, pixels)
        lengths = [spec.tokens_at((28, 28))] * 2
        check_run(driver, runner, plan, lengths, {"pixels": pixels, **out})
    assert len(runner._plans) == 6


def test_a_position_table_is_one_launch_and_leaves_no_program(
    driver: standin.Standin, tmp_path: Path
) -> None:
    runner, spec = open_native(driver, tmp_path, "clip"), VISION["clip"]
    for target, kind in itertools.product([spec.grid, (2, 7)], ["uint8", "float"]):
        table = runner.position_table(spec, target, kind)
        assert runner.position_table(spec, target, kind) is table
        assert table.shape == (spec.prefix + target[0] * target[1], spec.blocks.width)
        [launched] = driver.launched()
        plan = vision_table(spec, target, uint8=kind == "uint8")
        [(call, names)] = Expected(plan, runner, [1]).calls()
        check_launch(launched, call, names, Places(runner, plan, {"vision.table": table}))
        driver.reset()
        driver.record(True)
    assert not runner._plans


def test_a_position_table_whose_launch_fails_is_a_device_error(
    driver: standin.Standin, tmp_path: Path
) -> None:
    runner, spec = open_native(driver, tmp_path, "clip"), VISION["clip"]
    driver.fail_launch(1, 701)
    with pytest.raises(DeviceError, match=r"^vision.table on cpu: vision.position: cuLaunchKernel"):
        runner.position_table(spec, spec.grid, "float")
    driver.reset()
    assert runner.position_table(spec, spec.grid, "float").numel()


def test_pixels_at_an_odd_address_are_moved(driver: standin.Standin, tmp_path: Path) -> None:
    runner, spec = open_native(driver, tmp_path, "clip"), VISION["clip"]
    plan = vision_pooled(spec, uint8=True)
    pixels = images(3, spec.image)
    aligned = see(runner, spec, plan, pixels)["vision.embedding"]
    room = torch.empty(pixels.numel() + 1, dtype=torch.uint8)
    moved = room[1:].view(pixels.shape).copy_(pixels)
    assert moved.data_ptr() % 16 != 0
    again = see(runner, spec, plan, moved)["vision.embedding"]
    assert digest(aligned) == digest(again)


# -- results that follow from the inputs, by the digests that the stand-in computes ----------------


def ids_of(lengths: Sequence[int]) -> list[Tensor]:
    return [torch.randint(1, TEXT.vocab - 1, (n,)) for n in lengths]


def digest(embedding: Tensor) -> int:
    """What the last launch left in its output: it follows from all that was launched."""
    return int(embedding.view(torch.int64).flatten()[0])


@pytest.fixture
def text(driver: standin.Standin, tmp_path: Path) -> NativeRunner:
    return open_native(driver, tmp_path, "text")


def test_a_result_follows_from_inputs_weights_and_sizes(
    driver: standin.Standin, text: NativeRunner
) -> None:
    plan = text_pooled(TEXT)
    texts, other_texts = ids_of([5, 9]), ids_of([5, 9])
    other_texts[0][:2] = texts[0][:2] + 1

    def result(ids: list[Tensor]) -> int:
        return digest(read(text, plan, ids, [len(row) - 1 for row in ids])["text.embedding"])

    expected = result(texts)
    assert result(texts) == expected
    assert result(other_texts) != expected
    assert result([*texts, texts[0]]) != expected
    text.weights["text.position"].view(-1)[:2] += 1
    assert result(texts) != expected


def test_threads_in_flight_at_once_get_what_each_gets_alone(
    driver: standin.Standin, text: NativeRunner
) -> None:
    # two sequences or more: a digest takes in 8 bytes, and one row number has 4
    plan, several = text_pooled(TEXT), [[3, 3], [9, 2], [24] * 7, [5, 5, 20]]
    driver.record(False)
    batches = [ids_of(lengths) for lengths in several]

    def result(ids: list[Tensor]) -> int:
        return digest(read(text, plan, ids, [len(row) - 1 for row in ids])["text.embedding"])

    alone = [result(ids) for ids in batches]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(result, batches * 50))
    assert results == alone * 50


def test_every_call_is_in_its_own_arena(
    driver: standin.Standin, text: NativeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More arenas than parameters are kept packed for, none of them given back; then the first."""
    plan, ids, empty = text_pooled(TEXT), ids_of([5, 9]), text._empty
    arenas: list[Tensor] = []
    again: list[Tensor] = []

    def kept(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if dtype != torch.uint8:
            return empty(shape, dtype)
        arenas.append(again[0] if again else empty(shape, dtype))
        return arenas[-1]

    monkeypatch.setattr(text, "_empty", kept)
    for number in range(24):
        if number == 20:
            again = arenas[:1]
        driver.reset()
        driver.record(True)
        read(text, plan, ids, [4, 8])
        size = arenas[-1].numel()
        starts = {arena.data_ptr() for arena in arenas}
        used = {
            start
            for launch in driver.launched()
            for parameter in launch.parameters
            for start in starts
            if 0 <= (parameter.map.base if parameter.map else parameter.value) - start < size
        }
        assert used == {arenas[-1].data_ptr()}, f"call {number}"


def test_no_sequences_launch_nothing(driver: standin.Standin, text: NativeRunner) -> None:
    out = read(text, text_pooled(TEXT), [], [])
    assert out["text.embedding"].shape == (0, TEXT.embedding)
    assert driver.launched() == []


# -- faults ----------------------------------------------------------------------------------------

STICKY = 719  # CUDA_ERROR_LAUNCH_FAILED


def test_a_failed_launch_is_named_and_the_runner_works_afterwards(
    driver: standin.Standin, text: NativeRunner
) -> None:
    plan, ids = text_pooled(TEXT), ids_of([5, 9])
    expected = digest(read(text, plan, ids, [4, 8])["text.embedding"])
    names = [launch.label for launch in plan.steps]
    for number, name in enumerate(names, 1):
        driver.fail_launch(number, 701)  # CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: not sticky
        with pytest.raises(DeviceError, match=f"^text.pooled on cpu: {name}: cuLaunchKernelEx"):
            read(text, plan, ids, [4, 8])
        assert digest(read(text, plan, ids, [4, 8])["text.embedding"]) == expected


def test_a_lost_device_is_an_error_every_time(driver: standin.Standin, text: NativeRunner) -> None:
    plan, ids = text_pooled(TEXT), ids_of([5, 9])
    expected = digest(read(text, plan, ids, [4, 8])["text.embedding"])
    driver.fail_launch(3, STICKY)
    for _ in range(3):
        with pytest.raises(DeviceError, match="CUDA_ERROR_LAUNCH_FAILED"):
            read(text, plan, ids, [4, 8])
    driver.reset()
    assert digest(read(text, plan, ids, [4, 8])["text.embedding"]) == expected


def test_any_call_that_fails_is_a_typed_error(
    driver: standin.Standin, text: NativeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first forward, kernels loaded and all, with each of its driver's calls failing in turn."""
    plan, ids = text_pooled(TEXT), ids_of([5, 9])
    program = native.lower(plan, text.target, text.dtype, text.weights)
    monkeypatch.setattr(native, "lower", lambda *_: program)  # made once: it asks no driver
    expected = digest(read(text, plan, ids, [4, 8])["text.embedding"])

    def forward() -> int:
        fresh = Runner(text.weights, text.dtype, CPU, str(driver.path))
        before = driver.calls()
        assert digest(read(fresh, plan, ids, [4, 8])["text.embedding"]) == expected
        return driver.calls() - before

    calls, kinds, unnoticed, kept = forward(), set(), 0, []
    assert calls > 5 * len(plan.steps)
    for number in range(1, calls + 1):
        code = (2, 46, 209, 701, 999)[number % 5]
        runner = Runner(text.weights, text.dtype, CPU, str(driver.path))
        kept.append(runner)  # none is taken apart while the next one's calls are counted
        driver.fail(number, code)
        try:
            assert digest(read(runner, plan, ids, [4, 8])["text.embedding"]) == expected
            unnoticed += 1  # the context's way back, which has no more to give
        except DeviceError as error:
            kinds.add((code, type(error)))
        driver.reset()
        assert digest(read(runner, plan, ids, [4, 8])["text.embedding"]) == expected
    assert unnoticed <= len(plan.steps) + 1
    assert kinds == {
        (code, OutOfMemoryError if code == 2 else DeviceError) for code in (2, 46, 209, 701, 999)
    }


def test_a_driver_that_is_not_there_is_said(tmp_path: Path) -> None:
    _, reference = open_runner(tmp_path, None, TEXT, None, torch.float16)
    with pytest.raises(DeviceError, match="no-such-driver"):
        NativeRunner(reference.weights, torch.float16, CPU, "no-such-driver.so")
