"""Threads that ask for kernels at once: each kernel is compiled once, and others meanwhile."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vitrail.errors import VitrailError
from vitrail.plan.kernel_binary import KERNEL_MAGIC
from vitrail.plan.record import string
from vitrail.runtime import kernel_cache
from vitrail.runtime.kernel_cache import kernel_record

KEYS = [f"kernel {number}" for number in range(4)]


def record_of(key: str) -> bytes:
    return KERNEL_MAGIC + string(key) + b"code of " + key.encode()


def test_threads_compile_a_kernel_once_and_others_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kernel_cache.VARIABLE, str(tmp_path / "kernels"))
    compiled: Counter[str] = Counter()
    together = threading.Barrier(len(KEYS))

    def compile_binary(key: str, call: Any, arch: int) -> bytes:
        compiled[key] += 1
        together.wait(60)  # a compilation of each kernel is in progress
        return record_of(key)

    monkeypatch.setattr(kernel_cache, "compile_binary", compile_binary)
    with ThreadPoolExecutor(16) as pool:
        records = list(pool.map(lambda key: kernel_record(key, None, 90), KEYS * 4))  # type: ignore[arg-type]
    assert records == [record_of(key) for key in KEYS] * 4
    assert compiled == Counter(KEYS)
    assert not kernel_cache._turns


def test_a_kernel_that_does_not_compile_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kernel_cache.VARIABLE, str(tmp_path / "kernels"))
    answers: list[Any] = [VitrailError("no registers left"), record_of("a")]

    def compile_binary(key: str, call: Any, arch: int) -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return bytes(answer)

    monkeypatch.setattr(kernel_cache, "compile_binary", compile_binary)
    with pytest.raises(VitrailError, match="no registers"):
        kernel_record("a", None, 90)  # type: ignore[arg-type]
    assert kernel_record("a", None, 90) == record_of("a")  # type: ignore[arg-type]
