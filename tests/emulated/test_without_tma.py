"""Kernels of sm_90 without tensor maps, as VITRAIL_TMA=0 has them: right, and of the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import standin
from emulated.conftest import SMS, why_not
from emulated.device import Device, EmulatedRunner
from emulated.test_models import BATCH, formula
from emulated.tiny import Tiny
from runtime.test_runner import (
    HEADS,
    TEXT,
    VISION,
    check,
    images,
    normalized,
    open_runner,
    read,
    same_bits,
    see,
)
from vitrail.plan.text import text_pooled
from vitrail.plan.vision import vision_pooled
from vitrail.runtime import native

SEEDS = (0, 1)


@pytest.mark.skipif(
    why_not() is not None or native.MISSING is not None, reason="needs triton and vitrail._C"
)
@pytest.mark.parametrize("family", ["vit", pytest.param("dinov2", marks=pytest.mark.slow), "text"])
def test_kernels_without_tensor_maps_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setenv(native.OVERLAP, "1")
    device, dtype = Device(tmp_path, 90, SMS), torch.float16
    vision, text = (None, TEXT) if family == "text" else (VISION[family], None)
    tensors, reference = open_runner(tmp_path, vision, text, HEADS.get(family), dtype)
    ids, ends = torch.randint(39, (5, 17)), [16, 3, 0, 9, 5]
    pixels = None if vision is None else images(BATCH, vision.image)

    def outputs(tma: str) -> tuple[torch.Tensor, list[standin.Launch], str]:
        monkeypatch.setenv("VITRAIL_TMA", tma)
        runner = EmulatedRunner(device, reference.weights, dtype)
        model = Tiny(tensors, runner, device, dtype)
        device.driver.record(True)
        if vision is None or pixels is None:
            rows = [row[: end + 1] for row, end in zip(ids, ends, strict=True)]
            plan = text_pooled(TEXT)
            out = model.outputs(SEEDS, lambda: read(runner, plan, rows, ends))["text.embedding"]
        else:
            plan = vision_pooled(vision, uint8=True)
            out = model.outputs(SEEDS, lambda: see(runner, vision, plan, pixels))
            out = out["vision.embedding"]
        launched = device.driver.launched()
        device.driver.record(False)
        device.driver.reset()
        runner.close()
        return out, launched, runner.identity

    plain, launched, identity = outputs("0")
    assert not any(part.map for launch in launched for part in launch.parameters)
    with_maps, launched, other = outputs("1")
    assert any(part.map for launch in launched for part in launch.parameters)
    assert identity == f"{other}, without TMA"
    assert same_bits({"out": plain}, {"out": with_maps})
    if vision is not None and pixels is not None:
        plan = vision_pooled(vision, uint8=True)
        expected = formula(plan, "vision.embedding", vision, HEADS.get(family), normalized(pixels))
        check("embedding", plain, tensors, expected, dtype)
