"""The choice of "auto" on a GPU, and the backend that results name (N12)."""

from __future__ import annotations

import pytest
import torch

import vitrail
from gpu.common import DEVICE, DRY, same_bits
from gpu.models import RUNNER, SERVES, Zoo, images
from vitrail.errors import InputError
from vitrail.tools import info

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DRY, reason="dry run: nothing is chosen on a CPU"),
    pytest.mark.usefixtures("kernels"),
]


def test_auto_is_cuda_fp16_and_our_kernels(zoo: Zoo) -> None:
    model = vitrail.load(zoo.folder("ViT-B/16"), backend=RUNNER)
    assert model.device.type == "cuda"
    assert model.dtype == torch.float16
    assert model.backend == SERVES
    assert "float16 on cuda" in repr(model)
    assert f"{SERVES} runner" in repr(model)
    pixels = images(2)
    assert same_bits(model.encode_image(pixels), zoo.ours("ViT-B/16").encode_image(pixels))


def test_info_says_so(zoo: Zoo) -> None:
    spec, facts = info.read(str(zoo.folder("ViT-B/16")))
    assert facts["serving"]["backend"] == "native (Vitrail's kernels) on CUDA, float16"
    assert "native (Vitrail's kernels) on CUDA, float16" in info.describe(spec, facts)


def test_fp32_goes_through_pytorch_and_says_so(zoo: Zoo) -> None:
    folder = zoo.folder("ViT-B/16")
    assert vitrail.load(folder, dtype="float32").backend == "torch"
    with pytest.raises(InputError, match="float32 goes through PyTorch"):
        vitrail.load(folder, dtype="float32", backend="triton")


def test_a_device_may_be_named(zoo: Zoo) -> None:
    folder = zoo.folder("ViT-B/16")
    assert vitrail.load(folder, device="cuda:0").backend == "native"
    assert vitrail.load(folder, device="cpu").backend == "torch"
    with pytest.raises(InputError, match="device: got 'cuda:99'"):
        vitrail.load(folder, device="cuda:99")


def test_the_fingerprint_tells_runners_and_dtypes_apart(zoo: Zoo) -> None:
    folder = zoo.folder("ViT-B/16")
    models = [
        vitrail.load(folder, device=DEVICE, dtype=dtype, backend=runner)
        for dtype, runner in (
            ("float16", "triton"),
            ("bfloat16", "triton"),
            ("float16", "torch"),
            ("float32", "torch"),
        )
    ]
    prints = [model.fingerprint for model in models]
    assert len(set(prints)) == len(prints)
    assert vitrail.load(folder, backend="native").fingerprint == prints[0], "the same bits"


def test_results_go_where_they_are_wanted(zoo: Zoo) -> None:
    """To the CPU unless asked for elsewhere; pixels may come from either."""
    model, pixels = zoo.ours("ViT-B/16"), images(3)
    on_cpu = model.encode_image(pixels.cpu())
    on_gpu = model.encode_image(pixels, output_device="cuda")
    assert on_cpu.device.type == "cpu"
    assert on_gpu.device.type == "cuda"
    assert on_gpu.dtype == on_cpu.dtype == torch.float32
    assert same_bits(on_gpu.cpu(), on_cpu)
    hidden = model.forward(pixel_values=pixels.cpu()).last_hidden_state
    assert hidden is not None
    assert hidden.device.type == "cuda"


def test_no_setting_of_torch_is_changed(zoo: Zoo) -> None:
    def settings() -> tuple[object, ...]:
        matmul = torch.backends.cuda.matmul
        return (
            matmul.allow_tf32,
            matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_bf16_reduced_precision_reduction,
            torch.backends.cudnn.allow_tf32,
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.cuda.current_device(),
            torch.cuda.current_stream(),
        )

    before = settings()
    vitrail.load(zoo.folder("ViT-B/16")).encode_image(images(2))
    assert settings() == before
