"""Launches of the driver stand-in that compute: which do, when they run, and what a fault does."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import emulator
import standin
from standin import STICKY
from standin.calls import Cuda, cubin
from standin.emulation import Emulation

ILLEGAL, FAILED, BAD_IMAGE, NO_BINARY, BAD_VALUE = 700, 719, 200, 209, 1

HEAD = ".version 8.0\n.target sm_90\n.address_size 64\n"
ADD = (
    HEAD
    + """
.visible .entry add(.param .u64 out, .param .u64 x, .param .u32 step) {
    .reg .b32 %r<4>; .reg .b64 %rd<5>;
    ld.param.u64 %rd1, [out]; ld.param.u64 %rd2, [x]; ld.param.u32 %r1, [step];
    mov.u32 %r2, %tid.x;
    griddepcontrol.launch_dependents;
    griddepcontrol.wait;
    mul.wide.u32 %rd3, %r2, 4;
    add.s64 %rd4, %rd2, %rd3;
    ld.global.u32 %r3, [%rd4];
    add.s32 %r3, %r3, %r1;
    add.s64 %rd4, %rd1, %rd3;
    st.global.u32 [%rd4], %r3;
    ret;
}
"""
)
CUBIN = cubin({"add": (8, 8, 4)})
THREADS = 32
BYTES = 4 * THREADS


@pytest.fixture(scope="module")
def library() -> Path:
    if standin.compiler() is None:
        pytest.skip("the emulator: no C++ compiler here")
    return standin.build()


@pytest.fixture
def cuda(library: Path, tmp_path: Path) -> Cuda:
    return Cuda(Path(shutil.copy(library, tmp_path)))


@pytest.fixture
def emulation(cuda: Cuda) -> Emulation:
    emulation = Emulation(cuda.standin)
    emulation.source(CUBIN, ADD)
    return emulation


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def counting(first: int) -> bytes:
    return words(*range(first, first + THREADS))


class Chain:
    """Launches of `ADD`, each over the output of the one before."""

    def __init__(self, cuda: Cuda, count: int) -> None:
        self.cuda = cuda
        self.function = cuda.function(CUBIN, "add")
        self.buffers = [cuda.allocate(counting(0))]
        self.buffers += [cuda.made("cuMemAlloc_v2", BYTES) for _ in range(count)]

    def launch(self, number: int, stream: int | None = None, pdl: bool = True) -> int:
        values = [self.buffers[number + 1], self.buffers[number], 10]
        attributes = [(6, 1)] if pdl else []
        return self.cuda.launch(
            self.function,
            values,
            grid=(1, 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
            attributes=attributes,
        )

    def holds(self, number: int) -> bytes:
        """Device memory as it is now, without a call of the driver."""
        return ctypes.string_at(self.buffers[number], BYTES)


# -- what computes ---------------------------------------------------------------------------------


def test_a_cubin_computes_whose_ptx_is_known_and_another_leaves_its_digest(
    cuda: Cuda, emulation: Emulation
) -> None:
    chain = Chain(cuda, 1)
    cuda.standin.record(True)
    assert chain.launch(0) == 0
    assert cuda.read(chain.buffers[1], BYTES) == counting(10)
    assert emulation.totals().launches == 1
    other = cuda.function(cubin({"add": (8, 8, 4)}, static=4), "add")
    cuda.ok("cuStreamSynchronize", None)
    out = cuda.allocate(bytes(BYTES))
    code = cuda.launch(other, [out, chain.buffers[0], 10], grid=(1, 1, 1), block=(THREADS, 1, 1))
    assert code == 0
    computed, digested = cuda.standin.launched()
    assert computed.digest == 0
    assert digested.digest != 0
    assert cuda.read(out, BYTES) == struct.pack("<Q", digested.digest).ljust(BYTES, b"\0")
    assert emulation.totals().launches == 1


def test_a_cubin_of_one_byte_more_is_another(cuda: Cuda, emulation: Emulation) -> None:
    changed = bytearray(CUBIN)
    changed[70] ^= 1  # of its code, which the stand-in does not read
    chain = Chain(cuda, 1)
    chain.function = cuda.function(bytes(changed), "add")
    assert chain.launch(0) == 0
    assert cuda.read(chain.buffers[1], BYTES) != counting(10)


def test_ptx_with_other_parameters_is_refused(cuda: Cuda, emulation: Emulation) -> None:
    for sizes, values in (((8, 8), [0, 0]), ((8, 8, 8), [0, 0, 0])):
        image = cubin({"add": sizes})
        emulation.source(image, ADD)
        function = cuda.function(image, "add")
        assert cuda.launch(function, values) == BAD_IMAGE
        assert "add: its PTX has other parameters than its cubin" in cuda.standin.complaint()


def test_ptx_that_does_not_parse_does_not_load(cuda: Cuda, emulation: Emulation) -> None:
    image = cubin({"add": (8, 8, 4)}, static=8)
    emulation.source(image, HEAD + ".visible .entry add(")
    module = ctypes.c_void_p()
    assert cuda("cuModuleLoadData", ctypes.byref(module), image) == BAD_IMAGE
    assert cuda.standin.complaint().startswith("cuModuleLoadData: ")


def member(code: bytes, *, machine: bool = True) -> bytes:
    """One member of a fatbin, uncompressed."""
    return struct.pack("<HHIQ", 2 if machine else 1, 0x101, 64, len(code)).ljust(64, b"\0") + code


def fatbin(*members: bytes) -> bytes:
    body = b"".join(members)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_a_fatbin_loads_the_cubin_for_the_device(cuda: Cuda, emulation: Emulation) -> None:
    images = {arch: cubin({"add": (8, 8, 4)}, arch) for arch in (80, 86, 90, 100)}
    text = member(b"\n" + ADD.encode() + b"\0", machine=False)
    whole = fatbin(*(member(images[arch]) for arch in (80, 86)), text, member(images[90]))
    chain = Chain(cuda, 2)
    chain.function = cuda.function(whole, "add")
    assert cuda.attribute(chain.function, 6) == 90
    assert chain.launch(0) == 0
    assert cuda.read(chain.buffers[1], BYTES) == counting(10), "the member is CUBIN itself"
    only = fatbin(member(images[90]), member(images[100]))
    emulation.source(only, ADD.replace("add.s32", "sub.s32"))
    chain.function = cuda.function(only, "add")
    assert chain.launch(1) == 0
    assert cuda.read(chain.buffers[2], BYTES) == counting(0)
    module = ctypes.c_void_p()
    older = fatbin(member(images[80]), text)
    cuda.refused(NO_BINARY, "no machine code for sm_90", "cuModuleLoadData", module, older)
    with pytest.raises(ValueError, match="no machine code for sm_90"):
        emulation.source(older, ADD)
    for wrong, words in (
        (fatbin(), "the fatbin is empty"),
        (fatbin(member(b"\x28\xb5\x2f\xfd" + bytes(100))), "compressed"),
        (fatbin(member(CUBIN), struct.pack("<HHIQ", 9, 1, 16, 0)), "a member that is not read"),
        (fatbin(member(CUBIN)[:80], bytes(8)), "a member that is not read"),
    ):
        cuda.refused(BAD_IMAGE, words, "cuModuleLoadData", module, wrong)


# -- when launches run -----------------------------------------------------------------------------


def test_without_overlap_a_launch_runs_at_once(cuda: Cuda, emulation: Emulation) -> None:
    chain = Chain(cuda, 1)
    assert chain.launch(0) == 0
    assert chain.holds(1) == counting(10)


def event(cuda: Cuda) -> int:
    made = cuda.made("cuEventCreate", 0)
    cuda.ok("cuEventRecord", made, None)
    return made


NEEDS: dict[str, Any] = {
    "cuStreamSynchronize": lambda cuda, chain: cuda.ok("cuStreamSynchronize", None),
    "cuMemcpyDtoHAsync": lambda cuda, chain: cuda.read(chain.buffers[0]),
    "cuMemcpyHtoDAsync": lambda cuda, chain: cuda.allocate(b"12345678"),
    "cuMemFree": lambda cuda, chain: cuda.ok("cuMemFree_v2", cuda.made("cuMemAlloc_v2", 8)),
    "cuEventQuery": lambda cuda, chain: cuda.ok("cuEventQuery", event(cuda)),
    "cuEventSynchronize": lambda cuda, chain: cuda.ok("cuEventSynchronize", event(cuda)),
    "another stream": lambda cuda, chain: chain.launch(2, cuda.made("cuStreamCreate", 1)),
    "a launch that may not overlap": lambda cuda, chain: chain.launch(2, pdl=False),
    "a digest": lambda cuda, chain: cuda.launch(
        cuda.function(cubin({"add": (8, 8, 4)}, static=4), "add"), [chain.buffers[3], 0, 0]
    ),
    "finish": lambda cuda, chain: cuda.standin.driver.standin_finish(),
}


@pytest.mark.parametrize("name", NEEDS)
def test_with_overlap_launches_wait_until_something_needs_them(
    cuda: Cuda, emulation: Emulation, name: str
) -> None:
    emulation.schedule(1, overlap=True)
    chain = Chain(cuda, 3)
    before = chain.holds(1), chain.holds(2)
    assert chain.launch(0) == 0
    assert chain.launch(1) == 0
    cuda.made("cuMemAlloc_v2", 8)  # needs nothing of them
    assert (chain.holds(1), chain.holds(2)) == before
    NEEDS[name](cuda, chain)
    assert (chain.holds(1), chain.holds(2)) == (counting(10), counting(20))
    assert emulation.totals().launches == 2


def test_a_launch_that_does_not_wait_for_the_one_it_overlaps_is_a_fault(
    cuda: Cuda, emulation: Emulation
) -> None:
    image = cubin({"add": (8, 8, 4)}, static=40)
    emulation.source(image, ADD.replace("griddepcontrol.wait;", ""))
    chain = Chain(cuda, 2)
    chain.function = cuda.function(image, "add")
    for overlap, code in ((False, 0), (True, ILLEGAL)):
        emulation.schedule(2, overlap=overlap)
        assert [chain.launch(0), chain.launch(1)] == [0, 0]
        assert cuda("cuStreamSynchronize", None) == code
    assert "add (launch 0) writes, before add (launch 1) has waited" in cuda.standin.complaint()


# -- faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_a_fault_is_the_error_of_what_needed_the_result_and_of_all_later_calls(
    cuda: Cuda, emulation: Emulation, overlap: bool
) -> None:
    emulation.schedule(1, overlap=overlap)
    chain = Chain(cuda, 1)
    chain.buffers[0] = cuda.allocate(bytes(BYTES - 4))
    emulation.name(chain.buffers[0], "the short one")
    assert chain.launch(0) == (0 if overlap else ILLEGAL)
    assert cuda("cuStreamSynchronize", None) == ILLEGAL
    complaint = cuda.standin.complaint()
    assert "global memory" in complaint
    assert "add" in complaint
    assert "the short one" in complaint
    assert ILLEGAL in STICKY
    assert cuda("cuStreamSynchronize", None) == ILLEGAL
    cuda.standin.reset()
    cuda.ok("cuStreamSynchronize", None)


def test_what_gives_memory_back_does_so_after_the_launches_that_use_it(
    cuda: Cuda, emulation: Emulation
) -> None:
    emulation.schedule(1, overlap=True)
    chain = Chain(cuda, 1)
    assert chain.launch(0) == 0
    cuda.ok("cuMemFree_v2", chain.buffers[0])
    assert chain.holds(1) == counting(10)


def test_a_kernel_that_uses_freed_memory_is_noticed(cuda: Cuda, emulation: Emulation) -> None:
    """The address comes by memory: the launch's own parameters are all alive."""
    ptx = ADD.replace(
        "ld.param.u64 %rd2, [x];", "ld.param.u64 %rd2, [x]; ld.global.u64 %rd2, [%rd2];"
    )
    image = cubin({"add": (8, 8, 4)}, static=16)
    emulation.source(image, ptx)
    x, out = cuda.allocate(counting(0)), cuda.made("cuMemAlloc_v2", BYTES)
    pointer, function = cuda.allocate(struct.pack("<Q", x)), cuda.function(image, "add")
    shape = {"grid": (1, 1, 1), "block": (THREADS, 1, 1)}
    assert cuda.launch(function, [out, pointer, 10], **shape) == 0
    assert cuda.read(out, BYTES) == counting(10)
    cuda.ok("cuMemFree_v2", x)
    assert cuda.launch(function, [out, pointer, 10], **shape) == ILLEGAL
    assert "memory that was freed" in cuda.standin.complaint()


def test_bytes_that_nobody_wrote_are_noticed(cuda: Cuda, emulation: Emulation) -> None:
    emulation.track(True)
    x, out = cuda.made("cuMemAlloc_v2", BYTES), cuda.made("cuMemAlloc_v2", 2 * BYTES)
    emulation.name(x, "nobody's", written=False)
    function = cuda.function(CUBIN, "add")
    shape = {"grid": (1, 1, 1), "block": (THREADS, 1, 1)}
    cuda.ok("cuMemcpyHtoDAsync_v2", x, counting(0), BYTES - 4, None)
    assert cuda.launch(function, [out, x, 10], **shape) == ILLEGAL
    assert "nobody's" in cuda.standin.complaint()
    cuda.standin.reset()
    cuda.ok("cuMemcpyHtoDAsync_v2", x, counting(0), BYTES, None)
    assert cuda.launch(function, [out, x, 10], **shape) == 0
    emulation.check_written(out, BYTES)
    with pytest.raises(ValueError, match=f"{BYTES} of {2 * BYTES} bytes of allocation .* {BYTES}$"):
        emulation.check_written(out, 2 * BYTES)
    data = ctypes.create_string_buffer(2 * BYTES)
    cuda.refused(
        BAD_VALUE, "were never written", "cuMemcpyDtoHAsync_v2", data, out, 2 * BYTES, None
    )
    assert cuda.read(out, BYTES) == counting(10)


def test_a_kernel_that_ends_in_a_trap_fails_the_launch(cuda: Cuda, emulation: Emulation) -> None:
    image = cubin({"add": (8, 8, 4)}, static=32)
    emulation.source(image, ADD.replace("ret;", "trap;"))
    chain = Chain(cuda, 1)
    chain.function = cuda.function(image, "add")
    assert chain.launch(0) == FAILED
    assert "trap" in cuda.standin.complaint()


# -- other programs --------------------------------------------------------------------------------

PROGRAM = """
import sys
from pathlib import Path
from standin import test_standin_emulation as tests
cuda = tests.Cuda(Path(sys.argv[1]))
chain = tests.Chain(cuda, 2)
assert (chain.launch(0), chain.launch(1)) == (0, 0)
print(chain.holds(1) == tests.counting(10), cuda.read(chain.buffers[2], 128) == tests.counting(20))
"""


def test_a_program_computes_that_is_told_so_by_the_environment(
    library: Path, tmp_path: Path
) -> None:
    (tmp_path / "emulator.so").symlink_to(emulator.build())
    (tmp_path / "add.cubin").write_bytes(CUBIN)
    (tmp_path / "add.ptx").write_text(ADD)
    for overlap in (0, 1):
        told = {"STANDIN_EMULATION": str(tmp_path), "STANDIN_SEED": "3"}
        told |= {"STANDIN_OVERLAP": str(overlap), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", PROGRAM, library]
        run = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert run.stdout.split() == [str(not overlap), "True"]
    (tmp_path / "add.cubin").write_bytes(b"no cubin")
    run = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True)
    assert run.returncode != 0
    assert "STANDIN_EMULATION: standin_ptx: " in run.stderr
