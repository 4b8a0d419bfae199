"""The driver stand-in with several devices: each object is of one device, and refused elsewhere."""

from __future__ import annotations

import ctypes
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import standin
from standin import Live
from standin.calls import Cuda, cubin

INVALID, NO_MEMORY, NO_CONTEXT, NO_BINARY, BAD_HANDLE, ILLEGAL = 1, 2, 201, 209, 400, 700
ELSEWHERE = "is of device 0, the current context of device 1"
PLAIN = cubin({"plain": (8, 8, 4)})
MAPPED = cubin({"mapped": (128, 8, 4)})


class Devices(Cuda):
    """Two devices of sm_90; the context of device 0 is current on this thread."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        assert self.standin.add_device(9, 0, 66) == 1
        self.contexts = [self.context, ctypes.c_void_p()]
        self.ok("cuDevicePrimaryCtxRetain", ctypes.byref(self.contexts[1]), 1)

    def on(self, device: int) -> None:
        self.ok("cuCtxSetCurrent", self.contexts[device])


@pytest.fixture
def cuda(tmp_path: Path) -> Devices:
    if standin.compiler() is None:
        pytest.skip("the driver stand-in: no C++ compiler here")
    return Devices(Path(shutil.copy(standin.build(), tmp_path)))


def test_each_device_has_its_own_facts(cuda: Devices) -> None:
    assert cuda.standin.add_device(8, 6, 84) == 2
    count, value, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(64)
    cuda.ok("cuDeviceGetCount", ctypes.byref(count))
    assert count.value == 3
    facts = []
    for ordinal in range(3):
        device = ctypes.c_int()
        cuda.ok("cuDeviceGet", ctypes.byref(device), ordinal)
        cuda.ok("cuDeviceGetName", name, 64, device)
        cuda.ok("cuDeviceGetAttribute", ctypes.byref(value), 16, device)
        facts.append((device.value, name.value, value.value))
    assert facts == [
        (0, b"stand-in sm_90", 132),
        (1, b"stand-in sm_90", 66),
        (2, b"stand-in sm_86", 84),
    ]
    for call, *arguments in (
        ("cuDeviceGet", ctypes.byref(value), 3),
        ("cuDeviceGet", ctypes.byref(value), -1),
        ("cuDeviceGetName", name, 64, 3),
        ("cuDeviceGetAttribute", ctypes.byref(value), 16, 3),
        ("cuDevicePrimaryCtxRetain", ctypes.byref(ctypes.c_void_p()), 3),
        ("cuDevicePrimaryCtxRelease_v2", 3),
    ):
        cuda.refused(101, "there is 0 to 2", call, *arguments)
    for _ in range(5):
        cuda.standin.add_device()
    with pytest.raises(ValueError, match="has no more"):
        cuda.standin.add_device()


def objects(cuda: Devices) -> dict[str, Any]:
    """Of the device whose context is current."""
    stream = cuda.made("cuStreamCreate", 1)
    module = cuda.made("cuModuleLoadData", PLAIN)
    return {
        "stream": stream,
        "event": cuda.made("cuEventCreate", 2),
        "module": module,
        "function": cuda.function(PLAIN, "plain"),
        "memory": cuda.allocate(bytes(64)),
        "pooled": cuda.made("cuMemAllocAsync", 64, stream),
        "pinned": cuda.made("cuMemHostAlloc", 64, 0),
    }


def uses(of: dict[str, Any], own: dict[str, Any]) -> list[tuple[str, int, tuple[Any, ...]]]:
    """A call for each way to use ``of``, beside what else it needs of ``own``: words of the
    complaint, its code, name and arguments. What gives an object back comes last."""
    space, host = ctypes.byref(ctypes.c_uint64()), ctypes.create_string_buffer(8)
    return [
        ("the module", BAD_HANDLE, ("cuModuleGetFunction", space, of["module"], b"plain")),
        ("the function", BAD_HANDLE, ("cuFuncSetAttribute", of["function"], 9, 50)),
        ("the function", BAD_HANDLE, ("cuFuncGetAttribute", space, 0, of["function"])),
        ("the function", BAD_HANDLE, ("cuFuncGetParamInfo", of["function"], 0, space, None)),
        ("the stream", BAD_HANDLE, ("cuMemAllocAsync", space, 8, of["stream"])),
        ("the stream", BAD_HANDLE, ("cuMemFreeAsync", own["pooled"], of["stream"])),
        ("the memory", INVALID, ("cuMemcpyHtoDAsync_v2", of["memory"], bytes(8), 8, None)),
        ("the memory", INVALID, ("cuMemcpyDtoHAsync_v2", host, of["memory"], 8, None)),
        ("stream", BAD_HANDLE, ("cuMemcpyDtoHAsync_v2", host, own["memory"], 8, of["stream"])),
        ("the stream", BAD_HANDLE, ("cuStreamSynchronize", of["stream"])),
        ("the stream", BAD_HANDLE, ("cuStreamWaitEvent", of["stream"], own["event"], 0)),
        ("the stream", BAD_HANDLE, ("cuEventRecord", own["event"], of["stream"])),
        ("the event", BAD_HANDLE, ("cuEventRecord", of["event"], own["stream"])),
        ("the memory", INVALID, ("cuMemFreeAsync", of["pooled"], own["stream"])),
        ("the memory", INVALID, ("cuMemFree_v2", of["memory"])),
        ("the memory", INVALID, ("cuMemFreeHost", of["pinned"])),
        ("the event", BAD_HANDLE, ("cuEventDestroy_v2", of["event"])),
        ("the stream", BAD_HANDLE, ("cuStreamDestroy_v2", of["stream"])),
        ("the module", BAD_HANDLE, ("cuModuleUnload", of["module"])),
    ]


def test_what_is_of_one_device_is_refused_under_anothers_context(cuda: Devices) -> None:
    """And not given back; under its own device's context every call passes."""
    first = objects(cuda)
    cuda.on(1)
    second = objects(cuda)
    live = cuda.standin.live()
    for words, code, (name, *arguments) in uses(first, second):
        cuda.refused(code, f"{words} {ELSEWHERE}", name, *arguments)
        assert cuda.standin.live() == live, name
    cuda.standin.reset()
    assert cuda.launch(first["function"], (second["memory"], 0, 1)) == BAD_HANDLE
    assert f"the function {ELSEWHERE}" in cuda.standin.complaint()
    function, out = second["function"], second["memory"]
    assert cuda.launch(function, (out, 0, 1), stream=first["stream"]) == BAD_HANDLE
    assert f"the stream {ELSEWHERE}" in cuda.standin.complaint()
    cuda.standin.reset()
    for name, *arguments in (  # these CUDA allows, too
        ("cuStreamWaitEvent", second["stream"], first["event"], 0),
        ("cuEventQuery", first["event"]),
        ("cuEventSynchronize", first["event"]),
    ):
        cuda.ok(name, *arguments)
    cuda.on(0)
    for _, _, (name, *arguments) in uses(first, first):
        if name == "cuMemFreeAsync":
            continue
        cuda.ok(name, *arguments)
    cuda.ok("cuCtxSetCurrent", None)
    assert cuda.standin.complaint() == ""


def test_without_a_current_context_nothing_is_used(cuda: Devices) -> None:
    made = objects(cuda)
    cuda.ok("cuCtxSetCurrent", None)
    for _, _, (name, *arguments) in uses(made, made):
        cuda.refused(NO_CONTEXT, "no current context", name, *arguments)
    assert cuda.launch(made["function"], (made["memory"], 0, 1)) == NO_CONTEXT
    cuda.on(1)
    cuda.ok("cuDevicePrimaryCtxRelease_v2", 1)  # the context is current, and no longer alive
    cuda.refused(NO_CONTEXT, "no current context", "cuStreamCreate", ctypes.byref(cuda.context), 1)
    cuda.refused(NO_CONTEXT, "not alive", "cuCtxSetCurrent", cuda.contexts[1])
    cuda.on(0)
    cuda.refused(NO_CONTEXT, "not retained", "cuDevicePrimaryCtxRelease_v2", 1)
    cuda.ok("cuStreamSynchronize", None)


def test_contexts_of_several_devices_are_one_stack(cuda: Devices) -> None:
    current = ctypes.c_void_p()
    for device, expected in ((1, 1), (0, 0), (1, 1)):
        cuda.ok("cuCtxPushCurrent_v2", cuda.contexts[device])
        cuda.ok("cuCtxGetCurrent", ctypes.byref(current))
        assert current.value == cuda.contexts[expected].value
    assert cuda.contexts[0].value != cuda.contexts[1].value
    for device in (1, 0, 1, 0):
        cuda.ok("cuCtxPopCurrent_v2", ctypes.byref(current))
        assert current.value == cuda.contexts[device].value


def test_a_launch_uses_the_memory_of_its_device(cuda: Devices) -> None:
    there = cuda.allocate(bytes(128 * 100))
    there_map = cuda.map(there)
    cuda.on(1)
    here = cuda.allocate(bytes(128 * 100))
    plain, mapped = cuda.function(PLAIN, "plain"), cuda.function(MAPPED, "mapped")
    assert cuda.launch(plain, (here, here, 1)) == cuda.launch(mapped, (cuda.map(here), 0, 1)) == 0
    for function, values, words in (
        (plain, (there, here, 1), "plain: parameter 0"),
        (plain, (here, there, 1), "plain: parameter 1"),
        (mapped, (there_map, here, 1), "mapped: parameter 0's map"),
    ):
        assert cuda.launch(function, values) == ILLEGAL
        assert f"{words} {ELSEWHERE}" in cuda.standin.complaint()
    space = ctypes.create_string_buffer(256)
    start = ctypes.addressof(space) + -ctypes.addressof(space) % 64
    cuda.standin.register(start, 64, device=0)
    assert cuda.launch(plain, (here, start, 1)) == ILLEGAL
    cuda.standin.unregister(start)
    for device in (1, None):  # memory of this device, and of any
        cuda.standin.register(start, 64, device=device)
        assert cuda.launch(plain, (here, start, 1)) == 0
        cuda.standin.unregister(start)
    cuda.standin.checks(False)
    assert cuda.launch(plain, (here, there, 1)) == 0


def test_records_and_counts_tell_the_device(cuda: Devices) -> None:
    cuda.standin.record(True)
    launched = []
    for device in (1, 0, 1):
        cuda.on(device)
        function, out = cuda.function(PLAIN, "plain"), cuda.allocate(bytes(64))
        for _ in range(device + 1):
            assert cuda.launch(function, (out, 0, 1)) == 0
            launched.append(device)
    assert [launch.device for launch in cuda.standin.launched()] == launched
    assert [cuda.standin.launches(device) for device in (0, 1)] == [1, 4]
    assert cuda.standin.launches() == 5
    before = [cuda.standin.calls(device) for device in (0, 1)]
    cuda.ok("cuStreamSynchronize", None)
    assert [cuda.standin.calls(device) for device in (0, 1)] == [before[0], before[1] + 1]


def test_a_module_is_for_the_device_of_the_current_context(cuda: Devices) -> None:
    ordinal = cuda.standin.add_device(8, 0, 108)
    context = ctypes.c_void_p()
    cuda.ok("cuDevicePrimaryCtxRetain", ctypes.byref(context), ordinal)
    old, space = cubin({"k": (4,)}, 80), ctypes.byref(ctypes.c_uint64())
    cuda.refused(NO_BINARY, "another", "cuModuleLoadData", space, old)
    assert cuda.encode(base=0x10000)[0] == 0
    cuda.ok("cuCtxSetCurrent", context)
    cuda.refused(NO_BINARY, "another", "cuModuleLoadData", space, PLAIN)
    assert cuda.launch(cuda.function(old, "k"), (1,)) == 0
    assert cuda.encode(base=0x10000)[0] == 801
    assert cuda.launch(cuda.function(old, "k"), (1,), attributes=[(6, 1)]) == INVALID


def test_memory_is_counted_by_device(cuda: Devices) -> None:
    cuda.standin.memory(1000)
    cuda.standin.memory(500, device=1)
    space = ctypes.byref(ctypes.c_uint64())
    first = cuda.made("cuMemAlloc_v2", 900)
    assert cuda("cuMemAlloc_v2", space, 200) == NO_MEMORY
    cuda.on(1)
    stream = cuda.made("cuStreamCreate", 1)
    second = cuda.made("cuMemAllocAsync", 400, stream)
    assert cuda("cuMemAlloc_v2", space, 200) == NO_MEMORY
    cuda.made("cuMemHostAlloc", 5000, 0)
    assert cuda.standin.live(0) == Live(1, 900, 0, 0, 0, 0, 1)
    assert cuda.standin.live(1) == Live(1, 400, 1, 0, 1, 0, 1)
    assert cuda.standin.live() == Live(2, 1300, 1, 0, 1, 0, 2)
    cuda.ok("cuMemFreeAsync", second, stream)
    cuda.on(0)
    cuda.ok("cuStreamSynchronize", None)  # of device 0: nothing of device 1 comes back
    assert cuda.standin.live(1).bytes == 400
    cuda.on(1)
    cuda.ok("cuStreamSynchronize", stream)
    assert cuda.standin.live(1).bytes == 0
    cuda.on(0)
    cuda.ok("cuMemFree_v2", first)
    cuda.made("cuMemAlloc_v2", 100)
    assert [cuda.standin.peak(device) for device in (0, 1)] == [900, 400]
    assert [cuda.standin.peak(device) for device in (0, 1)] == [100, 0]


def test_a_lost_device_leaves_the_others(cuda: Devices) -> None:
    functions, outs = [], []
    for device in (0, 1):
        cuda.on(device)
        functions.append(cuda.function(PLAIN, "plain"))
        outs.append(cuda.allocate(bytes(8)))
    cuda.standin.fail_launch(2, 719, device=0)
    for device, code in ((1, 0), (0, 0), (1, 0), (0, 719), (0, 719), (1, 0)):
        cuda.on(device)
        assert cuda.launch(functions[device], (outs[device], 0, 1)) == code, device
    cuda.on(0)
    assert cuda("cuStreamSynchronize", None) == 719
    cuda.on(1)
    cuda.ok("cuStreamSynchronize", None)
    cuda.standin.fail(2, NO_MEMORY, device=0)
    cuda.standin.reset()
    cuda.standin.fail(2, NO_MEMORY, device=1)
    space = ctypes.byref(ctypes.c_uint64())
    assert [cuda("cuMemAlloc_v2", space, 8) for _ in range(3)] == [0, NO_MEMORY, 0]
    cuda.on(0)
    assert [cuda("cuMemAlloc_v2", space, 8) for _ in range(3)] == [0, 0, 0]


def test_threads_on_two_devices_get_what_each_gets_alone(cuda: Devices) -> None:
    def chain(device: int) -> bytes:
        cuda.ok("cuCtxPushCurrent_v2", cuda.contexts[device])
        function, stream = cuda.function(PLAIN, "plain"), cuda.made("cuStreamCreate", 1)
        out = cuda.allocate(bytes(8))
        for number in range(100):
            assert cuda.launch(function, (out, 0, number), stream=stream) == 0
        cuda.ok("cuStreamSynchronize", stream)
        digest = cuda.read(out)
        cuda.ok("cuCtxPopCurrent_v2", None)
        return digest

    expected = chain(0)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(chain, [0, 1] * 8)) == {expected}
    assert [cuda.standin.launches(device) for device in (0, 1)] == [900, 800]
    assert cuda.standin.complaint() == ""


@pytest.mark.parametrize("undo", [False, True])
def test_waiting_for_a_stream_takes_back_the_writes_on_its_device(
    cuda: Devices, undo: bool
) -> None:
    """Of the null stream each device has its own."""
    cuda.standin.undo(undo)
    outs: list[int] = []
    for device in (0, 1):
        cuda.on(device)
        outs.append(cuda.allocate(b"original"))
        assert cuda.launch(cuda.function(PLAIN, "plain"), (outs[device], 0, 1)) == 0
    cuda.ok("cuStreamSynchronize", None)  # of device 1
    assert (cuda.read(outs[1]) == b"original") == undo
    cuda.on(0)
    assert cuda.read(outs[0]) != b"original"
