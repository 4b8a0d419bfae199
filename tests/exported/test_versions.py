"""Versions of Vitrail that are built from these sources with other numbers: what one exports, the
other loads, in Python and in C++, or refuses by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import export_folder
import standin
import vitrail
from csrc.test_library import PRELUDE
from csrc.test_library import build as build_here
from vitrail.plan.record import KERNEL_ABI, PLAN_GRAMMAR
from vitrail_kernels.launch import MISSING, interpreted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        MISSING is not None or interpreted() or not standin.compiler() or not shutil.which("make"),
        reason="needs triton's compiler, a C++ compiler and make",
    ),
]

ROOT = Path(__file__).parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "engine", "kernels", "csrc")
NEXT = "99.0.0"

IN_PYTHON = """
import json, sys
from pathlib import Path
import torch
import standin, vitrail
from vitrail.exported.folder import open_exported
from vitrail.model.model import Model
from vitrail.runtime.native import NativeRunner

folder, own = sys.argv[1:]
empty = torch.empty  # a launch's digest is also of the memory that its kernel writes to
torch.empty = lambda *shape, **options: empty(*shape, **options).zero_()
try:
    exported = open_exported(folder)
except vitrail.CheckpointError as error:
    print(json.dumps({"version": vitrail.__version__, "error": str(error)}))
    sys.exit()
stand_in = standin.own(Path(own))
record = exported.record
cpu = torch.device("cpu")
runner = NativeRunner(exported.load(), exported.dtype, cpu, str(stand_in.path), exported)
model = Model(exported.checkpoint(), exported.spec, lambda: record.weights_hash, runner)
stand_in.record(True)
pixels = torch.arange(3 * 32 * 32 * 3).reshape(3, 32, 32, 3).to(torch.uint8)
rows = model._image_encoder("").tower.embeddings(pixels)["vision.embedding"]
launched = [(x.name, x.grid, x.block, x.shared, x.digest) for x in stand_in.launched()]
print(json.dumps({
    "version": vitrail.__version__,
    "fingerprint": model.fingerprint,
    "elsewhere": vitrail.load(folder, device="cpu").fingerprint,
    "launched": launched,
    "rows": rows.numpy().tobytes().hex(),
    "complaint": stand_in.complaint(),
}))
"""

IN_CPP = """
import json
import numpy as np

told = {"version": c.vitrail_version().decode()}
ctypes.CDLL(driver).standin_undo(1)  # a launch's digest is also of the memory that it writes to
if c.vitrail_load(*load):
    print(json.dumps({**told, "error": c.vitrail_error().decode()}))
    sys.exit()
facts = (ctypes.c_char * 4096)()
assert c.vitrail_model_facts(model, ctypes.byref(facts)) == 0
words = np.frombuffer(facts, np.uint64)
assert c.vitrail_session_create(model, ctypes.byref(session)) == 0
pixels = np.arange(3 * 32 * 32 * 3).reshape(3, 32, 32, 3).astype(np.uint8)
rows, status = np.zeros((3, 64), np.float32), np.zeros(3, np.int32)
pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (pixels, rows, status)]
assert c.vitrail_embed_uint8(session, pointers[0], ctypes.c_size_t(3), *pointers[1:]) == 0
fingerprint = ctypes.string_at(int(words[np.flatnonzero(words)[-1]])).decode()
print(json.dumps({**told, "fingerprint": fingerprint, "rows": rows.tobytes().hex()}))
"""


class BuiltVersion(NamedTuple):
    """The folder of a version's sources, with ``vitrail._C`` in place, and its libvitrail."""

    sources: Path
    library: Path


def run(program: str, sources: Path, *arguments: str | Path) -> dict[str, Any]:
    paths = [sources / "engine", sources / "kernels", ROOT / "tests"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=sources, timeout=60)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def in_cpp(version: BuiltVersion, folder: Path) -> dict[str, Any]:
    return run(PRELUDE + IN_CPP, ROOT, version.library, folder, standin.build())


def build(folder: Path, *, version: str, abi: int = KERNEL_ABI, extension: bool) -> BuiltVersion:
    """This tree as ``version``, compiled without optimization, which changes no result here."""
    left = shutil.ignore_patterns("__pycache__", "*.so", "binaries")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=left)
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    change(folder / "engine/vitrail/_version.py", r"(?<=__version__ = ).*$", f'"{version}"')
    change(folder / "engine/vitrail/plan/record.py", r"^KERNEL_ABI = \d+$", f"KERNEL_ABI = {abi}")
    change(folder / "csrc/numbers.hpp", r"kKernelAbi = \d+;", f"kKernelAbi = {abi};")
    library = folder / "library"
    make(["make", "-s", "-C", "csrc", f"BUILD={library}", "CXXFLAGS=-O0"], folder)
    if extension:
        make([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], folder)
        assert list((folder / "engine/vitrail").glob("_C.*.so")), "the extension was not built"
    return BuiltVersion(folder, library / "libvitrail.so")


def change(file: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, file.read_text(), flags=re.MULTILINE)
    assert count == 1, f"{file}: {pattern!r} matches {count} times, wanted once"
    file.write_text(text)


def make(command: list[str], folder: Path) -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    env = {**clean, "CFLAGS": "-O0 -w"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that this version exported."""
    folder = tmp_path_factory.mktemp("exported") / "vit"
    export_folder.export_vit(folder)
    return folder


def test_the_next_version_loads_a_folder_with_its_fingerprint_and_bits(
    exported: Path, tmp_path: Path
) -> None:
    this = BuiltVersion(ROOT, build_here("csrc") / "libvitrail.so")
    following = build(tmp_path / "next", version=NEXT, extension=True)
    stored = json.loads((exported / "vitrail.json").read_text())["builds"]["90"]["fingerprint"]
    ours, theirs = (
        run(IN_PYTHON, version.sources, exported, tmp_path) for version in (this, following)
    )
    assert (ours["version"], theirs["version"]) == (vitrail.__version__, NEXT)
    assert ours["complaint"] == theirs["complaint"] == ""
    assert ours["fingerprint"] == theirs["fingerprint"] == stored
    assert ours["launched"] == theirs["launched"]
    assert ours["rows"] == theirs["rows"]
    assert len(ours["launched"]) > 5
    assert set(ours["rows"]) != {"0"}
    # PyTorch's operators are not in the folder: their numbers are each version's own
    assert len({ours["elsewhere"], theirs["elsewhere"], stored}) == 3

    cpp, next_cpp = in_cpp(this, exported), in_cpp(following, exported)
    assert (cpp["version"], next_cpp["version"]) == (vitrail.__version__, NEXT)
    assert cpp["fingerprint"] == next_cpp["fingerprint"] == stored
    assert cpp["rows"] == next_cpp["rows"]
    assert set(cpp["rows"]) != {"0"}


def test_a_version_of_another_kernel_abi_refuses_it_naming_both_numbers(
    exported: Path, tmp_path: Path
) -> None:
    other = build(tmp_path / "other", version=NEXT, abi=KERNEL_ABI + 1, extension=False)
    for told in (run(IN_PYTHON, other.sources, exported, ""), in_cpp(other, exported)):
        assert told["version"] == NEXT
        pattern = (
            f"got plan grammar {PLAN_GRAMMAR} and kernel ABI {KERNEL_ABI}, exported by Vitrail "
            f"'?{re.escape(vitrail.__version__)}'?, wanted plan grammar {PLAN_GRAMMAR} and kernel "
            f"ABI {KERNEL_ABI + 1}, which Vitrail {NEXT} reads: export the checkpoint again"
        )
        assert re.search(pattern, told["error"]), told["error"]
