"""Faults planted in kernels that work: in the PTX, in tensor maps, in parameters, in launches.

`symptom` says how a fault shows: the emulator's sentence, an output that stays unwritten, numbers
that are wrong, or nothing.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import emulator
import helpers
from emulator.call import Compiled, module_of, ranges_of

LIMIT = 2_000_000
"""Warp instructions, about ten times what a kernel here takes: a fault may make it run forever."""

MapEdit = Callable[[str, dict[str, Any]], dict[str, Any]]
Edit = Callable[[str], str]
Replace = Callable[[re.Match[str]], str]
Values = dict[str, bytes]


@dataclass(frozen=True, eq=False)
class Subject:
    """A kernel that works, on tensors of its own.

    ``compile`` takes a change of the tensor maps' fields, or None. ``names``: of the parameters, in
    order; those of a tensor map are followed by "x_map.0" and so on, its shape and strides.
    ``expected`` has for some outputs the values in fp64, and PyTorch's own in the dtype.
    """

    name: str
    compile: Callable[[MapEdit | None], Compiled]
    names: tuple[str, ...]
    outputs: dict[str, Tensor]
    expected: dict[str, tuple[Tensor, Tensor]]

    @functools.cached_property
    def program(self) -> Compiled:
        """The kernel without a fault."""
        return self.compile(None)

    @functools.cached_property
    def inputs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Tensors that no launch writes, and copies of them."""
        written = {tensor.data_ptr() for tensor in self.outputs.values()}
        tensors = self.program.tensors.items()
        return {name: (t, t.clone()) for name, t in tensors if t.data_ptr() not in written}

    @functools.cached_property
    def results(self) -> dict[str, Tensor]:
        """The outputs without a fault, checked against the reference."""
        assert run(self, self.program.launch(), seed=0) == ""
        for name, (reference, peer) in self.expected.items():
            helpers.assert_close(self.outputs[name], reference, peer, name=name)
        return {name: tensor.clone() for name, tensor in self.outputs.items()}


@dataclass(frozen=True, slots=True)
class Planted:
    """A fault: changes of the PTX, of tensor maps, of parameters, of the launch's fields (functions
    get the right value), of inputs, in place; and options of `emulator.run`."""

    ptx: Edit | None = None
    maps: MapEdit | None = None
    values: Callable[[Values], Values] | None = None
    launch: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Callable[[Tensor], object]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, subject: Subject) -> emulator.Launch:
        """The launch with the fault. Raises ValueError if the fault changes nothing."""
        right = subject.program
        program = right if self.maps is None else subject.compile(self.maps)
        if self.ptx is not None:
            program = dataclasses.replace(program, module=module_of(self.ptx(right.module.ptx)))
        if self.values is not None:
            values = self.values(dict(zip(subject.names, program.values, strict=True)))
            program = dataclasses.replace(program, values=tuple(values.values()))
        fields = self.launch.items()
        changes = {key: v(getattr(right, key)) if callable(v) else v for key, v in fields}
        launch = program.launch(**changes)
        if launch == right.launch() and not self.data:
            raise ValueError("the fault changes nothing")
        for name, change in self.data.items():
            change(program.tensors[name])
        return launch


def run(subject: Subject, launch: emulator.Launch, **options: Any) -> str:
    """The fault that a run ends with, or ""; the numbers are not compared."""
    outputs = subject.outputs
    ranges = ranges_of(subject.program.tensors | outputs, tuple(outputs.values()))
    try:
        emulator.run(launch, ranges, limit=LIMIT, **options)
    except emulator.Fault as fault:
        return str(fault)
    unwritten = [
        f"{r.unwritten()} bytes of {r.name} stay unwritten" for r in ranges if r.unwritten()
    ]
    return "; ".join(unwritten)


def symptom(subject: Subject, planted: Planted, seed: int) -> str:
    """How the fault shows with one seed of the scheduler; "" if all bits are right."""
    results, inputs = subject.results, subject.inputs
    try:
        sentence = run(subject, planted.apply(subject), seed=seed, **planted.options)
        changed = [
            name
            for name, (now, before) in inputs.items()
            if name not in planted.data and not _same(now, before)
        ]
        return sentence or _wrong(subject, results, changed)
    finally:
        for now, before in inputs.values():
            now.copy_(before)


GUARD = 1 << 17
"""Bytes, more than a fault here goes past the end of a tensor."""


def guarded(tensor: Tensor) -> Tensor:
    """A copy of ``tensor``, aligned to 128 bytes, with `GUARD` bytes of no tensor around it."""
    size = tensor.numel() * tensor.element_size()
    memory = bytearray(GUARD + size + GUARD)
    start = GUARD - ctypes.addressof(ctypes.c_char.from_buffer(memory)) % 128
    flat = torch.frombuffer(memory, dtype=tensor.dtype, offset=start, count=tensor.numel())
    return flat.view(tensor.shape).copy_(tensor)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _wrong(subject: Subject, results: Mapping[str, Tensor], changed: Sequence[str]) -> str:
    if changed:
        return f"wrong: {', '.join(changed)} changed"
    sentences = []
    for name, tensor in subject.outputs.items():
        if _same(tensor, results[name]):
            continue
        share = float((tensor != results[name]).float().mean())
        sentence = f"other bits: {share:.2%} of {name}"
        if name in subject.expected:
            try:
                helpers.assert_close(tensor, *subject.expected[name], name=name)
            except AssertionError as error:
                sentence = f"wrong: {share:.2%} of {name}: {error}"
        sentences.append(sentence)
    return "; ".join(sentences)


def caught(subject: Subject, planted: Planted, seeds: Iterable[int]) -> str:
    """The first symptom that a seed shows, or ""."""
    return next(filter(None, (symptom(subject, planted, seed) for seed in seeds)), "")


PLACES = (
    r"\w+: .+\[[\w.:]+, PTX line \d+, \w+\.\w+:\d+.*, block \d+, warp \d+\]",
    r"\w+: deadlock in block \d+: .*warp \d+ at .+ in [\w.:]+, PTX line \d+, \w+\.\w+:\d+",
    r"\w+: a block of \d+ x \d+ x \d+ threads, the kernel requires",
    r"\w+: a grid of \d+ blocks, wanted",
    r"\d+ bytes of \w+.* stay unwritten",
    r"(wrong|other bits): .+",
)
"""How a symptom says where it is: an instruction with PTX line, source line, block and warp; the
waiters of a deadlock likewise; a launch that is refused; an output."""


def names_place(sentence: str) -> bool:
    """Whether a symptom says where it is, as `PLACES` have it."""
    return any(re.match(pattern, sentence) for pattern in PLACES)


def check_fault(
    make: Callable[[int], Subject],
    arch: int,
    planted: Planted,
    message: str,
    seeds: Iterable[int],
) -> None:
    """The fault shows with every seed as the pattern ``message`` has it, and says where it is. A
    message that begins with "harmless: " is why it never shows."""
    for seed in seeds:
        sentence = symptom(make(arch), planted, seed)
        if message.startswith("harmless: "):
            assert not sentence
        else:
            assert names_place(sentence), sentence
            assert re.search(message, sentence), sentence


# -- changes ---------------------------------------------------------------------------------------


def sites(ptx: str, pattern: str) -> list[re.Match[str]]:
    """Where ``pattern`` matches; ^ and $ are those of lines."""
    return list(re.finditer(pattern, ptx, re.MULTILINE))


def edit(pattern: str, replacement: str | Replace = "", *indexes: int) -> Edit:
    """Replaces the matches of the given indexes, or all, by ``replacement`` (as `re.sub` takes it).
    Every other instruction stays on its line.

    Raises ValueError, when it is applied, if there is no such match.
    """

    def apply(ptx: str) -> str:
        matches = sites(ptx, pattern)
        chosen = [matches[i] for i in indexes if -len(matches) <= i < len(matches)]
        if len(chosen) < max(len(indexes), 1) and (indexes or not matches):
            raise ValueError(f"{pattern}: got {len(matches)} matches, wanted those of {indexes}")
        for match in sorted(chosen if indexes else matches, key=re.Match.start, reverse=True):
            new = match.expand(replacement) if isinstance(replacement, str) else replacement(match)
            new += "\n" * (match[0].count("\n") - new.count("\n"))
            ptx = ptx[: match.start()] + new + ptx[match.end() :]
        return ptx

    return apply


def exchange(first: str, second: str) -> Callable[[Values], Values]:
    """Exchanges two parameters."""
    return lambda values: values | {first: values[second], second: values[first]}


def add(name: str, difference: int) -> Callable[[Values], Values]:
    """Adds to an integer parameter, or to an address."""

    def apply(values: Values) -> Values:
        size = len(values[name])
        value = int.from_bytes(values[name], "little", signed=True) + difference
        return values | {name: value.to_bytes(size, "little", signed=True)}

    return apply


def put(name: str, value: float) -> Callable[[Values], Values]:
    """Puts a float into a parameter."""
    return lambda values: values | {name: struct.pack("<f", value)}


def of_map(name: str, **changes: Any) -> MapEdit:
    """Changes fields of one tensor map; a function gets the right value."""

    def apply(map_name: str, fields: dict[str, Any]) -> dict[str, Any]:
        if map_name != name:
            return fields
        new = {key: v(fields[key]) if callable(v) else v for key, v in changes.items()}
        return fields | new

    return apply
