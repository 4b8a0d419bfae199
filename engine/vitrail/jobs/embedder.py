"""Who computes the rows of a job: `Embedder`, and the embedder of a model in this process.

A job cuts its inputs into chunks and hands them to an embedder, which gives the rows of each chunk
in the same order. A chunk is computed by one call of the model, so the bits of a job depend on its
chunks and not on the embedder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from vitrail._version import __version__
from vitrail.errors import InputError
from vitrail.jobs.listing import Source
from vitrail.jobs.rows import EmbeddingRows, EmbedOptions

if TYPE_CHECKING:
    from vitrail.model.model import Model

IMAGES_PER_CALL = 256  # without a batch size: four batches of decoded images
BATCHES_PER_CALL = 4  # with a batch size: the model decodes a batch while it computes another


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a job records of a model; ``name`` is `Model.name`, ``width`` of image embeddings."""

    name: str
    revision: str | None
    fingerprint: str
    precision: str
    width: int


class Embedder(Protocol):
    """Computes the rows of a job."""

    @property
    def facts(self) -> ModelFacts:
        """The facts of the model. Raises InputError if it has no image tower."""

    def rows(
        self, chunks: Iterable[Sequence[Source]], options: EmbedOptions
    ) -> Iterator[EmbeddingRows]:
        """The rows of each chunk, in order. ``chunks`` is read lazily, a few chunks ahead."""


@dataclass(frozen=True, slots=True)
class ModelEmbedder:
    """Embeds with a model of this process."""

    model: Model

    @property
    def facts(self) -> ModelFacts:
        return model_facts(self.model)

    def rows(
        self, chunks: Iterable[Sequence[Source]], options: EmbedOptions
    ) -> Iterator[EmbeddingRows]:
        for chunk in chunks:
            yield embed_chunk(self.model, chunk, options)


def cut_chunks(sources: Sequence[Source], options: EmbedOptions) -> Iterator[Sequence[Source]]:
    """A few batches per chunk, so that memory never holds the pixels of all images."""
    batch_size = options.batch_size
    step = BATCHES_PER_CALL * batch_size if batch_size else IMAGES_PER_CALL
    for start in range(0, len(sources), step):
        yield sources[start : start + step]


def embed_chunk(model: Model, chunk: Sequence[Source], options: EmbedOptions) -> EmbeddingRows:
    """The rows of ``chunk``, by one call of ``model``."""
    result = model.encode_image(
        chunk,
        batch_size=options.batch_size,
        size=options.size,
        normalize=options.normalize,
        on_error="skip",
    )
    errors: list[str | None] = [None] * len(chunk)
    for position, reason in result.errors.items():
        errors[position] = reason.removeprefix(f"image {position}: ")
    return EmbeddingRows(chunk, errors, result.embeddings.numpy())


def model_facts(model: Model) -> ModelFacts:
    """The facts of ``model``. Raises InputError if it has no image tower."""
    vision = model.spec.vision
    if vision is None:
        raise InputError(
            f"{model.spec.architecture} has no image tower, wanted one to embed images"
        )
    return ModelFacts(
        model.name, model.revision, model.fingerprint, model.precision, vision.embedding
    )


def describe_run(embedder: Embedder, options: EmbedOptions) -> dict[str, Any]:
    """The model and the settings that decide the numbers, ready for JSON."""
    facts = embedder.facts
    return {
        "vitrail": __version__,
        "model": facts.name,
        "revision": facts.revision,
        "fingerprint": facts.fingerprint,
        "compute_dtype": facts.precision,
        "size": list(options.size) if options.size else None,
        "normalized": options.normalize,
        "width": facts.width,
        "dtype": options.precision,
    }
