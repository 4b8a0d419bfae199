"""Kernel calls as values: what is launched, one at a time, and what is not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vitrail_kernels import OPERATORS
from vitrail_kernels.configs import KernelConfig
from vitrail_kernels.launch import (
    Call,
    Target,
    check_tensor,
    fits_descriptor,
    interpreted,
    launch,
    target_of,
)

CONFIG = KernelConfig(64, 128, 32, 4, 3, registers=128)


class Kernel:
    """Stands for a Triton kernel: notes how it is launched, and whether two launches overlap."""

    def __init__(self) -> None:
        self.seen: list[tuple[tuple[int, ...], dict[str, Any]]] = []
        self.inside = self.most = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.001)
            self.seen.append((grid, given))
            self.inside -= 1

        return run


def test_a_call_hands_over_its_grid_arguments_and_options() -> None:
    kernel, x = Kernel(), torch.zeros(1)
    launch([Call(kernel, (7, 2), {"x": x, "m": 3}, CONFIG)])
    ((grid, given),) = kernel.seen
    assert grid == (7, 2)
    assert given.pop("x") is x
    assert given == {"m": 3, "num_warps": 4, "num_stages": 3, "maxnreg": 128}


def test_a_grid_with_a_zero_launches_nothing() -> None:
    kernel = Kernel()
    launch([Call(kernel, grid, {"x": torch.zeros(1)}, CONFIG) for grid in ((0,), (4, 0))])
    assert kernel.seen == []


def test_threads_launch_one_after_the_other() -> None:
    """Triton's first launch of a kernel is not safe beside another of the same."""
    kernel = Kernel()
    calls = [Call(kernel, (1,), {"x": torch.zeros(1)}, CONFIG)] * 10
    threads = [threading.Thread(target=launch, args=(calls,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kernel.seen) == 80
    assert kernel.most == 1


@pytest.mark.skipif(interpreted(), reason="interpreted: the CPU is a target there")
def test_a_cpu_is_no_target() -> None:
    with pytest.raises(RuntimeError, match="got a tensor on cpu, wanted CUDA"):
        target_of(torch.zeros(1))
    with pytest.raises(RuntimeError, match="wanted CUDA"):
        OPERATORS["linear"].launch(torch.zeros(1, 8), torch.zeros(1, 8), torch.zeros(8, 8))


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 103, 110, 120])
def test_targets(arch: int) -> None:
    target = Target(arch, 100)
    assert target.tma == (arch >= 90)
    assert target.tcgen05 == (arch in (100, 103, 110))


def test_what_tensor_maps_can_describe() -> None:
    half = {"dtype": torch.float16}
    assert fits_descriptor(torch.zeros(4, 64, **half), torch.zeros(1, 8, **half))
    assert not fits_descriptor(torch.zeros(4, 63, **half)), "rows of 126 bytes"
    assert not fits_descriptor(torch.zeros(4 * 64 + 1, **half)[1:].view(4, 64)), "an odd base"
    assert not fits_descriptor(torch.zeros(64, 64, **half).t()), "columns apart"
    assert not fits_descriptor(torch.zeros(0, 64, **half)), "nothing"


def test_what_is_refused_says_what_was_wanted() -> None:
    x = torch.zeros(4, 8)
    check_tensor("x", None, x, torch.float32, (4, 8))
    check_tensor("x", x, x, torch.float32, (4, 8))
    for bad, told in (
        (x.half(), "x: got torch.float16, wanted torch.float32"),
        (x[:3], r"x: got shape \(3, 8\), wanted \(4, 8\)"),
        (torch.zeros(8, 4).t(), r"x: got strides \(1, 4\)"),
        (x.to("meta"), "x: got a tensor on meta, wanted cpu"),
    ):
        with pytest.raises(ValueError, match=told):
            check_tensor("x", bad, x, torch.float32, (4, 8))
