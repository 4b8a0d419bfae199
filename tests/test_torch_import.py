"""Vitrail's operators are registered whenever torch is imported, and never import it themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = ROOT / "engine"

REGISTERED = "assert torch.ops.vitrail.embed_image and torch.ops.vitrail.embed_text"
REAL = {
    "vitrail first, by eight threads at once, with vitrail reloaded": f"""
import importlib, sys, threading
import vitrail
importlib.reload(vitrail)
finders = [finder for finder in sys.meta_path if type(finder).__module__ == "vitrail.torch_import"]
assert len(finders) == 1
assert importlib.util.find_spec("torch").origin.endswith("__init__.py")
assert "torch" not in sys.modules
errors = []
def work():
    try:
        import torch
        {REGISTERED}
    except BaseException as error:
        errors.append(error)
threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not errors, errors
assert finders[0] not in sys.meta_path
import torch
assert type(torch.__spec__.loader).__name__ == type(torch.__loader__).__name__ == "SourceFileLoader"
importlib.reload(vitrail)
assert not [name for name in sys.modules if name.startswith(("vitrail.model", "vitrail_kernels"))]
""",
    "torch first": f"import torch, vitrail; {REGISTERED}",
}


@pytest.mark.parametrize("name", REAL)
def test_the_operators_are_there_in_any_order_of_imports(name: str) -> None:
    _run(REAL[name], ENGINE)


FAKE = """
import os
if int(os.environ.get("TORCH_FAILS", "0")):
    os.environ["TORCH_FAILS"] = "0"
    raise ImportError("libtorch.so is not there")
"""


def test_a_torch_that_fails_at_first_is_followed_when_it_succeeds(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(FAKE)
    code = """
import os, sys, warnings
import vitrail
os.environ["TORCH_FAILS"] = "1"
try:
    import torch
except ImportError as error:
    assert "libtorch.so" in str(error)
else:
    raise AssertionError("torch was imported")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch  # it has nothing that an operator needs
assert ["vitrail.tower_operators" in str(warning.message) for warning in caught] == [True]
assert torch.__spec__.loader is torch.__loader__
assert type(torch.__loader__).__name__ == "SourceFileLoader"
"""
    _run(code, tmp_path, ENGINE)


def test_without_torch_vitrail_is_imported_and_torch_is_missing() -> None:
    code = """
import sys
import vitrail
sys.path[:] = [path for path in sys.path if not path.endswith("site-packages")]
try:
    import torch
except ModuleNotFoundError as error:
    assert error.name == "torch"
else:
    raise AssertionError("torch was imported")
sys.modules["torch"] = None
import importlib
importlib.reload(vitrail)
"""
    _run(code, ENGINE)


def test_another_tool_may_wrap_the_same_import() -> None:
    code = """
import importlib.util, sys
class Asking:
    asked = 0
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            self.asked += 1
            for finder in sys.meta_path:
                if finder is not self and (spec := finder.find_spec(name, path, target)):
                    return spec
asking = Asking()
import vitrail
sys.meta_path.insert(0, asking)
assert importlib.util.find_spec("torch") is not None
assert asking.asked == 2, "once by the import system, once by Vitrail's finder"
"""
    _run(code, ENGINE)


def _run(code: str, *paths: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
