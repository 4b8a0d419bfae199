"""docs/emulator.md: its examples run and print what it says; its messages are the emulator's."""

from __future__ import annotations

import re
import runpy
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import emulator
import shared_library
from emulator.call import Compiled, compiled, ranges_of, run_call
from vitrail_kernels.launch import Call, Target
from vitrail_kernels.ops.linear import linear_calls

pytestmark = pytest.mark.skipif(shared_library.compiler() is None, reason="no C++ compiler here")

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/emulator.md").read_text()
FAULTS = dict(re.findall(r"^\| ([^|]+) \| `([^`]+)` \|$", TEXT, re.MULTILINE))
"""Messages by what provokes them, the table of "Reading a fault"."""
SEED = 0

nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc in PATH")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


(CUDA_KERNEL,) = blocks("cuda")
CUDA_EXAMPLE, TRITON_EXAMPLE = blocks("python")
CUDA_OUTPUT, TRITON_OUTPUT = blocks("text")


@pytest.fixture
def example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs ``code`` as a file beside ``kernel``, and gives what it printed."""

    def run(code: str, kernel: str = "") -> str:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        (folder / "transpose.cu").write_text(kernel)
        (folder / "example.py").write_text(code)
        monkeypatch.chdir(folder)
        runpy.run_path("example.py", run_name="__main__")
        return capsys.readouterr().out

    return run


def edited(text: str, old: str, new: str) -> str:
    assert old in text, f"{old} is not in the example"
    return text.replace(old, new)


def check_message(message: str, fault: str) -> None:
    """``message`` is that of the page, addresses, sites and numbers apart."""
    expected = re.escape(re.sub(r"\[\.\.\.\]|\.\.\.$", "@REST@", FAULTS[fault]))
    expected = re.sub(r"0x[0-9a-f]+|\d+", "@NUMBER@", expected)
    form = expected.replace("@REST@", ".*").replace("@NUMBER@", r"(?:0x[0-9a-f]+|\d+)")
    assert re.fullmatch(form, message, re.DOTALL), f"got {message}, wanted {FAULTS[fault]}"


# -- examples --------------------------------------------------------------------------------------


@nvcc
def test_the_cuda_example_prints_what_the_page_says(example: Callable[..., str]) -> None:
    assert example(CUDA_EXAMPLE, CUDA_KERNEL) == CUDA_OUTPUT
    printed = example(CUDA_EXAMPLE, edited(CUDA_KERNEL, "tile[32][32]", "tile[32][33]"))
    assert "ld.shared.f32: 128 for 128" in printed


@nvcc
@pytest.mark.parametrize(
    ("fault", "old", "new"),
    [
        ("`transpose.cu` without `__syncthreads()`", "__syncthreads();", ""),
        ("its output a column too far", "n + column] =", "n + column + 1] ="),
    ],
)
def test_the_cuda_example_with_a_fault(
    example: Callable[..., str], fault: str, old: str, new: str
) -> None:
    with pytest.raises(emulator.Fault) as error:
        example(CUDA_EXAMPLE, edited(CUDA_KERNEL, old, new))
    check_message(str(error.value), fault)


def test_the_triton_example_prints_what_the_page_says(example: Callable[..., str]) -> None:
    assert example(TRITON_EXAMPLE) == TRITON_OUTPUT


def test_the_triton_example_on_a_short_grid(example: Callable[..., str]) -> None:
    with pytest.raises(emulator.Fault) as error:
        example(edited(TRITON_EXAMPLE, "rows=1000", "rows=700"))
    check_message(str(error.value), "`scale_kernel` with 700 rows for 1000")


# -- messages of Vitrail's own kernels -------------------------------------------------------------


def product(x: torch.Tensor) -> tuple[Call, torch.Tensor]:
    """`linear` of ``x`` (64, K) by a weight (64, K), and its output."""
    out = torch.empty(64, 64, dtype=torch.float16)
    weight = torch.randn(64, x.shape[1]).half()
    (call,) = linear_calls(Target(90, 132), out, x, weight, torch.randn(64))
    return call, out


def without(pattern: str) -> Callable[[str], str]:
    """An edit that removes the instructions that ``pattern`` begins."""
    return lambda ptx: re.sub(rf"{pattern}[^;\n]*;", "", ptx)


@pytest.mark.parametrize(
    ("fault", "pattern"),
    [
        ("`linear` on sm_90, no wait for its `wgmma`", r"wgmma\.wait_group"),
        ("no fence before its TMA store", r"fence\.proxy\.async"),
    ],
)
def test_an_instruction_that_is_not_there(fault: str, pattern: str) -> None:
    call, out = product(torch.randn(64, 256).half())
    with pytest.raises(emulator.Fault) as error:
        run_call(call, 90, [out], edit=without(pattern), seed=SEED)
    check_message(str(error.value), fault)


def test_half_a_box() -> None:
    call, out = product(torch.randn(64, 256).half())

    def halve(name: str, fields: dict[str, list[int]]) -> dict[str, list[int]]:
        columns, rows = fields["box"]
        return fields | {"box": [columns, rows // 2]} if name == "x_map" else fields

    with pytest.raises(emulator.Fault) as error:
        run_call(call, 90, [out], map_edit=halve, seed=SEED)
    check_message(str(error.value), "half the box in its map of x")


def test_launches_that_overlap_without_a_wait() -> None:
    first, middle = product(torch.randn(64, 256).half())
    second, out = product(middle)
    programs = [compiled(first, 90), compiled(second, 90, edit=without("griddepcontrol.wait"))]

    def tensors(program: Compiled, name: str) -> dict[str, torch.Tensor]:
        return {f"{name} {key}": tensor for key, tensor in program.tensors.items()}

    memory = ranges_of(
        tensors(programs[0], "first") | tensors(programs[1], "second"), [middle, out]
    )
    with pytest.raises(emulator.Fault) as error:
        emulator.run([program.launch(pdl=True) for program in programs], memory, seed=SEED)
    check_message(str(error.value), "no `griddepcontrol.wait`, launches overlap")
    assert error.value.launch == 1
