"""What tests of kernels in Triton's interpreter share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from emulated import interpreter

if interpreter.ARCH:  # before the tests' own modules, which make targets
    interpreter.compile_for(interpreter.ARCH)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items if interpreter.ARCH else ():
        if (why := interpreter.why_not(item)) is not None:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def ordered_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tl.dot` adds the products of a number in one order, as a tensor core does.

    The interpreter leaves it to a BLAS, whose order depends on the shape and on where in the tile a
    row stands; bits could not be compared.
    """

    def matmul(a: npt.NDArray[Any], b: npt.NDArray[Any], dtype: Any = None) -> npt.NDArray[Any]:
        total = np.zeros((a.shape[0], b.shape[1]), dtype)
        for k in range(a.shape[1]):
            total += a[:, k, None].astype(dtype) * b[None, k].astype(dtype)
        return total

    monkeypatch.setattr(np, "matmul", matmul)
