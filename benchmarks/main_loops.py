"""Facts of a kernel's machine code, read from nvdisasm's text: loops, loads ahead, epilogue.

All counts are per warp. `read_sass` finds the main loops, whose every iteration multiplies on
tensor cores (for example a step of K in a linear, or a tile of keys in attention), and the
epilogue, which is the code after the last product of a tile that stores the tile.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from vitrail_kernels.compile import SASS_LINE, TENSOR_CORE

TMA_LOAD, TMA_STORE = "UTMALDG", "UTMASTG"
ASYNC_COPY = "LDGSTS"
WGMMA = ("HGMMA", "IGMMA")


@dataclass(frozen=True, slots=True)
class Loop:
    """An iteration of a main loop, without the code that some iterations skip.

    ``products``: tensor core instructions by opcode and shape. ``groups``: wgmma groups that an
    iteration commits. ``in_flight``: the largest number of groups that run at once. ``carried``:
    groups that still run when the next iteration begins. ``loads``: loads by tensor map.
    ``copies``: copies by cp.async. ``loads_ahead``: how many iterations before its use a buffer is
    loaded, counted from the loads in front of the loop. ``lead``: the smallest number of
    instructions between the load of a buffer and the wait for it; 0 if no load is ahead.
    ``values``: accumulators of the last product in a thread. ``opcodes``: how often each opcode
    runs.
    """

    products: dict[str, int]
    groups: int
    in_flight: int
    carried: int
    loads: int
    copies: int
    loads_ahead: int
    lead: int
    values: int
    opcodes: Counter[str]

    @property
    def instructions(self) -> int:
        return self.opcodes.total()

    @property
    def barriers(self) -> int:
        """Waits for all warps of the block."""
        return self.opcodes["BAR"]


@dataclass(frozen=True, slots=True)
class Sass:
    """The main loops in the order of the code, and the number of each opcode in the epilogue."""

    loops: tuple[Loop, ...]
    epilogue: Counter[str]

    @property
    def per_value(self) -> float:
        """Instructions of the epilogue per value of the tile, in a thread."""
        values = self.loops[-1].values if self.loops else 0
        return self.epilogue.total() / values if values else 0.0


def read_sass(text: str) -> Sass:
    """Read the output of ``nvdisasm -c`` for a cubin with one kernel."""
    graph = _FlowGraph(list(_instructions(text)))
    main = [loop for loop in graph.loops if _products(graph.code(loop.always))]
    loops = tuple(_loop(graph, loop) for loop in main)
    return Sass(loops, Counter(line.opcode for line in graph.code(_epilogue(graph, main))))


# -- instructions and blocks -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Instruction:
    """``label`` is the label of the code that begins here, or "". ``name`` is the opcode with its
    suffixes."""

    label: str
    predicate: str
    name: str
    operands: str

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]


_LABEL = re.compile(r"^(\.L_\w+):")


def _instructions(text: str) -> Iterator[_Instruction]:
    label = ""
    for line in text.splitlines():
        if start := _LABEL.match(line):
            label = start[1]
        elif match := SASS_LINE.match(line):
            yield _Instruction(label, (match[1] or "").strip(), match[2], match[3].strip())
            label = ""


@dataclass(frozen=True, slots=True)
class _NaturalLoop:
    """A loop by the numbers of its basic blocks; ``always`` are those that every iteration runs."""

    header: int
    blocks: frozenset[int]
    always: tuple[int, ...]


class _FlowGraph:
    """The basic blocks of a kernel, the edges between reachable blocks, and their dominators."""

    def __init__(self, code: Sequence[_Instruction]) -> None:
        starts = sorted(
            {0}
            | {i for i, line in enumerate(code) if line.label}
            | {i + 1 for i, line in enumerate(code[:-1]) if line.opcode in ("BRA", "EXIT")}
        )
        ends = [*starts[1:], len(code)]
        self._blocks = [code[a:b] for a, b in zip(starts, ends, strict=True)]
        labels = {block[0].label: number for number, block in enumerate(self._blocks) if block}
        self.next: dict[int, list[int]] = {}
        waiting = [0]
        while waiting:
            number = waiting.pop()
            if number not in self.next:
                self.next[number] = list(self._successors(number, labels))
                waiting += self.next[number]
        self.dominators = self._dominators()
        self._back = {(a, b) for a in self.next for b in self.next[a] if b in self.dominators[a]}

    def _successors(self, number: int, labels: dict[str, int]) -> Iterator[int]:
        block = self._blocks[number]
        branch = block[-1] if block else None
        ends = branch is not None and branch.opcode in ("BRA", "EXIT") and not branch.predicate
        if branch is not None and branch.opcode == "BRA":
            target = re.search(r"`\((\.L_\w+)\)", branch.operands)
            if target is None or target[1] not in labels:
                raise ValueError(f"sass: got the branch {branch.operands!r}, wanted a known label")
            yield labels[target[1]]
            ends = ends and branch.operands.startswith("`")  # else it has a uniform predicate
        if not ends and number + 1 < len(self._blocks):
            yield number + 1

    def _dominators(self) -> dict[int, set[int]]:
        previous: dict[int, list[int]] = {number: [] for number in self.next}
        for number, successors in self.next.items():
            for successor in successors:
                previous[successor].append(number)
        dominators = {number: set(self.next) for number in self.next} | {0: {0}}
        changed = True
        while changed:
            changed = False
            for number in sorted(self.next.keys() - {0}):
                common = set.intersection(*(dominators[block] for block in previous[number]))
                changed |= common | {number} != dominators[number]
                dominators[number] = common | {number}
        return dominators

    def code(self, blocks: Iterable[int]) -> list[_Instruction]:
        return [line for number in sorted(blocks) for line in self._blocks[number]]

    @functools.cached_property
    def loops(self) -> list[_NaturalLoop]:
        """The natural loops, in the order of their headers."""
        latches: dict[int, set[int]] = {}
        for latch, header in self._back:
            latches.setdefault(header, set()).add(latch)
        loops = []
        for header in sorted(latches):
            blocks, waiting = {header}, list(latches[header])
            while waiting:
                number = waiting.pop()
                if number not in blocks:
                    blocks.add(number)
                    waiting += [block for block in self.next if number in self.next[block]]
            always = set.intersection(*(self.dominators[latch] for latch in latches[header]))
            ordered = tuple(sorted(always & blocks))
            loops.append(_NaturalLoop(header, frozenset(blocks), ordered))
        return loops

    def reached(self, start: int) -> set[int]:
        """The blocks that can run after ``start`` without another iteration of any loop."""
        blocks: set[int] = set()
        waiting = [start]
        while waiting:
            number = waiting.pop()
            forward = [block for block in self.next[number] if (number, block) not in self._back]
            waiting += [block for block in forward if block not in blocks]
            blocks.update(forward)
        return blocks


# -- facts -----------------------------------------------------------------------------------------


def _products(code: Sequence[_Instruction]) -> dict[str, int]:
    products = (line.name.split(".")[:2] for line in code if line.opcode in TENSOR_CORE)
    return dict(Counter(map(".".join, products)))


def _loop(graph: _FlowGraph, loop: _NaturalLoop) -> Loop:
    code = graph.code(loop.always)
    counts = Counter(line.opcode for line in code)
    load = TMA_LOAD if counts[TMA_LOAD] else ASYNC_COPY
    groups, in_flight, carried = _in_flight(code)
    ahead = _in_front(graph, loop, load) // counts[load] if counts[load] else 0
    return Loop(
        products=_products(code),
        groups=groups,
        in_flight=in_flight,
        carried=carried,
        loads=counts[TMA_LOAD],
        copies=counts[ASYNC_COPY],
        loads_ahead=ahead,
        lead=_lead(code, load, ahead) if ahead else 0,
        values=_accumulators(code),
        opcodes=counts,
    )


def _in_flight(code: Sequence[_Instruction]) -> tuple[int, int, int]:
    """The wgmma groups that an iteration commits, the largest number at once, and the number that
    the next iteration finds running."""
    groups = pending = peak = 0
    for _ in range(8):  # no wait leaves so many in flight, so that the counts then repeat
        groups = peak = 0
        for line in code:
            if line.opcode in WGMMA and "gsb0" in line.operands:
                groups, pending = groups + 1, pending + 1
                peak = max(peak, pending)
            elif line.name.startswith("WARPGROUP.DEPBAR"):
                pending = min(pending, int(line.operands.split(",")[-1], 0))
    return groups, peak, pending


def _in_front(graph: _FlowGraph, loop: _NaturalLoop, load: str) -> int:
    """The number of loads that always run between the previous loop and this loop."""
    before = graph.dominators[loop.header] - {loop.header}
    previous = [candidate.blocks for candidate in graph.loops if candidate.header in before]
    start = max((max(blocks & before) + 1 for blocks in previous), default=0)
    code = graph.code(number for number in before if number >= start)
    return sum(line.opcode == load for line in code)


def _lead(code: Sequence[_Instruction], load: str, ahead: int) -> int:
    """The smallest number of instructions between a load and its wait, matched by mbarrier."""
    waits: dict[str, int] = {}
    loads: dict[str, int] = {}
    address = ""
    for number, line in enumerate(code):
        copied = load == ASYNC_COPY and line.name.startswith("DEPBAR")
        if copied or "TRYWAIT" in line.name:
            waits.setdefault(_offset(line), number)
        elif line.name.startswith("SYNCS.ARRIVE"):
            address = _offset(line)
        elif line.opcode == load:
            loads[address] = number
    awaited = loads.keys() & waits.keys()
    return min((ahead * len(code) - loads[key] + waits[key] for key in awaited), default=0)


def _offset(instruction: _Instruction) -> str:
    """The constant part of an mbarrier's address."""
    offset = re.search(r"\[[^]]*\+(0x[0-9a-f]+)\]", instruction.operands)
    return offset[1] if offset and instruction.opcode == "SYNCS" else ""


def _accumulators(code: Sequence[_Instruction]) -> int:
    """The fp32 accumulators of the last wgmma group in a thread."""
    group: dict[str, int] = {}
    committed: dict[str, int] = {}
    for line in code:
        if line.opcode in WGMMA:
            rows, columns, _ = (int(side) for side in line.name.split(".")[1].split("x"))
            group[line.operands.partition(",")[0]] = rows * columns // 128
            if "gsb0" in line.operands:
                committed, group = group, {}
    return sum(committed.values())


def _epilogue(graph: _FlowGraph, main: Sequence[_NaturalLoop]) -> set[int]:
    """The blocks after the last product of a tile, up to the next tile or the end.

    If a loop over K continues with the next tile, the epilogue is inside the loop.
    """
    multiply = {n for n in graph.next if _products(graph.code([n]))}
    if not multiply:
        return set()
    main_blocks = set().union(*(loop.always for loop in main))
    after = set().union(*(graph.reached(number) for number in multiply))
    blocks = {n for n in after - multiply - main_blocks if not graph.reached(n) & multiply}
    inside = set().union(*(loop.blocks for loop in main)) & blocks
    stores = any(line.opcode in (TMA_STORE, "STG") for line in graph.code(inside))
    return inside if stores else blocks
