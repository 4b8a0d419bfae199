"""What Vitrail writes depends on its inputs: not on paths, processes or the seed of hashes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import clip_folder
from jobs.digits import files
from jobs.processes import GUARD, outputs_of
from vitrail.demo import demo
from vitrail_kernels.launch import MISSING, interpreted

# A process writes below its current folder; "here" is that folder, by an absolute path.
FAST = f"""
from vitrail.tools import export
# kernels that are names alone, since compiling them takes most of a minute
export.kernel_record = lambda key, call, arch: f"{{key}} {{arch}}".encode()
export.export_model(here / "clip", "export", [80, 90])

import vitrail
from vitrail.jobs.embedder import ModelEmbedder
from vitrail.jobs.folder import embed_to_folder
from vitrail.jobs.one_file import embed_to_file
from vitrail.jobs.rows import EmbedOptions
photos = {[str(path) for path in sorted((demo.bundled().parent / "photos").iterdir())]}
embedder = ModelEmbedder(vitrail.load(here / "bundled", device="cpu"))
embed_to_folder(embedder, photos, Path("folder"), EmbedOptions(part_size=4))
for name in ("embeddings.parquet", "embeddings.npy"):
    embed_to_file(embedder, photos, Path(name), EmbedOptions())
"""
SLOW = """
from vitrail.tools.export import export_model
from vitrail.tools.quantize import quantize_model
export_model(here / "clip", "export", [90])
quantize_model(here / "bundled", "int8", device="cpu")
"""


@pytest.mark.skipif(MISSING is not None or interpreted(), reason="export: needs triton's compiler")
@pytest.mark.parametrize("code", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_two_processes_write_the_same_bytes(code: str, tmp_path: Path) -> None:
    models, folders = tmp_path / "models", [tmp_path / "a", tmp_path / "far/away/from a"]
    clip_folder(models / "clip", vision=BLOCK, text=BLOCK | TEXT)
    shutil.copytree(demo.bundled(), models / "bundled")
    processes = []
    for seed, folder in enumerate(folders, 1):
        shutil.copytree(models, folder)
        environment = os.environ | {
            "PYTHONHASHSEED": str(seed),
            "VITRAIL_CACHE": str(folder / "cache"),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-c", f"from pathlib import Path\nhere = Path.cwd()\n{code}"]
        processes.append(
            subprocess.Popen(
                command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
            )
        )
    outputs = outputs_of(*processes, timeout=GUARD if code == FAST else 300)
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    first, second = (files(folder) for folder in folders)
    assert len(first) > len(files(models)) + 8
    assert first.keys() == second.keys()
    assert [path for path in first if first[path] != second[path]] == []
    assert [path for path, data in first.items() if str(tmp_path).encode() in data] == []


BLOCK = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
TEXT = {"vocab_size": 700, "max_position_embeddings": 40}
