"""The environment of a model on a GPU: compilers, caches and drivers, missing, old or broken.

The driver stand-in is the GPU. Fresh processes are started only if a process's first import or its
environment is the subject.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import standin
import vitrail
from vitrail import runtime as runners
from vitrail.errors import DeviceError, InputError, OutOfMemoryError, VitrailError
from vitrail.model.loading import read_model
from vitrail.model.model import Model
from vitrail.plan import kernel_binary
from vitrail.plan.kernel_binary import kernel_key
from vitrail.runtime import choose, extension, kernel_cache, native, why_not_native
from vitrail.runtime.extension import load_extension
from vitrail.runtime.native import NativeRunner
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.runtime.triton import TritonRunner
from vitrail.text.tokens import TokenIds
from vitrail.tools import info
from vitrail.torch_modes import default_modes
from vitrail.weights.layout import Weights
from vitrail_kernels import OPERATORS, Call, toolchain
from vitrail_kernels import launch as kernel_launch
from vitrail_kernels.compile import compile_kernel
from vitrail_kernels.configs import KernelConfig, read_table, write_table
from vitrail_kernels.launch import MISSING, Target, interpreted, triton_version
from vitrail_kernels.private_cache import private_cache
from vitrail_kernels.toolchain import compilers, why_no_launcher, why_not_compiled

ASSETS = Path(vitrail.__file__).parent / "assets"
CLIP, PHOTO = ASSETS / "clip", ASSETS / "photos/rocket.jpg"
CPU, FP16 = torch.device("cpu"), torch.float16

needs_triton = pytest.mark.skipif(
    MISSING is not None or interpreted(), reason="needs triton's compiler"
)
needs_native = pytest.mark.skipif(
    MISSING is not None or interpreted() or native.MISSING is not None or not standin.compiler(),
    reason="the native runner: needs triton's compiler, vitrail._C and a C++ compiler",
)


@pytest.fixture
def driver(libcuda: standin.Standin) -> Iterator[standin.Standin]:
    libcuda.reset()
    yield libcuda
    assert libcuda.complaint() == ""
    libcuda.reset()


def open_model(driver: standin.Standin) -> Model:
    """The bundled model by the native runner on the stand-in."""
    loaded = read_model(CLIP, FP16)
    runner = NativeRunner(loaded.weights, FP16, CPU, str(driver.path))
    return Model(loaded.checkpoint, loaded.spec, loaded.hash_weights, runner)


def embed(model: Model, size: tuple[int, int] = (64, 64)) -> tuple[int, ...]:
    """Shape of the embedding of two images; the stand-in writes no meaningful numbers."""
    pixels = torch.zeros(2, *size, 3, dtype=torch.uint8)
    return model._image_encoder("embed").tower.embeddings(pixels)["vision.embedding"].shape


# -- compilers -------------------------------------------------------------------------------------


@needs_native
def test_the_native_runner_never_asks_for_a_c_compiler(
    driver: standin.Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own launcher is C that it compiles with Python.h: slim images have neither."""
    from triton.runtime import build

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(build, "_build", refuse)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    model = open_model(driver)
    assert embed(model) == embed(model, (48, 80)) == (2, 128)
    texts = TokenIds.of([[1, 2, 3]])
    assert model._text_encoder("text").tower.embeddings(texts)["text.embedding"].shape == (1, 128)


# -- the cache of kernels --------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for kernels, which no warning was given of."""
    monkeypatch.setenv(kernel_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_cache, "_warned", set())
    return tmp_path / "cache"


@pytest.fixture
def call() -> Call:
    """A kernel that compiles in half a second."""

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    tensors = meta(5, 48), meta(5, 48), meta(1, 48), meta(48)
    calls = OPERATORS["position"].calls(
        Target(90, 2), *tensors, table_grid=(2, 2), grid=(2, 2), antialias=False
    )
    return calls[0]


def record(call: Call) -> bytes:
    return kernel_cache.kernel_record(kernel_key(call, 90), call, 90)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of every kernel that is compiled from here on."""
    names: list[str] = []
    compile = kernel_binary.compile_privately

    def count(call: Call, arch: int) -> object:
        names.append(call.kernel.__name__)
        return compile(call, arch)

    monkeypatch.setattr(kernel_binary, "compile_privately", count)
    return names


@needs_triton
def test_a_record_from_the_cache_is_the_one_that_triton_compiles(
    cache: Path, call: Call, compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    first = record(call)
    assert not (tmp_path / "triton").exists()  # neither read nor written
    assert record(call) == first
    assert compiled == ["_position_kernel"]
    key = kernel_key(call, 90)
    assert kernel_binary.encode_binary(key, call, 90, compile_kernel(call, 90)) == first
    assert any((tmp_path / "triton").iterdir())
    [file] = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700
    assert file.read_bytes().endswith(first)


@needs_triton
def test_what_else_machine_code_follows_from_is_another_entry(
    cache: Path, call: Call, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_lines = record(call)
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    assert record(call) != with_lines
    monkeypatch.setattr(kernel_cache, "triton_build", lambda: "another build of triton")
    record(call)
    assert len(compiled) == len(list(cache.iterdir())) == 3


@needs_triton
def test_a_damaged_entry_is_compiled_again_and_replaced(
    cache: Path, call: Call, compiled: list[str]
) -> None:
    first = record(call)
    [file] = cache.iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for number, damaged in enumerate([whole[:middle], b"", bytes(len(whole)), flipped], 2):
        file.write_bytes(damaged)
        assert record(call) == first
        assert len(compiled) == number
        assert file.read_bytes() == whole
        assert list(cache.iterdir()) == [file]


@needs_triton
def test_an_entry_under_the_name_of_another_kernel_is_not_taken(
    cache: Path, call: Call, compiled: list[str]
) -> None:
    first = record(call)
    [file] = cache.iterdir()
    name = file.name
    kernel_cache.keep("0" * 64, first.replace(kernel_key(call, 90).encode(), b"0" * 64))
    other = next(path for path in cache.iterdir() if path.name != name)
    other.replace(file)
    assert record(call) == first
    assert len(compiled) == 2


def test_a_folder_that_cannot_be_used_is_named_once_with_the_variable(
    cache: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_cache, "compile_binary", lambda *_: b"a record")
    cache.write_text("a file")
    with pytest.warns(RuntimeWarning, match=f"^kernel cache: {cache}: Not a directory.*VITRAIL_"):
        assert record(call) == b"a record"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert record(call) == b"a record"
    monkeypatch.setenv(kernel_cache.VARIABLE, "/proc/vitrail")
    with pytest.warns(RuntimeWarning, match="^kernel cache: /proc/vitrail: No such file"):
        assert record(call) == b"a record"


def test_a_full_disk_is_named_and_leaves_nothing(
    cache: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_cache, "compile_binary", lambda *_: bytes(100_000))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.warns(RuntimeWarning, match=f"^kernel cache: {cache}: File too large"):
            assert record(call) == bytes(100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, previous)
    assert list(cache.iterdir()) == []


def test_a_folder_that_others_may_write_is_told(
    cache: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_cache, "compile_binary", lambda *_: b"a record")
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.warns(RuntimeWarning, match=f"^kernel cache: {cache}: others can write there"):
        assert record(call) == b"a record"
    [file] = cache.iterdir()
    file.unlink()
    file.mkdir()  # the error is reported all the same
    with pytest.warns(RuntimeWarning, match=f"^kernel cache: {cache}: Is a directory, so"):
        assert record(call) == b"a record"


def test_no_folder_is_no_cache(
    cache: Path, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernel_cache, "compile_binary", lambda *_: b"a record")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(kernel_cache.VARIABLE, "")
    assert record(call) == b"a record"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv(kernel_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert kernel_cache.folder() == tmp_path / "xdg/vitrail/kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert kernel_cache.folder() == Path("~/.cache/vitrail/kernels").expanduser()


def test_the_oldest_entries_go_when_there_are_too_many(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_cache, "MAX_ENTRIES", 8)
    for number in range(9):
        kernel_cache.keep(f"{number:064}", b"%d" % number)
        for path in cache.iterdir():
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**9))
    left = {path.read_bytes()[-1:] for path in cache.iterdir()}
    assert left == {b"%d" % number for number in range(2, 9)}


@needs_triton
def test_threads_that_compile_at_once_keep_their_own_triton_caches(
    cache: Path, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Kernels that another thread compiles in the meantime go to its usual cache."""
    from triton import knobs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    before = knobs.cache.manager_class
    with ThreadPoolExecutor(1) as pool, private_cache():
        pool.submit(compile_kernel, call, 90).result()
        kept = sorted((tmp_path / "triton").rglob("*.cubin"))
        other = dataclasses.replace(call.config, warps=4)
        compile_kernel(dataclasses.replace(call, config=other), 90)
    assert kept == sorted((tmp_path / "triton").rglob("*.cubin"))
    assert len(kept) == 1
    assert knobs.cache.manager_class is before


# -- the backend that serves, and why the next better does not -------------------------------------

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Let PyTorch say that there is a GPU of some capability."""

    def become(capability: tuple[int, int], hip: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "hip", hip)

    why_not_compiled.cache_clear()
    yield become
    why_not_compiled.cache_clear()


def native_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MISSING", None)


@needs_triton
@pytest.mark.parametrize("capability", [(9, 4), (11, 0)])
def test_a_pytorch_for_rocm_gets_the_reference(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    native_there(monkeypatch)
    gpu(capability, hip="6.4.0")
    assert choose("auto", FP16, GPU) == "torch"
    with pytest.raises(InputError, match=r"'native', but .*NVIDIA GPU, .*ROCm 6\.4"):
        choose("native", FP16, GPU)


@needs_triton
def test_a_gpu_that_ptxas_does_not_know_gets_the_reference(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    native_there(monkeypatch)
    gpu((13, 0))
    assert choose("auto", FP16, GPU) == "torch"
    why = rf"ptxas \d+\.\d+ of triton {triton_version()} has no machine code for sm_130 \(.*sm_130a"
    for runner in ("native", "triton"):
        with pytest.raises(InputError, match=why):
            choose(runner, FP16, GPU)
    gpu((12, 1))
    assert choose("auto", FP16, GPU) == "native"


def cannot_execute(_: int) -> None:
    raise PermissionError(13, "Permission denied")


OLD_PTXAS = """#!/bin/sh
[ "$1" = --version ] && echo 'Cuda compilation tools, release 11.4, V11.4.99' && exit 0
echo "ptxas fatal   : Value 'sm_90a' is not defined for option 'gpu-name'" >&2
exit 255
"""


@needs_triton
def test_a_ptxas_that_is_too_old_is_named_with_its_version(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    native_there(monkeypatch)
    ptxas = tmp_path / "ptxas"
    ptxas.write_text(OLD_PTXAS)
    ptxas.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(ptxas))
    compilers.cache_clear()
    gpu((9, 0))
    try:
        assert choose("auto", FP16, GPU) == "torch"
        with pytest.raises(InputError, match=r"ptxas 11\.4 of triton .* no machine code for sm_90"):
            choose("native", FP16, GPU)
        why_not_compiled.cache_clear()
        monkeypatch.setattr(toolchain, "_ptxas_refusal", cannot_execute)
        with pytest.raises(InputError, match=r"ptxas of triton .* does not run: .*Permission den"):
            choose("native", FP16, GPU)
    finally:
        compilers.cache_clear()


@needs_native
def test_a_kernel_that_cannot_be_compiled_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Triton itself prints pages of its own code."""
    driver = standin.own(tmp_path, 2)
    driver.device(13, 0, 2)
    with pytest.raises(DeviceError, match=r"sm_130.*backend='torch'") as raised:
        embed(open_model(driver))
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


@needs_triton
def test_triton_without_a_c_compiler_is_refused_at_load_and_native_is_not(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    native_there(monkeypatch)
    gpu((9, 0))
    assert why_no_launcher() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert choose("auto", FP16, GPU) == "native"
    with pytest.raises(InputError, match=r"'triton', but .* needs a C compiler: install gcc"):
        choose("triton", FP16, GPU)
    monkeypatch.setenv("CC", "some compiler")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match=r"'triton', but .* there is no .*/Python\.h"):
        choose("triton", FP16, GPU)


@needs_triton
def test_an_interpreter_that_is_left_over_is_named(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    native_there(monkeypatch)
    gpu((9, 0))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("auto", FP16, GPU) == "torch"
    with pytest.raises(InputError, match=r"TRITON_INTERPRET=1 is set, .*: unset it"):
        choose("native", FP16, GPU)


@needs_triton
def test_info_names_an_interpreter_that_is_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "; TRITON_INTERPRET=1 runs the kernels on the CPU" in info._serving()["backend"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is for CUDA")
def test_a_cpu_build_of_pytorch_beside_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_build = re.escape(f"PyTorch {torch.__version__} is a CPU build: install one for CUDA")
    with pytest.raises(InputError, match=f"^device: got 'cuda', but {cpu_build}"):
        vitrail.load(CLIP, device="cuda")
    assert "CPU build" not in info._serving()["backend"]
    monkeypatch.setattr(info, "_sees_gpu", lambda: True)
    assert re.search(cpu_build, info._serving()["backend"])


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_driver_that_is_too_old_for_pytorch_is_named(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    def too_old(*_: object) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("get_device_capability", "current_device"):
        monkeypatch.setattr(torch.cuda, name, too_old)
    words = "CUDA does not start: The NVIDIA driver on your system is too old"
    for device in ("cuda", "cuda:0"):
        with pytest.raises(InputError, match=f"^device: got '{device}', but {words}"):
            vitrail.load(CLIP, device=device, dtype=dtype)
    assert words in info._serving()["backend"]


def test_an_extension_that_does_not_load_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(error: ImportError) -> None:
        def import_module(_: str) -> None:
            raise error

        monkeypatch.setattr(importlib, "import_module", import_module)

    refuse(ImportError("libstdc++.so.6: version `GLIBCXX_3.4.32' not found"))
    with pytest.raises(ImportError, match=r"_C does not load: libstdc.*GLIBCXX_3\.4\.32"):
        load_extension()
    refuse(ModuleNotFoundError("no module", name="vitrail._C"))
    monkeypatch.setattr(extension, "FOLDER", tmp_path)
    with pytest.raises(ImportError, match=r"_C is not built \(.*pure Python\)"):
        load_extension()
    (tmp_path / "_C.cpython-399-x86_64-linux-gnu.so").touch()
    with pytest.raises(ImportError, match=r"built for another Python: _C\.cpython-399-x86_64"):
        load_extension()


def test_an_extension_of_another_version_is_refused(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = SimpleNamespace(version=lambda: "0.0.9")
    monkeypatch.setattr(importlib, "import_module", lambda _: stale)
    with pytest.raises(ImportError, match=r"for vitrail 0\.0\.9, and this is .*: install it again"):
        load_extension()
    gpu((9, 0))
    monkeypatch.setattr(native, "MISSING", ImportError("vitrail._C was built for vitrail 0.0.9"))
    assert why_not_native(FP16, GPU) == "vitrail._C was built for vitrail 0.0.9"
    assert info._serving()["native"] == "vitrail._C was built for vitrail 0.0.9"


def test_a_triton_that_is_too_old_or_damaged_is_told_from_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def why(error: ImportError) -> str:
        return str(kernel_launch._why_no_triton(error))

    assert why(ModuleNotFoundError("no module", name="triton")) == "triton is not installed"
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.2.0"))
    lacking = ModuleNotFoundError("no module", name="triton.tools.tensor_descriptor")
    assert why(lacking) == "triton 3.2.0 is too old, wanted 3.6 or later"
    damaged = ImportError("libtriton.so: undefined symbol")
    assert why(damaged) == "triton does not load: libtriton.so: undefined symbol"


def test_a_library_that_is_missing_is_one_line_and_not_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    told = "libcublas.so.12: cannot open shared object file: No such file or directory"
    (tmp_path / "torch/__init__.py").write_text(f"raise OSError({told!r})\n")
    root = Path(__file__).parents[1]
    folders = os.pathsep.join(map(str, (tmp_path, root / "engine", root / "kernels")))
    arguments = ("embed", PHOTO, "--model", CLIP, "--out", tmp_path / "out.npy")
    done = subprocess.run(
        [sys.executable, "-m", "vitrail.cli", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": folders},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, f"vitrail: error: {told}\n")


# -- errors that come late -------------------------------------------------------------------------

LATE = "CUDA error: an illegal memory access was encountered"
MORE = "\nCUDA kernel errors might be asynchronously reported at some other API call."


@pytest.fixture(scope="module")
def model() -> Model:
    return vitrail.load(CLIP, device="cpu")


@pytest.mark.parametrize("error", [torch.AcceleratorError, RuntimeError])
@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("tolist", lambda model: model.encode_image([PHOTO])),
        ("cpu", lambda model: model.encode_text(["a cat"])),
        ("cpu", lambda model: model.classify(PHOTO, labels=["a", "b"])),
        ("to", lambda model: model.encode_image([PHOTO])),
        ("contiguous", lambda model: model.forward(pixel_values=torch.zeros(1, 3, 64, 64))),
        ("isfinite", lambda model: model.get_intermediate_layers(torch.zeros(1, 3, 64, 64), 1)),
        ("to", lambda model: model.as_module()(torch.zeros(1, 3, 64, 64))),
    ],
)
def test_a_late_cuda_error_says_that_the_process_must_go(
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    error: type[RuntimeError],
    function: str,
    call: Callable[[Model], object],
) -> None:
    def late(*_: object, **__: object) -> None:
        raise error(LATE + MORE)

    call(model)
    monkeypatch.setattr(torch if function == "isfinite" else Tensor, function, late)
    with pytest.raises(DeviceError, match=rf"^{LATE}, .*: start a new one$"):
        call(model)


def test_other_errors_of_pytorch_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^a size$"), default_modes():
        raise RuntimeError("a size")
    with (
        pytest.raises(DeviceError, match=r"^Triton Error \[CUDA\]: .*start a new one$"),
        default_modes(),
    ):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    captured = "CUDA error: operation not permitted when stream is capturing"
    with pytest.raises(DeviceError, match=f"^{captured}$"), default_modes():
        raise RuntimeError(captured)


def test_weights_that_do_not_fit_are_our_error_with_their_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(Weights, "to", full)
    with pytest.raises(
        OutOfMemoryError, match=r"no room for [\d,]{7,} bytes .* allocate 1\.00 GiB"
    ):
        vitrail.load(CLIP, device="cpu")


def test_memory_that_lacks_for_one_item_is_our_error(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(type(model._image_encoder("").tower), "embeddings", full)
    with pytest.raises(OutOfMemoryError, match=r"Tried to allocate 1\.00 GiB"):
        model.encode_image([PHOTO, PHOTO])


@needs_native
def test_a_fault_of_a_kernel_says_that_the_process_must_go(driver: standin.Standin) -> None:
    model = open_model(driver)
    embed(model)
    driver.fail_launch(3, 700)
    with pytest.raises(DeviceError, match=r"CUDA_ERROR_ILLEGAL_ADDRESS.*: start a new one$"):
        embed(model)
    driver.reset()
    driver.fail_launch(3, 701)  # too many registers or threads: of this launch alone
    with pytest.raises(DeviceError, match=r"OUT_OF_RESOURCES[^;]*$"):
        embed(model)
    driver.reset()


@needs_triton
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), json.JSONDecodeError("Expecting ','", "{", 1)]
)
def test_a_cache_of_triton_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(type(OPERATORS["position"]), "launch", fail)
    loaded = read_model(CLIP, FP16)
    assert loaded.spec.vision is not None
    runner = TritonRunner(loaded.weights, FP16, CPU)
    with pytest.raises(VitrailError, match=rf"triton's cache in {tmp_path}: .*TRITON_CACHE_DIR$"):
        runner.position_table(loaded.spec.vision, (2, 2), "float")


# -- switches and tables ---------------------------------------------------------------------------


@needs_native
def test_without_tma_no_kernel_takes_a_tensor_map(
    driver: standin.Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def maps() -> bool:
        driver.record(True)
        embed(open_model(driver))
        launched = driver.launched()
        driver.record(False)
        driver.reset()
        return any(part.map for launch in launched for part in launch.parameters)

    assert maps()
    print_with = open_model(driver).fingerprint
    monkeypatch.setenv("VITRAIL_TMA", "0")
    assert not maps()
    assert open_model(driver).fingerprint != print_with


def test_info_says_that_tma_is_off(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runners, "choose", lambda *_: "native")
    monkeypatch.setattr(info, "_resize", lambda _: "")
    gpu((9, 0))
    assert "TMA" not in info._serving()["kernels"]
    monkeypatch.setenv("VITRAIL_TMA", "0")
    assert "without TMA (VITRAIL_TMA=0)" in info._serving()["kernels"]


def test_an_export_with_tma_is_refused_without_it(
    libcuda: standin.Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = read_model(CLIP, FP16)
    identity = "triton 3.7.1 ptxas 12.8 sm_90 0123"

    def open_export(identity: str) -> NativeRunner:
        record = SimpleNamespace(version="1.0")
        exported: Any = SimpleNamespace(
            builds={90: identity}, tables={}, folder="clip", record=record
        )
        return NativeRunner(loaded.weights, FP16, CPU, str(libcuda.path), exported=exported)

    open_export(identity)
    monkeypatch.setenv("VITRAIL_TMA", "0")
    with pytest.raises(InputError, match=r"^VITRAIL_TMA=0: got clip, .* sm_90 use TMA; export it"):
        open_export(identity)
    open_export(f"{identity}, without TMA")


def test_weights_that_are_freed_wait_for_every_stream_that_used_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = TorchRunner(read_model(CLIP, FP16).weights, FP16, CPU)
    streams, recorded = iter([7, 0, 7, 9]), []
    runner.device = GPU
    arena: Any = SimpleNamespace(record_stream=lambda stream: recorded.append(stream.cuda_stream))
    runner.weights = dataclasses.replace(runner.weights, arena=arena)
    current = lambda device: SimpleNamespace(cuda_stream=next(streams))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    assert [runner._stream() for _ in range(4)] == [7, 0, 7, 9]
    assert recorded == [7, 0, 9]


def test_two_writers_of_one_tuned_table_leave_a_whole_one(tmp_path: Path) -> None:
    file = tmp_path / "sm_90.json"
    rows = {f"linear|{i}": KernelConfig(64, 64, 64, 4, 2, reason="r" * 50) for i in range(200)}

    def write(_: int) -> None:
        for _ in range(20):
            write_table(file, {}, rows)
            assert read_table(file)[1] == rows

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    assert list(tmp_path.iterdir()) == [file]
    mask = os.umask(0)
    os.umask(mask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask
