"""``embed --devices``: the list, contradictions, and the whole command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from jobs.digits import files
from jobs.processes import GUARD
from vitrail.cli import app
from vitrail.cli.devices import parse_devices
from vitrail.demo.demo import bundled
from vitrail.errors import InputError
from vitrail.jobs.manifest import read_manifest

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT / "engine/vitrail/assets/photos"


def run(*args: object, **env: str) -> Result:
    return CliRunner().invoke(app, ["embed", *map(str, args)], env=env, prog_name="vitrail")


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("all", ["cuda:0", "cuda:1", "cuda:2"]),
        ("0,2", ["cuda:0", "cuda:2"]),
        ("cuda:1, 0", ["cuda:1", "cuda:0"]),
        ("2,2", ["cuda:2", "cuda:2"]),
        ("cpu,cpu", ["cpu", "cpu"]),
        ("cpu", ["cpu"]),
    ],
)
def test_a_list_names_devices(
    text: str, devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert parse_devices(text) == devices
    with pytest.raises(InputError, match=r"devices: got 'cuda:3', but"):
        parse_devices("0,3")


def test_all_is_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert parse_devices("all") == ["cpu"]


@pytest.mark.parametrize("text", ["", "cpu,", "gpu", "-1", "0;1", "cuda", "cuda:", "a:1", "all,0"])
def test_other_lists_are_wrong_usage(text: str, tmp_path: Path) -> None:
    result = run(PHOTOS, "--model", bundled(), "--out", tmp_path / "out", "--devices", text)
    assert result.exit_code == 2
    assert "wanted all, or numbers of GPUs" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_device_and_devices_are_a_contradiction(tmp_path: Path) -> None:
    result = run(
        *(PHOTOS, "--model", bundled(), "--out", tmp_path / "out"),
        *("--device", "cpu", "--devices", "cpu,cpu"),
    )
    assert result.exit_code == 2
    assert "--device cpu" in result.stderr


def test_all_devices_in_each_of_several_processes_is_a_contradiction(tmp_path: Path) -> None:
    result = run(
        *(PHOTOS, "--model", bundled(), "--out", tmp_path / "out", "--devices", "all"),
        **{"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
    )
    assert result.exit_code == 2
    assert "one of 2 processes" in " ".join(result.stderr.split())


COMMAND = [sys.executable, "-m", "vitrail.cli", "embed", "--model", str(bundled())]


def test_the_command_uses_every_device_of_the_list(tmp_path: Path) -> None:
    facts = []
    for name, *option in (("two", "--devices", "cpu,cpu"), ("one", "--device", "cpu")):
        out = tmp_path / name
        done = subprocess.run(
            [*COMMAND, str(PHOTOS), "--out", str(out), "--json", *option],
            capture_output=True,
            text=True,
            timeout=GUARD,
            env={**os.environ, "VITRAIL_DEVICE": "cpu"},
        )
        assert done.returncode == 0, done.stderr
        facts.append(json.loads(done.stdout))
    assert facts[0]["devices"] == ["cpu", "cpu"]
    assert facts[1]["devices"] == ["cpu"]
    assert facts[0]["embedded"] == len(list(PHOTOS.iterdir()))
    assert files(tmp_path / "one") == files(tmp_path / "two")


def group(leader: int) -> set[int]:
    """The processes of the group of ``leader`` that are no zombies."""
    members = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == leader and fields[0] != "Z":
                members.add(int(folder.name))
    return members


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "everyone", "code", "loaded"),
    [
        (signal.SIGINT, True, 130, False),  # as a terminal sends it, to the whole group
        (signal.SIGINT, True, 130, True),
        (signal.SIGTERM, False, 143, False),
        (signal.SIGTERM, False, 143, True),
        (signal.SIGHUP, True, 129, True),
        (signal.SIGKILL, False, -9, True),
    ],
)
def test_signals_end_the_command_and_its_workers(
    number: int, everyone: bool, code: int, loaded: bool, tmp_path: Path
) -> None:
    """While the workers load, and in the middle of the job."""
    (tmp_path / "list").write_text("".join(f"{path}\n" for path in PHOTOS.iterdir()) * 500)
    shared = set(os.listdir("/dev/shm"))
    out = tmp_path / "out"
    process = subprocess.Popen(
        [
            *(*COMMAND, "--list", str(tmp_path / "list"), "--out", str(out), "--part-size", "40"),
            *("--devices", "cpu,cpu", "--batch-size", "4"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=tmp_path,
    )
    try:
        deadline = time.monotonic() + GUARD
        while len(group(process.pid)) < 4 or (loaded and not read_manifest(out)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no worker, or no part"
            time.sleep(0.02)
        (os.killpg if everyone else os.kill)(process.pid, number)
        _, said = process.communicate(timeout=GUARD)
        assert process.returncode == code, said
        while group(process.pid):
            assert time.monotonic() < deadline, f"left over: {group(process.pid)}"
            time.sleep(0.02)
    finally:
        if group(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    if number != signal.SIGKILL:
        assert "Traceback" not in said
    if code in (130, 143) and loaded:
        assert f"{len(read_manifest(out))} parts are committed; run the same command" in said
    assert set(os.listdir("/dev/shm")) <= shared
