"""Kernels compiled by other processes: forked, or by a helper if CUDA has been started here."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import pytest
import torch

from jobs.processes import run_at_once
from vitrail_kernels import OPERATORS, Call, processes
from vitrail_kernels.compile import compile_call, compile_each, identity
from vitrail_kernels.launch import MISSING, Target, interpreted

pytestmark = pytest.mark.skipif(
    MISSING is not None or interpreted(), reason="needs triton's compiler"
)


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    """Two kernels: one with addresses, one with tensor maps and an address that is not aligned."""

    def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tables = [meta(*shape, dtype=torch.float32) for shape in ((5, 48), (5, 48), (1, 48), (48,))]
    bias = meta(129, dtype=torch.float32)[1:]
    scalars = {"table_grid": (2, 2), "grid": (2, 2), "antialias": False}
    linear = OPERATORS["linear"].calls(
        Target(90, 2), meta(300, 128), meta(300, 64), meta(128, 64), bias
    )
    return OPERATORS["position"].calls(Target(90, 2), *tables, **scalars) + linear


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As after the first use of CUDA."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(processes, "in_forks", None)  # nothing is forked from here
    yield
    processes._close_helper()


def test_a_call_is_the_same_kernel_in_another_process(calls: list[Call]) -> None:
    for call in calls:
        again = processes._portable(call).call()
        assert again.kernel is call.kernel
        assert identity(again) == identity(call)
    assert any("block_shape" in dir(value) for value in calls[1].arguments.values())


def test_a_process_with_cuda_compiles_in_one_that_has_never_seen_it(
    calls: list[Call], started: None
) -> None:
    codes = compile_each([*calls, calls[0]], 90)
    helper = processes._helpers[0].process.pid
    assert codes == [compile_call(call, 90) for call in (*calls, calls[0])]
    broken = processes.in_processes(partial(compile_call, arch=10), calls[:1])
    (told,) = broken
    assert isinstance(told, str)
    assert told.startswith("_position_kernel: ")
    assert processes._helpers[0].process.pid == helper


def test_a_helper_that_is_killed_is_said_and_replaced(calls: list[Call], started: None) -> None:
    dead = processes._Helper()
    processes._helpers.append(dead)
    dead.process.kill()
    dead.process.wait()
    results = processes.in_processes(partial(compile_call, arch=90), calls)
    with pytest.raises(BrokenProcessPool):
        next(results)
    assert not processes._helpers


def test_a_forked_process_leaves_its_parents_helper_alone(calls: list[Call], started: None) -> None:
    codes = compile_each(calls[:1], 90)
    helper = processes._helpers[0]

    def child() -> None:
        assert processes._ASKING.acquire(timeout=0)
        processes._close_helper()  # as at its end
        assert not processes._helpers

    with processes._ASKING:
        run_at_once(child)
    assert compile_each(calls[:1], 90) == codes
    assert processes._helpers == [helper]
