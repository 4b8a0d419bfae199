"""Shared by the GPU tests: the device, outputs with guards, and the free memory.

``VITRAIL_GPU_TESTS_DEVICE=cpu TRITON_INTERPRET=1 pytest -m gpu tests/gpu`` is a dry run of the same
code: tiny models, in fp16 alone, in Triton's interpreter. It tests the tests.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from kernels.test_operators import bits, same_bits

__all__ = ["bits", "same_bits"]

DEVICE = os.environ.get("VITRAIL_GPU_TESTS_DEVICE", "cuda")
DRY = DEVICE != "cuda"
# the interpreter's bf16 products are garbage
HALVES = (torch.float16,) if DRY else (torch.float16, torch.bfloat16)
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
POISONS = (float("nan"), 65504.0)
GUARD = 8  # rows; the output between them begins at a multiple of 16 bytes for any row size
SENTINELS = {torch.int32: -0x5A5A5A5B, torch.uint8: 0xA5, torch.int8: -0x5B}

gpu_alone = pytest.mark.skipif(DRY, reason="dry run: this needs streams, threads or a compiler")


class Guarded:
    """An output full of NaN or of unlikely integers, in a larger tensor that keeps its bytes."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        rows, *rest = shape
        fill = SENTINELS.get(dtype, float("nan"))
        whole = (rows + 2 * GUARD, *rest)
        self.whole = torch.full(whole, fill, dtype=dtype, device=DEVICE)
        self.out = self.whole[GUARD : GUARD + rows]
        self.before = bits(self.whole[:GUARD]).clone()

    def done(self) -> Tensor:
        """The output; every guard row is as it was."""
        assert torch.equal(bits(self.whole[:GUARD]), self.before), "wrote before its output"
        assert torch.equal(bits(self.whole[-GUARD:]), self.before), "wrote past its output"
        return self.out


def sync() -> None:
    if not DRY:
        torch.cuda.synchronize()


def generator(seed: int) -> torch.Generator:
    """Of the device that the tests run on."""
    return torch.Generator(DEVICE).manual_seed(seed)


def room(nbytes: float) -> None:
    """Skip, saying why, unless so many bytes of the GPU's memory are free."""
    if DRY:
        return
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < nbytes:
        gib = 1 << 30
        pytest.skip(f"needs {nbytes / gib:.0f} GiB of free GPU memory, {free / gib:.0f} are free")
