"""The kernels of csrc/resize.cu as nvcc compiled them, loaded from a fatbin: the bits of Pillow."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emulated.device import Device
from interpreted.test_resize import CASES, mixed, photo
from kernels.test_resize_operator import Batch, Run, differing, pillow
from vitrail.runtime import native
from vitrail.runtime.cuda_resize import CudaResize
from vitrail_kernels.cuda_binary import CudaBinary, cuda_binary
from vitrail_kernels.ops.resize_tables import ResizeTables

SOURCE = Path(__file__).parents[2] / "csrc/resize.cu"


@pytest.fixture(scope="session")
def nvcc(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """Compiles resize.cu with the options of csrc/cuda_binaries.py and those that it is given."""
    home = os.environ.get("CUDA_HOME")
    program = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if program is None:
        pytest.skip("resize.cu is not compiled: no nvcc in CUDA_HOME or PATH")

    def compile(*options: str) -> bytes:
        out = tmp_path_factory.mktemp("nvcc") / "out"
        command = [program, "-std=c++17", "-O3", *options, "-o", out, SOURCE]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        return out.read_bytes()

    return compile


@pytest.fixture(scope="session")
def image(nvcc: Callable[..., bytes]) -> CudaBinary:
    """The image that was installed, or one of the two architectures."""
    if (installed := cuda_binary("resize")) is not None:
        return installed
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    return CudaBinary(nvcc("-fatbin", "--no-compress", *codes), (80, 90), None, "unknown")


@pytest.fixture
def kernels(device: Device, image: CudaBinary, nvcc: Callable[..., bytes]) -> CudaResize:
    ptx = nvcc("-ptx", f"-arch=sm_{device.arch}").decode()
    device.emulation.source(image.code, ptx)
    gpu = native._C.Gpu(str(device.driver.path), 0)
    return CudaResize(gpu, image, overlap=True)


def on(device: Device, kernels: CudaResize, seed: int) -> Run:
    """Resizes with every tensor as device memory of its own, the output not yet written. Lines of
    ``middle`` are longer than what is written of them, for loads of 16 bytes."""

    def run(out: Tensor, middle: Tensor, pixels: Tensor, tables: ResizeTables) -> None:
        named: Sequence[tuple[str, Tensor]] = (
            ("out", out),
            ("middle", middle),
            ("pixels", pixels),
            ("images", tables.images),
            ("groups", tables.groups),
            ("taps", tables.taps),
        )
        moved = {name: tensor.clone() for name, tensor in named}
        for name, tensor in moved.items():
            device.hold(tensor, name, written=name != "out")
        device.emulation.schedule(seed, overlap=seed > 0)
        try:
            kernels(0, *moved.values())
            device.emulation.finish()
            device.check_written(moved["out"])
        finally:
            for tensor in moved.values():
                device.release(tensor)
        out.copy_(moved["out"])

    return run


@pytest.mark.parametrize("name", CASES)
def test_it_has_the_bits_of_pillow(device: Device, kernels: CudaResize, name: str) -> None:
    size, target, corner, window = CASES[name]
    number = list(CASES).index(name)
    for resample in (number % 6, (number + 3) % 6):
        channels = (3, 1, 4)[(number + resample) % 3]
        batch = Batch([photo(*size, channels).numpy()], [target], [corner], window, resample)
        assert differing(batch, on(device, kernels, resample), pillow(batch)) == []


def test_images_of_mixed_sizes_in_any_schedule(device: Device, kernels: CudaResize) -> None:
    for seed in range(6):
        batch = mixed(seed, (3, 1, 4)[seed % 3])
        assert differing(batch, on(device, kernels, seed), pillow(batch)) == []


def test_pixels_past_the_end_are_not_read(
    device: Device, kernels: CudaResize, monkeypatch: Any
) -> None:
    """The control: with the last pixel not there, a kernel's read of it is a fault."""
    batch = Batch([photo(37, 51).numpy()], [(16, 22)], [(0, 0)], (16, 22), 3)

    def short(tensor: Tensor, name: str, *, written: bool = True) -> None:
        hold(tensor[:-1] if name == "pixels" else tensor, name, written=written)

    hold = device.hold
    monkeypatch.setattr(device, "hold", short)
    with pytest.raises((ValueError, native._C.DriverError)):
        differing(batch, on(device, kernels, 1), torch.zeros(0))
    complaint = device.driver.complaint()
    assert re.search(r"vitrail_resize_across: global memory: .*pixels", complaint), complaint
