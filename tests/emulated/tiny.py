"""Tiny models of every family on an emulated device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emulated.device import Device, EmulatedRunner
from runtime.test_runner import Tensors, same_bits

Outputs = dict[str, Tensor]


@dataclass
class Tiny:
    """A model, its weights rounded as a checkpoint of ``dtype`` would be, and its runner."""

    tensors: Tensors
    runner: EmulatedRunner
    device: Device
    dtype: torch.dtype

    def outputs(self, seeds: Sequence[int], forward: Callable[[], Outputs]) -> Outputs:
        """What ``forward`` gives, the same bits in the schedule of every seed. From sm_90 on each
        launch of the odd seeds may overlap the one before."""
        results = []
        for seed in seeds:
            self.device.emulation.schedule(seed, overlap=self.runner._overlap and seed > 0)
            results.append(forward())
        for seed, other in zip(seeds, results, strict=True):
            assert same_bits(other, results[0]), f"seed {seed} gives other bits than {seeds[0]}"
        return results[0]


Open = Callable[[str], Tiny]
"""The model of a family of `test_runner.VISION`, or \"text\"."""
