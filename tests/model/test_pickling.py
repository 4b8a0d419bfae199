"""Pickles and copies of models, modules, results, errors and specs."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vitrail
from helpers import make, save
from vitrail import errors
from vitrail.demo import demo
from vitrail.errors import CheckpointError, InputError
from vitrail.jobs.manifest import Embeddings
from vitrail.model import loading
from vitrail.model.loading import read_model
from vitrail.runtime.torch_runner import TorchRunner

PHOTOS = sorted((Path(vitrail.__file__).parent / "assets/photos").iterdir())


@pytest.fixture(scope="module")
def model() -> vitrail.Model:
    return vitrail.load(demo.bundled(), device="cpu", sixteen_bit="clip")


def _again(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def test_a_model_is_pickled_without_weights_and_keeps_its_options(model: vitrail.Model) -> None:
    content = pickle.dumps(model)
    assert len(content) < 2_000
    again = pickle.loads(content)
    assert again is not model
    assert (again.load_arguments, again.fingerprint) == (model.load_arguments, model.fingerprint)
    assert torch.equal(again.encode_image(PHOTOS), model.encode_image(PHOTOS))


def test_replicas_are_pickled_with_their_devices() -> None:
    replicas = vitrail.load_replicas(demo.bundled(), devices=["cpu", "cpu"])
    again = _again(replicas)
    assert again.devices == replicas.devices
    assert again.models[0]._runner.weights is again.models[1]._runner.weights
    assert torch.equal(again.encode_image(PHOTOS), replicas.encode_image(PHOTOS))
    assert copy.deepcopy(replicas) is copy.copy(replicas) is replicas


def test_a_copy_of_a_model_is_the_model(model: vitrail.Model) -> None:
    assert copy.copy(model) is model
    assert copy.deepcopy({"model": [model]})["model"][0] is model


def test_a_pickle_of_changed_files_says_which_part_differs(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(demo.bundled(), folder)
    model = vitrail.load(folder, device="cpu")
    content, path = pickle.dumps(model), folder / "tokenizer_config.json"
    stored = path.read_bytes()
    path.write_bytes(stored.replace(b'"pad_token": "', b'"pad_token": "!'))
    assert path.read_bytes() != stored
    with pytest.raises(CheckpointError, match=r"differ: tokenizer \(got"):
        pickle.loads(content)
    path.write_bytes(stored.replace(b"{", b'{"transformers_version": "9", ', 1))
    assert pickle.loads(content).fingerprint == model.fingerprint
    path.write_bytes(stored)
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(CheckpointError) as caught:
        pickle.loads(content)
    assert model.fingerprint in str(caught.value)
    assert vitrail.load(folder, device="cpu").fingerprint in str(caught.value)
    assert "differ: tokenizer (got" in str(caught.value)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"is loaded again: .*got no such folder or file"):
        pickle.loads(content)


def test_a_tokenizer_that_changed_since_loading_is_refused(tmp_path: Path) -> None:
    shutil.copytree(demo.bundled(), tmp_path / "clip")
    model, path = vitrail.load(tmp_path / "clip", device="cpu"), tmp_path / "clip/tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    for use in (lambda: model.tokenize("a cat"), lambda: pickle.dumps(model)):
        with pytest.raises(
            CheckpointError, match=r"tokenizer\.json: was changed or replaced since"
        ):
            use()


def test_a_pickle_of_another_version_is_refused_by_its_version(
    model: vitrail.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, (arguments, content) = model.__reduce__()
    arguments = arguments | {"sharding": 3}
    with pytest.raises(CheckpointError, match=f"pickled by Vitrail {vitrail.__version__}"):
        load(arguments, content)
    monkeypatch.setattr(TorchRunner, "version", "99.0")
    with pytest.raises(CheckpointError, match=r"differ: version \(got 99\.0, wanted "):
        _again(model)


def test_a_pickle_for_a_missing_device_says_that_it_is_loaded_again(model: vitrail.Model) -> None:
    load, (arguments, content) = model.__reduce__()
    with pytest.raises(
        InputError, match=r"pickled model of .* is loaded again: device: got 'cuda:99"
    ):
        load(arguments | {"device": "cuda:99"}, content)


def test_a_model_made_from_parts_says_why_it_does_not_pickle(tmp_path: Path) -> None:
    save(make("ViTModel"), tmp_path)
    loaded = read_model(tmp_path, torch.float32)
    runner = TorchRunner(loaded.weights, torch.float32, torch.device("cpu"))
    model = vitrail.Model(loaded.checkpoint, loaded.spec, loaded.hash_weights, runner)
    for value in (model, model.as_module("image")):
        with pytest.raises(InputError, match="made from parts, wanted one from vitrail"):
            pickle.dumps(value)
    assert copy.deepcopy(model) is model


def test_modules_are_pickled_with_what_was_set_on_them(model: vitrail.Model) -> None:
    values = torch.randn(2, 3, 64, 64)
    image = model.as_module("image").eval()
    holder = nn.Sequential(image, nn.Linear(128, 3))
    buffer = io.BytesIO()
    torch.save(holder, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(values), holder(values))
    assert not again[0].training
    assert list(image.state_dict()) == []
    assert list(holder.state_dict()) == ["1.weight", "1.bias"]


def test_modules_of_a_pickle_share_the_weights_of_the_process(
    model: vitrail.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, text = model.as_module("image"), model.as_module("text")
    content = pickle.dumps([image, text])
    loads = []
    monkeypatch.setattr(loading, "read_model", lambda *_, **__: loads.append(1))
    again = pickle.loads(content)
    assert again[0].towers is again[1].towers is model.towers
    deep = copy.deepcopy(nn.ModuleList([image, text]))
    assert deep[0] is not image
    assert deep[0].towers is deep[1].towers is model.towers
    assert torch.equal(deep[1](model.tokenize("a cat")), text(model.tokenize("a cat")))
    assert not loads


def test_results_are_pickled(model: vitrail.Model) -> None:
    images = [PHOTOS[0], b"no image"]
    results = [
        model.encode_image(images, on_error="skip"),
        model.preprocess(images, on_error="skip"),
        model.classify(images, ["a cat", "a dog"], on_error="skip"),
        model.forward(model.preprocess(PHOTOS[:1]), model.tokenize("a cat")),
    ]
    for result in results:
        _assert_equal(_again(result), result)
        _assert_equal(copy.deepcopy(result), result)
    rows = np.eye(2, dtype=np.float16)
    embeddings = Embeddings(paths=["a", "b"], embeddings=rows, errors=[("c", "no")], job={"x": 1})
    assert _again(embeddings).paths == ["a", "b"]
    assert np.array_equal(_again(embeddings).embeddings, rows)


def _assert_equal(got: Any, wanted: Any) -> None:
    assert type(got) is type(wanted)
    for field in dataclasses.fields(wanted):
        a, b = getattr(got, field.name), getattr(wanted, field.name)
        if isinstance(b, torch.Tensor):
            assert torch.equal(a, b), field.name
        elif dataclasses.is_dataclass(b):
            _assert_equal(a, b)
        else:
            assert a == b, field.name


def test_specs_are_pickled(model: vitrail.Model) -> None:
    assert _again(model.spec) == model.spec
    assert _again(model.load_arguments) == model.load_arguments
    assert copy.deepcopy(model.spec) == model.spec


def test_errors_are_pickled() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    public = [value for value in classes if issubclass(value, errors.VitrailError)]
    assert len(public) >= 6
    for error_class in public:
        again = _again(error_class("got x, wanted y"))
        assert (type(again), str(again)) == (error_class, "got x, wanted y")


def test_an_error_of_the_driver_is_pickled_with_its_code(libcuda: Any) -> None:
    from vitrail import _C

    gpu = _C.Gpu(str(libcuda.path), 0)
    with pytest.raises(_C.DriverError) as caught:
        _C.Gpu(str(libcuda.path), 99)
    again = _again(caught.value)
    assert type(again) is _C.DriverError
    assert (str(again), again.code) == (str(caught.value), caught.value.code)
    del gpu
