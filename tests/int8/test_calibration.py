"""Calibration, block by block, against the activations of transformers' modules."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitImageProcessorPil, ViTImageProcessorPil

from helpers import make, outputs, save
from vitrail.errors import InputError, VitrailError
from vitrail.image.normalize import normalize
from vitrail.int8 import calibration
from vitrail.int8.blocks import quantize_block
from vitrail.int8.calibration import Calibration, Moments, batched
from vitrail.int8.recipe import Recipe
from vitrail.model.loading import LoadedCheckpoint, read_model

pytestmark = pytest.mark.usefixtures("one_thread")
LINEARS = ("qkv", "up", "down")


def _folder(folder: Path, architecture: str, **config: Any) -> tuple[nn.Module, LoadedCheckpoint]:
    """A small model by transformers, and as Vitrail reads it."""
    model = save(make(architecture, **config), folder)
    if architecture.startswith("Dinov2"):
        BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    else:
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model, read_model(folder, torch.float32)


def _images(count: int, side: int = 32) -> list[Tensor]:
    return list(torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8))


def _inputs(model: Any, loaded: LoadedCheckpoint, images: list[Tensor]) -> dict[str, list[Tensor]]:
    """The input rows of every linear and every LayerNorm, by the name of the module."""
    seen = defaultdict(list)

    def keep(name: str) -> Any:
        return lambda _, inputs, __: seen[name].append(inputs[0].flatten(0, 1))

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm | nn.Linear)
    ]
    pixels = torch.from_numpy(normalize(torch.stack(images).numpy(), loaded.spec.image))
    outputs(model, {"pixel_values": pixels})
    for hook in hooks:
        hook.remove()
    return {f".{name}": torch.cat(rows) for name, rows in seen.items()}


def _normalized(x: Tensor, eps: float) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[1:], eps=eps)


def _assert_near(hessian: Tensor | None, expected: Tensor | None) -> None:
    """Sums of products in fp32: within 1e-5 of the largest."""
    assert hessian is not None
    assert expected is not None
    top = float(expected.abs().max())
    torch.testing.assert_close(hessian, expected, rtol=0, atol=1e-5 * top)


@pytest.mark.parametrize(
    ("architecture", "config", "modules"),
    [
        ("ViTModel", {}, ("layernorm_before", "layernorm_after", "mlp.fc2")),
        ("Dinov2Model", {}, ("norm1", "norm2", "mlp.fc2")),
        ("Dinov2Model", {"use_swiglu_ffn": True}, ("norm1", "norm2", "mlp.down_proj")),
    ],
)
def test_the_inputs_are_those_of_the_modules(
    architecture: str, config: dict[str, Any], modules: tuple[str, ...], tmp_path: Path
) -> None:
    model, loaded = _folder(tmp_path, architecture, **config)
    vision = loaded.spec.vision
    images = _images(5)
    seen = _inputs(model, loaded, images)
    calibrated = Calibration(vision, loaded.weights, images)
    assert calibrated.tokens == 5 * 17
    for layer in range(2):
        moments = calibrated.advance(LINEARS)
        assert tuple(moments) == LINEARS
        for linear, module in zip(LINEARS, modules, strict=True):
            (name,) = (x for x in seen if x.endswith(f".{layer}.{module}"))
            x = seen[name]
            if linear != "down":
                x = _normalized(x, vision.blocks.eps)
            torch.testing.assert_close(moments[linear].top, x.abs().amax(dim=0))
            hessian = x.double().t() @ x.double()
            _assert_near(moments[linear].hessian, hessian)


def test_moments_do_not_depend_on_the_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, loaded = _folder(tmp_path, "ViTModel")
    images = _images(6)
    whole = Calibration(loaded.spec.vision, loaded.weights, images)
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 30)
    single = Calibration(loaded.spec.vision, loaded.weights, images)
    for _ in range(2):
        first, second = whole.advance(LINEARS), single.advance(LINEARS)
        for linear in LINEARS:
            torch.testing.assert_close(first[linear].top, second[linear].top)
            _assert_near(first[linear].hessian, second[linear].hessian)


def test_images_of_several_sizes(tmp_path: Path) -> None:
    _, loaded = _folder(tmp_path, "ViTModel")
    images = [*_images(2), *_images(1, 48), *_images(1)]
    calibrated = Calibration(loaded.spec.vision, loaded.weights, images)
    assert calibrated.tokens == 3 * 17 + 37
    assert calibrated.advance(["up"])["up"].hessian is not None


def test_only_the_named_linears_are_measured(tmp_path: Path) -> None:
    _, loaded = _folder(tmp_path, "ViTModel")
    calibrated = Calibration(loaded.spec.vision, loaded.weights, _images(2))
    assert calibrated.advance() == {}
    assert calibrated.advance(["qkv"], hessian=False)["qkv"].hessian is None


def test_no_images_are_an_error(tmp_path: Path) -> None:
    _, loaded = _folder(tmp_path, "ViTModel")
    with pytest.raises(InputError, match="no images"):
        Calibration(loaded.spec.vision, loaded.weights, [])


def test_batches_have_one_size_and_all_images_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, loaded = _folder(tmp_path, "ViTModel")
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 34)  # two images of 17 tokens
    images = [*_images(5), *_images(1, 40)]
    batches = list(batched(loaded.spec.vision, images))
    assert [batch.shape[:2] for batch in batches] == [(2, 32), (2, 32), (1, 32), (1, 40)]
    singles = [image for batch in batches for image in batch]
    assert all(torch.equal(a, b) for a, b in zip(singles, images, strict=True))


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
@pytest.mark.parametrize("config", [{}, {"use_swiglu_ffn": True}])
def test_codes_stand_for_the_folded_weight(
    rounding: str, config: dict[str, Any], tmp_path: Path
) -> None:
    _, loaded = _folder(tmp_path, "Dinov2Model", **config)
    calibrated = Calibration(loaded.spec.vision, loaded.weights, _images(40))
    moments = calibrated.advance(LINEARS, hessian=rounding == "gptq")
    tensors = quantize_block(loaded.weights, 0, moments, Recipe(rounding=rounding))
    blocks = loaded.spec.vision.blocks
    shapes = loaded.spec.with_int8(blocks.int8_candidates).tensor_shapes()
    stored = [name for name in shapes if name.rpartition(".")[2] in ("codes", "scale", "smooth")]
    stored += ["vision.blocks.0.qkv.folded_bias", "vision.blocks.0.up.folded_bias"]
    stored = [name for name in stored if name.startswith("vision.blocks.0.")]
    assert {name: tuple(tensors[name].shape) for name in stored} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    for linear in LINEARS:
        name = f"vision.blocks.0.{linear}"
        smooth = tensors.get(f"{name}.smooth", torch.ones(())).double()
        scale = tensors[f"{name}.scale"].double()[:, None]
        weight = loaded.weights[f"{name}.weight"].double() / smooth
        difference = (tensors[f"{name}.codes"].double() * scale - weight).abs() / scale
        if rounding == "nearest":
            assert difference.max() <= 0.500001
        else:
            assert 0.5 < difference.max() < 20
        if linear != "down":
            assert torch.equal(tensors[f"{name}.folded_bias"], loaded.weights[f"{name}.bias"])


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_inputs_that_are_not_finite_are_an_error(rounding: str, tmp_path: Path) -> None:
    _, loaded = _folder(tmp_path, "ViTModel")
    loaded.weights["vision.blocks.0.up.bias"][3] = torch.inf
    calibrated = Calibration(loaded.spec.vision, loaded.weights, _images(2))
    moments = calibrated.advance(["down"], hessian=rounding == "gptq")
    with pytest.raises(VitrailError, match=r"blocks\.0\.down: got inputs that are not finite"):
        quantize_block(loaded.weights, 0, moments, Recipe(rounding=rounding))


def test_moments_add_up() -> None:
    x = torch.randn(30, 8)
    once, twice = Moments(8, hessian=True), Moments(8, hessian=True)
    once.add(x)
    twice.add(x[:10])
    twice.add(x[10:])
    assert torch.equal(once.top, twice.top)
    _assert_near(once.hessian, twice.hessian)
