"""Devices as users name them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vitrail.errors import InputError
from vitrail.model import arguments
from vitrail.model.arguments import check_device


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(arguments, "why_no_cuda", lambda: None)
    monkeypatch.setattr(arguments, "cuda_capability", lambda device: (9, 0))


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("auto", "cuda"),
        ("cuda", "cuda"),
        ("cuda:1", "cuda:1"),
        (1, "cuda:1"),
        (torch.device("cuda", 1), "cuda:1"),
        ("cpu", "cpu"),
        (torch.device("cpu"), "cpu"),
        ("cpu:3", "cpu"),
    ],
    ids=repr,
)
def test_a_device_has_a_name_a_number_or_is_pytorchs(
    device: Any, expected: str, two_gpus: None
) -> None:
    assert check_device(device) == torch.device(expected)


@pytest.mark.parametrize("device", ["cuda:2", 2, torch.device("cuda", 2)], ids=repr)
def test_a_gpu_that_is_not_there_is_counted(device: Any, two_gpus: None) -> None:
    with pytest.raises(InputError, match=r"output_device: got .*2.*, but PyTorch finds 2 CUDA"):
        check_device(device, "output_device")


@pytest.mark.parametrize(
    "device",
    ["gpu", "cuda:", "cuda:-1", "cuda:0,cuda:1", "0", "mps", None, True, -1, 1.0],
    ids=repr,
)
def test_a_refusal_lists_every_form(device: Any, two_gpus: None) -> None:
    with pytest.raises(InputError) as refused:
        check_device(device)
    assert str(refused.value) == (
        f"device: got {device!r}, wanted 'auto', 'cpu', 'cuda', or 'cuda:N' for GPU N, from 0"
    )
