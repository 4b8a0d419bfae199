"""int8 linears, packed and run, against fp64 with the same roundings of activations."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.errors import CheckpointError
from vitrail.plan.plan import Step
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.runtime.towers import VisionTower
from vitrail.spec import BlockSpec, ModelSpec
from vitrail.weights.folding import load_weights
from vitrail.weights.layout import Weights, arena_bytes
from weights.test_weights import SPECS, A, B, Tensors, store

VISION_SPECS = {
    **{name: SPECS[name] for name in ("vit", "clip", "dinov2")},
    "one block": dataclasses.replace(
        SPECS["vit"],
        vision=dataclasses.replace(
            SPECS["vit"].vision, blocks=BlockSpec(24, 1, 2, 128, "quick_gelu", 1e-5)
        ),
    ),
}
FALLBACKS = {"all": (), "no down": ("0.down",), "no mlp": ("0.up", "0.down"), "no qkv": ("0.qkv",)}


def with_int8(spec: ModelSpec, fallback: str) -> ModelSpec:
    names = spec.vision.blocks.int8_candidates
    return spec.with_int8(tuple(name for name in names if name not in FALLBACKS[fallback]))


def random_int8_tensors(spec: ModelSpec) -> Tensors:
    """Every canonical tensor. Codes are of all magnitudes, scales and factors differ by row."""
    tensors = {}
    for name, shape in spec.tensor_shapes().items():
        if name.endswith(".codes"):
            tensors[name] = torch.randint(-127, 128, shape, dtype=torch.int8)
        elif name.endswith(".scale"):
            columns = spec.tensor_shapes()[name.replace(".scale", ".codes")][1]
            tensors[name] = (torch.rand(shape) + 0.5) * columns**-0.5 / 70
        elif name.endswith(".smooth"):
            tensors[name] = torch.rand(shape) + 0.5
        else:
            columns = shape[1] if len(shape) > 1 else 10
            offset = 1 if "norm" in name and name.endswith("weight") else 0
            tensors[name] = torch.randn(shape) * columns**-0.5 + offset
    return tensors


def fake_quantized(y: Tensor, *, unsigned: bool = False) -> Tensor:
    """The values of the codes of the last dimension, which shares a scale."""
    if unsigned:
        scale = (y.amax(dim=-1, keepdim=True) + 0.17) / 255
        return ((y + 0.17) / scale).round().clamp(0, 255) * scale - 0.17
    scale = y.abs().amax(dim=-1, keepdim=True) / 127
    return torch.where(scale > 0, (y / scale).round() * scale, 0)


class Simulation(TorchRunner):
    """Runs a plan without int8 in fp64, with the weights and roundings of ``int8``."""

    def __init__(self, spec: BlockSpec, tensors: Tensors, weights: Weights) -> None:
        super().__init__(weights, torch.float32, torch.device("cpu"))
        self.spec, self.tensors = spec, {name: t.double() for name, t in tensors.items()}

    def run_step(self, step: Step, arguments: Mapping[str, Tensor], longest: int) -> None:
        match = re.fullmatch(r"vision\.blocks\.(\d+)\.(qkv|kv|up|down)", step.label)
        linear = match and f"{match[1]}.{match[2]}".replace(".kv", ".qkv")
        if linear not in self.spec.int8:
            super().run_step(step, arguments, longest)
            return
        name, scalars = f"vision.blocks.{linear}", dict(step.scalars)
        weight = self.tensors[f"{name}.codes"] * self.tensors[f"{name}.scale"][:, None]
        bias = self.tensors[f"{name}.{'bias' if match[2] == 'down' else 'folded_bias'}"]
        x = arguments["x"].double()
        if match[2] == "kv":
            weight, bias = weight[self.spec.width :], bias[self.spec.width :]
        if "norm_eps" in scalars:
            normalized = F.layer_norm(x, x.shape[1:], eps=scalars["norm_eps"])
            x = fake_quantized(normalized * self.tensors[f"{name}.smooth"])
        y = x @ weight.t() + bias
        y = self.activate(y, **{k: scalars.get(k) for k in ("activation", "gated")})
        if match[2] == "up" and linear.replace("up", "down") in self.spec.int8:
            y = self.hidden(y, scalars)
        if match[2] == "down":
            y = y * self.tensors.get(f"{name[:-5]}.scale2", 1.0) + arguments["residual"]
        arguments["out"].copy_(y)

    def activate(self, y: Tensor, activation: str | None, gated: bool | None) -> Tensor:
        functions: dict[str | None, Any] = {
            "gelu": F.gelu,
            "silu": F.silu,
            "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
            None: lambda y: y,
        }
        if gated:
            return functions[activation](y[:, 0::2]) * y[:, 1::2]
        return functions[activation](y)

    def hidden(self, y: Tensor, scalars: Mapping[str, Any]) -> Tensor:
        """The hidden layer, padded to whole groups of 128 columns, or 64 if gated."""
        columns = 64 if scalars.get("gated") else 128
        unsigned = not scalars.get("gated") and scalars["activation"] != "silu"
        padded = F.pad(y.half().double(), (0, -y.shape[1] % 128)).view(len(y), -1, columns)
        return fake_quantized(padded, unsigned=unsigned).flatten(1)[:, : y.shape[1]]


def simulation_of(tmp_path: Path, spec: ModelSpec, tensors: Tensors) -> VisionTower:
    """The tower of ``spec`` in fp64, with the roundings of its int8 linears."""
    plain = spec.with_int8(())
    filled = {name: torch.zeros(shape) for name, shape in plain.tensor_shapes().items()}
    filled |= {name: tensors[name] for name in filled if name in tensors}
    weights = load_weights(
        plain, store(tmp_path / "plain.safetensors", filled), torch.float32, (A, B)
    )
    simulation = Simulation(spec.vision.blocks, tensors, weights)
    return VisionTower(plain.vision, plain.head, simulation)


def towers(tmp_path: Path, spec: ModelSpec) -> tuple[VisionTower, VisionTower]:
    """The int8 tower and its simulation. They share every tensor that is not int8."""
    tensors = random_int8_tensors(spec)
    sources = store(tmp_path / "int8.safetensors", tensors)
    runner = TorchRunner(
        load_weights(spec, sources, torch.float32, (A, B)), torch.float32, torch.device("cpu")
    )
    return VisionTower(spec.vision, spec.head, runner), simulation_of(tmp_path, spec, tensors)


@pytest.mark.parametrize("fallback", FALLBACKS)
@pytest.mark.parametrize("name", VISION_SPECS)
def test_an_int8_tower_computes_its_formula(tmp_path: Path, name: str, fallback: str) -> None:
    torch.manual_seed(0)
    spec = VISION_SPECS[name]
    if len(spec.vision.blocks.int8_candidates) == 1 and fallback != "all":
        pytest.skip("a single block has qkv alone")
    int8, simulation = towers(tmp_path, with_int8(spec, fallback))
    pixels = torch.randn(2, 3, *spec.vision.image)
    for outputs, expected in (
        (int8.embeddings(pixels), simulation.embeddings(pixels)),
        (int8.dense(pixels), simulation.dense(pixels)),
    ):
        assert outputs.keys() == expected.keys()
        for output, tensor in outputs.items():
            error, top = (tensor - expected[output]).abs().max(), expected[output].abs().max()
            # a code that rounds the other way costs about 1 / 127 of a product's term
            assert error <= 2e-3 * top, f"{output}: {error} of {top}"


def test_a_tower_without_int8_is_far_from_that(tmp_path: Path) -> None:
    """The bound above tells the roundings from none."""
    torch.manual_seed(0)
    spec = with_int8(SPECS["vit"], "all")
    int8, simulation = towers(tmp_path, spec)
    pixels = torch.randn(2, 3, *spec.vision.image)
    simulation.runner.hidden = lambda y, scalars: y
    rounded, exact = (t.embeddings(pixels)["vision.embedding"] for t in (int8, simulation))
    assert (rounded - exact).abs().max() > 4e-3 * exact.abs().max()


def test_the_arena_is_smaller_in_int8() -> None:
    blocks = BlockSpec(768, 12, 12, 3072, "gelu", 1e-6)
    vision = dataclasses.replace(SPECS["vit"].vision, blocks=blocks)
    plain = ModelSpec("vit", "ViTModel", vision)
    int8 = plain.with_int8(blocks.int8_candidates)
    assert arena_bytes(int8, torch.float16) < 0.62 * arena_bytes(plain, torch.float16)


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("0.up.scale", 0.0, "wanted numbers over 0"),
        ("0.down.scale", -1e-3, "wanted numbers over 0"),
        ("0.qkv.scale", float("nan"), "NaN or infinity"),
        ("0.qkv.scale", 1e-40, "wanted normal numbers"),
        ("0.up.smooth", 0.0, "wanted numbers over 0"),
        ("0.up.smooth", float("inf"), "NaN or infinity"),
        ("0.down.codes", -128, "code -128"),
        ("0.qkv.folded_bias", float("nan"), "NaN or infinity"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, tensor: str, value: float, message: str) -> None:
    spec = with_int8(SPECS["vit"], "all")
    tensors = random_int8_tensors(spec)
    tensors[f"vision.blocks.{tensor}"].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(spec, store(tmp_path / "int8.safetensors", tensors), torch.float32, (A, B))
    assert f"vision.blocks.{tensor}" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("0.down",), "up projection"),
        (("0.up", "0.qkv"), "in order"),
        (("2.up",), "in order"),  # of the last block, qkv alone
        (("7.qkv",), "in order"),
        (("0.out",), "in order"),
    ],
)
def test_a_spec_refuses_linears_that_cannot_be_int8(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        SPECS["vit"].with_int8(names)


def test_a_text_tower_is_never_int8() -> None:
    assert SPECS["clip"].text.blocks.int8_candidates == ()
    with pytest.raises(CheckpointError, match="in order"):
        dataclasses.replace(SPECS["clip"].text.blocks, int8=("0.qkv",))


def test_a_spec_with_int8_goes_through_json_and_back() -> None:
    spec = with_int8(SPECS["clip"], "no down")
    assert ModelSpec.from_dict(spec.to_dict()) == spec
    assert spec.parameters == SPECS["clip"].parameters
    assert "int8" not in SPECS["clip"].to_dict()["vision"]["blocks"]
