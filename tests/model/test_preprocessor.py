"""`model.preprocessor`: the pixels of `model.preprocess` in a process that has no weights."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitrail
from helpers import make, save
from vitrail.demo import demo
from vitrail.errors import CheckpointError, ImageError, InputError

PHOTOS = sorted((Path(vitrail.__file__).parent / "assets/photos").iterdir())

WORKER = """
import pickle, sys
pickled, out, *photos = sys.argv[1:]
preprocessor = pickle.load(open(pickled, "rb"))
pixels = preprocessor(photos), preprocessor(photos, size=(48, 80))
heavy = {"vitrail.runtime", "vitrail.checkpoint.files", "vitrail_kernels", "triton", "tokenizers"}
pickle.dump((pixels, heavy & sys.modules.keys()), open(out, "wb"))
"""


@pytest.fixture(scope="module")
def model() -> vitrail.Model:
    return vitrail.load(demo.bundled(), device="cpu", sixteen_bit="clip")


def test_another_process_gets_the_bits_and_loads_no_backend(
    model: vitrail.Model, tmp_path: Path
) -> None:
    pickled, out = tmp_path / "preprocessor.pickle", tmp_path / "out.pickle"
    pickled.write_bytes(pickle.dumps(model.preprocessor))
    assert pickled.stat().st_size < 2_000
    command = [sys.executable, "-c", WORKER, pickled, out, *PHOTOS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    pixels, heavy = pickle.loads(out.read_bytes())
    assert heavy == set()
    assert torch.equal(pixels[0], model.preprocess(list(PHOTOS)))
    assert torch.equal(pixels[1], model.preprocess(list(PHOTOS), size=(48, 80)))


def test_it_takes_the_options_of_preprocess(model: vitrail.Model) -> None:
    preprocessor = pickle.loads(pickle.dumps(model.preprocessor))
    assert preprocessor == model.preprocessor
    assert preprocessor.sixteen_bit == "clip"
    images = [PHOTOS[0], b"no image", PHOTOS[1]]
    got, wanted = (call(images, on_error="skip") for call in (preprocessor, model.preprocess))
    assert torch.equal(got.pixel_values, wanted.pixel_values)
    assert (got.index, got.errors) == (wanted.index, wanted.errors)
    with pytest.raises(ImageError, match="image 1: image of 8 bytes"):
        preprocessor(images)
    with pytest.raises(InputError, match="on_error: got 'ignore'"):
        preprocessor(images, on_error="ignore")


def test_a_model_without_images_or_processor_says_so(tmp_path: Path) -> None:
    for name in ("CLIPTextModel", "ViTModel"):
        save(make(name), tmp_path / name)
    text, image = (vitrail.load(tmp_path / n, device="cpu") for n in ("CLIPTextModel", "ViTModel"))
    with pytest.raises(InputError, match="CLIPTextModel has no image tower"):
        text.preprocessor  # noqa: B018
    with pytest.raises(CheckpointError, match="needs preprocessor_config"):
        image.preprocessor  # noqa: B018
