"""Configurations and tensor names of published checkpoints, without weights.

Each JSON file: ``id``; ``source``, which says of ``config``, ``preprocessor`` and ``tensors``
whether it is as published or reconstructed from what is known of the checkpoint; ``note``; and the
three themselves. Braces shorten tensor names: ``{0..11}``, ``{weight,bias}``. A key ``"0..999"`` of
``id2label`` stands for the labels of all these numbers.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitrail.checkpoint.files import Checkpoint
from vitrail.checkpoint.tensors import TensorEntry

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I8": 1}


def _choices(braces: str) -> list[str]:
    span = re.fullmatch(r"(\d+)\.\.(\d+)", braces)
    if span is None:
        return braces.split(",")
    return [str(number) for number in range(int(span[1]), int(span[2]) + 1)]


def expand(pattern: str) -> list[str]:
    """Every name that a pattern with braces stands for."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    lists = [_choices(part) if odd % 2 else [part] for odd, part in enumerate(parts)]
    return ["".join(pieces) for pieces in itertools.product(*lists)]


def fake(
    config: Mapping[str, Any],
    tensors: Mapping[str, tuple[str, Sequence[int]]],
    preprocessor: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """A checkpoint of these configurations and tensor headers, in no file."""
    entries: dict[str, TensorEntry] = {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * SIZES[dtype]
        file = Path("model.safetensors")
        entries[name] = TensorEntry(name, file, dtype, tuple(shape), offset, size)
        offset += size
    return Checkpoint(
        folder=Path("folder"),
        source="folder",
        revision=None,
        config=dict(config),
        preprocessor=None if preprocessor is None else dict(preprocessor),
        tokenizer_config=None,
        tensors=entries,
    )


def read(name: str) -> dict[str, Any]:
    """One JSON file, with every shortened name written out."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    found["tensors"] = {
        full: (dtype, tuple(shape))
        for pattern, (dtype, shape) in found["tensors"].items()
        for full in expand(pattern)
    }
    labels = found["config"].get("id2label", {})
    found["config"] |= {"id2label": _written_out(labels)} if labels else {}
    return found


def _written_out(labels: Mapping[str, str]) -> dict[str, str]:
    return {
        number: label.format(number) for key, label in labels.items() for number in _choices(key)
    }


def load(name: str) -> Checkpoint:
    found = read(name)
    return fake(found["config"], found["tensors"], found["preprocessor"])
