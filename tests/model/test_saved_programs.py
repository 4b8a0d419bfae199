"""Saved programs and pickles name their model by its content: in another process they run that
model or refuse, whatever is loaded there."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vitrail
from vitrail.demo import demo

PHOTOS = sorted((Path(vitrail.__file__).parent / "assets/photos").iterdir())[:3]
PROGRAMS = ("export", "trace")
PICKLES = ("model", "module", "torch.save", "cloudpickle", "method")

# A process that loads the checkpoints of its arguments after the programs fail without any. It
# imports vitrail before torch, and nothing of vitrail besides.
CHILD = """
import json, pickle, sys
import vitrail
assert "torch" not in sys.modules
import torch
folder, *checkpoints = sys.argv[1:]
pixels = torch.load(f"{folder}/pixels.pt")

def run(program):
    return program(pixels)

opened = {
    "export": lambda: torch.export.load(f"{folder}/export.pt2").module(),
    "trace": lambda: torch.jit.load(f"{folder}/trace.pt"),
    "model": lambda: pickle.load(open(f"{folder}/model.pickle", "rb")).encode_image,
    "module": lambda: pickle.load(open(f"{folder}/module.pickle", "rb"))["image"],
    "torch.save": lambda: torch.load(f"{folder}/module.pt", weights_only=False),
    "cloudpickle": lambda: pickle.load(open(f"{folder}/closure.pickle", "rb")),
    "method": lambda: pickle.load(open(f"{folder}/method.pickle", "rb")),
}

def results(names):
    for name in names:
        try:
            yield name, opened[name]()(pixels).tolist()
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}"

out = {"none": dict(results(("export", "trace")))}
out["imported"] = sorted(name for name in sys.modules if name.startswith("vitrail."))
loaded = [vitrail.load(checkpoint, device="cpu") for checkpoint in checkpoints]
out["loaded"] = dict(results(opened))
print(json.dumps(out))
"""


COMPILED = """
import json, sys
import torch, vitrail
from torch._dynamo.utils import counters
folder, checkpoint = sys.argv[1:]
image = vitrail.load(checkpoint, device="cpu").as_module("image")
pixels = torch.load(f"{folder}/pixels.pt")
with torch.no_grad():
    out = torch.compile(lambda x: torch.relu(image(x)), fullgraph=True)(pixels)
    same = torch.equal(out, torch.relu(image(pixels)))
print(json.dumps({"same": same, "hits": counters["inductor"]["fxgraph_cache_hit"]}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints that differ in the sign of a matrix: right/clip and other/clip."""
    folder = tmp_path_factory.mktemp("programs")
    for name in ("right", "other"):
        shutil.copytree(demo.bundled(), folder / name / "clip")
    weights = load_file(folder / "other/clip/model.safetensors")
    weights["visual_projection.weight"] = -weights["visual_projection.weight"]
    save_file(weights, folder / "other/clip/model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def right(folder: Path) -> vitrail.Model:
    return vitrail.load(folder / "right/clip", device="cpu")


@pytest.fixture(scope="module")
def children(folder: Path, right: vitrail.Model) -> dict[str, dict[str, Any]]:
    """What two processes get: "right" has loaded a copy of the right model at another path,
    "other" only the other model, which has also taken the place of the right one."""
    pixels, image = right.preprocess(list(PHOTOS)), right.as_module("image")
    torch.save(pixels, folder / "pixels.pt")
    torch.export.save(torch.export.export(image, (pixels,)), folder / "export.pt2")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        torch.jit.trace(image, pixels).save(str(folder / "trace.pt"))
    torch.save(nn.Sequential(image, nn.Identity()), folder / "module.pt")
    pickled = {
        "model": pickle.dumps(right),
        "module": pickle.dumps({"image": image, "text": right.as_module("text")}),
        "closure": cloudpickle.dumps(lambda pixels: image(pixels)),
        "method": pickle.dumps(right.encode_image),
    }
    for name, content in pickled.items():
        (folder / f"{name}.pickle").write_bytes(content)
    shutil.copytree(folder / "right", folder / "moved")
    outputs = {"right": _child(folder, "moved/clip")}
    shutil.copytree(folder / "other/clip", folder / "right/clip", dirs_exist_ok=True)
    outputs["other"] = _child(folder, "other/clip")
    return outputs


def _child(folder: Path, checkpoint: str, code: str = CHILD, timeout: float = 60) -> dict[str, Any]:
    command = [sys.executable, "-c", code, folder, folder / checkpoint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    out: dict[str, Any] = json.loads(done.stdout)
    return out


@pytest.mark.parametrize("name", [*PROGRAMS, *PICKLES])
def test_where_the_right_model_is_loaded_the_bits_are_the_same(
    name: str, right: vitrail.Model, children: dict[str, Any]
) -> None:
    wanted = right.encode_image(right.preprocess(list(PHOTOS)))
    assert torch.equal(torch.tensor(children["right"]["loaded"][name]), wanted)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_refused_where_its_model_is_not_loaded(
    name: str, folder: Path, right: vitrail.Model, children: dict[str, Any]
) -> None:
    other = vitrail.load(folder / "other/clip", device="cpu")
    for child, loaded in (
        (children["other"]["none"], "no model"),
        (children["right"]["none"], "no model"),
        (children["other"]["loaded"], f"{other.fingerprint}, by vitrail.load('clip', device='cpu'"),
    ):
        assert (
            f"CheckpointError: image tower of the model {right.fingerprint}: this model is not "
            f"loaded on cpu (loaded: {loaded}"
        ) in child[name]
        assert (
            "load it first, and keep it: model = vitrail.load('clip', device='cpu', "
            in (child[name])
        )


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_refused_once_its_checkpoint_has_changed(
    name: str, folder: Path, right: vitrail.Model, children: dict[str, Any]
) -> None:
    other = vitrail.load(folder / "other/clip", device="cpu")
    parts = right.fingerprint_content.parts, other.fingerprint_content.parts
    differing = f"weights (got {parts[1]['weights']}, wanted {parts[0]['weights']})"
    assert children["other"]["loaded"][name] == (
        f"CheckpointError: pickled model of '{folder}/right/clip': got the fingerprint "
        f"{other.fingerprint}, wanted {right.fingerprint}, as it was pickled. These differ: "
        f"{differing}"
    )


def test_a_program_loads_no_more_of_vitrail_than_its_operators(children: dict[str, Any]) -> None:
    allowed = {"_version", "errors", "fork", "torch_import", "tower_operators"}
    assert set(children["right"]["imported"]) == {f"vitrail.{name}" for name in allowed}


@pytest.mark.usefixtures("children")
@pytest.mark.parametrize("name", ["export.pt2", "trace.pt"])
def test_a_program_names_no_folder_of_its_checkpoint(name: str, folder: Path) -> None:
    """PyTorch itself puts the paths of the Python files that it traced into a program."""
    with zipfile.ZipFile(folder / name) as program:
        content = b"".join(program.read(member) for member in program.namelist())
    assert b"vitrail" in content
    assert str(folder).encode() not in content


@pytest.mark.slow
@pytest.mark.usefixtures("children")
def test_the_cache_of_torch_compile_keeps_models_apart(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    for checkpoint, hits in (("moved/clip", 0), ("other/clip", 0), ("moved/clip", 1)):
        out = _child(folder, checkpoint, COMPILED, timeout=180)
        assert out == {"same": True, "hits": hits}, checkpoint
