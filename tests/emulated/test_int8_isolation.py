"""What one row holds reaches no other row of compiled int8 kernels, and NaN stays NaN."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from emulated.int8_cases import BLOCK, FORMS, LAST, SMS, Case, Tensors, forms
from kernels.test_operators import same_bits
from vitrail_kernels.launch import Target

pytestmark = pytest.mark.usefixtures("emulated_kernels")

ARCHES = (80, 90)
ROWS = 100
BAD = (0, 37, 99)
EXTRA = 70
"""Rows past the end: more than a tile's."""
NAN, LARGE = float("nan"), 65504.0

PRODUCTS = forms(BLOCK, without="norm_quant")


def case_of(name: str) -> Case:
    return FORMS[name](ROWS)


POISONED = {
    "norm_quant": ("x",),
    "linear_int8": ("x_scale",),
    "linear_int8_grouped": ("x_scale", "residual"),
}
"""Floats of an item by operator."""
MARK = {"norm_quant": "out_scale", "linear_int8": "out_scale", "linear_int8_grouped": "out"}


def row(name: str, tensor: Tensor, index: int) -> Tensor:
    return tensor[..., index] if name in LAST else tensor[index]


def but(out: Tensors, index: int) -> Tensors:
    """Without the row ``index``."""
    kept = torch.arange(ROWS) != index
    return {n: t[..., kept] if n in LAST else t[kept] for n, t in out.items()}


def poison(case: Case, name: str, index: int, value: float) -> Case:
    """With ``value`` in all numbers that an output's row is made of, or in one of them for NaN."""
    changed = case.part(0, ROWS)
    if name == "residual" and "residual_rows" in case.inputs:
        index = int(case.inputs["residual_rows"][index])
    changed.inputs[name] = changed.inputs[name].clone()
    target = row(name, changed.inputs[name], index)
    if value != value and target.dim():
        target[target.numel() // 2] = value
    else:
        target.fill_(value)
    return changed


def is_nan(case: Case, out: Tensors, index: int) -> bool:
    """Whether the row is marked: every scale of codes, or some number of a value's row."""
    mark = MARK[case.op] if MARK[case.op] in out else "out"
    marked = row(mark, out[mark], index).isnan()
    return bool(marked.all() if mark == "out_scale" else marked.any())


def same(ours: Tensors, theirs: Tensors) -> bool:
    return all(same_bits(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", forms(without="norm_quant of some rows"))
def test_what_is_not_finite_marks_its_row_and_no_other(name: str, arch: int) -> None:
    case = case_of(name)
    clean = case.run(arch)
    assert not any(is_nan(case, clean, index) for index in range(ROWS))
    for tensor in POISONED[case.op]:
        for index, value in zip(BAD, (NAN, float("inf"), LARGE), strict=True):
            out = poison(case, tensor, index, value).run(arch)
            assert same(but(out, index), but(clean, index)), f"{tensor} of row {index}"
            if value == LARGE:
                assert not same(out, clean)
            else:
                assert is_nan(case, out, index) or infinite(out, index), tensor


def infinite(out: Tensors, index: int) -> bool:
    """Values may be infinite where no codes are made of them."""
    return "out_scale" not in out and bool(row("out", out["out"], index).isinf().any())


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_codes_of_one_row_reach_no_other(name: str, arch: int) -> None:
    case = case_of(name)
    clean = case.run(arch)
    for index, code in zip(BAD, (-128, 127, -128), strict=True):
        changed = case.part(0, ROWS)
        changed.inputs["x"][index] = code
        out = changed.run(arch)
        assert same(but(out, index), but(clean, index))
        assert not same(out, clean)


def longer(parameter: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A tensor map of x with `EXTRA` rows more."""
    if parameter != "x_map":
        return fields
    width, rows = fields["dims"]
    return fields | {"dims": [width, rows + EXTRA]}


@pytest.mark.parametrize("name", PRODUCTS)
def test_rows_past_the_end_change_no_bit(name: str) -> None:
    """As the C++ executor encodes tensor maps: for more rows than the call has."""
    case = case_of(name)
    clean = case.run(90)
    (call,) = case.calls(Target(90, SMS))[1]
    assert "x_map" in call.arguments
    for code in (-128, 127):
        x = case.inputs["x"]
        roomy = torch.full((ROWS + EXTRA, x.shape[1]), code, dtype=torch.int8)
        roomy[:ROWS] = x
        changed = case.part(0, ROWS)
        changed.inputs["x"] = roomy[:ROWS]
        assert same(changed.run(90, map_edit=longer), clean)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", ["norm_quant", "up", "gated up"])
def test_a_scale_that_drops_nan_is_noticed(name: str, arch: int) -> None:
    """The control: without 0 times the sum of a row, codes would make finite numbers of NaN."""
    case = case_of(name)
    tensor = POISONED[case.op][0]

    def laundered(ptx: str) -> str:
        """The products with the constant 0 give 0."""
        return re.sub(
            r"mul\.rn\.f32 \t(%\w+), (%\w+), 0f00000000;", r"mov.b32 \t\1, 0f00000000;", ptx
        )

    out = poison(case, tensor, 37, NAN).run(arch, edit=laundered)
    assert not is_nan(case, out, 37)
