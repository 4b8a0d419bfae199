"""Builds and packages: the CUDA binaries and their settings, the sdist, the wheel."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

from vitrail_kernels import cuda_binary

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "engine", "kernels", "csrc")
DATA = {".jpg", ".json", ".md", ".py", ".pyi", ".safetensors", ".typed"}
ARCHITECTURES = [80, 86, 89, 90, 100, 120]
KERNELS = {"vitrail_resize_across", "vitrail_resize_down"}
BINARIES = "vitrail_kernels/binaries"

# The parts of nvcc that the build asks; it fails at compiling if told so.
COMPILER = """#!/bin/sh
case $1 in
--list-gpu-code) echo "sm_75 $FAKE_KNOWS" ;;
--version) echo "Cuda compilation tools, release 12.3, V12.3.107" ;;
*)
    [ -z "$FAKE_FAILS" ] || { echo "resize.cu(7): error: $FAKE_FAILS" >&2; exit 2; }
    echo "$0" "$@" >>"$FAKE_LOG"
    while [ "$1" != -o ]; do shift; done
    echo code >"$2"
    ;;
esac
"""


def has_nvcc() -> bool:
    home = os.environ.get("CUDA_HOME")
    return bool((home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc"))


def python(
    *arguments: str | Path, folder: Path, code: int = 0, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter in ``folder`` with only ``settings`` in its environment."""
    kept = {key: os.environ[key] for key in ("HOME", "LANG", "TMPDIR") if key in os.environ}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**kept, "OMP_NUM_THREADS": "1", **settings},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def hook(name: str, tree: Path, *arguments: Path, **settings: str) -> str:
    """The output of a build hook in ``tree``, called as pip calls it."""
    call = f"import sys; sys.path[0] = 'csrc'; import backend; hook = backend.{name};"
    done = python(
        "-c", f"{call} print('hook', hook(*sys.argv[1:]))", *arguments, folder=tree, **settings
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a clone: no caches, nothing built."""
    folder = tmp_path_factory.mktemp("clone")
    left = shutil.ignore_patterns("__pycache__", "*.so", "binaries")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name, **({"ignore": left} if copy is shutil.copytree else {}))
    return folder


# ---- the image that is installed


def test_where_there_is_nvcc_the_image_was_built() -> None:
    if cuda_binary.cuda_binary("resize") is None and os.environ.get("VITRAIL_CUDA") != "0":
        assert not has_nvcc(), "nvcc is here and the CUDA binary is not: make install"


def cuobjdump(file: Path, *options: str) -> str:
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton")
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([program, *options, file], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_image_holds_what_it_says_without_a_spill(tmp_path: Path) -> None:
    image = cuda_binary.cuda_binary("resize")
    if image is None:
        pytest.skip("no CUDA binary was built: no nvcc in CUDA_HOME or PATH")
    (file := tmp_path / "resize.fatbin").write_bytes(image.code)
    machine, ptx = (cuobjdump(file, f"-l{kind}") for kind in ("elf", "ptx"))
    assert sorted(map(int, re.findall(r"\.sm_(\d+)\.cubin", machine))) == list(image.architectures)
    assert re.findall(r"\.sm_(\d+)\.ptx", ptx) == [str(image.ptx)]
    assert image.ptx == 90, "older code does not wait for the kernel before it"
    if tuple(map(int, image.nvcc.split(".")[:2])) >= (12, 8):
        assert list(image.architectures) == ARCHITECTURES
    used = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)",
        cuobjdump(file, "-res-usage"),
    )
    assert sorted(name for name, *_ in used) == sorted([*KERNELS] * len(image.architectures))
    for name, registers, stack, local in used:
        assert (stack, local) == ("0", "0"), f"{name}: stack {stack}, local {local}"
        assert int(registers) <= 64, f"{name}: {registers} registers, so fewer than 8 blocks fit"


def test_an_image_is_there_once_its_facts_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_binary, "FOLDER", tmp_path)
    assert cuda_binary.cuda_binary("resize") is None
    (tmp_path / "resize.fatbin").write_bytes(b"code")
    assert cuda_binary.cuda_binary("resize") is None
    facts = {"architectures": [80, 90], "ptx": None, "nvcc": "11.8.89"}
    (tmp_path / "resize.json").write_text(json.dumps(facts))
    image = cuda_binary.cuda_binary("resize")
    assert image == (b"code", (80, 90), None, "11.8.89")
    assert str(image) == "CUDA binary for sm_80, sm_90 (nvcc 11.8.89)"
    assert str(image._replace(ptx=90)).startswith("CUDA binary for sm_80, sm_90 and, as PTX, later")


# ---- the step that builds them


class Step:
    """The build step with compilers that are scripts."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self.tree, self.folder, self.log = tree, folder, folder / "log"
        self.built = folder / "lib" / BINARIES

    def compiler(self, name: str) -> Path:
        """A compiler in a folder of its own, which is returned."""
        place = self.folder / name
        place.mkdir(parents=True)
        (place / "nvcc").write_text(COMPILER)
        (place / "nvcc").chmod(0o755)
        return place

    def run(self, code: int = 0, knows: str = "", fails: str = "", **settings: str | Path) -> str:
        """The output of the step. PATH has only the given programs."""
        self.log.write_text("")
        given = {"PATH": self.folder / "nothing", **settings}
        done = python(
            *("setup.py", "-q", "build_cuda_binaries", "--build-lib", self.folder / "lib"),
            folder=self.tree,
            code=code,
            FAKE_KNOWS=knows or " ".join(f"sm_{arch}" for arch in ARCHITECTURES),
            FAKE_FAILS=fails,
            FAKE_LOG=str(self.log),
            **{name: str(value) for name, value in given.items()},
        )
        return done.stdout + done.stderr

    def facts(self) -> dict[str, object]:
        assert (self.built / "resize.fatbin").read_text() == "code\n"
        return dict(json.loads((self.built / "resize.json").read_text()))


@pytest.fixture
def step(tree: Path, tmp_path: Path) -> Step:
    return Step(tree, tmp_path)


def test_every_architecture_is_asked_for_in_one_file(step: Step) -> None:
    assert step.run(PATH=step.compiler("bin")) == ""
    assert step.facts() == {"architectures": ARCHITECTURES, "ptx": 90, "nvcc": "12.3.107"}
    wanted = {f"arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES}
    wanted.add("arch=compute_90,code=compute_90")
    assert set(re.findall(r"-gencode=(\S+)", step.log.read_text())) == wanted


def test_an_older_compiler_builds_what_it_knows_and_the_rest_is_named(step: Step) -> None:
    said = step.run(PATH=step.compiler("bin"), knows="sm_80 sm_86 sm_87 sm_90")
    assert "resize.fatbin is without sm_89, sm_100, sm_120, which" in said
    assert step.facts() == {"architectures": [80, 86, 90], "ptx": 90, "nvcc": "12.3.107"}
    step.run(PATH=step.folder / "bin", knows="sm_80 sm_86")
    assert step.facts()["ptx"] is None
    assert "compute_90" not in step.log.read_text()


def test_the_compiler_is_cuda_homes_then_paths_then_a_fetched_one(step: Step) -> None:
    home, path = step.compiler("home/bin"), step.compiler("bin")
    wheel = step.compiler("wheels/nvidia/cu13/bin")
    settings = {"PYTHONPATH": step.folder / "wheels", "VITRAIL_CUDA": "1"}
    step.run(PATH=path, CUDA_HOME=home.parent, **settings)
    assert step.log.read_text().startswith(f"{home}/nvcc ")
    step.run(PATH=path, CUDA_HOME=step.folder, **settings)
    assert step.log.read_text().startswith(f"{path}/nvcc ")
    step.run(**settings)
    assert step.log.read_text().startswith(f"{wheel}/nvcc ")
    said = step.run(PYTHONPATH=step.folder / "wheels")
    assert "no nvcc in CUDA_HOME or PATH" in said, "used unasked"
    assert step.log.read_text() == ""


def test_without_a_compiler_it_says_so_and_fails_only_if_asked_to_build(step: Step) -> None:
    said = step.run()
    assert "No CUDA binaries were built: no nvcc in CUDA_HOME or PATH" in said
    assert "VITRAIL_CUDA=1" in said
    assert "error: no nvcc in CUDA_HOME or PATH" in step.run(code=1, VITRAIL_CUDA="1")


def test_a_failing_compiler_has_its_words_and_leaves_nothing(step: Step) -> None:
    path = step.compiler("bin")
    step.run(PATH=path)
    assert step.facts()
    said = step.run(PATH=path, fails="no such thing")
    assert "No CUDA binaries were built: " in said
    assert "exit status 2\nresize.cu(7): error: no such thing" in said
    assert not step.built.exists(), "an older image is left"
    said = step.run(PATH=path, fails="no such thing", code=1, VITRAIL_CUDA="1")
    assert "resize.cu(7): error: no such thing" in said
    said = step.run(PATH=path, knows="sm_70")
    assert "got sm_75 sm_70, wanted one of sm_80, sm_86" in said


def test_switched_off_it_builds_nothing_and_removes_what_was_built(step: Step) -> None:
    path = step.compiler("bin")
    step.run(PATH=path)
    assert step.facts()
    assert step.run(PATH=path, VITRAIL_CUDA="0") == ""
    assert step.log.read_text() == ""
    assert not step.built.exists()


def test_another_setting_is_refused(step: Step) -> None:
    said = step.run(code=1, VITRAIL_CUDA="yes")
    assert "VITRAIL_CUDA: got 'yes', wanted 0, 1 or nothing" in said


def test_a_compiler_is_fetched_only_when_asked_for_and_missing(step: Step) -> None:
    name = "get_requires_for_build_wheel"
    path = {"PATH": str(step.folder)}
    asked = hook(name, step.tree, **path, VITRAIL_CUDA="1").splitlines()[-1]
    packages = ("cuda-nvcc", "cuda-runtime", "cuda-crt", "cuda-cccl", "nvvm")
    assert re.findall(r"'nvidia-([a-z-]+)==\d+\.\d+\.\d+'", asked) == list(packages)
    for settings in (path, {**path, "VITRAIL_CUDA": "0"}):
        assert hook(name, step.tree, **settings).splitlines()[-1] == "hook []"
    path = {"PATH": str(step.compiler("bin"))}
    assert hook(name, step.tree, **path, VITRAIL_CUDA="1").splitlines()[-1] == "hook []"


# ---- sdist and wheel


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the sdist, with the compilers of this machine."""
    folder = tmp_path_factory.mktemp("wheel")
    hook("build_sdist", tree, folder)
    (sdist,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(sdist, folder)
    here = {name: os.environ[name] for name in ("PATH", "CUDA_HOME", "CXX") if name in os.environ}
    hook("build_wheel", folder / sdist.name.removesuffix(".tar.gz"), folder, **here)
    (wheel,) = folder.glob("*.whl")
    return wheel


def names(archive: Path) -> set[str]:
    """Files of a wheel, its own records left out."""
    with zipfile.ZipFile(archive) as opened:
        return {name for name in opened.namelist() if ".dist-info/" not in name}


def packed_sources(tree: Path) -> set[str]:
    roots = tree / "engine", tree / "kernels"
    files = [(root, path) for root in roots for path in root.rglob("*") if path.suffix in DATA]
    return {str(path.relative_to(root)) for root, path in files}


@pytest.mark.slow
def test_the_wheel_of_the_sdist_holds_the_packages_and_nothing_else(
    wheel: Path, tree: Path
) -> None:
    wanted = packed_sources(tree)
    if has_nvcc():
        wanted |= {f"{BINARIES}/resize.fatbin", f"{BINARIES}/resize.json"}
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    if headers and shutil.which(os.environ.get("CXX", "c++")):
        wanted.add("vitrail/_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    assert names(wheel) == wanted
    with zipfile.ZipFile(wheel) as opened:
        assert any(n.endswith(".dist-info/licenses/LICENSE") for n in opened.namelist())
    # the bundled model and its photos are 2.3 MB: anything large besides is an accident
    assert wheel.stat().st_size < 3_500_000


@pytest.mark.slow
def test_the_wheel_imports_without_gpu_compiler_or_toolkit(wheel: Path, tmp_path: Path) -> None:
    site, nowhere = tmp_path / "site", tmp_path / "nowhere"
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(site)
    nowhere.mkdir()
    model = site / "vitrail/assets/clip"
    code = """
        import sys, vitrail, vitrail_kernels
        from vitrail.tools import info
        from vitrail_kernels.cuda_binary import cuda_binary
        print(vitrail.__file__, vitrail_kernels.__file__, sep="\\n")
        image, facts = cuda_binary("resize"), info.read(sys.argv[1])[1]["serving"]
        print(facts["kernels"].partition("; ")[2], facts["native"], sep="\\n")
        native = sys.modules.get("vitrail._C")
        print(native and native.__file__, len(image.code) if image else 0, sep="\\n")
    """
    settings = {"PATH": str(nowhere), "PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""}
    said = python("-c", textwrap.dedent(code), model, folder=nowhere, **settings).stdout
    *files, resize, native, module, size = said.splitlines()
    built = names(wheel)
    assert files == [f"{site}/{name}/__init__.py" for name in ("vitrail", "vitrail_kernels")]
    if any(name.startswith("vitrail/_C.c") for name in built):
        assert module.startswith(f"{site}/vitrail/_C.")
        assert "no GPU" in native
    else:
        assert "pure Python" in native
    if f"{BINARIES}/resize.fatbin" in built:
        assert resize.startswith("resize: CUDA binary for sm_80")
        assert int(size) == (site / BINARIES / "resize.fatbin").stat().st_size > 10_000
    else:
        assert (resize, size) == ("resize: Triton, no CUDA binary was built", "0")


@pytest.mark.slow
def test_without_any_compiler_the_wheel_is_pure_python(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    settings = {"PATH": str(tmp_path / "nothing"), "CC": "false", "CXX": "false"}
    said = hook("build_wheel", tree, tmp_path, **settings)
    assert "vitrail._C was not built" in said
    assert "No CUDA binaries were built" in said
    (wheel,) = tmp_path.glob("*.whl")
    assert names(wheel) == packed_sources(tree)


@pytest.mark.slow
def test_an_editable_install_builds_in_place_and_nothing_packs_that(
    step: Step, tmp_path: Path
) -> None:
    """A working copy may have an old CUDA binary."""
    settings = {"PATH": str(step.compiler("bin")), "CC": "false", "CXX": "false"}
    settings |= {"FAKE_LOG": str(step.log), "FAKE_KNOWS": "sm_80"}
    in_place = step.tree / "kernels" / BINARIES
    try:
        hook("build_editable", step.tree, tmp_path, **settings)
        assert json.loads((in_place / "resize.json").read_text())["architectures"] == [80]
        (tmp_path / "dist").mkdir()
        hook("build_wheel", step.tree, tmp_path / "dist", **settings, VITRAIL_CUDA="0")
        hook("build_sdist", step.tree, tmp_path / "dist", **settings)
    finally:
        shutil.rmtree(in_place, ignore_errors=True)
    (wheel,), (sdist,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    assert names(wheel) == packed_sources(step.tree)
    with tarfile.open(sdist) as archive:
        assert not [name for name in archive.getnames() if "/binaries/" in name]
