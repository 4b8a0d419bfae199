"""The figures that the guard of INT8 judges, as frozen values that int8.json keeps."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from vitrail.errors import refusal, show


class _Figures:
    """Figures to plain values, and back from the values of a JSON object."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def from_dict(cls, values: object, location: str) -> Self:
        """Raises CheckpointError, which begins with ``location``, unless ``values`` is an object
        with exactly the fields of this class, each an integer or a finite number as declared."""
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        names = ", ".join(fields)
        if not isinstance(values, Mapping) or set(values) != set(fields):
            raise refusal(location, show(values), f"an object with the keys {names}")
        for name, value in values.items():
            _check_number(value, fields[name].type, f"{location}: {name}")
        return cls(**{name: fields[name].type(value) for name, value in values.items()})  # type: ignore[operator]


def _check_number(value: object, wanted: object, location: str) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if wanted is int and not is_integer:
        raise refusal(location, show(value), "an integer")
    is_finite = (is_integer or isinstance(value, float)) and math.isfinite(float(value))  # type: ignore[arg-type]
    if not is_finite:
        raise refusal(location, show(value), "a finite number")


@dataclass(frozen=True, slots=True)
class Accuracy(_Figures):
    """How like the reference the embeddings of ``pictures`` pictures are.

    ``p1`` is the 1st percentile. Centered: less the mean of all reference embeddings. ``top1`` and
    ``top10``: the share of each picture's nearest pictures that stay among the nearest; centered.
    ``sqnr``: signal over error of all embeddings, in dB.
    """

    pictures: int
    cosine_mean: float
    cosine_p1: float
    cosine_worst: float
    centered_mean: float
    centered_p1: float
    centered_worst: float
    top1: float
    top10: float
    sqnr: float


@dataclass(frozen=True, slots=True)
class LinearFigures(_Figures):
    """How an int8 linear compares with the 16-bit or 32-bit linear on the same inputs.

    ``sqnr`` in dB; gains are |<y, r> / <r, r> - 1|, of the layer and of its worst channel (see
    `vitrail.int8.similarity.ChannelSums`).
    """

    sqnr: float
    layer_gain: float
    channel_gain: float


@dataclass(frozen=True, slots=True)
class Integrity(_Figures):
    """What the device that serves computed, against exact references on the same inputs.

    ``sums`` integer sums, of which ``wrong_sums`` differ. ``codes`` codes, of which
    ``differing_codes`` differ, by at most ``code_difference``. ``bad_scales``: scales that are not
    finite, or not above zero.
    """

    sums: int
    wrong_sums: int
    codes: int
    differing_codes: int
    code_difference: int
    bad_scales: int
