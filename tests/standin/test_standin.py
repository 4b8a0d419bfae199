"""The driver stand-in: each of its checks and faults fires, and its digests are what they say."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import standin
from standin import Launch, Live, Parameter, Standin, TensorMap
from standin.calls import FUNCTIONS, Cuda, cubin

compiled = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted: nothing is compiled"
)
INVALID, NO_MEMORY, NO_CONTEXT, BAD_HANDLE, ILLEGAL, CAPTURED = 1, 2, 201, 400, 700, 900


@pytest.fixture(scope="module")
def library() -> Path:
    if standin.compiler() is None:
        pytest.skip("the driver stand-in: no C++ compiler here")
    return standin.build()


@pytest.fixture
def cuda(library: Path, tmp_path: Path) -> Cuda:
    return Cuda(Path(shutil.copy(library, tmp_path)))


PLAIN = cubin({"plain": (8, 8, 4)})
MAPPED = cubin({"mapped": (128, 8, 4)})


# -- the interface ---------------------------------------------------------------------------------

COMPARED = """
#include <type_traits>
#include "cuda.h"
#define STANDIN_WITHOUT_FUNCTIONS
#include "abi.hpp"
template <class T>
constexpr int kind() {
    static_assert(std::is_pointer_v<T> || std::is_enum_v<T> || std::is_integral_v<T>, "passed so");
    return std::is_pointer_v<T> ? 0 : int(sizeof(T));
}
template <class Theirs, class Ours>
struct Same : std::false_type {};
template <class R, class... A, class S, class... B>
struct Same<R(A...), S(B...)> {
    static constexpr bool find() {
        if constexpr (sizeof...(A) != sizeof...(B)) return false;
        else return kind<R>() == kind<S>() && ((kind<A>() == kind<B>()) && ...);
    }
    static constexpr bool value = find();
};
#define COMPARE(name, ...) static_assert(Same<decltype(name), int(__VA_ARGS__)>::value, #name);
STANDIN_FUNCTIONS(COMPARE)
#define PLACE(theirs, ours) \\
    static_assert(offsetof(CUlaunchConfig, theirs) == offsetof(standin::LaunchConfig, ours), #ours)
PLACE(gridDimX, grid);
PLACE(blockDimX, block);
PLACE(sharedMemBytes, shared);
PLACE(hStream, stream);
PLACE(attrs, attributes);
PLACE(numAttrs, attribute_count);
static_assert(sizeof(CUlaunchConfig) == sizeof(standin::LaunchConfig), "config");
static_assert(sizeof(CUlaunchAttribute) == sizeof(standin::LaunchAttribute), "attribute");
static_assert(offsetof(CUlaunchAttribute, value) == offsetof(standin::LaunchAttribute, value), "");
static_assert(sizeof(CUtensorMap) == standin::kMapBytes, "map");
#define EQUAL(theirs, ours) static_assert(int(theirs) == int(standin::ours), #ours);
"""


def test_types_and_signatures_are_those_of_cuda_h(library: Path, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton", reason="cuda.h comes with triton")
    header = Path(triton.__file__).parent / "backends/nvidia/include"
    equal = {
        "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION": "kPdl",
        "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES": "kFunctionDynamicShared",
        "CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT": "kFunctionCarveout",
        "CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK": "kFunctionThreads",
        "CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES": "kFunctionShared",
        "CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES": "kFunctionLocal",
        "CU_FUNC_ATTRIBUTE_NUM_REGS": "kFunctionRegisters",
        "CU_FUNC_ATTRIBUTE_BINARY_VERSION": "kFunctionBinary",
        "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT": "kMultiprocessors",
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": "kMajor",
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": "kMinor",
        "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": "kSharedOptin",
        "CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED": "kMemoryPools",
        "CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR": "kThreadsPerMultiprocessor",
        "CU_STREAM_CAPTURE_MODE_RELAXED": "kRelaxed",
    }
    errors = (standin.FOLDER / "errors.hpp").read_text()
    for code, name in re.findall(r'\{(\w+), "(CUDA_\w+)"', errors):
        if not code.isdigit():
            equal[name] = code
    source = tmp_path / "compare.cpp"
    source.write_text(COMPARED + "".join(f"EQUAL({a}, {b})\n" for a, b in equal.items()))
    program = standin.compiler()
    assert program is not None
    command = [program, "-std=c++17", "-fsyntax-only", f"-I{header}", f"-I{standin.FOLDER}"]
    run = subprocess.run([*command, source], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(FUNCTIONS) == 40


def test_errors_have_the_drivers_names(cuda: Cuda) -> None:
    calls, text = cuda.standin.calls(), ctypes.c_char_p()
    cuda.ok("cuGetErrorName", 719, ctypes.byref(text))
    assert text.value == b"CUDA_ERROR_LAUNCH_FAILED"
    cuda.ok("cuGetErrorString", 2, ctypes.byref(text))
    assert text.value == b"out of memory"
    assert cuda("cuGetErrorName", 12345, ctypes.byref(text)) == INVALID
    assert text.value is None
    assert cuda.standin.calls() == calls


def test_a_copy_of_the_library_has_a_state_of_its_own(cuda: Cuda, library: Path) -> None:
    other = Standin(Path(shutil.copy(library, cuda.standin.path.with_name("other"))))
    cuda.allocate(b"12345678")
    assert cuda.standin.live().allocations == 1
    assert other.live() == Live(0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="in use"):
        cuda.standin.device(8, 0, 108)
    other.device(8, 6, 84)
    value = ctypes.c_int()
    assert other.driver.cuDeviceGetAttribute(ctypes.byref(value), 16, 0) == 3
    assert other.driver.cuInit(0) == 0
    found = []
    for attribute in (75, 76, 16, 97):
        assert other.driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0) == 0
        found.append(value.value)
    assert found == [8, 6, 84, 101376]


# -- contexts and handles --------------------------------------------------------------------------


def test_contexts_are_a_stack_of_the_thread(cuda: Cuda) -> None:
    found = ctypes.c_void_p()
    cuda.ok("cuCtxPushCurrent_v2", cuda.context)
    cuda.ok("cuCtxPopCurrent_v2", ctypes.byref(found))
    assert found.value == cuda.context.value
    cuda.ok("cuCtxSetCurrent", None)
    cuda.ok("cuCtxGetCurrent", ctypes.byref(found))
    assert found.value is None
    cuda.refused(NO_CONTEXT, "no context is on the stack", "cuCtxPopCurrent_v2", None)
    cuda.refused(NO_CONTEXT, "no current context", "cuStreamCreate", ctypes.byref(found), 1)
    cuda.refused(NO_CONTEXT, "not alive", "cuCtxSetCurrent", 0x1234)
    cuda.refused(NO_CONTEXT, "not alive", "cuCtxPushCurrent_v2", 0x1234)
    cuda.ok("cuCtxPushCurrent_v2", cuda.context)
    cuda.ok("cuDevicePrimaryCtxRelease_v2", 0)
    cuda.refused(NO_CONTEXT, "no current context", "cuStreamCreate", ctypes.byref(found), 1)
    cuda.refused(NO_CONTEXT, "not retained", "cuDevicePrimaryCtxRelease_v2", 0)
    cuda.refused(101, "only 0", "cuDevicePrimaryCtxRetain", ctypes.byref(found), 1)


def test_destroyed_handles_are_noticed(cuda: Cuda) -> None:
    stream, event = cuda.made("cuStreamCreate", 1), cuda.made("cuEventCreate", 2)
    uses: list[tuple[str, tuple[Any, ...]]] = [
        ("cuStreamSynchronize", (stream,)),
        ("cuStreamWaitEvent", (stream, event, 0)),
        ("cuEventRecord", (event, stream)),
        ("cuEventQuery", (event,)),
        ("cuEventSynchronize", (event,)),
    ]
    for name, arguments in uses:
        cuda.ok(name, *arguments)
    assert cuda.standin.live() == Live(0, 0, 0, 0, 1, 1, 1)
    cuda.refused(BAD_HANDLE, "stream", "cuStreamDestroy_v2", event)
    cuda.ok("cuStreamDestroy_v2", stream)
    cuda.ok("cuEventDestroy_v2", event)
    assert cuda.standin.live() == Live(0, 0, 0, 0, 0, 0, 1)
    for name, arguments in uses:
        cuda.refused(BAD_HANDLE, "is not alive", name, *arguments)
    cuda.refused(BAD_HANDLE, "stream", "cuStreamDestroy_v2", stream)
    cuda.refused(BAD_HANDLE, "event", "cuEventDestroy_v2", event)
    cuda.standin.checks(False)
    cuda.ok("cuStreamSynchronize", stream)


def test_an_unloaded_module_has_no_functions(cuda: Cuda) -> None:
    handle = ctypes.byref(ctypes.c_uint64())
    module = cuda.made("cuModuleLoadData", PLAIN)
    cuda.refused(500, "no other", "cuModuleGetFunction", handle, module, b"other")
    function = cuda.made("cuModuleGetFunction", module, b"plain")
    assert cuda.parameters(function) == [(0, 8), (8, 8), (16, 4)]
    cuda.places[function] = cuda.parameters(function)
    assert cuda.standin.live().modules == 1
    cuda.ok("cuModuleUnload", module)
    assert cuda.standin.live().modules == 0
    cuda.refused(BAD_HANDLE, "not loaded", "cuModuleUnload", module)
    cuda.refused(BAD_HANDLE, "module", "cuModuleGetFunction", handle, module, b"plain")
    cuda.refused(BAD_HANDLE, "function", "cuFuncSetAttribute", function, 8, 1)
    cuda.standin.reset()
    assert cuda.launch(function, (0, 0, 0)) == BAD_HANDLE
    assert "function" in cuda.standin.complaint()


# -- modules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "device", "code"),
    [
        (cubin({"k": (8,)}, 90), (9, 0), 0),
        (cubin({"k": (8,)}, 90, exact=True), (9, 0), 0),
        (cubin({"k": (8,)}, 90, abi=8, exact=True), (9, 0), 0),
        (cubin({"k": (8,)}, 80), (8, 9), 0),
        (cubin({"k": (8,)}, 80, abi=8), (8, 6), 0),
        (cubin({"k": (8,)}, 89), (8, 6), 209),
        (cubin({"k": (8,)}, 80, exact=True), (8, 6), 209),
        (cubin({"k": (8,)}, 90), (10, 0), 209),
        (cubin({"k": (8,)}, 90, abi=8), (8, 0), 209),
        (cubin({"k": (8,)}, attribute=0x45), (9, 0), 200),
        (cubin({}), (9, 0), 200),
        (b"\x50\xed\x55\xba" + bytes(100), (9, 0), 200),
        (b".version 8.0\n.target sm_90\n" + bytes(100), (9, 0), 200),
    ],
    ids=str,
)
def test_a_cubin_must_suit_the_device(
    library: Path, tmp_path: Path, image: bytes, device: tuple[int, int], code: int
) -> None:
    path = Path(shutil.copy(library, tmp_path))
    Standin(path).device(*device)
    cuda = Cuda(path)
    assert cuda("cuModuleLoadData", ctypes.byref(ctypes.c_void_p()), image) == code
    assert bool(cuda.standin.complaint()) == (code != 0)


def _facts(image: bytes) -> dict[str, tuple[list[tuple[int, int]], int, int]]:
    """By cuobjdump, of every kernel: parameters' offsets and sizes, registers, static memory."""
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton")
    from vitrail_kernels.compile import _tool

    assert triton
    found = {}
    sections = re.split(r"^\.nv\.info\.(\w+)$", _tool("cuobjdump", "-elf", image), flags=re.M)
    used = _tool("cuobjdump", "-res-usage", image)
    for name, section in zip(sections[1::2], sections[2::2], strict=True):
        rows = re.findall(r"Ordinal : (\w+)\s+Offset  : (\w+)\s+Size    : (\w+)", section)
        numbers = sorted(tuple(int(one, 16) for one in row) for row in rows)
        usage = re.search(rf"Function {name}:\s+REG:(\d+).* SHARED:(\d+)", used)
        assert usage is not None
        found[name] = ([row[1:] for row in numbers], int(usage[1]), int(usage[2]))
    return found  # type: ignore[return-value]


def check_facts(cuda: Cuda, image: bytes) -> None:
    facts = _facts(image)
    assert facts
    for name, (parameters, registers, shared) in facts.items():
        function = cuda.function(image, name)
        assert cuda.parameters(function) == parameters
        assert cuda.attribute(function, 4) == registers
        assert cuda.attribute(function, 1) == max(shared - 1024, 0)
        assert cuda.attribute(function, 6) == 90


@compiled
@pytest.mark.parametrize("label", ["qkv", "attention"])
def test_the_parameters_of_a_triton_kernel_are_found(cuda: Cuda, label: str) -> None:
    from roofline import SHAPES, steps

    from vitrail_kernels.compile import compile_kernel
    from vitrail_kernels.launch import Target

    (launch,) = (one for one in steps(SHAPES["ViT-B/16"], torch.float16) if one.label == label)
    (call,) = launch.calls(Target(90, 132))
    kernel = compile_kernel(call, 90)
    image = kernel.asm["cubin"]
    check_facts(cuda, image)
    function = cuda.function(image, kernel.metadata.name)
    sizes = [size for _, size in cuda.parameters(function)]
    assert sizes.count(128) >= 1
    assert sizes[-2:] == [8, 8]  # Triton's two scratch pointers
    threads = 32 * kernel.metadata.num_warps
    assert cuda.attribute(function, 0) == threads
    cuda.ok("cuFuncSetAttribute", function, 8, kernel.metadata.shared)
    base = cuda.allocate(b"the base" + bytes(128 * 100))
    map = cuda.map(base)
    values = [map if size == 128 else base if size == 8 else 3 for size in sizes]
    how: dict[str, Any] = {"block": (threads, 1, 1), "shared": kernel.metadata.shared}
    cuda.standin.record(True)
    for packed in (False, True):
        cuda.ok("cuMemcpyHtoDAsync_v2", base, b"the base", 8, None)
        assert cuda.launch(function, values, packed=packed, **how) == 0
    first, second = cuda.standin.launched()
    assert first == second
    heads = [None if size == 4 else b"the base" for size in sizes]
    assert first.digest == digest(first, heads)


def test_the_parameters_of_a_cuda_kernel_are_found(cuda: Cuda, tmp_path: Path) -> None:
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("no nvcc here")
    source = tmp_path / "two.cu"
    source.write_text("""
        struct Both { long a; int b; };
        extern "C" __global__ void one(float* out, int n, Both both, short s, char c) {
            __shared__ float rows[64];
            rows[threadIdx.x] = out[n + c];
            __syncthreads();
            out[s] = rows[63 - threadIdx.x] * both.a;
        }
        extern "C" __global__ void two(double* out, double v) { out[0] = v; }
        extern "C" __global__ void three() {}
    """)
    image = tmp_path / "two.cubin"
    subprocess.run([nvcc, "-arch=sm_90", "-cubin", "-o", image, source], check=True)
    check_facts(cuda, image.read_bytes())
    assert cuda.launch(cuda.function(image.read_bytes(), "three"), ()) == 0


# -- launches --------------------------------------------------------------------------------------


def fnv(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % (1 << 64)
    return value


def digest(launch: Launch, heads: Sequence[bytes | None], rows_off: bool = True) -> int:
    """By the words of launch.hpp; ``heads`` is what stood where each parameter points."""
    data = launch.name.encode() + b"\0"
    data += struct.pack("<7I", *launch.grid, *launch.block, launch.shared)
    for parameter, head in zip(launch.parameters, heads, strict=True):
        if (found := parameter.map) is not None:
            dims = found.dims[: len(found.dims) - rows_off]
            data += b"".join(struct.pack("<Q", one) for one in (*dims, *found.strides))
            data += b"".join(struct.pack("<I", one) for one in found.box)
            data += struct.pack("<II", found.swizzle, found.type)
        data += parameter.raw if head is None else head
    return fnv(data)


def test_a_launch_writes_the_digest_of_what_it_was_given(cuda: Cuda) -> None:
    function = cuda.function(PLAIN, "plain")
    out, x = cuda.allocate(b"before.." * 2), cuda.allocate(b"the head and the rest")
    cuda.standin.record(True)
    stream = cuda.made("cuStreamCreate", 1)
    pdl = [(6, 1)]
    values = (out, x + 4, 41)
    assert cuda.launch(function, values, grid=(3, 2, 1), stream=stream, attributes=pdl) == 0
    assert cuda.launch(function, (out + 8, 0, 41), packed=True) == 0
    first, second = cuda.standin.launched()
    assert first == Launch(
        name="plain",
        grid=(3, 2, 1),
        block=(128, 1, 1),
        shared=0,
        stream=stream,
        pdl=True,
        carveout=-1,
        digest=digest(first, (b"before..", b"head and", None)),
        parameters=(
            Parameter(0, 8, struct.pack("<Q", out), None),
            Parameter(8, 8, struct.pack("<Q", x + 4), None),
            Parameter(16, 4, struct.pack("<I", 41), None),
        ),
    )
    assert [one.value for one in first.parameters] == list(values)
    assert (second.pdl, second.stream) == (False, 0)
    assert second.digest == digest(second, (b"before..", None, None))
    assert cuda.read(out, 16) == struct.pack("<QQ", first.digest, second.digest)
    cuda.standin.reset()
    assert cuda.standin.launched() == []


def test_near_the_end_of_memory_less_is_read_and_written(cuda: Cuda) -> None:
    function = cuda.function(PLAIN, "plain")
    out = cuda.allocate(b"12345678abc")
    cuda.standin.record(True)
    assert cuda.launch(function, (out + 8, out + 9, 1)) == 0
    (launch,) = cuda.standin.launched()
    heads = b"abc" + bytes(5), b"bc" + bytes(6), None
    assert launch.digest == digest(launch, heads)
    assert cuda.read(out, 11) == b"12345678" + struct.pack("<Q", launch.digest)[:3]


@pytest.mark.parametrize("rows_off", [True, False])
def test_a_tensor_map_is_part_of_the_digest(cuda: Cuda, rows_off: bool) -> None:
    function = cuda.function(MAPPED, "mapped")
    base = cuda.allocate(b"the base" + bytes(128 * 100 - 8))
    cuda.standin.rows_off(rows_off)
    cuda.standin.record(True)
    changes: list[dict[str, Any]] = [
        {},
        {"dims": (64, 99)},
        {"dims": (56, 100)},
        {"dims": (64, 50), "strides": (256,)},
        {"box": (64, 32)},
        {"box": (32, 64), "swizzle": 2},
        {"box": (32, 64), "swizzle": 0},
        {"type": 9},
    ]
    for change in changes:
        cuda.ok("cuMemcpyHtoDAsync_v2", base, b"the base", 8, None)
        assert cuda.launch(function, (cuda.map(base, **change), 0, 1)) == 0
    launches = cuda.standin.launched()
    for launch in launches:
        assert launch.digest == digest(launch, (b"the base", None, None), rows_off)
    assert len({one.digest for one in launches}) == len(changes) - rows_off
    assert cuda.read(base) == struct.pack("<Q", launches[-1].digest)
    assert launches[3].parameters[0].map == TensorMap(
        base=base,
        type=6,
        dims=(64, 50),
        strides=(256,),
        box=(64, 64),
        element_strides=(1, 1),
        interleave=0,
        swizzle=3,
        promotion=2,
        fill=0,
    )


def chain(cuda: Cuda, numbers: Sequence[int]) -> bytes:
    """A buffer after launches that each read what the one before wrote."""
    function = cuda.function(PLAIN, "plain")
    a, b = cuda.allocate(b"a start "), cuda.allocate(b"b start ")
    for number in numbers:
        assert cuda.launch(function, (a, b, number)) == 0
        a, b = b, a
    return cuda.read(b)


def test_a_chain_of_launches_depends_on_every_number_and_their_order(cuda: Cuda) -> None:
    numbers = list(range(50))
    found = chain(cuda, numbers)
    assert chain(cuda, numbers) == found
    assert chain(cuda, [7, *numbers[1:]]) != found
    assert chain(cuda, [1, 0, *numbers[2:]]) != found


LAUNCHES: dict[str, tuple[dict[str, Any], int, str]] = {
    "no blocks": ({"grid": (0, 1, 1)}, INVALID, "grid x is 0"),
    "grid x": ({"grid": (1 << 31, 1, 1)}, INVALID, "grid x is 2147483648"),
    "grid y": ({"grid": (1, 65536, 1)}, INVALID, "grid y is 65536"),
    "grid z": ({"grid": (1, 1, 65536)}, INVALID, "grid z is 65536"),
    "block x": ({"block": (0, 1, 1)}, INVALID, "block x is 0"),
    "block z": ({"block": (1, 1, 65)}, INVALID, "block z is 65"),
    "threads": ({"block": (512, 3, 1)}, INVALID, "a block of 1536 threads"),
    "shared": ({"shared": 49153}, INVALID, "49153 bytes of dynamic shared"),
    "attribute": ({"attributes": [(4, 1)]}, INVALID, "launch attribute 4"),
    "stream": ({"stream": 0x12345}, BAD_HANDLE, "stream is not alive"),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_wrong_launch_is_refused(cuda: Cuda, name: str) -> None:
    change, code, words = LAUNCHES[name]
    function = cuda.function(PLAIN, "plain")
    out = cuda.allocate(b"untouched")
    assert cuda.launch(function, (out, 0, 1), **change) == code
    assert words in cuda.standin.complaint()
    assert cuda.read(out, 9) == b"untouched"
    assert cuda.launch(function, (out, 0, 1), grid=(2147483647, 65535, 1)) == 0


PARAMETERS: dict[str, tuple[Callable[[int], Sequence[Any]], int, str]] = {
    "a null pointer for a parameter": (
        lambda out: (out, None, 1),
        INVALID,
        "parameter 1 is missing",
    ),
    "outside": (lambda out: (out, out - 1, 1), ILLEGAL, "in no live allocation"),
    "past the end": (lambda out: (out + 64, out, 1), ILLEGAL, "in no live allocation"),
    "nowhere": (lambda out: (out, 1 << 32, 1), ILLEGAL, "parameter 1: 0x100000000 lies in no live"),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_wrong_parameter_is_refused(cuda: Cuda, name: str) -> None:
    given, code, words = PARAMETERS[name]
    function = cuda.function(PLAIN, "plain")
    out = cuda.allocate(bytes(64))
    assert cuda.launch(function, given(out)) == code
    assert words in cuda.standin.complaint()
    assert cuda.launch(function, (out + 63, (1 << 32) - 1, 1)) == 0


def test_a_parameter_buffer_must_have_the_kernels_size(cuda: Cuda) -> None:
    function = cuda.function(PLAIN, "plain")
    assert cuda.launch(function, (0, 0), packed=True) == INVALID
    assert "a parameter buffer of 16 bytes, wanted 20" in cuda.standin.complaint()
    config = ctypes.create_string_buffer(bytes(56), 56)
    ctypes.memmove(config, struct.pack("<6I", *(6 * [1])), 24)
    cuda.refused(INVALID, "none were given", "cuLaunchKernelEx", config, function, None, None)


def test_freed_memory_is_not_used(cuda: Cuda) -> None:
    function = cuda.function(PLAIN, "plain")
    out = cuda.allocate(bytes(8))
    stream = cuda.made("cuStreamCreate", 1)
    freed = cuda.made("cuMemAllocAsync", 512, stream)
    assert cuda.launch(function, (out, freed + 500, 1)) == 0
    cuda.ok("cuMemFreeAsync", freed, stream)
    assert cuda.made("cuMemAllocAsync", 512, stream) != freed
    assert cuda.launch(function, (out, freed + 500, 1)) == ILLEGAL
    assert "was freed" in cuda.standin.complaint()
    host = ctypes.create_string_buffer(8)
    cuda.refused(INVALID, "was freed", "cuMemcpyDtoHAsync_v2", host, freed, 8, None)
    cuda.refused(INVALID, "was freed", "cuMemFreeAsync", freed, stream)
    cuda.refused(INVALID, "was freed", "cuMemFree_v2", freed)


def test_registered_memory_is_used_as_if_allocated(cuda: Cuda) -> None:
    function = cuda.function(PLAIN, "plain")
    space = ctypes.create_string_buffer(b"x" * 128)
    start = ctypes.addressof(space)
    start += -start % 16
    assert cuda.launch(function, (start, 0, 1)) == ILLEGAL
    cuda.standin.register(start, 64)
    assert cuda.launch(function, (start, 0, 1)) == 0
    assert space.raw[start - ctypes.addressof(space) :][:8] == cuda.read(start) != b"x" * 8
    assert cuda.launch(function, (start + 64, 0, 1)) == ILLEGAL
    with pytest.raises(ValueError, match="overlaps"):
        cuda.standin.register(start + 32, 64)
    with pytest.raises(ValueError, match="overlaps"):
        cuda.standin.register(start - 8, 16)
    cuda.refused(INVALID, "does not begin one", "cuMemFree_v2", start)
    cuda.standin.unregister(start)
    with pytest.raises(ValueError, match="no registered range"):
        cuda.standin.unregister(start)
    assert cuda.launch(function, (start, 0, 1)) == ILLEGAL
    cuda.standin.register(start + 8, 32)
    assert cuda.launch(function, (start + 8, 0, 1)) == ILLEGAL
    assert "not 16-byte aligned" in cuda.standin.complaint()


def test_a_tensor_map_must_be_whole_and_lie_in_memory(cuda: Cuda) -> None:
    function = cuda.function(MAPPED, "mapped")
    base = cuda.allocate(bytes(128 * 100))
    good = cuda.map(base)
    assert cuda.launch(function, (good, 0, 1)) == 0
    changed = bytearray(good)
    changed[20] ^= 1
    for bad in (bytes(128), bytes(changed)):
        assert cuda.launch(function, (bad, 0, 1)) == INVALID
        assert "no tensor map" in cuda.standin.complaint()
    assert cuda.launch(function, (cuda.map(base, dims=(64, 101)), 0, 1)) == ILLEGAL
    assert "parameter 0's map" in cuda.standin.complaint()
    assert cuda.launch(function, (cuda.map(base + 16, dims=(56, 100)), 0, 1)) == 0
    assert cuda.launch(function, (cuda.map(base + 16), 0, 1)) == ILLEGAL
    cuda.ok("cuMemFree_v2", base)
    assert cuda.launch(function, (good, 0, 1)) == ILLEGAL
    assert "was freed" in cuda.standin.complaint()


def test_shared_memory_is_asked_for_first(cuda: Cuda) -> None:
    image = cubin({"k": (4,)}, static=1024, block=256)
    function = cuda.function(image, "k")
    block = (256, 1, 1)
    assert cuda.attribute(function, 1) == 1024
    assert cuda.attribute(function, 8) == 48128
    assert cuda.launch(function, (1,), block=block, shared=48128) == 0
    assert cuda.launch(function, (1,), block=block, shared=48129) == INVALID
    most = 232_448 - 1024
    cuda.refused(INVALID, f"wanted 0..{most}", "cuFuncSetAttribute", function, 8, most + 1)
    cuda.refused(INVALID, "attribute 7 = 1", "cuFuncSetAttribute", function, 7, 1)
    cuda.refused(INVALID, "attribute 9 = 101", "cuFuncSetAttribute", function, 9, 101)
    cuda.ok("cuFuncSetAttribute", function, 9, 100)
    cuda.ok("cuFuncSetAttribute", function, 8, most)
    assert cuda.attribute(function, 8) == most
    assert cuda.launch(function, (1,), block=block, shared=most) == 0
    assert cuda.launch(function, (1,), block=block, shared=most + 1) == INVALID
    assert cuda.launch(function, (1,), block=(128, 2, 1)) == INVALID
    assert "compiled for blocks of 256 threads" in cuda.standin.complaint()


ENCODED: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": ({"rank": 0}, "rank: got 0"),
    "rank 6": ({"rank": 6}, "rank: got 6"),
    "base": ({"base": 0x10008}, "base: got 65544"),
    "null": ({"base": 0}, "base: got 0"),
    "stride": ({"strides": (136,)}, "stride 0: got 136"),
    "a long stride": ({"strides": (1 << 40,)}, "stride 0"),
    "dimension 0": ({"dims": (64, 0)}, "dimension 1: got 0"),
    "a long dimension": ({"dims": ((1 << 32) + 1, 1)}, "dimension 0"),
    "box 0": ({"box": (64, 0)}, "box 1: got 0"),
    "box 257": ({"box": (64, 257)}, "box 1: got 257"),
    "inner box": ({"box": (60, 64)}, "inner box bytes: got 120"),
    "swizzle 32": ({"swizzle": 1, "box": (32, 8)}, "span, 32"),
    "swizzle 64": ({"swizzle": 2, "box": (64, 8)}, "span, 64"),
    "swizzle 128": ({"box": (128, 8)}, "span, 128"),
    "swizzle": ({"swizzle": 7}, "swizzle: got 7"),
    "element stride 0": ({"steps": (1, 0)}, "element stride 1: got 0"),
    "element stride 9": ({"steps": (1, 9)}, "element stride 1: got 9"),
    "interleave": ({"interleave": 1}, "interleave: got 1"),
    "type": ({"type": 13}, "type: got 13"),
    "its own address": ({"aside": 32}, "multiple of 64"),
}


@pytest.mark.parametrize("name", ENCODED)
def test_a_wrong_tensor_map_is_refused(cuda: Cuda, name: str) -> None:
    change, words = ENCODED[name]
    code, _ = cuda.encode(**{"base": 0x10000, **change})
    assert code == INVALID
    assert words in cuda.standin.complaint()


def test_the_largest_tensor_map_comes_back_whole(cuda: Cuda) -> None:
    strides = (16, (1 << 40) - 16, 1 << 36, 4096)
    dims = (1 << 32, 1, 2, 3, 1 << 32)
    box, steps = (256, 1, 256, 3, 4), (1, 8, 2, 3, 4)
    given = {"dims": dims, "strides": strides, "box": box, "steps": steps, "swizzle": 0, "type": 0}
    found = cuda.standin.tensor_map(cuda.map(1 << 46, **given))
    assert found == TensorMap(1 << 46, 0, dims, strides, box, steps, 0, 0, 2, 0)


def test_before_sm_90_there_are_neither_maps_nor_overlap(library: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(library, tmp_path))
    Standin(path).device(8, 0, 108)
    cuda = Cuda(path)
    assert cuda.encode(base=0x10000)[0] == 801
    function = cuda.function(cubin({"k": (4,)}, 80), "k")
    assert cuda.launch(function, (1,), attributes=[(6, 0)]) == 0
    assert cuda.launch(function, (1,), attributes=[(6, 1)]) == INVALID
    assert "before sm_90" in cuda.standin.complaint()


# -- memory and faults -----------------------------------------------------------------------------


def test_memory_is_counted_and_ends(cuda: Cuda) -> None:
    cuda.standin.memory(1000)
    first = cuda.made("cuMemAlloc_v2", 600)
    assert first % 256 == 0
    assert cuda.read(first) != bytes(8)
    space = ctypes.byref(ctypes.c_uint64())
    assert cuda("cuMemAlloc_v2", space, 401) == NO_MEMORY
    assert cuda("cuMemAllocAsync", space, 1 << 63, None) == NO_MEMORY
    second = cuda.made("cuMemAllocAsync", 400, None)
    pinned = cuda.made("cuMemHostAlloc", 5000, 0)
    assert cuda.standin.live() == Live(2, 1000, 1, 0, 0, 0, 1)
    cuda.ok("cuMemFreeAsync", second, None)
    cuda.refused(INVALID, "of no stream", "cuMemFreeAsync", first, None)
    cuda.ok("cuMemFreeHost", pinned)
    assert cuda.standin.live() == Live(1, 1000, 0, 0, 0, 0, 1)
    assert cuda("cuMemAlloc_v2", space, 1) == NO_MEMORY
    cuda.ok("cuStreamSynchronize", None)
    assert cuda.standin.live() == Live(1, 600, 0, 0, 0, 0, 1)
    cuda.ok("cuMemFree_v2", first)
    assert cuda.standin.live() == Live(0, 0, 0, 0, 0, 0, 1)
    cuda.refused(INVALID, "not allocated", "cuMemFreeHost", pinned)
    cuda.refused(INVALID, "0 bytes", "cuMemAlloc_v2", space, 0)
    cuda.refused(INVALID, "0 bytes", "cuMemHostAlloc", space, 0, 0)
    third = cuda.made("cuMemAlloc_v2", 100)
    cuda.refused(INVALID, "does not begin one", "cuMemFree_v2", third + 16)
    cuda.refused(INVALID, "past the end", "cuMemcpyHtoDAsync_v2", third, bytes(101), 101, None)
    cuda.refused(INVALID, "null", "cuMemcpyHtoDAsync_v2", third, None, 8, None)


def test_the_nth_call_fails_once(cuda: Cuda) -> None:
    calls = cuda.standin.calls()
    cuda.standin.fail(3, NO_MEMORY)
    space = ctypes.byref(ctypes.c_uint64())
    codes = [cuda("cuMemAlloc_v2", space, 8) for _ in range(5)]
    assert codes == [0, 0, NO_MEMORY, 0, 0]
    assert cuda.standin.calls() == calls + 5
    assert cuda.standin.live().allocations == 4


@pytest.mark.parametrize("code", standin.STICKY)
def test_a_lost_context_stays_lost_and_gives_back(cuda: Cuda, code: int) -> None:
    function = cuda.function(PLAIN, "plain")
    out, stream = cuda.allocate(b"untouched"), cuda.made("cuStreamCreate", 1)
    launches = cuda.standin.launches()
    cuda.standin.fail_launch(2, code)
    assert cuda.launch(function, (0, 0, 1)) == 0
    cuda.ok("cuStreamSynchronize", stream)
    assert cuda.launch(function, (out, 0, 1)) == code
    assert cuda.launch(function, (out, 0, 1)) == code
    assert cuda.standin.launches() == launches + 3
    assert cuda("cuStreamSynchronize", stream) == code
    assert cuda("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), 8) == code
    assert cuda("cuStreamDestroy_v2", stream) == code
    assert cuda.standin.live() == Live(1, 9, 0, 1, 0, 0, 1)
    cuda.standin.reset()
    assert cuda.read(out, 9) == b"untouched"
    assert cuda.launch(function, (out, 0, 1)) == 0


def test_without_checks_a_wrong_call_passes(cuda: Cuda) -> None:
    function = cuda.function(PLAIN, "plain")
    out = cuda.allocate(bytes(8))
    cuda.standin.checks(False)
    assert cuda.launch(function, (out, 1 << 40, 1), grid=(0, 1, 1), shared=1 << 20) == 0
    assert cuda.read(out) != bytes(8)


# -- while a graph is captured ---------------------------------------------------------------------


def exchange(cuda: Cuda, mode: int) -> int:
    found = ctypes.c_int(mode)
    cuda.ok("cuThreadExchangeStreamCaptureMode", ctypes.byref(found))
    return found.value


def unsafe(cuda: Cuda) -> list[Callable[[], int]]:
    """A call each that CUDA refuses while a graph is captured, in the order to make them."""
    space, stream = ctypes.byref(ctypes.c_uint64()), cuda.made("cuStreamCreate", 1)
    module = cuda.made("cuModuleLoadData", PLAIN)
    fixed, pooled = cuda.made("cuMemAlloc_v2", 8), cuda.made("cuMemAllocAsync", 8, stream)
    pinned = cuda.made("cuMemHostAlloc", 8, 0)
    calls: list[tuple[Any, ...]] = [
        ("cuModuleLoadData", space, PLAIN),
        ("cuModuleGetFunction", space, module, b"plain"),
        ("cuModuleUnload", module),
        ("cuMemAlloc_v2", space, 8),
        ("cuMemFree_v2", fixed),
        ("cuMemAllocAsync", space, 8, stream),
        ("cuMemFreeAsync", pooled, stream),
        ("cuMemHostAlloc", space, 8, 0),
        ("cuMemFreeHost", pinned),
    ]
    return [lambda one=one: cuda(*one) for one in calls]


def test_while_a_graph_is_captured_only_a_relaxed_thread_loads_and_allocates(cuda: Cuda) -> None:
    assert exchange(cuda, 0) == 0
    for mode, code in ((0, CAPTURED), (1, CAPTURED), (2, 0)):
        calls = unsafe(cuda)
        exchange(cuda, mode)
        cuda.standin.capturing(True)
        for call in calls:
            cuda.standin.reset()
            assert call() == code
            assert ("a graph is captured" in cuda.standin.complaint()) == (code != 0)
        cuda.standin.capturing(False)
        assert exchange(cuda, 0) == mode
    with ThreadPoolExecutor(1) as pool:  # a thread's mode is its own
        exchange(cuda, 2)
        pool.submit(cuda.ok, "cuCtxSetCurrent", cuda.context).result()
        assert pool.submit(exchange, cuda, 2).result() == 0
    mode = ctypes.c_int(3)
    assert cuda("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode)) == INVALID


# -- the driver that does nothing, and threads -----------------------------------------------------


def run_program(library: Path, folder: Path, name: str, flags: Sequence[str] = ()) -> str:
    """What a program of tests/standin/programs prints, linked with ``library``."""
    program = standin.compiler()
    assert program is not None
    source, binary, image = standin.FOLDER / "programs" / name, folder / "program", folder / "image"
    image.write_bytes(PLAIN)
    command: list[str | Path] = [
        program,
        "-std=c++17",
        "-O2",
        "-rdynamic",
        "-pthread",
        *flags,
        source,
        library,
    ]
    subprocess.run([*command, f"-I{standin.FOLDER}", "-o", binary], check=True)
    # ThreadSanitizer's memory has a fixed place, which a randomised layout may have taken
    setarch = shutil.which("setarch") if flags else None
    start = [setarch, "--addr-no-randomize"] if setarch else []
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library.parent)}
    run = subprocess.run(
        [*start, binary, image], capture_output=True, text=True, env=environment, timeout=120
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_the_driver_that_does_nothing_neither_locks_nor_allocates(
    library: Path, tmp_path: Path
) -> None:
    found = dict(line.split() for line in run_program(library, tmp_path, "idle.cpp").splitlines())
    assert int(found["checked-locks"]) > 0, "the program counts nothing"
    assert int(found["checked-allocations"]) > 0, "the program counts nothing"
    assert found["locks"] == found["allocations"] == "0"
    assert float(found["nanoseconds"]) < 50


@pytest.mark.parametrize(
    "flags", [(), pytest.param(("-fsanitize=thread", "-g"), marks=pytest.mark.slow)], ids=str
)
def test_sixteen_threads_at_once(library: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    built = standin.build(flags) if flags else library
    assert run_program(built, tmp_path, "threads.cpp", flags).split() == ["16", "alike"]
