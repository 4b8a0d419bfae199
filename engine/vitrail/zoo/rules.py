"""Stored tensor names -> canonical names, by table. Complete or refuse."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from vitrail.checkpoint.tensors import TensorEntry
from vitrail.dtypes import SAFETENSORS
from vitrail.errors import CheckpointError
from vitrail.spec import Shape

LISTED = 20

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Source:
    """Where one canonical tensor comes from.

    ``rows``: the slice of the stored tensor's leading dimension, None for all of it.
    ``transpose``: stored as the two-dimensional transpose of the canonical shape.
    """

    entry: TensorEntry
    rows: tuple[int, int] | None = None
    transpose: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of a name table.

    ``names`` are the stored names, one a dialect, oldest first ("" where a dialect has none; a
    single name serves them all). ``{i}`` is a layer, a last ``*`` is both ``weight`` and ``bias``.
    ``op``: "copy" one target, "split" the rows evenly over the targets, "ignore" for ``reason``.
    """

    op: Literal["copy", "split", "ignore"]
    names: tuple[str, ...]
    targets: tuple[str, ...] = ()
    reason: str = ""


def copy(target: str, *names: str) -> Rule:
    return Rule("copy", names, (target,))


def split(targets: tuple[str, ...], *names: str) -> Rule:
    return Rule("split", names, targets)


def ignore(reason: str, *names: str) -> Rule:
    return Rule("ignore", names, reason=reason)


@dataclass(frozen=True, slots=True)
class Place:
    """A rule at one spelling: what a stored name that matches it is for.

    ``dialect`` is -1 where the name is the same in all of them.
    """

    pattern: str
    targets: tuple[str, ...]
    prefix: str
    dialect: int


def expand(groups: Iterable[tuple[tuple[str, ...], Iterable[Rule]]]) -> dict[str, Place]:
    """Every spelling of every rule, for ``(prefixes, rules)`` groups: pattern -> place."""
    places: dict[str, Place] = {}
    for prefixes, rules in groups:
        for prefix in prefixes:
            for rule in rules:
                for place in _spellings(rule, prefix):
                    assert place.pattern not in places, f"two rules for {place.pattern}"
                    places[place.pattern] = place
    return places


def _spellings(rule: Rule, prefix: str) -> list[Place]:
    found = []
    for index, name in enumerate(rule.names):
        if not name:
            continue
        dialect = index if len(rule.names) > 1 else -1
        for kind in ("weight", "bias") if name.endswith("*") else ("",):
            targets = tuple(target.replace("*", kind) for target in rule.targets)
            found.append(Place(prefix + name.replace("*", kind), targets, prefix, dialect))
    return found


def _generalise(name: str) -> tuple[str, str]:
    """A stored name's pattern and its layer number ("" without one)."""
    layer = _LAYER.search(name)
    if layer is None:
        return name, ""
    return name[: layer.start()] + ".{i}." + name[layer.end() :], layer.group(1)


def _squeezed(shape: Shape) -> Shape:
    """Leading dimensions of 1 do not count: (1, 1, C) is (C,), (1, N, C) is (N, C)."""
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape


class _Report:
    """What does not fit, listed whole: the first names of each kind and how many more."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, text: str) -> None:
        self.found[kind].append(text)

    def raise_if_any(self, architecture: str) -> None:
        if not self.found:
            return
        parts = []
        for kind, texts in self.found.items():
            more = f" and {len(texts) - LISTED} more" if len(texts) > LISTED else ""
            parts.append(f"{len(texts)} {kind}: {', '.join(texts[:LISTED])}{more}")
        raise CheckpointError(f"tensors do not fit {architecture}: {'; '.join(parts)}")


def map_names(
    tensors: Mapping[str, TensorEntry],
    shapes: Mapping[str, Shape],
    places: Mapping[str, Place],
    unused: Callable[[str], bool],
    architecture: str,
) -> dict[str, Source]:
    """Canonical name -> source for every name of ``shapes``.

    ``unused`` says of a canonical name that this architecture has no use for it.
    Raises one CheckpointError listing all missing, unexpected, duplicated, misshaped and wrongly
    typed names.
    """
    report = _Report()
    stored: dict[str, list[str]] = defaultdict(list)
    sources: dict[str, Source] = {}
    styles: Counter[str | int] = Counter()
    for name, entry in tensors.items():
        pattern, layer = _generalise(name)
        place = places.get(pattern)
        if place is None:
            report.add("unexpected", name)
            continue
        styles.update((place.prefix, place.dialect))
        targets = [target.replace("{i}", layer) for target in place.targets]
        if all(map(unused, targets)):
            continue
        if not all(target in shapes for target in targets):
            report.add("unexpected", name)
            continue
        for target in targets:
            stored[target].append(name)
        sources.update(_take(entry, targets, shapes, report))
    for target, names in stored.items():
        if len(names) > 1:
            report.add("duplicated", f"{' and '.join(names)} (both are {target})")
    missing = [target for target in shapes if target not in stored]
    for name in dict.fromkeys(_spell(target, places, styles) for target in missing):
        report.add("missing", name)
    report.raise_if_any(architecture)
    return sources


def _take(
    entry: TensorEntry, targets: list[str], shapes: Mapping[str, Shape], report: _Report
) -> dict[str, Source]:
    """The sources that one stored tensor is, once its dtype and shape are checked."""
    if entry.dtype not in SAFETENSORS:
        dtypes = " or ".join(SAFETENSORS)
        report.add("of another dtype", f"{entry.name}: got {entry.dtype}, wanted {dtypes}")
    if len(targets) == 1:
        wanted = shapes[targets[0]]
        if _squeezed(entry.shape) != _squeezed(wanted):
            report.add("misshaped", f"{entry.name}: got {entry.shape}, wanted {wanted}")
        return {targets[0]: Source(entry)}
    rows, *rest = shapes[targets[0]]
    wanted = (rows * len(targets), *rest)
    if entry.shape != wanted:
        report.add("misshaped", f"{entry.name}: got {entry.shape}, wanted {wanted}")
    return {
        target: Source(entry, rows=(part * rows, (part + 1) * rows))
        for part, target in enumerate(targets)
    }


def _spell(target: str, places: Mapping[str, Place], styles: Counter[str | int]) -> str:
    """The stored name a missing tensor would have, in the prefix and dialect of the others."""
    pattern, layer = _generalise(target)
    rivals = [place for place in places.values() if pattern in place.targets]
    best = max(
        rivals,
        key=lambda place: (styles[place.prefix], place.dialect >= 0 and styles[place.dialect]),
    )
    return best.pattern.replace("{i}", layer)
