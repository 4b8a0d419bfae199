"""`vitrail embed` as one of several processes: --shard, torchrun's variables, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
import torch
from typer.testing import CliRunner, Result

import vitrail
from jobs.digits import data_files
from jobs.processes import GUARD, outputs_of
from vitrail.cli import app, options, ranks
from vitrail.demo.demo import bundled
from vitrail.errors import InputError

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT / "engine/vitrail/assets/photos"
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven images; the one that comes last cannot be read. Parts of one input: 0 to 6."""
    folder = tmp_path / "photos"
    shutil.copytree(PHOTOS, folder)
    (folder / "zz.jpg").write_bytes(b"not an image")
    assert len(list(folder.iterdir())) == 7
    return folder


def words(photos: Path, out: Path, *more: object) -> list[str]:
    arguments = ["embed", photos, "--model", bundled(), "--out", out, "--part-size", 1]
    device = [] if "--devices" in more else ["--device", "cpu"]
    return [str(word) for word in (*arguments, *device, *more)]


def embed(photos: Path, out: Path, *more: object, **env: str) -> Result:
    return CliRunner().invoke(app, words(photos, out, *more), env=env, prog_name="vitrail")


def start(photos: Path, out: Path, *more: object, **env: str) -> subprocess.Popen[str]:
    """A process with one thread: PyTorch's bits on a CPU may differ for another number."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("engine", "kernels"))
    return subprocess.Popen(
        [sys.executable, "-m", "vitrail.cli", *words(photos, out, *more)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("layout", ["parquet", pytest.param("npy", marks=pytest.mark.slow)])
def test_three_ranks_of_torchrun_write_the_folder_of_one_run(
    layout: str, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    processes = [
        start(
            photos,
            out,
            "--json",
            "--layout",
            layout,
            **{"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank)},
        )
        for rank in range(3)
    ]
    outputs = outputs_of(*processes)
    for rank, (stdout, stderr) in enumerate(outputs):
        assert processes[rank].returncode == 0, stderr
        facts = json.loads(stdout)
        inputs = [3, 2, 2][rank]
        shard = {"shard": f"{rank}/3", "inputs": inputs, "parts": inputs, "written": inputs}
        assert {key: facts[key] for key in shard} == shard
        assert facts["failed"] == (rank == 0)
        assert f"shard {rank}/3 (RANK={rank}, WORLD_SIZE=3): {inputs} of 7 images" in stderr
        assert f"shard {rank}/3: embedded {inputs - (rank == 0)} of {inputs} images" in stderr
        assert ("exit code 0 instead of 3" in stderr) == (rank == 0)
    assert any("all 7 parts of the job are committed" in stderr for _, stderr in outputs)

    single = start(photos, tmp_path / "single", "--layout", layout)
    ((_, stderr),) = outputs_of(single)
    assert single.returncode == 3, stderr
    assert "exit code" not in stderr
    assert data_files(out) == data_files(tmp_path / "single")
    ours, theirs = (vitrail.read_embeddings(folder) for folder in (out, tmp_path / "single"))
    assert ours.paths == theirs.paths
    assert ours.errors == theirs.errors
    assert ours.embeddings.tobytes() == theirs.embeddings.tobytes()
    assert ours.missing == 0
    table = ds.dataset(out if layout == "parquet" else out / "metadata").to_table()
    assert table.num_rows == 7 if layout == "parquet" else 6


@pytest.mark.slow
def test_shards_of_several_devices_write_the_folder_of_one_run(
    photos: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / "out", tmp_path / "out", tmp_path / "single"]
    ways = [("--devices", "cpu,cpu", "--shard", f"{shard}/2") for shard in range(2)]
    processes = [start(photos, out, *way) for out, way in zip(folders, [*ways, ()], strict=True)]
    outputs = outputs_of(*processes)
    assert [process.returncode for process in processes] == [3, 0, 3], outputs
    assert data_files(folders[0]) == data_files(folders[2])
    assert len(vitrail.read_embeddings(folders[0]).paths) == 6


def test_a_shard_counts_for_itself_and_says_what_others_have_to_write(
    photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = embed(photos, out, "--shard", "1/2", "--json", RANK="7", WORLD_SIZE="9")
    assert first.exit_code == 0, first.stderr
    facts = json.loads(first.stdout)
    assert (facts["inputs"], facts["shard"], facts["parts"]) == (3, "1/2", 3)
    assert (facts["job_parts"], facts["job_committed"]) == (7, 3)
    assert "shard 1/2 (--shard): 3 of 7 images" in first.stderr
    assert "3 of the job's 7 parts are committed; other shards write the rest" in first.stderr
    assert vitrail.read_embeddings(out).missing == 4
    second = embed(photos, out, "--shard", "0/2")
    assert second.exit_code == 3, second.stderr
    assert "all 7 parts of the job are committed" in second.stderr
    assert second.stdout == f"{out}\n"
    whole = embed(photos, out, "--json")
    assert whole.exit_code == 3
    assert "shard" not in whole.stderr
    facts = json.loads(whole.stdout)
    assert (facts["shard"], facts["written"], facts["inputs"]) == ("0/1", 0, 7)


def test_a_shard_fails_if_all_its_own_inputs_do(photos: Path, tmp_path: Path) -> None:
    assert embed(photos, tmp_path / "out", "--shard", "6/7").exit_code == 1
    assert embed(photos, tmp_path / "out", "--shard", "5/7").exit_code == 0


def test_a_shard_without_a_part_is_done(photos: Path, tmp_path: Path) -> None:
    result = embed(photos, tmp_path / "out", "--shard", "8/9", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["inputs"] == 0
    assert "shard 8/9 (--shard): 0 of 7 images" in result.stderr


def test_one_rank_or_none_writes_everything(photos: Path, tmp_path: Path) -> None:
    slurm = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}
    for name, env in (("one", {"RANK": "0", "WORLD_SIZE": "1"}), ("slurm", slurm)):
        result = embed(photos, tmp_path / name, "--json", **env)
        assert result.exit_code == 3, result.stderr
        assert json.loads(result.stdout)["shard"] == "0/1"
        assert [path.name for path in (tmp_path / name).glob("_man*")] == ["_manifest.jsonl"]


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"RANK": "1"}, "got RANK=1, WORLD_SIZE is not set from the environment"),
        ({"WORLD_SIZE": "3"}, "got RANK is not set, WORLD_SIZE=3"),
        ({"RANK": "3", "WORLD_SIZE": "3"}, "got RANK=3, WORLD_SIZE=3"),
        ({"RANK": "-1", "WORLD_SIZE": "3"}, "got RANK=-1, WORLD_SIZE=3"),
        ({"RANK": "", "WORLD_SIZE": ""}, "got RANK=, WORLD_SIZE="),
        ({"RANK": "one", "WORLD_SIZE": "3"}, "got RANK=one, WORLD_SIZE=3"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "got RANK=0, WORLD_SIZE=0"),
    ],
)
def test_wrong_variables_are_refused(
    env: dict[str, str], told: str, photos: Path, tmp_path: Path
) -> None:
    result = embed(photos, tmp_path / "out", **env)
    assert result.exit_code == 2
    text = re.sub(r"\W*\n\W*", " ", result.stderr)
    assert told in text
    assert "wanted RANK from 0 to WORLD_SIZE - 1, or neither; name the shard with --shard" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard", ["3/3", "1", "a/b", "/", "0/0", "-1/2", ""])
def test_a_wrong_shard_is_wrong_usage(shard: str, photos: Path, tmp_path: Path) -> None:
    result = embed(photos, tmp_path / "out", f"--shard={shard}")
    assert result.exit_code == 2
    assert "Invalid value for --shard: got" in result.stderr
    assert "wanted K/N" in result.stderr


@pytest.mark.parametrize("name", ["out.npy", "out.parquet"])
def test_shards_cannot_share_one_file(name: str, photos: Path, tmp_path: Path) -> None:
    ranked = {"RANK": "1", "WORLD_SIZE": "3"}
    for more, env in ((["--shard", "1/3"], {}), ([], ranked)):
        result = embed(photos, tmp_path / name, *more, **env)
        assert result.exit_code == 1
        assert "shard 1/3 cannot write one file; name a folder" in result.stderr
        assert "--shard 0/1" in result.stderr
    assert embed(photos, tmp_path / name, "--shard", "0/1", **ranked).exit_code == 3
    assert (tmp_path / name).is_file()


def test_a_shard_does_not_overwrite(photos: Path, tmp_path: Path) -> None:
    result = embed(photos, tmp_path / "out", "--shard", "1/3", "--overwrite")
    assert result.exit_code == 1
    assert "overwrite: got it with shard 1/3" in result.stderr
    assert "delete the folder yourself" in result.stderr


def test_ranks_do_not_read_a_list_from_stdin(photos: Path, tmp_path: Path) -> None:
    result = embed(photos, tmp_path / "out", "--list", "-", RANK="1", WORLD_SIZE="3")
    assert result.exit_code == 2
    assert "save the list to a file" in " ".join(result.stderr.split())


# The device of a rank


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("local_rank", "device", "expected"),
    [
        (None, "auto", "auto"),
        ("1", "auto", "cuda:1"),
        ("0", "auto", "cuda:0"),
        ("1", "cpu", "cpu"),
        ("1", "cuda:0", "cuda:0"),
        ("9", "cuda", "cuda"),
    ],
)
def test_local_rank_chooses_a_gpu_for_auto(
    local_rank: str | None,
    device: str,
    expected: str,
    photos: Path,
    tmp_path: Path,
    gpus: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def load(name: str, device: str, *more: Any) -> Any:
        asked.append(device)
        raise InputError("loaded enough")

    monkeypatch.setattr(options, "load", load)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    result = embed(photos, tmp_path / "out", "--device", device)
    assert "loaded enough" in result.stderr
    assert asked == [expected]


@pytest.mark.parametrize("local_rank", ["2", "-1", "", "one"])
def test_a_rank_without_a_gpu_is_refused(
    local_rank: str, gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    told = f"got LOCAL_RANK={local_rank} from the environment, but PyTorch finds 2 CUDA devices; "
    with pytest.raises(InputError, match=told):
        ranks.choose_device("auto")


def test_without_gpus_a_rank_uses_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert ranks.choose_device("auto") == "auto"


# Words


def test_help_says_how_shards_start() -> None:
    text = " ".join(
        CliRunner().invoke(app, ["embed", "--help"], prog_name="vitrail").stdout.split()
    )
    assert "--shard K/N" in text
    assert "--shard $SLURM_PROCID/$SLURM_NTASKS" in text
    assert "RANK/WORLD_SIZE, which torchrun sets" in text
    assert "cuda:N" in text


@pytest.mark.slow
def test_a_stopped_shard_says_what_is_safe_and_leaves_the_drafts_of_others(
    photos: Path, tmp_path: Path
) -> None:
    names = tmp_path / "names"
    names.write_text(f"{PHOTOS / 'cat.jpg'}\n" * 20_000)
    out = tmp_path / "out"
    out.mkdir()
    (out / "_draft-0-of-2-part-00000.parquet").write_bytes(b"half")
    process = start(photos, out, "--list", names, "--shard", "1/2")
    try:
        manifest = out / "_manifest-1-of-2.jsonl"
        deadline = time.monotonic() + GUARD
        while not manifest.exists() or not manifest.stat().st_size:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=GUARD)
    finally:
        process.kill()
    assert process.returncode == 143, stderr
    assert re.search(r"\d+ parts are committed; run the same command to resume", stderr)
    assert [path.name for path in out.glob("_draft-*")] == ["_draft-0-of-2-part-00000.parquet"]
