"""The exact product of int8 matrices: with the instructions of this CPU, and without VNNI."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from vitrail_kernels import int8_product as module
from vitrail_kernels.int8_product import int8_product

DEPTHS = (4, 128, 1020, 1024, 1028, 3072, 16384)


def extreme(rows: int, depth: int, seed: int) -> torch.Tensor:
    """Codes of 127, -127 and -128; two rows hold only the first, and only the last."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, 3, (rows, depth), generator=generator)
    codes = torch.tensor([127, -127, -128], dtype=torch.int8)[picks]
    codes[0], codes[1] = 127, -128
    return codes


def wrong_sums() -> list[int]:
    """The depths at which a sum differs from the sum in int64."""
    wrong = []
    for depth in DEPTHS:
        x, weight = extreme(9, depth, 0), extreme(16, depth, 1)
        if not torch.equal(int8_product(x, weight).long(), x.long() @ weight.long().t()):
            wrong.append(depth)
    return wrong


def test_sums_of_extreme_codes_are_exact() -> None:
    assert wrong_sums() == []


def test_sums_in_fp32_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_int_mm_is_exact", lambda: False)
    assert wrong_sums() == []


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_the_product_is_exact_where_onednn_has_no_vnni(isa: str) -> None:
    """In a process of its own, because oneDNN reads the variable once."""
    code = (
        "from kernels import test_int8_product as test; from vitrail_kernels import int8_product;"
        "print(int8_product._int_mm_is_exact(), test.wrong_sums())"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "ONEDNN_MAX_CPU_ISA": isa}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split(maxsplit=1) == ["False", "[]\n"]


def test_the_probe_refuses_a_product_that_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        pairs = x.int()[:, None, :] * weight.t().int()[None]
        pairs = pairs.unflatten(2, (-1, 2)).sum(3).clamp(-(2**15), 2**15 - 1)
        return pairs.sum(2, dtype=torch.int32)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not module._int_mm_is_exact.__wrapped__()
