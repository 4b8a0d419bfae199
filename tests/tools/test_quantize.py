"""`vitrail quantize` as a function: from a checkpoint to a folder that loads, or to a refusal."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import BitImageProcessorPil, ViTImageProcessorPil

import vitrail
from helpers import make, save
from vitrail.checkpoint.contents import INT8, INT8_WEIGHTS
from vitrail.checkpoint.files import open_checkpoint
from vitrail.demo.demo import bundled
from vitrail.demo.scenes import render, sample
from vitrail.errors import CheckpointError, InputError
from vitrail.int8.blocks import quantize_block
from vitrail.int8.calibration import Calibration, Moments
from vitrail.int8.guard import NOT_VERIFIED
from vitrail.int8.recipe import LAST_BLOCK, Recipe
from vitrail.int8.record import read_record
from vitrail.tools import quantize
from vitrail.tools.quantize import quantize_model

pytestmark = pytest.mark.usefixtures("one_thread")
LINEARS = {f"{layer}.{name}" for layer in range(3) for name in ("qkv", "up", "down")} | {"3.qkv"}
"""The linears of the bundled CLIP that may be int8."""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """130 pictures of the kind that the bundled CLIP was trained on."""
    folder, dice = tmp_path_factory.mktemp("scenes"), Random("quantize")
    for number in range(130):
        render(sample(dice), 64).save(folder / f"{number:03}.png")
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, scenes: list[str]) -> Path:
    """The bundled CLIP, quantized with 64 scenes and checked on 64 others."""
    out = tmp_path_factory.mktemp("quantized") / "clip-int8"
    with_one_thread = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert quantize_model(bundled(), out, scenes).guard.verdict == "good"
    finally:
        torch.set_num_threads(with_one_thread)
    return out


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _small(folder: Path, architecture: str, **config: Any) -> Path:
    """A small model of transformers with random weights."""
    model = make(architecture, **config)
    save(model, folder)
    if "Dinov2" in architecture:
        BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    else:
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


# -- a result --------------------------------------------------------------------------------------


def test_the_folder_serves_and_is_like_the_model(folder: Path, scenes: list[str]) -> None:
    model, reference = vitrail.load(folder), vitrail.load(bundled())
    assert model.spec.vision.blocks.int8
    ours, expected = model.encode_image(scenes[:32]), reference.encode_image(scenes[:32])
    assert torch.nn.functional.cosine_similarity(ours, expected).min() > 0.9997
    assert not torch.equal(ours, expected)
    assert torch.equal(model.encode_text(["a red star"]), reference.encode_text(["a red star"]))


def test_the_files_and_the_record(folder: Path) -> None:
    small = {path.name for path in bundled().iterdir()} - {"model.safetensors", "training.json"}
    assert {path.name for path in folder.iterdir()} == small | {INT8, INT8_WEIGHTS}
    record = read_record(open_checkpoint(folder))
    assert {*record.spec.vision.blocks.int8} == LINEARS
    assert record.float_linears == {"3.up": LAST_BLOCK, "3.down": LAST_BLOCK}
    assert record.recipe == Recipe()
    assert (record.calibration.pictures, record.calibration.origin) == (64, "own")
    assert record.guard.accuracy.pictures == 64
    assert (record.source.name, record.source.revision) == ("clip", None)
    assert (
        record.source.weights
        == vitrail.model.loading.read_model(bundled(), torch.float32).hash_weights()
    )


def test_codes_and_scales_are_within_their_ranges(folder: Path) -> None:
    for name, tensor in load_file(folder / INT8_WEIGHTS).items():
        if name.endswith(".codes"):
            assert tensor.dtype == torch.int8
            assert int(tensor.min()) >= -127
        elif name.endswith((".scale", ".smooth")):
            assert torch.isfinite(tensor).all()
            assert (tensor > 0).all()


def test_the_same_inputs_give_the_same_bytes(
    folder: Path, scenes: list[str], tmp_path: Path
) -> None:
    quantize_model(bundled(), tmp_path / "again", scenes)
    assert _files(tmp_path / "again") == _files(folder)


def test_without_images_nothing_is_verified(tmp_path: Path) -> None:
    summary = quantize_model(bundled(), tmp_path / "out")
    assert summary.guard.verdict == NOT_VERIFIED
    record = read_record(open_checkpoint(tmp_path / "out"))
    assert (record.calibration.pictures, record.calibration.origin) == (36, "bundled")
    assert summary.guard.accuracy.pictures == 64
    assert summary.guard.accuracy.sqnr > 44
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_rounding_to_the_nearest_code_is_less_accurate(tmp_path: Path) -> None:
    by_gptq = quantize_model(bundled(), tmp_path / "gptq")
    nearest = quantize_model(bundled(), tmp_path / "nearest", rounding="nearest")
    assert nearest.guard.accuracy.sqnr < by_gptq.guard.accuracy.sqnr - 1
    assert read_record(open_checkpoint(tmp_path / "nearest")).recipe.rounding == "nearest"


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("ViTForImageClassification", {}),
        ("ViTModel", {"qkv_bias": False, "hidden_act": "gelu_pytorch_tanh"}),
        ("DeiTForImageClassificationWithTeacher", {}),
        ("CLIPVisionModelWithProjection", {}),
        ("Dinov2Model", {"use_swiglu_ffn": True}),
        ("Dinov2WithRegistersForImageClassification", {"num_hidden_layers": 1}),
    ],
)
def test_every_family(architecture: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Small networks with random weights are less accurate than trained ones, and are refused by
    the guard for that at most."""
    source = _small(tmp_path / "source", architecture, hidden_size=64, **config)
    summary = quantize_model(source, tmp_path / "out", check=16)
    exact = summary.guard.integrity
    assert (exact.wrong_sums, exact.bad_scales) == (0, 0)
    assert summary.guard.accuracy.cosine_mean > 0.99
    assert min(figures.sqnr for figures in summary.guard.linears.values()) > 25
    if summary.guard.verdict == NOT_VERIFIED:
        with pytest.warns(UserWarning, match="not verified on your data"):
            model = vitrail.load(tmp_path / "out")
        assert model.spec == summary.spec
        photo = Image.new("RGB", (40, 40), "red")
        expected = vitrail.load(source).encode_image(photo)
        assert torch.nn.functional.cosine_similarity(model.encode_image(photo), expected) > 0.98


def test_linears_that_a_user_keeps(tmp_path: Path) -> None:
    summary = quantize_model(bundled(), tmp_path / "out", keep_fp16=["0.*", "*.up"], check=16)
    assert {*summary.spec.vision.blocks.int8} == {"1.qkv", "2.qkv", "3.qkv"}
    record = read_record(open_checkpoint(tmp_path / "out"))
    assert record.float_linears["0.down"] == "--keep-fp16 0.*"
    stored = load_file(tmp_path / "out" / INT8_WEIGHTS)
    source = load_file(bundled() / "model.safetensors")
    for tensor in ("weight", "bias"):
        expected = source[f"vision_model.encoder.layers.1.mlp.fc1.{tensor}"]
        assert torch.equal(stored[f"vision.blocks.1.up.{tensor}"], expected)
    assert summary.guard.accuracy.sqnr > 45
    with pytest.warns(UserWarning, match="not verified on your data"):
        model = vitrail.load(tmp_path / "out")
    _assert_alike(model, Image.new("RGB", (99, 99), "green"))


def _assert_alike(model: vitrail.Model, picture: Any) -> None:
    """The embedding of ``picture`` is that of the bundled CLIP, but for the error of int8."""
    ours, expected = (x.encode_image(picture) for x in (model, vitrail.load(bundled())))
    assert torch.nn.functional.cosine_similarity(ours, expected) > 0.9999


# -- the guard -------------------------------------------------------------------------------------


def test_a_wrong_scale_is_refused_and_nothing_is_written(
    tmp_path: Path, scenes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(*arguments: Any) -> dict[str, Tensor]:
        tensors = quantize_block(*arguments)
        return {name: t * 1.03 if name.endswith("0.up.scale") else t for name, t in tensors.items()}

    monkeypatch.setattr(quantize, "quantize_block", off)
    summary = quantize_model(bundled(), tmp_path / "out", scenes)
    assert (summary.guard.verdict, summary.bytes) == ("refused", 0)
    assert "0.up: gain" in summary.guard.reasons[0]
    assert list(tmp_path.iterdir()) == []
    assert dict(summary.lines())["written"].startswith("nothing")


def test_a_linear_of_low_accuracy_falls_back(
    tmp_path: Path, scenes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One linear has the codes -100, 0 and 100 alone."""

    def coarse(*arguments: Any) -> dict[str, Tensor]:
        tensors = quantize_block(*arguments)
        for name in tensors:
            if name.endswith("1.up.codes"):
                tensors[name] = ((tensors[name] / 100).round() * 100).to(torch.int8)
        return tensors

    monkeypatch.setattr(quantize, "quantize_block", coarse)
    monkeypatch.setattr("vitrail.int8.guard.LAYER_GAIN", 1.0)
    monkeypatch.setattr("vitrail.int8.guard.CHANNEL_GAIN", 100.0)
    summary = quantize_model(bundled(), tmp_path / "out", scenes)
    assert summary.guard.verdict == "good"
    assert summary.guard.fallbacks.keys() == {"1.up", "1.down"}
    assert summary.guard.int8 == tuple(
        x for x in summary.spec.vision.blocks.int8_candidates if x not in ("1.up", "1.down")
    )
    record = read_record(open_checkpoint(tmp_path / "out"))
    assert record.float_linears["1.up"].startswith("guard: ")
    assert "vision.blocks.1.up.weight" in load_file(tmp_path / "out" / INT8_WEIGHTS)
    _assert_alike(vitrail.load(tmp_path / "out"), scenes[0])


def test_more_than_the_model_reaches_is_a_warning(tmp_path: Path, scenes: list[str]) -> None:
    summary = quantize_model(bundled(), tmp_path / "out", scenes, min_centered=1.0)
    assert summary.guard.verdict == "warned"
    assert summary.bytes > 0


# -- interruptions ---------------------------------------------------------------------------------


@contextmanager
def _interrupted(_: int) -> Iterator[Callable[[int], None]]:
    def tell(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    yield tell


def test_an_interrupted_run_goes_on(
    folder: Path, scenes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, computed = tmp_path / "out", list[int]()

    def counted(weights: Any, layer: int, *arguments: Any) -> Mapping[str, Tensor]:
        computed.append(layer)
        return quantize_block(weights, layer, *arguments)

    monkeypatch.setattr(quantize, "quantize_block", counted)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(bundled(), out, scenes, progress=_interrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    quantize_model(bundled(), out, scenes)
    assert computed == [0, 1, 2, 3]
    assert _files(out) == _files(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_recipe_begins_again(
    scenes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = list[int]()

    def counted(weights: Any, layer: int, *arguments: Any) -> Mapping[str, Tensor]:
        computed.append(layer)
        return quantize_block(weights, layer, *arguments)

    monkeypatch.setattr(quantize, "quantize_block", counted)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(bundled(), tmp_path / "out", scenes, progress=_interrupted)
    quantize_model(bundled(), tmp_path / "out", scenes, alpha=0.5)
    assert computed == [0, 1, 0, 1, 2, 3]


def test_the_moments_of_a_block_are_freed_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hessians of a block are the memory that quantizing takes besides the model."""
    alive, advance = weakref.WeakSet[Moments](), Calibration.advance

    def counted(*arguments: Any, **options: Any) -> dict[str, Moments]:
        assert not alive
        moments = advance(*arguments, **options)
        alive.update(moments.values())
        return moments

    monkeypatch.setattr(Calibration, "advance", counted)
    quantize_model(bundled(), tmp_path / "out", calibration=2, check=2)


# -- refusals --------------------------------------------------------------------------------------


def test_int8_weights_are_not_quantized_again(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"got int8 weights, wanted the checkpoint"):
        quantize_model(folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_text_tower_stays_in_16_bits(tmp_path: Path) -> None:
    save(make("CLIPTextModel"), tmp_path / "text")
    with pytest.raises(CheckpointError, match=r"got CLIPTextModel, wanted a model with an image"):
        quantize_model(tmp_path / "text", tmp_path / "out")


def test_an_exported_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vitrail.json").write_text("{}")
    with pytest.raises(CheckpointError, match="got an exported folder, wanted the checkpoint"):
        quantize_model(tmp_path, tmp_path / "out")


def test_a_checkpoint_without_a_processor_is_refused(tmp_path: Path) -> None:
    save(make("ViTModel"), tmp_path / "vit")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json.*pictures calibrate"):
        quantize_model(tmp_path / "vit", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 2.0}, "alpha: got 2.0"),
        ({"rounding": "odd"}, "rounding: got 'odd'"),
        ({"keep_fp16": ["9.*"]}, r"'9\.\*', which matches no linear"),
        ({"keep_fp16": ["*"]}, "wanted linears left for int8"),
        ({"calibration": 0}, "calibration: got 0, wanted at least 1"),
        ({"check": 1}, "check: got 1, wanted at least 2"),
        ({"device": "tpu"}, "device: got 'tpu'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        quantize_model(bundled(), tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_too_few_images(tmp_path: Path, scenes: list[str]) -> None:
    with pytest.raises(InputError, match=r"got 100 different ones; wanted 64 to calibrate with"):
        quantize_model(bundled(), tmp_path / "out", scenes[:100])
    summary = quantize_model(bundled(), tmp_path / "out", scenes[:100], calibration=0)
    assert summary.guard.verdict == "good"
    assert summary.pictures.origin == "bundled"


def test_few_checked_images_verify_nothing(tmp_path: Path, scenes: list[str]) -> None:
    summary = quantize_model(bundled(), tmp_path / "out", scenes, calibration=8, check=20)
    assert summary.guard.verdict == NOT_VERIFIED
    assert "20 pictures, wanted at least 64" in summary.guard.reasons[0]


def test_an_old_result_is_replaced_on_request(folder: Path, tmp_path: Path) -> None:
    out = shutil.copytree(folder, tmp_path / "out")
    with pytest.raises(InputError, match="wanted --overwrite"):
        quantize_model(bundled(), out)
    quantize_model(bundled(), out, check=8, overwrite=True)
    assert json.loads((out / INT8).read_text())["calibration"]["origin"] == "bundled"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(InputError):
            quantize_model(bundled(), tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


# -- the report ------------------------------------------------------------------------------------


def test_the_report_in_words_and_as_json(tmp_path: Path) -> None:
    summary = quantize_model(bundled(), tmp_path / "out", check=8)
    lines = list(summary.lines())
    topics = dict(lines)
    assert topics["int8"] == "10 of 12 qkv, up and down projections"
    assert topics["calibration"] == "36 crops of the sample photos"
    assert topics["verdict"].startswith(NOT_VERIFIED)
    assert (
        "an estimate" in topics["speed"]
        or "estimate" in lines[[t for t, _ in lines].index("speed")][1]
    )
    assert f"{tmp_path / 'out'}: 1.8 MB, from 2.3 MB" in topics["written"]
    verify = f"vitrail verify PICTURES --model {tmp_path / 'out'} --against {bundled()}"
    assert topics["next"].endswith(verify)
    facts = json.loads(json.dumps(summary.to_dict()))
    assert facts["guard"] == summary.guard.to_dict()
    assert facts["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
