"""The header reader under mutated files, and whether the fuzzer notices what it is for."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fuzz_headers
from vitrail.checkpoint import header
from vitrail.errors import CheckpointError


def test_3000_mutated_files_are_refused_by_name_or_read_as_the_library_reads_them() -> None:
    result = fuzz_headers.run(3_000, seed=1)
    assert sum(result["hits"].values()) == 3_000


@pytest.mark.machine
@pytest.mark.slow
def test_150000_mutated_files_hit_every_branch_100_times() -> None:
    result = fuzz_headers.run(150_000, seed=0)
    print(fuzz_headers.table(result, 150_000))
    assert min(result["hits"][name] for name in ("accepted", *fuzz_headers.BRANCHES)) >= 100
    assert result["slowest"] < fuzz_headers.CASE_SECONDS
    assert result["grown_kib"] < 100 * 1024  # the largest case, no leak


def test_a_case_is_the_same_bytes_whenever_it_is_made() -> None:
    first = [fuzz_headers.make_case(0, number) for number in range(300)]
    assert [fuzz_headers.make_case(0, number) for number in range(300)] == first
    assert len(set(first)) > 250


@pytest.mark.parametrize("check", ["_check_layout", "_check_name", "_check_metadata"])
def test_a_reader_without_one_of_its_checks_is_caught(
    check: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(header, check, lambda *_: None)
    before = signal.getsignal(signal.SIGALRM)
    try:
        if check == "_check_name":  # the library takes any name: the branches are then not hit
            hits = fuzz_headers.work(500, 0, tmp_path)["hits"]
            assert hits["name as a path"] == hits["name characters"] == 0
        else:
            with pytest.raises(AssertionError, match="the safetensors library None"):
                fuzz_headers.work(500, 0, tmp_path)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_reader_that_hangs_is_killed(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
sys.path[:] = sys.argv[2:]
import fuzz_headers
fuzz_headers.HANG_SECONDS = 0.2
fuzz_headers.read_header = lambda path: time.sleep(60)
fuzz_headers.work(1, 0, Path(sys.argv[1]))
"""
    start = time.monotonic()
    worker = subprocess.run([sys.executable, "-c", code, str(tmp_path), *sys.path])
    assert worker.returncode == -signal.SIGALRM
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "message",
    ["x: got something new, wanted another", "x: not UTF-8 at byte 3\nand more", "not UTF-8 " * 99],
    ids=["unknown", "two lines", "long"],
)
def test_an_unknown_or_unwieldy_message_is_a_failure(message: str) -> None:
    with pytest.raises(AssertionError, match="wanted one short line"):
        fuzz_headers.branch_of(message)
    assert fuzz_headers.branch_of(str(CheckpointError("x: not UTF-8 at byte 3"))) == "not UTF-8"
