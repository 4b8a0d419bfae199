"""The rows of a job: numbers for each readable image, else a reason; its options and counts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vitrail.errors import InputError
from vitrail.jobs.listing import Source
from vitrail.jobs.shards import WHOLE, Shard

Precision = Literal["float32", "float16"]
Layout = Literal["parquet", "npy"]
Floats = npt.NDArray[np.float32]

REASONS = 5  # failures that a summary quotes


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """Everything except the inputs that decides the stored numbers and files.

    An output folder alone has a ``layout``, parts of ``part_size`` inputs, a ``shard`` that says
    which parts this run writes, and a limit: ``stop_after`` consecutive failures among them stop
    the run (0: never). ``size`` is (height, width) in pixels.

    Raises InputError if one shard of several asks to ``overwrite``, which deletes all parts.
    """

    layout: Layout = "parquet"
    precision: Precision = "float32"
    part_size: int = 4096
    batch_size: int | None = None
    size: tuple[int, int] | None = None
    normalize: bool = False
    stop_after: int = 100
    overwrite: bool = False
    shard: Shard = WHOLE

    def __post_init__(self) -> None:
        if self.overwrite and self.shard.count > 1:
            raise InputError(
                f"overwrite: got it with shard {self.shard}, which must not delete the parts of "
                "other shards; delete the folder yourself, then start the shards without it"
            )


@dataclass(frozen=True, slots=True)
class EmbeddingRows:
    """Consecutive inputs. If ``errors[i]`` is None, input i has the next row of ``embeddings``."""

    sources: Sequence[Source]
    errors: Sequence[str | None]
    embeddings: Floats  # (inputs without error, D)


@dataclass(slots=True)
class Summary:
    """Counts of inputs; ``reasons`` quotes the first few failures as (source, reason)."""

    inputs: int = 0
    failed: int = 0
    reasons: list[tuple[Source, str]] = field(default_factory=list)

    def add(self, rows: EmbeddingRows) -> None:
        failures = [(s, e) for s, e in zip(rows.sources, rows.errors, strict=True) if e is not None]
        self.inputs += len(rows.sources)
        self.failed += len(failures)
        self.reasons += failures[: REASONS - len(self.reasons)]

    @property
    def embedded(self) -> int:
        return self.inputs - self.failed

    def to_dict(self) -> dict[str, Any]:
        """The counts, ready for JSON."""
        return {"inputs": self.inputs, "embedded": self.embedded, "failed": self.failed}

    def __str__(self) -> str:
        return f"embedded {self.embedded} of {self.inputs} images"


def narrow(rows: EmbeddingRows, precision: Precision) -> npt.NDArray[Any]:
    """The embeddings in their stored precision; InputError if a value exceeds float16's range."""
    if precision == "float32":
        return rows.embeddings
    with np.errstate(over="ignore"):
        values = rows.embeddings.astype(np.float16)
    if not np.isfinite(values).all():
        largest = float(np.abs(rows.embeddings).max())
        raise InputError(f"float16 output: got an embedding value of {largest:.4g}, wanted < 65504")
    return values
