"""Launches that overlap (programmatic dependent launch), with faults in their waits: the message
names both kernels and the instruction."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest
import torch
from torch import Tensor

import emulator
from emulated.planted import Edit, edit, guarded, names_place
from emulated.subjects import LARGE
from emulator.call import Compiled, compiled, module_of, ranges_of
from vitrail_kernels import OPERATORS
from vitrail_kernels.launch import Target

pytestmark = pytest.mark.usefixtures("emulated_kernels")

SEEDS = range(8)
"""Each of them notices each of these faults."""

WAIT = r"\tgriddepcontrol\.wait;[^\n]*"
LAUNCH = r"\tgriddepcontrol\.launch_dependents;[^\n]*"
FIRST_LOAD = r"(\tgriddepcontrol\.wait;)([^\n]*\n(?:.*\n)*?)(.*ld\.global[^\n]*\n)"


@dataclasses.dataclass(frozen=True)
class Chain:
    """layernorm, linear, linear: each reads the output of the launch before, and the last adds the
    output of the first."""

    programs: tuple[Compiled, ...]
    written: tuple[Tensor, ...]
    last: Tensor

    def run(self, edits: dict[int, Edit], seed: int) -> tuple[str, list[int]]:
        """The fault if the PTX of some launches is changed, or ""; which launches overlapped."""
        launches = []
        for index, program in enumerate(self.programs):
            if index in edits:
                module = module_of(edits[index](program.module.ptx))
                program = dataclasses.replace(program, module=module)
            launches.append(program.launch(pdl=index > 0))
        tensors = {f"{i} {k}": t for i, p in enumerate(self.programs) for k, t in p.tensors.items()}
        try:
            reports = emulator.run(
                launches, ranges_of(tensors, self.written, track=False), seed=seed
            )
        except emulator.Fault as fault:
            return str(fault), []
        return "", [report.overlapped for report in reports]


@functools.cache
def chain() -> Chain:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return guarded(torch.randn(*shape, generator=generator))

    x, gamma, beta = guarded(random(100, 192).half()), random(192), random(192)
    normed, hidden, out = (guarded(torch.empty(100, 192).half()) for _ in range(3))
    weights = [guarded((random(192, 192) * 192**-0.5).half()) for _ in range(2)]
    target = Target(90, 1)
    calls = [
        *OPERATORS["layernorm"].calls(target, normed, x, gamma, beta, eps=1e-6),
        *OPERATORS["linear"].calls(target, hidden, normed, weights[0], config=LARGE[90]),
        *OPERATORS["linear"].calls(
            target, out, hidden, weights[1], residual=normed, config=LARGE[90]
        ),
    ]
    programs = tuple(compiled(call, 90) for call in calls)
    return Chain(programs, (normed, hidden, out), out)


@functools.cache
def last_output() -> Tensor:
    """Of launches without a fault."""
    assert chain().run({}, 0)[0] == ""
    return chain().last.clone()


def test_launches_that_wait_overlap_and_give_the_same_bits() -> None:
    expected, overlaps = last_output(), [0, 0, 0]
    for seed in SEEDS:
        sentence, overlapped = chain().run({}, seed)
        assert sentence == ""
        assert torch.equal(chain().last, expected)
        overlaps = [a + b for a, b in zip(overlaps, overlapped, strict=True)]
    assert overlaps[0] == 0
    assert min(overlaps[1:]) > len(SEEDS) // 2


LAYERNORM, LINEAR = "_layernorm_kernel", "_linear_tma_kernel"
UNFINISHED = (
    r"read of bytes that {0} \(launch {1}\) writes, before {2} \(launch {3}\) has waited for it|"
    r"write of bytes that {2} \(launch {3}\) reads without waiting for {0} \(launch {1}\)"
)
NOT_FIRST = (
    "\t.reg .u32 who; .reg .pred few; mov.u32 who, %tid.x; setp.gt.u32 few, who, 31; "
    "@few griddepcontrol.wait;"
)
FAULTS: dict[str, tuple[dict[int, Edit], str]] = {
    "no wait": ({1: edit(WAIT)}, UNFINISHED.format(LAYERNORM, 0, LINEAR, 1)),
    "no wait of the last": ({2: edit(WAIT)}, UNFINISHED.format(LINEAR, 1, LINEAR, 2)),
    "launches dependents, does not wait": (
        {1: edit(WAIT, "\tgriddepcontrol.launch_dependents;")},
        UNFINISHED.format(LAYERNORM, 0, LINEAR, 1),
    ),
    "waits after the first load": (
        {
            2: edit(
                r"\tgriddepcontrol\.wait;((?s:.)*?cp\.async\.bulk[^;]*;)",
                r"\1 griddepcontrol.wait;",
            )
        },
        UNFINISHED.format(LINEAR, 1, LINEAR, 2),
    ),
    "the first warp does not wait": (
        {1: edit(WAIT, NOT_FIRST)},
        "harmless: a barrier before the first load orders the waits of other warps before it",
    ),
    "only the first warp waits": (
        {2: edit(WAIT, NOT_FIRST.replace("gt", "lt").replace("31", "32"))},
        "harmless: a barrier before the first load orders the waits of other warps before it",
    ),
    "launches dependents before it waits": (
        {
            1: lambda text: edit(WAIT, "\tgriddepcontrol.launch_dependents; griddepcontrol.wait;")(
                edit(LAUNCH)(text)
            )
        },
        "harmless: who starts early waits for the launch before, which waits for that before it",
    ),
    "never launches dependents": ({1: edit(LAUNCH)}, "harmless: the end of a block does"),
}


@pytest.mark.parametrize(("edits", "message"), FAULTS.values(), ids=FAULTS)
def test_a_wait_that_is_missing_is_noticed(edits: dict[int, Edit], message: str) -> None:
    expected = last_output()
    for seed in SEEDS:
        sentence, _ = chain().run(edits, seed)
        if message.startswith("harmless: "):
            assert not sentence
            assert torch.equal(chain().last, expected)
        else:
            assert names_place(sentence), sentence
            assert re.search(message, sentence), sentence
