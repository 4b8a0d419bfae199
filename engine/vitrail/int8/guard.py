"""The guard of INT8: rules for the figures of a candidate, and the verdict that users read.

*Integrity* holds on any pictures: the device computes as the references do, and no linear has lost
a scale. A model that breaks a rule of integrity is refused.

*Accuracy* is that of the embeddings, and is judged by the mean centered cosine. On eight sets of
300 or 512 pictures (photographs, digits, textiles, with four recipes) this figure alone follows the
neighbors kept on a single curve: 0.999 is about 95 % of ten, 0.997 about 91 %, 0.992 about 86 %.
The plain cosine does not: textiles that look alike keep 86 % at 0.9999. So accuracy on somebody
else's pictures says nothing about a user's own, and the verdict then says so. If accuracy is too
low, linears fall back to 16 bits in the order of their SQNR, the lowest first.

Nothing here reads a file or computes a model.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from vitrail.errors import refusal, show
from vitrail.int8.figures import Accuracy, Integrity, LinearFigures
from vitrail.spec import BlockSpec

Verdict = Literal["good", "warned", "refused", "not verified on your data"]
NOT_VERIFIED: Verdict = "not verified on your data"

EXIT_CODES: Mapping[Verdict, int] = {"good": 0, "refused": 1, "warned": 3, NOT_VERIFIED: 3}
"""Exit codes of the commands that report a verdict."""

GOOD = 0.999
"""Mean centered cosine from which a model is good."""
LOWEST = 0.997
"""Mean centered cosine below which linears fall back. Among 20 recipes and planted faults, 7
harmless and 13 harmful, a cut from 0.9971 to 0.9979 separates both kinds without an error."""
EXPECTED = "of the ten nearest neighbors of a picture, expect 87 to 95 % to stay"
"""The neighbors kept between `LOWEST` and `GOOD`: 87.0 % among 300 textiles at 0.9970."""
MIN_PICTURES = 64
"""The separation at `LOWEST` was measured with the mean over this many pictures."""
NEIGHBOR_PICTURES = 512
"""Fewer pictures are so far apart that harmful faults keep up to 95.5 % of the neighbors."""
MIN_NEIGHBORS = 0.95
LAYER_GAIN = 0.002
"""Sound linears have at most 0.00072, and 0.00104 on noise; a scale 3 % off has 0.03."""
CHANNEL_GAIN = 0.15
"""Sound linears have at most 0.082, and 0.12 on pictures of a single color; a row whose scale is
doubled has 1, GELU clipped at 3 has 0.22. No embedding shows the first of them."""
CODE_SHARE = 0.001
"""The share of codes that may differ from the exact ones, by 1: sums in fp32 move values over the
border between two codes that seldom."""
FALLBACK_SHARE = 1 / 3
"""The share of the FLOPs in int8 that may fall back; with less left, 16 bits are hardly slower."""
KEEP = "if it has outliers that int8 cannot hold, leave it in 16 bits: --keep-fp16 NAME"


class Measurement(NamedTuple):
    """The figures of a candidate; those of its linears by name, such as "3.up"."""

    accuracy: Accuracy
    integrity: Integrity
    linears: Mapping[str, LinearFigures]


@dataclass(frozen=True, slots=True)
class GuardReport:
    """The verdict, the ``reasons`` for it, and the figures.

    ``own``: the pictures were the user's own. ``fallbacks``: the linears that went back to 16 bits,
    each with the reason. ``linears``: the figures of those that are int8.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    own: bool
    accuracy: Accuracy
    integrity: Integrity
    linears: Mapping[str, LinearFigures]
    fallbacks: Mapping[str, str] = field(default_factory=dict)

    @property
    def int8(self) -> tuple[str, ...]:
        """The names of the linears that are int8."""
        return tuple(self.linears)

    def lines(self) -> Iterator[tuple[str, str]]:
        """The report in words: (topic, text) pairs."""
        reasons = f": {'; '.join(self.reasons)}" if self.reasons else ""
        yield "verdict", f"{self.verdict}{reasons}"
        yield from accuracy_lines(self.accuracy, self.own)
        yield "integrity", integrity_text(self.integrity)
        if self.linears:
            yield "worst linears", linears_text(self.linears)
        for name, reason in self.fallbacks.items():
            yield f"{name} in 16 bits", reason

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "own": self.own,
            "accuracy": self.accuracy.to_dict(),
            "integrity": self.integrity.to_dict(),
            "linears": {name: figures.to_dict() for name, figures in self.linears.items()},
            "fallbacks": dict(self.fallbacks),
        }

    @classmethod
    def from_dict(cls, values: object, location: str) -> "GuardReport":
        """The inverse of `to_dict`. Raises CheckpointError, which begins with ``location``, for
        another key, a missing key, or a value of another type."""
        keys = tuple(cls.__dataclass_fields__)
        if not isinstance(values, dict) or set(values) != set(keys):
            raise refusal(location, show(values), f"an object with the keys {', '.join(keys)}")
        verdict, reasons, own = values["verdict"], values["reasons"], values["own"]
        linears, fallbacks = values["linears"], values["fallbacks"]
        for name, value, holds, wanted in (
            ("verdict", verdict, verdict in tuple(EXIT_CODES), f"one of {tuple(EXIT_CODES)}"),
            ("reasons", reasons, _are_strings(reasons), "a list of strings"),
            ("own", own, isinstance(own, bool), "true or false"),
            ("linears", linears, isinstance(linears, dict), "an object"),
            ("fallbacks", fallbacks, _are_reasons(fallbacks), "an object of strings"),
        ):
            if not holds:
                raise refusal(f"{location}: {name}", show(value), wanted)
        return cls(
            verdict,
            tuple(reasons),
            own,
            Accuracy.from_dict(values["accuracy"], f"{location}: accuracy"),
            Integrity.from_dict(values["integrity"], f"{location}: integrity"),
            {
                name: LinearFigures.from_dict(figures, f"{location}: linears: {name}")
                for name, figures in linears.items()
            },
            fallbacks,
        )


def integrity_faults(exact: Integrity, linears: Mapping[str, LinearFigures]) -> Iterator[str]:
    """The broken rules of integrity, in words. A figure that is NaN breaks its rule."""
    if exact.wrong_sums or not exact.sums:
        yield f"{exact.wrong_sums} of {exact.sums:,} integer sums are wrong, wanted every sum exact"
    if exact.bad_scales:
        yield f"{exact.bad_scales} scales are not finite or not above zero"
    if exact.code_difference > 1 or not exact.codes:
        yield f"of {exact.codes:,} codes one differs by {exact.code_difference}, wanted at most 1"
    if exact.differing_codes > CODE_SHARE * exact.codes:
        share = f"{exact.differing_codes / exact.codes:.2%}"
        yield f"{share} of the codes differ, wanted at most {CODE_SHARE:.1%}"
    for name, figures in linears.items():
        for label, gain, limit in (
            ("gain", figures.layer_gain, LAYER_GAIN),
            ("gain of a channel", figures.channel_gain, CHANNEL_GAIN),
        ):
            if not gain <= limit:
                yield f"{name}: {label} is {gain:.2%} off, wanted at most {limit:.1%}"


def judge(
    measurement: Measurement, *, own: bool, good: float = GOOD
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict on a candidate, and the reasons if it is not "good".

    ``own``: the pictures are the user's own, and none was used for calibration. ``good``: the mean
    centered cosine from which a model is good.
    """
    faults = tuple(integrity_faults(measurement.integrity, measurement.linears))
    if faults:
        return "refused", faults
    figures = measurement.accuracy
    mean = f"mean centered cosine {_rounded_down(figures.centered_mean)}"
    if not figures.centered_mean >= min(LOWEST, good):
        return "refused", (f"{mean}, wanted at least {min(LOWEST, good)}",)
    if not own:
        return NOT_VERIFIED, ("the pictures are not yours: give your own",)
    if figures.pictures < MIN_PICTURES:
        return NOT_VERIFIED, (f"{figures.pictures} pictures, wanted at least {MIN_PICTURES}",)
    if not figures.centered_mean >= good:
        return "warned", (f"{mean}, good from {good}", EXPECTED)
    if figures.pictures >= NEIGHBOR_PICTURES and not figures.top10 >= MIN_NEIGHBORS:
        kept = f"{figures.top10:.1%} of the ten nearest neighbors stay"
        return "warned", (f"{kept}, good from {MIN_NEIGHBORS:.0%}",)
    return "good", ()


def find_safe(
    blocks: BlockSpec,
    start: tuple[str, ...],
    measure: Callable[[tuple[str, ...]], Measurement],
    *,
    own: bool,
    good: float = GOOD,
) -> GuardReport:
    """The verdict on the int8 linears ``start``, or on those of them that do not fall back.

    ``measure`` computes the candidate whose int8 linears have the given names. ``own`` and
    ``good``: see `judge`. A broken rule of integrity is refused at once: it is a fault, or a linear
    with outliers that int8 cannot hold, which the user may leave in 16 bits.
    """
    budget = FALLBACK_SHARE * sum(_macs(blocks, name) for name in start)
    int8, fallbacks = start, dict[str, str]()
    measurement = measure(int8)
    linears = measurement.linears
    while True:
        verdict, reasons = judge(measurement, own=own, good=good)
        if verdict != "refused":
            break
        if any(integrity_faults(measurement.integrity, measurement.linears)):
            if not any(integrity_faults(measurement.integrity, {})):
                reasons = (*reasons, KEEP)
            break
        names = _next_fallbacks(int8, linears)
        budget -= sum(_macs(blocks, name) for name in names)
        if budget < 0:
            limit = "falling back further would leave less than two thirds of the FLOPs in int8"
            reasons = (*reasons, limit)
            break
        before = f"mean centered cosine with it {measurement.accuracy.centered_mean:.5f}"
        for name in names:
            fallbacks[name] = f"{linears[name].sqnr:.1f} dB; {before}"
        int8 = tuple(name for name in int8 if name not in names)
        measurement = measure(int8)
    figures = {name: linears[name] for name in int8}
    return GuardReport(
        verdict, reasons, own, measurement.accuracy, measurement.integrity, figures, fallbacks
    )


def accuracy_lines(figures: Accuracy, own: bool) -> Iterator[tuple[str, str]]:
    """The figures in words: (topic, text) pairs. ``own``: the pictures are the user's."""
    whose = "of your own pictures" if own else "pictures that are not yours"
    yield (
        "centered cosine",
        f"mean {figures.centered_mean:.5f}, 1st percentile {figures.centered_p1:.5f}, worst "
        f"{figures.centered_worst:.5f}, on {figures.pictures} {whose}",
    )
    yield (
        "cosine",
        f"mean {figures.cosine_mean:.5f}, 1st percentile {figures.cosine_p1:.5f}, worst "
        f"{figures.cosine_worst:.5f}; signal over error {figures.sqnr:.1f} dB",
    )
    text = f"nearest {figures.top1:.1%}, ten nearest {figures.top10:.1%}"
    if figures.pictures < NEIGHBOR_PICTURES:
        text += f"; under {NEIGHBOR_PICTURES} pictures this is no evidence"
    yield "neighbors kept", text


def integrity_text(exact: Integrity) -> str:
    """The counts in words."""
    return (
        f"{exact.wrong_sums} of {exact.sums:,} integer sums are wrong, {exact.differing_codes} of "
        f"{exact.codes:,} codes differ by at most {exact.code_difference}, {exact.bad_scales} "
        "scales are bad"
    )


def linears_text(linears: Mapping[str, LinearFigures]) -> str:
    """The linear with the lowest SQNR, and those with the largest gains."""
    lowest = min(linears, key=lambda name: linears[name].sqnr)
    layer = max(linears, key=lambda name: linears[name].layer_gain)
    channel = max(linears, key=lambda name: linears[name].channel_gain)
    return (
        f"{len(linears)} in int8; lowest {linears[lowest].sqnr:.1f} dB ({lowest}), largest gain "
        f"{linears[layer].layer_gain:.3%} ({layer}), of a channel "
        f"{linears[channel].channel_gain:.2%} ({channel})"
    )


def _rounded_down(cosine: float) -> str:
    """With five digits; a cosine just below a limit is not shown as the limit."""
    return f"{math.floor(cosine * 1e5) / 1e5 if math.isfinite(cosine) else cosine:.5f}"


def _next_fallbacks(int8: tuple[str, ...], linears: Mapping[str, LinearFigures]) -> tuple[str, ...]:
    """The linear of the lowest SQNR. An up projection takes its down projection along, because
    only an int8 up projection writes the codes that an int8 down projection reads."""
    lowest = min(int8, key=lambda name: linears[name].sqnr)
    down = lowest.replace(".up", ".down")
    return (lowest, down) if down != lowest and down in int8 else (lowest,)


def _macs(blocks: BlockSpec, name: str) -> int:
    """Multiplications of a linear, a token."""
    linear = name.partition(".")[2]
    if linear == "qkv":
        return 3 * blocks.width**2
    return blocks.width * blocks.mlp * (2 if linear == "up" and blocks.gated else 1)


def _are_strings(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _are_reasons(values: object) -> bool:
    return isinstance(values, dict) and all(isinstance(value, str) for value in values.values())
