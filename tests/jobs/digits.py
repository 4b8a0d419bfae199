"""A job over a fake model, which embeds numbers quickly; for tests of folders and shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vitrail.jobs.embedder import ModelEmbedder
from vitrail.jobs.folder import embed_to_folder
from vitrail.jobs.rows import EmbedOptions
from vitrail.model.outputs import EncodeResult

WIDTH = 6
INPUTS = 50
BAD = {3, 17, 18, 40}


class Digits:
    """Embeds "17.jpg" as numbers made from 17; the inputs in BAD fail. Counts what it is asked."""

    name, revision, precision = "some/model", None, "float32"
    spec = SimpleNamespace(architecture="Fake", vision=SimpleNamespace(embedding=WIDTH))

    def __init__(self, fingerprint: str = "f00d", bad: frozenset[int] = frozenset(BAD)) -> None:
        self.fingerprint, self.bad = fingerprint, bad
        self.asked: list[int] = []

    def encode_image(self, images: Sequence[Any], **options: Any) -> EncodeResult:
        numbers = [int(Path(str(image)).stem) for image in images]
        self.asked += numbers
        errors = {
            i: f"image {i}: {n}.jpg: empty: 0 bytes" for i, n in enumerate(numbers) if n in self.bad
        }
        index = tuple(i for i in range(len(numbers)) if i not in errors)
        return EncodeResult(torch.tensor(vectors(numbers[i] for i in index)), index, errors)


def vectors(numbers: Any) -> Any:
    rows = [[n, n * n / 7, -n, 1 / (n + 3), 0.1 * n, 5] for n in numbers]
    return np.array(rows, np.float32).reshape(-1, WIDTH)


SOURCES = [f"photos/{n}.jpg" for n in range(INPUTS)]
GOOD = [n for n in range(INPUTS) if n not in BAD]


def files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def data_files(out: Path) -> dict[str, bytes]:
    """Everything that readers see, and the job record."""
    return {
        name: data
        for name, data in files(out).items()
        if not name.startswith("_") or name == "_job.json"
    }


def failing(code: int) -> Callable[..., Any]:
    """A function of the file system that fails with the errno ``code``."""

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def run(out: Path, model: Any = None, sources: Sequence[Any] = SOURCES, **options: Any) -> Any:
    progress = options.pop("progress", lambda done: None)
    chosen = EmbedOptions(**{"part_size": 8, **options})
    return embed_to_folder(ModelEmbedder(model or Digits()), sources, out, chosen, progress)
