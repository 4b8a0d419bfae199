"""The emulator's counters, and its binding beside the header."""

from __future__ import annotations

import ctypes
import os
import re

import pytest

import emulator
import shared_library
from emulator import binding
from emulator.programs import Program, bytes_of, execute, program_of

pytestmark = [
    pytest.mark.skipif(shared_library.compiler() is None, reason="no C++ compiler here"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled"),
]


def report_of(body: str, **fields: int) -> emulator.Report:
    program = Program(body, bytes_of(bytes_like(2048)), bytes_of(bytes_like(2048)), **fields)
    return execute(program, counters=1)[1]


def bytes_like(size: int) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(size)


def site_of(report: emulator.Report, opcode: str) -> emulator.Site:
    (site,) = (site for site in report.sites if site.opcode == opcode)
    return site


@pytest.mark.parametrize(
    ("stride", "wavefronts"), [(0, 1), (1, 1), (2, 2), (8, 8), (32, 32), (33, 1)]
)
def test_bank_conflicts_by_stride(stride: int, wavefronts: int) -> None:
    report = report_of(
        f"mad.lo.s32 %r10, %r1, {4 * stride}, %r2; st.shared.b32 [%r10], 5;", shared=8192
    )
    site = site_of(report, "st.shared.b32")
    assert (site.runs, site.ideal, site.actual, site.bytes) == (1, 1, wavefronts, 128)
    assert site.instruction_class == "shared"
    assert site.line > 10


def test_wide_shared_accesses_go_by_parts_of_a_warp() -> None:
    body = "mad.lo.s32 %r10, %r1, {}, %r2; st.shared.v4.b32 [%r10], {{%r1, %r1, %r1, %r1}};"
    for pitch, wavefronts in ((16, 4), (32, 8), (128, 32)):
        site = site_of(report_of(body.format(pitch), shared=8192), "st.shared.v4.b32")
        assert (site.ideal, site.actual, site.bytes) == (4, wavefronts, 512)


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (0, 1)])
def test_sectors_by_stride(stride: int, sectors: int) -> None:
    report = report_of(
        f"mul.lo.s32 %r9, %r1, {4 * stride}; cvt.u64.u32 %rd9, %r9; add.s64 %rd9, %rd9, %rd1;"
        "ld.global.b32 %r10, [%rd9];"
    )
    site = site_of(report, "ld.global.b32")
    assert (site.actual, site.ideal, site.bytes) == (
        sectors,
        4 if stride else 1,
        128 if stride else 4,
    )


def test_classes_add_up_and_guards_leave_lanes_out() -> None:
    report = report_of("setp.lt.u32 %p1, %r1, 7; @%p1 mul.f32 %r9, %r1, %r1; bar.sync 0;")
    assert sum(report.by_class.values()) == report.warp_instructions
    assert report.by_class["float"] == 1
    assert report.by_class["barrier"] == report.barrier_waits == 1
    assert report.thread_instructions == 32 * (report.warp_instructions - 1) + 7
    assert sum(site.runs for site in report.sites) == report.warp_instructions
    assert report.blocks == 1


def test_products_copies_and_waits_are_counted() -> None:
    def counted(opcode: str) -> emulator.Report:
        program = program_of(opcode)
        assert program is not None
        return execute(program, counters=1, seed=0)[1]

    report = counted("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16")
    assert (report.wgmma, report.wgmma_macs) == (4, 64 * 32 * 16)
    assert counted("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32").mma == 1
    report = counted("mbarrier.expect_tx.relaxed.cta.shared::cta.b64")
    assert (report.tensor_loads, report.tensor_load_bytes) == (1, 128)
    assert report.mbarrier_waits == sum(site.waits for site in report.sites if "try" in site.opcode)
    report = counted("cp.async.bulk.commit_group")
    assert (report.tensor_stores, report.tensor_store_bytes) == (1, 32)


def test_without_counters_there_are_no_sites() -> None:
    program = program_of("add.s32")
    assert program is not None
    report = execute(program)[1]
    assert report.sites == ()
    assert report.by_class == {}
    assert report.warp_instructions > 0


@pytest.mark.parametrize("name", ["Range", "Options", "Report", "Fault", "Launch", "Site"])
def test_the_binding_has_the_headers_fields(name: str) -> None:
    header = (binding.FOLDER / "emulator.h").read_text()
    header = re.sub(r"/\*.*?\*/", "", header, flags=re.S)
    end = header.index(f"}} emulator_{name.lower()};")
    body = header[header.rindex("{", 0, end) + 1 : end]
    fields = []
    for declaration in body.split(";"):
        names = declaration.replace("*", " ").split(None, 1)
        if len(names) == 2:
            for part in names[1].split(","):
                fields.append(re.sub(r"\[.*\]", "", part).split()[-1])
    assert fields == [field[0] for field in getattr(binding, f"{name}Record")._fields_]


def test_classes_have_the_headers_names() -> None:
    header = (binding.FOLDER / "emulator.h").read_text()
    start = header.index("#define EMULATOR_CLASSES")
    names = re.findall(r'"([a-z ]+)"', header[start : header.index("#define EMULATOR_CLASS_COUNT")])
    assert tuple(names) == emulator.CLASSES
