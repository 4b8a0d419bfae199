"""The house rules of CONTRIBUTING.md that a program can check."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from gauge import fastest

ROOT = Path(__file__).parents[1]
ENGINE = ROOT / "engine/vitrail"
KERNELS = ROOT / "kernels/vitrail_kernels"

# A folder of vitrail imports only from those above it; `spec` is a module.
ORDER = (
    "spec",
    "checkpoint",
    "zoo",
    "weights",
    "image",
    "text",
    "plan",
    "exported",
    "runtime",
    "int8",
    "model",
    "jobs",
    "tools",
    "demo",
    "cli",
)
# These import nothing of vitrail but each other. `_C` is the C++ extension.
FROM_ANYWHERE = {
    "_C",
    "_version",
    "cuda",
    "dtypes",
    "durable",
    "errors",
    "fork",
    "torch_import",
    "torch_modes",
    "tower_operators",
}

# The imports of each package besides the standard library and itself.
MAY_IMPORT = {
    "vitrail": {
        "huggingface_hub",
        "numpy",
        "PIL",
        "pyarrow",
        "safetensors",
        "tokenizers",
        "torch",
        "tqdm",
        "typer",
        "vitrail_kernels",
    },
    "vitrail_kernels": {"numpy", "torch", "triton"},
}
FORBIDDEN_IMPORTS = {"transformers", "timm", "open_clip", "torchvision", "pickle", "marshal"}
ORACLES = {"transformers"}  # verify.py compares with it if it is installed
FORBIDDEN_CALLS = {"eval", "exec", "torch.load"}

TEXT = {".cpp", ".cu", ".hpp", ".json", ".md", ".py", ".pyi", ".toml", ".txt", ".yaml"}
SOURCES = [path for folder in (ENGINE, KERNELS) for path in sorted(folder.rglob("*.py"))]


def _name(path: Path) -> str:
    """``engine/vitrail/zoo/hf.py`` -> ``vitrail.zoo.hf``."""
    parts = path.relative_to(ROOT).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _imports(path: Path) -> Iterator[str]:
    """Full dotted names, wherever in the file the import stands."""
    package = _name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, node.module] if node.module else above)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _unit(dotted: str) -> str:
    """The folder or module below vitrail that a dotted name belongs to; "vitrail" for its own."""
    _, _, inner = dotted.partition(".")
    head = inner.partition(".")[0]
    return head if head in ORDER or head in FROM_ANYWHERE else "vitrail"


def _text_files() -> Iterator[Path]:
    """Every text file of the project, without the files that make and the tools build."""
    left = re.compile(r"\.(git|venv.*|hypothesis|benchmarks)|build|dist|.*cache_*|.*\.egg-info")
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if not left.fullmatch(name)]
        for path in (Path(folder, name) for name in files):
            if path.suffix in TEXT or path.name in {"Makefile", "run"}:
                yield path


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def _python(code: str) -> str:
    """The output of a fresh interpreter in the project's folder."""
    paths = os.pathsep.join(str(package.parent) for package in (ENGINE, KERNELS))
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


# ---- imports and calls


def test_every_folder_of_the_engine_stands_in_the_order() -> None:
    paths = (path.relative_to(ENGINE) for path in (*ENGINE.rglob("*.py"), *ENGINE.rglob("*.pyi")))
    heads = {path.parts[0].partition(".")[0] for path in paths}
    assert heads - {"__init__"} == {*ORDER, *FROM_ANYWHERE}


@pytest.mark.parametrize("path", sorted(ENGINE.rglob("*.py")), ids=_name)
def test_a_folder_imports_only_from_those_above_it(path: Path) -> None:
    order = (*ORDER[:-1], "vitrail", ORDER[-1])  # the package's own names are for the command line
    unit = _unit(_name(path))
    for imported in _imports(path):
        if imported.partition(".")[0] != "vitrail":
            continue
        other = _unit(imported)
        if other in FROM_ANYWHERE or other == unit:
            continue
        assert unit in order, f"{unit} may import nothing of vitrail, but imports {imported}"
        assert order.index(other) < order.index(unit), f"{unit} imports {imported} from below"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_a_package_imports_only_what_it_may(path: Path) -> None:
    package = _name(path).partition(".")[0]
    imported = {name.partition(".")[0] for name in _imports(path)}
    if path == ENGINE / "tools/oracle.py":
        imported -= ORACLES
    assert not imported & FORBIDDEN_IMPORTS
    assert imported - set(sys.stdlib_module_names) - {package} <= MAY_IMPORT[package]


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_no_source_evaluates_or_unpickles(path: Path) -> None:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call):
            location = f"{path.name}:{node.lineno}"
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, location
            assert all(keyword.arg != "allow_pickle" for keyword in node.keywords), location


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_every_assert_has_a_message_and_every_broad_except_does_something(path: Path) -> None:
    for node in ast.walk(_tree(path)):
        location = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Assert):
            assert node.msg is not None, f"{location}: assert without a message"
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"}
            empty = all(isinstance(line, ast.Pass | ast.Continue) for line in node.body)
            assert not (broad and empty), f"{location}: an error vanishes"


# ---- layout


@pytest.mark.parametrize("root", [ENGINE.parent, KERNELS.parent], ids=lambda root: root.name)
def test_a_root_holds_its_package_and_no_python_of_its_own(root: Path) -> None:
    assert not list(root.glob("*.py"))
    assert [folder.parent.name for folder in root.glob("*/__init__.py")] == [
        {"engine": "vitrail", "kernels": "vitrail_kernels"}[root.name]
    ]


def test_the_folder_kernels_hides_no_package_of_that_name() -> None:
    origin = _python(
        "import importlib.util as util; spec = util.find_spec('kernels');"
        "print(spec.origin if spec else None)"
    )
    assert origin == "None" or not Path(origin).is_relative_to(KERNELS.parent)


def test_csrc_includes_no_torch() -> None:
    sources = [path for path in (ROOT / "csrc").iterdir() if path.suffix in TEXT]
    assert sources
    for path in sources:
        found = re.findall(r'#\s*include\s*[<"](?:torch|ATen|c10)/.*', path.read_text())
        assert not found, f"{path.name}: {found}"


def test_the_bindings_stay_bindings() -> None:
    assert len((ROOT / "csrc/module.cpp").read_text().splitlines()) <= 150


def test_no_text_names_a_folder_of_some_machine() -> None:
    folder = re.compile(r"""(?<![\w.])/(?:tmp|root|work|home/[a-z]+)/""")
    found = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in _text_files()
        for line in path.read_text(encoding="utf-8").splitlines()
        if folder.search(line)
    }
    assert not found


def test_the_readme_shows_its_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme


def test_every_sample_photo_has_its_credit_and_is_small() -> None:
    photos = sorted((ENGINE / "assets/photos").iterdir())
    credits = (ENGINE / "assets/CREDITS.md").read_text()
    assert len(photos) >= 4
    assert [photo.name for photo in photos] == re.findall(r"`photos/([^`]+)`", credits)
    assert all(photo.stat().st_size <= 60_000 for photo in photos)


# ---- versions


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(package for extra in extras for package in extra)]
    names = {re.split(r"[^A-Za-z0-9_-]", name)[0].replace("_", "-").lower() for name in wanted}
    assert names <= _pins().keys()


def test_pre_commit_runs_the_pinned_tools() -> None:
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    used = dict(re.findall(r'\["([a-z]+)==([^"]+)"\]', config))
    assert used == {tool: _pins()[tool] for tool in ("ruff", "mypy")}
    assert len(re.findall("additional_dependencies", config)) == len(re.findall("- id:", config))


# ---- start-up


@pytest.mark.parametrize(
    "module", ["vitrail", "vitrail.checkpoint.files", "vitrail.spec", "vitrail.cli"]
)
def test_importing_takes_no_torch(module: str) -> None:
    assert _python(f"import sys, {module}; print('torch' in sys.modules)") == "False"


@pytest.mark.machine
def test_help_takes_little_more_than_the_library_of_its_command_line() -> None:
    command = Path(sysconfig.get_path("scripts"), "vitrail")
    assert command.exists(), "the vitrail command is not installed: make install"

    def helps() -> None:
        run = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, run.stderr
        assert "Usage" in run.stdout

    own, typer = fastest(helps, lambda: _python("import typer"))
    assert own < 2 * typer, (own, typer)
