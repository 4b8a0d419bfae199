"""What the machine code of a kernel does, read from nvdisasm's text: loops, loads ahead, epilogue.

Numbers are a warp's. `read_sass` finds the loops whose every iteration multiplies on tensor cores
(a step of K in a linear, a tile of keys in attention), and the epilogue: the code behind the last
product of a tile that stores it.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

TENSOR_CORE = ("HGMMA", "IGMMA", "HMMA", "IMMA", "UTCHMMA", "UTCIMMA")
TMA_LOAD, TMA_STORE = "UTMALDG", "UTMASTG"
ASYNC_COPY = "LDGSTS"


@dataclass(frozen=True, slots=True)
class Loop:
    """One iteration of a main loop, without code that some iterations skip.

    ``products``: tensor core instructions by opcode and shape. ``groups``: how many groups of
    wgmma an iteration commits; ``in_flight``: the most groups that run at once; ``carried``: groups
    that still run when the next iteration begins. ``loads`` by tensor map, ``copies`` by cp.async.
    ``loads_ahead``: how many iterations before its use a buffer is loaded, by what the code in
    front of the loop loads. ``lead``: the fewest instructions between the load of a buffer and the
    wait for it, 0 if the loop loads nothing ahead. ``values``: accumulators a thread
    holds of the last product. ``opcodes``: how often each opcode runs.
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
    """Main loops in the order of the code, and how often each opcode stands in the epilogue."""

    loops: tuple[Loop, ...]
    epilogue: Counter[str]

    @property
    def per_value(self) -> float:
        """Instructions of the epilogue for each value of the tile that a thread finishes."""
        values = self.loops[-1].values if self.loops else 0
        return self.epilogue.total() / values if values else 0.0


def read_sass(text: str) -> Sass:
    """Read what ``nvdisasm -c`` prints of a cubin with one kernel."""
    graph = _Graph(list(_instructions(text)))
    main = [loop for loop in graph.loops if _products(graph.code(loop.always))]
    loops = tuple(_loop(graph, loop) for loop in main)
    return Sass(loops, Counter(each.opcode for each in graph.code(_epilogue(graph, main))))


def opcodes(text: str) -> list[str]:
    """The opcodes of nvdisasm's output in the order of the code, without their suffixes."""
    return [each.opcode for each in _instructions(text)]


# -- instructions and blocks -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Instruction:
    """``label``: of the code that begins here. ``name``: the opcode with its suffixes."""

    label: str
    predicate: str
    name: str
    operands: str

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]


_LABEL = re.compile(r"^(\.L_\w+):")
_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9]*[\w.]*)\s*([^;]*)")


def _instructions(text: str) -> Iterator[_Instruction]:
    label = ""
    for line in text.splitlines():
        if start := _LABEL.match(line):
            label = start[1]
        elif parts := _LINE.match(line):
            yield _Instruction(label, (parts[1] or "").strip(), parts[2], parts[3].strip())
            label = ""


@dataclass(frozen=True, slots=True)
class _NaturalLoop:
    """Blocks by number: all, and those that every iteration runs."""

    header: int
    blocks: frozenset[int]
    always: tuple[int, ...]


class _Graph:
    """Basic blocks, the edges between those that can be reached, and who dominates whom."""

    def __init__(self, code: Sequence[_Instruction]) -> None:
        starts = sorted(
            {0}
            | {i for i, each in enumerate(code) if each.label}
            | {i + 1 for i, each in enumerate(code[:-1]) if each.opcode in ("BRA", "EXIT")}
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
        last = block[-1] if block else None
        ends = last is not None and last.opcode in ("BRA", "EXIT") and not last.predicate
        if last is not None and last.opcode == "BRA":
            target = re.search(r"`\((\.L_\w+)\)", last.operands)
            if target is None or target[1] not in labels:
                raise ValueError(f"sass: got the branch {last.operands!r}, wanted a known label")
            yield labels[target[1]]
            ends = ends and last.operands.startswith("`")  # else a uniform predicate comes first
        if not ends and number + 1 < len(self._blocks):
            yield number + 1

    def _dominators(self) -> dict[int, set[int]]:
        before: dict[int, list[int]] = {number: [] for number in self.next}
        for number, after in self.next.items():
            for each in after:
                before[each].append(number)
        result = {number: set(self.next) for number in self.next} | {0: {0}}
        changed = True
        while changed:
            changed = False
            for number in sorted(self.next.keys() - {0}):
                new = {number} | set.intersection(*(result[each] for each in before[number]))
                changed |= new != result[number]
                result[number] = new
        return result

    def code(self, blocks: Iterable[int]) -> list[_Instruction]:
        return [each for number in sorted(blocks) for each in self._blocks[number]]

    @functools.cached_property
    def loops(self) -> list[_NaturalLoop]:
        """Natural loops, in the order of their headers."""
        latches: dict[int, set[int]] = {}
        for latch, header in self._back:
            latches.setdefault(header, set()).add(latch)
        result = []
        for header in sorted(latches):
            blocks, waiting = {header}, list(latches[header])
            while waiting:
                number = waiting.pop()
                if number not in blocks:
                    blocks.add(number)
                    waiting += [each for each in self.next if number in self.next[each]]
            always = set.intersection(*(self.dominators[latch] for latch in latches[header]))
            ordered = tuple(sorted(always & blocks))
            result.append(_NaturalLoop(header, frozenset(blocks), ordered))
        return result

    def reached(self, start: int) -> set[int]:
        """Blocks that can run after ``start`` without another iteration of any loop."""
        blocks: set[int] = set()
        waiting = [start]
        while waiting:
            number = waiting.pop()
            after = [each for each in self.next[number] if (number, each) not in self._back]
            waiting += [each for each in after if each not in blocks]
            blocks.update(after)
        return blocks


# -- facts -----------------------------------------------------------------------------------------


def _products(code: Sequence[_Instruction]) -> dict[str, int]:
    return dict(
        Counter(".".join(each.name.split(".")[:2]) for each in code if each.opcode in TENSOR_CORE)
    )


def _loop(graph: _Graph, loop: _NaturalLoop) -> Loop:
    code = graph.code(loop.always)
    counts = Counter(each.opcode for each in code)
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
    """Groups that an iteration commits, the most that run at once, and those that outlive it."""
    groups = pending = most = 0
    for _ in range(8):  # more than any wait leaves in flight: the counts then repeat
        groups = most = 0
        for each in code:
            if each.opcode == "HGMMA" and "gsb0" in each.operands:
                groups, pending = groups + 1, pending + 1
                most = max(most, pending)
            elif each.name.startswith("WARPGROUP.DEPBAR"):
                pending = min(pending, int(each.operands.split(",")[-1], 0))
    return groups, most, pending


def _in_front(graph: _Graph, loop: _NaturalLoop, load: str) -> int:
    """How many loads always run before the loop does, behind the loop before it."""
    before = graph.dominators[loop.header] - {loop.header}
    inner = [other.blocks for other in graph.loops if other.header in before]
    first = max((max(blocks & before) + 1 for blocks in inner), default=0)
    code = graph.code(number for number in before if number >= first)
    return sum(each.opcode == load for each in code)


def _lead(code: Sequence[_Instruction], load: str, ahead: int) -> int:
    """Instructions between a load and the wait for it; every mbarrier by its own address."""
    waits: dict[str, int] = {}
    loads: dict[str, int] = {}
    address = ""
    for at, each in enumerate(code):
        copied = load == ASYNC_COPY and each.name.startswith("DEPBAR")
        if copied or "TRYWAIT" in each.name:
            waits.setdefault(_offset(each), at)
        elif each.name.startswith("SYNCS.ARRIVE"):
            address = _offset(each)
        elif each.opcode == load:
            loads[address] = at
    awaited = loads.keys() & waits.keys()
    return min((ahead * len(code) - loads[at] + waits[at] for at in awaited), default=0)


def _offset(instruction: _Instruction) -> str:
    """The constant part of an mbarrier's address."""
    offset = re.search(r"\[[^]]*\+(0x[0-9a-f]+)\]", instruction.operands)
    return offset[1] if offset and instruction.opcode == "SYNCS" else ""


def _accumulators(code: Sequence[_Instruction]) -> int:
    """fp32 accumulators of the last group of wgmma, of a thread."""
    group: dict[str, int] = {}
    last: dict[str, int] = {}
    for each in code:
        if each.opcode == "HGMMA":
            rows, columns, _ = (int(side) for side in each.name.split(".")[1].split("x"))
            group[each.operands.partition(",")[0]] = rows * columns // 128
            if "gsb0" in each.operands:
                last, group = group, {}
    return sum(last.values())


def _epilogue(graph: _Graph, main: Sequence[_NaturalLoop]) -> set[int]:
    """Blocks behind the last product of a tile, up to the next tile or the end.

    A loop over K that goes on with the next tile has its epilogue inside.
    """
    multiply = {n for n in graph.next if _products(graph.code([n]))}
    if not multiply:
        return set()
    every = set().union(*(loop.always for loop in main))
    behind = set().union(*(graph.reached(number) for number in multiply))
    blocks = {n for n in behind - multiply - every if not graph.reached(n) & multiply}
    inside = set().union(*(loop.blocks for loop in main)) & blocks
    stored = any(each.opcode in (TMA_STORE, "STG") for each in graph.code(inside))
    return inside if stored else blocks
