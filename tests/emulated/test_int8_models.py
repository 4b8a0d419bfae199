"""Tiny int8 models as compiled kernels, launched by the C++ executor and from Python: beside the
same network in fp64, in many schedules, in any batch, and with an image that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emulated.device import Device, EmulatedRunner
from emulated.test_batches import MOST, Sizes, parts_that_differ
from emulated.tiny import Outputs, Tiny
from helpers import assert_close
from kernels.test_operators import same_bits
from runtime.test_runner import HEADS, VISION, images
from vitrail.runtime import native
from vitrail.runtime.runner import Runner
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.runtime.towers import VisionTower
from vitrail.runtime.triton import TritonRunner
from vitrail.spec import ModelSpec
from vitrail.tools.workload import problems
from vitrail.weights.folding import load_weights
from vitrail_kernels.configs import KernelConfig, in_force
from weights.test_int8_weights import FALLBACKS, A, B, random_int8_tensors, simulation_of, store

pytestmark = pytest.mark.usefixtures("emulated_kernels")

HALF, CPU = torch.float16, torch.device("cpu")
BATCH = 32
FEW, MANY = (0, 1, 2), tuple(range(20))
FAMILIES = ("vit", "deit", "clip", "dinov2", "one layer")


def spec_of(family: str, fallback: str = "all") -> ModelSpec:
    """With every linear in int8 that may be, but for those of `FALLBACKS`."""
    spec = ModelSpec("vit", "test", VISION[family], None, HEADS.get(family))
    assert spec.vision is not None
    names = spec.vision.blocks.int8_candidates
    return spec.with_int8(tuple(name for name in names if name not in FALLBACKS[fallback]))


@dataclass
class Int8Model(Tiny):
    """With its spec, the same network in fp64 with the roundings of codes, and the torch runner."""

    spec: ModelSpec
    exact: VisionTower
    torch: TorchRunner

    def tower(self, runner: Runner | None = None) -> VisionTower:
        assert self.spec.vision is not None
        return VisionTower(self.spec.vision, self.spec.head, runner or self.runner)


Open = Callable[..., Int8Model]


@pytest.fixture
def int8(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    monkeypatch.setenv(native.OVERLAP, "1")
    opened: list[EmulatedRunner] = []

    def open_int8(family: str, fallback: str = "all") -> Int8Model:
        torch.manual_seed(0)
        spec = spec_of(family, fallback)
        tensors = random_int8_tensors(spec)
        weights = load_weights(spec, store(tmp_path / "int8.safetensors", tensors), HALF, (A, B))
        exact = simulation_of(tmp_path, spec, tensors)
        opened.append(EmulatedRunner(device, weights, HALF))
        reference = TorchRunner(weights, HALF, CPU)
        return Int8Model(tensors, opened[-1], device, HALF, spec, exact, reference)

    yield open_int8
    for runner in opened:
        runner.close()


def outputs_of(tower: VisionTower, pixels: Tensor) -> Outputs:
    """The outputs of the pooled and of the dense plan, with every tap."""
    taps = tuple(range(tower.spec.blocks.layers + 1))
    dense = {f"dense {name}": t for name, t in tower.dense(pixels, taps).items()}
    return tower.embeddings(pixels) | dense


def check(ours: Outputs, exact: Outputs, reference: Outputs) -> None:
    """As near to the exact network as the torch runner is, in every output. Where the stream of 16
    bits rounds, some codes differ: cosines tell about int8 then, not about kernels."""
    assert ours.keys() == exact.keys() == reference.keys()
    for name, tensor in ours.items():
        if name.endswith("status"):
            assert not tensor.any()
            continue
        peer = reference[name].to(HALF)
        assert_close(tensor, exact[name], peer, what="scores", name=name)


SEEDS = [pytest.param(FEW, id="3 seeds"), pytest.param(MANY, id="20 seeds", marks=pytest.mark.slow)]


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_int8_model_is_the_exact_network(int8: Open, family: str, seeds: Sequence[int]) -> None:
    model = int8(family)
    pixels = images(BATCH, model.spec.vision.image)
    ours = model.outputs(seeds, lambda: outputs_of(model.tower(), pixels))
    check(ours, outputs_of(model.exact, pixels), outputs_of(model.tower(model.torch), pixels))


@pytest.mark.parametrize("fallback", [name for name in FALLBACKS if name != "all"])
def test_a_model_whose_linears_are_partly_int8_is_the_exact_network(
    int8: Open, fallback: str
) -> None:
    model = int8("vit", fallback)
    pixels = images(BATCH, model.spec.vision.image)
    ours = outputs_of(model.tower(), pixels)
    check(ours, outputs_of(model.exact, pixels), outputs_of(model.tower(model.torch), pixels))


# -- the same bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_python_launches_what_the_executor_does(
    int8: Open, python_seed: list[int], family: str
) -> None:
    model = int8(family)
    pixels = images(3, model.spec.vision.image)
    executor = outputs_of(model.tower(), pixels)
    runner = TritonRunner(model.runner.weights, HALF, CPU)
    for python_seed[0] in range(3):
        ours = outputs_of(model.tower(runner), pixels)
        assert ours.keys() == executor.keys()
        assert all(same_bits(ours[name], executor[name]) for name in ours), python_seed


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_has_the_same_bits_in_any_batch(int8: Open, family: str) -> None:
    model = int8(family)
    pixels = images(MOST, model.spec.vision.image)

    def run(first: int, last: int) -> Outputs:
        return outputs_of(model.tower(), pixels[first:last].contiguous())

    assert parts_that_differ(run(0, MOST), run) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tuned_table_changes_no_bit(int8: Open, device: Device, family: str) -> None:
    """Of every key that the model asks for, the table has the tile of the largest batch."""
    model, table = int8(family), dict[str, KernelConfig]()
    sizes = Sizes(family)
    sizes.vision = model.spec.vision
    for problem in problems(sizes, [3], "float16"):  # type: ignore[arg-type]
        for call in problem.calls(device.target, {}):
            table[call.key] = call.ladder()[-1][1] if call.ladder else call.config
    assert any(key.startswith("linear_int8|") for key in table)
    pixels, results, shapes = images(3, model.spec.vision.image), [], []
    model.runner.close()
    for forced in ({}, table):
        runner = EmulatedRunner(device, model.runner.weights, HALF)
        device.driver.record(True)
        with in_force(forced):
            results.append(model.tower(runner).embeddings(pixels))
        shapes.append([(one.name, one.grid, one.shared) for one in device.driver.launched()])
        device.driver.record(False)
        runner.close()
    assert shapes[0] != shapes[1], "the table chose what the heuristic does"
    assert all(same_bits(results[1][name], tensor) for name, tensor in results[0].items())


# -- an image that is not finite -------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_that_is_not_finite_is_marked_and_no_other(int8: Open, family: str) -> None:
    model = int8(family)
    pixels = torch.randn(BATCH, 3, *model.spec.vision.image)
    clean = outputs_of(model.tower(), pixels)
    assert not clean["vision.status"].any()
    for bad, value in ((4, float("nan")), (0, float("inf")), (BATCH - 1, 1e30)):
        poisoned = pixels.clone()
        poisoned[bad, 1, 3, 2] = value
        ours = outputs_of(model.tower(), poisoned)
        marked = ours["vision.status"].nonzero().flatten().tolist()
        assert marked == [bad], f"{value} in image {bad}"
        kept = torch.arange(BATCH) != bad
        assert all(same_bits(ours[name][kept], clean[name][kept]) for name in ours)
