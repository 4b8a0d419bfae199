"""CUDA binaries through `vitrail._C`, and the native runner's resize, on a driver stand-in."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import standin
from image.samples import CLIP
from model.test_crops import ENOUGH, crop_tasks
from runtime.test_runner import CPU, VISION, open_runner
from standin.calls import cubin
from vitrail.errors import DeviceError, InputError, OutOfMemoryError
from vitrail.model.crops import PackedImages, device_batch, pack, resized
from vitrail.runtime import cuda_resize, native
from vitrail.runtime.native import NativeRunner
from vitrail.runtime.triton import TritonRunner
from vitrail.tools import info
from vitrail.weights.layout import Weights
from vitrail_kernels import OPERATORS
from vitrail_kernels import cuda_binary as built
from vitrail_kernels.compile import compile_kernel, source_of
from vitrail_kernels.cuda_binary import CudaBinary
from vitrail_kernels.launch import Target
from vitrail_kernels.ops.resize_tables import FIELDS

CSRC = Path(__file__).parents[2] / "csrc"
KERNELS = {cuda_resize.ACROSS: [8] * 5 + [4] * 3, cuda_resize.DOWN: [8] * 4 + [4] * 3}

pytestmark = pytest.mark.skipif(
    native.MISSING is not None or not standin.compiler(),
    reason="CUDA binaries: needs vitrail._C and a C++ compiler",
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> standin.Standin:
    return standin.own(tmp_path_factory.mktemp("driver"), 2)


@pytest.fixture(autouse=True)
def recorded(driver: standin.Standin) -> Iterator[None]:
    gc.collect()  # runners that are done unload their kernels now
    driver.reset()
    driver.record(True)
    yield
    driver.reset()


@pytest.fixture
def gpu(driver: standin.Standin) -> Any:
    from vitrail import _C

    return _C.Gpu(str(driver.path), 0)


def load(gpu: Any, code: bytes) -> Any:
    from vitrail import _C

    return _C.CudaBinary(gpu, code)


# -- the binding -----------------------------------------------------------------------------------


def test_a_launch_is_what_was_asked_for(driver: standin.Standin, gpu: Any) -> None:
    image = load(gpu, cubin({"kernel": [8, 4, 1, 2], "other": []}))
    room = torch.zeros(4, dtype=torch.int64)
    arguments = [(room.data_ptr(), 8), (-7, 4), (100, 1), (-300, 2)]
    image.launch("kernel", 5, (32, 4), arguments, 0, True)
    image.launch("other", 1, (1, 1), [], 0, False)
    first, second = driver.launched()
    assert (first.name, first.grid, first.block, first.pdl) == ("kernel", (5, 1, 1), (32, 4, 1), 1)
    signed = [int.from_bytes(one.raw, "little", signed=True) for one in first.parameters]
    assert signed == [room.data_ptr(), -7, 100, -300]
    assert (second.name, second.grid, second.block) == ("other", (1, 1, 1), (1, 1, 1))
    assert (second.parameters, second.pdl) == ((), False)
    assert driver.complaint() == ""


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arguments": [(0, 8)]}, "kernel: parameters: got 1, wanted 2"),
        ({"arguments": [(0, 8), (1, 8)]}, "kernel: parameter 1: bytes: got 8, wanted 4"),
        ({"arguments": [(0, 8), (1 << 31, 4)]}, "parameter 1: got 2147483648, wanted an integer"),
        ({"arguments": [(0, 8), (-(1 << 31) - 1, 4)]}, "parameter 1: got -2147483649, wanted an"),
        ({"blocks": -1}, "kernel: blocks: got -1, wanted 0 to 2"),
        ({"blocks": 1 << 31}, "kernel: blocks: got 2147483648, wanted 0 to 2"),
        ({"threads": (0, 1)}, "kernel: threads: got 0, wanted 1 to 1024"),
        ({"threads": (1024, 2)}, "kernel: threads: got 2048, wanted 1 to 1024"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused_before_the_driver_sees_it(
    driver: standin.Standin, gpu: Any, changed: dict[str, Any], message: str
) -> None:
    image = load(gpu, cubin({"kernel": [8, 4]}))
    given = {"blocks": 1, "threads": (32, 1), "arguments": [(0, 8), (1, 4)]} | changed
    with pytest.raises(ValueError, match=message):
        image.launch("kernel", *given.values(), 0, False)
    assert (driver.launched(), driver.complaint()) == ([], "")


def test_no_blocks_launch_nothing_and_are_checked(driver: standin.Standin, gpu: Any) -> None:
    from vitrail import _C

    image = load(gpu, cubin({"kernel": [4]}))
    image.launch("kernel", 0, (1, 1), [(5, 4)], 0, False)
    assert driver.launched() == []
    with pytest.raises(ValueError, match="wanted 4"):
        image.launch("kernel", 0, (1, 1), [(5, 8)], 0, False)
    with pytest.raises(
        _C.DriverError, match=r"^nothing: cuModuleGetFunction: CUDA_ERROR_NOT_FOUND"
    ):
        image.launch("nothing", 0, (1, 1), [(5, 4)], 0, False)


def test_code_that_is_no_image_or_cut_short_never_reaches_the_driver(
    driver: standin.Standin, gpu: Any
) -> None:
    fatbin = b"\x50\xed\x55\xba\x01\x00\x10\x00" + (200).to_bytes(8, "little") + bytes(200)
    before = driver.calls()
    for code in (b"", bytes(100), b".version 8.0\n" * 9, cubin({"kernel": []})[:60]):
        with pytest.raises(
            ValueError, match=r"CUDA binary: got .* bytes, wanted a fatbin or a cubin"
        ):
            load(gpu, code)
    with pytest.raises(ValueError, match="got 215 bytes, wanted all of a fatbin of 216"):
        load(gpu, fatbin[:-1])
    assert driver.calls() == before


def test_an_image_that_the_driver_has_no_use_for_is_its_error(
    driver: standin.Standin, gpu: Any
) -> None:
    from vitrail import _C

    fatbin = b"\x50\xed\x55\xba\x01\x00\x10\x00" + (200).to_bytes(8, "little") + bytes(200)
    for code, wanted in ((fatbin, 200), (cubin({"kernel": []}, 80), 209)):
        with pytest.raises(_C.DriverError, match=r"^CUDA binary: cuModuleLoadData: ") as caught:
            load(gpu, code)
        assert caught.value.code == wanted
    assert driver.live().modules == 0


def test_an_image_is_unloaded_with_its_owner(driver: standin.Standin, gpu: Any) -> None:
    image = load(gpu, cubin({"kernel": []}))
    assert driver.live().modules == 1
    del image
    assert driver.live().modules == 0


@pytest.fixture
def capturing(driver: standin.Standin) -> Iterator[None]:
    driver.capturing(True)
    yield
    driver.capturing(False)


@pytest.mark.usefixtures("capturing")
def test_an_image_loads_and_goes_while_another_thread_captures_a_graph(
    driver: standin.Standin, gpu: Any
) -> None:
    image = load(gpu, cubin({"kernel": [4]}))
    image.launch("kernel", 1, (1, 1), [(5, 4)], 0, False)
    del image
    assert (driver.live().modules, driver.complaint()) == (0, "")
    mode = ctypes.c_int(0)
    assert driver.driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == 0
    assert mode.value == 0, "wanted the thread's mode as it was"


def test_a_driver_without_capture_modes_serves(tmp_path: Path) -> None:
    name = b"cuThreadExchangeStreamCaptureMode"
    code = standin.build().read_bytes()
    assert name in code
    library = tmp_path / "libcuda.so.1"
    library.write_bytes(code.replace(name, name[:-1] + b"X"))  # not found by its name
    driver = standin.Standin(library)
    driver.record(True)
    image = load(native._C.Gpu(str(library), 0), cubin({"kernel": [4]}))
    image.launch("kernel", 1, (1, 1), [(5, 4)], 0, False)
    assert [one.name for one in driver.launched()] == ["kernel"]
    del image
    assert (driver.live().modules, driver.complaint()) == (0, "")


# -- resize by the native runner -------------------------------------------------------------------


class Runner(NativeRunner):
    """On the CPU, which is the stand-in's device."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = tmp_path_factory.mktemp("clip")
    return open_runner(folder, VISION["clip"], None, None, torch.float16)[1].weights


def runner(driver: standin.Standin, weights: Weights) -> Runner:
    return Runner(weights, torch.float16, CPU, str(driver.path))


def image_of(code: bytes) -> CudaBinary:
    return CudaBinary(code, (90,), None, "13.0")


def serve(monkeypatch: pytest.MonkeyPatch, image: CudaBinary | None) -> None:
    monkeypatch.setattr(
        cuda_resize, "cuda_binary", lambda name: image if name == "resize" else None
    )


def batch(count: int = 3) -> PackedImages:
    """Whose lines are no multiple of 16 bytes."""
    return pack(crop_tasks(count, replace(CLIP, crop=(33, 31))), pinned=False)


def check_launches(launches: list[standin.Launch], packed: PackedImages, out: Tensor) -> None:
    """Grids and blocks by the head of each kernel in resize.cu; addresses by the packed buffer."""
    across, down = launches
    (count, height, width, channels), groups = out.shape, packed.tables.groups.numel()
    numbers, (_, stride) = width * channels, packed.tables.middle
    base = packed.buffer.data_ptr()
    pixels, images, owners, taps = (base + place.start for place in packed.sections)
    assert (across.name, across.block) == ("vitrail_resize_across", (32, 4, 1))
    assert across.grid == (groups * -(-numbers // 32), 1, 1)
    middle, *rest = (one.value for one in across.parameters)
    assert rest == [pixels, images, owners, taps, width, stride, channels]
    assert (down.name, down.block) == ("vitrail_resize_down", (128, 1, 1))
    assert down.grid == (count * -(-height * (stride // 16) // 128), 1, 1)
    values = [one.value for one in down.parameters]
    assert values == [out.data_ptr(), middle, images, taps, height, numbers, stride]


@pytest.mark.parametrize("overlap", [False, True])
def test_the_cuda_kernels_are_launched_on_what_was_packed(
    driver: standin.Standin, weights: Weights, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    monkeypatch.setenv(native.OVERLAP, str(int(overlap)))
    serve(monkeypatch, image_of(cubin(KERNELS)))
    serving, packed = runner(driver, weights), batch()
    assert serving.resizer == "CUDA binary for sm_90 (nvcc 13.0)"
    out = resized(packed, serving)
    launches = driver.launched()
    check_launches(launches, packed, out)
    assert [launch.pdl for launch in launches] == [False, overlap]
    assert driver.complaint() == ""


def nvcc(folder: Path) -> bytes:
    """resize.cu, compiled for the stand-in's architecture alone."""
    home = os.environ.get("CUDA_HOME")
    compiler = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if compiler is None:
        pytest.skip("resize.cu was not compiled: no nvcc in CUDA_HOME or PATH")
    options = ["-std=c++17", "-O3", "-cubin", "-arch=sm_90", "-o", str(folder / "resize.cubin")]
    subprocess.run([compiler, *options, CSRC / "resize.cu"], check=True, timeout=300)
    return (folder / "resize.cubin").read_bytes()


def test_the_kernels_of_resize_cu_take_what_they_are_launched_with(
    driver: standin.Standin, weights: Weights, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve(monkeypatch, image_of(nvcc(tmp_path)))
    serving, packed = runner(driver, weights), batch()
    out = resized(packed, serving)
    check_launches(driver.launched(), packed, out)
    assert driver.complaint() == ""


REFUSALS = {
    "nothing was built": (None, "no CUDA binary was built"),
    "another architecture": (
        cubin(KERNELS, 80),
        r"the driver refuses the CUDA binary for sm_90 \(nvcc 13.0\): CUDA binary: "
        "cuModuleLoadData: CUDA_ERROR_NO_BINARY_FOR_GPU",
    ),
    "an empty fatbin": (
        b"\x50\xed\x55\xba\x01\x00\x10\x00" + bytes(80),
        "the driver refuses the CUDA binary .*: CUDA_ERROR_INVALID_IMAGE",
    ),
}


def check_triton_launches(
    launches: list[standin.Launch], packed: PackedImages, out: Tensor
) -> None:
    """Grids, blocks and integers by the operator's own calls; addresses by the packed buffer."""
    base = packed.buffer.data_ptr()
    places = dict(
        zip(("pixels_ptr", "images_ptr", "groups_ptr", "taps_ptr"), packed.sections, strict=True)
    )
    known = {name: base + place.start for name, place in places.items()}
    known |= {"out_ptr": out.data_ptr(), "middle_ptr": launches[0].parameters[0].value}
    pixels, images, groups, taps = (packed.buffer[place] for place in packed.sections)
    tables = images.view(torch.int64).view(-1, FIELDS), groups.view(torch.int32)
    middle = torch.empty(packed.tables.middle, dtype=torch.uint8)
    calls = OPERATORS["resize"].calls(
        Target(90, 132), out, middle, pixels, *tables, taps.view(torch.int32)
    )
    for launch, call in zip(launches, calls, strict=True):
        assert launch.name == call.kernel.__name__
        assert launch.grid == (call.grid.blocks, 1, 1)
        assert launch.block == (32 * call.config.warps, 1, 1)
        assert launch.shared == compile_kernel(call, 90).metadata.shared
        wanted = []
        for name, kind in source_of(call, 90)[0].signature.items():
            if kind.startswith("*"):
                wanted.append(known[name])
            elif kind != "constexpr":
                wanted.append(call.arguments[name])
        assert [part.value for part in launch.parameters] == [*wanted, 0, 0]


@pytest.mark.parametrize("name", REFUSALS)
def test_triton_serves_where_no_image_does(
    driver: standin.Standin, weights: Weights, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    code, why = REFUSALS[name]
    serve(monkeypatch, None if code is None else image_of(code))
    monkeypatch.setattr(TritonRunner, "_resize", None)  # whose launcher takes a C compiler
    serving, packed = runner(driver, weights), batch()
    for _ in range(2):
        out = resized(packed, serving)
        check_triton_launches(driver.launched(), packed, out)
        driver.reset()
        driver.record(True)
    assert serving.resizer.startswith("Triton kernels, since ")
    assert re.search(why, serving.resizer)
    serve(monkeypatch, image_of(cubin(KERNELS)))
    resized(packed, serving)
    names = {launch.name for launch in driver.launched()}
    assert names == {"_across_kernel", "_down_kernel"}, "a refusal is remembered"
    assert driver.complaint() == ""
    monkeypatch.setattr(native, "NO_TRITON", ImportError("triton is not installed"))
    with pytest.raises(
        InputError, match=f"resize: got 'device', but {why}.*triton is not installed"
    ):
        _ = serving.resizer


@pytest.mark.parametrize("code", [209, 218, 221, 222, 223])
def test_a_driver_that_loads_lazily_may_refuse_later(
    driver: standin.Standin, weights: Weights, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    serve(monkeypatch, image_of(cubin(KERNELS)))
    serving = runner(driver, weights)
    before = driver.calls()
    assert serving.resizer.startswith("CUDA binary")
    calls, kinds = driver.calls() - before, list[str]()
    for number in range(1, calls + 1):
        fresh = runner(driver, weights)
        driver.fail(number, code)
        kinds.append(fresh.resizer.partition(",")[0])
        driver.reset()
    loads = 3  # of the image and of two kernels: that a context is given back in vain is no matter
    assert sorted(kinds) == ["CUDA binary for sm_90 (nvcc 13.0)"] * loads + ["Triton kernels"] * (
        calls - loads
    )


def test_other_failures_are_typed_errors_and_pass(
    driver: standin.Standin, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, image_of(cubin(KERNELS)))
    for code, kind in ((2, OutOfMemoryError), (719, DeviceError)):
        serving, packed = runner(driver, weights), batch()
        driver.fail(1, code)
        with pytest.raises(DeviceError, match=r"^resize on cpu: ") as caught:
            resized(packed, serving)
        assert caught.type is kind
        driver.reset()
        resized(packed, serving)
        driver.fail_launch(2, code)
        with pytest.raises(DeviceError, match="resize on cpu: vitrail_resize_down: cuLaunchKernel"):
            resized(packed, serving)
        driver.reset()
        resized(packed, serving)


def test_a_device_out_of_memory_resizes_in_halves(
    driver: standin.Standin, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, image_of(cubin(KERNELS)))
    serving = runner(driver, weights)
    (crops,) = device_batch(crop_tasks(5), serving, ENOUGH).groups
    assert serving.resizer.startswith("CUDA binary")
    driver.fail_launch(1, 2)
    assert crops[:].shape[0] == 5
    names = [launch.name for launch in driver.launched()]
    assert names == [cuda_resize.ACROSS, cuda_resize.DOWN] * 2


def test_a_shape_that_the_kernels_do_not_take_is_refused(
    driver: standin.Standin, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, image_of(cubin(KERNELS)))
    serving, packed = runner(driver, weights), batch()
    out = torch.empty(3, 224, 224, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="resize: middle: got shape"):
        serving.resize(
            out,
            torch.empty(16, 16, dtype=torch.uint8),
            packed.buffer[packed.sections[0]],
            *packed.tables[:3],
        )
    assert driver.launched() == []


# -- info ------------------------------------------------------------------------------------------


def test_info_says_what_would_resize(
    driver: standin.Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before = str(driver.path), driver.live()
    serve(monkeypatch, image_of(cubin(KERNELS)))
    assert info._resize("native", path) == "CUDA binary for sm_90 (nvcc 13.0)"
    serve(monkeypatch, image_of(cubin(KERNELS, 80)))
    assert info._resize("native", path).startswith(
        "Triton, since the driver refuses the CUDA binary for sm_90 (nvcc 13.0): "
    )
    serve(monkeypatch, None)
    assert info._resize("native", path) == "Triton, since no CUDA binary was built"
    assert info._resize("native", "libnone.so").startswith("unknown: libnone.so: ")
    monkeypatch.setattr(built, "cuda_binary", lambda name: None)
    assert info._resize("triton") == "Triton, no CUDA binary was built"
    monkeypatch.setattr(built, "cuda_binary", lambda name: image_of(b""))
    assert info._resize("torch") == "CUDA binary for sm_90 (nvcc 13.0)"
    assert driver.live() == before
