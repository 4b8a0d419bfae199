"""The emulator's counts of the kernels that plans launch: bank conflicts and sectors."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import triton
from roofline import CARDS

import shared_library
from vitrail.plan.vision import vision_pooled
from vitrail.spec import BlockSpec, VisionSpec
from vitrail_kernels.launch import Target

pytestmark = pytest.mark.skipif(shared_library.compiler() is None, reason="no C++ compiler here")

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
counters: Any = importlib.import_module("counters")
launches: Any = importlib.import_module("launches")
table: Any = importlib.import_module("table")

ARCHES = [pytest.param(80, marks=pytest.mark.slow), 90]
SMALL, LARGE = (64, 64), (128, 128)
FEW_SMS = 4  # so that one image takes the tiles that a hundred multiprocessors take for many
SMS = 132
slow = pytest.mark.slow
GATHER = re.compile(r"patch_embed\.py:\d+ in patch_embed\.py:\d+")
"""The source of a load of pixels: `_gather`, inlined."""


def of_model(name: str, side: int, arch: int, sms: int) -> dict[str, list[Any]]:
    """Counts of each distinct launch of one image of ``side`` pixels or four texts, by operator."""
    spec, _ = launches.MODELS[name]
    counts: dict[str, list[Any]] = {}
    for launch in launches.launches(spec, side, Target(arch, sms), 1 if side else 4):
        counts.setdefault(launch.op, []).extend(
            (launch.label, call.config, counters.count(call, arch)) for call in launch.calls
        )
    return counts


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("name", "side", "sms", "tile"),
    [
        ("ViT-B/16", 224, FEW_SMS, LARGE),
        ("CLIP-B text", 0, FEW_SMS, LARGE),
        ("DINOv2-B/14", 112, FEW_SMS, LARGE),
        ("ViT-B/16 int8", 112, FEW_SMS, LARGE),
        pytest.param("CLIP L/14 int8", 112, SMS, SMALL, marks=slow),
        pytest.param("ViT-B/16", 224, SMS, SMALL, marks=slow),
        pytest.param("CLIP L/14", 224, FEW_SMS, LARGE, marks=slow),
        pytest.param("CLIP H/14", 224, SMS, SMALL, marks=slow),
    ],
)
def test_no_kernel_of_a_model_has_a_bank_conflict(
    name: str, side: int, sms: int, tile: tuple[int, int], arch: int
) -> None:
    counts = of_model(name, side, arch, sms)
    for label, config, launch in (row for rows in counts.values() for row in rows):
        shared = launch.memory("shared")
        assert shared["actual"] == shared["ideal"], (
            f"{label}, sm_{arch}, {config}: {[vars(line) for line in counters.worst(launch.lines)]}"
        )
    used = {(config.block_m, config.block_n) for _, config, _ in counts["linear"]}
    assert tile in used, f"linear's tiles: {used}"
    for op in ("linear", "attention", "attention_one"):
        assert any(launch.memory("shared")["actual"] for *_, launch in counts[op]), op


def pixel_sectors(spec: VisionSpec, side: int, images: int, uint8: bool, step: int) -> int:
    """Sectors of all patches if ``step`` values of a patch are read at once, and no two pieces of
    lines share one. Pieces begin anywhere: this is what the layout of the pixels allows."""
    (down, across), channels = spec.patch, spec.channels
    if uint8:  # (B, H, W, channels): a patch is lines of pixels of all channels
        size, planes, run, pitch = 1, 1, across * channels, side * channels
    else:  # (B, channels, H, W)
        size, planes, run, pitch = 4, channels, across, side
    count = 0
    for corner in itertools.product(range(images), range(side // down), range(side // across)):
        image, row, column = corner
        origin = image * channels * side * side + row * down * pitch + column * run
        values = [
            origin + plane * side * side + line * pitch + i
            for plane in range(planes)
            for line in range(down)
            for i in range(run)
        ]
        for first in range(0, len(values), step):
            piece = values[first : first + step]
            starts = [n for n, at in enumerate(piece) if n == 0 or piece[n - 1] != at - 1]
            for start, end in itertools.pairwise([*starts, len(piece)]):
                last = (piece[end - 1] * size + size - 1) // 32
                count += last - piece[start] * size // 32 + 1
    return count


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float32"])
@pytest.mark.parametrize(
    ("name", "side", "sms"),
    [("ViT-B/16", 64, FEW_SMS), ("DINOv2-B/14", 70, FEW_SMS), ("DINOv2-B/14", 70, SMS)],
)
def test_patch_embed_reads_little_more_than_its_bytes(
    name: str, side: int, sms: int, uint8: bool, arch: int
) -> None:
    images = 8  # rows of statistics begin at sectors
    spec, _ = launches.MODELS[name]
    first, *_ = launches.launches(spec, side, Target(arch, sms), images, uint8)
    (call,) = first.calls
    counts = counters.count(call, arch)
    lines = [line for line in counts.lines if line.memory == "global"]
    pixels = [line for line in lines if GATHER.fullmatch(line.source)]
    other_lines = [line for line in lines if line not in pixels]
    tiles_across = -(-spec.blocks.width // call.config.block_n)
    apart = pixel_sectors(spec, side, images, uint8, call.config.block_k)
    assert 0 < sum(line.actual for line in pixels) <= tiles_across * apart
    # beside pixels of short runs sm_80's wide tiles lack registers for more addresses of the table
    wide_table = arch == 80 and call.config.block_n == 128 and spec.patch == (14, 14)
    for line in other_lines:
        table_load = line.opcode == "ld.global.v4.b32"
        assert line.actual <= (2 if wide_table and table_load else 1) * line.ideal, vars(line)
    memory = counts.memory("global")
    allowed = sum(line.ideal for line in other_lines) + tiles_across * apart
    assert memory["actual"] <= 1.3 * allowed
    if spec.patch == (16, 16):
        assert memory["actual"] <= 1.3 * memory["ideal"]


INT8 = ("norm_quant", "linear_int8", "linear_int8_grouped")


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("sms", [FEW_SMS, pytest.param(SMS, marks=slow)])
def test_int8_launches_touch_no_sector_too_many(sms: int, arch: int) -> None:
    images = 8  # rows of scales and of statistics begin at sectors
    spec, _ = launches.MODELS["ViT-B/16 int8"]
    calls = [
        (launch.label, call)
        for launch in launches.launches(spec, 64, Target(arch, sms), images)
        for call in launch.calls
        if launch.op in INT8
    ]
    assert len(calls) >= 5
    for label, call in calls:
        lines = counters.worst(counters.count(call, arch).lines)
        assert not lines, f"{label}, {call.config}: {[vars(line) for line in lines]}"


def test_a_source_is_named_with_the_lines_it_was_inlined_at() -> None:
    assert counters._source("tile.py:85:23 @[ linear.py:185:16 ]") == "tile.py:85 in linear.py:185"
    assert counters._source("linear.py:149:70") == "linear.py:149"
    assert counters._source("") == "unknown"


BLOCKS = BlockSpec(64, 3, 1, 128, activation="gelu", eps=1e-6)
TINY = VisionSpec(BLOCKS, (32, 32), (16, 16))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launches.MODELS, "tiny", (TINY, 32))


def test_equal_launches_run_once_and_are_counted_as_often_as_the_plan_has_them() -> None:
    plan = vision_pooled(TINY, uint8=True)
    distinct = list(launches.launches(TINY, 32, Target(90, SMS), 2))
    assert sum(launch.times for launch in distinct) == len(plan.steps)
    repeats = {launch.label: launch.times for launch in distinct if launch.times > 1}
    assert repeats == {f"vision.blocks.0.{x}": 2 for x in ("qkv", "attention", "out", "up", "down")}


def test_the_command_prints_and_keeps_what_it_counts(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "counts.json"
    command = ["tiny", "--arch", "90", "--images", "2", "--json", str(file), "--allow-dirty"]
    assert counters.main(command) == 0
    record = json.loads(file.read_text())
    assert record["environment"]["triton"] == triton.__version__
    result = record["results"]["tiny, sm_90"]
    assert (result["images"], result["sms"]) == (2, CARDS[90].sms)
    qkv = next(x for x in result["launches"] if x["label"] == "vision.blocks.0.qkv")
    # 10 rows in one tile of 64 x 64 by three across; one step of K
    assert (qkv["tile"], qkv["blocks"], qkv["times"]) == ("64x64x64", 3, 2)
    assert qkv["tensor_map_bytes"] == {"loaded": 3 * 2 * 64 * 64 * 2, "stored": 3 * 64 * 64 * 2}
    for launch in result["launches"]:
        for memory in ("shared", "global"):
            key = f"{memory}_{'wavefronts' if memory == 'shared' else 'sectors'}"
            sites = [x for x in launch["sites"] if x["memory"] == memory]
            assert launch[key]["actual"] == sum(x["actual"] for x in sites)
        assert sum(launch["waits"].values()) == sum(x["waits"] for x in launch["sites"])
        runs = sum(x["runs"] for x in launch["sites"])
        assert sum(launch["warp_instructions"].values()) == runs
    printed = capsys.readouterr().out
    assert "vision.blocks.0.qkv x2: _linear_tma_kernel 64x64x64, 3 blocks" in printed
    assert "sectors too many: vision.blocks.0.qkv x2, stats.py:" in printed


def test_a_model_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        counters.main(["ViT-B/17"])
    assert "no model ViT-B/17; wanted some of ViT-B/16, CLIP L/14" in capsys.readouterr().err


def test_the_table_of_the_docs_is_that_of_the_results() -> None:
    start, end = table.COUNTERS
    assert f"{start}{table.render_counters()}{end}" in table.PERFORMANCE.read_text()
