"""Embeds listed images batch by batch: a row of numbers for each readable image, else a reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from vitrail._version import __version__
from vitrail.errors import InputError
from vitrail.jobs.listing import Source

if TYPE_CHECKING:
    from vitrail.model.model import Model

Precision = Literal["float32", "float16"]
Layout = Literal["parquet", "npy"]
Floats = npt.NDArray[np.float32]

IMAGES_PER_CALL = 256  # without a batch size: four batches of decoded images
BATCHES_PER_CALL = 4  # with a batch size: the model decodes a batch while it computes another
REASONS = 5  # failures that a summary quotes


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """Everything except the inputs that decides the stored numbers and files.

    An output folder alone has a ``layout``, parts of ``part_size`` inputs, and a limit:
    ``stop_after`` consecutive failures stop its job (0: never). ``size`` is (height, width) in
    pixels.
    """

    layout: Layout = "parquet"
    precision: Precision = "float32"
    part_size: int = 4096
    batch_size: int | None = None
    size: tuple[int, int] | None = None
    normalize: bool = False
    stop_after: int = 100
    overwrite: bool = False


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


def embed_images(
    model: Model, sources: Sequence[Source], options: EmbedOptions
) -> Iterator[EmbeddingRows]:
    """Embeds a few batches per call, so that memory never holds the pixels of all images."""
    batch_size = options.batch_size
    step = BATCHES_PER_CALL * batch_size if batch_size else IMAGES_PER_CALL
    for start in range(0, len(sources), step):
        batch = sources[start : start + step]
        result = model.encode_image(
            batch,
            batch_size=batch_size,
            size=options.size,
            normalize=options.normalize,
            on_error="skip",
        )
        errors: list[str | None] = [None] * len(batch)
        for position, reason in result.errors.items():
            errors[position] = reason.removeprefix(f"image {position}: ")
        yield EmbeddingRows(batch, errors, result.embeddings.numpy())


def describe_run(model: Model, options: EmbedOptions) -> dict[str, Any]:
    """The model and the settings that decide the numbers, ready for JSON."""
    vision = model.spec.vision
    if vision is None:
        raise InputError(
            f"{model.spec.architecture} has no image tower, wanted one to embed images"
        )
    return {
        "vitrail": __version__,
        "model": model.source,
        "revision": model.revision,
        "fingerprint": model.fingerprint,
        "compute_dtype": model.precision,
        "size": list(options.size) if options.size else None,
        "normalized": options.normalize,
        "width": vision.embedding,
        "dtype": options.precision,
    }


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
