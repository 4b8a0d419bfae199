"""libvitrail on emulated devices: what it embeds and classifies is what Python gives, and that is
as near to transformers as PyTorch in the same dtype."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import emulator
import standin
import vitrail
from csrc.test_library import OK, Library, build
from emulated.device import Device, EmulatedRunner, served_by
from emulated.exports import ARCHITECTURES, SIDE, Export, export
from helpers import assert_close, image_embedding, text_embedding
from kernels.test_operators import same_bits
from vitrail.plan.text import text_pooled
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.runtime.towers import VisionTower

pytestmark = pytest.mark.filterwarnings("ignore:.* not verified on your data:UserWarning")

EXPORTS = [
    pytest.param(("clip", "float16"), id="clip-float16"),
    *(
        pytest.param((family, dtype), id=f"{family}-{dtype}", marks=pytest.mark.slow)
        for family in ("clip", "vit", "deit", "dinov2")
        for dtype in ("float16", "bfloat16", "int8")
        if (family, dtype) != ("clip", "float16")
    ),
]
ITEMS = 12
SCHEDULES = 20


@pytest.fixture(scope="session", params=EXPORTS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Export]:
    family, dtype = request.param
    with pytest.MonkeyPatch.context() as patch:
        yield export(family, dtype, tmp_path_factory.mktemp("export"), patch)


@pytest.fixture
def python(device: Device, exported: Export) -> Iterator[vitrail.Model]:
    """The exported folder as Python serves it, by the C++ executor on ``device``."""
    runners: list[EmulatedRunner] = []

    def open_runner(weights: Any, dtype: torch.dtype, exported: Any) -> EmulatedRunner:
        runners.append(EmulatedRunner(device, weights, dtype, exported))
        return runners[-1]

    exported.open(device)
    with served_by(open_runner, device.target):
        yield vitrail.load(exported.folder)
    for runner in runners:
        runner.close()


class Session:
    """A session of libvitrail, and its functions over arrays."""

    def __init__(self, device: Device, export: Export, overlap: bool) -> None:
        export.open(device)
        self.overlap = overlap
        self.library = Library(build("csrc") / "libvitrail.so", device.driver.path)
        code, model = self.library.load(export.folder, overlap=overlap)
        assert code == OK, self.library.error
        self.handle = ctypes.c_void_p()
        assert self.library.c.vitrail_session_create(model, ctypes.byref(self.handle)) == OK
        self.library.free(model)

    def close(self) -> None:
        self.library.c.vitrail_session_free(self.handle)

    def __call__(self, name: str, width: int, count: int, *arguments: Any) -> Tensor:
        """Numbers (``count``, ``width``) of a function that takes ``arguments`` first."""
        out, status = torch.empty(count, width), torch.empty(count, dtype=torch.int32)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (out, status)]
        code = getattr(self.library.c, f"vitrail_{name}")(self.handle, *arguments, *pointers)
        assert code == OK, f"{self.library.error}; {self.library.driver.complaint()}"
        assert not status.any()
        return out

    def images(self, name: str, width: int, pixels: Tensor) -> Tensor:
        count = ctypes.c_size_t(len(pixels))
        return self(name, width, len(pixels), ctypes.c_void_p(pixels.data_ptr()), count)

    def texts(self, width: int, ids: Tensor, lengths: Tensor) -> Tensor:
        stride, count = ctypes.c_size_t(ids.shape[1]), ctypes.c_size_t(len(ids))
        rows, sizes = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (ids, lengths))
        return self("embed_text", width, len(ids), rows, stride, sizes, count)


@pytest.fixture(params=[False, True], ids=["in turn", "overlapped"])
def session(
    request: pytest.FixtureRequest, device: Device, exported: Export
) -> Iterator[Callable[..., Session]]:
    """Opens sessions; memory that their launches read must have been written if ``track``."""
    opened: list[Session] = []

    def open_session(track: bool = True) -> Session:
        device.emulation.schedule(1 + request.param, overlap=request.param)
        device.emulation.track(track)
        opened.append(Session(device, exported, request.param))
        return opened[-1]

    yield open_session
    for one in opened:
        one.close()
    device.emulation.track(False)
    live = device.driver.live()
    assert (live.allocations, live.pinned, live.streams) == (0, 0, 0)


def check_images(name: str, ours: Tensor, theirs: Any, pixels: Tensor, dtype: torch.dtype) -> None:
    """``ours`` beside transformers in fp32, and in ``dtype``."""

    def of(model: Any, given: Tensor) -> Tensor:
        if name == "embedding":
            return image_embedding(model, given)
        with torch.no_grad():
            return model(given).logits

    reference = of(theirs, pixels)
    peer = of(theirs.to(dtype), pixels.to(dtype))
    theirs.float()
    what = "model" if name == "embedding" else "scores"
    assert_close(ours, reference, peer, what=what, name=name)  # type: ignore[arg-type]


def check_int8_images(
    name: str, ours: Tensor, python: vitrail.Model, served: vitrail.Model, pixels: Tensor
) -> None:
    """``ours`` beside the int8 folder on the CPU, in fp32, and by the torch runner in fp16. Codes
    that round the other way are the error, so its cosine tells about int8."""
    vision, weights = python.spec.vision, python._vision.runner.weights  # type: ignore[union-attr]
    assert vision is not None
    assert vision.blocks.int8
    runner = TorchRunner(weights, torch.float16, torch.device("cpu"))
    tower = VisionTower(vision, python.spec.head, runner)
    if name == "embed":
        reference, peer = served.encode_image(pixels), tower.embeddings(pixels)["vision.embedding"]
    else:
        reference, peer = served.classify(pixels).logits, tower.scores(pixels)
    assert_close(ours, reference, peer.half(), what="scores", name=name)


def test_images_are_what_python_makes_of_them(
    python: vitrail.Model, session: Callable[..., Session], exported: Export
) -> None:
    vision = python.spec.vision
    assert vision is not None
    library = session()
    bytes_ = torch.randint(256, (ITEMS, SIDE, SIDE, 3), dtype=torch.uint8)
    floats = torch.randn(ITEMS, 3, SIDE, SIDE)
    dtype = python._vision.runner.dtype  # type: ignore[union-attr]
    functions = [("embed", vision.embedding, python.encode_image)]
    if (head := python.spec.head) is not None:
        functions.append(("classify", len(head.labels), lambda x: python.classify(x).logits))
    for name, width, own in functions:
        for kind, pixels in (("uint8", bytes_), ("float", floats)):
            ours = library.images(f"{name}_{kind}", width, pixels)
            assert same_bits(ours, own(pixels)), f"{name}_{kind}"
        # of floats, which transformers takes too
        if exported.int8 is None:
            label = "embedding" if name == "embed" else "logits"
            check_images(label, ours, exported.theirs, floats, dtype)
        else:
            check_int8_images(name, ours, python, exported.int8, floats)


def test_texts_are_what_python_makes_of_them(
    python: vitrail.Model, session: Callable[..., Session], exported: Export
) -> None:
    if (text := python.spec.text) is None:
        pytest.skip("an image tower alone")
    # tensor maps reach rows past the texts', which nobody wrote
    library = session(track=False)
    lengths = torch.tensor([3 + 3 * i for i in range(ITEMS)], dtype=torch.int32)
    ids = torch.randint(3, text.vocab - 1, (ITEMS, text.context), dtype=torch.int32)
    for row, n in zip(ids, lengths.tolist(), strict=True):
        row[n - 1 :] = text.vocab - 1  # the highest id ends a text
    ours = library.texts(text.embedding, ids, lengths)
    assert same_bits(ours, python.encode_text(ids))
    reference = text_embedding(exported.theirs, ids.long())
    dtype = python._text.runner.dtype  # type: ignore[union-attr]
    peer = text_embedding(exported.theirs.to(dtype), ids.long())
    exported.theirs.float()
    assert_close(ours, reference, peer, what="model", name="text embedding")


LIMITS = (1, 3)
"""How many images a memory limit holds."""


def test_a_memory_limit_changes_no_bit_of_python(python: vitrail.Model) -> None:
    """Images and texts, through the encoders and through the towers that modules call."""
    tower, pixels = python._vision, torch.randint(256, (ITEMS, SIDE, SIDE, 3), dtype=torch.uint8)
    assert tower is not None
    floats = torch.randn(ITEMS, 3, SIDE, SIDE)
    budget, ids = tower.runner.budget, None
    if (text := python.spec.text) is not None:
        ids = torch.randint(3, text.vocab - 1, (ITEMS, text.context), dtype=torch.int32)
        for number, row in enumerate(ids):
            row[5 + 3 * number :] = text.vocab - 1

    def compute() -> list[Tensor]:
        outputs = [python.encode_image(pixels), python.encode_image(floats)]
        outputs += tower.embeddings(floats).values()
        if ids is not None:
            outputs.append(python.encode_text(ids))
        return outputs

    batches, run = list[int](), tower.runner.run

    def counting(plan: Any, inputs: Any, *, batch: int, tokens: int, longest: int) -> Any:
        batches.append(batch)
        return run(plan, inputs, batch=batch, tokens=tokens, longest=longest)

    tower.runner.run = counting  # type: ignore[method-assign]
    whole = compute()
    assert max(batches) == ITEMS
    for items in LIMITS:
        batches.clear()
        call = tower.call(tower.pooled_plan(uint8=False), (SIDE, SIDE), 4 * 3 * SIDE * SIDE)
        budget.limit = call.nbytes(items)
        if ids is not None:
            assert python._text is not None
            plan = text_pooled(python._text.spec)
            one_text = python._text._footprint.text_call(plan, ids.shape[1]).nbytes(1)
            budget.limit = max(budget.limit, one_text)
        for ours, theirs in zip(compute(), whole, strict=True):
            assert same_bits(ours, theirs), items
        assert 1 <= max(batches) < ITEMS
    budget.limit = None


def test_a_memory_limit_changes_no_bit_of_libvitrail(
    python: vitrail.Model, session: Callable[..., Session], device: Device
) -> None:
    """And the driver's memory stays under it; after a trim there are the weights alone."""
    vision, library = python.spec.vision, session(track=False)
    assert vision is not None
    c, driver = library.library.c, device.driver
    for function in (c.vitrail_session_memory, c.vitrail_session_trim):
        function.restype = ctypes.c_size_t
    pixels = torch.randint(256, (ITEMS, SIDE, SIDE, 3), dtype=torch.uint8)
    weights = driver.live().bytes
    whole = library.images("embed_uint8", vision.embedding, pixels)
    assert same_bits(whole, python.encode_image(pixels))
    for items in LIMITS:
        c.vitrail_session_trim(library.handle)
        assert driver.live().bytes == weights
        library.images("embed_uint8", vision.embedding, pixels[:items])
        limit = c.vitrail_session_memory(library.handle)
        assert limit == driver.live().bytes - weights
        assert c.vitrail_session_limit(library.handle, ctypes.c_size_t(limit)) == OK
        driver.peak()
        launches = driver.launches()
        cut = library.images("embed_uint8", vision.embedding, pixels)
        assert same_bits(cut, whole), items
        assert driver.peak() <= weights + limit
        parts = driver.launches() - launches
        assert c.vitrail_session_limit(library.handle, ctypes.c_size_t(0)) == OK
        launches = driver.launches()
        library.images("embed_uint8", vision.embedding, pixels)
        assert parts == -(-ITEMS // items) * (driver.launches() - launches)
    freed = c.vitrail_session_memory(library.handle)
    assert c.vitrail_session_trim(library.handle) == freed
    assert driver.live().bytes == weights
    assert same_bits(library.images("embed_uint8", vision.embedding, pixels), whole)


@pytest.mark.slow
def test_every_schedule_gives_the_same_bits(
    python: vitrail.Model, session: Callable[..., Session], device: Device
) -> None:
    """Images, and texts if there are any, in the order of warps of each seed."""
    vision, text = python.spec.vision, python.spec.text
    assert vision is not None
    pixels = torch.randint(256, (ITEMS, SIDE, SIDE, 3), dtype=torch.uint8)
    images = python.encode_image(pixels)
    library = session(track=False)
    for seed in range(SCHEDULES):
        device.emulation.schedule(seed, overlap=library.overlap)
        ours = library.images("embed_uint8", vision.embedding, pixels)
        assert same_bits(ours, images), f"images, seed {seed}"
    if text is None:
        return
    ids = torch.randint(3, text.vocab - 1, (ITEMS, text.context), dtype=torch.int32)
    ids[:, 9] = text.vocab - 1  # the highest id ends a text
    texts = python.encode_text(ids)
    lengths = torch.full((ITEMS,), 10, dtype=torch.int32)
    for seed in range(SCHEDULES):
        device.emulation.schedule(seed, overlap=library.overlap)
        assert same_bits(library.texts(text.embedding, ids, lengths), texts), f"texts, seed {seed}"


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
def test_the_example_prints_pythons_own_embedding(
    python: vitrail.Model, device: Device, exported: Export, tmp_path: Path, overlap: bool
) -> None:
    """Another process, told by its environment what the kernels were made of."""
    pixels = torch.randint(256, (3, SIDE, SIDE, 3), dtype=torch.uint8)
    files: Sequence[Path] = [tmp_path / f"{number}.ppm" for number in range(len(pixels))]
    for file, picture in zip(files, pixels.numpy(), strict=True):
        file.write_bytes(f"P6\n{SIDE} {SIDE}\n255\n".encode() + picture.tobytes())
    for kernel in exported.kernels.iterdir():
        (tmp_path / kernel.name).symlink_to(kernel)
    (tmp_path / "emulator.so").symlink_to(emulator.build())
    told = {"STANDIN_EMULATION": tmp_path, "STANDIN_ARCH": device.arch, "STANDIN_SEED": 3}
    told |= {"STANDIN_OVERLAP": int(overlap)}
    env = {**os.environ, **{name: str(value) for name, value in told.items()}}
    command = [build("examples/cpp") / "embed", "--driver", standin.build(), exported.folder]
    run = subprocess.run([*command, *files], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{exported.folder} on stand-in sm_{device.arch}")
    expected = python.encode_image(pixels)
    printed = re.findall(r"^\S+\.ppm: (.*) \.\.\. similarity", run.stdout, re.M)
    assert printed == [" ".join(f"{x:8.5f}" for x in row) for row in expected[:, :3].tolist()]
    assert np.unique(expected.numpy(), axis=0).shape == (3, expected.shape[1])


def test_both_architectures_were_exported(exported: Export) -> None:
    folders = {path.name for path in exported.folder.glob("sm_*")}
    assert folders == {f"sm_{arch}" for arch in ARCHITECTURES}
