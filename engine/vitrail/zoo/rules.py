"""Stored tensor names -> canonical names, by table: all names are mapped, or it is an error."""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from vitrail.checkpoint.tensors import Source, TensorEntry
from vitrail.dtypes import SAFETENSORS
from vitrail.errors import CheckpointError
from vitrail.spec import Shape

LISTED = 20

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class NameRule:
    """A row of a name table: stored names, and the canonical names that they stand for.

    ``names``: one for each dialect, that is the names of a transformers version, oldest first (""
    if a dialect has no such name; a single name serves every dialect). ``{i}`` stands for a layer
    number, a final ``*`` for both ``weight`` and ``bias``. The rows of the tensor are split evenly
    over the targets; a tensor without targets is ignored.
    """

    names: tuple[str, ...]
    targets: tuple[str, ...] = ()


Groups = tuple[tuple[tuple[str, ...], tuple[NameRule, ...]], ...]
"""(prefixes, rules): every rule applies under each of the prefixes."""


def copy(target: str, *names: str) -> NameRule:
    return NameRule(names, (target,))


def ignore(*names: str) -> NameRule:
    return NameRule(names)


@dataclass(frozen=True, slots=True)
class NamePattern:
    """A stored name of a rule, with ``{i}`` for the layer, and the canonical names it stands for.

    ``dialect`` is -1 if the name is the same in all dialects.
    """

    pattern: str
    targets: tuple[str, ...]
    prefix: str
    dialect: int


def expand(groups: Groups) -> dict[str, NamePattern]:
    """Every stored name of every rule, by pattern."""
    patterns: dict[str, NamePattern] = {}
    for prefixes, rules in groups:
        for prefix, rule in itertools.product(prefixes, rules):
            for row in _patterns(rule, prefix):
                assert row.pattern not in patterns, f"two rules for {row.pattern}"
                patterns[row.pattern] = row
    return patterns


def _patterns(rule: NameRule, prefix: str) -> Iterable[NamePattern]:
    for index, name in enumerate(rule.names):
        if not name:
            continue
        dialect = index if len(rule.names) > 1 else -1
        for suffix in ("weight", "bias") if name.endswith("*") else ("",):
            targets = tuple(target.replace("*", suffix) for target in rule.targets)
            yield NamePattern(prefix + name.replace("*", suffix), targets, prefix, dialect)


def _generalize(name: str) -> tuple[str, str]:
    """The pattern of a stored name and its layer number ("" if the name has no number)."""
    layer = _LAYER.search(name)
    if layer is None:
        return name, ""
    return name[: layer.start()] + ".{i}." + name[layer.end() :], layer.group(1)


def squeezed(shape: Shape) -> Shape:
    """``shape`` without leading dimensions of 1: (1, 1, C) gives (C,), (1, N, C) gives (N, C)."""
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape


def listing(faults: Mapping[str, list[str]]) -> str:
    """A clause for each fault: its first `LISTED` names, and the number of the others."""
    clauses = []
    for fault, names in faults.items():
        rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        clauses.append(f"{len(names)} {fault}: {', '.join(names[:LISTED])}{rest}")
    return "; ".join(clauses)


def map_names(
    tensors: Mapping[str, TensorEntry],
    shapes: Mapping[str, Shape],
    patterns: Mapping[str, NamePattern],
    unused: Callable[[str], bool],
    architecture: str,
    explain: Callable[[Mapping[str, Shape]], Iterable[str]] = lambda _: (),
) -> dict[str, Source]:
    """Canonical name -> source for every name of ``shapes``.

    ``unused`` tells whether this architecture has no use for a canonical name. Raises a
    CheckpointError that lists all missing, unexpected, duplicated, misshaped and wrongly typed
    names. The list follows the sentences that ``explain`` gives for the stored shapes by canonical
    name.
    """
    faults: dict[str, list[str]] = defaultdict(list)
    stored: dict[str, list[str]] = defaultdict(list)
    entries: dict[str, TensorEntry] = {}
    sources: dict[str, Source] = {}
    styles: Counter[str | int] = Counter()  # the number of names by prefix, and by dialect
    for name, entry in tensors.items():
        pattern, layer = _generalize(name)
        row = patterns.get(pattern)
        if row is None:
            faults["unexpected"].append(name)
            continue
        styles.update((row.prefix, row.dialect))
        targets = [target.replace("{i}", layer) for target in row.targets]
        if all(map(unused, targets)):
            continue
        if len(targets) == 1:
            entries[targets[0]] = entry
        if not all(target in shapes for target in targets):
            faults["unexpected"].append(name)
            continue
        for target in targets:
            stored[target].append(name)
        sources.update(_take(entry, targets, shapes, faults))
    for target, names in stored.items():
        if len(names) > 1:
            faults["duplicated"].append(f"{' and '.join(names)} (both are {target})")
    missing = [_spell(target, patterns, styles) for target in shapes if target not in stored]
    if missing:
        faults["missing"] = list(dict.fromkeys(missing))
    if faults:
        reasons = explain({name: squeezed(entry.shape) for name, entry in entries.items()})
        summary = f"tensors do not fit {architecture}: {listing(faults)}"
        raise CheckpointError("; ".join([*reasons, summary]))
    return sources


def _take(
    entry: TensorEntry,
    targets: list[str],
    shapes: Mapping[str, Shape],
    faults: dict[str, list[str]],
) -> dict[str, Source]:
    """The source of each target in a stored tensor; a wrong dtype or shape goes to ``faults``."""
    if entry.dtype not in SAFETENSORS:
        dtypes = " or ".join(SAFETENSORS)
        faults["of another dtype"].append(f"{entry.name}: got {entry.dtype}, wanted {dtypes}")
    shape = shapes[targets[0]]
    sources = {targets[0]: Source(entry)}
    fits = squeezed(entry.shape) == squeezed(shape)
    if len(targets) > 1:
        rows = shape[0]
        shape = (rows * len(targets), *shape[1:])
        fits = entry.shape == shape
        sources = {
            target: Source(entry, rows=(index * rows, (index + 1) * rows))
            for index, target in enumerate(targets)
        }
    if not fits:
        faults["misshaped"].append(f"{entry.name}: got {entry.shape}, wanted {shape}")
    return sources


def _spell(target: str, patterns: Mapping[str, NamePattern], styles: Counter[str | int]) -> str:
    """The stored name that a missing tensor would have, in the prefix and dialect of the others."""
    pattern, layer = _generalize(target)
    rows = (row for row in patterns.values() if pattern in row.targets)
    likeliest = max(
        rows, key=lambda row: (styles[row.prefix], row.dialect >= 0 and styles[row.dialect])
    )
    return likeliest.pattern.replace("{i}", layer)
