"""vitrail._C: the stub and the module say the same, and the driver probe never raises."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

from vitrail._version import __version__

ROOT = Path(__file__).parents[2]
STUB = ROOT / "engine/vitrail/_C.pyi"

# A driver with what the probe calls. Settings come from the environment of the process.
FAKE_DRIVER = """
#include <stdlib.h>
#include <string.h>
static int setting(const char* name) { const char* s = getenv(name); return s ? atoi(s) : 0; }
int cuGetErrorName(int e, const char** s) {
    *s = e == 100 ? "CUDA_ERROR_NO_DEVICE" : 0;
    return *s ? 0 : 1;
}
int cuDriverGetVersion(int* v) { *v = 13020; return 0; }
int cuInit(unsigned flags) { return flags ? 1 : setting("FAKE_INIT"); }
int cuDeviceGetCount(int* n) { *n = setting("FAKE_COUNT"); return 0; }
int cuDeviceGet(int* d, int i) { *d = 40 + i; return 0; }
int cuDeviceGetName(char* s, int n, int d) {
    memset(s, d == 40 ? 'a' : 'b', 3);
    s[3] = 0;
    return n < 4;
}
#ifndef WITHOUT_ATTRIBUTES
int cuDeviceGetAttribute(int* v, int a, int d) {
    *v = a == 75 ? d - 31 : a == 76 ? 0 : -1;
    return 0;
}
#endif
"""


def _buildable() -> bool:
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return headers.exists() and shutil.which(os.environ.get("CXX", "c++")) is not None


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    """The built module. Where it could be built but is missing, that is a failure."""
    try:
        from vitrail import _C
    except ImportError as error:
        if _buildable():
            pytest.fail(f"vitrail._C can be built here but was not: make install ({error})")
        pytest.skip("vitrail._C, the GPU driver probe: no C++ compiler or Python headers here")
    return _C


def _public(names: object) -> set[str]:
    return {name for name in names if not name.startswith("_")}  # type: ignore[attr-defined]


def test_the_stub_names_what_the_module_has(extension: ModuleType) -> None:
    stub = ast.parse(STUB.read_text())
    named = {node.name for node in stub.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert named == _public(dir(extension)), "the stub, and what the module has"
    for node in stub.body:
        if isinstance(node, ast.ClassDef):
            members = {m.name for m in node.body if isinstance(m, ast.FunctionDef)}
            inherited = dir(getattr(extension, node.name).__base__)
            attributes = _public(dir(getattr(extension, node.name))) - _public(inherited)
            assert members - {"__init__"} == attributes, node.name


def test_the_stub_has_the_signatures_of_the_module(extension: ModuleType) -> None:
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            assert node.returns is not None, node.name
            expected = f"{node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
            (signature, *_) = getattr(extension, node.name).__doc__.splitlines()
            for number in ("int", "float"):  # pybind11 also takes what converts to a number
                accepted = f"typing.Supports{number.title()} | typing.SupportsIndex"
                signature = signature.replace(accepted, number)
            assert signature.replace("vitrail._C.", "") == expected


def test_the_extension_was_built_from_this_version(extension: ModuleType) -> None:
    assert extension.version() == __version__


def test_a_fact_of_the_driver_has_the_type_in_the_stub(extension: ModuleType) -> None:
    driver = extension.driver()
    assert type(driver.available) is bool
    assert type(driver.version) is int
    assert driver.available == bool(driver.devices)
    assert driver.available == (driver.reason == "")


def _probe(extension: ModuleType, folder: Path, **settings: str) -> str:
    """What a fresh process says of the driver found in ``folder``."""
    code = """
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        d = module.driver()
        print(d.available, d.version, [(x.name, x.capability) for x in d.devices], d.reason)
    """
    assert extension.__file__ is not None
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), extension.__file__],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder), **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def _fake_driver(folder: Path, *flags: str) -> Path:
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("the fake libcuda: no C compiler here")
    source = folder / "fake.c"
    source.write_text(FAKE_DRIVER)
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", *flags, "-o", library, source], check=True)
    return folder


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"FAKE_COUNT": "2"}, "True 13020 [('aaa', (9, 0)), ('bbb', (10, 0))]"),
        ({"FAKE_COUNT": "0"}, "False 13020 [] the driver knows no device"),
        ({"FAKE_INIT": "100"}, "False 13020 [] cuInit: CUDA_ERROR_NO_DEVICE"),
        ({"FAKE_INIT": "987"}, "False 13020 [] cuInit: error 987"),
    ],
    ids=["two devices", "no device", "an error with a name", "an error without a name"],
)
def test_the_probe_says_what_the_driver_says(
    extension: ModuleType, tmp_path: Path, settings: dict[str, str], wanted: str
) -> None:
    assert _probe(extension, _fake_driver(tmp_path), **settings) == wanted


def test_a_driver_without_a_function_is_named_with_it(
    extension: ModuleType, tmp_path: Path
) -> None:
    folder = _fake_driver(tmp_path, "-DWITHOUT_ATTRIBUTES")
    said = _probe(extension, folder, FAKE_COUNT="1")
    assert said == "False 13020 [] cuDeviceGetAttribute: this driver is too old for it"


def test_a_library_that_is_no_library_is_a_reason_not_an_error(
    extension: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "libcuda.so.1").write_bytes(b"not a library")
    said = _probe(extension, tmp_path)
    assert said.startswith("False 0 []")
    assert "libcuda.so.1" in said


@pytest.mark.gpu
def test_the_probe_agrees_with_torch(extension: ModuleType) -> None:
    import torch

    devices = extension.driver().devices
    assert len(devices) == torch.cuda.device_count()
    for index, device in enumerate(devices):
        assert device.capability == torch.cuda.get_device_capability(index)
        assert device.name == torch.cuda.get_device_name(index)
