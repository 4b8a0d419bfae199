"""Faults of wgmma: fences, waits, registers in flight, warps that do not take part."""

from __future__ import annotations

import os

import pytest

import shared_library
from emulator import Fault
from emulator.programs import Program, execute, program_of

pytestmark = [
    pytest.mark.skipif(shared_library.compiler() is None, reason="no C++ compiler here"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled"),
]
WGMMA = "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16"


def wgmma_fault(edit: tuple[str, str], *, strict: int = 0, seed: int = 0) -> str:
    program = program_of(WGMMA)
    assert program is not None
    body = program.body.replace(*edit)
    assert body != program.body
    text = Program(body, program.inputs, program.expected, threads=128, shared=program.shared)
    with pytest.raises(Fault) as caught:
        execute(text, strict=strict, seed=seed)
    return str(caught.value)


def test_products_that_are_wrong() -> None:
    fence, wait = "wgmma.fence.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
    commit = "wgmma.commit_group.sync.aligned;"
    assert "wgmma before any wgmma.fence" in wgmma_fault((fence, ""))
    assert "a register of a wgmma is used that was not waited for" in wgmma_fault((wait, ""))
    weak = wgmma_fault((wait, "wgmma.wait_group.sync.aligned 1;"))
    assert "a register of a wgmma is used that was not waited for" in weak
    assert "ends with a wgmma that was not committed" in wgmma_fault((f"{commit}\n{wait}", "ret;"))
    part = f"setp.ne.u32 %p7, %r1, 5; @%p7 {WGMMA}"
    assert "by a part of a warp" in wgmma_fault((WGMMA, part))
    early = f"{fence} mov.b32 %r100, 0;"
    assert "written after the latest wgmma.fence" in wgmma_fault((fence, early), strict=1)
    assert "lanes differ in scale-d" in wgmma_fault(
        ("setp.eq.u32 %p1, 1,", "setp.eq.u32 %p1, %r1,")
    )


def test_warps_of_a_warpgroup_issue_the_same_products() -> None:
    fence = "wgmma.fence.sync.aligned;"
    leave = f"setp.lt.u32 %p8, %r1, 32; @%p8 ret; {fence}"
    text = wgmma_fault((fence, leave))
    assert "deadlock in block 0: warp 1 at wgmma.wait_group, for the other warps" in text


def test_strictness_is_about_what_ptxas_mends() -> None:
    """Without `strict` the write after the fence is counted: ptxas puts a fence there (C7519)."""
    program = program_of(WGMMA)
    assert program is not None
    body = program.body.replace(
        "wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned; mov.b32 %r100, %r11;"
    ).replace("setp.eq.u32 %p1, 0, 1;", "setp.eq.u32 %p1, 1, 1;")
    late = Program(body, program.inputs, program.expected, threads=128, shared=program.shared)
    _, report = execute(late)
    assert report.injected_fences == 4
    _, report = execute(program)
    assert report.injected_fences == 0
