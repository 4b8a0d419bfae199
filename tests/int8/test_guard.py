"""The rules of the guard, on figures that are given to it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from vitrail.errors import CheckpointError
from vitrail.int8 import guard
from vitrail.int8.figures import Accuracy, Integrity, LinearFigures
from vitrail.int8.guard import GuardReport, Measurement, find_safe, judge
from vitrail.spec import BlockSpec

BLOCKS = BlockSpec(width=64, layers=3, heads=2, mlp=256, activation="gelu", eps=1e-6)
LINEARS = ("0.qkv", "0.up", "0.down", "1.qkv", "1.up", "1.down", "2.qkv")
SOUND = LinearFigures(sqnr=36.0, layer_gain=0.0007, channel_gain=0.077)
EXACT = Integrity(
    sums=1000, wrong_sums=0, codes=100_000, differing_codes=100, code_difference=1, bad_scales=0
)


def _accuracy(centered: float, pictures: int = 64, top10: float = 0.96) -> Accuracy:
    return Accuracy(pictures, 0.9999, 0.999, 0.998, centered, 0.99, 0.98, 0.95, top10, 34.0)


def _measurement(centered: float = 0.9995, pictures: int = 64, top10: float = 0.96) -> Measurement:
    figures = dict.fromkeys(LINEARS, SOUND)
    return Measurement(_accuracy(centered, pictures, top10), EXACT, figures)


@pytest.mark.parametrize(
    ("centered", "verdict"),
    [
        (1.0, "good"),
        (0.999, "good"),
        (0.99899, "warned"),
        (0.997, "warned"),
        (0.99699, "refused"),
        (-1.0, "refused"),
        (math.nan, "refused"),
    ],
)
def test_the_mean_centered_cosine_decides(centered: float, verdict: str) -> None:
    assert judge(_measurement(centered), own=True)[0] == verdict


def test_a_warning_says_what_to_expect() -> None:
    _, reasons = judge(_measurement(0.998), own=True)
    assert reasons == ("mean centered cosine 0.99800, good from 0.999", guard.EXPECTED)
    assert "87 to 95 %" in guard.EXPECTED


def test_a_refusal_does_not_show_the_limit_as_what_it_found() -> None:
    _, (reason,) = judge(_measurement(0.9969999), own=True)
    assert reason == "mean centered cosine 0.99699, wanted at least 0.997"


def test_a_user_may_want_more_or_less() -> None:
    assert judge(_measurement(0.9992), own=True, good=0.9995)[0] == "warned"
    assert judge(_measurement(0.996), own=True, good=0.995)[0] == "good"
    assert judge(_measurement(0.994), own=True, good=0.995)[0] == "refused"


@pytest.mark.parametrize("pictures", [2, 63])
def test_few_pictures_verify_nothing(pictures: int) -> None:
    verdict, (reason,) = judge(_measurement(pictures=pictures), own=True)
    assert verdict == guard.NOT_VERIFIED
    assert reason == f"{pictures} pictures, wanted at least 64"


def test_pictures_of_somebody_else_verify_nothing() -> None:
    verdict, (reason,) = judge(_measurement(1.0, pictures=10_000), own=False)
    assert verdict == guard.NOT_VERIFIED == "not verified on your data"
    assert "give your own" in reason


@pytest.mark.parametrize(
    ("pictures", "top10", "verdict"),
    [(511, 0.5, "good"), (512, 0.95, "good"), (512, 0.949, "warned"), (512, math.nan, "warned")],
)
def test_neighbors_count_from_512_pictures_on(pictures: int, top10: float, verdict: str) -> None:
    assert judge(_measurement(0.9999, pictures, top10), own=True)[0] == verdict


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"wrong_sums": 1}, "sums are wrong"),
        ({"sums": 0}, "sums are wrong"),
        ({"codes": 0, "differing_codes": 0}, "of 0 codes"),
        ({"differing_codes": 101}, "codes differ"),
        ({"code_difference": 2}, "differs by 2"),
        ({"bad_scales": 1}, "1 scales are not finite"),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_inexact_computation_is_refused(change: dict[str, int], word: str, own: bool) -> None:
    broken = _measurement()._replace(integrity=dataclasses.replace(EXACT, **change))
    verdict, reasons = judge(broken, own=own)
    assert verdict == "refused"
    assert any(word in reason for reason in reasons)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"layer_gain": 0.00201}, "1.up: gain is 0.20% off"),
        ({"layer_gain": math.nan}, "1.up: gain is nan% off"),
        ({"channel_gain": 0.151}, "1.up: gain of a channel is 15.10% off"),
        ({"channel_gain": math.nan}, "1.up: gain of a channel is nan% off"),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_a_linear_that_lost_a_scale_is_refused(
    change: dict[str, float], word: str, own: bool
) -> None:
    linears = dict.fromkeys(LINEARS, SOUND) | {"1.up": dataclasses.replace(SOUND, **change)}
    broken = _measurement()._replace(linears=linears)
    verdict, (reason,) = judge(broken, own=own)
    assert verdict == "refused"
    assert reason.startswith(word)


def _model(
    needed: int, sqnr: dict[str, float], **figures: Any
) -> tuple[Callable[[tuple[str, ...]], Measurement], list[tuple[str, ...]]]:
    """A model that is good once ``needed`` linears are in 16 bits, and the candidates measured."""
    measured: list[tuple[str, ...]] = []

    def measure(names: tuple[str, ...]) -> Measurement:
        measured.append(names)
        centered = 0.9993 if len(LINEARS) - len(names) >= needed else 0.99
        values = {name: dataclasses.replace(SOUND, sqnr=sqnr.get(name, 36.0)) for name in names}
        return Measurement(_accuracy(centered), Integrity(**EXACT.to_dict() | figures), values)

    return measure, measured


def test_a_good_model_keeps_its_linears() -> None:
    measure, measured = _model(0, {})
    report = find_safe(BLOCKS, LINEARS, measure, own=True)
    assert (report.verdict, report.int8, report.fallbacks) == ("good", LINEARS, {})
    assert measured == [LINEARS]


def test_the_linear_of_the_lowest_sqnr_falls_back_first() -> None:
    measure, measured = _model(2, {"1.down": 20.0, "0.qkv": 25.0, "2.qkv": 30.0})
    report = find_safe(BLOCKS, LINEARS, measure, own=True)
    assert report.verdict == "good"
    assert list(report.fallbacks) == ["1.down", "0.qkv"]
    assert report.int8 == ("0.up", "0.down", "1.qkv", "1.up", "2.qkv")
    assert report.fallbacks["1.down"] == "20.0 dB; mean centered cosine with it 0.99000"
    assert len(measured) == 3


def test_an_up_projection_takes_its_down_projection_along() -> None:
    measure, measured = _model(2, {"0.up": 20.0, "0.down": 40.0})
    report = find_safe(BLOCKS, LINEARS, measure, own=True)
    assert report.int8 == ("0.qkv", "1.qkv", "1.up", "1.down", "2.qkv")
    assert set(report.fallbacks) == {"0.up", "0.down"}
    assert len(measured) == 2


def test_at_most_a_third_of_the_flops_falls_back() -> None:
    """qkv is 3 of 64 x 64, up and down 4: 25 in all, of which 8 may fall back."""
    measure, _ = _model(99, {"0.up": 20.0, "0.down": 21.0})
    report = find_safe(BLOCKS, LINEARS, measure, own=True)
    assert report.verdict == "refused"
    assert set(report.fallbacks) == {"0.up", "0.down"}
    assert "two thirds" in report.reasons[-1]
    measure, _ = _model(99, {"0.qkv": 20.0, "1.qkv": 21.0, "2.qkv": 22.0})
    assert len(find_safe(BLOCKS, LINEARS, measure, own=True).fallbacks) == 2


def test_a_gated_up_projection_is_twice_as_large() -> None:
    """In units of 64 x 64, qkv is 3 and up 4, or 8 if gated. A third is one qkv or two."""
    start = tuple(name for name in LINEARS if "down" not in name)
    for gated, fallen in ((False, {"0.qkv"}), (True, {"0.qkv", "1.qkv"})):
        measure, _ = _model(99, {"0.qkv": 20.0, "1.qkv": 21.0})
        blocks = dataclasses.replace(BLOCKS, gated=gated)
        assert set(find_safe(blocks, start, measure, own=True).fallbacks) == fallen


def test_pictures_of_somebody_else_make_linears_fall_back_too() -> None:
    measure, _ = _model(1, {"0.qkv": 20.0})
    report = find_safe(BLOCKS, LINEARS, measure, own=False)
    assert report.verdict == guard.NOT_VERIFIED
    assert list(report.fallbacks) == ["0.qkv"]


def test_a_fault_is_not_hidden_by_falling_back() -> None:
    measure, measured = _model(1, {}, wrong_sums=3)
    report = find_safe(BLOCKS, LINEARS, measure, own=True)
    assert report.verdict == "refused"
    assert measured == [LINEARS]
    assert report.fallbacks == {}


def test_a_linear_that_lost_a_scale_may_be_left_in_16_bits() -> None:
    def measure(names: tuple[str, ...]) -> Measurement:
        linears = dict.fromkeys(names, SOUND) | {"1.up": dataclasses.replace(SOUND, layer_gain=0.1)}
        return _measurement()._replace(linears=linears)

    report = find_safe(BLOCKS, LINEARS, measure, own=True)
    assert report.verdict == "refused"
    assert report.reasons == ("1.up: gain is 10.00% off, wanted at most 0.2%", guard.KEEP)


def _report() -> GuardReport:
    measure, _ = _model(1, {"0.qkv": 20.0})
    return find_safe(BLOCKS, LINEARS, measure, own=True)


def test_a_report_survives_json() -> None:
    report = _report()
    assert GuardReport.from_dict(json.loads(json.dumps(report.to_dict())), "int8.json") == report


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no verdict": (lambda v: v.pop("verdict"), "int8.json: got"),
    "another key": (lambda v: v.update(extra=1), "int8.json: got"),
    "a verdict of its own": (lambda v: v.update(verdict="fine"), "verdict: got 'fine'"),
    "a verdict that is a list": (lambda v: v.update(verdict=["good"]), "verdict: got"),
    "reasons in one string": (lambda v: v.update(reasons="good"), "reasons: got 'good'"),
    "own as a number": (lambda v: v.update(own=1), "own: got 1"),
    "linears in a list": (lambda v: v.update(linears=[]), "linears: got"),
    "a reason that is none": (lambda v: v["fallbacks"].update(x=None), "fallbacks: got"),
    "accuracy of one key": (lambda v: v.update(accuracy={"pictures": 3}), "accuracy: got"),
    "pictures as a float": (lambda v: v["accuracy"].update(pictures=64.0), "pictures: got 64.0"),
    "pictures as true": (lambda v: v["accuracy"].update(pictures=True), "pictures: got True"),
    "an infinite sqnr": (lambda v: v["accuracy"].update(sqnr=math.inf), "sqnr: got inf"),
    "a gain in words": (lambda v: v["linears"]["1.up"].update(layer_gain="0"), "1.up: layer_gain"),
    "sums missing": (lambda v: v["integrity"].pop("sums"), "integrity: got"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_report_is_refused(damage: str) -> None:
    values = _report().to_dict()
    change, word = DAMAGES[damage]
    change(values)
    with pytest.raises(CheckpointError, match="wanted") as error:
        GuardReport.from_dict(values, "int8.json")
    assert word in str(error.value)


def test_a_report_in_words_has_its_figures() -> None:
    text = "\n".join(f"{topic}: {words}" for topic, words in _report().lines())
    for words in (
        "verdict: good",
        "mean 0.99930",
        "64 of your own pictures",
        "under 512 pictures this is no evidence",
        "0 of 1,000 integer sums are wrong",
        "6 in int8",
        "0.qkv in 16 bits: 20.0 dB",
    ):
        assert words in text
