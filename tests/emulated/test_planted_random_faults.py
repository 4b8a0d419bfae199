"""Random changes of the PTX of real kernels: the emulator refuses the text or runs it,
never ends the process, and names the place of every fault."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable

import pytest

import emulator
from emulated.planted import Planted, Subject, names_place, symptom
from emulated.subjects import attention, gathered, gemm, gemm_ptx, linear

pytestmark = [pytest.mark.usefixtures("emulated_kernels"), pytest.mark.slow]

CHANGES = 400
NUMBERS = (0, 1, 3, 16, 4096, 65535, 2**31 - 1, 2**32 - 1)


def change_number(line: str, numbers: random.Random) -> str:
    """Replaces a number by an extreme one, or by one a little larger or twice as large."""
    matches = list(re.finditer(r"(?<![\w%$.])\d+(?!\w)", line))
    if not matches:
        return line
    match = numbers.choice(matches)
    value = int(match[0])
    new = numbers.choice((*NUMBERS, value + 1, value + 8, value + 1024, 2 * value))
    return f"{line[: match.start()]}{new}{line[match.end() :]}"


def change_register(line: str, registers: list[str], numbers: random.Random) -> str:
    """Replaces a register by another of its type."""
    matches = list(re.finditer(r"(%rd|%r|%p)\d+", line))
    if not matches:
        return line
    match = numbers.choice(matches)
    other_registers = [name for name in registers if re.fullmatch(rf"{match[1]}\d+", name)]
    return f"{line[: match.start()]}{numbers.choice(other_registers)}{line[match.end() :]}"


def damaged(ptx: str, numbers: random.Random) -> str:
    """The text with an instruction left out, exchanged with another, repeated elsewhere, or with
    another number or register."""
    lines = ptx.split("\n")
    code = [i for i, line in enumerate(lines) if re.match(r"\t[^./].*;", line)]
    first, second = numbers.choice(code), numbers.choice(code)
    way = numbers.randrange(5)
    if way == 0:
        lines[first] = ""
    elif way == 1:
        lines[first], lines[second] = lines[second], lines[first]
    elif way == 2:
        lines[first] += " " + lines[second].strip()
    elif way == 3:
        lines[first] = change_number(lines[first], numbers)
    else:
        registers = re.findall(r"%rd\d+|%r\d+|%p\d+", ptx)
        lines[first] = change_register(lines[first], registers, numbers)
    return "\n".join(lines)


REFUSED = r"\w+: [^[]* \[PTX line \d+(, [^][]*)?\]$"
"""The message of a text that does not parse."""


def symptom_of(subject: Subject, text: str, seed: int) -> str:
    """The symptom of a changed text, or why it is refused."""
    try:
        return symptom(subject, Planted(ptx=lambda _: text), seed)
    except emulator.Fault as fault:
        return str(fault)


SUBJECTS = {
    "linear sm_80": lambda: linear(80),
    "linear sm_90": lambda: linear(90),
    "gathered sm_80": lambda: gathered(80),
    "attention sm_80": lambda: attention(80, 69),
    "attention sm_90": lambda: attention(90, 133),
    "gemm": gemm,
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_random_changes_end_in_results_or_in_faults_with_a_place(name: str) -> None:
    if name == "gemm" and not gemm_ptx():
        pytest.skip("gemm.cu is not compiled: no nvcc in CUDA_HOME or PATH")
    make: Callable[[], Subject] = SUBJECTS[name]
    subject, outcomes = make(), Counter[str]()
    for number in range(CHANGES):
        text = damaged(subject.program.module.ptx, random.Random(number))
        if text == subject.program.module.ptx:
            continue
        sentence = symptom_of(subject, text, number % 3)
        if re.match(REFUSED, sentence):
            outcomes["refused"] += 1
        else:
            assert not sentence or names_place(sentence), f"change {number}: {sentence}"
            outcomes["noticed" if sentence else "not noticed"] += 1
    assert outcomes["noticed"] > CHANGES // 4, outcomes
