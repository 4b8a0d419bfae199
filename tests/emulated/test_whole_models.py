"""Whole models of published sizes on emulated kernels for sm_90, against transformers in fp32."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import vitrail
from emulated.device import Device, EmulatedRunner
from helpers import assert_close, make, reference_numbers, save
from model.test_parity_full import VIT_B16
from real_model import dinov2_small
from vitrail.model.loading import read_model
from vitrail.runtime.runner import Runner
from vitrail.runtime.torch_runner import TorchRunner
from vitrail.runtime.towers import VisionTower
from vitrail.tools.quantize import quantize_model
from vitrail_kernels.launch import Call

pytestmark = pytest.mark.slow

HALF = torch.float16
SMS = 132  # an H100's
FEW_SMS = 4  # so that a handful of images takes the tiles that 132 take for a batch of a hundred


class TiledDevice(Device):
    """A device that knows the tiles of the kernels it was given."""

    def __init__(self, folder: Path, sms: int) -> None:
        super().__init__(folder, 90, sms)
        self.tiles: set[tuple[int, int]] = set()

    def compile(self, call: Call) -> Any:
        self.tiles.add((call.config.block_m, call.config.block_n))
        return super().compile(call)


@pytest.fixture
def device(tmp_path: Path) -> TiledDevice:
    return TiledDevice(tmp_path, SMS)


def emulated(model: vitrail.Model, device: Device) -> VisionTower:
    """The image tower of ``model`` with its kernels on ``device``."""
    tower = model._vision
    assert tower is not None, "the model has an image tower"
    return VisionTower(tower.spec, None, EmulatedRunner(device, tower.runner.weights, HALF))


def errors(ours: Tensor, reference: Tensor, peer: Tensor) -> str:
    """Relative root mean squares of both errors, and our worst cosine."""
    size = reference.double().pow(2).mean().sqrt()
    mine, theirs = (
        float((x.double() - reference.double()).pow(2).mean().sqrt() / size) for x in (ours, peer)
    )
    cosine = torch.cosine_similarity(ours.double(), reference.double()).min()
    return f"error {mine:.2e}, PyTorch's own {theirs:.2e}, worst cosine {float(cosine):.7f}"


def theirs(model: Any, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """The class token by transformers on the CPU, in ``dtype``."""
    with torch.inference_mode(), reference_numbers():
        output = model.to(dtype)(pixel_values=pixels.to(dtype))
    return output.last_hidden_state[:, 0].clone()  # type: ignore[no-any-return]


def test_vit_b16(tmp_path: Path, device: Device) -> None:
    """One image of 224 x 224 as uint8, pooled."""
    original = make("ViTModel", add_pooling_layer=False, **VIT_B16)
    save(original, tmp_path / "vit")
    (tmp_path / "vit/preprocessor_config.json").write_text(
        '{"size": 224, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    model = vitrail.load(tmp_path / "vit", device="cpu", dtype=HALF)
    raw = torch.randint(256, (1, 224, 224, 3), dtype=torch.uint8)
    pixels = ((raw.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5).contiguous()
    ours = emulated(model, device).embeddings(raw)["vision.embedding"]
    reference, peer = (theirs(original, pixels, dtype) for dtype in (torch.float32, HALF))
    print("ViT-B/16:", errors(ours, reference, peer))
    assert_close(ours, reference, peer, what="model", name="ViT-B/16")


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """The photos that the package brings along."""
    folder = files("vitrail") / "assets/photos"
    paths = sorted(Path(str(entry)) for entry in folder.iterdir())
    images = [Image.open(path).convert("RGB") for path in paths if path.suffix == ".jpg"]
    assert len(images) >= 4, f"{folder}: got {len(images)} photos"
    return images[:4]


def test_real_dinov2_small(tmp_path: Path, device: TiledDevice, photos: list[Image.Image]) -> None:
    """Trained weights on photos; a photo alone has the bits that it has in any batch and tile."""
    import transformers

    folder = dinov2_small()
    original = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    model = vitrail.load(folder, device="cpu", dtype=HALF)
    pixels = model.preprocess(photos)
    tower = emulated(model, device)
    ours = tower.embeddings(pixels)["vision.embedding"]
    reference, peer = (theirs(original, pixels, dtype) for dtype in (torch.float32, HALF))
    print("DINOv2-small:", errors(ours, reference, peer))
    assert_close(ours, reference, peer, what="model", name="DINOv2-small")

    other = TiledDevice(tmp_path, FEW_SMS)
    few = emulated(model, other).embeddings(pixels)["vision.embedding"]
    assert other.tiles - device.tiles, "the smaller device takes other tiles"
    assert torch.equal(few, ours), f"{int((few != ours).sum())} numbers differ on other tiles"
    alone = tower.embeddings(pixels[:1])["vision.embedding"]
    assert torch.equal(alone, ours[:1]), f"{int((alone != ours[:1]).sum())} numbers differ alone"


@pytest.mark.filterwarnings("ignore:.* not verified on your data:UserWarning")
def test_real_dinov2_small_in_int8(
    tmp_path: Path, device: TiledDevice, photos: list[Image.Image]
) -> None:
    """As `vitrail quantize` rounds it: beside int8 on the CPU in fp32, by the torch runner in fp16,
    and beside fp32 without int8. A photo alone has the bits that it has in any batch and tile."""
    folder = tmp_path / "int8"
    quantize_model(dinov2_small(), folder, check=8, rounding="nearest", device="cpu")
    served, loaded = vitrail.load(folder, device="cpu"), read_model(folder, HALF)
    spec, weights = loaded.spec.vision, loaded.weights
    assert spec is not None
    assert len(spec.blocks.int8) > 30
    pixels = served.preprocess(photos)

    def embed(runner: Runner, images: Tensor) -> Tensor:
        return VisionTower(spec, None, runner).embeddings(images)["vision.embedding"]

    runner = EmulatedRunner(device, weights, HALF)
    ours, reference = embed(runner, pixels), served.encode_image(pixels)
    peer = embed(TorchRunner(weights, HALF, torch.device("cpu")), pixels).half()
    print("DINOv2-small in int8:", errors(ours, reference, peer))
    assert_close(ours, reference, peer, what="scores", name="DINOv2-small in int8")
    plain = vitrail.load(dinov2_small(), device="cpu").encode_image(pixels)
    assert torch.cosine_similarity(ours, plain).min() > 0.999

    other = TiledDevice(tmp_path, FEW_SMS)
    few = embed(EmulatedRunner(other, weights, HALF), pixels)
    assert other.tiles - device.tiles, "the smaller device takes other tiles"
    assert torch.equal(few, ours), f"{int((few != ours).sum())} numbers differ on other tiles"
    alone = embed(runner, pixels[:1])
    assert torch.equal(alone, ours[:1]), f"{int((alone != ours[:1]).sum())} numbers differ alone"
