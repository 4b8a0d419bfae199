"""Walks a plan with the Triton kernels, launched from Python: CUDA, or the interpreter in tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from vitrail.plan import Launch
from vitrail.runners.runner import Runner
from vitrail_kernels import OPERATORS
from vitrail_kernels.configs import config_hash
from vitrail_kernels.launch import target_of


class TritonRunner(Runner):
    """Runs plans in fp16 or bf16 (fp32 in the interpreter) with Vitrail's own kernels."""

    name = "triton"

    @property
    def identity(self) -> str:
        arch = target_of(self.weights.arena).arch
        return f"triton {metadata.version('triton')} sm_{arch} {config_hash(arch)}"

    def position(self, *tensors: Tensor, **scalars: Any) -> None:
        OPERATORS["position"].launch(*tensors, **scalars)

    def launch(self, launch: Launch, tensors: Mapping[str, Tensor], longest: int) -> None:
        OPERATORS[launch.op].launch(**tensors, **launch.resolve(longest))

    def walk(self, launches: Sequence[Launch], tensors: Mapping[str, Tensor], longest: int) -> None:
        if self.device.type == "cpu":
            super().walk(launches, tensors, longest)
            return
        with torch.cuda.device(self.device):
            super().walk(launches, tensors, longest)
