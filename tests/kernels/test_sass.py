"""What the machine code of ViT-B/16's kernels does on sm_90: loads, products in flight, length.

The numbers that a change of a kernel may move are in FACTS.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from main_loops import Loop, Sass, read_sass
from roofline import CARDS, SHAPES, steps

from vitrail_kernels.compile import KernelCode, compile_all, compile_call, identity, opcodes
from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.launch import Call, Target
from vitrail_kernels.ops.attention import attention_calls
from vitrail_kernels.ops.linear import linear_calls

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted: nothing is compiled"
)

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
benchmark: Any = importlib.import_module("sass")
table: Any = importlib.import_module("table")

HALF = torch.float16
HOPPER = Target(90, CARDS[90].sms)


@dataclass(frozen=True)
class Facts:
    """``ahead``: iterations between a load and its use. ``blocks``: of an SM, at least. ``step``
    and ``epilogue``: instructions of a warp for an iteration, and for each value, at most."""

    ahead: int
    blocks: int
    step: int
    epilogue: float


FACTS = {
    (256, "patch_embed"): Facts(2, 2, 225, 18.5),
    (256, "qkv"): Facts(3, 1, 110, 10),
    (256, "attention"): Facts(2, 2, 305, 7.5),
    (256, "out"): Facts(2, 2, 106, 18),
    (256, "up"): Facts(2, 2, 100, 24),
    (256, "down"): Facts(3, 1, 110, 17),
    (256, "last q"): Facts(5, 2, 75, 15),
    (256, "pool"): Facts(3, 3, 420, 6),
    (1, "patch_embed"): Facts(2, 6, 225, 22),
    (1, "qkv"): Facts(5, 2, 118, 17),
    (1, "attention"): Facts(2, 3, 300, 7.5),
    (1, "out"): Facts(5, 2, 112, 17),
    (1, "up"): Facts(5, 2, 112, 28),
    (1, "down"): Facts(5, 2, 112, 17),
}
"""By batch and launch, the larger of the numbers under triton 3.6 and 3.7.1, and a little room."""


@functools.cache
def kernels(batch: int) -> dict[str, tuple[Call, KernelCode, Sass]]:
    """ViT-B/16's kernels by launch; of `pool` the first."""
    calls = {
        launch.label: launch.calls(HOPPER)[0] for launch in steps(SHAPES["ViT-B/16"], HALF, batch)
    }
    codes = compile_all(list(calls.values()), 90)
    return {
        label: (call, code, read_sass(code.sass))
        for (label, call), code in zip(calls.items(), codes, strict=True)
    }


def main_loop(sass: Sass) -> Loop:
    assert len(sass.loops) == 1, sass.loops
    return sass.loops[0]


@pytest.mark.parametrize(("batch", "label"), FACTS)
def test_the_machine_code_of_a_kernel(batch: int, label: str) -> None:
    call, code, sass = kernels(batch)[label]
    loop, facts = main_loop(sass), FACTS[batch, label]
    location = f"{label} x {batch}, {call.config}"
    assert (code.spills, code.stack) == (0, 0), location
    assert code.blocks >= facts.blocks, f"{location}: {code.blocks} blocks"
    # products of one iteration run beside what follows them, into the next: none waits for another
    assert (loop.in_flight >= 2, loop.carried >= 1) == (True, True), f"{location}: {loop}"
    assert loop.loads_ahead == facts.ahead == call.config.stages - 1, f"{location}: {loop}"
    assert loop.instructions <= facts.step, f"{location}: {loop.instructions} an iteration"
    assert sass.per_value <= facts.epilogue, f"{location}: {sass.per_value:.1f} a value"


@pytest.mark.parametrize("batch", [256, 1])
def test_no_kernel_spills(batch: int) -> None:
    spills = {label: (code.spills, code.stack) for label, (_, code, _) in kernels(batch).items()}
    assert spills == dict.fromkeys(spills, (0, 0))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_no_kernel_of_any_model_spills_on_sm_90(name: str, dtype: torch.dtype) -> None:
    for batch in (256, 64, 8, 1):
        calls = [
            (launch.label, call)
            for launch in steps(SHAPES[name], dtype, batch)
            for call in launch.calls(HOPPER)
        ]
        codes = compile_all([call for _, call in calls], 90)
        spills = {
            label: (code.spills, code.stack) for (label, _), code in zip(calls, codes, strict=True)
        }
        assert spills == dict.fromkeys(spills, (0, 0)), f"batch {batch}"


@pytest.mark.parametrize("batch", [256, 1])
@pytest.mark.parametrize("label", ["qkv", "out", "up", "down"])
def test_a_linear_asks_for_a_step_before_the_products_of_the_last_are_awaited(
    label: str, batch: int
) -> None:
    """A buffer's load has at least a step's products, which the tensor cores still run, to hide
    behind; with three stages a whole step of instructions beside them."""
    call, _, sass = kernels(batch)[label]
    loop = main_loop(sass)
    assert (loop.groups, loop.carried) == (1, 1), loop
    assert loop.lead > (call.config.stages - 2) * loop.instructions


def test_attention_multiplies_p_by_v_beside_the_next_q_k() -> None:
    loop = main_loop(kernels(256)["attention"][2])
    assert loop.products == {"HGMMA.64x64x16": 8}
    assert (loop.groups, loop.in_flight, loop.carried) == (2, 2, 1)
    assert loop.lead >= loop.instructions, "a tile's softmax is its lead"
    assert loop.opcodes["MUFU"] == 34, "32 weights and 2 decays a thread"


def tails(text: str) -> list[str]:
    """Loads, barriers and products of the machine code behind the last tensor map's load, each run
    of equal ones as one."""
    code = opcodes(text)
    assert "LDG" not in code[: code.index("UTMALDG")], "a load before the first of Q"
    behind = code[len(code) - code[::-1].index("UTMALDG") : code.index("STG")]
    marks = (opcode for opcode in behind if opcode in ("LDG", "BAR", "HGMMA"))
    return [opcode for opcode, _ in itertools.groupby(marks)]


IN_TURN = ["LDG", "BAR", "HGMMA"] * 3
"""Three widths of a tail: K and V are asked for together and meet at one barrier."""


@pytest.mark.parametrize("batch", [256, 1])
def test_attention_waits_for_a_tail_once(batch: int) -> None:
    """And images, which are equally long, read no ``cu_seqlens`` before Q."""
    runs = tails(kernels(batch)["attention"][1].sass)
    assert runs[runs.index("LDG") :][: len(IN_TURN)] == IN_TURN
    assert runs.count("LDG") == 3


def test_a_tail_that_waits_twice_is_seen() -> None:
    opcodes = ["UTMALDG", "BAR", *["LDG", "BAR", "HGMMA"] * 6, "BAR", "STG"]
    runs = tails("".join(f"  /*{i:04x}*/  {name} R0 ;\n" for i, name in enumerate(opcodes)))
    assert runs.count("LDG") == 6


# -- the reader sees what is worse -----------------------------------------------------------------


def attention_sass(heads: int, config: KernelConfig) -> Sass:
    sequences = torch.empty(33, dtype=torch.int32, device="meta")
    width = 1024 if heads == 8 else 768
    out, qkv = (torch.empty(32 * 197, n * width, dtype=HALF, device="meta") for n in (1, 3))
    (call,) = attention_calls(
        HOPPER, out, qkv, sequences, heads=heads, causal=False, max_seqlen=197, config=config
    )
    return read_sass(compile_call(call, 90).sass)


def test_attention_with_two_stages_waits_for_what_it_has_just_asked_for() -> None:
    loop = main_loop(attention_sass(12, KernelConfig(128, 64, 0, 8, 2, registers=128)))
    assert loop.loads_ahead == 1
    assert loop.lead < 40


def test_products_that_wait_for_one_another_are_not_in_flight() -> None:
    """Heads of 128 columns in 128 rows lack registers, and ptxas gives their overlap up."""
    loop = main_loop(attention_sass(8, KernelConfig(128, 64, 0, 8, 2, registers=128)))
    assert loop.in_flight == 1
    assert loop.groups > 2


def test_a_linear_with_one_stage_loads_nothing_ahead() -> None:
    x, out = (torch.empty(6304, 768, dtype=HALF, device="meta") for _ in range(2))
    weight = torch.empty(768, 768, dtype=HALF, device="meta")
    for stages in (1, 2, 3, 4):
        config = KernelConfig(128, 128, 64, 8, stages)
        (call,) = linear_calls(HOPPER, out, x, weight, config=config)
        loop = main_loop(read_sass(compile_call(call, 90).sass))
        assert loop.loads_ahead == stages - 1, f"{stages} stages: {loop}"


LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0020*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0030*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0040*/              @!P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR16+0x1c000], R89 ;
        /*0060*/              @!P0 BRA `(.L_x_2) ;
.L_x_5:
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0080*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], R24 ;
        /*0090*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], R24, gsb0 ;
        /*00a0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x2 ;
        /*00b0*/               @P1 SYNCS.ARRIVE.TRANS64 RZ, [UR8+0x1c000], R15 ;
        /*00c0*/        @!UP0 UTMALDG.2D [UR8], [UR4], desc[UR6] ;
        /*00d0*/               @P0 BRA `(.L_x_3) ;
        /*00e0*/                   MUFU.EX2 R1, R1 ;
        /*00f0*/                   BRA.U UP1, `(.L_x_4) ;
        /*0100*/             @P2 STL.64 [R1+0x8], R4 ;
.L_x_4:
        /*0110*/                   UTMASTG.2D [UR32], [UR6] ;
.L_x_3:
        /*0120*/               @P0 BRA `(.L_x_1) ;
.L_x_9:
        /*0130*/                   EXIT ;
.L_x_2:
        /*0140*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR16+0x1c000], R89 ;
        /*0150*/              @!P0 BRA `(.L_x_2) ;
        /*0160*/                   BRA `(.L_x_5) ;
.L_x_6:
        /*0170*/                   BRA `(.L_x_6);
"""


def test_a_listing_is_read() -> None:
    """A persistent kernel: the epilogue lies inside the loop, and waits that fail outside."""
    sass = read_sass(LISTING)
    loop = main_loop(sass)
    assert loop.products == {"HGMMA.64x128x16": 2}
    assert (loop.groups, loop.in_flight, loop.carried) == (1, 3, 2)
    assert (loop.loads, loop.copies, loop.loads_ahead) == (1, 0, 3)
    assert loop.instructions == 10, "not what the epilogue and the failed wait add"
    assert loop.lead == 3 * 10 - 7, "asked for in one iteration, awaited three later"
    assert (loop.values, loop.barriers) == (64, 1)
    assert sass.epilogue == {"MUFU": 1, "BRA": 1, "STL": 1, "UTMASTG": 1}
    assert sass.per_value == 4 / 64


def test_opcodes_are_read_from_a_disassembly() -> None:
    counts = Counter(opcodes(LISTING))
    assert (counts["LDC"], counts["STL"], counts["UTMALDG"], counts["BRA"]) == (1, 1, 4, 8)


def test_a_branch_to_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="known label"):
        read_sass("        /*0000*/                   BRA `(.L_x_9) ;")


# -- the command and its table ---------------------------------------------------------------------


def test_the_command_prints_and_keeps_each_kernel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = {identity(call): code for call, code, _ in kernels(1).values()}

    def compile_unless_compiled(calls: list[Call], arch: int) -> list[KernelCode]:
        return [codes.get(identity(call)) or compile_call(call, arch) for call in calls]

    monkeypatch.setattr(benchmark, "compile_all", compile_unless_compiled)
    file = tmp_path / "sass.json"
    assert benchmark.main(["ViT-B/16", "--batch", "1", "--json", str(file), "--allow-dirty"]) == 0
    lines = capsys.readouterr().out.splitlines()
    results = json.loads(file.read_text())["results"]["ViT-B/16, batch 1, sm_90"]
    for launch in steps(SHAPES["ViT-B/16"], HALF, 1):
        assert any(line.startswith(f"{launch.label} ") for line in lines), launch.label
        record = results[launch.label]
        _, code, sass = kernels(1)[launch.label]
        if "same_as" in record:
            record = results[record["same_as"]]
        assert (record["registers"], record["shared"]) == (code.registers, code.shared)
        assert record["epilogue"]["instructions"] == sass.epilogue.total()
        assert [loop["lead"] for loop in record["loops"]] == [loop.lead for loop in sass.loops]


def test_the_documents_have_the_committed_numbers() -> None:
    for (start, end), text in (
        (table.SASS, table.render_sass()),
        (table.SASS_INT8, table.render_sass_int8()),
    ):
        assert f"{start}{text}{end}" in table.PERFORMANCE.read_text()
    for file in (table.RESULTS / "compiled").glob("*.json"):
        record = json.loads(file.read_text())
        triton = file.stem.rpartition("-")[2]
        assert record["results"]["triton"].startswith(f"{triton}."), file.name
        assert not record["environment"]["dirty"], file.name
        spills = [
            (case, label)
            for case, kernels in record["results"].items()
            if isinstance(kernels, dict)
            for label, kernel in kernels.items()
            if kernel.get("spills", 0) or kernel.get("stack", 0)
        ]
        assert not spills, file.name
