"""What surrounds a model on a GPU: compilers, caches and drivers that are missing, old or broken.

The driver stand-in is the GPU. Fresh processes are started only if a process's first import or its
environment is the subject.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import standin
import vitrail
from vitrail.model import Model, read_model
from vitrail.runners import native
from vitrail.runners.native import NativeRunner
from vitrail_kernels.launch import MISSING, interpreted

ASSETS = Path(vitrail.__file__).parent / "assets"
CLIP = ASSETS / "clip"
CPU, FP16 = torch.device("cpu"), torch.float16

needs_native = pytest.mark.skipif(
    MISSING is not None or interpreted() or native.MISSING is not None or not standin.compiler(),
    reason="the native runner: needs triton's compiler, vitrail._C and a C++ compiler",
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> standin.Standin:
    if native.MISSING is not None or not standin.compiler():
        pytest.skip("needs vitrail._C and a C++ compiler")
    return standin.own(tmp_path_factory.mktemp("driver"), 2)


@pytest.fixture
def driver(library: standin.Standin) -> Iterator[standin.Standin]:
    library.reset()
    yield library
    assert library.complaint() == ""
    library.reset()


def open_model(driver: standin.Standin) -> Model:
    """The bundled model by the native runner on the stand-in."""
    loaded = read_model(CLIP, FP16)
    runner = NativeRunner(loaded.weights, FP16, CPU, str(driver.path))
    return Model(loaded.checkpoint, loaded.spec, loaded.hash_weights, runner)


def embed(model: Model, size: tuple[int, int] = (64, 64)) -> tuple[int, ...]:
    """Shape of the embedding of two images: what the stand-in writes there are no numbers."""
    pixels = torch.zeros(2, *size, 3, dtype=torch.uint8)
    return model._vision_tower("embed").embed(pixels)["vision.embedding"].shape


# -- compilers -------------------------------------------------------------------------------------


@needs_native
def test_the_native_runner_never_asks_for_a_c_compiler(
    driver: standin.Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own launcher is C that it compiles with Python.h: slim images have neither."""
    from triton.runtime import build

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(build, "_build", refuse)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    model = open_model(driver)
    assert embed(model) == embed(model, (48, 80)) == (2, 128)
    assert model._text_tower("text").embed([[1, 2, 3]])["text.embedding"].shape == (1, 128)
